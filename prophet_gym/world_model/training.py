"""Training of Prophet: proprioception, autoencoder, and transformer and decoder together on their own rollouts; each
stage can be resumed."""

import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import imageio
import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils.tensorboard import SummaryWriter

from prophet_gym.data.clips import EpisodeArrays
from prophet_gym.data.episode import GRIPPERS, PROPRIO_DIM, finger_openings, per_arm
from prophet_gym.run_folder import claim
from prophet_gym.training import fit
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.cosmos import ProphetCosmosAutoencoder, ProphetCosmosTransformer3DModel
from prophet_gym.world_model.imagination import encode_frames, frame_rows, has_chunk, replay_episodes
from prophet_gym.world_model.lora import add_lora, fuse_lora
from prophet_gym.world_model.losses import CROP, ProprioceptionLoss, autoencoder_loss, error_psnr
from prophet_gym.world_model.pipeline import ProphetPipeline
from prophet_gym.world_model.proprioception import ProprioceptionModel
from prophet_gym.world_model.transformer import ProphetTransformer3DModel
from prophet_gym.world_model.video_rollouts import VideoModels, VideoRolloutLoss

logger = logging.getLogger(__name__)

MEMORY = ((2, 1, 2), (4, 1, 4), (12, 3, 6))
"""Levels of the memory of frames of 12 x 12 latents, see `FramePackMemory`."""

_TINY_MODELS: dict[str, Any] = {"autoencoder": {}, "proprioception": {}, "transformer": {"memory": MEMORY}}

PRESETS: dict[str, dict[str, Any]] = {
    # About two hours on two cores with bfloat16 units.
    "tiny": {
        "autoencoder": {"steps": 9000, "batch_size": 32, "learning_rate": 3e-3},
        "proprioception": {"steps": 11_000, "batch_size": 128, "learning_rate": 2e-3},
        "rollouts": {"steps": 6000, "batch_size": 16, "learning_rate": 1e-3},
        "models": _TINY_MODELS,
    },
    # The same models for the steps of `prophet adapt`, and an autoencoder of their own: what a few episodes give
    # without pretraining.
    "brief": {
        "autoencoder": {"steps": 1500, "batch_size": 32, "learning_rate": 3e-3},
        "proprioception": {"steps": 1500, "batch_size": 128, "learning_rate": 2e-3},
        "rollouts": {"steps": 500, "batch_size": 16, "learning_rate": 1e-3},
        "models": _TINY_MODELS,
    },
    # About 130 million weights, for one GPU.
    "base": {
        "autoencoder": {"steps": 40_000, "batch_size": 64, "learning_rate": 1e-3},
        "proprioception": {"steps": 25_000, "batch_size": 512, "learning_rate": 2e-3},
        "rollouts": {
            "steps": 80_000,
            "batch_size": 64,
            "learning_rate": 3e-4,
            "warmup_steps": 1000,
            "checkpoint_every": 1000,
        },
        "models": {
            "autoencoder": {
                "block_channels": (64, 128, 256),
                "encoder_blocks": (1, 2, 2),
                "decoder_blocks": (2, 3, 3),
            },
            "proprioception": {"hidden_dim": 256, "width": 384},
            "transformer": {
                "memory": MEMORY,
                "conv_channels": 256,
                "num_attention_heads": 12,
                "attention_head_dim": 64,
                "num_layers": 10,
                "adaln_lora_dim": 128,
            },
        },
    },
    # Two billion weights, from `pretrained`; optimiser as in the paper. Its autoencoder stays as it was trained.
    "cosmos-2b": {
        "proprioception": {"steps": 25_000, "batch_size": 512, "learning_rate": 2e-3},
        "rollouts": {
            "steps": 40_000,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "weight_decay": 0.1,
            "warmup_steps": 1000,
            "checkpoint_every": 2000,  # 32 GB each
        },
        "models": {
            "proprioception": {"hidden_dim": 256, "width": 384},
            # 832 tokens of frames of 256 pixels; the paper has at most 1024.
            "transformer": {"memory": ((2, 1, 2), (4, 1, 4), (12, 3, 8))},
        },
    },
    # Seconds: shows that the code runs, learns next to nothing.
    "debug": {
        "autoencoder": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "proprioception": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "rollouts": {"steps": 8, "batch_size": 2, "learning_rate": 1e-3},
        "models": {
            "autoencoder": {
                "latent_channels": 4,
                "block_channels": (8, 8, 16),
                "encoder_blocks": (0, 0, 0),
                "decoder_blocks": (0, 0, 0),
            },
            "proprioception": {"hidden_dim": 16, "width": 16, "num_members": 2},
            "transformer": {
                "latent_channels": 4,
                "memory": ((2, 1, 2), (4, 2, 6)),
                "conv_channels": 8,
                "conv_blocks": (1, 1),
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 2,
                "adaln_lora_dim": 8,
            },
        },
    },
}


def set_robots(pipeline: ProphetPipeline, arrays: EpisodeArrays) -> None:
    """Give every robot of `arrays` that the pipeline does not know a slot, with its statistics and its action mask: the
    numbers that are zero in all its actions are not obeyed. Suites that are new join their robot's.

    Raises:
        ValueError: there are more robots than slots, a suite is another robot's, a known robot uses an action that it
            did not obey before, or its orientations, fingers or gripper commands are not as `Episode` has them.
    """
    model, robots = pipeline.proprioception, {name: list(suites) for name, suites in pipeline.config.robots}
    last = arrays.starts + arrays.lengths - 1
    for name in sorted({record.robot for record in arrays.records}):
        own = torch.tensor([record.robot == name for record in arrays.records])[arrays.episode_of_row]
        inside = own.clone()  # frames that another one follows
        inside[last] = False
        used = (arrays.actions[inside] != 0).any(0).any(0)
        change = arrays.proprio[1:][inside[:-1]] - arrays.proprio[:-1][inside[:-1]]
        _check_conventions(name, arrays.proprio[own], change, arrays.actions[inside])
        if name in robots:
            obeyed = model.action_mask[list(robots).index(name)].cpu() > 0
            if (used & ~obeyed).any():
                raise ValueError(
                    f"{name!r} obeys the actions {obeyed.nonzero()[:, 0].tolist()} in this pipeline, and the episodes "
                    f"use {used.nonzero()[:, 0].tolist()}: give it another name, so that it takes a slot of its own."
                )
            continue
        slot = len(robots)
        if slot == model.config.robots:
            raise ValueError(f"No slot is free for {name!r}: the pipeline has {slot}, of {sorted(robots)}.")
        robots[name] = []
        model.action_mask[slot] = used.float()
        model.proprio_mean[slot] = arrays.proprio[own].mean(0)
        model.proprio_std[slot] = arrays.proprio[own].std(0).clamp(min=0.01)
        model.delta_std[slot] = change.std(0).clamp(min=0.001)  # an orientation may be fixed
    for suite, name in sorted({(record.suite, record.robot) for record in arrays.records}):
        others = [other for other, suites in robots.items() if suite in suites and other != name]
        if others:
            raise ValueError(
                f"The suite {suite!r} is {others[0]!r}'s, and these episodes of it are {name!r}'s: rename it."
            )
        if suite not in robots[name]:
            robots[name].append(suite)
    pipeline.register_to_config(robots=[[name, suites] for name, suites in robots.items()])


def _check_conventions(robot: str, proprio: torch.Tensor, change: torch.Tensor, actions: torch.Tensor) -> None:
    """Raise a ValueError where other conventions than `Episode`'s would be learned as motion.

    Args:
        proprio: float (N, 8 K). change: float (M, 8 K), from one frame to the next. actions: float (M, stride, 7 K).
    """
    arms = proprio.shape[1] // PROPRIO_DIM
    jump = per_arm(change, arms)[:, 3:6].norm(dim=-1).amax() if len(change) else change.new_zeros(())
    if jump > math.pi:
        raise ValueError(
            f"The orientation of {robot!r} changes by {jump:.1f} rad between two frames: axis-angle vectors jump where "
            "the angle passes pi. Make them from quaternions whose sign does not flip, with angles beyond pi."
        )
    fingers = per_arm(proprio, arms)[:, 6:].abs().amax()
    if fingers > 0.01 and finger_openings(proprio).abs().amax() < 0.1 * fingers:
        raise ValueError(
            f"The fingers of {robot!r} are up to {fingers:.3f} m from the middle and never apart: the position of the "
            "second one is negative, and their difference the opening."
        )
    commands = actions[..., GRIPPERS]
    if commands.numel() and commands.amin() == 0 and (commands == 1).any():
        raise ValueError(
            f"The gripper commands of {robot!r} are 0 and 1 and never negative: -1 opens and +1 closes. Convert them."
        )


def check_shapes(pipeline: ProphetPipeline, arrays: EpisodeArrays, video: bool = True) -> None:
    """Raise a ValueError where episodes do not fit the pipeline: size of the frames (without `video`, of the first
    ones), proprioception, actions, or how many of these there are a second; or where it has no video to train."""
    if video:
        pipeline.require_video()
    expected: dict[str, Any] = {
        "frames" if video else "first_frames": (pipeline.image_size, pipeline.image_size, 3),
        "proprio": (pipeline.proprioception.proprio_dim,),
        "actions": (pipeline.frame_stride, pipeline.action_dim),
    }
    for name, shape in expected.items():
        if (got := tuple(getattr(arrays, name).shape[1:])) != shape:
            arms = "" if "frames" in name else f" Where a robot has fewer arms, load with num_arms={pipeline.num_arms}."
            raise ValueError(f"The pipeline takes {name} of shape {shape}, the episodes have {got}.{arms}")
    if round(arrays.control_hz) != pipeline.config.control_hz:
        raise ValueError(
            f"The pipeline's robots take {pipeline.config.control_hz} actions a second, those of the episodes "
            f"{arrays.control_hz:g}: record at that rate, or train a world model of your own (`prophet train`)."
        )


def check_validation(pipeline: ProphetPipeline, arrays: EpisodeArrays, video: bool = True) -> None:
    """Raise a ValueError where validation episodes do not fit, see `check_shapes`, or are of a suite or robot without a
    slot."""
    check_shapes(pipeline, arrays, video)
    known = {(name, suite) for name, suites in pipeline.config.robots for suite in suites}
    if unknown := {(record.robot, record.suite) for record in arrays.records} - known:
        raise ValueError(f"Validation has episodes of {sorted(unknown)}, training only of {sorted(known)}.")


def _validate(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, out: Path, stage: str, writer: SummaryWriter, step: int
) -> None:
    """Replay 8 validation episodes of each suite open loop; log PSNR by horizon and write videos, real above
    imagined."""
    whole = (arrays.lengths > pipeline.chunk_frames).tolist()
    for suite in sorted({suite for suite, fits in zip(arrays.suites, whole, strict=True) if fits}):
        own = torch.tensor([k for k, other in enumerate(arrays.suites) if other == suite and whole[k]])
        chosen = own[torch.linspace(0, len(own) - 1, min(8, len(own))).long()]
        imagined, _ = replay_episodes(pipeline, arrays, chosen, range(len(chosen)))
        real = arrays.frames[frame_rows(arrays, chosen, pipeline.chunk_frames)]
        length = real.shape[1] - 1
        error = (imagined.float() - real.float()) / 127.5
        for frame in (pipeline.chunk_frames, 10, 20, length):
            if frame <= length:
                writer.add_scalar(f"{stage}/{suite}/validation_psnr_frame_{frame}", error_psnr(error[:, frame]), step)
        writer.add_scalar(f"{stage}/{suite}/validation_psnr_episode", error_psnr(error[:, 1:]), step)
        pairs = torch.cat([real, imagined], dim=2)  # (8, T, 2 H, W, 3)
        video = list(pairs.permute(1, 2, 0, 3, 4).flatten(2, 3).numpy())
        fps = pipeline.config.control_hz / pipeline.frame_stride
        imageio.mimwrite(out / f"validation-{stage}-{suite}-{step:06d}.mp4", video, fps=fps)


def check_preset(preset: str, pretrained: str | os.PathLike[str] | None) -> None:
    """Raise what `train` raises of its preset and its pretrained weights."""
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of {sorted(PRESETS)}.")
    if (pretrained is None) != ("autoencoder" in PRESETS[preset]):
        raise ValueError(
            'The preset "cosmos-2b", and no other, begins from pretrained weights: give it the folder of '
            f"Cosmos-Predict2-2B-Video2World. Got preset={preset!r} and pretrained={str(pretrained)!r}."
        )
    if pretrained is None:
        return
    for part in ("transformer", "vae"):
        if not (config := Path(pretrained) / part / "config.json").is_file():
            raise FileNotFoundError(
                f"There is no {config}: give the folder of Cosmos-Predict2-2B-Video2World in diffusers' format, for "
                "nothing is downloaded."
            )


def _check_frames(pipeline: ProphetPipeline, arrays: EpisodeArrays) -> None:
    """Raise a ValueError where the networks cannot take frames of this size, before hours of the first stages."""
    height, width = arrays.frames.shape[1:3]
    multiple = pipeline.vae.spatial_compression * pipeline.transformer.config.patch_size[1]
    if height != width or height % multiple or height < CROP:
        raise ValueError(
            f"Frames must be square, with a side of at least {CROP} pixels that is a multiple of {multiple}, got "
            f"{height} x {width}: record them so, or resize them."
        )


def train(
    train_arrays: EpisodeArrays,
    val_arrays: EpisodeArrays,
    out: str | os.PathLike[str],
    *,
    preset: str = "tiny",
    seed: int = 0,
    device: str = "cpu",
    cameras: dict[str, list[list[float]]] | None = None,
    pretrained: str | os.PathLike[str] | None = None,
    action_streams: str = "both",
) -> ProphetPipeline:
    """Train all of Prophet and save the pipeline to `out / pipeline`; run again after a kill to resume.

    In each of several processes, as `torchrun` starts them, it trains on all of them, see `fit`.

    Args:
        train_arrays, val_arrays: frames, proprioception and actions of the two splits.
        out: folder for checkpoints, TensorBoard logs, sample videos and the result.
        preset: one of `PRESETS`. seed: of initial weights and batches. device: torch device.
        cameras: camera matrix of each suite whose camera is known, see `ProphetPipeline`.
        pretrained: for the preset "cosmos-2b", and for no other, a local copy of Cosmos-Predict2-2B-Video2World in
            diffusers' format, of which its folders `transformer` and `vae` are read.
        action_streams: see `ProphetPipeline`.

    Returns:
        The trained pipeline, EMA weights.

    Raises:
        ValueError: unknown preset, or one that does not go with `pretrained`; frames of a size that the networks
            cannot take; episodes that are all shorter than a chunk, or do not go together, see `set_robots`; or `out`
            is another run's, see `claim`.
        FileNotFoundError: a folder of `pretrained` holds no model.
    """
    check_preset(preset, pretrained)
    recipe, out = PRESETS[preset], Path(out)
    finished = finished_pipeline(
        out,
        device,
        command="train",
        preset=preset,
        seed=seed,
        action_streams=action_streams,
        pretrained=None if pretrained is None else str(pretrained),
        cameras=cameras,
        episodes=train_arrays.checksum(),
    )
    if finished is not None:
        return finished
    stride = train_arrays.actions.shape[1]
    arms = {"num_arms": train_arrays.num_arms}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = recipe["models"]
        if pretrained is None:
            vae = ProphetAutoencoder(**arms, **models["autoencoder"]).to(device, memory_format=torch.channels_last)
        else:
            vae = ProphetCosmosAutoencoder.from_pretrained(
                Path(pretrained) / "vae", use_safetensors=True, local_files_only=True
            ).to(device)
        proprioception = ProprioceptionModel(frame_stride=stride, **arms, **models["proprioception"]).to(device)
        conditions = arms | {"condition_dim": proprioception.condition_dim}
        if pretrained is None:
            transformer = ProphetTransformer3DModel(**conditions, **models["transformer"]).to(device)
        else:
            transformer = ProphetCosmosTransformer3DModel.from_cosmos(
                Path(pretrained) / "transformer", **conditions, **models["transformer"]
            ).to(device)
    pipeline = ProphetPipeline(
        vae,
        transformer,
        proprioception,
        FlowMatchEulerDiscreteScheduler(),
        image_size=train_arrays.frames.shape[1],
        frame_stride=stride,
        control_hz=round(train_arrays.control_hz),
        cameras=cameras,
        action_streams=action_streams,
    )

    set_robots(pipeline, train_arrays)
    _check_frames(pipeline, train_arrays)
    check_validation(pipeline, val_arrays)
    has_chunk(pipeline, train_arrays)  # raises before hours of other stages
    fit_proprioception(pipeline, train_arrays, out, recipe, seed)
    latents = fit_autoencoder(pipeline, train_arrays, out, recipe, seed)
    fit_video(pipeline, train_arrays, val_arrays, latents, out, recipe, seed)
    save_pipeline(pipeline, out)
    return pipeline


def finished_pipeline(out: Path, device: str, **run: Any) -> ProphetPipeline | None:
    """What this run wrote to `out / pipeline` before, on `device`; if nothing, `out` is made for it, see `claim`."""
    processes = PartialState(cpu=device == "cpu")  # makes "cuda" this process's own one
    finished = (out / "pipeline").exists()
    processes.wait_for_everyone()  # before the first process can make it exist
    with processes.main_process_first():
        claim(out, **run)
    if finished:
        logger.info("finished before: %s", out / "pipeline")
        return ProphetPipeline.from_pretrained(out / "pipeline", use_safetensors=True, local_files_only=True).to(device)
    return None


def fit_proprioception(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, out: Path, recipe: dict[str, Any], seed: int
) -> None:
    """The stages of the members of the proprioception, whose weights change in place; `recipe` as in `PRESETS`."""
    stage = dict(recipe["proprioception"])
    batch_size = stage.pop("batch_size")
    for member in range(pipeline.num_members):
        loss_fn = ProprioceptionLoss(pipeline, arrays, batch_size, stage["steps"], member=member)
        model = pipeline.proprioception.member(member)
        fit(f"proprioception-{member}", model, loss_fn, out, seed=seed * pipeline.num_members + member, **stage)


def fit_autoencoder(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, out: Path, recipe: dict[str, Any], seed: int
) -> torch.Tensor:
    """The stage of the autoencoder, as `fit_proprioception`, if the recipe has one; the mean and scale of its latents
    become part of it. One that is frozen stays as it was pretrained.

    Returns:
        float16 (N, C, h, w), all frames of `arrays` encoded.
    """
    vae = pipeline.vae
    if "autoencoder" not in recipe or vae.frozen:
        return encode_frames(vae, arrays.frames)
    stage = dict(recipe["autoencoder"])
    projections = pipeline.projection(arrays.suites)
    loss_fn = autoencoder_loss(vae, arrays, projections, stage.pop("batch_size"), pipeline.chunk_frames)
    fit("autoencoder", vae, loss_fn, out, seed=seed, **stage)
    latents = encode_frames(vae, arrays.frames).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.latent_mean.add_(vae.latent_std * mean.to(vae.device))
    vae.latent_std.mul_(std.to(vae.device))
    return ((latents - mean[:, None, None]) / std[:, None, None]).half()


def fit_video(
    pipeline: ProphetPipeline,
    train_arrays: EpisodeArrays,
    val_arrays: EpisodeArrays,
    latents: torch.Tensor,
    out: Path,
    recipe: dict[str, Any],
    seed: int,
    lora_rank: int | None = None,
) -> None:
    """The stage "rollouts": transformer and decoder, whose weights change in place, see `VideoRolloutLoss`. A frozen
    autoencoder stays as it was pretrained.

    Args:
        latents: float16 (N, C, h, w), all frames of `train_arrays` encoded.
        recipe: as in `PRESETS`.
        lora_rank: if given, the transformer learns in low-rank adapters, which are fused at the end.
    """
    pipeline.vae.requires_grad_(not pipeline.vae.frozen)
    stage = dict(recipe["rollouts"])
    loss_fn = VideoRolloutLoss(pipeline, train_arrays, latents, stage.pop("batch_size"), stage["steps"])
    finish = None
    if lora_rank is not None and not (out / "rollouts").exists():
        add_lora(pipeline.transformer, lora_rank, seed)
        kept = out / "rollouts-lora" if PartialState().is_main_process else None
        finish = partial(fuse_lora, pipeline.transformer, kept)
    validate = partial(_validate, pipeline, val_arrays, out, "rollouts")
    fit("rollouts", VideoModels.of(pipeline), loss_fn, out, seed=seed, validate=validate, finish=finish, **stage)


def save_pipeline(pipeline: ProphetPipeline, out: Path) -> None:
    """Write `out / pipeline`, whole or not at all; of several processes the first one does."""
    if PartialState().is_main_process:
        temporary = out / ".pipeline.tmp"
        pipeline.save_pretrained(temporary)
        os.replace(temporary, out / "pipeline")
        logger.info("wrote %s", out / "pipeline")
    PartialState().wait_for_everyone()
