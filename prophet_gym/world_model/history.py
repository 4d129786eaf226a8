"""The frames that a rollout remembers, and FramePack-style memory of the older ones: the older, the fewer tokens.

A history is (B, T_h, C, h, w): the episode's first frame, then M older frames, then the latest ones, in order of time.
Where an episode is younger than that, its first frame is repeated (left padding). Its length never changes, so a chunk
costs the same however long the rollout has become.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

_OCTAVES = 4
"""Of the waves that tell places apart: from half a wave over the image to four."""


def advance_history(history: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Append latents (B, F, C, h, w) to a history (B, T_h, C, h, w): first frame kept, then the most recent."""
    recent = torch.cat([history[:, 1:], latents.to(history.dtype)], dim=1)
    return torch.cat([history[:, :1], recent[:, 1 - history.shape[1] :]], dim=1)


def split_history(history: torch.Tensor, older: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first frame with the latest ones (B, T_h - M, C, h, w), and the M = `older` between them (B, M, C, h, w)."""
    return torch.cat([history[:, :1], history[:, 1 + older :]], dim=1), history[:, 1 : 1 + older]


class FramePackMemory(nn.Module):
    r"""
    Tokens of older frames, the older the fewer (FramePack, arXiv 2504.12626), for the blocks' cross-attention.

    Every level averages its frames over `temporal_pool` frames and `spatial_pool` x `spatial_pool` latents, projects
    them, and adds what says when (learned, one for each time of each level) and where (learned from waves over the
    image, the same in all levels, so that any size will do). How many tokens there are depends on the levels and the
    size of the latents alone.

    Where `spatial_pool` does not divide the latents' side, the side becomes ceil(side / spatial_pool) tokens, spread
    evenly, of areas that overlap a little (adaptive average pooling): no place is left out and none is padded.

    Args:
        channels (`int`): channels C of a latent frame.
        dim (`int`): width D of a token.
        levels (`Sequence[tuple[int, int, int]]`): (frames, temporal_pool, spatial_pool) of each level, the most recent
            frames first, which should be the finest.

    Raises:
        ValueError: a level is not three numbers of at least 1, or its frames are not a multiple of temporal_pool.
    """

    def __init__(self, channels: int, dim: int, levels: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        for level in levels:
            if len(level) != 3 or min(level) < 1 or level[0] % level[1]:
                raise ValueError(
                    "Expected each level of the memory as (frames, temporal_pool, spatial_pool), each at least 1 and "
                    f"frames a multiple of temporal_pool, got {level}."
                )
        self.levels = tuple(levels)
        self.embed = nn.ModuleList(nn.Linear(channels, dim) for _ in levels)
        self.time = nn.Parameter(0.5 * torch.randn(sum(frames // pool for frames, pool, _ in levels), dim))
        self.place = nn.Linear(4 * _OCTAVES, dim, bias=False)

    @property
    def frames(self) -> int:
        """The older frames M that it takes."""
        return sum(frames for frames, _, _ in self.levels)

    def forward(self, older: torch.Tensor) -> torch.Tensor:
        """Pool and project.

        Args:
            older: latents (B, M, C, h, w) in order of time.

        Returns:
            Tokens (B, N, D): the levels in their order, in each of them times in order, rows and columns.
        """
        spans = older.split([frames for frames, _, _ in reversed(self.levels)], dim=1)[::-1]
        times = self.time.split([frames // pool for frames, pool, _ in self.levels])
        tokens = []
        for (_, temporal_pool, spatial_pool), embed, span, time in zip(
            self.levels, self.embed, spans, times, strict=True
        ):
            pooled = span.unflatten(1, (-1, temporal_pool)).mean(dim=2)  # (B, T, C, h, w)
            rows, columns = (math.ceil(side / spatial_pool) for side in older.shape[-2:])
            pooled = F.adaptive_avg_pool2d(pooled.flatten(0, 1), (rows, columns)).unflatten(0, pooled.shape[:2])
            content = embed(pooled.flatten(3).transpose(2, 3))  # (B, T, h' w', D)
            place = self.place(_waves(rows, columns, older.device).to(self.place.weight.dtype))  # (h' w', D)
            tokens.append((content + time[:, None] + place).flatten(1, 2))
        return torch.cat(tokens, dim=1)


def _waves(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines of the places of a grid over the image, float32 (height * width, 4 * _OCTAVES)."""
    frequencies = math.pi * 2.0 ** torch.arange(_OCTAVES, device=device)
    rows, columns = (
        torch.cat([phase.sin(), phase.cos()], dim=1)
        for side in (height, width)
        for phase in [(torch.arange(side, device=device)[:, None] + 0.5) / side * frequencies]
    )
    return torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2).flatten(0, 1)
