"""Where a robot's hand is, in the form that all data sets share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DOWNWARD_X = np.array([np.sqrt(0.5), 0.0, np.sqrt(0.5), 0.0])
"""Turn (w, x, y, z) from the axes of a hand whose x axis points along the fingers and whose y axis joins them (Sawyer's
and Fetch's models) to those of the data sets: x along the palm, y joins the fingers, z points along them."""


def proprioception(position: Array, quaternion: Array, fingers: Array) -> NDArray[np.float32]:
    """Put together what the data sets call proprioception.

    Args:
        position: (3,) of the end-effector, m, world.
        quaternion: (4,) w, x, y, z of the hand: x along the palm, y joins the fingers, z points along them.
        fingers: (2,) places of the two fingers along the hand's y axis, m: the first >= 0, the second <= 0.

    Returns:
        float32 (8,). The axis-angle vector has an angle of up to 2 pi: a hand that looks straight down is turned by
        about pi, where the shorter vector would jump while the quaternion of a moving hand changes continuously.
    """
    w, *axis = quaternion
    sine = np.sqrt(max(1.0 - w * w, 0.0))
    angle = 2.0 * np.arccos(np.clip(w, -1.0, 1.0))
    rotation = np.zeros(3) if sine < 1e-8 else np.array(axis) * (angle / sine)
    return np.concatenate([position, rotation, fingers]).astype(np.float32)


def rotation_error(goal: Array, current: Array) -> Array:
    """Small-angle rotation vector (3,) that turns ``current`` (3, 3) into ``goal`` (3, 3), world frame: sin(angle)
    instead of the angle."""
    product = goal @ current.T
    return 0.5 * np.array([product[2, 1] - product[1, 2], product[0, 2] - product[2, 0], product[1, 0] - product[0, 1]])


def multiply(first: Array, second: Array) -> Array:
    """Product of two quaternions (4,), w first: turn by ``second`` in the axes that ``first`` has turned."""
    w, v, u, x = first[0], first[1:], second[0], second[1:]
    return np.concatenate([[w * u - v @ x], w * x + u * v + np.cross(v, x)])
