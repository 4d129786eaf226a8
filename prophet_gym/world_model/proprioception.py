"""Prophet's estimate of its own body: the next proprioception from the present one, the actions and what is nearby."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from prophet_gym.data.episode import ACTION_DIM, PROPRIO_DIM
from prophet_gym.world_model.action_conditioning import look_around


class ProprioceptionModel(ModelMixin, ConfigMixin):
    r"""
    Locally linear dynamics with a recurrent correction, one step per video frame.

    While an arm moves freely, one frame is an affine map of its velocity and its actions; which one depends on where
    the arm is, because a torque that turns the hand also pushes it. A network of the pose and of a memory, which can
    keep what the pose does not show, gives that map. What the arm meets, it can only see: a small crop around the
    end-effector, of the frame that the episode began with, says where it will be stopped, and how far the fingers
    close: that is whether a grasp holds; a gated recurrent network adds what follows. It does not look at later frames,
    for those are imagined: the arm is seen there where it is believed to be, and a model that learned from real ones to
    correct its belief by them would be misled.

    Where a grasp is close, what happens cannot be known from a picture, only guessed; a policy that is rewarded for
    what one model guesses soon plays for its errors. So the model can be an ensemble: members with weights of their
    own, of which one moves a robot for a whole episode (the TS-infinity sampling of Chua et al. 2018, arXiv
    1805.12114).

    Actions are evidence, too: a policy that goes on to the plate has seen that it holds the bowl. In a recorded episode
    they answer to what really happened, and an estimate does well to believe them; where a policy acts in Prophet they
    answer to Prophet's own estimate, and to believe them is to delude oneself (Ortega et al. 2021, arXiv 2110.10819). A
    model that has to serve both without knowing which hedges, so it is told: whether the actions are rehearsed.

    The state of a robot is its proprioception, its velocity, a memory, whether its actions are rehearsed, and the
    number of its member, float (B, P + velocity_dim K + hidden_dim + 2).

    Several robots share the weights. Each has a slot: its statistics, the mask of the actions that it obeys, and two
    inputs, one that says which robot it is, and one that says so where its actions are rehearsed: a robot without
    rehearsed training episodes moves as it does in recorded ones. A robot of fewer than K arms obeys no action of the
    others, whose proprioception stays what it is.

    Args:
        num_arms (`int`, defaults to `1`): K. The proprioception has P = 8 K numbers, for each arm position (3, m),
            axis-angle (3, rad) and finger positions (2, m); an action has A = 7 K.
        frame_stride (`int`, defaults to `4`): low-level actions between two frames.
        robots (`int`, defaults to `8`): slots R, of which some may be free.
        velocity_dim (`int`, defaults to `16`): size of the velocity, for each arm, which is what the affine map carries
            on; at least 8.
        hidden_dim (`int`, defaults to `128`): size of the memory.
        width (`int`, defaults to `192`): width of the networks.
        crop_size (`int`, defaults to `24`): side of the crop, pixels, a multiple of 4.
        num_members (`int`, defaults to `1`): size M of the ensemble.
    """

    # All of it, whatever dtype is asked for when it is loaded: bfloat16 would round poses to millimetres.
    _keep_in_fp32_modules = ["members", "proprio_mean", "proprio_std", "delta_std", "action_mask"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_arms: int = 1,
        frame_stride: int = 4,
        robots: int = 8,
        velocity_dim: int = 16,
        hidden_dim: int = 128,
        width: int = 192,
        crop_size: int = 24,
        num_members: int = 1,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("num_members", num_members, 1),
            ("num_arms", num_arms, 1),
            ("velocity_dim", velocity_dim, PROPRIO_DIM),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}.")
        self.members = nn.ModuleList(
            _Member(
                num_arms=num_arms,
                frame_stride=frame_stride,
                robots=robots,
                velocity_dim=velocity_dim,
                hidden_dim=hidden_dim,
                width=width,
                crop_size=crop_size,
            )
            for _ in range(num_members)
        )
        # Statistics of the training data, for each robot; set by training, saved with the weights.
        self.register_buffer("proprio_mean", torch.zeros(robots, self.proprio_dim))
        self.register_buffer("proprio_std", torch.ones(robots, self.proprio_dim))
        self.register_buffer("delta_std", torch.ones(robots, self.proprio_dim))  # of the change between two frames
        self.register_buffer("action_mask", torch.ones(robots, self.action_dim))

    @property
    def proprio_dim(self) -> int:
        """Size P of the proprioception."""
        return PROPRIO_DIM * self.config.num_arms

    @property
    def action_dim(self) -> int:
        """Size A of one action."""
        return ACTION_DIM * self.config.num_arms

    @property
    def condition_dim(self) -> int:
        """Size D_c of one frame's condition, see `frame_condition`."""
        return self.config.frame_stride * self.action_dim + 2 * self.proprio_dim + self.config.robots

    @property
    def arm_mask(self) -> torch.Tensor:
        """Which arms each robot has, bool (R, K)."""
        return self.action_mask.unflatten(1, (self.config.num_arms, -1)).any(dim=2)

    @property
    def state_dim(self) -> int:
        """Size of a robot's state."""
        return self.proprio_dim + self.config.num_arms * self.config.velocity_dim + self.config.hidden_dim + 2

    def member(self, index: int) -> "ProprioceptionModel":
        """One member alone, as a model whose weights and statistics are this one's."""
        with torch.device("meta"):
            alone = type(self).from_config(self.config, num_members=1)
        alone.members = nn.ModuleList([self.members[index]])
        for name, statistics in self.named_buffers():
            alone.register_buffer(name, statistics)
        return alone

    def untrained(self, num_members: int | None = None) -> "ProprioceptionModel":
        """A model of the same configuration and statistics with random weights, on the CPU; of so many members, or of
        as many."""
        count = self.config.num_members if num_members is None else num_members
        fresh = type(self).from_config(self.config, num_members=count)
        for name, statistics in self.named_buffers():
            fresh.get_buffer(name).copy_(statistics)
        return fresh

    def normalize(self, proprio: torch.Tensor, robot: torch.Tensor) -> torch.Tensor:
        """Standardise proprioception (B, ..., P) with the training data's statistics of robots (B,)."""
        shape = (len(robot), *(1,) * (proprio.ndim - 2), -1)
        return (proprio - self.proprio_mean[robot].view(shape)) / self.proprio_std[robot].view(shape)

    def init_state(
        self, proprio: torch.Tensor, member: torch.Tensor | None = None, rehearsed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The state of robots at rest.

        Args:
            proprio: float (B, P).
            member: int64 (B,), which member moves each robot; None: the first one.
            rehearsed: bool (B,), whether the actions to come answer to this model or to what really happened; None: to
                this model.

        Returns:
            float (B, S).
        """
        state = F.pad(proprio, (0, self.state_dim - proprio.shape[1]))
        state[:, -2] = 1.0 if rehearsed is None else rehearsed
        if member is not None:
            state[:, -1] = member
        return state

    # Millimetres matter, and bfloat16 has three digits.
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(
        self,
        state: torch.Tensor,
        actions: torch.Tensor,
        start: torch.Tensor,
        projection: torch.Tensor,
        robot: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the state at the next frame.

        Args:
            state: float (B, S), from `init_state` or from the previous call; its proprioception in metres and radians.
            actions: float (B, frame_stride, action_dim) in [-1, 1].
            start: float (B, 3, H, W) in [-1, 1], the episode's first frame.
            projection: float32 (B, K, 3, 4), the camera, see `draw_action_frames`.
            robot: int64 (B,), the robots' slots.

        Returns:
            State after the actions, same shape and units.
        """
        proprio = state[:, : self.proprio_dim]
        crop = look_around(start, proprio.detach(), projection, self.config.crop_size)
        which = F.one_hot(robot, self.config.robots).to(state)
        rehearsed = state[:, -2:-1]
        # Bounded, so that a rollout that goes astray does not run away.
        where = torch.cat([self.normalize(proprio, robot).clamp(-5, 5), which, which * rehearsed], dim=-1)
        obeyed = (actions * self.action_mask[robot][:, None]).flatten(1)
        inputs = (state[:, self.proprio_dim : -2], obeyed, crop, where)
        # Each member moves its own robots.
        members = state[:, -1].long()
        order = members.argsort(stable=True)
        counts = members.bincount(minlength=len(self.members)).tolist()
        parts = zip(*(value[order].split(counts) for value in inputs), strict=True)
        outputs = [member(*part) for member, part in zip(self.members, parts, strict=True) if len(part[0])]
        motion, rest = (torch.cat(values)[order.argsort()] for values in zip(*outputs, strict=True))
        usual = self.delta_std[robot] * self.arm_mask[robot].repeat_interleave(PROPRIO_DIM, dim=1)
        return torch.cat([proprio + motion * usual, rest, state[:, -2:]], dim=-1)


class _Member(nn.Module):
    """The networks of one member of :class:`ProprioceptionModel`, with its arguments; the statistics are shared."""

    def __init__(
        self,
        *,
        num_arms: int,
        frame_stride: int,
        robots: int,
        velocity_dim: int,
        hidden_dim: int,
        width: int,
        crop_size: int,
    ) -> None:
        super().__init__()
        proprio_dim, chunk = PROPRIO_DIM * num_arms, frame_stride * ACTION_DIM * num_arms
        velocity_dim = velocity_dim * num_arms
        self.proprio_dim, self.velocity_dim = proprio_dim, velocity_dim
        self.eyes = nn.Sequential(
            nn.Conv2d(3 * num_arms, 24, 4, stride=4),
            nn.SiLU(),
            nn.Conv2d(24, 32, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * (crop_size // 4) ** 2, 64),
            nn.SiLU(),
            nn.Dropout(0.1),  # a scene is easily learned by heart
        )
        # The affine map from velocity and actions to motion and the next velocity.
        rows = proprio_dim + velocity_dim
        self.where = nn.Sequential(
            nn.Linear(proprio_dim + 2 * robots + hidden_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.to_map = nn.Linear(width, rows * (velocity_dim + chunk + 1))
        nn.init.normal_(self.to_map.weight, std=0.01)
        self.to_map.bias.data.copy_(_usual_map(num_arms, velocity_dim, frame_stride).flatten())
        # What it leaves out. Gated: what an action does depends on what is there.
        self.encoder = nn.Linear(proprio_dim + 2 * robots + velocity_dim + chunk + 64, 2 * width)
        # Nothing, until a robot has rehearsed episodes to learn from.
        for layer in (self.where[0], self.encoder):
            nn.init.zeros_(layer.weight[:, proprio_dim + robots : proprio_dim + 2 * robots])
        self.cell = nn.GRUCell(width, hidden_dim)
        self.correction = nn.Sequential(nn.Linear(width + hidden_dim, width), nn.SiLU(), nn.Linear(width, rows))
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def forward(
        self, hidden_state: torch.Tensor, actions: torch.Tensor, crop: torch.Tensor, where: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict one frame.

        Args:
            hidden_state: float (B, velocity_dim K + hidden_dim). actions: float (B, frame_stride A).
            crop: float (B, 3 K, crop_size, crop_size).
            where: float (B, P + 2 robots), standardised pose, slot, and the slot again if rehearsed.

        Returns:
            The change of the proprioception in units of one frame's usual change, float (B, P), and the velocity and
            memory after it, (B, velocity_dim K + hidden_dim).
        """
        velocity, memory = hidden_state.tensor_split([self.velocity_dim], dim=-1)
        moved = torch.cat([velocity.clamp(-8, 8), actions], dim=-1)
        affine = self.to_map(self.where(torch.cat([where, memory], dim=-1)))
        affine = affine.unflatten(-1, (self.proprio_dim + self.velocity_dim, -1))
        change = torch.baddbmm(affine[..., -1:], affine[..., :-1], moved[..., None])[..., 0]
        value, gate = self.encoder(torch.cat([where, moved, self.eyes(crop)], dim=-1)).chunk(2, dim=-1)
        hidden = value * F.silu(gate)
        memory = self.cell(hidden, memory)
        change = change + self.correction(torch.cat([hidden, memory], dim=-1))
        motion, velocity = change.tensor_split([self.proprio_dim], dim=-1)
        return motion, torch.cat([velocity, memory], dim=-1)


def _usual_map(num_arms: int, velocity_dim: int, frame_stride: int) -> torch.Tensor:
    """Where the affine map begins: (P + V, V + frame_stride * A + 1). Velocity decays, actions push and move."""
    proprio_dim, action_dim = PROPRIO_DIM * num_arms, ACTION_DIM * num_arms
    usual = torch.zeros(proprio_dim + velocity_dim, velocity_dim + frame_stride * action_dim + 1)
    usual[:proprio_dim, :proprio_dim] = 0.3 * torch.eye(proprio_dim)
    usual[proprio_dim:, :velocity_dim] = 0.1 * torch.eye(velocity_dim)
    # The numbers of an action are those of the arm's pose and of its first finger.
    moved = torch.arange(proprio_dim).unflatten(0, (num_arms, -1))[:, :ACTION_DIM].flatten()
    for step in range(frame_stride):
        columns = velocity_dim + step * action_dim + torch.arange(action_dim)
        usual[moved, columns] = 1.0 / frame_stride
        # The later an action, the more of its push is left.
        usual[proprio_dim + moved, columns] = 0.1 * (step + 1)
    return usual
