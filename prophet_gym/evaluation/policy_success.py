"""How often a policy succeeds: in Prophet, and in the real simulator, from the same starts."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from tqdm.auto import tqdm

from prophet_gym.data.episode import IMAGE_SIZE, Policy
from prophet_gym.envs.vector_env import ProphetVectorEnv
from prophet_gym.reward.base import thresholds
from prophet_gym.simulators.suites import SUITES


@dataclass(frozen=True)
class Rollouts:
    """Outcomes of one evaluation.

    Attributes:
        success: bool (N,), one entry per episode.
        task, init_state: int (N,), where each episode began.
        videos: uint8 (T, H, W, 3) of the first episode of each task; none where there is no video.
        probability: in Prophet, float (N,), the highest success probability of each episode; None in reality.
    """

    success: NDArray[np.bool_]
    task: NDArray[np.int64]
    init_state: NDArray[np.int64]
    videos: list[NDArray[np.uint8]] = field(default_factory=list)
    probability: NDArray[np.float64] | None = None

    @property
    def rate(self) -> float:
        """Share of solved episodes."""
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the success rate, which takes the episodes for independent."""
        interval = binomtest(int(self.success.sum()), len(self.success)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)

    @property
    def expected_rate(self) -> float | None:
        """In Prophet, the mean of the probabilities; None in reality.

        Of a policy that was rewarded at a threshold many episodes come to lie just above it, and by the shipped judge
        this is nearer to reality than `rate`. It is cut off where the environment ends episodes: compare it at one
        threshold.
        """
        return None if self.probability is None else float(self.probability.mean())

    def __str__(self) -> str:
        low, high = self.interval
        expected = "" if self.expected_rate is None else f", expected {100 * self.expected_rate:.0f}%"
        return f"{100 * self.rate:.1f}% [{100 * low:.0f}, {100 * high:.0f}] of {len(self.success)}{expected}"


def starts_of(tasks: Sequence[int], init_states: Sequence[int], repeats: int = 1) -> NDArray[np.int64]:
    """All pairs of (task, init_state), `repeats` times: int64 (N, 2)."""
    pairs = [(task, state) for task in tasks for _ in range(repeats) for state in init_states]
    return np.array(pairs, np.int64)


def evaluate_in_prophet(
    policy: Policy,
    suite: str,
    starts: NDArray[np.int64],
    *,
    split: str = "val",
    seed: int = 0,
    deterministic: bool = False,
    progress_bar: bool = True,
    **env_arguments: Any,
) -> Rollouts:
    """Roll the policy out in Prophet, all episodes side by side.

    An episode counts as solved where the reward model's probability reaches its balanced threshold, if it has one: at
    the environment's own, which is there for RL, few failures pass and many successes are missed. It goes on until the
    environment ends it, at its own threshold, for the sake of its highest probability.

    Args:
        policy: see `Policy`.
        suite: task suite. starts: int (N, 2), task and init_state of each episode, see `starts_of`. split: of the
        starts.
        seed: of the world model's noise and of the member that moves an episode. deterministic: passed to `predict`.
        progress_bar: show one.
        env_arguments: further arguments of `ProphetVectorEnv`; the autoreset mode is of no account. Episodes are as
            long as the suite's recordings, if it has any, unless `max_chunks` says otherwise.

    Returns:
        The reward model's verdicts.
    """
    # No env begins another episode here, and the infos of the last step must be the old one's.
    env_arguments = env_arguments | {"autoreset_mode": "Disabled"}
    if suite in SUITES:
        env_arguments = {"max_chunks": SUITES[suite].max_chunks} | env_arguments
    env = ProphetVectorEnv(len(starts), suite=suite, split=split, **env_arguments)
    options = {"task": starts[:, 0].tolist(), "init_state": starts[:, 1].tolist()}
    observation, _ = env.reset(seed=[seed + index for index in range(len(starts))], options=options)
    threshold = thresholds(env.reward_model, [suite], env.video, "balanced")
    running, success = np.ones(len(starts), bool), np.zeros(len(starts), bool)
    ends, highest = np.ones(len(starts), int), np.zeros(len(starts))
    clips = [observation["image"][:, None].copy()] if env.video else []
    for _ in tqdm(range(env.max_chunks), desc="in Prophet", leave=False, disable=not progress_bar):
        actions, _ = policy.predict(observation, deterministic=deterministic)
        observation, _, terminated, truncated, info = env.step(actions)
        if env.video:
            clips.append(info["frames"])
            ends[running & ~success] += info["frames"].shape[1]
        probability = np.where(running, info["success_probability"], 0.0)
        highest = np.maximum(highest, probability)
        success |= probability >= threshold
        running &= ~(terminated | truncated)
        env.paused = ~running
        if not running.any():
            break
    env.close()
    first = [int(np.flatnonzero(starts[:, 0] == task)[0]) for task in np.unique(starts[:, 0])] if env.video else []
    videos = [np.concatenate([clip[index] for clip in clips])[: ends[index]] for index in first]
    return Rollouts(success, starts[:, 0], starts[:, 1], videos, highest)


def evaluate_in_libero(
    policy: Policy,
    suite: str,
    starts: NDArray[np.int64],
    *,
    split: str = "val",
    seed: int = 0,
    deterministic: bool = False,
    workers: int = 2,
) -> Rollouts:
    """Roll the policy out in the real simulator (extra `libero`), tasks shared out over processes.

    Args:
        policy: see `Policy`; it is pickled to the worker processes.
        suite, starts, split, deterministic: as in `evaluate_in_prophet`. seed: of the policy's noise.
        workers: processes.

    Returns:
        The simulator's verdicts, in the order of `starts`.
    """
    return _in_processes(_libero_task, (policy, suite, split, seed, deterministic), starts, workers)


def evaluate_expert(
    suite: str, starts: NDArray[np.int64], *, split: str = "val", seed: int = 0, workers: int = 2
) -> Rollouts:
    """How often the undisturbed scripted expert stands successful at the end of its control steps.

    Args:
        suite, starts, split, workers: as in `evaluate_in_libero`. seed: of the expert's own choices.
    """
    return _in_processes(_expert_task, (suite, split, seed), starts, workers)


def _in_processes(
    run_task: Callable[..., tuple[NDArray[np.bool_], NDArray[np.uint8]]],
    arguments: tuple[Any, ...],
    starts: NDArray[np.int64],
    workers: int,
) -> Rollouts:
    """Share `starts` out by task: each process builds a task's simulation once."""
    jobs = [np.flatnonzero(starts[:, 0] == task) for task in np.unique(starts[:, 0])]
    success = np.zeros(len(starts), bool)
    videos: list[NDArray[np.uint8]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_task, *arguments, starts[job]) for job in jobs]
        for job, future in tqdm(zip(jobs, futures, strict=True), desc="in LIBERO", total=len(jobs), leave=False):
            success[job], video = future.result()
            videos.append(video)
    return Rollouts(success, starts[:, 0], starts[:, 1], videos)


def _expert_task(
    suite: str, split: str, seed: int, starts: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """All episodes of one task, in a worker process."""
    from prophet_gym.simulators.libero import load_simulation
    from prophet_gym.simulators.recording import EpisodePlan, record_episode

    simulation = load_simulation(suite, int(starts[0, 0]), IMAGE_SIZE)
    episodes = [
        record_episode(simulation, EpisodePlan(index, int(task), split, int(state), "clean", False, seed + index))
        for index, (task, state) in enumerate(starts)
    ]
    simulation.close()
    return np.array([episode.outcome for episode in episodes]), episodes[0].frames


def _libero_task(
    policy: Policy, suite: str, split: str, seed: int, deterministic: bool, starts: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """All episodes of one task, in a worker process."""
    import torch

    from prophet_gym.simulators.libero import LiberoEnv

    torch.set_num_threads(1)
    torch.manual_seed(1000 * seed + int(starts[0, 0]))
    env = LiberoEnv(suite=suite, task=int(starts[0, 0]), split=split, max_chunks=SUITES[suite].max_chunks)
    success = np.zeros(len(starts), bool)
    video: list[NDArray[np.uint8]] = []
    for index, (_, init_state) in enumerate(starts):
        observation, _ = env.reset(seed=seed + index, options={"init_state": int(init_state)})
        frames = [observation["image"][None]]
        done = False
        while not done:
            batch = {key: value[None] for key, value in observation.items()}
            actions, _ = policy.predict(batch, deterministic=deterministic)
            observation, _, terminated, truncated, info = env.step(actions[0])
            frames.append(info["frames"])
            done = terminated or truncated
        success[index] = bool(info["is_success"])
        if index == 0:
            video = frames
    env.close()
    return success, np.concatenate(video)
