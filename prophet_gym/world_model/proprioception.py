"""Prophet's estimate of its own body: the next proprioception from the present one and the actions."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class ProprioceptionModel(ModelMixin, ConfigMixin):
    r"""
    Residual MLP, one call per video frame: proprioception after `frame_stride` actions.

    The end-effector moves almost deterministically under OSC_POSE control, so a small regression is accurate; it also
    tells the transformer where the arm is going.

    Args:
        proprio_dim (`int`, defaults to `8`): size P: position (3, m), axis-angle (3, rad), finger positions (2, m).
        frame_stride (`int`, defaults to `4`): low-level actions between two frames.
        action_dim (`int`, defaults to `7`): size of one action.
        hidden_dim (`int`, defaults to `128`): width of the MLP.
    """

    @register_to_config
    def __init__(self, proprio_dim: int = 8, frame_stride: int = 4, action_dim: int = 7, hidden_dim: int = 128) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(proprio_dim + frame_stride * action_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, proprio_dim),
        )
        # Statistics of the training data; set by training, saved with the weights.
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))
        self.register_buffer("delta_std", torch.ones(proprio_dim))

    def normalize(self, proprio: torch.Tensor) -> torch.Tensor:
        """Standardise proprioception (..., P) with the training data's statistics."""
        return (proprio - self.proprio_mean) / self.proprio_std

    def forward(self, proprio: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Predict the next proprioception.

        Args:
            proprio: float (B, P), metres and radians.
            actions: float (B, frame_stride, action_dim) in [-1, 1].

        Returns:
            Proprioception after the actions, float (B, P), same units.
        """
        delta = self.network(torch.cat([self.normalize(proprio), actions.flatten(1)], dim=-1))
        return proprio + delta * self.delta_std
