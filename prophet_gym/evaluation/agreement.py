"""Prophet against the real simulator: recorded episodes replayed in imagination, compared by frames and by outcomes."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from prophet_gym.data.clips import EpisodeArrays, load_arrays
from prophet_gym.data.instructions import embed_instructions
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.envs.models import resolve_models
from prophet_gym.evaluation.video_metrics import moving_psnr, psnr, ssim, temporal_ssim
from prophet_gym.reward.base import RewardModel
from prophet_gym.reward.training import episode_metrics, episode_peaks
from prophet_gym.world_model.action_conditioning import draw_action_frames
from prophet_gym.world_model.imagination import episode_seeds, frame_rows, replay_episodes
from prophet_gym.world_model.pipeline import ProphetPipeline, frames_to_pixels, pixels_to_frames

logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: str | ProphetPipeline,
    data: Sequence[str | os.PathLike[str]],
    report: str | os.PathLike[str],
    *,
    reward_model: str | RewardModel = "reward-libero",
    split: str = "val",
    episodes: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a world model and a reward model on recorded episodes that neither was trained on.

    Writes `results.json`, `drift.png` and `contact_sheet_*.png` (real above imagined) to `report`.

    Args:
        checkpoint: a pipeline, its folder, or the name of a shipped one.
        data: folders written by `prophet record`. The actions-only control is trained on their training split.
        report: folder of the report; made if needed.
        reward_model: a reward model, its folder, or the name of a shipped one.
        split: "val" or "test". episodes: at most this many of each data set. seed: of the world model's noise.

    Returns:
        The content of `results.json`, one entry per data set: `video` (dB and SSIM, see `video_report`), `proprio_cm`,
        `outcome` (see `outcome_report`).

    Raises:
        ValueError: the split is "train": no number is reported on data that a model was trained on.
        TypeError: the checkpoint is not a `ProphetPipeline`.
    """
    if split == "train":
        raise ValueError('Expected split "val" or "test": the models were trained on "train".')
    pipeline, judge = resolve_models(checkpoint, reward_model, "auto", "auto")
    if not isinstance(pipeline, ProphetPipeline):
        raise TypeError(f"Expected a ProphetPipeline, its folder or name, got {type(pipeline).__name__}.")
    report = Path(report)
    report.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for path in data:
        dataset = EpisodeDataset(path)
        arrays = load_arrays(dataset, split)
        control = load_actions(dataset, "train", pipeline.chunk_frames)
        name = arrays.records[0].suite
        count = len(arrays.records) if episodes is None else min(episodes, len(arrays.records))
        chosen = torch.arange(count)
        rows = frame_rows(arrays, chosen, pipeline.chunk_frames)
        clips, estimates = replay_episodes(pipeline, arrays, chosen, episode_seeds(chosen, seed))
        real, imagined = arrays.frames[rows].numpy(), clips.numpy()
        true = arrays.proprio[rows[:, pipeline.chunk_frames :: pipeline.chunk_frames]]
        proprio_error = 100 * (estimates - true)[..., :3].norm(dim=-1).double()  # cm, at the end of each chunk
        video, curves = video_report(pipeline, arrays, real, imagined, count, seed)
        results[name] = {
            "split": split,
            "video": video,
            "proprio_cm": {"mean_end": float(proprio_error[:, -1].mean()), "mean": float(proprio_error.mean())},
            "outcome": outcome_report(judge, arrays, real, imagined, pipeline.chunk_frames, control),
        }
        _draw_curves(curves, report / f"drift_{name}.png", name)
        _draw_contact_sheet(real, imagined, report / f"contact_sheet_{name}.png")
        logger.info("%s: %s", name, json.dumps(results[name], indent=1))
    temporary = report / ".results.tmp"
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, report / "results.json")
    return results


def video_report(
    pipeline: ProphetPipeline,
    arrays: EpisodeArrays,
    real: NDArray[np.uint8],
    imagined: NDArray[np.uint8],
    count: int,
    seed: int,
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """PSNR (dB), SSIM and tSSIM of whole imagined episodes and of single chunks from real history.

    Baselines: `copy` repeats the last frame that was given (the start frame, for whole episodes); `autoencoder`
    decodes the encoded real frames, the ceiling of anything that this autoencoder shows.

    Returns:
        The means, and the curves over time (T,) of `prophet`, `copy`, `autoencoder`, whole frame and `moving` pixels.
    """
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
        report[f"episode_ssim_{name}"] = float(_one_by_one(ssim, video, real)[:, 1:].mean())
        report[f"episode_tssim_{name}"] = float(_one_by_one(temporal_ssim, video, real).mean())

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


def outcome_report(
    judge: RewardModel,
    arrays: EpisodeArrays,
    real: NDArray[np.uint8],
    imagined: NDArray[np.uint8],
    chunk_frames: int,
    control: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, dict[str, float]]:
    """How often the judged outcome agrees with the real one: on the real video, on the imagined one, from actions
    alone.

    An episode is solved when the simulator (or the judge, past its threshold) says so at the end of any chunk: that
    is when an environment would have ended it.

    Args:
        real, imagined: clips (N, T + 1, H, W, 3) of the first N episodes of `arrays`.
        chunk_frames: frames of a chunk.
        control: actions (E, D) and outcomes (E,) of training episodes, see `load_actions`.

    Returns:
        `episode_metrics` of `real_frames`, `imagined_frames` and `actions_only`.
    """
    first = _first_episodes(arrays, len(real))
    _, solved = episode_peaks(first, torch.zeros(len(first.frames)), chunk_frames)
    report = {
        name: episode_metrics(_judge(judge, first, clips, chunk_frames), solved, judge.threshold)
        for name, clips in (("real_frames", real), ("imagined_frames", imagined))
    }
    probability = _predict_from_actions(control, _action_features(first))
    report["actions_only"] = episode_metrics(probability, solved, 0.5)
    return report


def load_actions(dataset: EpisodeDataset, split: str, chunk_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the actions (E, D) and outcomes (E,) of a split, for the control that sees nothing else."""
    arrays = load_arrays(dataset, split, progress=False)
    _, solved = episode_peaks(arrays, torch.zeros(len(arrays.frames)), chunk_frames)
    return _action_features(arrays), torch.from_numpy(solved)


def _action_features(arrays: EpisodeArrays) -> torch.Tensor:
    """Mean action of every video step, and the task: float (E, T * 7 + 10)."""
    length = int(arrays.lengths.min())
    index = arrays.starts[:, None] + torch.arange(length - 1)
    tasks = F.one_hot(torch.tensor([record.task for record in arrays.records]), 10).float()
    return torch.cat([arrays.actions[index].mean(2).flatten(1), tasks], dim=1)


def _predict_from_actions(control: tuple[torch.Tensor, torch.Tensor], features: torch.Tensor) -> NDArray[np.float64]:
    """Fit a small network to (actions, outcome) of the training episodes; probabilities for `features`, float (E,)."""
    inputs, outcomes = control
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(400):
            loss = F.binary_cross_entropy_with_logits(network(inputs)[:, 0], outcomes.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        return torch.sigmoid(network.eval()(features)[:, 0]).double().numpy()


def _judge(
    judge: RewardModel, arrays: EpisodeArrays, clips: NDArray[np.uint8], chunk_frames: int
) -> NDArray[np.float64]:
    """Highest probability at the end of any chunk, per clip (N, T + 1, H, W, 3): float (N,)."""
    instructions = [record.instruction for record in arrays.records]
    embeddings = embed_instructions(instructions)
    scores = [
        judge.score(clips[:, : end + 1], np.full(len(clips), end + 1), instructions, embeddings)
        for end in range(chunk_frames, clips.shape[1], chunk_frames)
    ]
    return np.max(scores, axis=0).astype(np.float64)


def _first_episodes(arrays: EpisodeArrays, count: int) -> EpisodeArrays:
    rows = int(arrays.lengths[:count].sum())
    return EpisodeArrays(
        frames=arrays.frames[:rows],
        proprio=arrays.proprio[:rows],
        actions=arrays.actions[:rows],
        success=arrays.success[:rows],
        starts=arrays.starts[:count],
        lengths=arrays.lengths[:count],
        records=arrays.records[:count],
    )


@torch.inference_mode()
def _reconstruct(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, real: NDArray[np.uint8], batch_size: int = 4
) -> NDArray[np.uint8]:
    """The clips (N, T + 1, H, W, 3), encoded and decoded: the best that this autoencoder can show."""
    projections = pipeline.projection([record.suite for record in arrays.records[: len(real)]])
    poses = arrays.proprio[arrays.starts[: len(real), None] + torch.arange(real.shape[1])]
    clips = []
    for rows in torch.arange(len(real)).split(batch_size):
        pixels = frames_to_pixels(torch.from_numpy(real)[rows]).to(pipeline.device)
        drawn = draw_action_frames(poses[rows], projections[rows], pipeline.image_size).to(pipeline.device)
        clips.append(pixels_to_frames(pipeline.vae(pixels, pixels[:, 0], action_frames=drawn)).cpu())
    return torch.cat(clips).numpy()


def _next_chunks(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, count: int, length: int, seed: int
) -> NDArray[np.uint8]:
    """Imagine every chunk of every episode from real history: uint8 (count, N, chunk_frames, H, W, 3)."""
    frames = pipeline.chunk_frames
    present = arrays.starts[:count, None] + torch.arange(0, length - 1, frames)  # (count, N)
    past = torch.arange(2 - pipeline.transformer.config.history_frames, 1)
    states = _observed_states(pipeline, arrays, count, length)[:, :-1:frames]
    chunks = []
    for start, rows, record, state in zip(arrays.starts[:count], present, arrays.records[:count], states, strict=True):
        recent = (rows[:, None] + past).clamp(min=int(start))  # (N, T_h - 1)
        index = torch.cat([start.expand(len(rows), 1), recent], dim=1)
        shown = arrays.frames[index]
        history = pipeline.init_history(shown.flatten(0, 1))[:, -1].unflatten(0, index.shape)
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
    projection = pipeline.projection([record.suite for record in arrays.records[:count]]).to(pipeline.device)
    start = frames_to_pixels(arrays.frames[index[:, 0]]).to(pipeline.device)
    states = [pipeline.init_state(proprio[:, 0])]
    for frame in range(1, length):
        latest = frames_to_pixels(arrays.frames[index[:, frame - 1]]).to(pipeline.device)
        state = pipeline.proprioception(states[-1], actions[:, frame - 1], start, latest, projection)
        states.append(torch.cat([proprio[:, frame], state[:, proprio.shape[2] :]], dim=1))
    return torch.stack(states, dim=1)


def _one_by_one(
    metric: Callable[[NDArray[np.uint8], NDArray[np.uint8]], torch.Tensor],
    imagined: NDArray[np.uint8],
    real: NDArray[np.uint8],
) -> torch.Tensor:
    """A metric of many videos, one at a time: in float64 a batch needs buffers that are too large to be reused."""
    return torch.cat([metric(imagined[k : k + 1], real[k : k + 1]) for k in range(len(real))])


def _draw_curves(curves: dict[str, NDArray[np.float64]], path: Path, title: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for index, (name, curve) in enumerate(curves.items()):
        style = "--" if "moving" in name else "-"
        axes.plot(np.arange(1, len(curve) + 1), curve, style, color=f"C{index // 2}", label=name)
    axes.set(xlabel="frames after the start (5 Hz)", ylabel="PSNR (dB)", title=f"{title}: own frames fed back")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_contact_sheet(real: NDArray[np.uint8], imagined: NDArray[np.uint8], path: Path, rows: int = 6) -> None:
    """Eleven moments of each of `rows` episodes spread over the set, real above imagined."""
    moments = np.linspace(0, real.shape[1] - 1, 11).astype(int)
    chosen = np.linspace(0, len(real) - 1, min(rows, len(real))).astype(int)
    strips = []
    for index in chosen:
        strips += [np.concatenate(list(video[index, moments]), axis=1) for video in (real, imagined)]
        strips.append(np.full((6, strips[-1].shape[1], 3), 255, np.uint8))
    iio.imwrite(path, np.concatenate(strips))
