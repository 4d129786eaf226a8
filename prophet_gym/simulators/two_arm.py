"""Two Panda arms that face each other over a table (robosuite's TwoArmLift: Zhu et al. 2020, "robosuite: A Modular
Simulation Framework and Benchmark for Robot Learning"), stepped as LIBERO's one arm is."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prophet_gym.simulators import loading
from prophet_gym.simulators.experts.two_arm_script import LiftPot
from prophet_gym.simulators.hand_pose import proprioception

Array = NDArray[np.float64]

TASKS = ("lift the pot with both hands",)
"""The instruction of each task that is recorded."""
CONTROL_STEPS = 120  # an episode
CONTROL_HZ = 20
CAMERA = "agentview"
CAMERA_POSITION = (1.0, 0.0, 1.5)  # m, world: one arm stands on the left, at y = -0.56, the other on the right
CAMERA_TARGET = (0.0, 0.0, 1.0)
CAMERA_FOVY = 38.0  # degrees


class TwoArmSimulation:
    """One task of two arms; built once (5-10 s), then reused for all its starts.

    The physics is robosuite's: 25 substeps of 2 ms a control step, OSC_POSE at 20 Hz for each arm (see
    :mod:`.osc_pose`). The pot stands within 3 cm of the middle of the table and is turned by up to 60 degrees, so that
    each arm always has the same handle before it.

    Args:
        suite: ``"two_arm_lift"``.
        task: index into :data:`TASKS`.
        image_size: height and width of the frames, pixels.

    Raises:
        ImportError: robosuite, or LIBERO which adapts it to today's MuJoCo, or OpenGL is not installed.
    """

    def __init__(self, suite: str, task: int, image_size: int = 96) -> None:
        if any(importlib.util.find_spec(package) is None for package in ("robosuite", "libero")):
            raise ImportError('robosuite or LIBERO is not installed: pip install "prophet-gym[libero]"')
        with loading("robosuite"):
            import robosuite.macros

            # Its compiled functions are not used here and take seconds to compile.
            robosuite.macros.ENABLE_NUMBA = False
            import libero.libero.envs  # noqa: F401, as a side effect it lets robosuite 1.4 run on today's MuJoCo

            from prophet_gym.simulators.frame_renderer import FrameRenderer, aim_camera
            from prophet_gym.simulators.osc_pose import OscPose

        self.suite, self.task, self.image_size, self.instruction = suite, task, image_size, TASKS[task]
        global_state = np.random.get_state()  # robosuite draws from the global stream: leave it as it was
        try:
            self._env: Any = robosuite.make(
                "TwoArmLift",
                robots=["Panda", "Panda"],
                env_configuration="single-arm-opposed",
                use_camera_obs=False,
                use_object_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                hard_reset=False,
            )
        finally:
            np.random.set_state(global_state)
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        robots = self._env.robots
        self._sites = [int(robot.eef_site_id) for robot in robots]
        self._hands = [self._model.body(robot.robot_model.eef_name).id for robot in robots]
        self._fingers = [np.array(robot._ref_gripper_joint_pos_indexes) for robot in robots]
        self._handles = [self._env.handle0_site_id, self._env.handle1_site_id]
        self._controllers = [
            OscPose.of_robot(self._model, self._data, robot, rest_joints=np.array(robot.init_qpos)) for robot in robots
        ]
        self._substeps = round(1.0 / (CONTROL_HZ * self._model.opt.timestep))
        aim_camera(self._model, CAMERA, CAMERA_POSITION, CAMERA_TARGET, CAMERA_FOVY)
        self._renderer = FrameRenderer(self._model, CAMERA, image_size)
        self.reset(0)

    def reset(self, init_state: int) -> None:
        """Begin at the start that robosuite draws from the seed ``init_state``."""
        self.init_state = init_state
        global_state = np.random.get_state()
        try:
            np.random.seed(init_state)
            self._env.reset()
        finally:
            np.random.set_state(global_state)
        for controller in self._controllers:
            controller.reset()

    def step(self, action: Array) -> None:
        """Execute one low-level action (14,) in [-1, 1] for one control step (50 ms): 7 numbers for each arm."""
        import mujoco

        model, data = self._model, self._data
        for controller, own in zip(self._controllers, np.split(action, 2), strict=True):
            controller.set_goal(own)
        for _ in range(self._substeps):
            for controller in self._controllers:
                controller.apply()
            mujoco.mj_step2(model, data)
            mujoco.mj_step1(model, data)  # so poses and contacts always belong to the present positions

    def script(self) -> LiftPot:
        """The scripted expert, which looks at the pot's handles."""
        return LiftPot(self)

    def render(self) -> NDArray[np.uint8]:
        """uint8 (image_size, image_size, 3), upright RGB: arm 0 on the left, arm 1 on the right."""
        return self._renderer.render(self._data)

    def proprio(self) -> NDArray[np.float32]:
        """float32 (16,), for each arm in turn: grip site (3, m, world), axis-angle orientation (3, rad), fingers (2,
        m)."""
        data = self._data
        return np.concatenate(
            [
                proprioception(data.site_xpos[site], data.xquat[hand], data.qpos[fingers])
                for site, hand, fingers in zip(self._sites, self._hands, self._fingers, strict=True)
            ]
        )

    def is_success(self) -> bool:
        """robosuite's verdict on the present state: the pot is 10 cm above the table."""
        return bool(self._env._check_success())

    def camera(self) -> dict[str, list[list[float]]]:
        """Intrinsics and extrinsics, see :func:`prophet_gym.simulators.frame_renderer.camera_parameters`."""
        from prophet_gym.simulators.frame_renderer import camera_parameters

        return camera_parameters(self._model, self._data, CAMERA, self.image_size)

    @property
    def eef_position(self) -> Array:
        """Positions of the two grip sites (6,), metres, world."""
        return np.array(self._data.site_xpos[self._sites]).ravel()

    @property
    def hand_rotations(self) -> Array:
        """Rotation matrices (2, 3, 3) of the hands: x along the palm, y joins the fingers, z points along them."""
        return np.array(self._data.xmat[self._hands]).reshape(2, 3, 3)

    @property
    def handle_positions(self) -> Array:
        """Middles of the pot's two handles (2, 3), metres, world; the first is nearer to arm 0."""
        return np.array(self._data.site_xpos[self._handles])

    def close(self) -> None:
        """Free the renderer and the simulation."""
        self._renderer.close()
        self._env.close()
