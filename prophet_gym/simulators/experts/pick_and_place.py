"""A scripted pick-and-place expert: a fixed sequence of waypoints, followed by proportional control.

The sequence never looks whether the object is in the hand: a failed grasp runs through the same motions as a good one,
and after the release every episode drifts to a resting point until it is cut off. So an episode's actions say as little
as possible about its outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prophet_gym.simulators.experts.grasp_planning import (
    Boxes,
    Geometry,
    Grasp,
    bottom,
    extent,
    highest_under,
    plan_grasp,
    top,
)
from prophet_gym.simulators.experts.noise import ActionNoise, NoiseRecipe, point_in_disc

Array = NDArray[np.float64]

OPEN, CLOSE = -1.0, 1.0
_POSITION_GAIN = 2.0 / 0.05  # action units per metre
_ROTATION_GAIN = 1.0 / 0.5  # action units per radian
TIPPING = 0.035  # m: how far a bowl that was set down lying on its side travels while it tips upright
_AROUND = 0.5 * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [1, -1], [-1, 1], [-1, -1]])


class Scene(Protocol):
    """What the expert sees of a simulation; :class:`LiberoSimulation` provides it."""

    @property
    def goal(self) -> tuple[str, ...]: ...

    @property
    def object_names(self) -> list[str]: ...

    @property
    def surface_names(self) -> list[str]: ...

    @property
    def eef_position(self) -> Array: ...

    @property
    def eef_rotation(self) -> Array: ...

    def geometry(self, name: str) -> Geometry: ...

    def obstacles(self, exclude: str) -> Boxes: ...


@dataclass(frozen=True)
class Waypoint:
    """One leg of the script: go to ``position`` (3,) m with the fingers at ``gripper``; next when closer than
    ``tolerance`` (m) after at least ``min_steps``, or after ``max_steps`` control steps in any case."""

    name: str
    position: Array
    gripper: float
    tolerance: float
    max_steps: int
    min_steps: int = 1


class PickAndPlace:
    """Picks the goal's first object and puts it in or on the second, which is an object or a fixture's surface.

    Args:
        scene: the simulation at the episode's start.
        recipe: how the expert is disturbed.
        rng: the source of all its randomness.

    Raises:
        ValueError: the task's goal is another one.
    """

    def __init__(self, scene: Scene, recipe: NoiseRecipe, rng: np.random.Generator) -> None:
        relation, target, container = scene.goal[0], scene.goal[1], scene.goal[-1].removesuffix("_contain_region")
        places = {"in": scene.object_names, "on": scene.object_names + scene.surface_names}
        if container not in places.get(relation, []):
            raise ValueError(
                f"PickAndPlace puts an object in or on another or on a surface, but the goal is {scene.goal}. "
                f"Movable objects: {scene.object_names}; surfaces: {scene.surface_names}."
            )
        if rng.uniform() < recipe.wrong_object:
            target = str(rng.choice([name for name in scene.object_names if name not in (target, container)]))
        self._scene = scene
        self._noise = ActionNoise(recipe.action_sigma, rng)
        self._container = scene.geometry(container)
        self._hand_angle = float(np.arctan2(scene.eef_rotation[1, 0], scene.eef_rotation[0, 0]))
        self._hollow = "bowl" in target or "ramekin" in target
        self._grasp = self._plan(target)
        self._grasp_error = point_in_disc(recipe.grasp_offset, rng)
        self._place_error = point_in_disc(recipe.place_offset, rng)
        self._rest = scene.eef_position + np.append(rng.uniform(-0.08, 0.08, 2), rng.uniform(-0.02, 0.06))
        self._legs = self._script(target, inside=relation == "in")
        self._early_release_at = 999
        if rng.uniform() < recipe.early_release:
            self._early_release_at = int(rng.integers(2, 30))  # control steps after the lift began
        self._leg = self._steps_in_leg = self._steps_carrying = 0

    @property
    def finished(self) -> bool:
        """Whether the script has reached its tail (drifting at rest)."""
        return self._leg == len(self._legs) - 1

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (7,) in [-1, 1]."""
        position = self._scene.eef_position
        leg = self._legs[self._leg]
        arrived = float(np.linalg.norm(leg.position - position)) < leg.tolerance
        if not self.finished and self._steps_in_leg >= (leg.min_steps if arrived else leg.max_steps):
            self._leg, self._steps_in_leg = self._leg + 1, 0
            leg = self._legs[self._leg]
        self._steps_in_leg += 1
        gripper = leg.gripper
        if leg.name in ("lift", "move", "lower"):
            self._steps_carrying += 1
        if self._steps_carrying >= self._early_release_at:
            gripper = OPEN
        motion = np.concatenate(
            [
                _POSITION_GAIN * (leg.position - position),
                _ROTATION_GAIN * _rotation_error(_downward(self._angle), self._scene.eef_rotation),
            ]
        )
        action = np.append(np.clip(np.clip(motion, -1.0, 1.0) + self._noise(), -1.0, 1.0), gripper)
        return action.astype(np.float32)

    def _plan(self, target: str) -> Grasp:
        obstacles = self._scene.obstacles(target)
        grasp = plan_grasp(self._scene.geometry(target), self._hollow, obstacles, self._hand_angle)
        # the fingers are symmetric: of the two equal angles take the one nearer to the hand's
        self._angle = grasp.angle + np.pi * round((self._hand_angle - grasp.angle) / np.pi)
        return grasp

    def _script(self, name: str, inside: bool) -> Sequence[Waypoint]:
        target = self._scene.geometry(name)
        grip = self._grasp.position + np.append(self._grasp_error, 0.0)
        above_bottom = grip[2] - bottom(target, self._hollow)  # how high the grip site is on the object
        container_top = top(self._container)
        release = container_top + above_bottom + (-0.03 if inside else 0.004)
        place = self._container.center[:2] + self._grasp.position[:2] - target.center[:2] + self._place_error
        if self._hollow:
            place = place + TIPPING * target.rotation[:2, 2]
        path = np.linspace(target.center[:2], place, 15)[:, None] + _AROUND * extent(target)[:2]
        highest = max(highest_under(path.reshape(-1, 2), self._scene.obstacles(name)), container_top + 0.01)
        carry = max(highest + above_bottom + 0.03, grip[2] + 0.05)
        hover = grip[2] + 0.07
        above, over = np.append(place, carry), np.append(place, release)
        return (
            Waypoint("hover", np.append(grip[:2], hover), OPEN, 0.012, 40),
            Waypoint("descend", grip, OPEN, 0.006, 20),
            Waypoint("grasp", grip, CLOSE, 1.0, 9, 9),
            Waypoint("lift", np.append(grip[:2], carry), CLOSE, 0.02, 25),
            Waypoint("move", above, CLOSE, 0.012, 40),
            Waypoint("lower", over, CLOSE, 0.006, 18),
            Waypoint("release", over, OPEN, 1.0, 8, 8),
            Waypoint("retreat", above + np.array([0.0, 0.0, 0.03]), OPEN, 0.02, 15),
            Waypoint("rest", self._rest, OPEN, 0.0, 1),
        )


def _downward(angle: float) -> Array:
    """Rotation (3, 3) of a grip site that looks straight down, with the finger axis at ``angle`` (rad)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, sine, 0.0], [sine, -cosine, 0.0], [0.0, 0.0, -1.0]])


def _rotation_error(goal: Array, current: Array) -> Array:
    """Rotation vector (3,) from ``current`` to ``goal`` (3, 3), world frame: sin(angle) instead of the angle."""
    product = goal @ current.T
    return 0.5 * np.array([product[2, 1] - product[1, 2], product[0, 2] - product[2, 0], product[1, 0] - product[0, 1]])
