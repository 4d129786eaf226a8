"""How well the motion of an imagined video follows the real one, by optical flow (OpenCV's Farneback).

Videos are uint8 (T, H, W, 3); flow is in pixels per frame.
"""

from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_MOTION = 1e-3
"""Pixels a frame; slower motion has no direction to compare."""


def optical_flow(video: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Dense flow between consecutive frames, on grey levels.

    Farneback with pyramid scale 0.5, 3 levels, window 15, 3 iterations, polynomials over 5 pixels with sigma 1.2.

    :param video: uint8 (T, H, W, 3) with T >= 2.
    :return: float32 (T - 1, H, W, 2), pixels a frame: x to the right, y down.
    :raises TypeError: the video is not a uint8 array.
    :raises ValueError: its shape is wrong.
    """
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8:
        raise TypeError(f"The video must be a uint8 array, got {getattr(video, 'dtype', type(video).__name__)}.")
    if video.ndim != 4 or video.shape[-1] != 3 or len(video) < 2:
        raise ValueError(f"The video must have shape (T >= 2, H, W, 3), got {video.shape}.")
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in video]
    flows = [
        cv2.calcOpticalFlowFarneback(
            before,
            after,
            np.empty((*before.shape, 2), np.float32),
            pyr_scale=0.5,
            levels=3,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.2,
            flags=0,
        )
        for before, after in pairwise(grey)
    ]
    return np.stack(flows).astype(np.float32, copy=False)


def end_point_error(imagined_flow: NDArray[np.float32], real_flow: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean distance between the two flow vectors of a pixel.

    :param imagined_flow: (..., H, W, 2) from :func:`optical_flow`.
    :param real_flow: same shape.
    :return: float64 (...), pixels a frame, >= 0.
    :raises ValueError: the shapes differ or are wrong.
    """
    _check_flows(imagined_flow, real_flow)
    difference = imagined_flow.astype(np.float64) - real_flow
    error: NDArray[np.float64] = np.asarray(np.linalg.norm(difference, axis=-1).mean(axis=(-2, -1)))
    return error


def flow_cosine(imagined_flow: NDArray[np.float32], real_flow: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean cosine of the angle between the two flow vectors, over the pixels where both exceed 1e-3 pixels a frame.

    :param imagined_flow: (..., H, W, 2) from :func:`optical_flow`.
    :param real_flow: same shape.
    :return: float64 (...) in [-1, 1]; NaN where no pixel moves in both.
    :raises ValueError: the shapes differ or are wrong.
    """
    _check_flows(imagined_flow, real_flow)
    x, y = imagined_flow.astype(np.float64), real_flow.astype(np.float64)
    speed_x, speed_y = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    moving = (speed_x > MIN_MOTION) & (speed_y > MIN_MOTION)
    cosine = np.divide((x * y).sum(-1), speed_x * speed_y, out=np.zeros_like(speed_x), where=moving)
    count = moving.sum(axis=(-2, -1))
    total = cosine.sum(axis=(-2, -1))
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _check_flows(imagined_flow: NDArray[np.float32], real_flow: NDArray[np.float32]) -> None:
    if imagined_flow.shape != real_flow.shape or real_flow.ndim < 3 or real_flow.shape[-1] != 2:
        raise ValueError(
            f"Both flows must have the same shape (..., H, W, 2), got {imagined_flow.shape} and {real_flow.shape}."
        )
