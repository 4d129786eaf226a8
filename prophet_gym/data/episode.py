"""One recorded episode in memory: what every recorder writes and every reader returns."""

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

SPLITS = {"train": range(0, 40), "val": range(40, 45), "test": range(45, 50)}
"""LIBERO's official initial states of each task, by split; nothing is reported on train, nothing is tuned on test."""
SEED_SPLITS = {"train": range(0, 8000), "val": range(8000, 9000), "test": range(9000, 10000)}
"""The seeds that starts are drawn from in simulators without official initial states, by split."""
KINDS = ("clean", "noisy", "counterfactual", "policy", "rehearsed")
ACTION_DIM = 7
"""Numbers in a low-level action, for each arm."""
PROPRIO_DIM = 8
"""Numbers of proprioception, for each arm."""
GRIPPERS = slice(ACTION_DIM - 1, None, ACTION_DIM)
"""Which numbers of an action are the grippers' commands, one for each arm."""
CHUNK_SIZE, FRAME_STRIDE, FPS, IMAGE_SIZE = 8, 4, 5, 96
"""Of what is recorded here: control steps of a chunk and of a video frame, video frames a second, pixels a side."""
PROPRIO_BOUND = 10.0
"""Bound of the proprioception space in metres and radians: far beyond the reach of the arm."""
ORIENTATIONS = ("upright", "upside_down", "mirrored", "rotated_180")
ACTION_TOLERANCE = 1e-6
"""Actions may leave [-1, 1] by at most this much (rounding)."""


class Policy(Protocol):
    """Anything with Stable-Baselines3's `predict`."""

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[NDArray[np.float32], Any]:
        """Map batched observations to batched actions (B, chunk, 7 an arm)."""
        ...


def policy_network(policy: Policy) -> Any:
    """The policy itself, also of a Stable-Baselines3 algorithm."""
    return getattr(policy, "policy", policy)


def next_chunk(policy: Policy, observation: dict[str, Any], shape: tuple[int, int], robot: str) -> NDArray[np.float32]:
    """What a policy does next in one episode, float32 of this shape, (chunk, 7 K); a copy, for its own array is not
    ours to change.

    :param observation: a batch of one. robot: whose actions have that shape, for the message.
    :raises ValueError: the actions have another shape.
    """
    actions = np.array(policy.predict(observation)[0], np.float32)
    if actions.shape != (1, *shape):
        raise ValueError(
            f"The policy's actions have shape {actions.shape[1:]}, and {robot} takes {shape}: give a policy of this "
            "robot."
        )
    return actions[0]


@runtime_checkable
class Planner(Protocol):
    """Chooses all actions of an episode from its start, whatever they then do."""

    def plan(
        self,
        suite: str,
        image: NDArray[np.uint8],
        proprio: NDArray[np.float32],
        instruction: str,
        control_steps: int,
        seed: int,
    ) -> NDArray[np.float32]:
        """Map a start, uint8 (H, W, 3) and float32 (8 K,), to actions (control_steps, 7 K) in [-1, 1]."""
        ...

    def checksum(self) -> str:
        """What tells it from another planner."""
        ...


@dataclass(frozen=True, eq=False)
class Episode:
    """A robot episode of T video steps, that is T + 1 frames.

    The arrays are checked, never converted: a wrong shape, dtype or range raises.

    :param frames: uint8 (T + 1, H, W, 3), upright RGB. Frame 0 is the start, before any action.
    :param proprio: float32 (T + 1, 8 K) at the frames, for each of the robot's K arms in turn: end-effector position
        (3, metres, world), orientation as axis-angle (3, radians; continuous, so of an angle beyond pi where the hand
        turns on: the vector from a quaternion whose sign does not flip), gripper finger positions (2, metres: the first
        >= 0, the second <= 0, and their difference is the opening).
    :param actions: float32 (T, frame_stride, 7 K) in [-1, 1], for each arm in turn, LIBERO's OSC_POSE convention (delta
        xyz, delta rotation, gripper: -1 opens, +1 closes); zeros where the robot obeys none. ``actions[k]`` are
        executed between frame k and frame k + 1.
    :param success: bool (T + 1,), the simulator's verdict at each frame (it may toggle back).
    :param instruction: the task in words.
    :param suite: name of the task suite, e.g. ``"libero_object"``.
    :param task: index of the task in its suite, >= 0.
    :param init_state: index of the initial state the episode began from, or the seed it was drawn from, >= 0.
    :param split: ``"train"``, ``"val"`` or ``"test"``.
    :param kind: ``"clean"`` (expert), ``"noisy"`` (disturbed expert), ``"counterfactual"`` (the same actions from
        another start), ``"policy"`` (rollout of a policy) or ``"rehearsed"`` (what a policy did in Prophet, see
        `Planner`).
    :param robot: name of the robot, e.g. ``"panda"``.
    :param seed: seed of the episode's random stream, >= 0.
    :raises TypeError: an array has the wrong dtype, or a field the wrong type.
    :raises ValueError: a shape, range or name is wrong, or a value is not finite.
    """

    frames: NDArray[np.uint8]
    proprio: NDArray[np.float32]
    actions: NDArray[np.float32]
    success: NDArray[np.bool_]
    instruction: str
    suite: str
    task: int
    init_state: int
    split: str
    kind: str
    robot: str
    seed: int

    def __post_init__(self) -> None:
        for name, dtype in (
            ("frames", np.uint8),
            ("proprio", np.float32),
            ("actions", np.float32),
            ("success", np.bool_),
        ):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise TypeError(
                    f"Episode.{name} must be a numpy array of {np.dtype(dtype)}, got {got}: convert it first."
                )
        if self.actions.ndim != 3 or self.actions.shape[2] % ACTION_DIM or 0 in self.actions.shape:
            raise ValueError(
                f"Episode.actions must have shape (T >= 1, frame_stride >= 1, {ACTION_DIM} an arm), got "
                f"{self.actions.shape}."
            )
        count = len(self.actions) + 1
        if (
            self.frames.ndim != 4
            or self.frames.shape[0] != count
            or self.frames.shape[3] != 3
            or 0 in self.frames.shape
        ):
            raise ValueError(
                f"Episode.frames must have shape (T + 1 = {count}, H, W, 3) for T = {count - 1} rows of actions, "
                f"got {self.frames.shape}."
            )
        if self.proprio.shape != (count, PROPRIO_DIM * self.num_arms):
            raise ValueError(
                f"Episode.proprio must have shape ({count}, {PROPRIO_DIM * self.num_arms}), got {self.proprio.shape}."
            )
        if self.success.shape != (count,):
            raise ValueError(f"Episode.success must have shape ({count},), got {self.success.shape}.")
        if not np.isfinite(self.proprio).all():
            raise ValueError("Episode.proprio contains NaN or infinite values.")
        peak = np.abs(self.actions).max()
        if not peak <= 1 + ACTION_TOLERANCE:
            raise ValueError(
                f"Episode.actions must be finite and within [-1, 1], got a largest magnitude of {peak}: "
                "normalise the actions before making the episode."
            )
        for name in ("instruction", "suite", "robot"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise TypeError(f"Episode.{name} must be a str, got {type(text).__name__}.")
            if not text.strip():
                raise ValueError(f"Episode.{name} must not be empty.")
        for name in ("task", "init_state", "seed"):
            try:
                number = operator.index(getattr(self, name))
            except TypeError:
                raise TypeError(f"Episode.{name} must be an int, got {getattr(self, name)!r}.") from None
            if number < 0:
                raise ValueError(f"Episode.{name} must be >= 0, got {number}.")
        for name, choices in (("split", SPLITS), ("kind", KINDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"Episode.{name} must be one of {list(choices)}, got {getattr(self, name)!r}.")

    def __len__(self) -> int:
        """The number T of video steps; there are T + 1 frames."""
        return len(self.actions)

    @property
    def frame_stride(self) -> int:
        """Control steps per video frame."""
        return int(self.actions.shape[1])

    @property
    def num_arms(self) -> int:
        """The number K of the robot's arms."""
        return int(self.actions.shape[2]) // ACTION_DIM

    @property
    def outcome(self) -> bool:
        """Whether the task stands solved at the last frame."""
        return bool(self.success[-1])

    def with_frame_stride(self, frame_stride: int) -> "Episode":
        """The same episode with fewer frames: one per ``frame_stride`` control steps.

        The last frame, and with it the outcome, is kept; where the length is no multiple, up to
        ``frame_stride - self.frame_stride`` control steps at the beginning are left out.

        :param frame_stride: a multiple of this episode's frame stride.
        :raises ValueError: it is not a multiple, or the episode is shorter than one such stride.
        """
        factor, rest = divmod(frame_stride, self.frame_stride)
        if rest or factor < 1:
            raise ValueError(f"frame_stride must be a multiple of {self.frame_stride}, got {frame_stride}.")
        steps = len(self) // factor
        if steps == 0:
            have = len(self) * self.frame_stride
            raise ValueError(f"The episode has {have} control steps, fewer than frame_stride = {frame_stride}.")
        first = len(self) - steps * factor
        return replace(
            self,
            frames=self.frames[first::factor],
            proprio=self.proprio[first::factor],
            actions=self.actions[first:].reshape(steps, frame_stride, -1),
            success=self.success[first::factor],
        )


def finger_openings(proprio: Any) -> Any:
    """Distance of each arm's finger tips, metres: (..., K) of proprioception (..., 8 K), array or tensor."""
    return proprio[..., PROPRIO_DIM - 2 :: PROPRIO_DIM] - proprio[..., PROPRIO_DIM - 1 :: PROPRIO_DIM]


def per_arm(values: "torch.Tensor", num_arms: int) -> "torch.Tensor":
    """Values of all arms (B, ..., n K), arm by arm: (B K, ..., n)."""
    return values.unflatten(-1, (num_arms, -1)).movedim(-2, 1).flatten(0, 1)


def all_arms(values: "torch.Tensor", num_arms: int) -> "torch.Tensor":
    """The inverse of `per_arm`: (B K, ..., n) to (B, ..., n K)."""
    return values.unflatten(0, (-1, num_arms)).movedim(1, -2).flatten(-2)


def to_upright(frames: NDArray[np.uint8], orientation: str) -> NDArray[np.uint8]:
    """Undo the orientation in which frames are stored; returns a view.

    MuJoCo's and LIBERO's raw images, LIBERO's HDF5 files included, are ``"upside_down"`` (first row at the bottom).
    Copies of those that were rotated by 180 degrees, as OpenVLA and LeRobot do, are ``"mirrored"`` (left and right
    swapped).

    :param frames: uint8 (..., H, W, 3).
    :param orientation: how they are stored: ``"upright"``, ``"upside_down"``, ``"mirrored"`` or ``"rotated_180"``.
    :return: uint8 (..., H, W, 3), upright.
    :raises ValueError: the orientation is none of these.
    """
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be one of {list(ORIENTATIONS)}, got {orientation!r}.")
    rows = -1 if orientation in ("upside_down", "rotated_180") else 1
    columns = -1 if orientation in ("mirrored", "rotated_180") else 1
    return frames[..., ::rows, ::columns, :]
