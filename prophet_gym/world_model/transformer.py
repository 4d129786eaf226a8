"""Prophet's video transformer: diffusers' Cosmos transformer, conditioned on history frames and on actions."""

import inspect
from typing import Any

import torch
from diffusers import CosmosTransformer3DModel
from diffusers.configuration_utils import FrozenDict, register_to_config

# Not used here: `DiffusionPipeline.from_pretrained` looks the loading interface up in the module that holds the class.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from torch import nn
from torch.nn import functional as F

from prophet_gym.world_model.action_conditioning import FrameActionEmbedding


class _NoText(nn.Module):
    """Stands for a block's text branch (norm and cross-attention).

    Prophet's text embedding is all zeros (paper), and the cross-attention has no biases, so its output is exactly zero:
    leaving it out changes nothing and saves a seventh of the work and of the weights.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states.new_zeros(1)


class _NoTextNorm(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        zero = hidden_states.new_zeros(1)
        return zero, zero


class ProphetTransformer3DModel(CosmosTransformer3DModel):
    r"""
    Predicts the velocity of a chunk of latent frames from noisy frames, history frames and per-frame conditions.

    History frames enter as extra channels of every new frame, so that each token sees the same place in the past. The
    network's raw output is a residual: the clean chunk is `last history frame + output`, from which the rectified-flow
    velocity follows as `(sample - clean) / sigma`. A static background therefore costs the network nothing, and one
    sampling step from pure noise is the conditional mean.

    Args:
        latent_channels (`int`, defaults to `16`): channels C of a latent frame.
        history_frames (`int`, defaults to `3`): history frames H: the episode's first frame, then the most recent ones.
        condition_dim (`int`, defaults to `44`): size D_c of one frame's action condition.
        num_attention_heads (`int`), attention_head_dim (`int`), num_layers (`int`), mlp_ratio (`float`),
        adaln_lora_dim (`int`), patch_size (`tuple[int, int, int]`), max_size (`tuple[int, int, int]`):
            as in diffusers' `CosmosTransformer3DModel`.
    """

    # The base class keeps its positional embedding in fp32, which would leave new layers on `meta` when loading.
    _keep_in_fp32_modules = None

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        history_frames: int = 3,
        condition_dim: int = 44,
        num_attention_heads: int = 6,
        attention_head_dim: int = 32,
        num_layers: int = 6,
        mlp_ratio: float = 4.0,
        adaln_lora_dim: int = 32,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        max_size: tuple[int, int, int] = (8, 64, 64),
    ) -> None:
        super().__init__(
            in_channels=latent_channels * (1 + history_frames),
            out_channels=latent_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_layers=num_layers,
            mlp_ratio=mlp_ratio,
            text_embed_dim=attention_head_dim,
            adaln_lora_dim=adaln_lora_dim,
            max_size=max_size,
            patch_size=patch_size,
            rope_scale=(1.0, 1.0, 1.0),
            concat_padding_mask=False,
            extra_pos_embed_type="learnable",
        )
        # The base class registers its own arguments too; what is saved must be what this constructor takes.
        own = inspect.signature(type(self).__init__).parameters
        self._internal_dict = FrozenDict({key: value for key, value in self.config.items() if key in own})

        hidden_dim = num_attention_heads * attention_head_dim
        for block in self.transformer_blocks:
            block.attn2, block.norm2 = _NoText(), _NoTextNorm()
        # Rotary embeddings are relative, and a fixed camera makes absolute position matter. Not from zero, where the
        # normalised embedding has no direction.
        for name in ("pos_emb_t", "pos_emb_h", "pos_emb_w"):
            nn.init.normal_(getattr(self.learnable_pos_embed, name))
        self.action_embed = FrameActionEmbedding(condition_dim, hidden_dim)
        # Action frames have four times the latents' resolution.
        self._canvas_patch = 4 * patch_size[1]
        self.action_frame_embed = nn.Linear(3 * self._canvas_patch**2, hidden_dim)
        nn.init.zeros_(self.action_frame_embed.weight)
        nn.init.zeros_(self.action_frame_embed.bias)
        nn.init.zeros_(self.proj_out.weight)

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        history: torch.Tensor,
        condition: torch.Tensor,
        action_frames: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity `noise - clean` of the chunk.

        Args:
            sample: noisy latents (B, F, C, h, w).
            sigma: noise level in (0, 1], (B,); 1 is pure noise.
            history: clean latents (B, H, C, h, w); the last one is the most recent.
            condition: (B, F, D_c), see `FrameActionEmbedding`.
            action_frames: (B, F, 3, 4 h, 4 w), see `draw_action_frames`; black where the camera is not known.

        Returns:
            Velocity, float (B, F, C, h, w).
        """
        batch, frames, _, height, width = sample.shape
        past = history.flatten(1, 2)[:, None].expand(-1, frames, -1, -1, -1)  # (B, F, H C, h, w)
        video = torch.cat([sample, past], dim=2).transpose(1, 2)  # (B, C (1 + H), F, h, w)

        image_rotary_emb = self.rope(video)
        position = self.learnable_pos_embed(video)
        hidden_states = self.patch_embed(video)  # (B, F, h', w', D)
        grid = hidden_states.shape[1:4]
        hidden_states = hidden_states.flatten(1, 3)  # (B, F h' w', D)
        patches = F.pixel_unshuffle(action_frames.flatten(0, 1), self._canvas_patch)  # (B F, 3 p p, h', w')
        patches = patches.movedim(1, -1).reshape(batch, -1, patches.shape[1])
        hidden_states = hidden_states + self.action_frame_embed(patches.to(hidden_states.dtype))

        temb, embedded_timestep = self.time_embed(hidden_states, 1000.0 * sigma)  # (B, 3 D), (B, D)
        timestep_offset, adaln_offset = self.action_embed(condition)
        embedded_timestep = self._per_token(embedded_timestep[:, None] + timestep_offset, grid)
        temb = self._per_token(temb[:, None] + adaln_offset, grid)

        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, None, embedded_timestep, temb, image_rotary_emb, position)

        hidden_states = self.proj_out(self.norm_out(hidden_states, embedded_timestep, temb))
        p_t, p_h, p_w = self.config.patch_size
        residual = hidden_states.unflatten(2, (p_t, p_h, p_w, -1)).unflatten(1, grid)  # (B, F', h', w', pt, ph, pw, C)
        residual = residual.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(batch, frames, -1, height, width)
        clean = history[:, -1:] + residual
        return (sample - clean) / sigma[:, None, None, None, None]

    @staticmethod
    def _per_token(embedding: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        """Repeat per-frame embeddings (B, F, D) for every token of the frame: (B, F h' w', D)."""
        return embedding[:, :, None].expand(-1, -1, grid[1] * grid[2], -1).flatten(1, 2)
