"""Meta-World's Sawyer arm (Yu et al. 2019, "Meta-World: A Benchmark and Evaluation for Multi-Task and Meta
Reinforcement Learning"), driven at the rate and speed of the other robots.

Meta-World runs at 80 Hz, and an action of 1.0 moves the hand's goal by 1 cm. Here one action lasts four of its steps
(20 Hz) and 1.0 moves the goal by 1.6 cm in them: 0.32 m/s, about what a LIBERO action of 1.0 reaches. The scripted
policies, made for 0.8 m/s, bear that; slower still, they fail where fingers close on the way down.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prophet_gym.simulators import loading
from prophet_gym.simulators.hand_pose import DOWNWARD_X, multiply, proprioception

Array = NDArray[np.float64]

TASKS = {
    "reach-v3": "move the hand to the red dot",
    "push-v3": "push the puck to the green dot",
    "pick-place-v3": "pick up the puck and move it to the blue dot",
    "door-open-v3": "open the door",
    "door-close-v3": "close the door",
    "drawer-open-v3": "open the drawer",
    "drawer-close-v3": "close the drawer",
    "button-press-v3": "press the button",
    "button-press-topdown-v3": "press the button from above",
    "faucet-open-v3": "turn the faucet on",
    "faucet-close-v3": "turn the faucet off",
    "window-open-v3": "slide the window open",
    "window-close-v3": "slide the window shut",
    "plate-slide-v3": "slide the plate into the cabinet",
    "dial-turn-v3": "turn the dial",
    "box-close-v3": "put the lid on the box",
    "reach-wall-v3": "move the hand over the wall to the red dot",
    "button-press-topdown-wall-v3": "press the button behind the wall from above",
    "door-lock-v3": "lock the door",
}
"""Meta-World's name and the instruction of each task that is recorded."""
CONTROL_STEPS = 96  # an episode: 384 of Meta-World's steps, whose own limit is 500; a puck slips from a longer hold
REPEAT = 4  # steps of Meta-World in a control step
SPEED = 0.4  # of Meta-World's fastest motion
SETTLE_STEPS = 8  # control steps that the script goes on after success
CAMERA = "corner2"
CAMERA_POSITION = (0.9, 0.05, 0.8)  # m, world: the robot stands at the origin and looks along y
CAMERA_TARGET = (0.0, 0.7, 0.2)
CAMERA_FOVY = 40.0  # degrees
FINGER_REACH = 0.044  # m, from the middle of the hand to the inside of an open finger


class MetaWorldSimulation:
    """One Meta-World task; built once, then reused for all its starts.

    Args:
        suite: ``"metaworld"``.
        task: index into :data:`TASKS`.
        image_size: height and width of the frames, pixels.

    Raises:
        ImportError: Meta-World or OpenGL is not installed.
    """

    def __init__(self, suite: str, task: int, image_size: int = 96) -> None:
        if importlib.util.find_spec("metaworld") is None:
            raise ImportError('Meta-World is not installed: pip install "prophet-gym[metaworld]"')
        with loading("Meta-World"):
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP

            from prophet_gym.simulators.frame_renderer import FrameRenderer, aim_camera

        name = list(TASKS)[task]
        self.suite, self.task, self.image_size, self.instruction = suite, task, image_size, TASKS[name]
        self._env: Any = ALL_V3_ENVIRONMENTS[name]()
        self._policy: Any = ENV_POLICY_MAP[name]()
        # What Meta-World's own benchmark classes set, without their pickled tasks: goals are part of the observation, a
        # start is drawn at each reset, from a random stream of the env's own, and an episode may last longer than 500.
        self._env._partially_observable = False
        vars(self._env).pop("sawyer_observation_space", None)  # cached with bounds that clip the goal to zero
        self._env._set_task_called = True
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env.max_path_length = 10**9
        self._model, self._data = self._env.model, self._env.data
        aim_camera(self._model, CAMERA, CAMERA_POSITION, CAMERA_TARGET, CAMERA_FOVY)
        self.reset(0)
        goals = [site for site, _ in self._env._target_site_config]
        self._renderer = FrameRenderer(self._model, CAMERA, image_size, geom_groups=(0, 1, 2), sites=goals)
        self._hand = self._model.body("hand").id
        self._site = self._model.site("endEffector").id
        self._fingers = self._model.jnt_qposadr[[self._model.joint(joint).id for joint in ("l_close", "r_close")]]

    def reset(self, init_state: int) -> None:
        """Begin at the start that Meta-World draws from the seed ``init_state``."""
        self.init_state = init_state
        self._env.seed(init_state)
        self._observation, _ = self._env.reset()
        self._success = False

    def step(self, action: Array) -> None:
        """Execute one low-level action (7,) in [-1, 1] for one control step (50 ms); rotations are ignored."""
        motion, grip = SPEED * action[:3], action[6]
        for _ in range(REPEAT - 1):
            self._env.set_xyz_action(motion)
            self._env.do_simulation([grip, -grip], self._env.frame_skip)
        self._observation, _, _, _, info = self._env.step(np.append(motion, grip))
        self._success = bool(info["success"])

    def script(self) -> MetaWorldScript:
        """Meta-World's scripted policy of this task, which looks at the objects."""
        return MetaWorldScript(self)

    def render(self) -> NDArray[np.uint8]:
        """uint8 (image_size, image_size, 3), upright RGB; the goal, where it is no object, as a dot."""
        for site, position in self._env._target_site_config:
            self._data.site(site).xpos = position
        return self._renderer.render(self._data)

    def proprio(self) -> NDArray[np.float32]:
        """float32 (8,): position between the fingertips (3, m, world), axis-angle orientation (3, rad), the insides of
        the two fingers from the middle of the hand (2, m): (0.044, -0.044) when open, (0.014, -0.004) when closed."""
        left, right = self._data.qpos[self._fingers]
        quaternion = multiply(self._data.xquat[self._hand], DOWNWARD_X)
        return proprioception(self.eef_position, quaternion, np.array([FINGER_REACH + left, right - FINGER_REACH]))

    def is_success(self) -> bool:
        """Meta-World's verdict on the present state; False at the start."""
        return self._success

    def camera(self) -> dict[str, list[list[float]]]:
        """Intrinsics and extrinsics, see :func:`prophet_gym.simulators.frame_renderer.camera_parameters`."""
        from prophet_gym.simulators.frame_renderer import camera_parameters

        return camera_parameters(self._model, self._data, CAMERA, self.image_size)

    @property
    def eef_position(self) -> Array:
        """Position between the fingertips (3,), metres, world."""
        return np.array(self._data.site_xpos[self._site])

    def close(self) -> None:
        """Free the renderer and the simulation."""
        self._renderer.close()
        self._env.close()


class MetaWorldScript:
    """Meta-World's scripted policy in this library's actions, and an end to it.

    The policies never stop (one that opens a door goes on until it is too far), but an episode is judged at its end:
    shortly after success the hand stays where it is.
    """

    def __init__(self, simulation: MetaWorldSimulation) -> None:
        self._simulation = simulation
        self._successful_steps = 0
        self._last = np.zeros(7, np.float32)

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (7,) in [-1, 1]."""
        self._successful_steps += self._simulation.is_success()
        if self._successful_steps > SETTLE_STEPS:
            self._last[:3] = 0.0
            return self._last.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each action that is clipped
            *motion, grip = self._simulation._policy.get_action(self._simulation._observation)
        self._last = np.clip([*motion, 0.0, 0.0, 0.0, grip], -1.0, 1.0).astype(np.float32)
        return self._last.copy()
