"""Where to close the fingers: top-down grasps of boxes, cans and bowl rims that keep clear of the neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Boxes = tuple[Array, Array, Array]
"""Oriented boxes: centres (N, 3), rotations (N, 3, 3), half sizes (N, 3), metres, world."""

FLOOR_CLEARANCE = 0.012  # m, grip site above the support: the fingertips reach 4 mm below the site
RIM_DEPTH = 0.022  # m, grip site below a bowl's rim
TOP_DEPTH = 0.035  # m, grip site below the top of a tall object
_WIDEST = 0.07  # m, what fits between the fingers with a margin
_CANDIDATES = 12


@dataclass(frozen=True)
class Grasp:
    """A top-down grasp: grip-site position (3,) in metres and the direction of the finger axis (rad, about world z)."""

    position: Array
    angle: float


def plan_grasp(
    center: Array, size: Array, hollow: bool, obstacles: Boxes, hand_angle: float, depth: float = TOP_DEPTH
) -> Grasp:
    """Choose the finger direction (and, for a bowl, the point of the rim) with the least risk.

    Args:
        center: (3,) centre of the object's bounding box, m.
        size: (3,) its full size, m.
        hollow: grasp the wall of a bowl instead of the whole object.
        obstacles: the boxes of everything else.
        hand_angle: present direction of the finger axis (rad); small turns are preferred.
        depth: how far below the object's top the grip site goes (m), for an object that is not hollow.
    """
    top, bottom = center[2] + size[2] / 2, center[2] - size[2] / 2
    height = max(top - (RIM_DEPTH if hollow else depth), bottom + FLOOR_CLEARANCE)
    candidates = []
    turns = 2 * _CANDIDATES if hollow else _CANDIDATES
    for angle in np.arange(turns) * np.pi / _CANDIDATES:
        axis = np.array([np.cos(angle), np.sin(angle)])
        position = np.array([center[0], center[1], height])
        width = 0.0
        if hollow:
            position[:2] += (min(size[:2]) / 2 - 0.004) * axis
        else:
            width = float(np.abs(axis) @ size[:2])
        turn = abs((angle - hand_angle + np.pi / 2) % np.pi - np.pi / 2)
        cost = 0.5 * turn + 10.0 * width + 50.0 * max(width - _WIDEST, 0.0) + 3.0 * _overlap(position, axis, obstacles)
        candidates.append((cost, angle, position))
    _, angle, position = min(candidates, key=lambda candidate: candidate[0])
    return Grasp(position, float(angle))


def highest_under(points: Array, obstacles: Boxes) -> float:
    """The highest top (m) of all obstacles below or above any of the horizontal points (P, 2); -inf if there is none."""
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
    """Which boxes (N,) have one of the horizontal points (P, 2) in their outline; exact for boxes that stand upright."""
    centers, rotations, halves = obstacles
    offsets = np.zeros((len(centers), len(points), 3))
    offsets[..., :2] = points[None] - centers[:, None, :2]
    inside: NDArray[np.bool_] = np.abs(offsets @ rotations) < halves[:, None]
    return inside.all(axis=-1).any(axis=-1)


def _tops(obstacles: Boxes) -> Array:
    centers, rotations, halves = obstacles
    tops: Array = centers[:, 2] + np.einsum("nj,nj->n", np.abs(rotations[:, 2]), halves)
    return tops
