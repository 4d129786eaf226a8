"""Small scripts for the Fetch arm: reach a place, push the cube there, or pick it up and bring it there."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

OPEN, CLOSE = -1.0, 1.0
_GAIN = 40.0  # action units per metre
_HOVER = 0.08  # m, above the cube
_BEHIND = 0.08  # m: from the cube's middle to where a push begins
_PUSH_LEAD = 0.02  # m: how far ahead of itself a pushing hand aims
_ARRIVED = 0.01  # m
_GRASP_STEPS = 6  # control steps until the fingers hold the cube


class FetchScene(Protocol):
    """What the scripts see of a simulation."""

    @property
    def eef_position(self) -> Array: ...

    @property
    def cube_position(self) -> Array: ...

    @property
    def goal(self) -> Array: ...


class Reach:
    """Goes to the goal and stays there, with the fingers closed."""

    def __init__(self, scene: FetchScene) -> None:
        self._scene = scene

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (7,) in [-1, 1]."""
        return _towards(self._scene.goal, self._scene.eef_position, CLOSE)


class PickAndPlaceCube:
    """Takes the cube from above, brings it to the goal and holds it there."""

    def __init__(self, scene: FetchScene) -> None:
        self._scene = scene
        self._over_cube = False
        self._grasping = 0

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (7,) in [-1, 1]."""
        hand, cube = self._scene.eef_position, self._scene.cube_position
        if self._grasping:
            self._grasping += 1
            return _towards(cube if self._grasping < _GRASP_STEPS else self._lifted(hand), hand, CLOSE)
        above = cube + np.array([0.0, 0.0, _HOVER])
        self._over_cube = self._over_cube or _near(hand, above)
        self._grasping = int(_near(hand, cube))
        return _towards(cube if self._over_cube else above, hand, OPEN)

    def _lifted(self, hand: Array) -> Array:
        """Straight up at first where the goal is on the table, so that the cube does not scrape along."""
        goal = self._scene.goal
        far = float(np.linalg.norm(goal[:2] - hand[:2])) > 0.03
        return goal + np.array([0.0, 0.0, 0.03 if far else 0.0])


class PushCube:
    """Goes behind the cube, seen from the goal, and pushes it there; goes round again when the cube slips off."""

    def __init__(self, scene: FetchScene) -> None:
        self._scene = scene
        self._pushing = self._done = False

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (7,) in [-1, 1]."""
        hand, cube, goal = self._scene.eef_position, self._scene.cube_position, self._scene.goal
        way = (goal - cube)[:2]
        distance = float(np.linalg.norm(way))
        self._done = self._done or distance < _ARRIVED
        if self._done:
            return _towards(hand, hand, CLOSE)
        direction = way / distance
        offset = (hand - cube)[:2]
        along = float(offset @ direction)
        across = offset - along * direction
        low = hand[2] < cube[2] + 0.05  # the fingers would touch the cube on the way
        self._pushing = self._pushing and along < -0.01 and float(np.linalg.norm(across)) < 0.025
        behind = np.append(cube[:2] - _BEHIND * direction, cube[2])
        at_behind = float(np.linalg.norm(hand[:2] - behind[:2])) < 0.015
        self._pushing = self._pushing or (at_behind and abs(hand[2] - cube[2]) < 0.012)
        if self._pushing:
            lead = min(_PUSH_LEAD, 0.3 * distance + 0.004)
            return _towards(np.append(hand[:2] + lead * direction - across, cube[2]), hand, CLOSE)
        if at_behind:
            return _towards(behind, hand, CLOSE)
        height = np.array([0.0, 0.0, _HOVER])
        return _towards(np.append(hand[:2], cube[2]) + height if low else behind + height, hand, CLOSE)


def _near(hand: Array, target: Array) -> bool:
    return float(np.linalg.norm(target - hand)) < _ARRIVED


def _towards(target: Array, hand: Array, grip: float) -> NDArray[np.float32]:
    action = np.zeros(7)
    action[:3] = _GAIN * (target - hand)
    action[6] = grip
    return np.clip(action, -1.0, 1.0).astype(np.float32)
