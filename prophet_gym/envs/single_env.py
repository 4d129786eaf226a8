"""ProphetEnv: one imagined robot, a ProphetVectorEnv of one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from prophet_gym.envs.models import WorldModel
from prophet_gym.envs.vector_env import Observation, ProphetVectorEnv
from prophet_gym.reward.base import RewardModel


class ProphetEnv(gym.Env[Observation, NDArray[np.float32]]):
    r"""A Franka Panda on a LIBERO table, imagined by a learned world model instead of simulated.

    ## Description
    The env begins from a recorded start of a LIBERO task and lets Prophet, an action-conditioned video model, imagine
    what the camera would see while the robot executes chunks of low-level actions. A learned reward model watches the
    imagined video and says when the task is solved. Nothing is simulated: no MuJoCo, no assets. The same spaces belong
    to the real simulator, ``LIBERO-v0``, so that a policy moves between the two unchanged. With ``video=False`` the
    motion alone is imagined and judged: there is no `image`, and no `frames` in `info`.

    A success here is the reward model's opinion of an imagined video. Confirm it in ``LIBERO-v0`` before you report it.

    ## Observation space
    A ``Dict``:

    | Key | Space | Meaning |
    |---|---|---|
    | `image` | `Box(0, 255, (96, 96, 3), uint8)` | newest frame of the agentview camera, upright RGB |
    | `proprio` | `Box(-10, 10, (8,), float32)` | of each arm; after the start, Prophet's own estimate |
    | `instruction` | `Box(-1, 1, (384,), float32)` | sentence embedding (all-MiniLM-L6-v2) of the task |

    `proprio` is the end-effector's position (3, metres, world), its orientation as axis-angle (3, radians) and the
    positions of the gripper fingers (2, metres).

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
    - `reward_type="sparse"` (default): 1.0 in the step in which the reward model sees success, else 0.0.
    - `reward_type="probability"`: the success probability after the step minus that before it. The rewards of an
      episode sum to its final minus its initial probability (potential-based shaping, Ng et al. 1999, discount 1).

    ## Starting state
    A recorded first frame, proprioception and instruction of one of the official initial states: of each task's 50, the
    split `train` has 0-39, `val` 40-44, `test` 45-49. At each reset the task is drawn first (unless given), then the
    initial state. ``reset(options=...)`` takes `suite`, `task` and `init_state`; or `start`, your own
    ``{"image": uint8 (S, S, 3) of any size S, "proprio": float (8,), "instruction": str}``, with `info["suite"]` then
    `"user"`, `task` and `init_state` -1.

    What happens where the fingers touch something, Prophet can only guess, so it can be an ensemble (the shipped one
    has a single member): one of its members moves the robot for a whole episode, drawn too, or given as `member`. The
    same seed and the same actions give the same video.

    ## Episode end
    1. Termination: the reward model's success probability reaches its threshold at the end of a chunk: the strict one,
       which few failures pass, or with `threshold="balanced"` the one by which rates are right on the whole.
    2. Truncation: `max_chunks` chunks (20, that is 160 control steps or 8 s; the tasks of libero_10 take 30).

    `info` has `instruction`, `suite`, `task`, `init_state`, `member`, `success_probability`, `is_success`, `seed` (of
    the env's random stream; drawn if you gave none), and after a step `frames`, uint8 (2, 96, 96, 3), this chunk's
    video at 5 frames per second.

    ## Arguments
    `suite`, `task`, `split`, `max_chunks`, `world_model`, `reward_model`, `reward_type`, `threshold`,
    `num_sampling_steps`, `device`, `dtype`, `start_states`, `member`, `render_mode` and `video`: see
    :class:`ProphetVectorEnv`.

    ```python
    >>> import gymnasium as gym
    >>> import prophet_gym
    >>> env = gym.make("Prophet-LIBERO-v0", suite="libero_spatial", task=3)  # doctest: +SKIP
    >>> envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=64)  # doctest: +SKIP

    ```

    ## Version history
    * v0: first version (0.1.0).
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": ProphetVectorEnv.metadata["render_fps"],
    }

    def __init__(
        self,
        *,
        suite: str = "libero_object",
        task: int | str | None = None,
        split: str = "train",
        max_chunks: int = 20,
        world_model: str | Path | WorldModel = "prophet-libero-tiny",
        reward_model: str | Path | RewardModel = "reward-libero",
        reward_type: str = "sparse",
        threshold: str = "strict",
        num_sampling_steps: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        start_states: str | os.PathLike[str] | None = None,
        member: int | None = None,
        render_mode: str | None = None,
        video: bool = True,
    ) -> None:
        self.envs = ProphetVectorEnv(
            num_envs=1,
            suite=suite,
            task=task,
            split=split,
            max_chunks=max_chunks,
            world_model=world_model,
            reward_model=reward_model,
            reward_type=reward_type,
            threshold=threshold,
            num_sampling_steps=num_sampling_steps,
            device=device,
            dtype=dtype,
            start_states=start_states,
            member=member,
            autoreset_mode=AutoresetMode.DISABLED,
            render_mode=render_mode,
            video=video,
        )
        self.metadata = {**self.metadata, "render_modes": self.envs.metadata["render_modes"]}
        self.render_mode = render_mode
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space

    @property  # type: ignore[override]
    def np_random(self) -> np.random.Generator:
        """The random stream from which starts are drawn."""
        return self.envs.np_random[0]

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.envs._rngs[0], self.envs._seeds[0] = value, -1

    @property
    def np_random_seed(self) -> int:
        """The seed of the random stream, -1 if it is unknown."""
        return self.envs.np_random_seed[0]

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a new episode; options: "Starting state" above, errors: :meth:`ProphetVectorEnv.reset`."""
        obs, infos = self.envs.reset(seed=[seed], options=[options or {}])
        self._np_random = self.np_random  # Gymnasium's checker looks here
        return _first(obs), _first(infos)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Imagine one chunk of actions, float (8, 7) in [-1, 1]; see :meth:`ProphetVectorEnv.step` for the errors."""
        if np.shape(action) != self.action_space.shape:
            raise ValueError(f"An action has shape {self.action_space.shape}, got {np.shape(action)}.")
        obs, rewards, terminated, truncated, infos = self.envs.step(np.asarray(action)[None])
        return _first(obs), float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _first(infos)

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """The newest frame, uint8 (H, W, 3); None without ``render_mode="rgb_array"``."""
        frames = self.envs.render()
        return None if frames is None else frames[0]

    def clip(self) -> NDArray[np.uint8]:
        """The video of the episode so far, uint8 (frames, H, W, 3), start first, 5 frames per second."""
        return self.envs.clips()[0]

    def get_state(self) -> dict[str, Any]:
        """See :meth:`ProphetVectorEnv.get_state`."""
        return self.envs.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`ProphetVectorEnv.set_state`."""
        self.envs.set_state(state)


def _first(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The only env's part of batched observations or infos, as plain Python values where they are scalars."""
    values = {name: value[0] for name, value in batch.items() if not name.startswith("_")}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
