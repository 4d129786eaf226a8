"""A suite that Prophet has not seen, from a few episodes: adapted from a checkpoint, and trained from scratch.

    python benchmarks/few_shot.py data/libero_goal --episodes 20 --out runs/few-shot

Both learn from the same training episodes, by `prophet adapt` and by `prophet train --preset brief`, which takes
as many steps and trains an autoencoder besides. The validation and test episodes, on which no choice is made, are then
imagined open loop. Writes results.json, few_shot.png (real, adapted, scratch) and the table, with 95% bootstrap
intervals of the difference from scratch, paired by episode. A run that was killed resumes.
"""

import argparse
import copy
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from world_model_ablation import Scores, difference, video_scores

from prophet_gym.data.camera import camera_projections
from prophet_gym.data.clips import EpisodeArrays, concatenate, load_arrays, subset
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.data.lerobot_format.schema import write_json
from prophet_gym.envs.models import load_world_model
from prophet_gym.world_model import ProphetPipeline
from prophet_gym.world_model.adaptation import adapt
from prophet_gym.world_model.imagination import episode_seeds, frame_rows, replay_episodes
from prophet_gym.world_model.training import train

METRICS = ("episode", "last frame", "moving pixels", "end-effector (cm)", "at the end (cm)")


@torch.inference_mode()
def imagine(pipeline: ProphetPipeline, arrays: EpisodeArrays) -> tuple[torch.Tensor, Scores]:
    """The episodes open loop, uint8 (N, T + 1, H, W, 3), and their scores, with the end-effector's error in cm."""
    chosen = torch.arange(len(arrays.starts))
    rows = frame_rows(arrays, chosen, pipeline.chunk_frames)
    imagined, proprio = replay_episodes(pipeline, arrays, chosen, episode_seeds(chosen, 0))
    arms = (proprio - arrays.proprio[rows])[:, 1:].unflatten(2, (pipeline.num_arms, -1))
    own = arms[:, :, : pipeline.arms(arrays.records[0].suite), :3]
    error = 100 * own.norm(dim=-1).mean(2).numpy()
    scores = video_scores(imagined, arrays.frames[rows])
    return imagined, scores | {"end-effector (cm)": error.mean(1), "at the end (cm)": error[:, -1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders written by `prophet record`, of the new suite alone")
    parser.add_argument("--checkpoint", default="prophet-libero-tiny", help="to adapt from")
    parser.add_argument("--episodes", type=int, default=20, help="training episodes")
    parser.add_argument("--recipe", default="adapt", help="of the adaptation")
    parser.add_argument("--preset", default="brief", help="of the training from scratch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    datasets = [EpisodeDataset(path) for path in arguments.data]
    cameras = camera_projections(datasets)
    base = load_world_model(arguments.checkpoint, "cpu")
    train_arrays, validation, test = (
        load_arrays(datasets, split, num_arms=base.num_arms) for split in ("train", "val", "test")
    )
    episodes = subset(train_arrays, arguments.episodes, arguments.seed)
    held_out = concatenate([validation, test])

    unadapted = copy.copy(base)
    unadapted.register_to_config(cameras=base.config.cameras | cameras)
    pipelines = {
        "scratch": train(
            episodes, validation, out / "scratch", preset=arguments.preset, seed=arguments.seed, cameras=cameras
        ),
        "adapted": adapt(
            copy.deepcopy(base),
            episodes,
            validation,
            out / "adapted",
            recipe=arguments.recipe,
            seed=arguments.seed,
            cameras=cameras,
        ),
        "not adapted": unadapted,
    }
    real = held_out.frames[frame_rows(held_out, torch.arange(len(held_out.starts)), base.chunk_frames)]
    results = {"copy of the first frame": video_scores(real[:, :1].expand_as(real), real)}
    videos = {}
    for name, pipeline in pipelines.items():
        videos[name], results[name] = imagine(pipeline, held_out)

    table = Table(title=f"{len(real)} episodes, open loop: PSNR (dB), mean (standard deviation over episodes)")
    for column in ("", *METRICS, "against scratch [95%]"):
        table.add_column(column)
    for name, scores in results.items():
        mean, low, high = difference(scores["episode"], results["scratch"]["episode"])
        cells = [f"{scores[key].mean():.2f} ({scores[key].std():.2f})" if key in scores else "" for key in METRICS]
        table.add_row(name, *cells, "" if name == "scratch" else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
    Console(width=150).print(table)

    shown, moments = np.linspace(0, len(real) - 1, 4).astype(int), np.linspace(4, real.shape[1] - 1, 6).astype(int)
    strips = [video[k, moments] for k in shown for video in (real, videos["adapted"], videos["scratch"])]
    iio.imwrite(out / "few_shot.png", np.concatenate([np.concatenate(list(strip), axis=1) for strip in strips]))
    kept = {name: {key: values.tolist() for key, values in scores.items()} for name, scores in results.items()}
    write_json(out / "results.json", {"arguments": vars(arguments), "scores": kept})


if __name__ == "__main__":
    main()
