"""Recorded episodes, imagined: what a judge is trained on beside the real ones."""

import torch
from tqdm.auto import tqdm

from prophet_gym.data.clips import EpisodeArrays, concatenate
from prophet_gym.world_model.pipeline import ProphetPipeline


def imagine_episodes(
    pipeline: ProphetPipeline, arrays: EpisodeArrays, count: int, seed: int, batch_size: int = 32
) -> EpisodeArrays:
    """Replay `count` episodes, spread over `arrays`, in imagination: their frames are Prophet's, all else is real.

    A judge that trains on them learns what success and failure look like where Prophet is vague.
    """
    chosen = torch.linspace(0, len(arrays.starts) - 1, min(count, len(arrays.starts))).long()
    length = int(arrays.lengths.min()) - 1
    length -= length % pipeline.chunk_frames
    parts = []
    for episodes in tqdm(chosen.split(batch_size), desc="imagining episodes"):
        index = arrays.starts[episodes, None] + torch.arange(length + 1)
        records = [arrays.records[episode] for episode in episodes]
        frames, _ = pipeline.replay(
            arrays.frames[index[:, 0]],
            arrays.proprio[index[:, 0]],
            arrays.actions[index[:, :-1]].flatten(1, 2),
            [record.suite for record in records],
            [torch.Generator().manual_seed(1_000_003 * seed + int(episode)) for episode in episodes],
        )
        parts.append(
            EpisodeArrays(
                frames=frames.flatten(0, 1),
                proprio=arrays.proprio[index].flatten(0, 1),
                actions=arrays.actions[index].flatten(0, 1),
                success=arrays.success[index].flatten(),
                starts=torch.arange(len(episodes)) * (length + 1),
                lengths=torch.full((len(episodes),), length + 1),
                records=tuple(records),
            )
        )
    return concatenate(parts)
