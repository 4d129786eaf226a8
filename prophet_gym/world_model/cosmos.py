"""Prophet on Cosmos-Predict2-2B: diffusers' pretrained video transformer and the Wan autoencoder, with Prophet's
conditions added so that, before any training, they change nothing."""

import inspect
import os
import re

import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from diffusers.configuration_utils import register_to_config

# Not used here: `DiffusionPipeline.from_pretrained` looks the loading interface up in the module that holds the class.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_cosmos import CosmosPatchEmbed
from torch import nn
from torch.nn import functional as F

from prophet_gym.world_model.action_conditioning import FrameActionEmbedding
from prophet_gym.world_model.history import FramePackMemory, split_history
from prophet_gym.world_model.transformer import prepare_cosmos

_GIVEN_SIGMA = 1e-4 / (1 + 1e-4)
"""Noise level that diffusers' `Cosmos2VideoToWorldPipeline` tells the transformer of frames that are given."""


class ProphetCosmosTransformer3DModel(CosmosTransformer3DModel):
    r"""
    The Cosmos-Predict2 video-to-world transformer with the interface of `ProphetTransformer3DModel`.

    It sees a video whose first frame, the latest of the history, is given, and predicts the velocity of the others, as
    it was pretrained to. Prophet's conditions enter in three places, all zero-initialised: `FrameActionEmbedding` adds
    to the timestep embedding and the AdaLN vector of each new frame; `condition_embed` adds the first and the latest
    history frames, the carried frames and the action frames to the tokens of each frame; and the memory of the frames
    between them takes the text's place in the cross-attention. The text is all zeros (paper), which leaves the
    cross-attention without effect, so that nothing is lost; without a memory it is left out.

    The defaults are the layout of Cosmos-Predict2-2B-Video2World (1.6 billion weights without the cross-attention, 2
    billion with it).

    Args:
        latent_channels (`int`, defaults to `16`): channels C of a latent frame.
        history_frames (`int`, defaults to `3`): history frames H: the episode's first frame, then the most recent ones.
        memory (`tuple[tuple[int, int, int], ...]`, defaults to `()`): levels of the memory of the M frames before
            those, see `FramePackMemory`; empty is none.
        condition_dim (`int`, defaults to `52`): size D_c of one frame's action condition.
        num_arms (`int`, defaults to `1`): K, hands that carry something.
        fps (`int`, defaults to `16`): frames a second that the rotary embedding is told, the pretrained pipeline's
            default.
        text_embed_dim (`int`, defaults to `1024`): width of the text's tokens, which is that of the memory's.
        num_attention_heads (`int`), attention_head_dim (`int`), num_layers (`int`), mlp_ratio (`float`),
        adaln_lora_dim (`int`), max_size (`tuple[int, int, int]`), patch_size (`tuple[int, int, int]`),
        rope_scale (`tuple[float, float, float]`): as in diffusers' `CosmosTransformer3DModel`.

    Raises:
        ValueError: the levels are not what `FramePackMemory` takes.
    """

    _keep_in_fp32_modules = None
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        history_frames: int = 3,
        memory: tuple[tuple[int, int, int], ...] = (),
        condition_dim: int = 52,
        num_arms: int = 1,
        fps: int = 16,
        text_embed_dim: int = 1024,
        num_attention_heads: int = 16,
        attention_head_dim: int = 128,
        num_layers: int = 28,
        mlp_ratio: float = 4.0,
        adaln_lora_dim: int = 256,
        max_size: tuple[int, int, int] = (128, 240, 240),
        patch_size: tuple[int, int, int] = (1, 2, 2),
        rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0),
    ) -> None:
        super().__init__(
            in_channels=latent_channels + 1,  # and the mask of given frames
            out_channels=latent_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_layers=num_layers,
            mlp_ratio=mlp_ratio,
            text_embed_dim=text_embed_dim,
            adaln_lora_dim=adaln_lora_dim,
            max_size=max_size,
            patch_size=patch_size,
            rope_scale=rope_scale,
            concat_padding_mask=True,
            extra_pos_embed_type=None,
        )
        prepare_cosmos(self)

        hidden_dim = num_attention_heads * attention_head_dim
        self.action_embed = FrameActionEmbedding(condition_dim, hidden_dim)
        # History, carried frames, and an action frame, which has four times the latents' resolution.
        condition_channels = latent_channels * (history_frames + 2 * num_arms) + 3 * 16
        self.condition_embed = CosmosPatchEmbed(condition_channels, hidden_dim, patch_size, bias=False)
        nn.init.zeros_(self.condition_embed.proj.weight)
        self.framepack = FramePackMemory(latent_channels, text_embed_dim, memory) if memory else None

    @property
    def buffer_frames(self) -> int:
        """Frames of the history that `forward` takes, T_h = H + M."""
        return self.config.history_frames + (self.framepack.frames if self.framepack else 0)

    @classmethod
    def from_cosmos(
        cls,
        path: str | os.PathLike[str],
        history_frames: int = 3,
        memory: tuple[tuple[int, int, int], ...] = (),
        condition_dim: int = 52,
        num_arms: int = 1,
    ) -> "ProphetCosmosTransformer3DModel":
        """Begin from a pretrained video-to-world transformer, in the folder of its own `save_pretrained`.

        Raises:
            OSError: no such model is there.
            ValueError: it is not of the Cosmos-Predict2 video-to-world layout, or the levels of the memory are not
                what `FramePackMemory` takes.
        """
        pretrained = CosmosTransformer3DModel.from_pretrained(path, use_safetensors=True, local_files_only=True)
        config = pretrained.config
        if (
            config.in_channels != config.out_channels + 1
            or not config.concat_padding_mask
            or config.extra_pos_embed_type is not None
            or config.use_crossattn_projection
            or config.img_context_dim_in
            or config.patch_size[0] != 1
        ):
            raise ValueError(
                f"Expected the layout of Cosmos-Predict2-2B-Video2World in {path} (one mask channel, padding mask, no "
                "learned positions, no projection of the text, no image context): other Cosmos models do not fit."
            )
        own = inspect.signature(cls.__init__).parameters
        shared = {key: value for key, value in config.items() if key in own}
        model = cls(
            latent_channels=config.out_channels,
            history_frames=history_frames,
            memory=memory,
            condition_dim=condition_dim,
            num_arms=num_arms,
            **shared,
        )
        # With a memory the cross-attention is kept, all but its output, which starts at zero.
        text = re.compile(r"transformer_blocks\.\d+\." + (r"attn2\.to_out\." if memory else r"(attn2|norm2)\."))
        weights = {key: value for key, value in pretrained.state_dict().items() if not text.match(key)}
        added = ("action_embed", "condition_embed", "framepack")
        new = {key: value for key, value in model.state_dict().items() if key.split(".")[0] in added or text.match(key)}
        model.load_state_dict(new | weights)
        return model.eval()

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        history: torch.Tensor,
        condition: torch.Tensor,
        action_frames: torch.Tensor,
        carried: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity `noise - clean` of the chunk; arguments and result as `ProphetTransformer3DModel`'s."""
        batch, frames, _, height, width = sample.shape

        # What it was pretrained on: a given frame, noisy frames, a mask of what is given, and one of padding (none).
        video = torch.cat([history[:, -1:], sample], dim=1)  # (B, 1 + F, C, h, w)
        masks = video.new_zeros(batch, 1 + frames, 2, height, width)
        masks[:, 0, 0] = 1
        tokens = self.patch_embed(torch.cat([video, masks], dim=2).transpose(1, 2))  # (B, 1 + F, h', w', D)

        # What is new
        near, older = split_history(history, self.buffer_frames - self.config.history_frames)
        remembered = self.framepack(older) if self.framepack else None  # (B, N, D)
        past = near.flatten(1, 2)[:, None].expand(-1, 1 + frames, -1, -1, -1)
        moved = torch.cat([torch.zeros_like(carried[:, :1]), carried], dim=1).flatten(2, 3)
        drawn = F.pixel_unshuffle(action_frames.to(video.dtype), 4)  # (B, 1 + F, 3 * 16, h, w)
        tokens = tokens + self.condition_embed(torch.cat([past, moved, drawn], dim=2).transpose(1, 2))
        timestep_offset, adaln_offset = (F.pad(offset, (0, 0, 1, 0)) for offset in self.action_embed(condition))

        # One noise level per frame; the rectified flow's, as it was pretrained
        levels = torch.cat([torch.full_like(sigma, _GIVEN_SIGMA)[:, None], sigma[:, None].expand(-1, frames)], dim=1)
        temb, embedded_timestep = self.time_embed(sample, levels.flatten())  # (B (1 + F), 3 D), (B (1 + F), D)
        grid = tokens.shape[2:4]
        temb, embedded_timestep = (
            (value.unflatten(0, (batch, 1 + frames)) + offset)[:, :, None]  # (B, 1 + F, 1, ...)
            for value, offset in ((temb, adaln_offset), (embedded_timestep, timestep_offset))
        )

        image_rotary_emb = self.rope(video.transpose(1, 2), fps=self.config.fps)
        hidden_states = tokens.flatten(2, 3)  # (B, 1 + F, h' w', D)
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, remembered, embedded_timestep, temb, image_rotary_emb)
        hidden_states = self.proj_out(self.norm_out(hidden_states, embedded_timestep, temb))

        # (B, 1 + F, h', w', p_h, p_w, C): the order of the pretrained output
        _, p_h, p_w = self.config.patch_size
        velocity = hidden_states.unflatten(3, (p_h, p_w, -1)).unflatten(2, grid)
        return velocity.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)[:, 1:]


class ProphetCosmosAutoencoder(AutoencoderKLWan):
    r"""
    The Wan autoencoder with the interface of `ProphetAutoencoder`: its own constructor, weights and statistics.

    It is causal and would put four video frames into one latent frame, but its first latent frame always holds one
    video frame. So each frame is a clip of its own: a latent frame belongs to exactly one video frame and its actions,
    as everywhere in Prophet, exactly as the weights were trained for first frames, for four times as many latents.

    It stays as it was pretrained: training leaves its weights alone.
    """

    spatial_compression = 8
    frozen = True

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Encode frames, float (N, 3, H, W) in [-1, 1], H and W multiples of 8, to latents (N, C, H / 8, W / 8)."""
        latents = super().encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def decode(  # type: ignore[override]
        self,
        latents: torch.Tensor,
        reference: torch.Tensor,
        carried: torch.Tensor | None = None,
        action_frames: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode latents (B, F, C, h, w) to pixels (B, F, 3, 8 h, 8 w) in [-1, 1].

        The other arguments are those of `ProphetAutoencoder.decode`; this decoder needs none of them.
        """
        mean, std = self._statistics(latents)
        clips = (latents * std + mean).flatten(0, 1)[:, :, None]  # (B F, C, 1, h, w)
        return super().decode(clips).sample[:, :, 0].unflatten(0, latents.shape[:2])

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = latents.new_tensor([self.config.latents_mean, self.config.latents_std])[..., None, None]
        return mean, std
