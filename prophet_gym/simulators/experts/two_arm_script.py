"""A small script for two arms: each takes the pot by the handle before it, then both lift."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

OPEN, CLOSE = -1.0, 1.0
_GAIN = 30.0  # action units per metre
_TURN_GAIN = 2.0  # action units per radian: the goal is the pose itself
_FASTEST = 0.6  # action units: 0.18 m/s
_FASTEST_TURN = 0.4  # action units: 1.2 rad/s
_HOVER = 0.08  # m, above the handle
_DEPTH = 0.005  # m: how far below a handle's middle the fingers take it
_ARRIVED = 0.01  # m
_TURNED = 0.03  # rad
_GRASP_STEPS = 8  # control steps until the fingers hold the handles
_LIFT = 0.16  # m
_LIFT_STEPS = 28  # control steps: 0.11 m/s


class PotScene(Protocol):
    """What the script sees of a simulation."""

    @property
    def eef_position(self) -> Array: ...

    @property
    def hand_rotations(self) -> Array: ...

    @property
    def handle_positions(self) -> Array: ...


class LiftPot:
    """Both hands turn and hover over the handles, descend, close, and lift the pot together; then they hold it there.

    The fingers of a hand close along the line that joins the handles, around the bar that is across it.
    """

    def __init__(self, scene: PotScene) -> None:
        self._scene = scene
        across, fingers = np.diff(scene.handle_positions, axis=0)[0], scene.hand_rotations[:, :, 1]
        across[2] = 0.0
        across /= np.linalg.norm(across)
        # Which finger is on which side does not matter: the shorter turn of the two.
        self._poses = [_looking_down(np.copysign(1.0, axis @ across) * across) for axis in fingers]
        self._turning = np.array([True, True])
        self._over_handles = False
        self._grasp = np.zeros((2, 3))  # where the hands closed, m, world
        self._closed_for = 0  # control steps

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (14,) in [-1, 1]."""
        hands, handles = self._scene.eef_position.reshape(2, 3), self._scene.handle_positions
        action = np.zeros((2, 7))
        action[:, 3:6] = self._turn()
        if self._closed_for:
            risen = np.clip((self._closed_for - _GRASP_STEPS) / _LIFT_STEPS, 0.0, 1.0)
            target = self._grasp + np.array([0.0, 0.0, risen * _LIFT])
            self._closed_for += 1
        else:
            above, around = handles + np.array([0.0, 0.0, _HOVER]), handles - np.array([0.0, 0.0, _DEPTH])
            self._over_handles = self._over_handles or (_near(hands, above) and not self._turning.any())
            target = around if self._over_handles else above
            if self._over_handles and _near(hands, around):
                self._grasp, self._closed_for = around, 1
        action[:, :3] = np.clip(_GAIN * (target - hands), -_FASTEST, _FASTEST)
        action[:, 6] = CLOSE if self._closed_for else OPEN
        return action.ravel().astype(np.float32)

    def _turn(self) -> Array:
        """Rotations (2, 3) in action units. An arm that is asked for none keeps its last goal, the pose itself."""
        rotations = self._scene.hand_rotations
        errors = np.array(
            [
                Rotation.from_matrix(pose @ rotation.T).as_rotvec()
                for pose, rotation in zip(self._poses, rotations, strict=True)
            ]
        )
        self._turning &= np.linalg.norm(errors, axis=1) > _TURNED
        return np.where(self._turning[:, None], np.clip(_TURN_GAIN * errors, -_FASTEST_TURN, _FASTEST_TURN), 0.0)


def _looking_down(fingers: Array) -> Array:
    """Rotation matrix (3, 3) of a hand that points down and whose fingers are joined by the horizontal axis (3,)."""
    down = np.array([0.0, 0.0, -1.0])
    return np.stack([np.cross(fingers, down), fingers, down], axis=1)


def _near(hands: Array, targets: Array) -> bool:
    return bool((np.linalg.norm(targets - hands, axis=1) < _ARRIVED).all())
