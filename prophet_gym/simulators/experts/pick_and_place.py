"""A scripted pick-and-place expert: a fixed sequence of waypoints, followed by proportional control.

The sequence never looks whether the object is in the hand: a failed grasp runs through the same motions as a good one,
and after the release every episode drifts to a resting point until it is cut off. So an episode's actions say as little
as possible about its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prophet_gym.simulators.experts.grasp_planning import (
    Boxes,
    Geometry,
    bottom,
    extent,
    highest_under,
    plan_grasp,
    top,
)
from prophet_gym.simulators.experts.noise import ActionNoise, NoiseRecipe, point_in_disc
from prophet_gym.simulators.hand_pose import rotation_error

Array = NDArray[np.float64]

OPEN, CLOSE = -1.0, 1.0
_POSITION_GAIN = 2.0 / 0.05  # action units per metre
_ROTATION_GAIN = 1.0 / 0.5  # action units per radian
TIPPING = 0.035  # m: how far a bowl that was set down lying on its side travels while it tips upright
_AROUND = 0.5 * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [1, -1], [-1, 1], [-1, -1]])


class Scene(Protocol):
    """What the expert sees of a simulation; :class:`LiberoSimulation` provides it."""

    @property
    def goals(self) -> list[tuple[str, ...]]: ...

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
    """One leg of the script: go to ``position`` (3,) m with the fingers at ``gripper``, their axis at ``angle`` (rad);
    next when closer than ``tolerance`` (m) after at least ``min_steps``, or after ``max_steps`` control steps in any
    case."""

    name: str
    position: Array
    angle: float
    gripper: float
    tolerance: float
    max_steps: int
    min_steps: int = 1


class PickAndPlace:
    """For each of the task's goals picks an object and puts it in or on another one, or on a fixture's surface.

    All is planned at the start, so that the second object's motions do not tell what became of the first.

    Args:
        scene: the simulation at the episode's start.
        recipe: how the expert is disturbed.
        rng: the source of all its randomness.

    Raises:
        ValueError: a goal is another one, and the recipe is not to play.
    """

    def __init__(self, scene: Scene, recipe: NoiseRecipe, rng: np.random.Generator) -> None:
        places = {"in": scene.object_names, "on": scene.object_names + scene.surface_names}
        if recipe.play:
            picked = [str(name) for name in rng.choice(scene.object_names, 2)]
            goals = [("on", name, str(rng.choice([p for p in places["on"] if p != name]))) for name in picked]
        else:
            goals = [(goal[0], goal[1], goal[-1].removesuffix("_contain_region")) for goal in scene.goals]
        if any(container not in places.get(relation, []) for relation, _, container in goals):
            raise ValueError(
                f"PickAndPlace puts objects in or on others or on surfaces, but the goals are {scene.goals}. "
                f"Movable objects: {scene.object_names}; surfaces: {scene.surface_names}."
            )
        if rng.uniform() < recipe.wrong_object:
            named = [name for goal in goals for name in goal[1:]]
            others = [name for name in scene.object_names if name not in named]
            goals[0] = (goals[0][0], str(rng.choice(others)), goals[0][2])
        self._scene = scene
        self._noise = ActionNoise(recipe.action_sigma, rng)
        errors = [(point_in_disc(recipe.grasp_offset, rng), point_in_disc(recipe.place_offset, rng)) for _ in goals]
        rest = scene.eef_position + np.append(rng.uniform(-0.08, 0.08, 2), rng.uniform(-0.02, 0.06))
        angle = float(np.arctan2(scene.eef_rotation[1, 0], scene.eef_rotation[0, 0]))
        self._legs: list[Waypoint] = []
        for (relation, target, container), (grasp_error, place_error) in zip(goals, errors, strict=True):
            legs = self._script(target, container, relation == "in", angle, grasp_error, place_error)
            if self._legs:  # stay above the last place until the hand is over the next object
                height = max(self._legs[-1].position[2], legs[0].position[2])
                over = np.append(legs[0].position[:2], height)
                self._legs.append(Waypoint("cross", over, legs[0].angle, OPEN, 0.03, 40))
            self._legs += legs
            angle = legs[-1].angle
        self._legs.append(Waypoint("rest", rest, angle, OPEN, 0.0, 1))
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
            if leg.name == "cross":
                self._early_release_at = 999  # only the first object is dropped
        self._steps_in_leg += 1
        gripper = leg.gripper
        if leg.name in ("lift", "move", "lower"):
            self._steps_carrying += 1
        if self._steps_carrying >= self._early_release_at:
            gripper = OPEN
        motion = np.concatenate(
            [
                _POSITION_GAIN * (leg.position - position),
                _ROTATION_GAIN * rotation_error(_downward(leg.angle), self._scene.eef_rotation),
            ]
        )
        action = np.append(np.clip(np.clip(motion, -1.0, 1.0) + self._noise(), -1.0, 1.0), gripper)
        return action.astype(np.float32)

    def _script(
        self, name: str, container_name: str, inside: bool, hand_angle: float, grasp_error: Array, place_error: Array
    ) -> list[Waypoint]:
        target, container = self._scene.geometry(name), self._scene.geometry(container_name)
        obstacles, hollow = self._scene.obstacles(name), "bowl" in name or "ramekin" in name
        grasp = plan_grasp(target, hollow, obstacles, hand_angle)
        # the fingers are symmetric: of the two equal angles take the one nearer to the hand's
        angle = grasp.angle + np.pi * round((hand_angle - grasp.angle) / np.pi)
        grip = grasp.position + np.append(grasp_error, 0.0)
        above_bottom = grip[2] - bottom(target, hollow)  # how high the grip site is on the object
        container_top = top(container)
        release = container_top + above_bottom + (-0.03 if inside else 0.004)
        place = container.center[:2] + grasp.position[:2] - target.center[:2] + place_error
        if hollow:
            place = place + TIPPING * target.rotation[:2, 2]
        path = np.linspace(target.center[:2], place, 15)[:, None] + _AROUND * extent(target)[:2]
        highest = max(highest_under(path.reshape(-1, 2), obstacles), container_top + 0.01)
        carry = max(highest + above_bottom + 0.03, grip[2] + 0.05)
        hover = grip[2] + 0.07
        above, over = np.append(place, carry), np.append(place, release)
        return [
            Waypoint("hover", np.append(grip[:2], hover), angle, OPEN, 0.012, 40),
            Waypoint("descend", grip, angle, OPEN, 0.006, 20),
            Waypoint("grasp", grip, angle, CLOSE, 1.0, 9, 9),
            Waypoint("lift", np.append(grip[:2], carry), angle, CLOSE, 0.02, 25),
            Waypoint("move", above, angle, CLOSE, 0.012, 40),
            Waypoint("lower", over, angle, CLOSE, 0.006, 18),
            Waypoint("release", over, angle, OPEN, 1.0, 8, 8),
            Waypoint("retreat", above + np.array([0.0, 0.0, 0.03]), angle, OPEN, 0.02, 15),
        ]


def _downward(angle: float) -> Array:
    """Rotation (3, 3) of a grip site that looks straight down, with the finger axis at ``angle`` (rad)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, sine, 0.0], [sine, -cosine, 0.0], [0.0, 0.0, -1.0]])
