"""Training of Prophet: proprioception, autoencoder, the transformer by rectified flow, then the decoder on what the
transformer imagines; each stage can be resumed."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from prophet_gym.data.clips import ClipSampler, EpisodeArrays
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.training import LossFn, fit
from prophet_gym.world_model.action_conditioning import draw_action_frames
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.imagination import frame_rows, replay_episodes
from prophet_gym.world_model.pipeline import ProphetPipeline, advance_history, frame_condition, frames_to_pixels
from prophet_gym.world_model.proprioception import ProprioceptionModel
from prophet_gym.world_model.transformer import ProphetTransformer3DModel

PRESETS: dict[str, dict[str, Any]] = {
    # Minutes are for one core of an AVX2 CPU without bfloat16 units; see docs/training.md.
    "tiny": {
        "autoencoder": {"steps": 4000, "batch_size": 32, "learning_rate": 3e-3},
        "proprioception": {"steps": 5000, "batch_size": 64, "learning_rate": 3e-3},
        "transformer": {"steps": 4200, "batch_size": 16, "learning_rate": 1e-3},
        "decoder": {"steps": 2500, "batch_size": 32, "learning_rate": 1e-3},
        "models": {"autoencoder": {}, "proprioception": {}, "transformer": {"num_layers": 4}},
    },
    # Seconds: shows that the code runs, learns next to nothing.
    "debug": {
        "autoencoder": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "proprioception": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "transformer": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
        "decoder": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
        "models": {
            "autoencoder": {
                "latent_channels": 4,
                "block_channels": (8, 8, 16),
                "encoder_blocks": (0, 0, 0),
                "decoder_blocks": (0, 0, 0),
            },
            "proprioception": {"hidden_dim": 16},
            "transformer": {
                "latent_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 2,
                "adaln_lora_dim": 8,
            },
        },
    },
}

CROP = 48
"""Side of the autoencoder's training crops, pixels: it is convolutional, and most of a frame is still background."""


def camera_projection(intrinsics: NDArray[np.float64], extrinsics: NDArray[np.float64]) -> list[list[float]]:
    """Camera matrix 3 x 4, in pixels, of intrinsics (3, 3) and camera-to-world extrinsics (4, 4)."""
    projection: list[list[float]] = (intrinsics @ np.linalg.inv(extrinsics)[:3]).tolist()
    return projection


def camera_projections(datasets: Sequence[EpisodeDataset]) -> dict[str, list[list[float]]]:
    """The camera matrix of every suite of these data sets that has a camera."""
    projections = {}
    for dataset in datasets:
        for suite in {record.suite for record in dataset.records}:
            try:
                projections[suite] = camera_projection(*dataset.camera(suite))
            except KeyError:  # recorded without one
                continue
    return projections


def autoencoder_loss(vae: ProphetAutoencoder, arrays: EpisodeArrays, batch_size: int) -> LossFn:
    """Error of encoded and decoded crops of what moves and what has colour.

    The reference is the episode's first frame, or at times another one, because a user's start may come from anywhere.
    The latents get noise of a random level, so that the decoder forgives the transformer's errors. The action frames
    are black: the latents must learn to show the arm.
    """

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = next(ClipSampler(arrays, 1, 1, batch_size, generator))
        elsewhere = arrays.lengths[clip.episodes] * torch.rand(batch_size, generator=generator)
        usual = torch.rand(batch_size, generator=generator) < 0.75
        reference_rows = clip.first_rows + torch.where(usual, 0, elsewhere.long())
        _, pixels, reference = _informative_crops(arrays, clip.rows[:, 1], reference_rows, generator)
        pixels, reference = pixels.to(vae.device), reference.to(vae.device)
        latents = vae.encode(pixels)
        level = 0.2 * torch.rand(batch_size, 1, 1, 1, generator=generator) * latents.detach().std().cpu()
        noise = (level * torch.randn(latents.shape, generator=generator)).to(latents)
        decoded = vae.decode((latents + noise)[:, None], reference)[:, 0]
        loss = _pixel_loss(decoded, pixels, reference) + 1e-4 * latents.square().mean()
        return loss, {"psnr": _psnr(decoded - pixels)}

    return loss_fn


def decoder_loss(pipeline: ProphetPipeline, arrays: EpisodeArrays, imagined: torch.Tensor, batch_size: int) -> LossFn:
    """Error of crops decoded from the transformer's own latents, so that the decoder makes the best of its errors.

    Args:
        imagined: float16 (N, C, h, w), see `imagine_latents`.
    """
    vae = pipeline.vae
    projections = pipeline.projection([record.suite for record in arrays.records])

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = next(ClipSampler(arrays, 1, 1, batch_size, generator))
        rows = clip.rows[:, 1]
        corner, pixels, reference = _informative_crops(arrays, rows, clip.first_rows, generator)
        pixels, reference = pixels.to(vae.device), reference.to(vae.device)
        latents = _crop(imagined[rows].movedim(1, -1), corner // 8, CROP // 8).movedim(-1, 1)
        drawn = draw_action_frames(arrays.proprio[rows][:, None], projections[clip.episodes], pipeline.image_size)
        drawn = _crop(drawn[:, 0].movedim(1, -1), corner // 2, CROP // 2).movedim(-1, 1)
        decoded = vae.decode(latents[:, None].float().to(vae.device), reference, drawn[:, None].to(vae.device))[:, 0]
        return _pixel_loss(decoded, pixels, reference), {"psnr": _psnr(decoded - pixels)}

    return loss_fn


def _pixel_loss(decoded: torch.Tensor, pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Squared error on pixels and L1 on their finite differences, (N, 3, H, W) each.

    Absolute error alone paints small bright objects in the grey of the floor, and the object is what a policy is judged
    by. What differs from the reference counts five times: the rest can be copied from it.
    """
    error = decoded - pixels
    weight = 1 + 4 * ((pixels - reference).abs().amax(1, keepdim=True) > 0.1)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return 10 * (weight * error.square()).mean() + edges


def _informative_crops(
    arrays: EpisodeArrays, rows: torch.Tensor, reference_rows: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One window of each frame and of its reference: corner (N, 2), pixels and reference (N, 3, CROP, CROP)."""
    frames, references = arrays.frames[rows], arrays.frames[reference_rows]
    corner = _informative_corner(frames, references, generator)
    pixels, reference = (frames_to_pixels(_crop(images, corner, CROP)) for images in (frames, references))
    return corner, pixels, reference


def _informative_corner(frames: torch.Tensor, references: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Choose one CROP x CROP window of each pair of frames, favouring colour and difference.

    Returns:
        Row and column of the upper left corner, multiples of 8, int64 (N, 2).
    """
    sparse = frames[:, ::2, ::2].float()
    difference = (sparse - references[:, ::2, ::2].float()).abs().mean(-1)
    saturation = sparse.amax(-1) - sparse.amin(-1)
    side = frames.shape[1] // 8
    cells = F.avg_pool2d((difference + (saturation - 30).clamp(min=0))[:, None], 4).flatten(1) + 2.0
    centre = torch.multinomial(cells, 1, generator=generator)[:, 0]
    span = CROP // 8
    corner = torch.stack([centre // side, centre % side], dim=1) - torch.randint(
        span, (len(frames), 2), generator=generator
    )
    return 8 * corner.clamp(0, side - span)


def _crop(images: torch.Tensor, corner: torch.Tensor, size: int) -> torch.Tensor:
    """Cut a size x size window at each corner (N, 2) out of images (N, H, W, C)."""
    rows = corner[:, :1] + torch.arange(size)
    columns = corner[:, 1:] + torch.arange(size)
    return images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def proprioception_loss(model: ProprioceptionModel, arrays: EpisodeArrays, batch_size: int, frames: int = 20) -> LossFn:
    """Error of the proprioception over `frames` frames of its own rollout, in units of one frame's usual change.

    Half of the windows begin where an episode does, with the arm at rest.
    """
    frames = min(frames, int(arrays.lengths.min()) - 1)

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = next(ClipSampler(arrays, 1, frames, batch_size, generator))
        at_start = torch.rand(batch_size, generator=generator) < 0.5
        first = torch.where(at_start, clip.first_rows, clip.rows[:, 0])
        state = model.init_state(arrays.proprio[first].to(model.device))
        proprio_dim, losses = arrays.proprio.shape[1], []
        for k in range(frames):
            state = model(state, arrays.actions[first + k].to(model.device))
            target = arrays.proprio[first + k + 1].to(model.device)
            error = state[:, :proprio_dim] - target
            scaled = error / model.delta_std
            # Almost absolute: of the free motion, which is exact, contacts would otherwise leave no gradient.
            losses.append(F.smooth_l1_loss(scaled, torch.zeros_like(scaled), beta=0.5))
        return torch.stack(losses).mean(), {"position_error_mm": 1000 * error[:, :3].norm(dim=-1).mean().item()}

    return loss_fn


def transformer_loss(
    pipeline: ProphetPipeline,
    arrays: EpisodeArrays,
    latents: torch.Tensor,
    *,
    batch_size: int,
    steps: int,
) -> LossFn:
    """Rectified flow on chunks of latents, in the form of an error on the clean chunk, over the model's own rollout.

    Most noise levels are 1 (pure noise), so that one sampling step is good; the others are logit-normal. The clean
    chunk that the model predicts, without gradient, is the history of the next: one chunk in the first half of
    training, then two, then four in the last 15%, against drift. The error counts more where the chunk differs from
    the last history frame or from the first.

    Args:
        latents: float16 (N, C, h, w), all frames of `arrays` encoded.
        steps: length of the training, for the schedule of chunks.
    """
    transformer, device, chunk_frames = pipeline.transformer, pipeline.device, pipeline.chunk_frames
    projections = pipeline.projection([record.suite for record in arrays.records])

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        chunks = 1 + int(step >= 0.5 * steps) + 2 * int(step >= 0.85 * steps)
        recent = transformer.config.history_frames - 1
        clip = next(ClipSampler(arrays, recent, chunks * chunk_frames, batch_size, generator))
        projection = projections[clip.episodes].to(device)
        history = latents[torch.cat([clip.first_rows[:, None], clip.rows[:, :recent]], dim=1)].float().to(device)
        losses = []
        for chunk in range(chunks):
            present = recent - 1 + chunk * chunk_frames
            before = clip.rows[:, present : present + chunk_frames]
            clean = latents[before + 1].float().to(device)
            condition, action_frames = _observed_condition(pipeline, arrays, before, projection)
            sigma = compute_density_for_timestep_sampling("logit_normal", batch_size, 0.0, 1.0, generator=generator)
            pure = torch.rand(batch_size, generator=generator) < 0.7
            sigma = torch.where(pure, 1.0, sigma.clamp(min=0.02)).to(device)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            level = sigma[:, None, None, None, None]
            sample = (1 - level) * clean + level * noise
            velocity = transformer(sample, sigma, history, condition, action_frames)
            predicted = sample - level * velocity
            moved = (clean - history[:, :1]).abs() + (clean - history[:, -1:]).abs()
            moved = moved.mean(2, keepdim=True)
            weight = 1 + 4 * moved / moved.mean()
            losses.append((weight * (predicted - clean).square()).mean())
            history = advance_history(history, predicted.detach())
        logs = {f"loss_chunk_{chunk}": loss.item() for chunk, loss in enumerate(losses)}
        return torch.stack(losses).mean(), logs

    return loss_fn


def _observed_condition(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, before: torch.Tensor, projection: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditions and action frames, as `ProphetPipeline.condition`, of the steps from rows `before` (B, F) to the next
    ones, from the true proprioception."""
    poses = arrays.proprio[before + 1].to(pipeline.device)
    condition = frame_condition(
        pipeline.proprioception,
        arrays.proprio[before].to(pipeline.device),
        poses,
        arrays.actions[before].to(pipeline.device),
    )
    return condition, draw_action_frames(poses, projection, pipeline.image_size)


@torch.inference_mode()
def encode_frames(vae: ProphetAutoencoder, frames: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Encode uint8 frames (N, H, W, 3) to float16 latents (N, C, h, w) on the CPU."""
    batches = tqdm(frames.split(batch_size), desc="encoding frames", mininterval=5.0)
    return torch.cat([vae.encode(frames_to_pixels(batch).to(vae.device)).half().cpu() for batch in batches])


@torch.inference_mode()
def imagine_latents(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, latents: torch.Tensor, seed: int, batch_size: int = 64
) -> torch.Tensor:
    """Imagine every episode open loop from its first frame, given the true proprioception.

    Args:
        latents: float16 (N, C, h, w), all frames of `arrays` encoded. seed: of the noise.

    Returns:
        float16 (N, C, h, w); frames beyond the last whole chunk of the shortest episode are those of `latents`.
    """
    device, chunk_frames = pipeline.device, pipeline.chunk_frames
    projections = pipeline.projection([record.suite for record in arrays.records])
    imagined = latents.clone()
    generator = torch.Generator().manual_seed(seed)
    chunks = (int(arrays.lengths.min()) - 1) // chunk_frames
    for episodes in tqdm(torch.arange(len(arrays.starts)).split(batch_size), desc="imagining", mininterval=5.0):
        starts, projection = arrays.starts[episodes], projections[episodes].to(device)
        history = latents[starts][:, None].float().to(device)
        history = history.repeat(1, pipeline.transformer.config.history_frames, 1, 1, 1)
        for chunk in range(chunks):
            before = starts[:, None] + chunk * chunk_frames + torch.arange(chunk_frames)
            condition, action_frames = _observed_condition(pipeline, arrays, before, projection)
            noise = torch.randn(before.shape + latents.shape[1:], generator=generator).to(device)
            clean = noise - pipeline.transformer(noise, noise.new_ones(len(starts)), history, condition, action_frames)
            history = advance_history(history, clean)
            imagined[before + 1] = clean.half().cpu()
    return imagined


def _standardize_latents(vae: ProphetAutoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Make the statistics of raw latents (N, C, h, w) part of the autoencoder; return the latents standardised."""
    mean, std = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_(std)
    return ((latents.float() - mean[:, None, None]) / std[:, None, None]).half()


def _set_proprio_statistics(model: ProprioceptionModel, arrays: EpisodeArrays) -> None:
    same_episode = torch.ones(len(arrays.proprio) - 1, dtype=torch.bool)
    same_episode[arrays.starts[1:] - 1] = False
    change = arrays.proprio.diff(dim=0)[same_episode]
    model.proprio_mean.copy_(arrays.proprio.mean(0))
    model.proprio_std.copy_(arrays.proprio.std(0) + 1e-4)
    model.delta_std.copy_(change.std(0) + 1e-5)


def _psnr(error: torch.Tensor) -> float:
    """PSNR in dB of an error on pixels in [-1, 1]."""
    return float(-10 * torch.log10(error.detach().float().square().mean() / 4))


def _validate(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, out: Path, stage: str, writer: SummaryWriter, step: int
) -> None:
    """Replay 16 validation episodes open loop; log PSNR by horizon and write a video, real above imagined."""
    chosen = torch.linspace(0, len(arrays.starts) - 1, min(16, len(arrays.starts))).long()
    imagined, _ = replay_episodes(pipeline, arrays, chosen, range(len(chosen)))
    real = arrays.frames[frame_rows(arrays, chosen, pipeline.chunk_frames)]
    length = real.shape[1] - 1
    error = (imagined.float() - real.float()) / 127.5
    for frame in (pipeline.chunk_frames, 10, 20, length):
        if frame <= length:
            writer.add_scalar(f"{stage}/validation_psnr_frame_{frame}", _psnr(error[:, frame]), step)
    writer.add_scalar(f"{stage}/validation_psnr_episode", _psnr(error[:, 1:]), step)
    pairs = torch.cat([real, imagined], dim=2)[::2]  # (8, T, 2 H, W, 3)
    video = list(pairs.permute(1, 2, 0, 3, 4).flatten(2, 3).numpy())
    imageio.mimwrite(
        out / f"validation-{stage}-{step:06d}.mp4", video, fps=pipeline.config.control_hz / pipeline.frame_stride
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
) -> ProphetPipeline:
    """Train all of Prophet and save the pipeline to `out / pipeline`; run again after a kill to resume.

    Args:
        train_arrays, val_arrays: frames, proprioception and actions of the two splits.
        out: folder for checkpoints, TensorBoard logs, sample videos and the result.
        preset: one of `PRESETS`. seed: of initial weights and batches. device: torch device.
        cameras: camera matrix of each suite whose camera is known, see `ProphetPipeline`.

    Returns:
        The trained pipeline, EMA weights.

    Raises:
        ValueError: unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of {sorted(PRESETS)}.")
    recipe, out = PRESETS[preset], Path(out)
    if (out / "pipeline").exists():
        return ProphetPipeline.from_pretrained(out / "pipeline").to(device)
    out.mkdir(parents=True, exist_ok=True)
    stride = train_arrays.actions.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = ProphetAutoencoder(**recipe["models"]["autoencoder"]).to(device, memory_format=torch.channels_last)
        proprioception = ProprioceptionModel(frame_stride=stride, **recipe["models"]["proprioception"]).to(device)
        transformer = ProphetTransformer3DModel(**recipe["models"]["transformer"]).to(device)
    pipeline = ProphetPipeline(
        vae,
        transformer,
        proprioception,
        FlowMatchEulerDiscreteScheduler(),
        image_size=train_arrays.frames.shape[1],
        cameras=cameras,
    )

    stage = dict(recipe["proprioception"])
    _set_proprio_statistics(proprioception, train_arrays)
    loss_fn = proprioception_loss(proprioception, train_arrays, stage.pop("batch_size"))
    fit("proprioception", proprioception, loss_fn, out, seed=seed, **stage)

    stage = dict(recipe["autoencoder"])
    loss_fn = autoencoder_loss(vae, train_arrays, stage.pop("batch_size"))
    fit("autoencoder", vae, loss_fn, out, seed=seed, **stage)

    latents = _standardize_latents(vae, encode_frames(vae, train_arrays.frames))

    stage = dict(recipe["transformer"])
    loss_fn = transformer_loss(
        pipeline, train_arrays, latents, batch_size=stage.pop("batch_size"), steps=stage["steps"]
    )
    fit(
        "transformer",
        transformer,
        loss_fn,
        out,
        seed=seed,
        validate=partial(_validate, pipeline, val_arrays, out, "transformer"),
        **stage,
    )

    stage = dict(recipe["decoder"])
    imagined = imagine_latents(pipeline, train_arrays, latents, seed)
    loss_fn = decoder_loss(pipeline, train_arrays, imagined, stage.pop("batch_size"))
    vae.encoder.requires_grad_(False)  # the transformer knows its latents
    fit(
        "decoder",
        vae,
        loss_fn,
        out,
        seed=seed,
        validate=partial(_validate, pipeline, val_arrays, out, "decoder"),
        **stage,
    )
    temporary = out / ".pipeline.tmp"
    pipeline.save_pretrained(temporary)
    os.replace(temporary, out / "pipeline")
    return pipeline
