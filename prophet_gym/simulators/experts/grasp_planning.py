"""Where to close the fingers: top-down grasps of boxes, cans and bowl rims that keep clear of the neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Boxes = tuple[Array, Array, Array]
"""Oriented boxes: centres (N, 3), rotations (N, 3, 3), half sizes (N, 3), metres, world."""

FLOOR_CLEARANCE = 0.012  # m, grip site above the support: the fingertips reach 4 mm below the site
RIM_DEPTH = 0.022  # m, grip site below a bowl's rim
RIM_WIDTH = 0.004  # m, middle of the wall to the outside
TOP_DEPTH = 0.035  # m, grip site below the top of an object
TALL_TOP_DEPTH = 0.045  # m, the same for a bottle or carton
TALL = 0.1  # m
WIDEST = 0.07  # m, what fits between the fingers with a margin
FOOT = 0.5  # width of a bowl's foot, relative to its rim
_CANDIDATES = 12


class Geometry(Protocol):
    """The box around an object: centre (3,) m, rotation (3, 3) body to world, full side lengths (3,) m."""

    @property
    def center(self) -> Array: ...

    @property
    def rotation(self) -> Array: ...

    @property
    def size(self) -> Array: ...


@dataclass(frozen=True)
class Grasp:
    """A top-down grasp: grip-site position (3,) in metres and the direction of the finger axis (rad, about world z)."""

    position: Array
    angle: float


def extent(geometry: Geometry) -> Array:
    """Side lengths (3,) of an object along the axes of the world, m."""
    return np.abs(geometry.rotation) @ geometry.size


def top(geometry: Geometry) -> float:
    """Height of an object's highest point, m."""
    return float(geometry.center[2] + extent(geometry)[2] / 2)


def bottom(geometry: Geometry, hollow: bool = False) -> float:
    """Height of an object's lowest point, m; a bowl is taken to be half as wide at its foot."""
    size = geometry.size * np.array([FOOT, FOOT, 1.0] if hollow else [1.0, 1.0, 1.0])
    return float(geometry.center[2] - np.abs(geometry.rotation[2]) @ size / 2)


def plan_grasp(geometry: Geometry, hollow: bool, obstacles: Boxes, hand_angle: float) -> Grasp:
    """Choose the finger direction (and, for a bowl, the point of the rim) with the least risk.

    Args:
        geometry: the object's box; a bowl opens along the third axis of its body.
        hollow: grasp the wall of a bowl instead of the whole object.
        obstacles: the boxes of everything else.
        hand_angle: present direction of the finger axis (rad); small turns are preferred.
    """
    candidates = []
    for turn in np.arange(2 * _CANDIDATES if hollow else _CANDIDATES) * np.pi / _CANDIDATES:
        cost = 0.0
        if hollow:
            outward = geometry.rotation @ np.array([np.cos(turn), np.sin(turn), 0.0])
            position = geometry.center + geometry.rotation[:, 2] * geometry.size[2] / 2
            position = position + (min(geometry.size[:2]) / 2 - RIM_WIDTH) * outward
            cost += 20.0 * (top(geometry) - position[2])  # of a tilted bowl take the high side
            position[2] -= RIM_DEPTH
            angle = float(np.arctan2(outward[1], outward[0]))
            axis = np.array([np.cos(angle), np.sin(angle)])
        else:
            angle, axis = float(turn), np.array([np.cos(turn), np.sin(turn)])
            depth = TALL_TOP_DEPTH if extent(geometry)[2] > TALL else TOP_DEPTH
            position = np.append(geometry.center[:2], top(geometry) - depth)
            width = float(np.abs(axis @ geometry.rotation[:2]) @ geometry.size)
            cost += 10.0 * width + 50.0 * max(width - WIDEST, 0.0)
        position[2] = max(position[2], bottom(geometry) + FLOOR_CLEARANCE)
        cost += 0.5 * abs((angle - hand_angle + np.pi / 2) % np.pi - np.pi / 2)
        cost += 3.0 * _overlap(position, axis, obstacles)
        candidates.append((cost, angle, position))
    _, angle, position = min(candidates, key=lambda candidate: candidate[0])
    return Grasp(position, angle)


def highest_under(points: Array, obstacles: Boxes) -> float:
    """The highest top (m) of all obstacles below or above any of the horizontal points (P, 2), -inf if none."""
    tops = _tops(obstacles)[_covering(points, obstacles)]
    return float(tops.max(initial=-np.inf))


def _overlap(position: Array, axis: Array, obstacles: Boxes) -> int:
    """How many obstacles the open fingers or the palm would touch."""
    across = np.array([-axis[1], axis[0]])
    fingers, palm = position[2] - 0.01, position[2] + 0.02  # m: the palm's underside is 2 cm above the grip site
    reach, half_width = np.meshgrid(np.linspace(-1, 1, 11), np.linspace(-1, 1, 5))
    touched = np.zeros(len(obstacles[0]), dtype=bool)
    for floor, length, width in ((fingers, 0.068, 0.016), (palm, 0.108, 0.04)):
        points = position[:2] + length * reach.reshape(-1, 1) * axis + width * half_width.reshape(-1, 1) * across
        touched |= _covering(points, obstacles) & (_tops(obstacles) > floor)
    return int(touched.sum())


def _covering(points: Array, obstacles: Boxes) -> NDArray[np.bool_]:
    """Which boxes (N,) have one of the horizontal points (P, 2) in their outline; exact for upright boxes."""
    centers, rotations, halves = obstacles
    offsets = np.zeros((len(centers), len(points), 3))
    offsets[..., :2] = points[None] - centers[:, None, :2]
    inside = np.abs(offsets @ rotations) < halves[:, None]
    return np.asarray(inside.all(axis=-1).any(axis=-1), dtype=np.bool_)


def _tops(obstacles: Boxes) -> Array:
    centers, rotations, halves = obstacles
    tops: Array = centers[:, 2] + np.einsum("nj,nj->n", np.abs(rotations[:, 2]), halves)
    return tops
