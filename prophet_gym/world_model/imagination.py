"""Recorded episodes, imagined: what Prophet is measured by, and what it and its judge also train on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm.auto import tqdm

from prophet_gym.data.clips import EpisodeArrays, concatenate, episode_folds, without_pictures
from prophet_gym.data.episode import ACTION_DIM, PROPRIO_DIM, Policy, next_chunk
from prophet_gym.data.instructions import embed_instructions
from prophet_gym.run_folder import policy_checksum, weights_checksum
from prophet_gym.training import best_autocast
from prophet_gym.world_model.action_conditioning import carried_motion, init_hold, update_hold
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.pipeline import ChunkCondition, ProphetPipeline, frames_to_pixels


def frame_rows(arrays: EpisodeArrays, episodes: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    """Rows of the frames of some episodes (N,), up to the last whole chunk of the shortest: int64 (N, T + 1)."""
    steps = int(arrays.lengths[episodes].min()) - 1
    return arrays.starts[episodes, None] + torch.arange(steps - steps % chunk_frames + 1)


def has_chunk(pipeline: ProphetPipeline, arrays: EpisodeArrays, kind: str = "training episode") -> torch.Tensor:
    """Which episodes have a whole chunk, bool (E,): the others are not drawn.

    Raises:
        ValueError: none has; it calls them what `kind` says.
    """
    whole = arrays.lengths > pipeline.chunk_frames
    if not whole.any():
        raise ValueError(
            f"No {kind} has {pipeline.chunk_frames + 1} frames, its first one and a chunk; the longest has "
            f"{int(arrays.lengths.max())}: record longer ones."
        )
    return whole


def replay_episodes(
    pipeline: ProphetPipeline,
    arrays: EpisodeArrays,
    episodes: torch.Tensor,
    noise_seeds: Sequence[int],
    batch_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Imagine episodes from their first frame and their actions, Prophet's own frames and estimates fed back. Each is
    moved by the member of the proprioception that has not learned from it, see `fit_proprioception`.

    Args:
        episodes: int64 (N,), which ones of `arrays`. noise_seeds: N, of the world model's noise.

    Returns:
        Frames uint8 (N, T + 1, H, W, 3) of `frame_rows`, and the proprioception at each of them, float32
        (N, T + 1, P): the first ones real, the others imagined.
    """
    rows = frame_rows(arrays, episodes, pipeline.chunk_frames)
    members, rehearsed = episode_folds(arrays, pipeline.num_members), arrays.rehearsed
    clips, proprio = [], []
    for batch in tqdm(torch.arange(len(episodes)).split(batch_size), desc="imagining episodes", leave=False):
        clip, poses = pipeline.replay(
            arrays.first_frames[episodes[batch]],
            arrays.proprio[rows[batch, 0]],
            arrays.actions[rows[batch, :-1]].flatten(1, 2),
            [arrays.records[episode].suite for episode in episodes[batch]],
            [torch.Generator().manual_seed(noise_seeds[index]) for index in batch],
            member=members[episodes[batch]],
            rehearsed=rehearsed[episodes[batch]],
        )
        clips.append(clip)
        proprio.append(poses)
    return torch.cat(clips), torch.cat(proprio)


def episode_seeds(episodes: torch.Tensor, seed: int) -> list[int]:
    """One seed of the world model's noise per episode, the same whatever other episodes are imagined."""
    return (1_000_003 * seed + episodes).tolist()


def imagine_episodes(pipeline: ProphetPipeline, arrays: EpisodeArrays, count: int, seed: int) -> EpisodeArrays:
    """Replay `count` episodes, spread over `arrays`, in imagination: their frames and proprioception are Prophet's,
    actions and verdicts are real.

    A judge that trains on them learns what success and failure look like where Prophet is vague.

    Raises:
        ValueError: a count below 1, or no episode has a whole chunk; shorter ones are left out.
    """
    if count < 1:
        raise ValueError(f"The number of imagined episodes must be at least 1, got {count}.")
    whole = has_chunk(pipeline, arrays, "episode").nonzero()[:, 0]
    chosen = whole[torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()]
    lengths = arrays.lengths[chosen]
    return concatenate([_imagine(pipeline, arrays, chosen[lengths == length], seed) for length in lengths.unique()])


def _imagine(pipeline: ProphetPipeline, arrays: EpisodeArrays, chosen: torch.Tensor, seed: int) -> EpisodeArrays:
    """The episodes `chosen` (N,), all of one length, in imagination."""
    device = pipeline.device
    with best_autocast(device):
        frames, proprio = replay_episodes(pipeline, arrays, chosen, episode_seeds(chosen, seed))
    rows = frame_rows(arrays, chosen, pipeline.chunk_frames)
    length = rows.shape[1]
    return EpisodeArrays(
        frames=frames.flatten(0, 1),
        proprio=proprio.flatten(0, 1),
        actions=arrays.actions[rows].flatten(0, 1),
        success=arrays.success[rows].flatten(),
        starts=torch.arange(len(chosen)) * length,
        lengths=torch.full((len(chosen),), length),
        first_frames=arrays.first_frames[chosen],
        records=tuple(arrays.records[episode] for episode in chosen),
    )


@torch.inference_mode()
def imagine_motions(pipeline: ProphetPipeline, arrays: EpisodeArrays, batch_size: int = 256) -> EpisodeArrays:
    """All episodes with Prophet's estimate of their proprioception, from the first frames and the actions, and without
    pictures: a judge that trains on them learns what the motion looks like where Prophet errs. Members as in
    `replay_episodes`."""
    model = pipeline.proprioception
    members, rehearsed = episode_folds(arrays, pipeline.num_members), arrays.rehearsed
    proprio = arrays.proprio.clone()
    for episodes in torch.arange(len(arrays.starts)).split(batch_size):
        starts, lengths = arrays.starts[episodes], arrays.lengths[episodes]
        suites = [arrays.records[episode].suite for episode in episodes]
        projection, robot = pipeline.projection(suites).to(model.device), pipeline.robot(suites).to(model.device)
        pixels = frames_to_pixels(arrays.first_frames[episodes]).to(model.device)
        state = model.init_state(proprio[starts], members[episodes], rehearsed[episodes]).to(model.device)
        for frame in range(1, int(lengths.max())):
            rows = starts + lengths.minimum(torch.tensor(frame)) - 1  # where an episode is over, its last one
            state = model(state, arrays.actions[rows].to(model.device), pixels, projection, robot)
            running = frame < lengths
            proprio[starts[running] + frame] = state[running, : proprio.shape[1]].cpu()
    return without_pictures(replace(arrays, proprio=proprio))


@dataclass(frozen=True)
class RehearsedPolicy:
    """A policy that acts in Prophet: a `Planner`, whose episodes a recording replays in the real simulator.

    In an episode that was recorded the other way round, the actions answer to what really happened, and so tell of it:
    that a hand goes on to the plate says that it holds the bowl. Under reinforcement learning in Prophet they answer to
    what Prophet believes, and tell of nothing else. Ortega et al. 2021, arXiv 2110.10819, on such delusions.

    Args:
        pipeline: where it acts. policy: who acts.
        video: imagine what it sees, or its motion alone.
    """

    pipeline: ProphetPipeline
    policy: Policy
    video: bool

    def checksum(self) -> str:
        """What tells it from another one."""
        parts = (self.pipeline.vae, self.pipeline.transformer) if self.video else ()
        return f"{policy_checksum(self.policy)} in {weights_checksum(self.pipeline.proprioception, *parts)}"

    @torch.inference_mode()
    def plan(
        self,
        suite: str,
        image: NDArray[np.uint8],
        proprio: NDArray[np.float32],
        instruction: str,
        control_steps: int,
        seed: int,
    ) -> NDArray[np.float32]:
        """All actions of an episode from this start, float32 (control_steps, 7 K), see `Planner`. Prophet's noise, and
        the member of the proprioception that moves the robot, follow from `seed`; the policy draws from the global
        stream.

        Raises:
            ValueError: the policy's actions are not of this robot.
        """
        pipeline, noise = self.pipeline, torch.Generator().manual_seed(seed)
        width, absent = ACTION_DIM * pipeline.arms(suite), PROPRIO_DIM * pipeline.num_arms - len(proprio)
        observation = {"image": image[None], "proprio": proprio[None], "instruction": embed_instructions([instruction])}
        start = torch.from_numpy(image)[None]
        member = torch.tensor([seed % pipeline.num_members])
        state = pipeline.init_state(F.pad(torch.from_numpy(proprio)[None], (0, absent)), member)
        history = pipeline.init_history(start) if self.video else None
        chunks = []
        for _ in range(-(-control_steps // pipeline.chunk_size)):
            chunk = next_chunk(self.policy, observation, (pipeline.chunk_size, width), suite).clip(-1.0, 1.0)
            chunks.append(chunk)
            actions = F.pad(torch.from_numpy(chunk)[None], (0, pipeline.action_dim - width))
            if history is None:
                poses, state = pipeline.imagine_motion(state, actions, start, [suite])
            else:
                latest = torch.from_numpy(observation["image"])
                images = torch.stack([start, latest], dim=1)
                imagined = pipeline.imagine(history, state, actions, images=images, suites=[suite], generator=noise)
                poses, state, history = imagined.proprio, imagined.state, imagined.history
                observation["image"] = imagined.frames[:, -1].numpy()
            observation["proprio"] = poses[:, -1, : len(proprio)].numpy()
        return np.concatenate(chunks)[:control_steps]


def track_holds(arrays: EpisodeArrays) -> torch.Tensor:
    """The hold of each hand at each frame of recorded episodes, float32 (N, 7 K), see `init_hold`."""
    hold = init_hold(arrays.proprio[arrays.starts])
    holds = torch.empty(len(arrays.proprio), hold.shape[1])
    holds[arrays.starts] = hold
    for frame in range(1, int(arrays.lengths.max())):
        rows = (arrays.starts + frame).minimum(arrays.starts + arrays.lengths - 1)
        hold = update_hold(hold, arrays.proprio[rows], arrays.actions[rows - 1])
        running = frame < arrays.lengths
        holds[rows[running]] = hold[running]
    return holds


def hand_motions(
    arrays: EpisodeArrays, holds: torch.Tensor, latest: torch.Tensor, rows: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """`ChunkCondition.motion` of one frame per episode, rows (N,), after the frames `latest` (N,): (N, 2 K, 3)."""
    poses = arrays.proprio[:, None]
    return carried_motion(poses[latest], poses[rows], holds[rows, None], projection)[:, 0]


@torch.inference_mode()
def encode_frames(vae: ProphetAutoencoder, frames: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Encode uint8 frames (N, H, W, 3) to float16 latents (N, C, h, w) on the CPU."""
    batches = tqdm(frames.split(batch_size), desc="encoding frames", mininterval=5.0)
    return torch.cat([vae.encode(frames_to_pixels(batch.to(vae.device))).half().cpu() for batch in batches])


def observed_condition(
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
