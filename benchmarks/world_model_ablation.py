"""Prophet's choices against each other at equal training steps: history, action streams, measures against drift.

    python benchmarks/world_model_ablation.py data/libero_object --out runs/world-model-ablation

Every variant trains a small transformer of its own (64 channels, 2 layers), together with the decoder, between the
encoder and the proprioception of one checkpoint, from the same seed on the same training episodes, and imagines the
same validation episodes open loop. "all" has everything: FramePack memory, both action streams, rollouts that go on
from their own past, a decoder that learns with them. The others are without something, or have something in its place.
Numbers are comparable within the table only: the models are small and trained briefly. "scalars only" is data without a
camera: nothing is drawn, nothing is carried, and the proprioception, which was trained with a camera, misses it too.

Writes results.json (one entry as soon as it is there; a variant that was finished with the same settings is not
repeated), ablation.png and the table, with 95% bootstrap intervals of the difference from "all", paired by episode.
"""

import argparse
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from prophet_gym.data.clips import EpisodeArrays, load_arrays, subset
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.data.lerobot_format.schema import write_json
from prophet_gym.envs.models import load_world_model
from prophet_gym.evaluation.video_metrics import moving_psnr, psnr
from prophet_gym.run_folder import weights_checksum
from prophet_gym.training import fit
from prophet_gym.world_model import ProphetPipeline, ProphetTransformer3DModel
from prophet_gym.world_model.imagination import encode_frames, episode_seeds, frame_rows, replay_episodes
from prophet_gym.world_model.training import MEMORY
from prophet_gym.world_model.video_rollouts import VideoModels, VideoRolloutLoss

SMALL = {"conv_channels": 64, "conv_blocks": (1, 2), "num_attention_heads": 3, "num_layers": 2, "adaln_lora_dim": 16}
BATCH_SIZE = 16
LEARNING_RATE = 1e-3

ALL: dict[str, Any] = {
    "history_frames": 3,
    "memory": MEMORY,
    "action_streams": "both",
    "decoder": True,
    "loss": {},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "history: latest frame only": {"history_frames": 2, "memory": ()},
    "history: two latest frames": {"memory": ()},
    "actions: scalars only": {"action_streams": "scalars"},
    "actions: frames only": {"action_streams": "frames"},
    "no own history": {"loss": {"told": 1.0}},
    "noise for own history": {"loss": {"told": 1.0, "history_noise": 0.3}},
    "decoder as it is": {"decoder": False},
}

Scores = dict[str, NDArray[np.float64]]


def settings(name: str) -> dict[str, Any]:
    """All choices of a variant."""
    return ALL | VARIANTS[name]


def train_variant(
    base: ProphetPipeline, choices: dict[str, Any], arrays: EpisodeArrays, latents: torch.Tensor, out: Path, steps: int
) -> ProphetPipeline:
    """A pipeline with a transformer and a decoder of its own, trained for `steps` steps; resumes after a kill."""
    torch.manual_seed(0)
    transformer = ProphetTransformer3DModel(
        history_frames=choices["history_frames"],
        memory=choices["memory"],
        condition_dim=base.proprioception.condition_dim,
        num_arms=base.num_arms,
        **SMALL,
    )
    pipeline = copy.copy(base)
    vae = copy.deepcopy(base.vae).requires_grad_(choices["decoder"])
    pipeline.register_modules(transformer=transformer, vae=vae)
    pipeline.register_to_config(action_streams=choices["action_streams"])
    loss_fn = VideoRolloutLoss(pipeline, arrays, latents, BATCH_SIZE, steps, **choices["loss"])
    models = VideoModels.of(pipeline)
    fit("rollouts", models, loss_fn, out, steps=steps, learning_rate=LEARNING_RATE, seed=0)
    return pipeline


@torch.inference_mode()
def measure(pipeline: ProphetPipeline, arrays: EpisodeArrays) -> Scores:
    """`video_scores` of every validation episode, imagined open loop."""
    chosen = torch.arange(len(arrays.starts))
    imagined, _ = replay_episodes(pipeline, arrays, chosen, episode_seeds(chosen, 0))
    return video_scores(imagined, arrays.frames[frame_rows(arrays, chosen, pipeline.chunk_frames)])


def video_scores(imagined: torch.Tensor, real: torch.Tensor) -> Scores:
    """PSNR of videos uint8 (N, T + 1, H, W, 3), dB, 60 for equal frames: (N,) each; `drift`, by frame, is (N, T)."""
    frames = psnr(imagined[:, 1:].numpy(), real[:, 1:].numpy()).clamp(max=60).numpy()
    moving = moving_psnr(imagined.numpy(), real.numpy()).clamp(max=60).numpy()
    return {
        "episode": frames.mean(1),
        "frame 2": frames[:, 1],
        "frame 20": frames[:, :20][:, -1],  # or the last one of a shorter clip
        "last frame": frames[:, -1],
        "moving pixels": np.nanmean(moving, axis=1),
        "drift": frames,
    }


def difference(scores: NDArray[np.float64], reference: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of the paired difference and its 95% bootstrap interval over episodes."""
    change = scores - reference
    rng = np.random.default_rng(0)
    means = change[rng.integers(len(change), size=(2000, len(change)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(change.mean()), float(low), float(high)


def show(results: dict[str, Scores], out: Path) -> None:
    """Print the table and draw the drift curves."""
    table = Table(title="PSNR over validation episodes, open loop (dB)")
    for column in ("variant", "episode", "against all [95%]", "moving pixels", "frame 2", "frame 20", "last frame"):
        table.add_column(column)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, scores in results.items():
        mean, low, high = difference(scores["episode"], results["all"]["episode"])
        table.add_row(
            name,
            f"{scores['episode'].mean():.2f}",
            "" if name == "all" else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
            *(f"{np.nanmean(scores[key]):.2f}" for key in ("moving pixels", "frame 2", "frame 20", "last frame")),
        )
        axes.plot(np.arange(1, scores["drift"].shape[1] + 1), scores["drift"].mean(0), label=name)
    axes.set(xlabel="frame (0.2 s)", ylabel="PSNR (dB)", title="Drift, mean over validation episodes")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "ablation.png", dpi=120)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders written by `prophet record`")
    parser.add_argument("--checkpoint", default="prophet-libero-tiny", help="of autoencoder and proprioception")
    parser.add_argument("--names", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1200, help="of each variant")
    parser.add_argument("--episodes", type=int, default=400, help="at most this many training episodes")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    datasets = [EpisodeDataset(path) for path in arguments.data]
    base = load_world_model(arguments.checkpoint, "cpu")
    arrays = subset(load_arrays(datasets, "train", num_arms=base.num_arms), arguments.episodes, seed=0)
    validation = load_arrays(datasets, "val", num_arms=base.num_arms)
    latents = encode_frames(base.vae, arrays.frames)
    common = {
        "checkpoint": weights_checksum(base.vae, base.transformer, base.proprioception),
        "episodes": [arrays.checksum(), validation.checksum()],
        "training": [SMALL, BATCH_SIZE, LEARNING_RATE, arguments.steps],
    }
    results: dict[str, Scores] = {}
    for name in dict.fromkeys(["all", *arguments.names]):
        key = json.dumps(common | {"settings": settings(name)}, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        if digest not in kept:
            pipeline = train_variant(base, settings(name), arrays, latents, out / digest, arguments.steps)
            scores = {metric: values.tolist() for metric, values in measure(pipeline, validation).items()}
            kept[digest] = {"name": name, "key": json.loads(key), "scores": scores}
            write_json(file, kept)
        results[name] = {metric: np.array(values) for metric, values in kept[digest]["scores"].items()}
    show(results, out)


if __name__ == "__main__":
    main()
