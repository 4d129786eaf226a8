"""Operational-space control of a 7-joint arm (robosuite's OSC_POSE), without robosuite's per-substep overhead.

The arithmetic is that of robosuite 1.4 ``OperationalSpaceController`` with its default configuration (fixed impedance,
delta commands, position and orientation uncoupled): Khatib 1987, "A unified approach for motion and force control of
robot manipulators". robosuite recomputes the forward dynamics three times a substep; here it is computed once.
Imported only by the simulations, which set up the OpenGL platform first.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from prophet_gym.simulators.hand_pose import rotation_error

POSITION_SCALE = 0.05  # m per unit of action
ROTATION_SCALE = 0.5  # rad per unit of action
KP = 150.0  # 1 / s^2
KD = 2.0 * np.sqrt(KP)  # critical damping
NULLSPACE_KP = 10.0
NULLSPACE_KD = 2.0 * np.sqrt(NULLSPACE_KP)
GRIPPER_SPEED = 0.01  # change of the normalised finger target per substep

Array = NDArray[np.float64]


class OscPose:
    """Turn OSC_POSE actions into joint torques and finger targets of one MuJoCo simulation.

    Args:
        model: ``mujoco.MjModel`` of the scene.
        data: ``mujoco.MjData`` of the scene.
        site: id of the end-effector site that is controlled.
        joint_qpos: where the arm's 7 joints are in ``qpos``.
        joint_qvel: where the arm's 7 joints are in ``qvel``.
        arm_actuators: the 7 torque actuators.
        gripper_actuators: the 2 finger position actuators.
        rest_joints: (7,) joint angles (rad) towards which the null space is pulled.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        site: int,
        joint_qpos: slice,
        joint_qvel: slice,
        arm_actuators: slice,
        gripper_actuators: slice,
        rest_joints: Array,
    ) -> None:
        self._model, self._data, self._site = model, data, site
        self._joint_qpos, self._joint_qvel = joint_qpos, joint_qvel
        self._arm_actuators, self._gripper_actuators = arm_actuators, gripper_actuators
        self._rest_joints = rest_joints
        self._torque_low, self._torque_high = model.actuator_ctrlrange[arm_actuators].T.copy()
        low, high = model.actuator_ctrlrange[gripper_actuators].T
        self._finger_middle, self._finger_span = (high + low) / 2, (high - low) / 2
        self._jacobian = np.zeros((6, model.nv))
        self._mass = np.zeros((model.nv, model.nv))
        self.reset()

    @classmethod
    def of_robot(cls, model: Any, data: Any, robot: Any, rest_joints: Array) -> OscPose:
        """The controller of one of robosuite's single-armed robots; the other arguments are the constructor's."""
        return cls(
            model,
            data,
            site=int(robot.eef_site_id),
            joint_qpos=_as_slice(robot._ref_joint_pos_indexes),
            joint_qvel=_as_slice(robot._ref_joint_vel_indexes),
            arm_actuators=_as_slice(robot._ref_joint_actuator_indexes),
            gripper_actuators=_as_slice(robot._ref_joint_gripper_actuator_indexes),
            rest_joints=rest_joints,
        )

    def reset(self) -> None:
        """Forget the last goal: hold the present pose, fingers half open (robosuite's start)."""
        self._goal_pos = self._position()
        self._goal_rot = self._rotation()
        self._fingers = np.zeros(2)
        self._finger_change = np.zeros(2)

    def set_goal(self, action: Array) -> None:
        """Take a new action (7,) in [-1, 1]: the goal is an offset from the CURRENT pose, rotations in the world frame.

        An action without any rotation keeps the last orientation goal, as robosuite does. Positions must be up to date.
        """
        self._goal_pos = self._position() + POSITION_SCALE * action[:3]
        if action[3:6].any():
            self._goal_rot = rotation_matrix(ROTATION_SCALE * action[3:6]) @ self._rotation()
        self._finger_change = GRIPPER_SPEED * np.sign(action[6]) * np.array([-1.0, 1.0])

    def apply(self) -> None:
        """Write the controls of one substep into ``data.ctrl``; positions and velocities must be up to date."""
        data = self._data
        mujoco.mj_jacSite(self._model, data, self._jacobian[:3], self._jacobian[3:], self._site)
        if hasattr(data, "qM"):  # older MuJoCo takes the sparse matrix instead of the data
            mujoco.mj_fullM(self._model, self._mass, data.qM)
        else:
            mujoco.mj_fullM(self._model, data, self._mass)
        jacobian = self._jacobian[:, self._joint_qvel]
        mass = self._mass[self._joint_qvel, self._joint_qvel]
        joint_velocity = data.qvel[self._joint_qvel]
        velocity = jacobian @ joint_velocity

        position_force = KP * (self._goal_pos - self._position()) - KD * velocity[:3]
        rotation_torque = KP * rotation_error(self._goal_rot, self._rotation()) - KD * velocity[3:]
        weighted = np.linalg.solve(mass, jacobian.T)  # M^-1 J^T (7, 6)
        mobility = jacobian @ weighted  # (6, 6), the inverse of Khatib's lambda
        wrench = np.empty(6)
        wrench[:3] = np.linalg.solve(mobility[:3, :3], position_force)
        wrench[3:] = np.linalg.solve(mobility[3:, 3:], rotation_torque)

        # rest torques through the null-space projector: N^T tau = tau - J^T lambda J M^-1 tau
        pull = NULLSPACE_KP * (self._rest_joints - data.qpos[self._joint_qpos]) - NULLSPACE_KD * joint_velocity
        rest_torques = mass @ pull
        wrench -= np.linalg.solve(mobility, weighted.T @ rest_torques)
        torques = jacobian.T @ wrench + data.qfrc_bias[self._joint_qvel] + rest_torques
        data.ctrl[self._arm_actuators] = np.minimum(np.maximum(torques, self._torque_low), self._torque_high)

        self._fingers = np.minimum(np.maximum(self._fingers + self._finger_change, -1.0), 1.0)
        data.ctrl[self._gripper_actuators] = self._finger_middle + self._finger_span * self._fingers

    def _position(self) -> Array:
        return self._data.site_xpos[self._site].copy()

    def _rotation(self) -> Array:
        return self._data.site_xmat[self._site].reshape(3, 3).copy()


def _as_slice(indices: list[int]) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1)


def rotation_matrix(rotation_vector: Array) -> Array:
    """Rotation matrix (3, 3) of an axis-angle vector (3,) in radians."""
    quaternion = np.zeros(4)
    angle = float(np.linalg.norm(rotation_vector))
    axis = rotation_vector / angle if angle > 0 else np.array([1.0, 0.0, 0.0])
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
