"""Prophet's video transformer: diffusers' Cosmos transformer between convolutions, conditioned on history, actions."""

import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from diffusers import CosmosTransformer3DModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention_processor import Attention

# Not used here: `DiffusionPipeline.from_pretrained` looks the loading interface up in the module that holds the class.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from prophet_gym.world_model.action_conditioning import FrameActionEmbedding
from prophet_gym.world_model.history import FramePackMemory, split_history

_KEEP_LATEST = 4.0
"""Bias of the choice between the latest frame, the first one and the carried ones: an untrained model shows a still."""


class _NoText(nn.Module):
    """Stands for a block's text branch (norm and cross-attention).

    Prophet's text embedding is all zeros (paper), and the cross-attention has no biases, so its output is exactly zero:
    leaving it out changes nothing and saves a seventh of the work and of the weights.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states.new_zeros(1)


class _NoTextNorm(nn.Module):
    """Stands for the norm of a text branch that is left out, see `_NoText`: no shift, and a gate that is shut."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        zero = hidden_states.new_zeros(1)
        return zero, zero


class FrameAttnProcessor(CosmosAttnProcessor2_0):
    """Attention among all tokens of a chunk, which come frame by frame: (B, F, N, D).

    So that a frame's modulation, (B, F, 1, D), is computed once and not for each of its tokens.
    """

    # `Attention` hands on the arguments that are named here, and drops all others.
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens = hidden_states.flatten(1, 2)
        attended: torch.Tensor = super().__call__(attn, tokens, encoder_hidden_states, attention_mask, image_rotary_emb)
        return attended.unflatten(1, hidden_states.shape[1:3])


def prepare_cosmos(transformer: CosmosTransformer3DModel) -> None:
    """What a subclass does once the base class is built: give the cross-attention another subject than text, and keep a
    config of its own.

    The base class registers its own arguments too; what is saved must be what the subclass's constructor takes. With a
    memory the cross-attention reads it, and its output starts at zero; without one it is left out.

    Raises:
        ValueError: a history without room for the episode's first frame and the latest one.
    """
    if transformer.config.history_frames < 2:
        raise ValueError(f"history_frames must be at least 2, got {transformer.config.history_frames}.")
    own = inspect.signature(type(transformer).__init__).parameters
    transformer._internal_dict = FrozenDict({key: value for key, value in transformer.config.items() if key in own})
    for block in transformer.transformer_blocks:
        if transformer.config.memory:
            nn.init.zeros_(block.attn2.to_out[0].weight)
        else:
            block.attn2, block.norm2 = _NoText(), _NoTextNorm()
        for attention in block.modules():
            if isinstance(attention, Attention):
                attention.set_processor(FrameAttnProcessor())


_Transformer = TypeVar("_Transformer", bound=CosmosTransformer3DModel)


def with_memory(transformer: _Transformer, memory: Sequence[tuple[int, int, int]]) -> _Transformer:
    """A copy of a transformer without memory that has one; until it is trained its output is the same.

    The initial weights of the memory and of the cross-attention come from torch's global generator.

    Args:
        transformer: a `ProphetTransformer3DModel` or `ProphetCosmosTransformer3DModel`.
        memory: see `FramePackMemory`.

    Raises:
        ValueError: it has a memory already, or the levels are not what `FramePackMemory` takes.
    """
    if transformer.config.memory:
        raise ValueError(f"The transformer has a memory already: {transformer.config.memory}.")
    own = inspect.signature(type(transformer).__init__).parameters
    config = {key: value for key, value in transformer.config.items() if key in own}
    copy = type(transformer)(**config | {"memory": tuple(memory)})
    copy.load_state_dict(copy.state_dict() | transformer.state_dict())
    # `ModelMixin.to` would warn of modules to keep in float32.
    nn.Module.to(copy, transformer.device, transformer.dtype)
    return copy.train(transformer.training)


class ConditionedBlock(nn.Module):
    """Two 3x3 convolutions around a skip; the first normalisation is modulated by the frame's embedding."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(min(8, channels), channels)
        self.modulation = nn.Linear(embedding_dim, 2 * channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_out = nn.GroupNorm(min(8, channels), channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Map (N, C, h, w), modulated by (N, D), to the same shape."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        residual = self.conv_in(F.silu(self.norm_in(hidden_states) * (1 + scale) + shift))
        return hidden_states + self.conv_out(F.silu(self.norm_out(residual)))


class ProphetTransformer3DModel(CosmosTransformer3DModel):
    r"""
    Predicts the velocity of a chunk of latent frames from noisy frames, history frames and per-frame conditions.

    Convolutions around the transformer blocks work at the latents' full resolution, where contact happens: what moves
    is local, and the same everywhere. The blocks between them see the whole chunk at once, in tokens of 2 x 2 latents.

    The first history frame and the latest ones enter as extra channels of every new frame, so that each place sees its
    own past, and so do the carried frames: the latest one as each hand carries it, and the first one as the hand
    carries what it took there. The frames between first and latest are in the memory, whose tokens the cross-attention
    of the blocks reads. The raw output is a choice between the first frame, the latest one and the carried ones, and a
    residual: together the clean chunk, from which the rectified-flow velocity follows as `(sample - clean) / sigma`. A
    static background therefore costs the network nothing, and one sampling step from pure noise is the conditional
    mean.

    Args:
        latent_channels (`int`, defaults to `16`): channels C of a latent frame.
        history_frames (`int`, defaults to `3`): history frames H: the episode's first frame, then the most recent ones.
        memory (`tuple[tuple[int, int, int], ...]`, defaults to `()`): levels of the memory of the M frames before
            those, see `FramePackMemory`; empty is none.
        condition_dim (`int`, defaults to `52`): size D_c of one frame's action condition.
        num_arms (`int`, defaults to `1`): K, hands that carry something.
        conv_channels (`int`, defaults to `128`): width of the convolutions.
        conv_blocks (`tuple[int, int]`, defaults to `(2, 3)`): convolutional blocks before and after the transformer's.
        num_attention_heads (`int`), attention_head_dim (`int`), num_layers (`int`), mlp_ratio (`float`),
        adaln_lora_dim (`int`), patch_size (`tuple[int, int, int]`), max_size (`tuple[int, int, int]`):
            as in diffusers' `CosmosTransformer3DModel`.

    Raises:
        ValueError: the levels are not what `FramePackMemory` takes.
    """

    # The base class keeps its positional embedding in fp32, which would leave new layers on `meta` when loading.
    _keep_in_fp32_modules = None

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        history_frames: int = 3,
        memory: tuple[tuple[int, int, int], ...] = (),
        condition_dim: int = 52,
        num_arms: int = 1,
        conv_channels: int = 128,
        conv_blocks: tuple[int, int] = (2, 3),
        num_attention_heads: int = 6,
        attention_head_dim: int = 32,
        num_layers: int = 4,
        mlp_ratio: float = 4.0,
        adaln_lora_dim: int = 32,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        max_size: tuple[int, int, int] = (8, 64, 64),
    ) -> None:
        hidden_dim = num_attention_heads * attention_head_dim
        super().__init__(
            in_channels=conv_channels,
            out_channels=conv_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_layers=num_layers,
            mlp_ratio=mlp_ratio,
            text_embed_dim=hidden_dim if memory else attention_head_dim,
            adaln_lora_dim=adaln_lora_dim,
            max_size=max_size,
            patch_size=patch_size,
            rope_scale=(1.0, 1.0, 1.0),
            concat_padding_mask=False,
            extra_pos_embed_type="learnable",
        )
        prepare_cosmos(self)

        # Rotary embeddings are relative, and a fixed camera makes absolute position matter. Not from zero, where the
        # normalised embedding has no direction.
        for name in ("pos_emb_t", "pos_emb_h", "pos_emb_w"):
            nn.init.normal_(getattr(self.learnable_pos_embed, name))
        self.action_embed = FrameActionEmbedding(condition_dim, hidden_dim)
        self.video_in = nn.Conv2d(latent_channels * (1 + 2 * num_arms + history_frames), conv_channels, 3, padding=1)
        # Action frames, of the present and of the new frame, have four times the latents' resolution.
        self.action_frame_in = nn.Conv2d(2 * 3 * 16, conv_channels, 3, padding=1)
        nn.init.zeros_(self.action_frame_in.weight)
        nn.init.zeros_(self.action_frame_in.bias)
        stem, head = ((ConditionedBlock(conv_channels, hidden_dim) for _ in range(count)) for count in conv_blocks)
        self.stem, self.head = nn.ModuleList(stem), nn.ModuleList(head)
        self.video_out = nn.Conv2d(conv_channels, latent_channels + 2 + 2 * num_arms, 3, padding=1)
        nn.init.zeros_(self.video_out.weight)
        nn.init.zeros_(self.video_out.bias)
        self.framepack = FramePackMemory(latent_channels, hidden_dim, memory) if memory else None

    @property
    def buffer_frames(self) -> int:
        """Frames of the history that `forward` takes, T_h = H + M."""
        return self.config.history_frames + (self.framepack.frames if self.framepack else 0)

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        history: torch.Tensor,
        condition: torch.Tensor,
        action_frames: torch.Tensor,
        carried: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity `noise - clean` of the chunk.

        Args:
            sample: noisy latents (B, F, C, h, w).
            sigma: noise level in (0, 1], (B,); 1 is pure noise.
            history: clean latents (B, T_h, C, h, w): the episode's first frame, the M frames of the memory, and the
                latest ones, in order of time.
            condition: (B, F, D_c), see `FrameActionEmbedding`.
            action_frames: (B, 1 + F, 3, 4 h, 4 w), of the present and of each new frame, see `draw_action_frames`;
                black where the camera is not known.
            carried: latents (B, F, 2 K, C, h, w), the latest frame and the first one as each hand carries them until
                each frame, see `carry_latents`.

        Returns:
            Velocity, float (B, F, C, h, w).
        """
        batch, frames = sample.shape[:2]
        near, older = split_history(history, self.buffer_frames - self.config.history_frames)
        remembered = self.framepack(older) if self.framepack else None  # (B, N, D)
        past = near.flatten(1, 2)[:, None].expand(-1, frames, -1, -1, -1)  # (B, F, H C, h, w)
        video = torch.cat([sample, past, carried.flatten(2, 3)], dim=2).flatten(0, 1)  # (B F, (1 + 2 K + H) C, h, w)
        drawn = torch.stack([action_frames[:, :1].expand(-1, frames, -1, -1, -1), action_frames[:, 1:]], dim=2)
        drawn = F.pixel_unshuffle(drawn.flatten(0, 1).flatten(1, 2), 4)  # (B F, 2 * 3 * 16, h, w)

        # Conditions: one embedding per frame
        temb, embedded_timestep = self.time_embed(sample.new_zeros(1), 1000.0 * sigma)  # (B, 3 D), (B, D)
        timestep_offset, adaln_offset = self.action_embed(condition)
        embedded_timestep = embedded_timestep[:, None] + timestep_offset  # (B, F, D)
        temb = temb[:, None] + adaln_offset
        embedding = embedded_timestep.flatten(0, 1)

        # Convolutions at full resolution
        local = self.video_in(video) + self.action_frame_in(drawn.to(video.dtype))  # (B F, Ch, h, w)
        for block in self.stem:
            local = block(local, embedding)

        # Transformer over all tokens of the chunk
        tokens = local.unflatten(0, (batch, frames)).transpose(1, 2)  # (B, Ch, F, h, w)
        image_rotary_emb = self.rope(tokens)
        position = self.learnable_pos_embed(tokens[:1]).unflatten(1, (frames, -1))
        hidden_states = self.patch_embed(tokens)  # (B, F, h', w', D)
        grid = hidden_states.shape[2:4]
        hidden_states = hidden_states.flatten(2, 3)  # (B, F, h' w', D)
        embedded_timestep, temb = embedded_timestep[:, :, None], temb[:, :, None]
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, remembered, embedded_timestep, temb, image_rotary_emb, position)
        hidden_states = self.proj_out(self.norm_out(hidden_states, embedded_timestep, temb))
        p_t, p_h, p_w = self.config.patch_size
        wide = hidden_states.unflatten(3, (p_t, p_h, p_w, -1)).unflatten(2, grid)  # (B, F', h', w', pt, ph, pw, Ch)
        wide = wide.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(local.shape)

        # Convolutions again, and the choice of what to keep
        local = local + wide
        for block in self.head:
            local = block(local, embedding)
        raw = self.video_out(F.silu(local)).unflatten(0, (batch, frames))
        residual, logits = raw.tensor_split([sample.shape[2]], dim=2)
        bias = F.pad(logits.new_tensor([_KEEP_LATEST]), (0, logits.shape[2] - 1))
        choice = (logits.float() + bias[:, None, None]).softmax(dim=2)  # (B, F, 2 + 2 K, h, w)
        latest, first, follow = choice[:, :, :1], choice[:, :, 1:2], choice[:, :, 2:, None]
        clean = latest * history[:, -1:] + first * history[:, :1] + (follow * carried).sum(dim=2) + residual
        return (sample - clean) / sigma[:, None, None, None, None]
