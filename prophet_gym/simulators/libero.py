"""LIBERO-v0: the real simulator behind the same spaces as the imagined environment."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from prophet_gym.data.episode import (
    ACTION_DIM,
    ACTION_TOLERANCE,
    CHUNK_SIZE,
    FRAME_STRIDE,
    IMAGE_SIZE,
    PROPRIO_BOUND,
    PROPRIO_DIM,
    SPLITS,
)
from prophet_gym.data.instructions import EMBEDDING_DIM, embed_instructions
from prophet_gym.simulators import loading

if TYPE_CHECKING:
    from prophet_gym.simulators.libero_simulation import LiberoSimulation

Observation = dict[str, NDArray[Any]]

LIBERO_SUITES = ("libero_object", "libero_spatial", "libero_goal", "libero_10")
_OPTIONS = ("suite", "task", "init_state")


class LiberoEnv(gym.Env[Observation, NDArray[np.float32]]):
    r"""A Franka Panda on a LIBERO table, simulated by MuJoCo.

    ## Description
    The original LIBERO tasks (Liu et al. 2023, "LIBERO: Benchmarking Knowledge Transfer for Lifelong Robot Learning"),
    assets, initial states and success conditions, with the observations and actions of ``Prophet-LIBERO-v0``: a policy
    moves between the two unchanged. The physics is LIBERO's own (OSC_POSE at 20 Hz, 25 substeps of 2 ms a control
    step); pictures are rendered only for the frames that are returned, without shadows and from simplified meshes.

    Making the env and changing the task builds a simulation (about 5 s); other initial states of a task reuse it.

    ## Observation space
    A ``Dict``:

    - `image`: `Box(0, 255, (96, 96, 3), uint8)`, agentview camera, upright RGB.
    - `proprio`: `Box(-10, 10, (8,), float32)`, end-effector position (3, m, world), orientation as axis-angle (3, rad),
      gripper fingers (2, m).
    - `instruction`: `Box(-1, 1, (384,), float32)`, sentence embedding (all-MiniLM-L6-v2); the text is in `info`.

    ## Action space
    `Box(-1, 1, (8, 7), float32)`: a chunk of 8 low-level actions at 20 Hz (0.4 s) in LIBERO's OSC_POSE convention.

    | Index | Meaning | at 1.0 |
    |---|---|---|
    | 0-2 | goal offset of the end-effector from where it is, x, y, z of the world | 0.05 m |
    | 3-5 | goal rotation, axis-angle in the world frame | 0.5 rad |
    | 6 | gripper: +1 closes, -1 opens | |

    Actions that are not finite, beyond the bounds by more than 1e-6 or of another shape raise ``ValueError``: nothing
    is clipped.

    ## Rewards
    1.0 in the step at whose end LIBERO's goal condition holds, else 0.0.

    ## Starting state
    One of each task's 50 official initial states: split `train` has 0-39, `val` 40-44, `test` 45-49. At each reset the
    task is drawn first (unless given), then the initial state. The objects settle for 10 control steps with the fingers
    opening (up to 40 while something still moves: libero_spatial task 5). ``reset(options=...)`` takes `suite`, `task`
    and `init_state`, for this episode only.

    ## Episode end
    1. Termination: the goal condition holds at the END of a chunk.
    2. Truncation: `max_chunks` chunks (20, that is 160 control steps or 8 s; the tasks of libero_10 take 30).

    `info` has `instruction`, `suite`, `task`, `init_state`, `success_probability` (1.0 or 0.0), `is_success`, `seed`,
    and after a step `frames`, uint8 (2, 96, 96, 3), this chunk's video at 5 frames per second.

    ## Arguments
    - `suite`: `"libero_object"`, `"libero_spatial"`, `"libero_goal"` or `"libero_10"`.
    - `task`: number 0-9 or LIBERO's name in snake case; None draws one at each reset.
    - `split`: which initial states.
    - `max_chunks`: an episode is truncated after this many steps.
    - `render_mode`: None or `"rgb_array"`.

    Raises ``ImportError`` if LIBERO is not installed (``pip install "prophet-gym[libero]"``) or no OpenGL is found for
    off-screen rendering.

    ## Version history
    * v0: first version (0.1.0).
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 2.5}  # noqa: RUF012

    def __init__(
        self,
        *,
        suite: str = "libero_object",
        task: int | str | None = None,
        split: str = "train",
        max_chunks: int = 20,
        render_mode: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}. Valid splits: {list(SPLITS)}.")
        if isinstance(max_chunks, bool) or not isinstance(max_chunks, int) or max_chunks < 1:
            raise ValueError(f"max_chunks must be an integer >= 1, got {max_chunks!r}.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}.")
        self.suite, self.split, self.max_chunks, self.render_mode = suite, split, max_chunks, render_mode
        self.task = None if task is None else task_number(suite, task)
        task_names(suite)  # an unknown suite, or a missing LIBERO, shows here rather than at the first reset
        self.observation_space: gym.spaces.Dict = gym.spaces.Dict(  # type: ignore[assignment]
            {
                "image": gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
                "proprio": gym.spaces.Box(-PROPRIO_BOUND, PROPRIO_BOUND, (PROPRIO_DIM,), np.float32),
                "instruction": gym.spaces.Box(-1.0, 1.0, (EMBEDDING_DIM,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (CHUNK_SIZE, ACTION_DIM), np.float32)
        self._simulation: LiberoSimulation | None = None
        self._embedding = np.zeros(EMBEDDING_DIM, np.float32)
        self._init_state = 0
        self._chunks = 0
        self._over = True
        self._image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)

    @property
    def simulation(self) -> LiberoSimulation:
        """The simulation of the present task: object poses, camera parameters, finer control than chunks.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset().
        """
        if self._simulation is None:
            raise gym.error.ResetNeeded("Call reset() first: the simulation is built with the task.")
        return self._simulation

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a new episode; see "Starting state" above for the options.

        Raises:
            ValueError: an unknown option, suite, task or initial state, or an initial state of another split.
        """
        if seed is None and self._np_random is None:
            # Gymnasium would draw a seed of 128 bits, which does not fit into a vector env's integer infos.
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        super().reset(seed=seed)
        options = dict(options or {})
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise ValueError(f"Unknown reset options {unknown}. Valid options: {list(_OPTIONS)}.")
        suite = options.get("suite") or self.suite
        task = options.get("task")
        if task is None and suite == self.suite:
            task = self.task
        names = task_names(suite)
        number = int(self.np_random.integers(len(names))) if task is None else task_number(suite, task)
        states = SPLITS[self.split]
        init_state = options.get("init_state")
        if init_state is None:
            init_state = states[int(self.np_random.integers(len(states)))]
        elif isinstance(init_state, bool) or init_state not in states:
            raise ValueError(
                f"Unknown init_state {init_state!r} in the split {self.split!r}. Valid: {list(states)}. "
                f"Other initial states belong to other splits: make the env with one of split={list(SPLITS)}."
            )
        self._load(suite, number)
        self._init_state = int(init_state)
        self.simulation.reset(self._init_state)
        self._chunks, self._over = 0, False
        self._image = self.simulation.render()
        return self._observation(), self._info(is_success=False)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute one chunk of actions, float (8, 7) in [-1, 1].

        Raises:
            ValueError: an action of a wrong shape, not finite, or out of range.
            gymnasium.error.ResetNeeded: before the first reset() or after an episode's end.
        """
        if self._over:
            raise gym.error.ResetNeeded("The episode is over, or none has begun: call reset().")
        frames = []
        for index, low_level in enumerate(_check_action(action)):
            self.simulation.step(low_level)
            if (index + 1) % FRAME_STRIDE == 0:
                frames.append(self.simulation.render())
        self._image = frames[-1]
        self._chunks += 1
        terminated = self.simulation.is_success()
        truncated = not terminated and self._chunks >= self.max_chunks
        self._over = terminated or truncated
        info = self._info(terminated) | {"frames": np.stack(frames)}
        return self._observation(), float(terminated), terminated, truncated, info

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """The newest frame, uint8 (96, 96, 3); None without ``render_mode="rgb_array"``."""
        return self._image.copy() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Free the simulation."""
        if self._simulation is not None:
            self._simulation.close()
            self._simulation = None
            self._over = True

    def _load(self, suite: str, task: int) -> None:
        if self._simulation is None or (self._simulation.suite, self._simulation.task) != (suite, task):
            self.close()
            self._simulation = load_simulation(suite, task)
            self._embedding = embed_instructions([self._simulation.instruction])[0]

    def _observation(self) -> Observation:
        return {
            "image": self._image.copy(),
            "proprio": self.simulation.proprio(),
            "instruction": self._embedding.copy(),
        }

    def _info(self, is_success: bool) -> dict[str, Any]:
        return {
            "instruction": self.simulation.instruction,
            "suite": self.simulation.suite,
            "task": self.simulation.task,
            "init_state": self._init_state,
            "success_probability": float(is_success),
            "is_success": is_success,
            "seed": self.np_random_seed,
        }


def task_names(suite: str) -> list[str]:
    """LIBERO's task names of a suite, in LIBERO's order.

    Raises:
        ValueError: an unknown suite.
        ImportError: see :func:`load_simulation`.
    """
    if suite not in LIBERO_SUITES:
        raise ValueError(f"Unknown suite {suite!r}. Valid suites: {list(LIBERO_SUITES)}.")
    return [str(name) for name in _simulation_module().task_names(suite)]


def task_number(suite: str, task: int | str) -> int:
    """The number of a task given by number or by name.

    Raises:
        ValueError: an unknown suite or task; lists the valid ones.
    """
    names = task_names(suite)
    number = names.index(task) if isinstance(task, str) and task in names else task
    if isinstance(number, (bool, str)) or number not in range(len(names)):
        listed = "\n".join(f"  {index}  {name}" for index, name in enumerate(names))
        raise ValueError(f"Unknown task {task!r} of {suite!r}. Valid tasks, by number or by name:\n{listed}")
    return int(number)


def load_simulation(suite: str, task: int, image_size: int = IMAGE_SIZE) -> LiberoSimulation:
    """Build the simulation of one task.

    Raises:
        ImportError: LIBERO is not installed, or there is no OpenGL for off-screen rendering.
    """
    simulation: LiberoSimulation = _simulation_module().LiberoSimulation(suite, task, image_size)
    return simulation


def _simulation_module() -> Any:
    for package in ("libero", "robosuite", "mujoco"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'LIBERO needs the package {package!r}: pip install "prophet-gym[libero]"')
    with loading("LIBERO"):
        from prophet_gym.simulators import libero_simulation
    return libero_simulation


def _check_action(action: NDArray[np.float32]) -> NDArray[np.float64]:
    array = np.asarray(action)
    if array.dtype.kind not in "fiu" or array.shape != (CHUNK_SIZE, ACTION_DIM):
        raise ValueError(
            f"An action must be numbers of shape {(CHUNK_SIZE, ACTION_DIM)}, got {array.dtype} {array.shape}."
        )
    values = array.astype(np.float64)  # first: an int8 of -128 has no absolute value
    peak = float(np.abs(values).max())
    if math.isnan(peak) or peak > 1.0 + ACTION_TOLERANCE:
        raise ValueError(
            f"Actions must be finite and within [-1, 1], got a largest magnitude of {peak}. Nothing is clipped for "
            "you: normalise or np.clip them."
        )
    return values
