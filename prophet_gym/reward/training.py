"""Training and calibration of the success classifier on real episodes with the simulator's verdicts."""

import copy
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from prophet_gym.data.clips import EpisodeArrays
from prophet_gym.data.instructions import embed_instructions
from prophet_gym.data.lerobot_format.schema import without_nan, write_json
from prophet_gym.reward.success_classifier import SuccessClassifier
from prophet_gym.run_folder import claim, weights_checksum
from prophet_gym.training import LossFn, fit

logger = logging.getLogger(__name__)


def train_success_classifier(
    train_arrays: EpisodeArrays,
    val_arrays: EpisodeArrays,
    out: str | os.PathLike[str],
    *,
    motion_arrays: EpisodeArrays | None = None,
    steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    init: SuccessClassifier | None = None,
    cameras: dict[str, list[list[float]]] | None = None,
    max_false_success_rate: float = 0.05,
    origin: dict[str, Any] | None = None,
) -> tuple[SuccessClassifier, dict[str, dict[str, float]]]:
    """Train on the frames of one split, calibrate and choose the threshold on another, save to `out / reward`.

    Args:
        train_arrays, val_arrays: episodes with frame-wise verdicts.
        out: folder; checkpoints and TensorBoard logs too. The same call resumes a killed run.
        motion_arrays: episodes from which the motion learns, and only the motion; None: `train_arrays`.
        steps, batch_size, learning_rate, seed, device: of the training.
        init: a classifier to begin from, which stays as it is; None begins from random weights.
        cameras: camera matrix of each suite whose camera is known, see `SuccessClassifier`; they join those of `init`.
        max_false_success_rate: share, in [0, 1), of a suite's failed validation episodes that its threshold lets pass
            at most: false successes are what RL exploits.
        origin: where the episodes come from, as JSON can hold it, if their checksums are not to tell whether a folder
            is of this run: what is imagined differs by a rounding between machines.

    Returns:
        The classifier, and its metrics on `val_arrays` (see `calibrate`), also written to `reward/metrics.json`.

    Raises:
        ValueError: a rate out of range; no solved or no failed training episode, or one of fewer than three frames, or
            validation episodes like that; or `out` is another run's, see `claim`.

    Warns:
        UserWarning: a suite without a failed validation episode, whose threshold nothing was held against.
    """
    if not 0 <= max_false_success_rate < 1:
        raise ValueError(f"max_false_success_rate must be in [0, 1), got {max_false_success_rate}.")
    out = Path(out)
    motion_arrays = train_arrays if motion_arrays is None else motion_arrays
    if origin is None:
        splits = {"episodes": train_arrays, "validation": val_arrays, "motion": motion_arrays}
        origin = {name: arrays.checksum() for name, arrays in splits.items()}
    claim(
        out,
        command="train-reward",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        init=None if init is None else weights_checksum(init),
        cameras=cameras,
        max_false_success_rate=max_false_success_rate,
        **origin,
    )
    if (out / "reward").exists():
        finished = SuccessClassifier.from_pretrained(out / "reward", use_safetensors=True, local_files_only=True)
        logger.info("finished before: %s", out / "reward")
        return finished.to(device).eval(), json.loads((out / "reward" / "metrics.json").read_text())
    check_episodes(train_arrays, val_arrays)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if init is not None:
            classifier = copy.deepcopy(init).float()
        else:
            classifier = SuccessClassifier(num_arms=motion_arrays.num_arms)
            classifier.proprio_mean.copy_(motion_arrays.proprio.mean(0))
            classifier.proprio_std.copy_(motion_arrays.proprio.std(0).clamp(min=0.01))
        classifier.register_to_config(cameras=(classifier.config.cameras or {}) | (cameras or {}))
        classifier.to(device)
    loss_fn = classification_loss(classifier, train_arrays, motion_arrays, batch_size)
    fit("success_classifier", classifier, loss_fn, out, steps=steps, learning_rate=learning_rate, seed=seed)

    metrics = calibrate(classifier, val_arrays, max_false_success_rate)
    temporary = out / ".reward.tmp"
    classifier.save_pretrained(temporary)
    write_json(temporary / "metrics.json", without_nan(metrics))
    os.replace(temporary, out / "reward")
    logger.info("wrote %s", out / "reward")
    return classifier, metrics


def check_episodes(train_arrays: EpisodeArrays, val_arrays: EpisodeArrays) -> None:
    """Raise what `train_success_classifier` raises of its episodes, or warn where a threshold cannot be calibrated."""
    _failed_ends(train_arrays)
    if not val_arrays.success.any() or int(val_arrays.lengths.min()) < 3:
        raise ValueError(
            "A judge is calibrated on validation episodes of three frames or more, solved ones among them; these have "
            f"{int(val_arrays.success.sum())} solved frames and lengths from {int(val_arrays.lengths.min())} on: "
            "record more."
        )
    failed = ~val_arrays.success[val_arrays.starts + val_arrays.lengths - 1].numpy()
    suites = np.array(val_arrays.suites)
    if untested := sorted(set(suites.tolist()) - set(suites[failed].tolist())):
        warnings.warn(
            f"Validation has no failed episode of {untested}: their thresholds are held against nothing. Record more.",
            UserWarning,
            stacklevel=3,
        )


def classification_loss(
    classifier: SuccessClassifier, arrays: EpisodeArrays, motion: EpisodeArrays, batch_size: int
) -> LossFn:
    """Binary cross-entropy of both witnesses, summed.

    Frames: half solved ones, a quarter from the ends of episodes that failed, a quarter any. Brightness, noise and blur
    are varied, so that a decoder's artefacts do not decide. Motion: all times of as many episodes of `motion`, whose
    poses and brightness are shifted a little.
    """
    embeddings, motion_embeddings = _embeddings(arrays), _embeddings(motion)
    projection = classifier.projection(motion.suites)
    episode = arrays.episode_of_row
    first = arrays.starts[episode]
    solved, ends = arrays.success.nonzero()[:, 0], _failed_ends(arrays)

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        quarter = batch_size // 4
        rows = torch.cat(
            [
                pool[torch.randint(len(pool), (count,), generator=generator)]
                for pool, count in ((solved, 2 * quarter), (ends, quarter), (torch.arange(len(episode)), quarter))
            ]
        )
        clips = _augment(_clips(arrays, rows, first[rows]), generator).to(classifier.device)
        logits = classifier(clips, embeddings[episode[rows]].to(classifier.device))
        target = arrays.success[rows].float().to(classifier.device)
        seen_loss = F.binary_cross_entropy_with_logits(logits, target)

        chosen = torch.randint(len(motion.starts), (batch_size,), generator=generator)
        times, inside = _times(motion, chosen)
        shift = 0.03 * torch.randn(batch_size, 1, motion.proprio.shape[1], generator=generator)
        proprio = motion.proprio[times].to(classifier.device) + shift.to(classifier.device) * classifier.proprio_std
        moved = classifier.motion_logits(
            proprio,
            motion_embeddings[chosen].to(classifier.device),
            _brighter(motion.first_frames[chosen], generator).to(classifier.device),
            projection[chosen],
        )[inside]
        solved_then = motion.success[times][inside].float().to(classifier.device)
        moved_loss = F.binary_cross_entropy_with_logits(moved, solved_then)
        return seen_loss + moved_loss, {
            "frames_accuracy": ((logits > 0) == (target > 0)).float().mean().item(),
            "motion_accuracy": ((moved > 0) == (solved_then > 0)).float().mean().item(),
        }

    return loss_fn


def _failed_ends(arrays: EpisodeArrays) -> torch.Tensor:
    """Rows of the last frames of episodes that failed, a third of the shortest episode each.

    Raises:
        ValueError: there is nothing to tell apart.
    """
    solved, last = int(arrays.success.sum()), arrays.starts + arrays.lengths - 1
    failed = ~arrays.success[last]
    if not solved or not failed.any() or int(arrays.lengths.min()) < 3:
        raise ValueError(
            "A judge learns from solved and from failed episodes of three frames or more; these have "
            f"{solved} solved frames, {int(failed.sum())} failed episodes and lengths from "
            f"{int(arrays.lengths.min())} on: record more, for example with --policy."
        )
    return torch.cat([last[failed] - k for k in range(int(arrays.lengths.min()) // 3)])


def _augment(clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary brightness, add noise, and blur the later frames of half of the clips. uint8 (B, 3, H, W, 3), same out."""
    batch = len(clips)
    pixels = clips.float()
    blurred = F.avg_pool2d(pixels.flatten(0, 1).movedim(-1, 1), 3, 1, 1, count_include_pad=False)
    blurred = blurred.movedim(1, -1).unflatten(0, clips.shape[:2])
    use = torch.rand(batch, 1, 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(use, torch.cat([pixels[:, :1], blurred[:, 1:]], dim=1), pixels)
    gain = 1 + 0.1 * torch.randn(batch, 1, 1, 1, 1, generator=generator)
    noise = 4 * torch.rand(batch, 1, 1, 1, 1, generator=generator) * torch.randn(pixels.shape, generator=generator)
    return (gain * pixels + noise).clamp(0, 255).to(torch.uint8)


def _brighter(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary the brightness of each frame, uint8 (B, H, W, 3), same out."""
    shift = 12.0 * torch.randn(len(frames), 1, 1, 1, generator=generator)
    return (frames + shift).clamp(0, 255).to(torch.uint8)


def _times(arrays: EpisodeArrays, episodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of whole episodes (B,), the shorter ones repeating their last: int64 (B, T), and which are no repetition."""
    steps = torch.arange(int(arrays.lengths[episodes].max()))
    lengths = arrays.lengths[episodes, None]
    return arrays.starts[episodes, None] + steps.minimum(lengths - 1), steps < lengths


def _clips(arrays: EpisodeArrays, rows: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """What the judge sees of frames (N,): their episode's first one, their predecessor and they, (N, 3, H, W, 3)."""
    return arrays.frames[torch.stack([first, torch.maximum(rows - 1, first), rows], dim=1)]


@torch.no_grad()
def frame_logits(classifier: SuccessClassifier, arrays: EpisodeArrays, batch_size: int = 128) -> torch.Tensor:
    """Logits of both witnesses at every frame, with its predecessor, its episode's start and the motion until then:
    float (N, 2)."""
    embeddings, device, projection = _embeddings(arrays), classifier.device, classifier.projection(arrays.suites)
    episode = arrays.episode_of_row
    first = arrays.starts[episode]
    logits = torch.empty(len(episode), 2)
    for rows in torch.arange(len(episode)).split(batch_size):
        clips = _clips(arrays, rows, first[rows]).to(device)
        logits[rows, 0] = classifier(clips, embeddings[episode[rows]].to(device)).cpu()
    for chosen in torch.arange(len(arrays.starts)).split(batch_size):
        times, inside = _times(arrays, chosen)
        moved = classifier.motion_logits(
            arrays.proprio[times].to(device),
            embeddings[chosen].to(device),
            arrays.first_frames[chosen].to(device),
            projection[chosen],
        )
        logits[times[inside], 1] = moved.cpu()[inside]
    return logits


def calibrate(
    classifier: SuccessClassifier, arrays: EpisodeArrays, max_false_success_rate: float
) -> dict[str, dict[str, float]]:
    """Set the scales, biases and thresholds of both verdicts, with video and of the motion alone, by held-out episodes.

    Returns:
        Metrics of each suite (see `episode_metrics`; and the AUROC over frames) of the verdict with video, and of that
        of the motion alone under "SUITE/motion"; at their balanced thresholds under "SUITE/balanced" and
        "SUITE/motion/balanced".
    """
    logits = frame_logits(classifier, arrays)
    scale, classifier.logit_bias[...] = _fit_logistic(logits, arrays.success)
    classifier.logit_scale.copy_(scale)
    scale, classifier.motion_bias[...] = _fit_logistic(logits[:, 1:], arrays.success)
    classifier.motion_scale.copy_(scale[0])
    suites = np.array(arrays.suites)
    frame_suites = np.repeat(suites, arrays.lengths.numpy())
    metrics: dict[str, dict[str, float]] = {}
    logits = logits.to(classifier.device)
    for verdict, name, probability in (
        ("", "threshold", classifier.probability(logits)),
        ("/motion", "motion_threshold", classifier.motion_probability(logits[:, 1])),
    ):
        probability = probability.cpu()
        peak, solved = episode_peaks(arrays, probability)
        thresholds, balanced = {}, {}
        for suite in np.unique(suites).tolist():
            own, frames = suites == suite, torch.from_numpy(frame_suites == suite)
            thresholds[suite] = choose_threshold(peak[own], solved[own], max_false_success_rate)
            mixed = 0 < solved[own].mean() < 1
            balanced[suite] = balance_threshold(peak[own], solved[own]) if mixed else thresholds[suite]
            auroc = _auroc(probability[frames], arrays.success[frames])
            metrics[suite + verdict] = {"frame_auroc": auroc} | episode_metrics(
                peak[own], solved[own], thresholds[suite]
            )
            metrics[f"{suite}{verdict}/balanced"] = episode_metrics(peak[own], solved[own], balanced[suite])
        classifier.register_to_config(**{name: thresholds, f"balanced_{name}": balanced})
    return metrics


def _fit_logistic(logits: torch.Tensor, success: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales (C,) and the bias () of logits (N, C) that minimise the cross-entropy on held-out frames.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("The judge's logits cannot be calibrated: they are not finite. Train it anew.")
    scale, bias = torch.full(logits.shape[1:], 0.5, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits((logits * scale).sum(1) + bias, success.float())
        loss.backward()
        return loss

    optimizer.step(closure)
    return scale.detach(), bias.detach()


def episode_peaks(
    arrays: EpisodeArrays, probability: torch.Tensor, chunk_frames: int = 2
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Per episode, the highest probability at the end of a chunk, and whether the simulator saw success at such a time.

    An environment ends an episode the first time that the probability reaches the threshold, so the peak decides.
    """
    peaks, solved = [], []
    for start, length in zip(arrays.starts.tolist(), arrays.lengths.tolist(), strict=True):
        rows = torch.arange(start + chunk_frames, start + length, chunk_frames)
        peaks.append(float(probability[rows].max()))
        solved.append(bool(arrays.success[rows].any()))
    return np.array(peaks), np.array(solved)


def choose_threshold(peak: NDArray[np.float64], solved: NDArray[np.bool_], max_false_success_rate: float) -> float:
    """Lowest threshold, at least 0.5, that no more than this share of the failed episodes reaches."""
    failures = np.sort(peak[~solved])[::-1]
    allowed = int(max_false_success_rate * len(failures))
    limit = failures[allowed] if allowed < len(failures) else 0.0
    return float(max(0.5, np.nextafter(limit, 2.0)))


def balance_threshold(peak: NDArray[np.float64], solved: NDArray[np.bool_]) -> float:
    """The threshold, half-way between two peaks, that as nearly as many episodes reach as are solved: then as many
    failures pass as successes are missed."""
    bounds = np.unique([0.0, *peak, 1.0])
    candidates = (bounds[:-1] + bounds[1:]) / 2
    passed = (peak >= candidates[:, None]).sum(1)
    return float(candidates[np.abs(passed - solved.sum()).argmin()])


def episode_metrics(
    peak: NDArray[np.float64], solved: NDArray[np.bool_], threshold: float | NDArray[np.float64]
) -> dict[str, float]:
    """Accuracy, AUROC, recall and false-success rate of "the peak reaches the threshold" against the real outcomes."""
    judged = peak >= threshold
    return {
        "episodes": float(len(solved)),
        "success_rate": float(solved.mean()),
        "accuracy": float((judged == solved).mean()),
        "auroc": _auroc(torch.from_numpy(peak), torch.from_numpy(solved)),
        "recall": float(judged[solved].mean()) if solved.any() else float("nan"),
        "false_success_rate": float(judged[~solved].mean()) if (~solved).any() else float("nan"),
        "threshold": float(np.mean(threshold)),
    }


def _auroc(score: torch.Tensor, solved: torch.Tensor) -> float:
    """NaN where there is nothing to tell apart."""
    mixed = bool(solved.any()) and not bool(solved.all())
    return float(binary_auroc(score, solved.long())) if mixed else float("nan")


def _embeddings(arrays: EpisodeArrays) -> torch.Tensor:
    return torch.from_numpy(embed_instructions(arrays.instructions))
