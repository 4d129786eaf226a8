"""Training of Prophet: proprioception, autoencoder, the transformer by rectified flow, the decoder on what the
transformer imagines, and the transformer again on its own history; each stage can be resumed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import compute_density_for_timestep_sampling
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from prophet_gym.data.clips import ClipSampler, EpisodeArrays, subset
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.training import LossFn, best_precision, fit
from prophet_gym.world_model.action_conditioning import carry, draw_action_frames
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.cosmos import ProphetCosmosAutoencoder, ProphetCosmosTransformer3DModel
from prophet_gym.world_model.history import advance_history
from prophet_gym.world_model.imagination import frame_rows, hand_motions, replay_episodes, track_holds
from prophet_gym.world_model.lora import add_lora, fuse_lora
from prophet_gym.world_model.pipeline import (
    ChunkCondition,
    ProphetPipeline,
    carry_latents,
    frames_to_pixels,
    pixels_to_frames,
)
from prophet_gym.world_model.proprioception import ProprioceptionModel
from prophet_gym.world_model.transformer import ProphetTransformer3DModel

MEMORY = ((2, 1, 2), (4, 1, 4), (12, 3, 6))
"""Levels of the memory of frames of 12 x 12 latents, see `FramePackMemory`."""

STAGES = ("transformer", "decoder", "transformer-own-history")
"""After the autoencoder. The last one is against drift: the history is what the first two imagine. The decoder must not
follow once more: the transformer has learned to go on from this one's frames (measured: 0.3 dB lost)."""

IMAGINED_EPISODES = 1000
"""At most so many training episodes are imagined for a stage, other ones each time."""

_TINY_MODELS: dict[str, Any] = {"autoencoder": {}, "proprioception": {}, "transformer": {"memory": MEMORY}}

PRESETS: dict[str, dict[str, Any]] = {
    # About two hours on two cores with bfloat16 units.
    "tiny": {
        "autoencoder": {"steps": 9000, "batch_size": 32, "learning_rate": 3e-3},
        "proprioception": {"steps": 4500, "batch_size": 64, "learning_rate": 3e-3},
        "transformer": {"steps": 5000, "batch_size": 16, "learning_rate": 1e-3},
        "decoder": {"steps": 2000, "batch_size": 32, "learning_rate": 1e-3},
        "transformer-own-history": {"steps": 4500, "batch_size": 16, "learning_rate": 7e-4},
        "models": _TINY_MODELS,
    },
    # The same models for the steps of `prophet adapt`, and an autoencoder of their own: what a few episodes give
    # without pretraining.
    "brief": {
        "autoencoder": {"steps": 1500, "batch_size": 32, "learning_rate": 3e-3},
        "proprioception": {"steps": 600, "batch_size": 64, "learning_rate": 3e-3},
        "transformer": {"steps": 300, "batch_size": 16, "learning_rate": 1e-3},
        "decoder": {"steps": 300, "batch_size": 32, "learning_rate": 1e-3},
        "transformer-own-history": {"steps": 200, "batch_size": 16, "learning_rate": 7e-4},
        "models": _TINY_MODELS,
    },
    # About 130 million weights, for one GPU.
    "base": {
        "autoencoder": {"steps": 40_000, "batch_size": 64, "learning_rate": 1e-3},
        "proprioception": {"steps": 10_000, "batch_size": 256, "learning_rate": 2e-3},
        "transformer": {"steps": 40_000, "batch_size": 64, "learning_rate": 3e-4, "warmup_steps": 1000},
        "decoder": {"steps": 10_000, "batch_size": 64, "learning_rate": 3e-4},
        "transformer-own-history": {"steps": 40_000, "batch_size": 64, "learning_rate": 2e-4, "warmup_steps": 1000},
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
    # Two billion weights, from `pretrained`; optimiser as in the paper. Its autoencoder needs no training.
    "cosmos-2b": {
        "proprioception": {"steps": 10_000, "batch_size": 256, "learning_rate": 2e-3},
        "transformer": {
            "steps": 20_000,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "weight_decay": 0.1,
            "warmup_steps": 1000,
        },
        "decoder": {"steps": 5000, "batch_size": 32, "learning_rate": 1e-5},
        "transformer-own-history": {
            "steps": 20_000,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "weight_decay": 0.1,
            "warmup_steps": 1000,
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
        "transformer": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
        "decoder": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
        "transformer-own-history": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
        "models": {
            "autoencoder": {
                "latent_channels": 4,
                "block_channels": (8, 8, 16),
                "encoder_blocks": (0, 0, 0),
                "decoder_blocks": (0, 0, 0),
            },
            "proprioception": {"hidden_dim": 16, "width": 16},
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

CROP = 48
"""Side of the autoencoder's training crops, pixels: it is convolutional, and most of a frame is still background."""


def camera_projection(intrinsics: NDArray[np.float64], extrinsics: NDArray[np.float64]) -> list[list[float]]:
    """Camera matrix 3 x 4, in pixels, of intrinsics (3, 3) and camera-to-world extrinsics (4, 4)."""
    projection: list[list[float]] = (intrinsics @ np.linalg.inv(extrinsics)[:3]).tolist()
    return projection


def camera_projections(datasets: Sequence[EpisodeDataset]) -> dict[str, list[list[float]]]:
    """The camera matrix of every suite of these data sets that has a camera.

    Raises:
        ValueError: two data sets of one suite were recorded with different cameras.
    """
    projections: dict[str, list[list[float]]] = {}
    for dataset in datasets:
        for suite in {record.suite for record in dataset.records}:
            try:
                projection = camera_projection(*dataset.camera(suite))
            except KeyError:  # recorded without one
                continue
            if not np.allclose(projections.setdefault(suite, projection), projection, atol=1e-3):
                raise ValueError(f"{suite} was recorded with different cameras: train on data sets of one camera each.")
    return projections


def autoencoder_loss(
    vae: ProphetAutoencoder, arrays: EpisodeArrays, projections: torch.Tensor, batch_size: int
) -> LossFn:
    """Error of encoded and decoded crops of what moves and what has colour.

    Half of the decodings have to do without the carried frames and the action frame: the latents must learn to show
    everything. The reference is the episode's first frame, or at times another one, because a user's start may come
    from anywhere. The latents get noise of a random level, so that the decoder forgives the transformer's errors.

    Args:
        projections: float32 (E, 3, 4), the camera of each episode of `arrays`.
    """

    holds = track_holds(arrays)

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = next(ClipSampler(arrays, 1, 2, batch_size, generator))
        elsewhere = arrays.lengths[clip.episodes] * torch.rand(batch_size, generator=generator)
        usual = torch.rand(batch_size, generator=generator) < 0.75
        reference_rows = clip.first_rows + torch.where(usual, 0, elsewhere.long())
        frame = torch.randint(1, 3, (batch_size,), generator=generator)
        rows = clip.rows[torch.arange(batch_size), frame]
        window = _Window.choose(arrays, rows, reference_rows, generator)
        pixels, reference = window.pixels(arrays.frames[rows]), window.pixels(arrays.frames[reference_rows])
        shown = frames_to_pixels(arrays.frames[torch.stack([clip.rows[:, 0], clip.first_rows], dim=1)])
        motion = hand_motions(arrays, holds, clip.rows[:, 0], rows, projections[clip.episodes])
        carried = window.carried(shown, motion)
        drawn = window.drawn(arrays.proprio[rows], projections[clip.episodes], shown.shape[-1])
        alone = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
        carried = torch.where(alone[:, None], reference[:, None], carried)
        drawn = torch.where(alone, 0.0, drawn)
        pixels, reference, carried, drawn = (value.to(vae.device) for value in (pixels, reference, carried, drawn))
        latents = vae.encode(pixels)
        level = 0.2 * torch.rand(batch_size, 1, 1, 1, generator=generator) * latents.detach().std().cpu()
        noise = (level * torch.randn(latents.shape, generator=generator)).to(latents)
        decoded = vae.decode((latents + noise)[:, None], reference, carried[:, None], drawn[:, None])[:, 0]
        loss = _pixel_loss(decoded, pixels, reference) + 1e-4 * latents.square().mean()
        return loss, {"psnr": _psnr(decoded - pixels)}

    return loss_fn


def decoder_loss(pipeline: ProphetPipeline, arrays: EpisodeArrays, imagined: "Imagination", batch_size: int) -> LossFn:
    """Error of crops decoded from the transformer's own latents and carried from the decoder's own frames, so that it
    makes the best of their errors."""
    vae, chunk_frames = pipeline.vae, pipeline.chunk_frames
    projections = pipeline.projection([record.suite for record in arrays.records])
    holds = track_holds(arrays)

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = next(ClipSampler(arrays, 1, 1, batch_size, generator))
        rows, first = clip.rows[:, 1], clip.first_rows
        latest = rows - 1 - (rows - 1 - first) % chunk_frames  # the frame that the chunk began from
        window = _Window.choose(arrays, rows, first, generator)
        pixels, reference = window.pixels(arrays.frames[rows]), window.pixels(arrays.frames[first])
        shown = frames_to_pixels(torch.stack([imagined.frames[latest], arrays.frames[first]], dim=1))
        motion = hand_motions(arrays, holds, latest, rows, projections[clip.episodes])
        carried = window.carried(shown, motion)
        drawn = window.drawn(arrays.proprio[rows], projections[clip.episodes], shown.shape[-1])
        latents = window.crop(imagined.latents[rows].float(), 8)
        pixels, reference, latents, carried, drawn = (
            value.to(vae.device) for value in (pixels, reference, latents, carried, drawn)
        )
        decoded = vae.decode(latents[:, None], reference, carried[:, None], drawn[:, None])[:, 0]
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


class _Window:
    """One CROP x CROP window of each frame of a batch, by its upper left corner (N, 2): row, column."""

    def __init__(self, corner: torch.Tensor) -> None:
        self.corner = corner

    @classmethod
    def choose(
        cls, arrays: EpisodeArrays, rows: torch.Tensor, reference_rows: torch.Tensor, generator: torch.Generator
    ) -> "_Window":
        """Favour colour and difference from the reference; corners are multiples of 8."""
        frames = arrays.frames[rows]
        sparse = frames[:, ::2, ::2].float()
        difference = (sparse - arrays.frames[reference_rows][:, ::2, ::2].float()).abs().mean(-1)
        saturation = sparse.amax(-1) - sparse.amin(-1)
        side, span = frames.shape[1] // 8, CROP // 8
        cells = F.avg_pool2d((difference + (saturation - 30).clamp(min=0))[:, None], 4).flatten(1) + 2.0
        centre = torch.multinomial(cells, 1, generator=generator)[:, 0]
        corner = torch.stack([centre // side, centre % side], dim=1) - torch.randint(
            span, (len(frames), 2), generator=generator
        )
        return cls(8 * corner.clamp(0, side - span))

    def crop(self, images: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Cut the windows out of images (N, C, H / scale, W / scale)."""
        rows, columns = (self.corner[:, axis, None] // scale + torch.arange(CROP // scale) for axis in (0, 1))
        return images[
            torch.arange(len(images))[:, None, None, None],
            torch.arange(images.shape[1])[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """The windows of uint8 frames (N, H, W, 3), as pixels (N, 3, CROP, CROP)."""
        return frames_to_pixels(self.crop(frames.movedim(-1, 1)).movedim(1, -1))

    def carried(self, images: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
        """Images (N, M, 3, H, W), moved by `motion` (N, M, 3), in the windows: (N, M, 3, CROP, CROP)."""
        moved = carry(images, motion[:, None])[:, 0]
        return self.crop(moved.flatten(1, 2)).unflatten(1, moved.shape[1:3])

    def drawn(self, poses: torch.Tensor, projection: torch.Tensor, image_size: int) -> torch.Tensor:
        """The action frames of poses (N, P) in the windows, (N, 3, CROP / 2, CROP / 2)."""
        return self.crop(draw_action_frames(poses[:, None], projection, image_size)[:, 0], 2)


def proprioception_loss(pipeline: ProphetPipeline, arrays: EpisodeArrays, batch_size: int, frames: int = 20) -> LossFn:
    """Error of the proprioception over `frames` frames of its own rollout, in units of one frame's usual change.

    Half of the windows begin where an episode does, with the arm at rest. The others begin in its midst, and see the
    true proprioception for their first three frames: how fast the arm moves is in the state, not in the data.
    """
    frames, model = min(frames, int(arrays.lengths.min()) - 1), pipeline.proprioception
    suites = [record.suite for record in arrays.records]
    projections, robots = pipeline.projection(suites), pipeline.robot(suites)

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = next(ClipSampler(arrays, 1, frames, batch_size, generator))
        at_start = torch.rand(batch_size, generator=generator) < 0.5
        first = torch.where(at_start, clip.first_rows, clip.rows[:, 0])
        projection, robot = projections[clip.episodes].to(model.device), robots[clip.episodes].to(model.device)
        start_images = frames_to_pixels(arrays.frames[clip.first_rows]).to(model.device)
        start_images = start_images + 0.1 * torch.randn(batch_size, 3, 1, 1, generator=generator).to(model.device)
        in_motion = (first > clip.first_rows)[:, None].to(model.device)
        state = model.init_state(arrays.proprio[first].to(model.device))
        proprio_dim, losses = arrays.proprio.shape[1], []
        for k in range(frames):
            state = model(state, arrays.actions[first + k].to(model.device), start_images, projection, robot)
            target = arrays.proprio[first + k + 1].to(model.device)
            error = state[:, :proprio_dim] - target
            scaled = error / model.delta_std[robot]
            # Almost absolute: of the free motion, which is exact, contacts would otherwise leave no gradient.
            losses.append(F.smooth_l1_loss(scaled, torch.zeros_like(scaled), beta=0.1))
            if k < 3:
                told = torch.cat([target, state[:, proprio_dim:]], dim=1)
                state = torch.where(in_motion, told, state)
        logs = {"position_error_mm": 1000 * error[:, :3].norm(dim=-1).mean().item()}
        return torch.stack(losses).mean(), logs | {"finger_error_mm": 1000 * error[:, 6:].abs().mean().item()}

    return loss_fn


def contact_weights(arrays: EpisodeArrays) -> torch.Tensor:
    """How often each frame is drawn: four times as often near a movement of the fingers, float (N,).

    Whether a grasp holds is decided there; the arm at rest before and after has little to teach.
    """
    fingers = arrays.proprio[:, 6] - arrays.proprio[:, 7]
    moved = (fingers.diff(prepend=fingers[:1]).abs() > 0.004).float()
    moved[arrays.starts] = 0
    near = F.max_pool1d(moved[None, None], kernel_size=7, stride=1, padding=3)[0, 0]
    return 1 + 3 * near


def transformer_loss(
    pipeline: ProphetPipeline,
    arrays: EpisodeArrays,
    latents: torch.Tensor,
    *,
    batch_size: int,
    steps: int,
    imagined: "Imagination | None" = None,
    max_chunks: int = 2,
    moving_weight: float = 4.0,
    history_noise: float = 0.0,
) -> LossFn:
    """Rectified flow on chunks of latents, in the form of an error on the clean chunk.

    Most noise levels are 1 (pure noise), so that one sampling step is good; the others are logit-normal. The history is
    real, or, against drift, in three of four windows what Prophet showed there when it imagined the whole episode. A
    clean chunk that the model predicts, without gradient, is the history of the next: one chunk in the first half of
    training, then `max_chunks`. The error counts more where the chunk differs from the last history frame or from the
    first.

    Args:
        latents: float16 (N, C, h, w), all frames of `arrays` encoded.
        steps: length of the training, for the schedule of chunks.
        imagined: the episodes of `arrays` as Prophet imagines them.
        max_chunks: chunks in the second half of training.
        moving_weight: what a place counts in addition that changes as much as the mean.
        history_noise: standard deviation of noise on all history frames but the first; the usual remedy against drift
            where there is no own history.
    """
    transformer, device, chunk_frames = pipeline.transformer, pipeline.device, pipeline.chunk_frames
    suites = [record.suite for record in arrays.records]
    projections, robots = pipeline.projection(suites), pipeline.robot(suites)
    weights, holds = contact_weights(arrays), track_holds(arrays)

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        chunks = max_chunks if step >= 0.5 * steps else 1
        recent = transformer.buffer_frames - 1
        clip = next(ClipSampler(arrays, recent, chunks * chunk_frames, batch_size, generator, weights))
        projection, robot = projections[clip.episodes].to(device), robots[clip.episodes].to(device)
        history = latents[torch.cat([clip.first_rows[:, None], clip.rows[:, :recent]], dim=1)].float()
        if imagined is not None:
            own = torch.rand(batch_size, 1, 1, 1, 1, generator=generator) < 0.75
            history[:, 1:] = torch.where(own, imagined.history[clip.rows[:, :recent]].float(), history[:, 1:])
        history = history.to(device)
        losses = []
        for chunk in range(chunks):
            present = recent - 1 + chunk * chunk_frames
            rows = clip.rows[:, present : present + chunk_frames + 1]
            clean = latents[rows[:, 1:]].float().to(device)
            condition = _observed_condition(pipeline, arrays, holds, rows, projection, robot)
            sigma = compute_density_for_timestep_sampling("logit_normal", batch_size, 0.0, 1.0, generator=generator)
            pure = torch.rand(batch_size, generator=generator) < 0.7
            sigma = torch.where(pure, 1.0, sigma.clamp(min=0.02)).to(device)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            level = sigma[:, None, None, None, None]
            sample = (1 - level) * clean + level * noise
            given = history
            if history_noise:
                errors = history_noise * torch.randn(history[:, 1:].shape, generator=generator).to(device)
                given = torch.cat([history[:, :1], history[:, 1:] + errors], dim=1)
            carried = carry_latents(given, condition.motion, pipeline.vae.spatial_compression)
            velocity = transformer(sample, sigma, given, condition.scalars, condition.action_frames, carried)
            predicted = sample - level * velocity
            moved = (clean - history[:, :1]).abs() + (clean - history[:, -1:]).abs()
            moved = moved.mean(2, keepdim=True)
            weight = 1 + moving_weight * moved / moved.mean()
            losses.append((weight * (predicted - clean).square()).mean())
            history = advance_history(history, predicted.detach())
        logs = {f"loss_chunk_{chunk}": loss.item() for chunk, loss in enumerate(losses)}
        return torch.stack(losses).mean(), logs

    return loss_fn


def _observed_condition(
    pipeline: ProphetPipeline,
    arrays: EpisodeArrays,
    holds: torch.Tensor,
    rows: torch.Tensor,
    projection: torch.Tensor,
    robot: torch.Tensor,
) -> ChunkCondition:
    """The conditions of recorded chunks: rows (B, 1 + F), the present and the frames to come."""
    poses, after, actions = arrays.proprio[rows], holds[rows[:, 1:]], arrays.actions[rows[:, :-1]]
    device = pipeline.device
    return pipeline.observed_condition(poses.to(device), after.to(device), actions.to(device), projection, robot)


@torch.inference_mode()
def encode_frames(vae: ProphetAutoencoder, frames: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Encode uint8 frames (N, H, W, 3) to float16 latents (N, C, h, w) on the CPU."""
    batches = tqdm(frames.split(batch_size), desc="encoding frames", mininterval=5.0)
    return torch.cat([vae.encode(frames_to_pixels(batch).to(vae.device)).half().cpu() for batch in batches])


@dataclass(frozen=True)
class Imagination:
    """What Prophet makes of the episodes of some arrays, open loop from their first frames, given the true
    proprioception; rows as in the arrays. Episodes are imagined in batches of similar length, and frames beyond the
    last whole chunk of a batch's shortest one are real.

    Attributes:
        latents: float16 (N, C, h, w), of the transformer. frames: uint8 (N, H, W, 3), decoded from them.
        history: float16 (N, C, h, w), the frames encoded again.
    """

    latents: torch.Tensor
    frames: torch.Tensor
    history: torch.Tensor


@torch.inference_mode()
def imagine_training_episodes(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, latents: torch.Tensor, seed: int, batch_size: int = 64
) -> Imagination:
    """Imagine every episode of `arrays`, whose encoded frames are `latents`, float16 (N, C, h, w).

    Args:
        seed: of the noise.
    """
    device, chunk_frames = pipeline.device, pipeline.chunk_frames
    suites, holds = [record.suite for record in arrays.records], track_holds(arrays)
    projections, robots = pipeline.projection(suites), pipeline.robot(suites)
    imagined = Imagination(latents.clone(), arrays.frames.clone(), latents.clone())
    generator = torch.Generator().manual_seed(seed)
    by_length = arrays.lengths.argsort(stable=True)
    for episodes in tqdm(by_length.split(batch_size), desc="imagining", mininterval=5.0):
        chunks = (int(arrays.lengths[episodes].min()) - 1) // chunk_frames
        starts, projection = arrays.starts[episodes], projections[episodes].to(device)
        robot = robots[episodes].to(device)
        start = latest = frames_to_pixels(arrays.frames[starts]).to(device)
        history = latents[starts][:, None].float().to(device)
        history = history.repeat(1, pipeline.transformer.buffer_frames, 1, 1, 1)
        for chunk in range(chunks):
            rows = starts[:, None] + chunk * chunk_frames + torch.arange(chunk_frames + 1)
            condition = _observed_condition(pipeline, arrays, holds, rows, projection, robot)
            with torch.autocast(device.type, torch.bfloat16, enabled=best_precision(device) == "bf16"):
                pixels, clean = pipeline.generate(history, condition, start, latest, generator)
                encoded = pipeline.vae.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
            history, latest = advance_history(history, encoded), pixels[:, -1]
            imagined.latents[rows[:, 1:]] = clean.half().cpu()
            imagined.frames[rows[:, 1:]] = pixels_to_frames(pixels).cpu()
            imagined.history[rows[:, 1:]] = encoded.half().cpu()
    return imagined


def _standardize_latents(vae: ProphetAutoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Make the statistics of raw latents (N, C, h, w) part of the autoencoder; return the latents standardised."""
    mean, std = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_(std)
    return ((latents.float() - mean[:, None, None]) / std[:, None, None]).half()


def set_robots(pipeline: ProphetPipeline, arrays: EpisodeArrays) -> None:
    """Give every robot of `arrays` that the pipeline does not know a slot, with its statistics and its action mask: the
    numbers that are zero in all its actions are not obeyed. Suites that are new join their robot's.

    Raises:
        ValueError: there are more robots than slots, a suite is another robot's, or a known robot uses an action that
            it did not obey before.
    """
    model, robots = pipeline.proprioception, {name: list(suites) for name, suites in pipeline.config.robots}
    of_frame = torch.repeat_interleave(torch.arange(len(arrays.records)), arrays.lengths)
    last = arrays.starts + arrays.lengths - 1
    for name in sorted({record.robot for record in arrays.records}):
        own = torch.tensor([record.robot == name for record in arrays.records])[of_frame]
        inside = own.clone()  # frames that another one follows
        inside[last] = False
        used = (arrays.actions[inside] != 0).any(0).any(0)
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
        change = arrays.proprio[1:][inside[:-1]] - arrays.proprio[:-1][inside[:-1]]
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


def check_validation(pipeline: ProphetPipeline, arrays: EpisodeArrays) -> None:
    """Raise a ValueError where validation episodes are of a suite or robot without a slot."""
    known = {(name, suite) for name, suites in pipeline.config.robots for suite in suites}
    if unknown := {(record.robot, record.suite) for record in arrays.records} - known:
        raise ValueError(f"Validation has episodes of {sorted(unknown)}, training only of {sorted(known)}.")


def _psnr(error: torch.Tensor) -> float:
    """PSNR in dB of an error on pixels in [-1, 1]."""
    return float(-10 * torch.log10(error.detach().float().square().mean() / 4))


def _validate(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, out: Path, stage: str, writer: SummaryWriter, step: int
) -> None:
    """Replay 8 validation episodes of each suite open loop; log PSNR by horizon and write videos, real above
    imagined."""
    for suite in sorted({record.suite for record in arrays.records}):
        own = torch.tensor([k for k, record in enumerate(arrays.records) if record.suite == suite])
        chosen = own[torch.linspace(0, len(own) - 1, min(8, len(own))).long()]
        imagined, _ = replay_episodes(pipeline, arrays, chosen, range(len(chosen)))
        real = arrays.frames[frame_rows(arrays, chosen, pipeline.chunk_frames)]
        length = real.shape[1] - 1
        error = (imagined.float() - real.float()) / 127.5
        for frame in (pipeline.chunk_frames, 10, 20, length):
            if frame <= length:
                writer.add_scalar(f"{stage}/{suite}/validation_psnr_frame_{frame}", _psnr(error[:, frame]), step)
        writer.add_scalar(f"{stage}/{suite}/validation_psnr_episode", _psnr(error[:, 1:]), step)
        pairs = torch.cat([real, imagined], dim=2)  # (8, T, 2 H, W, 3)
        video = list(pairs.permute(1, 2, 0, 3, 4).flatten(2, 3).numpy())
        fps = pipeline.config.control_hz / pipeline.frame_stride
        imageio.mimwrite(out / f"validation-{stage}-{suite}-{step:06d}.mp4", video, fps=fps)


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
        ValueError: unknown preset, or one that does not go with `pretrained`.
        OSError: a folder of `pretrained` holds no model.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of {sorted(PRESETS)}.")
    recipe, out = PRESETS[preset], Path(out)
    if (pretrained is None) != ("autoencoder" in recipe):
        raise ValueError(
            'The preset "cosmos-2b", and no other, begins from pretrained weights: give it the folder of '
            f"Cosmos-Predict2-2B-Video2World. Got preset={preset!r} and pretrained={str(pretrained)!r}."
        )
    if (finished := finished_pipeline(out, device)) is not None:
        return finished
    stride = train_arrays.actions.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = recipe["models"]
        if pretrained is None:
            vae = ProphetAutoencoder(**models["autoencoder"]).to(device, memory_format=torch.channels_last)
        else:
            vae = ProphetCosmosAutoencoder.from_pretrained(
                Path(pretrained) / "vae", use_safetensors=True, local_files_only=True
            ).to(device)
        proprioception = ProprioceptionModel(frame_stride=stride, **models["proprioception"]).to(device)
        if pretrained is None:
            transformer = ProphetTransformer3DModel(**models["transformer"]).to(device)
        else:
            transformer = ProphetCosmosTransformer3DModel.from_cosmos(
                Path(pretrained) / "transformer", **models["transformer"]
            ).to(device)
    pipeline = ProphetPipeline(
        vae,
        transformer,
        proprioception,
        FlowMatchEulerDiscreteScheduler(),
        image_size=train_arrays.frames.shape[1],
        cameras=cameras,
        action_streams=action_streams,
    )

    set_robots(pipeline, train_arrays)
    check_validation(pipeline, val_arrays)
    fit_proprioception(pipeline, train_arrays, out, recipe, seed)

    if "autoencoder" in recipe:
        stage = dict(recipe["autoencoder"])
        projections = pipeline.projection([record.suite for record in train_arrays.records])
        loss_fn = autoencoder_loss(vae, train_arrays, projections, stage.pop("batch_size"))
        fit("autoencoder", vae, loss_fn, out, seed=seed, **stage)
        latents = _standardize_latents(vae, encode_frames(vae, train_arrays.frames))
    else:
        latents = encode_frames(vae, train_arrays.frames)
    fit_video(pipeline, train_arrays, val_arrays, latents, out, recipe, seed)
    save_pipeline(pipeline, out)
    return pipeline


def finished_pipeline(out: Path, device: str) -> ProphetPipeline | None:
    """What an earlier run wrote to `out / pipeline`, on `device`; if nothing, `out` is made for this run."""
    processes = PartialState(cpu=device == "cpu")  # makes "cuda" this process's own one
    finished = (out / "pipeline").exists()
    processes.wait_for_everyone()  # before the first process can make it exist
    if finished:
        return ProphetPipeline.from_pretrained(out / "pipeline").to(device)
    out.mkdir(parents=True, exist_ok=True)
    return None


def fit_proprioception(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, out: Path, recipe: dict[str, Any], seed: int
) -> None:
    """The stage of the proprioception, whose weights change in place; `recipe` as in `PRESETS`."""
    stage = dict(recipe["proprioception"])
    loss_fn = proprioception_loss(pipeline, arrays, stage.pop("batch_size"))
    fit("proprioception", pipeline.proprioception, loss_fn, out, seed=seed, **stage)


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
    """`STAGES`: transformer and decoder, whose weights change in place.

    Args:
        latents: float16 (N, C, h, w), all frames of `train_arrays` encoded.
        recipe: as in `PRESETS`.
        lora_rank: if given, the transformer learns in low-rank adapters, which are fused after each stage.
    """
    vae, transformer = pipeline.vae, pipeline.transformer
    vae.encoder.requires_grad_(False)  # from here on the transformer knows its latents
    for number, name in enumerate(STAGES):
        stage = dict(recipe[name])
        batch_size, max_chunks = stage.pop("batch_size"), stage.pop("max_chunks", 2)
        done = (out / name).exists()
        some, own_latents, imagined = train_arrays, latents, None
        if number and not done:
            # The models have changed: once more, what do they make of the episodes?
            some, rows = subset(train_arrays, IMAGINED_EPISODES, seed + number)
            own_latents = latents[rows]
            imagined = imagine_training_episodes(pipeline, some, own_latents, seed + number)
        part: ModelMixin = vae if name.startswith("decoder") else transformer
        finish = None
        if part is vae and imagined is not None:
            loss_fn = decoder_loss(pipeline, some, imagined, batch_size)
        else:
            loss_fn = transformer_loss(
                pipeline,
                some,
                own_latents,
                batch_size=batch_size,
                steps=stage["steps"],
                imagined=imagined,
                max_chunks=max_chunks,
            )
        if part is transformer and lora_rank is not None and not done:
            add_lora(transformer, lora_rank, seed + number)
            finish = partial(fuse_lora, transformer, out / f"{name}-lora" if PartialState().is_main_process else None)
        validate = partial(_validate, pipeline, val_arrays, out, name)
        fit(name, part, loss_fn, out, seed=seed, validate=validate, finish=finish, **stage)


def save_pipeline(pipeline: ProphetPipeline, out: Path) -> None:
    """Write `out / pipeline`, whole or not at all; of several processes the first one does."""
    if PartialState().is_main_process:
        temporary = out / ".pipeline.tmp"
        pipeline.save_pretrained(temporary)
        os.replace(temporary, out / "pipeline")
    PartialState().wait_for_everyone()
