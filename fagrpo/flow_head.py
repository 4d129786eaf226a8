"""Flow heads: velocity networks v(x_t, t, context) over an action chunk."""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class FlowHead(Protocol):
    """A policy head: anything with a velocity function.

    ``head(x_t, t, context)`` returns v = eps - x_0 for a batch: x_t (B, \\*A) the noised action in the policy's
    normalised units, t (B,) in (0, 1], context (B, C) the encoded observation; the result is (B, \\*A). It must be
    deterministic and treat rows independently (no dropout, no batch normalisation), or the ratio of new to old
    probability is not 1 before the first update. Pass the class as ``policy_kwargs=dict(flow_head_class=...)``: it is
    built with ``flow_head_class(action_shape, context_dim, **flow_head_kwargs)``.
    """

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor: ...


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Sine-cosine embedding of times.

    :param t: (B,) in [0, 1]
    :param dim: even
    :return: float32 (B, dim)
    """
    half = dim // 2
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class _ModulatedBlock(nn.Module):
    """Pre-norm residual MLP whose scale and shift come from the condition (AdaLN)."""

    def __init__(self, width: int, hidden: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition_dim, 2 * width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        hidden = self.norm(x) * (1 + scale) + shift
        return x + self.contract(nn.functional.silu(self.expand(hidden)))


class MlpFlowHead(nn.Module):
    """Flow head over a flattened action chunk: residual MLP blocks, modulated by the context and the time.

    It predicts the clean action x_0, which fits faster than the velocity at this scale, and returns the velocity
    ``v = (x_t - x_0) / t``. Below ``min_time`` the division uses ``min_time``; K even steps of a sampler evaluate it
    at t >= 1 / K.

    :param action_shape: A
    :param context_dim: C
    :param width: of the residual stream
    :param hidden: of each block's MLP
    :param num_blocks: number of blocks
    :param time_dim: of the time embedding, even
    :param min_time: smallest divisor
    """

    def __init__(
        self,
        action_shape: tuple[int, ...],
        context_dim: int,
        width: int = 256,
        hidden: int = 512,
        num_blocks: int = 3,
        time_dim: int = 64,
        min_time: float = 0.01,
    ) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.min_time = min_time
        dim = math.prod(action_shape)
        self.embed = nn.Linear(dim, width)
        self.time_embed = nn.Sequential(
            nn.Linear(time_dim, context_dim), nn.SiLU(), nn.Linear(context_dim, context_dim)
        )
        self.context_skip = nn.Linear(context_dim, width)
        self.blocks = nn.ModuleList([_ModulatedBlock(width, hidden, context_dim) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        flat = x_t.flatten(1)
        condition = nn.functional.silu(context + self.time_embed(sinusoidal_embedding(t, self.time_dim)))  # (B, C)
        hidden = self.embed(flat) + self.context_skip(context)  # (B, width)
        for block in self.blocks:
            hidden = block(hidden, condition)
        x_0 = self.project(self.norm(hidden)).float()
        velocity = (flat - x_0) / t.clamp(min=self.min_time)[:, None]
        return velocity.reshape(x_t.shape)
