"""What proprioception and autoencoder learn from, and what they share with the rollouts of the video."""

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch.nn import functional as F

from prophet_gym.data.clips import ClipSampler, EpisodeArrays, episode_folds
from prophet_gym.data.episode import finger_openings, per_arm
from prophet_gym.training import LossFn
from prophet_gym.world_model.action_conditioning import carry, draw_action_frames
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.imagination import hand_motions, track_holds
from prophet_gym.world_model.pipeline import ProphetPipeline, frames_to_pixels

CROP = 48
"""Side of the autoencoder's training crops, pixels: it is convolutional, and most of a frame is still background."""

GRIP = 0.002
"""Scale of the fingers' opening on which an empty hand (about 1 mm) differs from one round a rim (4 mm), metres."""


class ReplayLoss:
    """What losses have in common on rollouts that last: `batch_size` robots replay recorded episodes, and each step of
    the training takes them further from where the last one left them. One whose episode is over begins another.

    Where the robots are is part of a run's checkpoint, see `fit`.

    Args:
        weights: float (E,), how often each episode of `arrays` is drawn.
    """

    def __init__(
        self, pipeline: ProphetPipeline, arrays: EpisodeArrays, batch_size: int, weights: torch.Tensor
    ) -> None:
        self.arrays, self.batch_size, self._weights = arrays, batch_size, weights
        self._projections, self._robots = pipeline.projection(arrays.suites), pipeline.robot(arrays.suites)
        # Where each robot is: its episode, the frame in it, and what it carries on. Empty before the first step.
        self._rollouts: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where the robots are; empty before the first step."""
        return self._rollouts

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from there."""
        self._rollouts = state

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        """Episodes to begin, int64 (B,)."""
        return torch.multinomial(self._weights, self.batch_size, replacement=True, generator=generator)

    def _go_on(
        self, drawn: torch.Tensor, uniform: torch.Tensor, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where each robot goes on: its episode and the frame in it, int64 (B,), and whether it begins there, bool.

        Args:
            drawn: int64 (B,), the episodes that take the place of those that have less than `stride` frames left.
            uniform: (B,) in [0, 1): before the first step, where in them; so that they do not all begin anew at once.
        """
        if not (before := self._rollouts):
            time = (uniform * ((self.arrays.lengths[drawn] - 1) // stride)).long() * stride
            return drawn, time, torch.ones_like(drawn, dtype=torch.bool)
        over = before["time"] + stride > self.arrays.lengths[before["episodes"]] - 1
        return torch.where(over, drawn, before["episodes"]), torch.where(over, 0, before["time"]), over


class ProprioceptionLoss(ReplayLoss):
    """Error of one member of the proprioception on its own rollouts, in units of one frame's usual change, and of the
    fingers' opening on a logarithmic scale: whether a closed hand is empty decides an episode.

    Truncated backpropagation through time: each step takes the robots `frames` frames further, see `ReplayLoss`. Before
    a step a robot may be told its true proprioception, while its velocity and memory stay its own: always in the
    beginning, ever more rarely until four fifths of the training (scheduled sampling, Bengio et al. 2015, arXiv
    1506.03099). What a contact does is learned where it happens, and not where a bad estimate believes it to be.

    Suites with few episodes are drawn more often than their share, see `suite_weights`. Each member learns from all
    folds of the episodes but its own, see `episode_folds` (from all, if there are no others): the members differ, and
    every episode can be imagined by one that has not learned from it.

    Args:
        steps: length of the training, for the schedule.
    """

    def __init__(
        self,
        pipeline: ProphetPipeline,
        arrays: EpisodeArrays,
        batch_size: int,
        steps: int,
        frames: int = 4,
        member: int = 0,
    ) -> None:
        others = episode_folds(arrays, pipeline.num_members) != member
        super().__init__(pipeline, arrays, batch_size, (others | ~others.any()) * suite_weights(arrays))
        self.model, self.steps, self.frames = pipeline.proprioception.member(member), steps, frames
        self._rehearsed = arrays.rehearsed
        self._pixels: torch.Tensor | None = None  # the robots' first frames

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self._pixels = None

    def __call__(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        model, arrays, device = self.model, self.arrays, self.model.device
        rollouts, begins = self._begin_and_tell(step, generator)
        episodes, state = rollouts["episodes"], rollouts["state"]
        first = arrays.starts[episodes] + rollouts["time"]
        steps_left = arrays.lengths[episodes] - 1 - rollouts["time"]
        pixels = self._look(rollouts, begins)
        projection, robot = self._projections[episodes].to(device), self._robots[episodes].to(device)
        losses, errors = [], []
        for frame in range(self.frames):
            rows = first + torch.tensor(frame).minimum(steps_left - 1)  # past an episode's end its last step, unused
            state = model(state, arrays.actions[rows].to(device), pixels, projection, robot)
            target = arrays.proprio[rows + 1].to(device)
            error = state[:, : model.proprio_dim] - target
            grip = _log_opening(state[:, : model.proprio_dim]) - _log_opening(target)
            loss = _almost_absolute(error / model.delta_std[robot]) + _almost_absolute(grip)
            inside = (frame < steps_left).to(device)
            losses.append(loss[inside])
            counted = (model.arm_mask[robot] & inside[:, None]).flatten()
            errors.append(per_arm(error.detach(), model.config.num_arms)[counted])
        self._rollouts = rollouts | {"time": rollouts["time"] + self.frames, "state": state.detach()}
        arms = torch.cat(errors)
        logs = {"position_error_mm": 1000 * arms[:, :3].norm(dim=-1).mean().item()}
        return torch.cat(losses).mean(), logs | {"finger_error_mm": 1000 * arms[:, 6:].abs().mean().item()}

    def _look(self, rollouts: dict[str, torch.Tensor], begins: torch.Tensor) -> torch.Tensor:
        """First frames as pixels (B, 3, H, W); of those that went on what was made of them before."""
        device, frames = self.model.device, self.arrays.first_frames
        if self._pixels is None:  # not carried in a checkpoint
            begins = torch.ones_like(begins)
            self._pixels = torch.empty(len(begins), 3, *frames.shape[1:3], device=device)
        new = frames_to_pixels(frames[rollouts["episodes"][begins]]) + rollouts["gain"][begins]
        self._pixels[begins.to(device)] = new.to(device)
        return self._pixels

    def _begin_and_tell(self, step: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The rollouts, with new episodes in place of those that are over, and the truth for those that are told it;
        with how bright their pictures are, and the states that they believe in. And which ones are new, bool (B,)."""
        arrays, count, device = self.arrays, self.batch_size, self.model.device
        drawn = self._draw(generator)
        gain = 0.1 * torch.randn(count, 3, 1, 1, generator=generator)
        uniform = torch.rand(2, count, generator=generator)
        episodes, time, begins = self._go_on(drawn, uniform[1], stride=1)
        told = uniform[0] < max(0.02, 1 - 1.2 * step / self.steps)
        if before := self._rollouts:
            lost = ~before["state"].isfinite().all(dim=1).cpu()  # an overflow is not kept: the robot begins anew
            episodes, time, begins = torch.where(lost, drawn, episodes), torch.where(lost, 0, time), begins | lost
            gain = torch.where(begins[:, None, None, None], gain, before["gain"])
        true = arrays.proprio[arrays.starts[episodes] + time].to(device)
        state = self.model.init_state(true, rehearsed=self._rehearsed[episodes].to(device))
        if before:
            state = torch.where(begins[:, None].to(device), state, before["state"].to(device))
        believed, rest = state.tensor_split([true.shape[1]], dim=1)
        believed = torch.where(told[:, None].to(device), true, believed)
        state = torch.cat([believed, rest], dim=1)
        return {"episodes": episodes, "time": time, "gain": gain, "state": state}, begins


def _almost_absolute(error: torch.Tensor) -> torch.Tensor:
    """Mean of errors (B, P), for each of B: of the free motion, which is exact, contacts would leave no gradient if it
    were squared."""
    return F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1, reduction="none").mean(dim=1)


def _log_opening(proprio: torch.Tensor) -> torch.Tensor:
    """log(1 + opening / GRIP) of the fingers of proprioceptions (B, 8 K): (B, K)."""
    return torch.log1p(finger_openings(proprio).clamp(min=-0.9 * GRIP) / GRIP)


def autoencoder_loss(
    vae: ProphetAutoencoder, arrays: EpisodeArrays, projections: torch.Tensor, batch_size: int, chunk_frames: int
) -> LossFn:
    """Error of encoded and decoded crops of what moves and what has colour.

    Half of the decodings have to do without the carried frames and the action frame: the latents must learn to show
    everything. The reference is the episode's first frame, or at times another one, because a user's start may come
    from anywhere. The latents get noise of a random level, so that the decoder forgives the transformer's errors.

    Args:
        projections: float32 (E, K, 3, 4), the camera of each episode of `arrays`.
        chunk_frames: over how many frames at most something is carried.
    """

    holds, sampler, device = track_holds(arrays), ClipSampler(arrays, chunk_frames, batch_size), vae.device

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = sampler.draw(generator)
        elsewhere = arrays.lengths[clip.episodes] * torch.rand(batch_size, generator=generator)
        usual = torch.rand(batch_size, generator=generator) < 0.75
        reference_rows = clip.first_rows + torch.where(usual, 0, elsewhere.long())
        frame = torch.randint(1, 1 + chunk_frames, (batch_size,), generator=generator)
        rows = clip.rows[torch.arange(batch_size), frame]
        window = _Window.choose(arrays, rows, reference_rows, generator)
        images = arrays.frames[torch.stack([rows, reference_rows, clip.rows[:, 0], clip.first_rows])].to(device)
        pixels, reference = window.pixels(images[0]), window.pixels(images[1])
        shown = frames_to_pixels(images[2:]).transpose(0, 1)
        motion = hand_motions(arrays, holds, clip.rows[:, 0], rows, projections[clip.episodes])
        carried = window.carried(shown, motion.to(device))
        poses, projection = arrays.proprio[rows].to(device), projections[clip.episodes].to(device)
        drawn = window.drawn(poses, projection, shown.shape[-1])
        alone = (torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5).to(device)
        carried = torch.where(alone[:, None], reference[:, None], carried)
        drawn = torch.where(alone, 0.0, drawn)
        latents = vae.encode(pixels)
        level = 0.2 * torch.rand(batch_size, 1, 1, 1, generator=generator) * latents.detach().std().cpu()
        noise = (level * torch.randn(latents.shape, generator=generator)).to(latents)
        decoded = vae.decode((latents + noise)[:, None], reference, carried[:, None], drawn[:, None])[:, 0]
        loss = pixel_loss(decoded, pixels, reference).mean() + 1e-4 * latents.square().mean()
        return loss, {"psnr": error_psnr(decoded - pixels)}

    return loss_fn


def noise_levels(count: int, pure: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (count,) of training, in (0, 1]: a share `pure` of them is 1, so that one sampling step is good, the
    others are logit-normal."""
    sigma = compute_density_for_timestep_sampling("logit_normal", count, 0.0, 1.0, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < pure, 1.0, sigma.clamp(min=0.02))


def latent_error(predicted: torch.Tensor, clean: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Squared error of each frame of chunks (B, F, C, h, w), (B, F). A place counts more, five times if it changes as
    much as the mean, where the chunk differs from the first or the last frame of the history."""
    moved = (clean - history[:, :1]).abs() + (clean - history[:, -1:]).abs()
    moved = moved.mean(2, keepdim=True)
    weight = 1 + 4 * moved / moved.mean().clamp(min=1e-6)  # where nothing moves in any of them
    return (weight * (predicted - clean).square()).mean((2, 3, 4))


def suite_weights(arrays: EpisodeArrays) -> torch.Tensor:
    """How often each episode is drawn, float (E,), so that a suite's share of the frames is in proportion to the root
    of how many it has: else a robot with a twentieth of the episodes would be forgotten."""
    suites = sorted(set(arrays.suites))
    suite = torch.tensor([suites.index(suite) for suite in arrays.suites])
    return suite.bincount(arrays.lengths.double()).rsqrt()[suite]


def contact_weights(arrays: EpisodeArrays) -> torch.Tensor:
    """What each frame counts: four times as much near a movement of the fingers, float (N,).

    Whether a grasp holds is decided there; the arm at rest before and after has little to teach.
    """
    fingers = finger_openings(arrays.proprio)
    moved = (fingers.diff(dim=0, prepend=fingers[:1]).abs() > 0.004).any(dim=1).float()
    moved[arrays.starts] = 0
    reach = 3  # frames
    # So far apart that no episode reaches into the next one.
    rows = torch.arange(len(moved))
    place = rows + reach * torch.searchsorted(arrays.starts, rows, right=True)
    apart = torch.zeros(int(place[-1]) + 1).index_put((place,), moved)
    near = F.max_pool1d(apart[None, None], kernel_size=2 * reach + 1, stride=1, padding=reach)[0, 0, place]
    return 1 + 3 * near


def pixel_loss(decoded: torch.Tensor, pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Squared error on pixels and L1 on their finite differences, of images (N, 3, H, W) each: (N,).

    Absolute error alone paints small bright objects in the grey of the floor, and the object is what a policy is judged
    by. What differs from the reference counts five times: the rest can be copied from it.
    """
    error = decoded - pixels
    weight = 1 + 4 * ((pixels - reference).abs().amax(1, keepdim=True) > 0.1)
    edges = error.diff(dim=-1).abs().mean((1, 2, 3)) + error.diff(dim=-2).abs().mean((1, 2, 3))
    return 10 * (weight * error.square()).mean((1, 2, 3)) + edges


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
        """Images (N, M, 3, H, W), moved by `motion` (N, M K, 3), in the windows: (N, M K, 3, CROP, CROP)."""
        moved = carry(images, motion[:, None])[:, 0]
        return self.crop(moved.flatten(1, 2)).unflatten(1, moved.shape[1:3])

    def drawn(self, poses: torch.Tensor, projection: torch.Tensor, image_size: int) -> torch.Tensor:
        """The action frames of poses (N, P) in the windows, (N, 3, CROP / 2, CROP / 2)."""
        return self.crop(draw_action_frames(poses[:, None], projection, image_size)[:, 0], 2)


def error_psnr(error: torch.Tensor) -> float:
    """PSNR in dB of an error on pixels in [-1, 1]."""
    return float(-10 * torch.log10(error.detach().float().square().mean() / 4))
