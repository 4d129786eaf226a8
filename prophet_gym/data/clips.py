"""Training windows for the world model: all frames of a split in memory, and random clips as indices into them."""

import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prophet_gym.data.episode import ACTION_DIM, GRIPPERS, PROPRIO_DIM
from prophet_gym.data.lerobot_format import EpisodeDataset, EpisodeRecord, check_video


@dataclass(frozen=True, eq=False)
class EpisodeArrays:
    """Many episodes end to end; row n of every tensor belongs to frame n.

    :param frames: uint8 (N, H, W, 3), upright RGB; a single black pixel each where only the motion matters.
    :param proprio: float32 (N, 8 K), metres and radians as in ``Episode.proprio``; zeros for arms that a robot lacks.
    :param actions: float32 (N, frame_stride, 7 K), executed between frame n and n + 1. Rows at the last frame of an
        episode are no-ops (zero motion, the last gripper command) and belong to no step.
    :param success: bool (N,), the simulator's verdict at each frame.
    :param starts: int64 (E,), the row of each episode's first frame.
    :param lengths: int64 (E,), frames of each episode.
    :param first_frames: uint8 (E, H, W, 3), the first frame of each episode.
    :param records: what else is known about the E episodes.
    :param control_hz: low-level actions a second.
    """

    frames: Tensor
    proprio: Tensor
    actions: Tensor
    success: Tensor
    starts: Tensor
    lengths: Tensor
    first_frames: Tensor
    records: tuple[EpisodeRecord, ...]
    control_hz: float = 20.0

    @property
    def num_arms(self) -> int:
        """The number K of arms that there is room for."""
        return self.actions.shape[2] // ACTION_DIM

    @property
    def suites(self) -> list[str]:
        """The suite of each episode."""
        return [record.suite for record in self.records]

    @property
    def instructions(self) -> list[str]:
        """The task of each episode, in words."""
        return [record.instruction for record in self.records]

    @property
    def rehearsed(self) -> Tensor:
        """Whether the actions of each episode answered to a world model and not to what really happened, bool (E,)."""
        return torch.tensor([record.kind == "rehearsed" for record in self.records])

    @property
    def episode_of_row(self) -> Tensor:
        """Index of the episode that each row belongs to, int64 (N,)."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def checksum(self) -> int:
        """One number for what the episodes begin with, what is done and becomes of it, whose they are and of what kind,
        to tell whether these are the same ones (imagined ones have another proprioception)."""
        whose = [(record.robot, record.suite, record.instruction, record.kind) for record in self.records]
        checksum = zlib.crc32(repr((whose, self.frames.shape)).encode())
        for values in (self.first_frames, self.actions, self.proprio, self.success):
            checksum = zlib.crc32(values.contiguous().view(-1).view(torch.uint8).numpy(), checksum)
        return checksum


def load_arrays(
    datasets: EpisodeDataset | Sequence[EpisodeDataset],
    split: str | None,
    *,
    video: bool = True,
    num_arms: int | None = None,
    episodes: int | None = None,
    seed: int = 0,
    num_threads: int = 2,
    progress: bool = True,
) -> EpisodeArrays:
    """Read and decode all episodes of a split into memory: 1.1 GB per 1,000 episodes of 41 frames of 96 x 96, and
    0.1 GB without video.

    :param datasets: where the episodes are: one data set, or several of the same frame rate, stride and size.
    :param split: ``"train"``, ``"val"``, ``"test"``, or ``None`` for all that the data sets hold.
    :param video: False keeps the first frame of each episode alone, which is all that the motion needs, also of data
        sets that were recorded with video.
    :param num_arms: K, arms that the arrays have room for; None: as many as the data sets' robots have at most.
    :param episodes: at most so many, drawn as in :func:`subset`, before anything is decoded; None: all. seed: of that.
    :param num_threads: episodes decoded at a time.
    :param progress: show a progress bar.
    :raises ValueError: the split does not exist or is empty, the episodes differ in frame rate, stride or size, a data
        set has no video, a robot has more arms than ``num_arms``, or ``episodes`` is below 1.
    """
    given = [datasets] if isinstance(datasets, EpisodeDataset) else list(datasets)
    if video:
        check_video(given)
    rates = {str(dataset.root): (dataset.fps, dataset.frame_stride) for dataset in given}
    if len(set(rates.values())) > 1:
        raise ValueError(f"The data sets must have the same (fps, frame_stride), got {rates}: load them separately.")
    arms = max(dataset.num_arms for dataset in given)
    if num_arms is not None and arms > num_arms:
        raise ValueError(
            f"{[str(dataset.root) for dataset in given if dataset.num_arms > num_arms]} are of robots of {arms} arms, "
            f"and there is room for {num_arms}: train a world model on them (`prophet train`)."
        )
    arms = num_arms or arms
    chosen = given if split is None else [dataset.select(split=split) for dataset in given]
    sources = [(dataset, index) for dataset in chosen for index in range(len(dataset))]
    if not sources:
        raise ValueError(f"No episode of split {split!r} is in {[str(dataset.root) for dataset in given]}.")
    if episodes is not None:
        suites = [dataset.records[index].suite for dataset, index in sources]
        sources = [sources[number] for number in _draw(suites, episodes, seed).tolist()]
    records = tuple(dataset.records[index] for dataset, index in sources)
    lengths = np.array([record.length for record in records])
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    first = sources[0][0][sources[0][1]]
    first_frames = np.empty((len(records), *first.frames.shape[1:]), np.uint8)
    frames = np.empty((total, *first.frames.shape[1:]) if video else 0, np.uint8)
    proprio = np.zeros((total, arms * PROPRIO_DIM), np.float32)
    actions = np.zeros((total, first.frame_stride, arms * ACTION_DIM), np.float32)
    success = np.empty(total, np.bool_)

    def load(number: int) -> None:
        dataset, index = sources[number]
        episode = dataset[index]
        if episode.frames.shape[1:] != first.frames.shape[1:]:
            raise ValueError(
                f"Episode {records[number].episode_index} of {dataset.root} has frames of shape "
                f"{episode.frames.shape[1:]}, the first one {first.frames.shape[1:]}: load them separately."
            )
        rows = slice(starts[number], starts[number] + lengths[number])
        first_frames[number] = episode.frames[0]
        if video:
            frames[rows] = episode.frames
        own = episode.actions.shape[2]
        proprio[rows, : episode.proprio.shape[1]] = episode.proprio
        actions[rows][:-1, :, :own] = episode.actions
        actions[rows][-1, :, :own][:, GRIPPERS] = episode.actions[-1, -1, GRIPPERS]
        success[rows] = episode.success

    with ThreadPoolExecutor(num_threads) as pool:
        loaded = pool.map(load, range(len(sources)))
        for _ in tqdm(loaded, "loading episodes", len(sources), unit="episode", disable=not progress):
            pass
    return EpisodeArrays(
        frames=torch.from_numpy(frames) if video else _black(total),
        proprio=torch.from_numpy(proprio),
        actions=torch.from_numpy(actions),
        success=torch.from_numpy(success),
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy(lengths),
        first_frames=torch.from_numpy(first_frames),
        records=records,
        control_hz=given[0].fps * given[0].frame_stride,
    )


def concatenate(parts: Sequence[EpisodeArrays]) -> EpisodeArrays:
    """The episodes of all parts, in order."""
    offsets = np.cumsum([0, *(len(part.frames) for part in parts[:-1])]).tolist()
    return EpisodeArrays(
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("frames", "proprio", "actions", "success", "lengths", "first_frames")
        },
        starts=torch.cat([part.starts + offset for part, offset in zip(parts, offsets, strict=True)]),
        records=tuple(record for part in parts for record in part.records),
        control_hz=parts[0].control_hz,
    )


def without_pictures(arrays: EpisodeArrays) -> EpisodeArrays:
    """The same episodes with their first frames alone: what concerns the motion need not hold gigabytes."""
    return replace(arrays, frames=_black(len(arrays.frames)))


def _black(count: int) -> Tensor:
    """So many frames of a single black pixel, which take no memory."""
    return torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(count, -1, -1, -1)


def subset(arrays: EpisodeArrays, count: int, seed: int) -> EpisodeArrays:
    """At most ``count`` episodes, drawn without replacement, from all suites in turn.

    :raises ValueError: a count below 1.
    """
    chosen = _draw(arrays.suites, count, seed)
    lengths = arrays.lengths[chosen]
    starts = lengths.cumsum(0) - lengths
    rows = torch.arange(int(lengths.sum())) + torch.repeat_interleave(arrays.starts[chosen] - starts, lengths)
    return EpisodeArrays(
        **{name: getattr(arrays, name)[rows] for name in ("frames", "proprio", "actions", "success")},
        starts=starts,
        lengths=lengths,
        first_frames=arrays.first_frames[chosen],
        records=tuple(arrays.records[episode] for episode in chosen),
        control_hz=arrays.control_hz,
    )


def _draw(suites: Sequence[str], count: int, seed: int) -> Tensor:
    """Which of the episodes of these suites :func:`subset` takes, int64, in order."""
    if count < 1:
        raise ValueError(f"The number of episodes must be at least 1, got {count}.")
    order = torch.randperm(len(suites), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: Counter[str] = Counter()
    turns = []
    for place, episode in enumerate(order):
        turns.append((seen[suites[episode]], place, episode))
        seen[suites[episode]] += 1
    return torch.tensor(sorted(episode for _, _, episode in sorted(turns)[:count]))


def episode_folds(arrays: EpisodeArrays, count: int) -> Tensor:
    """One of ``count`` folds for each episode, int64 (E,), for cross-fitting.

    It is a checksum of the episode's actions: the same beside whatever other episodes it is loaded, for the same number
    of arms.
    """
    ends = arrays.starts + arrays.lengths
    return torch.tensor(
        [
            zlib.crc32(arrays.actions[start:end].numpy().tobytes()) % count
            for start, end in zip(arrays.starts.tolist(), ends.tolist(), strict=True)
        ]
    )


@dataclass(frozen=True, eq=False)
class ClipIndices:
    """A batch of windows, as rows of an :class:`EpisodeArrays`.

    :param rows: int64 (B, 1 + horizon), the present frame and those after it, in order of time;
        ``arrays.actions[rows[:, :-1]]`` are the actions between them, (B, horizon, frame_stride, 7 K).
    :param first_rows: int64 (B,), the first frame of each window's episode.
    :param episodes: int64 (B,), index of each window's episode in ``arrays.records``.
    """

    rows: Tensor
    first_rows: Tensor
    episodes: Tensor


class ClipSampler:
    """Draws windows, with replacement and uniformly over all frames that have ``horizon`` frames after them::

        sampler = ClipSampler(arrays, horizon=2, batch_size=32)
        clip = sampler.draw(torch.Generator().manual_seed(0))
        frames = arrays.frames[clip.rows]

    ``num_windows`` is how many different windows there are.

    :param arrays: the episodes.
    :param horizon: frames after the present one, >= 1. Episodes with no more frames than that are never drawn.
    :param batch_size: windows per batch, >= 1.
    :raises ValueError: a number is below 1, or every episode is too short.
    """

    def __init__(self, arrays: EpisodeArrays, horizon: int, batch_size: int) -> None:
        for name, number in (("horizon", horizon), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"{name} must be >= 1, got {number}.")
        self.horizon, self.batch_size = horizon, batch_size
        self._starts = arrays.starts
        windows = (arrays.lengths - horizon).clamp(min=0)
        self._ends = windows.cumsum(0)
        self.num_windows = int(self._ends[-1])
        if not self.num_windows:
            raise ValueError(
                f"No episode has more than horizon = {horizon} frames, the longest has {int(arrays.lengths.max())}."
            )
        self._skipped = arrays.starts - (self._ends - windows)  # row of a window, less its number

    def draw(self, generator: torch.Generator) -> ClipIndices:
        """A batch of windows, drawn by a CPU generator, which advances."""
        drawn = torch.randint(self.num_windows, (self.batch_size,), generator=generator)
        episodes = torch.searchsorted(self._ends, drawn, right=True)
        rows = (drawn + self._skipped[episodes])[:, None] + torch.arange(self.horizon + 1)
        return ClipIndices(rows=rows, first_rows=self._starts[episodes], episodes=episodes)
