"""Prophet against the real simulator: recorded episodes replayed in imagination, compared by frames and by outcomes."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from prophet_gym.data.clips import EpisodeArrays, concatenate, episode_folds, load_arrays, subset
from prophet_gym.data.episode import GRIPPERS, PROPRIO_DIM, per_arm
from prophet_gym.data.instructions import embed_instructions
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.envs.models import resolve_models
from prophet_gym.evaluation.actions_only import predict_from_actions
from prophet_gym.evaluation.flow_metrics import end_point_error, flow_cosine, optical_flow
from prophet_gym.evaluation.report import draw_suite, write_report
from prophet_gym.evaluation.video_metrics import moving_psnr, psnr, ssim, temporal_ssim
from prophet_gym.reward.base import RewardModel, thresholds
from prophet_gym.reward.training import choose_threshold, episode_metrics
from prophet_gym.world_model.action_conditioning import carry, draw_action_frames
from prophet_gym.world_model.imagination import episode_seeds, frame_rows, hand_motions, replay_episodes, track_holds
from prophet_gym.world_model.pipeline import ProphetPipeline, frames_to_pixels, pixels_to_frames

logger = logging.getLogger(__name__)


COUNTERFACTUAL_EPISODES = 16
"""Episodes that are imagined with other actions than their own."""


@dataclass(frozen=True)
class Verdicts:
    """What is said about the outcomes of E episodes of C chunks.

    An episode is solved when the simulator (or the judge, past its threshold) says so at the end of any chunk: that is
    when an environment would have ended it.

    Attributes:
        kind: (E,), as in `Episode`. solved: (E, C), by the real simulator at the end of each chunk.
        real_frames, imagined_frames: (E, C), the judge's probability at the end of each chunk.
        actions_only: (E, C), that of the control, see `predict_from_actions`; its threshold is 0.5.
        threshold: (E,), of the judge's probability, at which few failures pass. balanced_threshold: (E,), at which as
            many pass as successes are missed on validation episodes: what the control's 0.5 is to be compared with.
        strict_threshold: (E,), at which the control lets no more failures pass than the judge does in imagination, see
            `as_strict`.
    """

    kind: NDArray[np.str_]
    solved: NDArray[np.bool_]
    real_frames: NDArray[np.float64]
    imagined_frames: NDArray[np.float64]
    actions_only: NDArray[np.float64]
    threshold: NDArray[np.float64]
    balanced_threshold: NDArray[np.float64]
    strict_threshold: NDArray[np.float64]

    def report(self) -> dict[str, dict[str, dict[str, float]]]:
        """`episode_metrics` of each of the three, of the judge in imagination at its balanced threshold, and of the
        control when it is as strict as the judge, over all episodes and by kind; and of what is solved within a
        quarter, a half and three quarters of the episode."""
        everything, chunks = np.ones(len(self.kind), bool), self.solved.shape[1]
        groups = {"all": (everything, chunks)}
        groups |= {str(kind): (self.kind == kind, chunks) for kind in np.unique(self.kind)}
        horizons = sorted({max(1, chunks * quarter // 4) for quarter in (1, 2, 3)} - {chunks})
        groups |= {f"within {horizon} chunks": (everything, horizon) for horizon in horizons}
        limits = {
            "real_frames": (self.real_frames, self.threshold),
            "imagined_frames": (self.imagined_frames, self.threshold),
            "imagined_frames_balanced": (self.imagined_frames, self.balanced_threshold),
            "actions_only": (self.actions_only, np.full_like(self.threshold, 0.5)),
            "actions_only_as_strict": (self.actions_only, self.strict_threshold),
        }
        report = {}
        for group, (rows, horizon) in groups.items():
            solved = self.solved[rows, :horizon].max(1)
            report[group] = {
                name: episode_metrics(probability[rows, :horizon].max(1), solved, limit[rows])
                for name, (probability, limit) in limits.items()
            }
        return report


def as_strict(
    control: NDArray[np.float64],
    judge: NDArray[np.float64],
    threshold: NDArray[np.float64],
    solved: NDArray[np.bool_],
) -> float:
    """The lowest threshold, at least 0.5, at which a control passes no more failures than a judge past its threshold.

    It is chosen with these episodes' true outcomes, which favours the control: a guess that passes every third failure
    is easily as accurate as one that passes none, and of no use as a reward.

    Args:
        control, judge: (E, C), probabilities. threshold: (E,), the judge's. solved: (E, C), the true outcomes.
    """
    truth = solved.max(1)
    passed = int((judge.max(1) >= threshold)[~truth].sum())
    return choose_threshold(control.max(1), truth, (passed + 0.5) / max(1, int((~truth).sum())))


def concatenate_verdicts(parts: Sequence[Verdicts]) -> Verdicts:
    """The episodes of all parts; shorter ones stay as they end, so that their peaks are what they were."""
    chunks = max(part.solved.shape[1] for part in parts)

    def join(name: str) -> NDArray[Any]:
        values = [getattr(part, name) for part in parts]
        if values[0].ndim == 1:
            return np.concatenate(values)
        return np.concatenate([np.pad(some, ((0, 0), (0, chunks - some.shape[1])), mode="edge") for some in values])

    return Verdicts(**{field.name: join(field.name) for field in fields(Verdicts)})


def evaluate(
    checkpoint: str | ProphetPipeline,
    data: Sequence[str | os.PathLike[str]],
    report: str | os.PathLike[str],
    *,
    reward_model: str | RewardModel = "reward-libero",
    splits: Sequence[str] = ("val",),
    episodes: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure a world model and a reward model on recorded episodes that neither has learned from.

    A reward model's thresholds are chosen on validation episodes: how few failures pass is for the test split to say.

    Writes `results.json`, `report.html` (self-contained), and per suite `drift_*.png`, `contact_sheet_*.png` and
    `side_by_side_*.mp4` (real above imagined) to `report`.

    Args:
        checkpoint: a pipeline, its folder, or the name of a shipped one.
        data: folders written by `prophet record`. The actions-only control is trained on their training split, also of
            those without video.
        report: folder of the report; made if needed.
        reward_model: a reward model, its folder, or the name of a shipped one.
        splits: "val", "test" or both, taken together. episodes: at most this many of each suite.
        seed: of the episodes drawn and of the world model's noise. device: of models given by name or folder.

    Returns:
        The content of `results.json`: for each suite `video` (see `video_report`), `proprio` (error of the estimated
        end-effector, cm and degrees), `actions` (see `actions_report`) and `outcome` (see `Verdicts.report`); and the
        outcomes of all suites together under "all".

    Raises:
        ValueError: a split is "train", on which the models were trained, or otherwise neither "val" nor "test"; or the
            episodes of a suite differ in length.
        TypeError: the checkpoint is not a `ProphetPipeline`.
    """
    if not splits or not set(splits) <= {"val", "test"}:
        raise ValueError(f'Expected the splits "val", "test" or both, got {splits!r}: models were trained on "train".')
    pipeline, judge = resolve_models(checkpoint, reward_model, device, "auto")
    if not isinstance(pipeline, ProphetPipeline):
        raise TypeError(f"Expected a ProphetPipeline, its folder or name, got {type(pipeline).__name__}.")
    report = Path(report)
    report.mkdir(parents=True, exist_ok=True)
    datasets = [EpisodeDataset(path) for path in data]
    results: dict[str, Any] = {}
    verdicts = []
    for suite in sorted({record.suite for dataset in datasets for record in dataset.records}):
        held_out = [dataset.select(suite=suite) for dataset in _holding(datasets, "suite", suite)]
        # Recordings without video may teach the control, and hold no episode of these splits.
        of_splits = [(_holding(held_out, "split", split) or held_out, split) for split in splits]
        arrays = concatenate([load_arrays(some, split, num_arms=pipeline.num_arms) for some, split in of_splits])
        if episodes is not None:
            arrays = subset(arrays, episodes, seed)
        if len(lengths := arrays.lengths.unique()) > 1:  # the longer ones would lose their ends, and their outcomes
            raise ValueError(
                f"The episodes of {suite!r} must be equally long to be compared, got {lengths.tolist()} frames: record "
                "them with `prophet record`, or evaluate data sets of different lengths separately."
            )
        chosen = torch.arange(len(arrays.records))
        rows = frame_rows(arrays, chosen, pipeline.chunk_frames)
        clips, proprio = replay_episodes(pipeline, arrays, chosen, episode_seeds(chosen, seed))
        real, imagined, true_proprio = arrays.frames[rows].numpy(), clips.numpy(), arrays.proprio[rows]
        video, curves = video_report(pipeline, arrays, real, imagined, seed)
        verdicts.append(
            _verdicts(judge, arrays, (real, true_proprio), (imagined, proprio), pipeline.chunk_frames, held_out)
        )
        results[suite] = {
            "splits": list(splits),
            "video": video,
            "proprio": _proprio_report(proprio[:, 1:], true_proprio[:, 1:], pipeline.arms(suite)),
            "actions": actions_report(pipeline, arrays, real, imagined, seed),
            "outcome": verdicts[-1].report(),
        }
        draw_suite(report, suite, curves, real, imagined)
        logger.info("%s: %s", suite, json.dumps(results[suite], indent=1))
    results["all"] = {"splits": list(splits), "outcome": concatenate_verdicts(verdicts).report()}
    write_report(report, results)
    return results


def _holding(datasets: Sequence[EpisodeDataset], name: str, value: str) -> list[EpisodeDataset]:
    """The data sets that have an episode whose record says so."""
    return [one for one in datasets if any(getattr(record, name) == value for record in one.records)]


def video_report(
    pipeline: ProphetPipeline,
    arrays: EpisodeArrays,
    real: NDArray[np.uint8],
    imagined: NDArray[np.uint8],
    seed: int,
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """PSNR (dB), SSIM, tSSIM and optical flow of whole imagined episodes and of single chunks from real history.

    Baselines: `copy` repeats the last frame that was given (the start frame, for whole episodes); `autoencoder`
    decodes the encoded real frames, the ceiling of anything that this autoencoder shows. The flow's end-point error is
    in pixels a frame; `moving` is over pixels that really move by more than half a pixel a frame.

    Returns:
        The means, and the curves over time (T,) of `prophet`, `copy`, `autoencoder`, whole frame and `moving` pixels.
    """
    count = len(real)
    copied = np.repeat(real[:, :1], real.shape[1], axis=1)
    ceiling = _reconstruct(pipeline, arrays, real)
    curves: dict[str, NDArray[np.float64]] = {}
    report: dict[str, float] = {"episodes": float(count), "frames": float(real.shape[1])}
    for name, video in (("prophet", imagined), ("copy", copied), ("autoencoder", ceiling)):
        curves[name] = _one_by_one(psnr, video, real)[:, 1:].clamp(max=60).mean(0).numpy()
        curves[f"{name} (moving pixels)"] = (
            _one_by_one(moving_psnr, video, real)[:, 1:].clamp(max=60).nanmean(0).numpy()
        )
        report[f"episode_psnr_{name}"] = float(curves[name].mean())
        report[f"episode_moving_psnr_{name}"] = float(np.nanmean(curves[f"{name} (moving pixels)"]))
        report[f"final_psnr_{name}"] = float(curves[name][-1])
        report[f"moving_psnr_frame_20_{name}"] = float(curves[f"{name} (moving pixels)"][:20][-1])
        report[f"episode_ssim_{name}"] = float(_one_by_one(ssim, video, real)[:, 1:].mean())
        report[f"episode_tssim_{name}"] = float(_one_by_one(temporal_ssim, video, real).mean())

    flows = [(optical_flow(video), optical_flow(truth)) for video, truth in zip(imagined, real, strict=True)]
    report["episode_epe_prophet"] = float(np.mean([end_point_error(*pair) for pair in flows]))
    report["episode_epe_still"] = float(np.mean([end_point_error(0 * truth, truth) for _, truth in flows]))
    report["episode_moving_epe_prophet"] = _moving_epe([video for video, _ in flows], [truth for _, truth in flows])
    report["episode_moving_epe_still"] = _moving_epe([0 * truth for _, truth in flows], [truth for _, truth in flows])
    report["episode_flow_cosine_prophet"] = float(np.nanmean([flow_cosine(*pair) for pair in flows]))

    chunks = _next_chunks(pipeline, arrays, count, real.shape[1], seed)
    frames = pipeline.chunk_frames
    present = real[:, :-1:frames][:, :, None]  # (count, N, 1, H, W, 3)
    target = np.concatenate([present, real[:, 1:].reshape(count, -1, frames, *real.shape[2:])], axis=2)
    ceiling = np.concatenate([present, ceiling[:, 1:].reshape(count, -1, frames, *real.shape[2:])], axis=2)
    for name, video in (
        ("prophet", np.concatenate([present, chunks], axis=2)),
        ("copy", np.repeat(present, frames + 1, axis=2)),
        ("autoencoder", ceiling),
    ):
        report[f"next_chunk_psnr_{name}"] = float(_one_by_one(psnr, video, target)[..., 1:].clamp(max=60).mean())
        report[f"next_chunk_moving_psnr_{name}"] = float(
            _one_by_one(moving_psnr, video, target)[..., 1:].clamp(max=60).nanmean()
        )
        report[f"next_chunk_ssim_{name}"] = float(_one_by_one(ssim, video, target)[..., 1:].mean())
        report[f"next_chunk_tssim_{name}"] = float(_one_by_one(temporal_ssim, video, target).mean())
    return report, curves


def _moving_epe(imagined: list[NDArray[np.float32]], real: list[NDArray[np.float32]]) -> float:
    """End-point error, pixels a frame, over the pixels whose real flow exceeds half a pixel a frame."""
    errors = []
    for video, truth in zip(imagined, real, strict=True):
        moving = np.linalg.norm(truth, axis=-1) > 0.5
        errors.append(np.linalg.norm(video - truth, axis=-1)[moving])
    return float(np.concatenate(errors).mean())


def _proprio_report(estimated: torch.Tensor, true: torch.Tensor, num_arms: int) -> dict[str, float]:
    """Errors of the end-effectors' estimated poses (N, T, P) of a robot's arms, without those that it lacks: means over
    whole episodes, and at their ends."""
    estimated, true = (per_arm(poses[..., : PROPRIO_DIM * num_arms], num_arms) for poses in (estimated, true))
    distance = 100 * (estimated - true)[..., :3].norm(dim=-1).double()  # cm
    turned = Rotation.from_rotvec(estimated[..., 3:6].reshape(-1, 3).numpy()).inv() * Rotation.from_rotvec(
        true[..., 3:6].reshape(-1, 3).numpy()
    )
    angle = torch.from_numpy(np.degrees(turned.magnitude())).reshape(distance.shape)
    return {
        "mean_cm": float(distance.mean()),
        "end_cm": float(distance[:, -1].mean()),
        "end_median_cm": float(distance[:, -1].median()),
        "mean_degrees": float(angle.mean()),
        "end_degrees": float(angle[:, -1].mean()),
    }


def actions_report(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, real: NDArray[np.uint8], imagined: NDArray[np.uint8], seed: int
) -> dict[str, float]:
    """Does the video depend on the actions? PSNR (dB) against the real video, over whole episodes, of what is imagined
    from the episode's own actions, from those of another episode, and from none (the arm is told to stay)."""
    count = min(COUNTERFACTUAL_EPISODES, len(real))
    rows = frame_rows(arrays, torch.arange(len(real)), pipeline.chunk_frames)[:count]
    own = arrays.actions[rows[:, :-1]].flatten(1, 2)
    stay = torch.zeros_like(own)
    stay[..., GRIPPERS] = -1.0
    report = {"episodes": float(count)}
    for name, actions in (("own", None), ("swapped", own.roll(1, dims=0)), ("none", stay)):
        video = imagined[:count]
        if actions is not None:
            video = pipeline.replay(
                arrays.first_frames[:count],
                arrays.proprio[rows[:, 0]],
                actions,
                arrays.suites[:count],
                [torch.Generator().manual_seed(one) for one in episode_seeds(torch.arange(count), seed)],
                # As the own ones, see `replay_episodes`.
                member=episode_folds(arrays, pipeline.num_members)[:count],
                rehearsed=arrays.rehearsed[:count],
            )[0].numpy()
        report[f"psnr_{name}"] = float(_one_by_one(psnr, video, real[:count])[:, 1:].clamp(max=60).mean())
    return report


def _verdicts(
    judge: RewardModel,
    arrays: EpisodeArrays,
    real: tuple[NDArray[np.uint8], torch.Tensor],
    imagined: tuple[NDArray[np.uint8], torch.Tensor],
    chunk_frames: int,
    datasets: Sequence[EpisodeDataset],
) -> Verdicts:
    """All verdicts on the episodes of `arrays`; the control is trained on the training split of `datasets`.

    Args:
        real, imagined: frames (N, T + 1, H, W, 3) and proprioception (N, T + 1, P).
    """
    ends = frame_rows(arrays, torch.arange(len(arrays.records)), chunk_frames)[:, chunk_frames::chunk_frames]
    training = load_arrays(datasets, "train", video=False, progress=False)  # actions of the arms that there are
    control = predict_from_actions(
        training, replace(arrays, actions=arrays.actions[..., : training.actions.shape[2]]), chunk_frames
    )
    solved = arrays.success[ends].numpy()
    imagined_frames = _judge(judge, arrays, *imagined, chunk_frames)
    threshold = thresholds(judge, arrays.suites)
    return Verdicts(
        kind=np.array([record.kind for record in arrays.records]),
        solved=solved,
        real_frames=_judge(judge, arrays, *real, chunk_frames),
        imagined_frames=imagined_frames,
        actions_only=control,
        threshold=threshold,
        balanced_threshold=thresholds(judge, arrays.suites, threshold="balanced"),
        strict_threshold=np.full_like(threshold, as_strict(control, imagined_frames, threshold, solved)),
    )


def _judge(
    judge: RewardModel, arrays: EpisodeArrays, clips: NDArray[np.uint8], proprio: torch.Tensor, chunk_frames: int
) -> NDArray[np.float64]:
    """Probability at the end of each chunk, per clip (N, T + 1, H, W, 3) and proprioception (N, T + 1, P): (N, C)."""
    told = arrays.instructions, embed_instructions(arrays.instructions), arrays.first_frames.numpy(), arrays.suites
    poses = proprio.numpy()
    scores = [
        judge.score(clips[:, :length], poses[:, :length], np.full(len(clips), length), *told)
        for length in range(chunk_frames + 1, clips.shape[1] + 1, chunk_frames)
    ]
    return np.stack(scores, axis=1).astype(np.float64)


@torch.inference_mode()
def _reconstruct(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, real: NDArray[np.uint8], batch_size: int = 4
) -> NDArray[np.uint8]:
    """The clips (N, T + 1, H, W, 3), encoded and decoded: the best that this autoencoder can show."""
    projections = pipeline.projection(arrays.suites[: len(real)])
    holds, index = track_holds(arrays), arrays.starts[: len(real), None] + torch.arange(real.shape[1])
    latest = (torch.arange(real.shape[1]) - 1).clamp(min=0)
    latest -= latest % pipeline.chunk_frames  # the frame that each chunk began from
    clips = []
    for rows in torch.arange(len(real)).split(batch_size):
        pixels = frames_to_pixels(torch.from_numpy(real)[rows]).to(pipeline.device)
        poses = arrays.proprio[index[rows]]
        drawn = draw_action_frames(poses, projections[rows], pipeline.image_size).to(pipeline.device)
        motion = hand_motions(
            arrays,
            holds,
            index[rows][:, latest].flatten(),
            index[rows].flatten(),
            projections[rows].repeat_interleave(len(latest), dim=0),
        ).to(pipeline.device)
        shown = torch.stack([pixels[:, latest], pixels[:, :1].expand_as(pixels)], dim=2)
        carried = carry(shown.flatten(0, 1), motion[:, None])[:, 0].unflatten(0, pixels.shape[:2])
        clips.append(pixels_to_frames(pipeline.vae(pixels, pixels[:, 0], carried, drawn)).cpu())
    return torch.cat(clips).numpy()


def _next_chunks(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, count: int, length: int, seed: int
) -> NDArray[np.uint8]:
    """Imagine every chunk of every episode from real history: uint8 (count, N, chunk_frames, H, W, 3)."""
    frames = pipeline.chunk_frames
    present = arrays.starts[:count, None] + torch.arange(0, length - 1, frames)  # (count, N)
    past = torch.arange(2 - pipeline.transformer.buffer_frames, 1)
    states = _observed_states(pipeline, arrays, count, length)[:, :-1:frames]
    chunks = []
    for start, rows, record, state in zip(arrays.starts[:count], present, arrays.records[:count], states, strict=True):
        recent = (rows[:, None] + past).clamp(min=int(start))  # (N, T_h - 1)
        index = torch.cat([start.expand(len(rows), 1), recent], dim=1)
        shown = arrays.frames[start : int(rows[-1]) + 1]
        history = pipeline.init_history(shown)[:, -1][index - start]
        actions = arrays.actions[rows[:, None] + torch.arange(frames)].flatten(1, 2)
        generator = [torch.Generator().manual_seed(noise_seed) for noise_seed in episode_seeds(rows, seed)]
        images = arrays.frames[torch.stack([start.expand(len(rows)), rows], dim=1)]
        chunk = pipeline.imagine(history, state, actions, images, [record.suite] * len(rows), generator)
        chunks.append(chunk.frames)
    return torch.stack(chunks).numpy()


@torch.inference_mode()
def _observed_states(pipeline: ProphetPipeline, arrays: EpisodeArrays, count: int, length: int) -> torch.Tensor:
    """Prophet's state at every frame of an episode whose true proprioception it sees: float32 (count, length, S)."""
    index = arrays.starts[:count, None] + torch.arange(length)
    proprio, actions = arrays.proprio[index].to(pipeline.device), arrays.actions[index].to(pipeline.device)
    suites = arrays.suites[:count]
    projection, robot = pipeline.projection(suites).to(pipeline.device), pipeline.robot(suites).to(pipeline.device)
    start = frames_to_pixels(arrays.first_frames[:count]).to(pipeline.device)
    members = episode_folds(arrays, pipeline.num_members)[:count].to(pipeline.device)
    rehearsed = arrays.rehearsed[:count].to(pipeline.device)
    bodies = [pipeline.proprioception.init_state(proprio[:, 0], members, rehearsed)]
    for frame in range(1, length):
        body = pipeline.proprioception(bodies[-1], actions[:, frame - 1], start, projection, robot)
        bodies.append(torch.cat([proprio[:, frame], body[:, proprio.shape[2] :]], dim=1))
    return torch.cat([torch.stack(bodies, dim=1), track_holds(arrays)[index].to(pipeline.device)], dim=2)


def _one_by_one(
    metric: Callable[[NDArray[np.uint8], NDArray[np.uint8]], torch.Tensor],
    imagined: NDArray[np.uint8],
    real: NDArray[np.uint8],
) -> torch.Tensor:
    """A metric of many videos, one at a time: in float64 a batch needs buffers that are too large to be reused."""
    return torch.cat([metric(imagined[k : k + 1], real[k : k + 1]) for k in range(len(real))])
