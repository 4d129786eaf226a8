"""A learned judge: does the video show the task solved? Trained on real episodes with the simulator's verdicts."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from prophet_gym.data.camera import project_points, projections_of
from prophet_gym.data.episode import PROPRIO_DIM, finger_openings, per_arm
from prophet_gym.reward.base import clip_places

FINGER_SCALES = (0.02, 0.002)
"""Openings of the fingers that are one to the network, metres: a hand may be open or closed, and a closed one empty
(about 1 mm) or round the rim of a bowl (4 mm)."""

VIEW_DEPTHS = (0.0, 0.05, 0.1, 0.2)
"""How far below a hand it is looked at, metres."""
VIEW_STEPS, VIEW_STRIDE = 2, 4.0
"""Around each of these places, steps in each direction and the length of one, pixels of the frame."""
VIEW_DIM = 32
"""Numbers in which an arm's view is summed up."""


class SequenceWitness(nn.Module):
    """A recurrent network of what has been so far and the instruction, which says at each time if the task is solved.

    Args:
        input_dim: D, numbers at each time. embedding_dim: size of the instruction embedding. hidden_dim: width.
    """

    def __init__(self, input_dim: int, embedding_dim: int, hidden_dim: int = 96) -> None:
        super().__init__()
        self.sequence_in = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.SiLU(), nn.Dropout(0.1))
        self.task_in = nn.Sequential(nn.Dropout(0.3), nn.Linear(embedding_dim, hidden_dim))
        self.recurrent = nn.GRU(2 * hidden_dim, hidden_dim, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(hidden_dim, 1))

    def forward(
        self, sequence: torch.Tensor, embeddings: torch.Tensor, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T) after each element of the sequence (B, T, D), each of which depends on nothing later, and the
        memory (B, hidden_dim) after the last; given one, the sequence is taken for what follows."""
        hidden = self.sequence_in(sequence)
        task = self.task_in(embeddings.to(hidden.dtype))[:, None].expand_as(hidden)
        states, last = self.recurrent(torch.cat([hidden, task], dim=-1), None if memory is None else memory[None])
        return self.head(states)[..., 0], last[0]


class StartView(nn.Module):
    """What stood around each hand, and straight below it, when the episode began.

    Features of the start frame, taken where the camera sees those places: whether a hand opens above the plate or
    beside it depends on where the plate is, and by its start frame that is known to a fraction of a pixel.
    """

    def __init__(self) -> None:
        super().__init__()
        # Fine, for what counts is a matter of a pixel; and few channels, which are kept for a whole episode.
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Dropout2d(0.1),
        )
        offsets = torch.arange(-VIEW_STEPS, VIEW_STEPS + 1) * VIEW_STRIDE
        grid = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), dim=-1).flatten(0, 1)
        self.register_buffer("offsets", grid, persistent=False)
        self.head = nn.Sequential(nn.Linear(8 * len(VIEW_DEPTHS) * len(grid), VIEW_DIM), nn.SiLU())

    def features(self, starts: torch.Tensor) -> torch.Tensor:
        """Features (B, 8, H / 2, W / 2) of the first frames, uint8 (B, H, W, 3), H and W even: once an episode."""
        pixels = starts.permute(0, 3, 1, 2).to(self.head[0].weight.dtype).div_(127.5).sub_(1.0)  # a copy
        features: torch.Tensor = self.stem(pixels)
        return features

    def forward(self, features: torch.Tensor, proprio: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Look at each time.

        Args:
            features: float (B, 8, H / 2, W / 2), of the first frames.
            proprio: float (B, T, 8 K). projection: float32 (B, K, 3, 4), the cameras; zeros where it is not known.

        Returns:
            float (B, T, VIEW_DIM K), arm by arm; zeros where the camera is not known.
        """
        batch, arms = projection.shape[:2]
        hands = per_arm(proprio, arms)[..., :3]  # (B K, T, 3)
        below = hands.new_tensor([[0.0, 0.0, depth] for depth in VIEW_DEPTHS])
        places, _ = project_points(hands[:, :, None] - below, projection.flatten(0, 1))
        size = 2 * torch.tensor([features.shape[3], features.shape[2]], device=places.device)  # of the frame, pixels
        grid = 2 * (places[:, :, :, None] + self.offsets) / size - 1  # (B K, T, depths, offsets, 2)
        # One picture of all that an env's hands see, one time below the other.
        grid = grid.flatten(2, 3).unflatten(0, (batch, arms)).flatten(1, 2)
        seen = F.grid_sample(features, grid, align_corners=False)  # (B, 8, K T, depths offsets)
        seen = self.head(seen.unflatten(2, (arms, -1)).permute(0, 3, 2, 1, 4).flatten(3))  # (B, T, K, VIEW_DIM)
        return (seen * projection.flatten(2).any(dim=2)[:, None, :, None]).flatten(2)


class SuccessClassifier(ModelMixin, ConfigMixin):
    r"""
    Two witnesses, heard apart: convolutions of (start frame, last two frames, instruction), and a recurrent network of
    (proprioception until now, what the start frame shows there, instruction).

    The start frame shows where things were, the last two where they are and whether they still move. The instruction
    modulates the feature maps (FiLM) and selects what to look at. The motion says where the fingers closed, whether
    something kept them apart, and where they opened again, also when the picture has become vague; the start frame
    says over what (see :class:`StartView`). Neither learns to rely on the other: each has a loss of its own, and
    `logit_scale` and `logit_bias` weigh the two logits on held-out data (logistic regression, which is Platt scaling of
    two scores); `motion_scale` and `motion_bias` do so for the motion where there is no video.

    Args:
        channels (`tuple[int, int, int]`, defaults to `(32, 64, 96)`): widths at 1/2, 1/4 and 1/8 of the resolution.
        embedding_dim (`int`, defaults to `384`): size of the instruction embedding.
        num_arms (`int`, defaults to `1`): K; the proprioception has P = 8 K numbers.
        hidden_dim (`int`, defaults to `96`): width of the recurrent network.
        cameras (`dict[str, list[list[float]]]`, *optional*): for each suite whose camera is known its 3 x 4 matrix, in
            pixels of the frames; of other suites the motion is heard without what the start frame shows.
        threshold (`float` or `dict[str, float]`, defaults to `0.5`): probability from which an episode counts as
            solved, or that of each suite; chosen on held-out episodes so that few failures pass.
        motion_threshold (`float` or `dict[str, float]`, *optional*): the same where there is no video; None where the
            motion alone was never calibrated.
        balanced_threshold, balanced_motion_threshold (`float` or `dict[str, float]`, *optional*): those at which as
            many failures of held-out episodes pass as successes are missed, so that rates are right on the whole.
    """

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, int, int] = (32, 64, 96),
        embedding_dim: int = 384,
        num_arms: int = 1,
        hidden_dim: int = 96,
        cameras: dict[str, list[list[float]]] | None = None,
        threshold: float | dict[str, float] = 0.5,
        motion_threshold: float | dict[str, float] | None = None,
        balanced_threshold: float | dict[str, float] | None = None,
        balanced_motion_threshold: float | dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(36, first, 3, padding=1))
        self.down = nn.ModuleList(
            [nn.Conv2d(first, second, 4, stride=2, padding=1), nn.Conv2d(second, third, 4, stride=2, padding=1)]
        )
        self.mix = nn.Conv2d(third, third, 3, padding=1)
        self.film = nn.Linear(embedding_dim, 2 * (second + third))
        self.attention = nn.Conv2d(third, 4, 1)
        self.head = nn.Sequential(nn.Linear(4 * (third + 2), 128), nn.SiLU(), nn.Linear(128, 1))
        # The pose, its distance from the first one, the opening of the fingers on both scales, and what is there.
        proprio_dim = PROPRIO_DIM * num_arms
        told_dim = 2 * proprio_dim + (len(FINGER_SCALES) + VIEW_DIM) * num_arms
        self.view = StartView()
        self.motion = SequenceWitness(told_dim, embedding_dim, hidden_dim)
        # Statistics of the training data and of the calibration; set by training, saved with the weights.
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))
        self.register_buffer("logit_scale", torch.full((2,), 0.5))
        self.register_buffer("logit_bias", torch.zeros(()))
        self.register_buffer("motion_scale", torch.ones(()))
        self.register_buffer("motion_bias", torch.zeros(()))

    @classmethod
    def tiny_random(cls, seed: int = 0) -> "SuccessClassifier":
        """Build an untrained classifier in a very small configuration, for tests."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(channels=(4, 8, 8), hidden_dim=8, threshold=0.9, motion_threshold=0.9).eval()

    @property
    def threshold(self) -> float | dict[str, float]:
        """Probability from which an episode counts as solved, or that of each suite."""
        return self.config.threshold

    @property
    def motion_threshold(self) -> float | dict[str, float] | None:
        """The same for probabilities of the motion alone; None where that was never calibrated."""
        return self.config.motion_threshold

    @property
    def balanced_threshold(self) -> float | dict[str, float] | None:
        """Probability from which as many episodes count as solved as are; None where it was never calibrated."""
        return self.config.balanced_threshold

    @property
    def balanced_motion_threshold(self) -> float | dict[str, float] | None:
        """The same for probabilities of the motion alone."""
        return self.config.balanced_motion_threshold

    def forward(self, clips: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the logits of the frames alone.

        Args:
            clips: uint8 (B, 3, H, W, 3): start frame, last frame but one, last frame. H and W are multiples of 8.
            embeddings: float (B, embedding_dim).

        Returns:
            float (B,).
        """
        unshuffle, convolution = self.stem
        # Folded as bytes, which are a quarter of the floats, into the layout that the convolution wants.
        folded = unshuffle(clips.permute(0, 1, 4, 2, 3).flatten(1, 2)).contiguous(memory_format=torch.channels_last)
        pixels = folded.to(convolution.weight.dtype).div_(127.5).sub_(1.0)  # (B, 36, H / 2, W / 2)
        hidden = F.silu(convolution(pixels))
        modulation = self.film(embeddings.to(pixels.dtype))
        for layer in self.down:
            hidden = layer(hidden)
            width = 2 * hidden.shape[1]
            scale, shift = modulation[:, :width].chunk(2, dim=1)
            modulation = modulation[:, width:]
            hidden = F.silu(hidden * (1 + scale[..., None, None]) + shift[..., None, None])
        hidden = hidden + F.silu(self.mix(hidden))
        # Attention pooling that keeps where each head looked: (B, 4, h w) weights over (B, C + 2, h w) values.
        height, width = hidden.shape[-2:]
        rows = torch.linspace(-1, 1, height, device=hidden.device, dtype=hidden.dtype)
        columns = torch.linspace(-1, 1, width, device=hidden.device, dtype=hidden.dtype)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(hidden), -1, -1, -1)
        values = torch.cat([hidden, grid], dim=1).flatten(2)
        weights = self.attention(hidden).flatten(2).softmax(dim=-1)
        return self.head(torch.einsum("bkn,bcn->bkc", weights, values).flatten(1))[:, 0]

    def projection(self, suites: Sequence[str]) -> torch.Tensor:
        """The camera of each arm in some episodes, float32 (B, K, 3, 4); zeros where it is not known."""
        projection = projections_of(self.config.cameras or {}, suites).to(self.device)
        return projection[:, None].expand(-1, self.config.num_arms, -1, -1)

    def motion_logits(
        self, proprio: torch.Tensor, embeddings: torch.Tensor, starts: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of the motion and of what the start frame shows along it, at each time.

        Args:
            proprio: float (B, T, P), metres and radians, from the start on.
            embeddings: float (B, embedding_dim).
            starts: uint8 (B, H, W, 3), the first frames.
            projection: float32 (B, K, 3, 4), see `projection`.

        Returns:
            float (B, T); each depends on nothing later.

        Raises:
            ValueError: the proprioception is that of robots of another number of arms.
        """
        return self._go_on(self._begin(proprio[:, 0], starts), proprio, embeddings, projection)[0]

    def _begin(self, proprio: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is remembered of episodes that have not gone on from there: (B, P) and uint8 (B, H, W, 3)."""
        if proprio.shape[1] != len(self.proprio_mean):
            raise ValueError(
                f"This judge was trained on proprioception of {len(self.proprio_mean)} numbers and got "
                f"{proprio.shape[1]}: train one for this world model (`prophet train-reward --world-model`)."
            )
        motion = proprio.new_zeros(len(proprio), self.config.hidden_dim)
        return {"motion": motion, "first_pose": proprio, "view": self.view.features(starts)}

    def _go_on(
        self,
        memory: Mapping[str, torch.Tensor],
        proprio: torch.Tensor,
        embeddings: torch.Tensor,
        projection: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the motion (B, n) at the next n times, whose proprioception is (B, n, P), and its memory then."""
        poses, first = ((poses - self.proprio_mean) / self.proprio_std for poses in (proprio, memory["first_pose"]))
        opening = (finger_openings(proprio)[..., None] / proprio.new_tensor(FINGER_SCALES)).flatten(-2)
        seen = self.view(memory["view"], proprio, projection)
        told = torch.cat([poses, poses - first[:, None], opening.clamp(-1.0, 4.0), seen], dim=-1)
        logits, last = self.motion(told, embeddings, memory["motion"])
        return logits, last

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities (B,) of the logits of frames and motion, (B, 2)."""
        return torch.sigmoid((logits * self.logit_scale).sum(-1) + self.logit_bias)

    def motion_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities of the logits of the motion alone, same shape."""
        return torch.sigmoid(logits * self.motion_scale + self.motion_bias)

    @torch.inference_mode()
    def score(
        self,
        frames: NDArray[np.uint8] | None,
        proprio: NDArray[np.float32],
        lengths: NDArray[np.int64],
        instructions: Sequence[str],
        embeddings: NDArray[np.float32],
        starts: NDArray[np.uint8],
        suites: Sequence[str],
    ) -> NDArray[np.float32]:
        """Calibrated success probabilities, see `RewardModel.score`."""
        rows = np.arange(len(lengths))
        motion, task, first = (torch.from_numpy(values).to(self.device) for values in (proprio, embeddings, starts))
        moved = self.motion_logits(motion, task, first, self.projection(suites))[rows, lengths - 1]
        clips = None
        if frames is not None:
            clips = np.stack([frames[rows, place] for place in clip_places(lengths)], axis=1)
        return self._verdicts(clips, moved, task)

    @torch.inference_mode()
    def init_memory(self, proprio: NDArray[np.float32], starts: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        """What it knows before the first frame, see `RememberingRewardModel.init_memory`."""
        return self._begin(torch.from_numpy(proprio).to(self.device), torch.from_numpy(starts).to(self.device))

    @torch.inference_mode()
    def score_next(
        self,
        memory: Mapping[str, torch.Tensor],
        clips: NDArray[np.uint8] | None,
        proprio: NDArray[np.float32],
        instructions: Sequence[str],
        embeddings: NDArray[np.float32],
        suites: Sequence[str],
    ) -> tuple[NDArray[np.float32], dict[str, torch.Tensor]]:
        """The same, of rollouts that go on, see `RememberingRewardModel.score_next`."""
        motion, task = (torch.from_numpy(values).to(self.device) for values in (proprio, embeddings))
        logits, last = self._go_on(memory, motion, task, self.projection(suites))
        return self._verdicts(clips, logits[:, -1], task), {"motion": last}

    def _verdicts(
        self, clips: NDArray[np.uint8] | None, moved: torch.Tensor, embeddings: torch.Tensor
    ) -> NDArray[np.float32]:
        """Probabilities (B,) by clips, as in `forward`, and logits of the motion (B,); or by the latter alone."""
        if clips is None:
            probability = self.motion_probability(moved)
        else:
            seen = self(torch.from_numpy(clips).to(self.device), embeddings)
            probability = self.probability(torch.stack([seen, moved], dim=1))
        return probability.float().cpu().numpy()
