"""Few-shot adaptation: a trained Prophet learns a new suite or robot from a few episodes."""

import copy
import os
from pathlib import Path
from typing import Any

import torch

from prophet_gym.data.clips import EpisodeArrays
from prophet_gym.run_folder import weights_checksum
from prophet_gym.world_model.imagination import has_chunk
from prophet_gym.world_model.lora import check_lora
from prophet_gym.world_model.pipeline import ProphetPipeline
from prophet_gym.world_model.training import (
    MEMORY,
    check_shapes,
    check_validation,
    finished_pipeline,
    fit_autoencoder,
    fit_proprioception,
    fit_video,
    save_pipeline,
    set_robots,
)
from prophet_gym.world_model.transformer import with_memory

RECIPES: dict[str, dict[str, Any]] = {
    # A few episodes: a quarter of an hour on one core. They are too few to tell how far to go: the motion ends half-way
    # between what it was and what it has become, see `adapt`.
    "adapt": {
        "halfway": True,
        "proprioception": {"steps": 1500, "batch_size": 128, "learning_rate": 1e-3},
        "rollouts": {"steps": 500, "batch_size": 16, "learning_rate": 5e-4},
    },
    # Many episodes, of all robots that the pipeline shall know, old and new: the encoder learns too, because one that
    # has seen a single robot has no room for another's looks. A transformer without a memory gets one.
    "extend": {
        "memory": MEMORY,
        "proprioception": {"steps": 17_500, "batch_size": 128, "learning_rate": 2e-3},
        "autoencoder": {"steps": 3000, "batch_size": 32, "learning_rate": 1.5e-3},
        "rollouts": {"steps": 3000, "batch_size": 16, "learning_rate": 7e-4},
    },
    # The proprioception alone and anew, from many episodes, old and new, of all robots that the pipeline knows; they
    # need no video. Models that went on from the old weights did worse on others, or no better (docs/experiments.md).
    "motion": {"anew": True, "proprioception": {"steps": 30_000, "batch_size": 128, "learning_rate": 2e-3}},
    # The proprioception alone, going on from what it was, from hundreds of episodes of a suite, rehearsed ones among
    # them. Not further: four times the steps learn these by heart (docs/experiments.md, "A suite it has never seen").
    "refine": {"proprioception": {"steps": 1500, "batch_size": 128, "learning_rate": 1e-3}},
    # The video alone, from many episodes, old and new: an autoencoder that has seen more, and transformer and decoder
    # together on their own rollouts. For a GPU.
    "video": {
        "autoencoder": {"steps": 11_000, "batch_size": 512, "learning_rate": 1.5e-3},
        "rollouts": {"steps": 14_000, "batch_size": 128, "learning_rate": 1e-3},
    },
    # Seconds, for tests.
    "debug": {
        "proprioception": {"steps": 20, "batch_size": 16, "learning_rate": 3e-3},
        "rollouts": {"steps": 40, "batch_size": 4, "learning_rate": 3e-3},
    },
}
"""Stages and their steps, as in `prophet_gym.world_model.training.PRESETS`. "anew": the proprioception begins with
random weights; "halfway": it ends half-way, see `adapt`; "memory": the levels that a transformer without one gets."""


def needs_video(recipe: str) -> bool:
    """Whether a recipe of `RECIPES` trains transformer and decoder, from episodes with video; or the motion alone."""
    return "rollouts" in RECIPES[recipe]


def check_recipe(recipe: str, lora_rank: int | None, num_members: int | None) -> None:
    """Raise what `adapt` raises of its recipe and of what does not go with it."""
    if recipe not in RECIPES:
        raise ValueError(f"Unknown recipe {recipe!r}; choose one of {sorted(RECIPES)}.")
    if lora_rank is not None:
        if not needs_video(recipe):
            raise ValueError(f"The recipe {recipe!r} has no use for adapters of the transformer: leave lora_rank out.")
        check_lora(lora_rank)
    if num_members is not None and not RECIPES[recipe].get("anew"):
        raise ValueError(f"The recipe {recipe!r} keeps the members of the proprioception: leave num_members out.")


def adapt(
    pipeline: ProphetPipeline,
    train_arrays: EpisodeArrays,
    val_arrays: EpisodeArrays,
    out: str | os.PathLike[str],
    *,
    recipe: str = "adapt",
    lora_rank: int | None = None,
    num_members: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    cameras: dict[str, list[list[float]]] | None = None,
) -> ProphetPipeline:
    """Go on training a pipeline on other episodes and save it to `out / pipeline`; run again after a kill to resume.

    The stages are those of `train` that the recipe has, and the statistics of known robots stay. The encoder stays too,
    for the transformer knows its latents, unless the recipe says otherwise. A new robot takes a free slot, where the
    proprioception learns. Where all robots are known, the recipe "adapt" takes the mean of the proprioception's old and
    adapted weights (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).
    It may run in several processes, as `train` may.

    Args:
        pipeline: what to begin from; changed in place. Its files stay as they are.
        train_arrays, val_arrays: frames, proprioception and actions of the two splits of the new episodes.
        out: folder for checkpoints, TensorBoard logs, sample videos and the result.
        recipe: one of `RECIPES`.
        lora_rank: train low-rank adapters of the transformer instead of all its weights (extra `lora`). They are fused
            into the saved pipeline, which needs no peft, and lie beside it, in `out / rollouts-lora`.
        num_members: of the proprioception, for a recipe that trains it anew; None: as many as it has.
        seed: of the batches. device: torch device.
        cameras: camera matrix of each suite whose camera is known, see `ProphetPipeline`; they join the pipeline's own,
            in place of one of the same suite.

    Returns:
        The adapted pipeline, EMA weights.

    Raises:
        ValueError: unknown recipe, lora_rank below 1 or where it is of no use, num_members below 1 or where
            no proprioception is trained anew, or episodes of another stride, size or robot state than the pipeline's,
            all shorter than a chunk, of more robots than it has slots, or of robots that do not agree with it, see
            `set_robots`; or `out` is another run's, see `claim`.
        ImportError: lora_rank is given and peft is not installed.
    """
    check_recipe(recipe, lora_rank, num_members)
    out = Path(out)
    trains_video = needs_video(recipe)
    check_shapes(pipeline, train_arrays, trains_video)
    finished = finished_pipeline(
        out,
        device,
        command="adapt",
        recipe=recipe,
        lora_rank=lora_rank,
        num_members=num_members,
        seed=seed,
        cameras=cameras,
        checkpoint=weights_checksum(pipeline.vae, pipeline.transformer, pipeline.proprioception),
        episodes=train_arrays.checksum(),
    )
    if finished is not None:
        return finished
    new = {record.robot for record in train_arrays.records} - {name for name, _ in pipeline.config.robots}
    if new and "proprioception" not in RECIPES[recipe]:
        raise ValueError(
            f"The recipe {recipe!r} does not train the proprioception, and the pipeline does not know {sorted(new)}: "
            "adapt it to these robots first."
        )
    pipeline.to(device)
    pipeline.register_to_config(cameras=pipeline.config.cameras | (cameras or {}))
    set_robots(pipeline, train_arrays)
    check_validation(pipeline, val_arrays, trains_video)
    if trains_video:
        has_chunk(pipeline, train_arrays)  # raises before hours of other stages
    stages = dict(RECIPES[recipe])
    if trains_video and pipeline.vae.frozen and lora_rank is None:
        # Of a pretrained model's two billion weights: the preset cosmos-2b learns a tenth as fast as tiny.
        rate = 0.1 * stages["rollouts"]["learning_rate"]
        stages["rollouts"] = stages["rollouts"] | {"learning_rate": rate}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of new weights
        if "memory" in stages and not pipeline.transformer.config.memory:
            pipeline.register_modules(transformer=with_memory(pipeline.transformer, stages["memory"]))
        if stages.get("anew"):
            pipeline.register_modules(proprioception=pipeline.proprioception.untrained(num_members).to(device))
    if "proprioception" in stages:
        old = copy.deepcopy(pipeline.proprioception.members.state_dict())
        fit_proprioception(pipeline, train_arrays, out, stages, seed)
        if stages.get("halfway") and not new:
            for name, weight in pipeline.proprioception.members.state_dict().items():
                weight.lerp_(old[name], 0.5)
    if trains_video:
        latents = fit_autoencoder(pipeline, train_arrays, out, stages, seed)
        fit_video(pipeline, train_arrays, val_arrays, latents, out, stages, seed, lora_rank)
    save_pipeline(pipeline, out)
    return pipeline
