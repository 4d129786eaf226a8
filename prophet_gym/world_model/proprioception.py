"""Prophet's estimate of its own body: the next proprioception from the present one, the actions and what is nearby."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from prophet_gym.world_model.action_conditioning import look_around


class ProprioceptionModel(ModelMixin, ConfigMixin):
    r"""
    Recurrent network, one step per low-level action, one call per video frame.

    In free motion the end-effector moves almost linearly in its velocity and the action: a linear map predicts the
    motion and the next velocity, which decays by itself, and a gated recurrent network corrects both. What the arm
    meets, it can only see: a small crop around the end-effector, of the frame that the episode began with, says where
    it will be stopped, and how far the fingers close: that is whether a grasp holds. It does not look at later frames,
    for those are imagined: the arm is seen there where it is believed to be, and a model that learned from real ones to
    correct its belief by them would be misled.

    The state of a robot is its proprioception, its velocity and a memory, float (B, 2 * proprio_dim + hidden_dim).

    Args:
        proprio_dim (`int`, defaults to `8`): size P: position (3, m), axis-angle (3, rad), finger positions (2, m).
        frame_stride (`int`, defaults to `4`): low-level actions between two frames.
        action_dim (`int`, defaults to `7`): size of one action.
        hidden_dim (`int`, defaults to `192`): size of the memory.
        crop_size (`int`, defaults to `24`): side of the crop, pixels.
    """

    @register_to_config
    def __init__(
        self,
        proprio_dim: int = 8,
        frame_stride: int = 4,
        action_dim: int = 7,
        hidden_dim: int = 192,
        crop_size: int = 24,
    ) -> None:
        super().__init__()
        self.eyes = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * (crop_size // 4) ** 2, 64),
            nn.SiLU(),
            nn.Dropout(0.1),  # a scene is easily learned by heart
        )
        # Gated: how far an action moves the hand depends on where the arm is.
        self.encoder = nn.Linear(2 * proprio_dim + action_dim + 64, 2 * hidden_dim)
        self.cell = nn.GRUCell(hidden_dim, hidden_dim)
        self.motion = nn.Linear(proprio_dim + action_dim, proprio_dim)
        self.push = nn.Linear(action_dim, proprio_dim)
        self.decay = nn.Parameter(torch.zeros(proprio_dim))
        self.correction = nn.Sequential(
            nn.Linear(2 * hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 2 * proprio_dim)
        )
        # Statistics of the training data; set by training, saved with the weights.
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))
        self.register_buffer("delta_std", torch.ones(proprio_dim))  # of the change between two frames

    @property
    def state_dim(self) -> int:
        """Size of a robot's state."""
        return 2 * self.config.proprio_dim + self.config.hidden_dim

    def normalize(self, proprio: torch.Tensor) -> torch.Tensor:
        """Standardise proprioception (..., P) with the training data's statistics."""
        return (proprio - self.proprio_mean) / self.proprio_std

    def init_state(self, proprio: torch.Tensor) -> torch.Tensor:
        """The state (B, S) of a robot at rest with this proprioception (B, P)."""
        return nn.functional.pad(proprio, (0, self.state_dim - proprio.shape[1]))

    # Millimetres matter, and bfloat16 has three digits.
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(
        self,
        state: torch.Tensor,
        actions: torch.Tensor,
        start: torch.Tensor,
        projection: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the state at the next frame.

        Args:
            state: float (B, S), from `init_state` or from the previous call; its proprioception in metres and radians.
            actions: float (B, frame_stride, action_dim) in [-1, 1].
            start: float (B, 3, H, W) in [-1, 1], the episode's first frame.
            projection: float32 (B, 3, 4), the camera, see `draw_action_frames`.

        Returns:
            State after the actions, same shape and units.
        """
        config = self.config
        proprio, velocity, memory = state.split([config.proprio_dim, config.proprio_dim, config.hidden_dim], dim=-1)
        seen = self.eyes(look_around(start, proprio[:, :3].detach(), projection, config.crop_size))
        decay = torch.sigmoid(self.decay)
        for action in actions.unbind(1):
            # Bounded, so that a rollout that goes astray does not run away.
            where = self.normalize(proprio).clamp(-5, 5)
            inputs = torch.cat([where, velocity.clamp(-5, 5), action, seen], dim=-1)
            value, gate = self.encoder(inputs).chunk(2, dim=-1)
            hidden = value * nn.functional.silu(gate)
            memory = self.cell(hidden, memory)
            motion, push = self.correction(torch.cat([hidden, memory], dim=-1)).chunk(2, dim=-1)
            motion = motion + self.motion(torch.cat([velocity, action], dim=-1))
            velocity = decay * velocity + self.push(action) + push
            proprio = proprio + motion * (self.delta_std / config.frame_stride)
        return torch.cat([proprio, velocity, memory], dim=-1)
