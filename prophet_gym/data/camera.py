"""Pinhole cameras: from a data set's intrinsics and extrinsics to where points of the world are seen."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from prophet_gym.data.lerobot_format import EpisodeDataset


def camera_projection(intrinsics: NDArray[np.float64], extrinsics: NDArray[np.float64]) -> list[list[float]]:
    """Camera matrix 3 x 4, in pixels, of intrinsics (3, 3) and camera-to-world extrinsics (4, 4)."""
    projection: list[list[float]] = (intrinsics @ np.linalg.inv(extrinsics)[:3]).tolist()
    return projection


def camera_projections(datasets: Sequence["EpisodeDataset"]) -> dict[str, list[list[float]]]:
    """The camera matrix of every suite of these data sets that has a camera.

    Raises:
        ValueError: two data sets of one suite were recorded with different cameras.
    """
    projections: dict[str, list[list[float]]] = {}
    for dataset in datasets:
        for suite in {record.suite for record in dataset.records}:
            try:
                projection = camera_projection(*dataset.camera(suite))
            except KeyError:  # recorded without one
                continue
            if not np.allclose(projections.setdefault(suite, projection), projection, atol=1e-3):
                raise ValueError(f"{suite} was recorded with different cameras: train on data sets of one camera each.")
    return projections


def projections_of(cameras: Mapping[str, list[list[float]]], suites: Sequence[str]) -> torch.Tensor:
    """The camera matrices of some episodes, float32 (B, 3, 4); zeros where a suite's is not among `cameras`."""
    unknown = [[0.0] * 4] * 3
    return torch.tensor([cameras.get(suite, unknown) for suite in suites])


def project_points(points: torch.Tensor, projection: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel coordinates (B, F, L, 2) of world points (B, F, L, 3) seen by cameras (B, 3, 4); depth (B, F, L, 1), m."""
    # No matrix product: autocast would round it to a quarter of a pixel.
    homogeneous = (projection[:, None, None, :, :3] * points[..., None, :]).sum(-1) + projection[:, None, None, :, 3]
    depth = homogeneous[..., 2:].clamp(min=1e-3)
    return homogeneous[..., :2] / depth, depth
