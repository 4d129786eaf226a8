"""What a reward model is."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

THRESHOLDS = ("strict", "balanced")


class RewardModel(Protocol):
    """Judges rollouts. Anything with this method and the threshold that is needed can be passed as `reward_model=` to
    the environments.

    Attributes:
        threshold: an episode is taken for solved when its probability reaches this value, above 0; one number, or one
            for each suite. Above 1, none ever is.
        motion_threshold: the same for the probabilities that it gives without frames (environments with `video=False`).

    It may have `balanced_threshold` and `balanced_motion_threshold` too, by which `evaluate_in_prophet` counts, and
    environments with `threshold="balanced"` end episodes; and methods by which it need not go through all of a rollout
    at each step, see :class:`RememberingRewardModel`.
    """

    threshold: float | Mapping[str, float]
    motion_threshold: float | Mapping[str, float]

    def score(
        self,
        frames: NDArray[np.uint8] | None,
        proprio: NDArray[np.float32],
        lengths: NDArray[np.int64],
        instructions: Sequence[str],
        embeddings: NDArray[np.float32],
        starts: NDArray[np.uint8],
        suites: Sequence[str],
    ) -> NDArray[np.float32]:
        """Return the probability that each task stands solved at the end of its rollout so far.

        Args:
            frames: uint8 (B, T_max, H, W, 3), upright RGB; row i is valid up to `lengths[i]`, from the start frame on.
                None where only the motion was imagined (`video=False`).
            proprio: float32 (B, T_max, P), the proprioception at each frame: in imagination, Prophet's estimate.
            lengths: int (B,), at least 1.
            instructions: B sentences.
            embeddings: float32 (B, 384), their embeddings.
            starts: uint8 (B, H, W, 3), the first frames; also where there are no others.
            suites: B names, by which the cameras are known.

        Returns:
            float32 (B,) in [0, 1]; environments refuse anything else.
        """
        ...


@runtime_checkable
class RememberingRewardModel(RewardModel, Protocol):
    """A judge that is told by environments of what is new alone, and says what `score` would."""

    def init_memory(self, proprio: NDArray[np.float32], starts: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        """Return what it remembers of rollouts of which it has seen no frame: tensors (B, ...).

        Args:
            proprio: float32 (B, P), at the first frame. starts: uint8 (B, H, W, 3), the first frames.
        """
        ...

    def score_next(
        self,
        memory: Mapping[str, torch.Tensor],
        clips: NDArray[np.uint8] | None,
        proprio: NDArray[np.float32],
        instructions: Sequence[str],
        embeddings: NDArray[np.float32],
        suites: Sequence[str],
    ) -> tuple[NDArray[np.float32], dict[str, torch.Tensor]]:
        """Return the probabilities after some more frames and, of what is remembered, what has changed.

        Args:
            memory: from `init_memory`, brought up to date by what this method has returned since. Not written to.
            clips: uint8 (B, 3, H, W, 3), see :func:`clip_places`; None where only the motion was imagined.
            proprio: float32 (B, n, P), at the n frames that are new; the first frame is one of them.
            instructions, embeddings, suites: as in `score`.
        """
        ...


def clip_places(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in rollouts of these lengths (B,) the three frames of a judge's clip are: start, last but one and last,
    int64 (3, B)."""
    return np.stack([np.zeros_like(lengths), np.maximum(lengths - 2, 0), lengths - 1])


def thresholds(
    reward_model: RewardModel, suites: Sequence[str], video: bool = True, threshold: str = "strict"
) -> NDArray[np.float64]:
    """The threshold of each of these suites, float64 (N,), for verdicts on `video` or on the motion alone; the highest
    of all for a suite that has none. `"balanced"` ones are never above the `"strict"`, and these where there are none.
    """
    strict = _of_suites(reward_model.threshold if video else reward_model.motion_threshold, suites)
    balanced = _balanced(reward_model, video) if threshold == "balanced" else None
    return strict if balanced is None else np.minimum(strict, _of_suites(balanced, suites))


def check_threshold(reward_model: RewardModel, threshold: str, video: bool = True) -> None:
    """Refuse, with a `ValueError`, `"balanced"` where a judge has none; `threshold` is one of `THRESHOLDS`."""
    if threshold == "balanced" and _balanced(reward_model, video) is None:
        raise ValueError(
            f"threshold='balanced', and the reward model {type(reward_model).__name__} has no "
            f"balanced_{'' if video else 'motion_'}threshold: choose one for it (`prophet train-reward` does), or "
            "threshold='strict'."
        )


def warn_of_unknown_suite(reward_model: RewardModel, suite: str, video: bool = True) -> None:
    """Warn of a suite that a judge has no threshold for, though it has one for each of others."""
    known = reward_model.threshold if video else reward_model.motion_threshold
    if isinstance(known, Mapping) and suite not in known:
        warnings.warn(
            f"The judge knows {sorted(known)} and not {suite!r}: its verdicts there are a guess, held against the "
            "highest threshold of these. Train one on the suite (`prophet train-reward`) and pass it as reward_model.",
            UserWarning,
            stacklevel=4,
        )


def _balanced(reward_model: RewardModel, video: bool) -> float | Mapping[str, float] | None:
    return getattr(reward_model, "balanced_threshold" if video else "balanced_motion_threshold", None)


def _of_suites(threshold: float | Mapping[str, float], suites: Sequence[str]) -> NDArray[np.float64]:
    if isinstance(threshold, Mapping):
        return np.array([threshold.get(suite, max(threshold.values())) for suite in suites])
    return np.full(len(suites), threshold, np.float64)
