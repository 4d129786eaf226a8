"""Recorded episodes, imagined: what Prophet is measured by, and what a judge is trained on beside the real ones."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from prophet_gym.data.clips import EpisodeArrays, concatenate
from prophet_gym.training import best_precision
from prophet_gym.world_model.action_conditioning import HOLD_DIM, carried_motion, init_hold, update_hold
from prophet_gym.world_model.pipeline import ProphetPipeline


def frame_rows(arrays: EpisodeArrays, episodes: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    """Rows of the frames of some episodes (N,), up to the last whole chunk of the shortest: int64 (N, T + 1)."""
    steps = int(arrays.lengths[episodes].min()) - 1
    return arrays.starts[episodes, None] + torch.arange(steps - steps % chunk_frames + 1)


def replay_episodes(
    pipeline: ProphetPipeline,
    arrays: EpisodeArrays,
    episodes: torch.Tensor,
    noise_seeds: Sequence[int],
    batch_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Imagine episodes from their first frame and their actions, Prophet's own frames and estimates fed back.

    Args:
        episodes: int64 (N,), which ones of `arrays`. noise_seeds: N, of the world model's noise.

    Returns:
        Frames uint8 (N, T + 1, H, W, 3) of `frame_rows`, and the estimated proprioception at the end of each chunk,
        float32 (N, T / chunk_frames, P).
    """
    rows = frame_rows(arrays, episodes, pipeline.chunk_frames)
    clips, estimates = [], []
    for batch in tqdm(torch.arange(len(episodes)).split(batch_size), desc="imagining episodes", leave=False):
        clip, estimate = pipeline.replay(
            arrays.frames[rows[batch, 0]],
            arrays.proprio[rows[batch, 0]],
            arrays.actions[rows[batch, :-1]].flatten(1, 2),
            [arrays.records[episode].suite for episode in episodes[batch]],
            [torch.Generator().manual_seed(noise_seeds[index]) for index in batch],
        )
        clips.append(clip)
        estimates.append(estimate)
    return torch.cat(clips), torch.cat(estimates)


def episode_seeds(episodes: torch.Tensor, seed: int) -> list[int]:
    """One seed of the world model's noise per episode, the same whatever other episodes are imagined."""
    return (1_000_003 * seed + episodes).tolist()


def imagine_episodes(pipeline: ProphetPipeline, arrays: EpisodeArrays, count: int, seed: int) -> EpisodeArrays:
    """Replay `count` episodes, spread over `arrays`, in imagination: their frames are Prophet's, all else is real.

    A judge that trains on them learns what success and failure look like where Prophet is vague.
    """
    chosen = torch.linspace(0, len(arrays.starts) - 1, min(count, len(arrays.starts))).long()
    lengths = arrays.lengths[chosen]
    return concatenate([_imagine(pipeline, arrays, chosen[lengths == length], seed) for length in lengths.unique()])


def _imagine(pipeline: ProphetPipeline, arrays: EpisodeArrays, chosen: torch.Tensor, seed: int) -> EpisodeArrays:
    """The episodes `chosen` (N,), all of one length, in imagination."""
    device = pipeline.device
    with torch.autocast(device.type, torch.bfloat16, enabled=best_precision(device) == "bf16"):
        frames, _ = replay_episodes(pipeline, arrays, chosen, episode_seeds(chosen, seed))
    rows = frame_rows(arrays, chosen, pipeline.chunk_frames)
    length = rows.shape[1]
    return EpisodeArrays(
        frames=frames.flatten(0, 1),
        proprio=arrays.proprio[rows].flatten(0, 1),
        actions=arrays.actions[rows].flatten(0, 1),
        success=arrays.success[rows].flatten(),
        starts=torch.arange(len(chosen)) * length,
        lengths=torch.full((len(chosen),), length),
        records=tuple(arrays.records[episode] for episode in chosen),
    )


def track_holds(arrays: EpisodeArrays) -> torch.Tensor:
    """The hold of the hand at each frame of recorded episodes, float32 (N, 7), see `init_hold`."""
    holds = torch.empty(len(arrays.proprio), HOLD_DIM)
    hold = holds[arrays.starts] = init_hold(arrays.proprio[arrays.starts])
    for frame in range(1, int(arrays.lengths.max())):
        rows = (arrays.starts + frame).minimum(arrays.starts + arrays.lengths - 1)
        hold = update_hold(hold, arrays.proprio[rows], arrays.actions[rows - 1])
        running = frame < arrays.lengths
        holds[rows[running]] = hold[running]
    return holds


def hand_motions(
    arrays: EpisodeArrays, holds: torch.Tensor, latest: torch.Tensor, rows: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """`ChunkCondition.motion` of one frame per episode, rows (N,), after the frames `latest` (N,): (N, 2, 3)."""
    positions = arrays.proprio[:, None, :3]
    return carried_motion(positions[latest], positions[rows], holds[rows, None], projection)[:, 0]
