"""Prophet's estimate of its own body: the next proprioception from the present one and the actions."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


class ProprioceptionModel(ModelMixin, ConfigMixin):
    r"""
    Recurrent network, one call per video frame: proprioception after `frame_stride` actions.

    The end-effector moves almost deterministically under OSC_POSE control, so a small regression is accurate; it also
    tells the transformer where the arm is going. What one proprioception does not show (how fast the arm moves, whether
    it pushes against something) is kept in a memory.

    The state of a robot is its proprioception followed by this memory, float (B, proprio_dim + hidden_dim).

    Args:
        proprio_dim (`int`, defaults to `8`): size P: position (3, m), axis-angle (3, rad), finger positions (2, m).
        frame_stride (`int`, defaults to `4`): low-level actions between two frames.
        action_dim (`int`, defaults to `7`): size of one action.
        hidden_dim (`int`, defaults to `160`): size of the memory.
    """

    @register_to_config
    def __init__(self, proprio_dim: int = 8, frame_stride: int = 4, action_dim: int = 7, hidden_dim: int = 160) -> None:
        super().__init__()
        # Gated: how far an action moves the hand depends on where the arm is.
        self.encoder = nn.Linear(proprio_dim + frame_stride * action_dim, 2 * hidden_dim)
        self.cell = nn.GRUCell(hidden_dim, hidden_dim)
        self.head = nn.Sequential(nn.Linear(2 * hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, proprio_dim))
        # Statistics of the training data; set by training, saved with the weights.
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))
        self.register_buffer("delta_std", torch.ones(proprio_dim))

    def normalize(self, proprio: torch.Tensor) -> torch.Tensor:
        """Standardise proprioception (..., P) with the training data's statistics."""
        return (proprio - self.proprio_mean) / self.proprio_std

    def init_state(self, proprio: torch.Tensor) -> torch.Tensor:
        """The state (B, P + hidden_dim) of a robot at rest with this proprioception (B, P)."""
        return F.pad(proprio, (0, self.config.hidden_dim))

    def forward(self, state: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Predict the next state.

        Args:
            state: float (B, P + hidden_dim), from `init_state` or from the previous call; metres and radians.
            actions: float (B, frame_stride, action_dim) in [-1, 1].

        Returns:
            State after the actions, same shape and units.
        """
        proprio, memory = state.split([self.config.proprio_dim, self.config.hidden_dim], dim=-1)
        value, gate = self.encoder(torch.cat([self.normalize(proprio), actions.flatten(1)], dim=-1)).chunk(2, dim=-1)
        hidden = value * F.silu(gate)
        memory = self.cell(hidden, memory)
        delta = self.head(torch.cat([hidden, memory], dim=-1))
        return torch.cat([proprio + delta * self.delta_std, memory], dim=-1)
