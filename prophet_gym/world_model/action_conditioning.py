"""The scalar action stream: what the robot is told to do between two frames, as one embedding per frame."""

import torch
from torch import nn


class FrameActionEmbedding(nn.Module):
    """Embed, for every new frame, the actions that lead to it and the proprioception before and after them.

    The result is added to the timestep embedding and to the AdaLN vector (paper, action conditioning), so that action
    k acts on frame k. Both output layers start at zero: an untrained embedding leaves the transformer as it was.

    Args:
        condition_dim: D_c, size of one frame's condition: frame_stride * action_dim + 2 * proprio_dim.
        hidden_dim: D, width of the transformer.
    """

    def __init__(self, condition_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(condition_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()
        )
        self.to_timestep = nn.Linear(hidden_dim, hidden_dim)
        self.to_adaln = nn.Linear(hidden_dim, 3 * hidden_dim)
        for layer in (self.to_timestep, self.to_adaln):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map conditions (B, F, D_c) to timestep offsets (B, F, D) and AdaLN offsets (B, F, 3 D)."""
        hidden = self.trunk(condition)
        return self.to_timestep(hidden), self.to_adaln(hidden)
