"""The Fetch arm of gymnasium-robotics (Plappert et al. 2018, "Multi-Goal Reinforcement Learning"), driven at the rate
of the other robots.

gymnasium-robotics gives an action 40 ms and lets 1.0 set the hand's goal 5 cm from where it is, 0.9 m/s at most. Here a
control step lasts 50 ms (20 Hz) and 1.0 is 1.25 cm: 0.18 m/s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from prophet_gym.simulators import loading
from prophet_gym.simulators.experts.fetch_scripts import FetchScene, PickAndPlaceCube, PushCube, Reach
from prophet_gym.simulators.experts.rehearsal import Expert
from prophet_gym.simulators.hand_pose import DOWNWARD_X, multiply, proprioception

Array = NDArray[np.float64]

TASKS = {
    "FetchReach-v4": "move the hand to the red ball",
    "FetchPush-v4": "push the black cube to the red ball",
    "FetchPickAndPlace-v4": "pick up the black cube and bring it to the red ball",
}
"""gymnasium-robotics' id and the instruction of each task that is recorded."""
CONTROL_STEPS = 160  # an episode
SUBSTEPS = 25  # of 2 ms
SPEED = 0.25  # of gymnasium-robotics' fastest motion
CAMERA = "external_camera_0"
CAMERA_POSITION = (2.0, 0.35, 1.05)  # m, world: the robot stands at x = 0.4 and looks along x
CAMERA_TARGET = (1.25, 0.75, 0.48)
CAMERA_FOVY = 45.0  # degrees
_SCRIPTS: tuple[Callable[[FetchScene], Expert], ...] = (Reach, PushCube, PickAndPlaceCube)


class FetchSimulation:
    """One Fetch task; built once, then reused for all its starts. The fingers are locked, closed, in the first two.

    Args:
        suite: ``"fetch"``.
        task: index into :data:`TASKS`.
        image_size: height and width of the frames, pixels.

    Raises:
        ImportError: gymnasium-robotics or OpenGL is not installed.
    """

    def __init__(self, suite: str, task: int, image_size: int = 96) -> None:
        if importlib.util.find_spec("gymnasium_robotics") is None:
            raise ImportError('gymnasium-robotics is not installed: pip install "prophet-gym[fetch]"')
        with loading("gymnasium-robotics"):
            import gymnasium_robotics

            from prophet_gym.simulators.frame_renderer import FrameRenderer, aim_camera

        name = list(TASKS)[task]
        self.suite, self.task, self.image_size, self.instruction = suite, task, image_size, TASKS[name]
        gym.register_envs(gymnasium_robotics)
        self._env = cast(Any, gym.make(name).unwrapped)
        self._env.n_substeps = SUBSTEPS
        self._model, self._data = self._env.model, self._env.data
        aim_camera(self._model, CAMERA, CAMERA_POSITION, CAMERA_TARGET, CAMERA_FOVY)
        self._renderer = FrameRenderer(self._model, CAMERA, image_size, geom_groups=(0,), sites=("target0",))
        self._hand = self._model.body("robot0:gripper_link").id
        self._site = self._model.site("robot0:grip").id
        joints = [self._model.joint(f"robot0:{side}_gripper_finger_joint").id for side in "rl"]
        self._fingers = self._model.jnt_qposadr[joints]
        self.reset(0)

    def reset(self, init_state: int) -> None:
        """Begin at the start that gymnasium-robotics draws from the seed ``init_state``."""
        self.init_state = init_state
        self._env.reset(seed=init_state)

    def step(self, action: Array) -> None:
        """Execute one low-level action (7,) in [-1, 1] for one control step (50 ms); rotations are ignored."""
        self._env.step(np.append(SPEED * action[:3], -action[6]))  # there +1 opens

    def script(self) -> Expert:
        """The scripted expert of this task, which looks at the cube."""
        return _SCRIPTS[self.task](self)

    def render(self) -> NDArray[np.uint8]:
        """uint8 (image_size, image_size, 3), upright RGB; the goal is a red ball."""
        self._data.site("target0").xpos = self.goal
        return self._renderer.render(self._data)

    def proprio(self) -> NDArray[np.float32]:
        """float32 (8,): grip site (3, m, world), axis-angle orientation (3, rad), the two finger joints (2, m), the
        second one negative as on the Panda: (0.05, -0.05) when open, (0, 0) when closed on nothing."""
        right, left = self._data.qpos[self._fingers]
        quaternion = multiply(self._data.xquat[self._hand], DOWNWARD_X)
        return proprioception(self.eef_position, quaternion, np.array([right, -left]))

    def is_success(self) -> bool:
        """gymnasium-robotics' verdict on the present state: what is to be moved is within 5 cm of the goal."""
        achieved = self.cube_position if self._env.has_object else self.eef_position
        return bool(self._env._is_success(achieved, self.goal))

    def camera(self) -> dict[str, list[list[float]]]:
        """Intrinsics and extrinsics, see :func:`prophet_gym.simulators.frame_renderer.camera_parameters`."""
        from prophet_gym.simulators.frame_renderer import camera_parameters

        return camera_parameters(self._model, self._data, CAMERA, self.image_size)

    @property
    def eef_position(self) -> Array:
        """Position of the grip site (3,), metres, world."""
        return np.array(self._data.site_xpos[self._site])

    @property
    def cube_position(self) -> Array:
        """Middle of the cube (3,), metres, world; there is none in the first task."""
        return np.array(self._data.site("object0").xpos)

    @property
    def goal(self) -> Array:
        """Where the cube, or the hand, shall be (3,), metres, world."""
        return np.array(self._env.goal)

    def close(self) -> None:
        """Free the renderer and the simulation."""
        self._renderer.close()
        self._env.close()
