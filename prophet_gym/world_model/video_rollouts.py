"""Transformer and decoder trained together, on rollouts of their own that last from one training step to the next."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from prophet_gym.data.clips import EpisodeArrays
from prophet_gym.world_model.action_conditioning import carry
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.cosmos import ProphetCosmosAutoencoder, ProphetCosmosTransformer3DModel
from prophet_gym.world_model.history import advance_history
from prophet_gym.world_model.imagination import has_chunk, observed_condition, track_holds
from prophet_gym.world_model.losses import (
    ReplayLoss,
    contact_weights,
    error_psnr,
    latent_error,
    noise_levels,
    pixel_loss,
    suite_weights,
)
from prophet_gym.world_model.pipeline import ProphetPipeline, carry_latents, frames_to_pixels
from prophet_gym.world_model.transformer import ProphetTransformer3DModel

LATENT_WEIGHT = 0.3
"""What the error in latents counts beside that in pixels; they are about as large then."""
TOLD = 0.05
"""Share of the rollouts that are told the true past before a step, once the training is past its first fifth."""


class VideoModels(ModelMixin, ConfigMixin):
    """Autoencoder and transformer of a pipeline as one module, whose weights are the pipeline's own.

    Args:
        vae_config, transformer_config: of the two, with the name of the class as "_class_name".
    """

    @register_to_config
    def __init__(self, vae_config: dict[str, Any], transformer_config: dict[str, Any]) -> None:
        super().__init__()
        classes: dict[str, Any] = {
            kind.__name__: kind
            for kind in (
                ProphetAutoencoder,
                ProphetCosmosAutoencoder,
                ProphetTransformer3DModel,
                ProphetCosmosTransformer3DModel,
            )
        }
        self.vae, self.transformer = (
            classes[config["_class_name"]](**{key: value for key, value in config.items() if not key.startswith("_")})
            for config in (vae_config, transformer_config)
        )

    @classmethod
    def of(cls, pipeline: ProphetPipeline) -> "VideoModels":
        """Those of a pipeline."""
        parts = {"vae": pipeline.vae, "transformer": pipeline.transformer}
        configs = {
            f"{name}_config": {key: value for key, value in part.config.items() if not key.startswith("_")}
            | {"_class_name": type(part).__name__}
            for name, part in parts.items()
        }
        with torch.device("meta"):
            models = cls(**configs)
        for name, part in parts.items():
            setattr(models, name, part)
        return models


class VideoRolloutLoss(ReplayLoss):
    """Error of transformer and decoder on their own rollouts, in latents and in pixels.

    Recorded episodes are replayed given the true proprioception, see `ReplayLoss`, and each step imagines the next
    chunk of all of them: from the latents of what was shown before, encoded again, and from the picture shown last,
    without gradient. So the models learn at every step to go on from what they make now of the past, however long ago
    an episode began, and the decoder learns together with the transformer whose latents it gets. Before a step a
    rollout may be told the true past instead: always in the beginning, ever more rarely in the first fifth of the
    training, and `TOLD` from then on (scheduled sampling, Bengio et al. 2015, arXiv 1506.03099).

    A fifth of the chunks is predicted from a sample that is not pure noise and so knows a part of the truth; what is
    made of these is carried on like the others.

    Suites with few episodes are drawn more often than their share, see `suite_weights`, and chunks where fingers move
    count more, see `contact_weights`.

    Args:
        latents: float16 (N, C, h, w), all frames of `arrays` encoded.
        steps: length of the training, for the schedule.
        told: share of the rollouts that are told the true past after the first fifth; 1 is no history of their own.
        history_noise: standard deviation of noise on all the history that the transformer is given but the first frame,
            the usual remedy against drift where there is no own history.

    Raises:
        ValueError: no episode has a whole chunk, see `has_chunk`.
    """

    def __init__(
        self,
        pipeline: ProphetPipeline,
        arrays: EpisodeArrays,
        latents: torch.Tensor,
        batch_size: int,
        steps: int,
        told: float = TOLD,
        history_noise: float = 0.0,
    ) -> None:
        super().__init__(pipeline, arrays, batch_size, has_chunk(pipeline, arrays) * suite_weights(arrays))
        self.pipeline, self.latents, self.steps = pipeline, latents, steps
        self.told, self.history_noise = told, history_noise
        self._holds = track_holds(arrays)
        contact = contact_weights(arrays)
        self._contact = contact / contact.mean()

    def __call__(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        pipeline, arrays, device = self.pipeline, self.arrays, self.pipeline.device
        rollouts = self._begin_and_tell(step, generator)
        episodes, history, latest = rollouts["episodes"], rollouts["history"], rollouts["latest"]
        rows = (arrays.starts[episodes] + rollouts["time"])[:, None] + torch.arange(pipeline.chunk_frames + 1)
        clean = self.latents[rows[:, 1:]].to(device).float()
        start, real = self._pixels(arrays.starts[episodes]), self._pixels(rows[:, 1:])
        projection, robot = self._projections[episodes].to(device), self._robots[episodes].to(device)
        condition = observed_condition(pipeline, arrays, self._holds, rows, projection, robot)

        sigma = noise_levels(self.batch_size, 0.8, generator).to(device)
        level = sigma[:, None, None, None, None]
        sample = (1 - level) * clean + level * torch.randn(clean.shape, generator=generator).to(device)
        given = history
        if self.history_noise:
            errors = self.history_noise * torch.randn(history[:, 1:].shape, generator=generator).to(history)
            given = torch.cat([history[:, :1], history[:, 1:] + errors], dim=1)
        carried = carry_latents(given, condition.motion, pipeline.vae.spatial_compression)
        velocity = pipeline.transformer(sample, sigma, given, condition.scalars, condition.action_frames, carried)
        predicted = sample - level * velocity.float()
        carried = carry(torch.stack([latest, start], dim=1), condition.motion)
        pixels = pipeline.vae.decode(predicted, start, carried, condition.action_frames[:, 1:]).float()

        in_latents = latent_error(predicted, clean, history)
        reference = start[:, None].expand_as(real)
        in_pixels = pixel_loss(pixels.flatten(0, 1), real.flatten(0, 1), reference.flatten(0, 1)).view_as(in_latents)
        with torch.no_grad():
            shown = pixels.clamp(-1, 1)
            encoded = pipeline.vae.encode(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
        self._rollouts = {
            "episodes": episodes,
            "time": rollouts["time"] + pipeline.chunk_frames,
            "history": advance_history(history, encoded),
            "latest": shown[:, -1].contiguous(),
        }
        loss = (self._contact[rows[:, 1:]].to(device) * (LATENT_WEIGHT * in_latents + in_pixels)).mean()
        return loss, {"latent_error": in_latents.mean().item(), "psnr": error_psnr(pixels - real)}

    def _begin_and_tell(self, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The rollouts, with new episodes in place of those that are over, and the true past for those that are told
        it; with their histories of latents, and the pictures shown last."""
        drawn = self._draw(generator)
        uniform = torch.rand(2, self.batch_size, generator=generator)
        episodes, time, begins = self._go_on(drawn, uniform[1], self.pipeline.chunk_frames)
        told = begins | (uniform[0] < max(self.told, 1 - 5 * step / self.steps))
        first, now = self.arrays.starts[episodes], self.arrays.starts[episodes] + time
        recent = self.pipeline.transformer.buffer_frames - 1
        past = torch.cat([first[:, None], (now[:, None] + torch.arange(1 - recent, 1)).maximum(first[:, None])], dim=1)
        history, latest = self.latents[past].to(self.pipeline.device).float(), self._pixels(now)
        if before := self._rollouts:
            told = told.to(self.pipeline.device)
            told |= ~before["history"][:, -1].isfinite().flatten(1).all(dim=1).to(told.device)  # overflows are not kept
            history = torch.where(told[:, None, None, None, None], history, before["history"].to(history))
            latest = torch.where(told[:, None, None, None], latest, before["latest"].to(latest))
        return {"episodes": episodes, "time": time, "history": history, "latest": latest}

    def _pixels(self, rows: torch.Tensor) -> torch.Tensor:
        """The pictures of some rows (...), float (..., 3, H, W) in [-1, 1] on the pipeline's device."""
        return frames_to_pixels(self.arrays.frames[rows].to(self.pipeline.device))
