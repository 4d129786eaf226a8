"""Recorded pairs of observation and action, in memory."""

from dataclasses import dataclass, replace

import numpy as np

Observations = dict[str, np.ndarray] | np.ndarray


def _is_image(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4


@dataclass(frozen=True)
class Demonstrations:
    """Observations and the actions an expert took there, in memory.

    :param observations: dict of arrays (N, ...) or one array (N, ...); images stay uint8, (N, H, W, C) or (N, C, H, W)
    :param actions: float32 (N, \\*A) in environment units; for a chunked action space the whole chunk
    :param episode_ids: int (N,), rows of one episode in temporal order, others between them or not; used to split by
        episode and to stack frames
    :param rows_per_step: rows of an episode from one step of the environment to the next, at least 1: 2 where a chunk
        of actions spans two video frames, and every frame is a row
    :raises ValueError: lengths that differ, or values that are not finite
    """

    observations: Observations
    actions: np.ndarray
    episode_ids: np.ndarray
    rows_per_step: int = 1

    def __post_init__(self) -> None:
        count = len(self.actions)
        if count == 0:
            raise ValueError("there are no demonstrations")
        entries = self.observations if isinstance(self.observations, dict) else {"box": self.observations}
        for key, value in {**entries, "episode_ids": self.episode_ids}.items():
            if len(value) != count:
                raise ValueError(f"{key!r} has {len(value)} rows but there are {count} actions")
        for key, value in {**entries, "actions": self.actions}.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise ValueError(f"{key!r} holds NaN or infinite values")

    def __len__(self) -> int:
        return len(self.actions)

    def split(self, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Row indices for training and validation, whole episodes each (at least one episode for validation).

        :raises ValueError: fewer than two episodes, or a fraction outside (0, 1)
        """
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in (0, 1), got {validation_fraction}")
        episodes = np.unique(self.episode_ids)
        if len(episodes) < 2:
            raise ValueError("one episode cannot be split into training and validation; pass validation_fraction=0")
        episodes = np.random.default_rng(seed).permutation(episodes)
        count = min(len(episodes) - 1, max(1, round(validation_fraction * len(episodes))))
        held_out = np.isin(self.episode_ids, episodes[:count])
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def stack_frames(self, count: int) -> "Demonstrations":
        """Append the observations of earlier steps of the same episode, in the layout of SB3's VecFrameStack (oldest
        first, zeros before the start; channels of images, last axis of vectors). A policy cloned from the result runs
        in ``VecFrameStack(env, count)``.

        :param count: observations per row, at least 1
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        order = np.arange(len(self))
        rows = np.argsort(self.episode_ids, kind="stable")  # of one episode side by side
        sources = []
        for lag in range((count - 1) * self.rows_per_step, -1, -self.rows_per_step):
            source, inside = np.empty_like(order), np.zeros(len(self), dtype=bool)
            earlier = rows[np.maximum(order - lag, 0)]
            source[rows] = earlier
            inside[rows] = (order >= lag) & (self.episode_ids[earlier] == self.episode_ids[rows])
            sources.append((source, inside))

        def stacked(array: np.ndarray) -> np.ndarray:
            axis = 1 if _is_image(array) and np.argmin(array.shape[1:]) == 0 else array.ndim - 1
            parts = []
            for source, inside in sources:
                part = array[source]
                part[~inside] = 0
                parts.append(part)
            return np.concatenate(parts, axis=axis)

        if isinstance(self.observations, dict):
            observations: Observations = {key: stacked(value) for key, value in self.observations.items()}
        else:
            observations = stacked(self.observations)
        return replace(self, observations=observations)
