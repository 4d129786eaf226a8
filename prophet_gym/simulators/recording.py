"""Record data sets in the real simulators: scripted successes, honest failures and counterfactuals, rollouts of a
policy, or what a policy did in Prophet.

All episodes of a suite are equally long (160 control steps, 41 frames at 5 Hz; 240 and 61 in libero_10, 96 and 25 in
Meta-World, 120 and 31 in two_arm_lift) whatever happens in them, and a disturbed script's actions never depend on
whether the object was grasped: else a judge could read the outcome off the actions. (Undisturbed, the scripts of the
other robots than LIBERO's look at the objects.)
"""

from __future__ import annotations

import math
import os
import queue
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from prophet_gym.data.episode import (
    ACTION_DIM,
    CHUNK_SIZE,
    FPS,
    FRAME_STRIDE,
    IMAGE_SIZE,
    Episode,
    Planner,
    Policy,
    next_chunk,
    policy_network,
)
from prophet_gym.data.instructions import embed_instructions
from prophet_gym.data.lerobot_format import EpisodeRecord, LeRobotWriter
from prophet_gym.run_folder import claim, policy_checksum
from prophet_gym.simulators.experts import NOISE_RECIPES, ActionNoise
from prophet_gym.simulators.suites import SUITES, Robot, Simulation, Suite

if TYPE_CHECKING:
    from prophet_gym.simulators.libero_simulation import LiberoSimulation

COUNTERFACTUAL_SHARE = 0.1
COUNTERFACTUALS = ("shifted", "elsewhere")
"""Where a counterfactual episode's actions come from: the same start with the objects shifted by up to 2 cm (it may
well succeed), or another, jittered start of the same task and split (it rarely does)."""
SHIFTED_DISTANCE = 0.02  # m
POLICY_NOISE = 0.2  # a policy's actions get AR(1) noise of up to this sigma, in action units, one draw per episode
JITTER_DISTANCE = 0.03  # m


@dataclass(frozen=True)
class EpisodePlan:
    """What one episode of a recording will be; a function of the seed and its index alone.

    Attributes:
        index: place in the data set.
        task: index of the task in the suite.
        split: ``"train"``, ``"val"`` or ``"test"``.
        init_state: the start: LIBERO's official initial state, or the seed that another simulator draws it from.
        recipe: name of a noise recipe, one of ``COUNTERFACTUALS``, ``"policy"`` or ``"rehearsed"``.
        jitter: whether objects are shifted and the arm displaced before the first frame.
        seed: seed of the episode's random stream.
    """

    index: int
    task: int
    split: str
    init_state: int
    recipe: str
    jitter: bool
    seed: int

    @property
    def kind(self) -> str:
        """The data set's name for this recipe: one of ``KINDS``."""
        if self.recipe in COUNTERFACTUALS:
            return "counterfactual"
        return self.recipe if self.recipe in ("clean", "policy", "rehearsed") else "noisy"


def plan_episodes(
    suite: str,
    episodes: int,
    seed: int,
    policy: bool = False,
    split: str | None = None,
    fixed_recipe: str | None = None,
) -> list[EpisodePlan]:
    """Plan a recording: tasks in turn, 8 of every 10 rounds for training, 1 for validation, 1 for tests.

    With `policy`, a policy acts in all of them; with `split`, all of them are of that split; with `fixed_recipe`, one
    of `NOISE_RECIPES` or "rehearsed", it is the recipe of all of them, and none is counterfactual.
    """
    facts = SUITES[suite]
    shares, tasks = facts.noise_shares, facts.tasks
    plans = []
    for index in range(episodes):
        episode_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
        rng = np.random.default_rng([episode_seed, 0])
        part = split or {8: "val", 9: "test"}.get(index // len(tasks) % 10, "train")
        recipe = str(rng.choice(list(shares), p=list(shares.values())))
        if rng.uniform() < COUNTERFACTUAL_SHARE and facts.counterfactuals:
            recipe = str(rng.choice(facts.counterfactuals))
        recipe = "policy" if policy else fixed_recipe or recipe
        jitter = bool(part == "train" and rng.uniform() < facts.jitter_share and recipe != "shifted")
        init_state = int(rng.choice(facts.starts[part]))
        plans.append(EpisodePlan(index, tasks[index % len(tasks)], part, init_state, recipe, jitter, episode_seed))
    return plans


def record(
    suite: str,
    episodes: int,
    out: str | os.PathLike[str],
    seed: int = 0,
    workers: int | None = None,
    policy: Policy | Planner | None = None,
    split: str | None = None,
    video: bool = True,
    recipe: str | None = None,
) -> Path:
    """Record episodes of a suite into a LeRobot data set; run it again to resume.

    Args:
        suite: one of ``SUITES``.
        episodes: number of episodes, tasks in turn; the first N episodes do not depend on how many follow.
        out: folder of the data set.
        seed: seed of the whole recording.
        workers: processes; None is one per core. Each needs up to 2.5 GB with LIBERO, 0.5 GB with the others.
        policy: acts in all episodes, a chunk of 8 actions at a time; or plans them from their starts, see `Planner`.
            Pickled to the processes. None: scripts.
        split: "train", "val" or "test", of all episodes. None: 80, 10 and 10 of a hundred.
        video: False keeps the first frame alone, which stands for all: half the time, for the proprioception and the
            motion of the judge, which need no other. A policy still sees the present, see `looks_at_image`.
        recipe: of all scripted episodes, one of the suite's. None: its shares of them, and counterfactuals.

    Returns:
        the folder of the finished data set.

    Raises:
        ValueError: an unknown suite, split or recipe, a recipe and a policy, a count below 1, or `out` is another
            recording's.
        ImportError: the suite's simulator is not installed; names the extra that brings it.
        OSError: a process was killed.
    """
    if suite not in SUITES:
        raise ValueError(f"Unknown suite {suite!r}. Valid suites: {list(SUITES)}.")
    if split is not None and split not in SUITES[suite].starts:
        raise ValueError(f"Unknown split {split!r}. Valid splits: {list(SUITES[suite].starts)}.")
    recipes = SUITES[suite].recipes
    if recipe is not None and (policy is not None or recipe not in recipes):
        raise ValueError(
            f"The recipe of {suite!r} is for scripts, without a policy, and one of {recipes}, got {recipe!r}."
        )
    if workers is None:  # where the system knows, the cores that this process may use
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, count in (("episodes", episodes), ("workers", workers)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    root = Path(out)
    planned = isinstance(policy, Planner)
    if policy is None:
        acts = None
    else:
        acts = policy.checksum() if isinstance(policy, Planner) else policy_checksum(policy)
    claim(root, command="record", suite=suite, seed=seed, split=split, video=video, policy=acts, recipe=recipe)
    plans = plan_episodes(
        suite, episodes, seed, policy is not None and not planned, split, "rehearsed" if planned else recipe
    )
    spawn = get_context("spawn")
    written, stop = spawn.Queue(), spawn.Event()
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (written, stop), max_tasks_per_child=1)
    done = 0
    with pool, tqdm(total=episodes, desc=f"recording {suite}", unit="episode") as progress:
        tasks = SUITES[suite].tasks
        parts = math.ceil(workers / len(tasks))  # of each task, for suites of fewer tasks than there are processes
        shares = [[plan for plan in plans if plan.task == task][k::parts] for task in tasks for k in range(parts)]
        jobs = [pool.submit(_record_task, suite, root, some, policy, video) for some in shares if some]
        try:
            while done < episodes and not any(job.done() and job.exception() for job in jobs):
                try:
                    written.get(timeout=1.0)
                except queue.Empty:
                    continue
                done += 1
                progress.update()
            if failed := next((job for job in jobs if job.done() and job.exception()), None):
                failed.result()  # raises
        except BaseException as error:
            # A KeyboardInterrupt too: else the pool would record all that is left before it ends.
            stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise OSError(
                    "A process of the recording was killed, most often for lack of memory (each needs up to 2.5 GB): "
                    "use fewer workers. The same command resumes."
                ) from error
            raise
        cameras = [job.result() for job in jobs]
    if not all(np.allclose(camera[name], cameras[0][name]) for camera in cameras for name in camera):
        raise ValueError(f"The tasks of {suite!r} have different cameras, and a data set has one for each suite.")
    _writer(root, cameras[0], SUITES[suite].robot, video).finalize(episodes)
    return root


def record_episode(
    simulation: Simulation, plan: EpisodePlan, policy: Policy | Planner | None = None, video: bool = True
) -> Episode:
    """Run one planned episode and keep what the camera saw, or the first frame of it; `policy` acts if that is the
    plan."""
    suite = SUITES[simulation.suite]
    rng = np.random.default_rng([plan.seed, 1])
    replayed = plan.recipe in COUNTERFACTUALS
    actions = _clean_actions_elsewhere(simulation, plan, rng) if replayed else _no_actions(suite)
    _begin(simulation, plan.init_state, plan.jitter, rng)
    expert = suite.expert(simulation, NOISE_RECIPES[plan.recipe], rng) if plan.recipe in NOISE_RECIPES else None
    noise_rng = np.random.default_rng([plan.seed, 2])
    sigma = noise_rng.uniform(0.0, POLICY_NOISE)
    noises = [ActionNoise(sigma, noise_rng) for _ in range(suite.robot.num_arms)]
    planner = policy if plan.recipe == "rehearsed" and isinstance(policy, Planner) else None
    actor = policy if plan.recipe == "policy" and not isinstance(policy, Planner) else None
    if plan.recipe in ("policy", "rehearsed") and planner is None and actor is None:
        raise ValueError(f"The plan's recipe is {plan.recipe!r}: pass the policy that acts, or the planner.")
    looks = actor is not None and looks_at_image(actor)
    frames, proprio, success = [simulation.render()], [simulation.proprio()], [simulation.is_success()]
    if planner is not None:
        start = (simulation.suite, frames[0], proprio[0], simulation.instruction)
        actions[:] = planner.plan(*start, suite.control_steps, plan.seed) * suite.robot.action_mask
    for step in range(suite.control_steps):
        if expert is not None:
            actions[step] = expert.act()
        elif actor is not None and step % CHUNK_SIZE == 0:
            # Without video nothing was rendered since the first frame, and a policy that looks must see the present.
            image = frames[-1] if video or not looks else simulation.render()
            observation = {
                "image": image[None],
                "proprio": proprio[-1][None],
                "instruction": embed_instructions([simulation.instruction]),
            }
            shape = (CHUNK_SIZE, len(suite.robot.action_mask))
            chunk = next_chunk(actor, observation, shape, repr(suite.robot.name))
            chunk = chunk.reshape(CHUNK_SIZE, -1, ACTION_DIM)
            chunk[..., :6] += [[noise() for noise in noises] for _ in range(CHUNK_SIZE)]
            actions[step : step + CHUNK_SIZE] = chunk.reshape(CHUNK_SIZE, -1).clip(-1.0, 1.0) * suite.robot.action_mask
        simulation.step(actions[step].astype(np.float64))
        if (step + 1) % FRAME_STRIDE == 0:
            frames.append(simulation.render() if video else frames[0])
            proprio.append(simulation.proprio())
            success.append(simulation.is_success())
    return Episode(
        frames=np.stack(frames),
        proprio=np.stack(proprio),
        actions=actions.reshape(-1, FRAME_STRIDE, actions.shape[1]),
        success=np.array(success),
        instruction=simulation.instruction,
        suite=simulation.suite,
        task=plan.task,
        init_state=plan.init_state,
        split=plan.split,
        kind=plan.kind,
        robot=suite.robot.name,
        seed=plan.seed,
    )


def looks_at_image(policy: Policy) -> bool:
    """Whether a policy uses the picture, as far as its `used_space` says, see `fagrpo.FlowPolicy`."""
    space = getattr(policy_network(policy), "used_space", None)
    return not isinstance(space, gym.spaces.Dict) or "image" in space.spaces


def _clean_actions_elsewhere(
    simulation: Simulation, plan: EpisodePlan, rng: np.random.Generator
) -> NDArray[np.float32]:
    """What the undisturbed expert does from the other start that the plan names."""
    suite = SUITES[simulation.suite]
    if plan.recipe == "shifted":
        simulation.reset(plan.init_state)
        _jitter_objects(simulation, SHIFTED_DISTANCE, rng)
    else:
        others = [state for state in suite.starts[plan.split] if state != plan.init_state]
        _begin(simulation, int(rng.choice(others)), suite.jitter_share > 0, rng)
    expert = suite.expert(simulation, NOISE_RECIPES["clean"], rng)
    actions = _no_actions(suite)
    for step in range(suite.control_steps):
        actions[step] = expert.act()
        simulation.step(actions[step].astype(np.float64))
    return actions


def _no_actions(suite: Suite) -> NDArray[np.float32]:
    """Room for an episode's actions (T, 7 K)."""
    return np.zeros((suite.control_steps, len(suite.robot.action_mask)), np.float32)


def _begin(simulation: Simulation, init_state: int, jitter: bool, rng: np.random.Generator) -> None:
    simulation.reset(init_state)
    if not jitter:
        return
    _jitter_objects(simulation, JITTER_DISTANCE, rng)
    push = rng.uniform(-1.0, 1.0, 6) * np.array([0.6, 0.6, 0.4, 0.15, 0.15, 0.3])
    for _ in range(8):
        simulation.step(np.append(push, -1.0))
    for _ in range(4):
        simulation.step(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]))


def _jitter_objects(simulation: Simulation, distance: float, rng: np.random.Generator) -> None:
    """Only plans for LIBERO ask for it: the starts of the other simulators are random and differ widely."""
    cast("LiberoSimulation", simulation).jitter_objects(distance, rng)


# In a worker: the queue that tells the parent of finished episodes, and the event by which it ends them early.
_written: Any = None
_stop: Any = None


def _start_worker(written: Any, stop: Any) -> None:
    global _written, _stop
    _written, _stop = written, stop


def _record_task(
    suite: str, root: Path, plans: list[EpisodePlan], policy: Policy | Planner | None = None, video: bool = True
) -> dict[str, list[list[float]]]:
    torch.set_num_threads(1)
    simulation = SUITES[suite].load(suite, plans[0].task, IMAGE_SIZE)
    camera = simulation.camera()
    writer = _writer(root, camera, SUITES[suite].robot, video)
    parent = parent_process()
    for plan in plans:
        if _stop.is_set() or (parent is not None and not parent.is_alive()):
            raise RuntimeError("The recording was stopped.")  # else it would write beside the run that resumes
        earlier = writer.written(plan.index)
        if earlier is not None:
            check_resumed(root, earlier, suite, plan)
        else:
            torch.manual_seed(plan.seed)  # the policy's noise
            writer.write_episode(plan.index, record_episode(simulation, plan, policy, video))
        _written.put(plan.index)
    simulation.close()
    return camera


def check_resumed(root: Path, earlier: EpisodeRecord, suite: str, plan: EpisodePlan) -> None:
    """Raise a ValueError where an episode of an earlier run is not the one that this recording plans."""
    facts = ("task", "seed", "split", "kind", "init_state")
    got, expected = ({name: getattr(some, name) for name in facts} for some in (earlier, plan))
    got["suite"], expected["suite"] = earlier.suite, suite
    if got != expected:
        raise ValueError(
            f"Episode {plan.index} in {root} is {got}, this recording plans {expected}: resume with the same suite, "
            "seed, split and policy, or choose another folder."
        )


def _writer(root: Path, camera: dict[str, list[list[float]]], robot: Robot, video: bool) -> LeRobotWriter:
    return LeRobotWriter(
        root,
        fps=FPS,
        frame_stride=FRAME_STRIDE,
        camera=camera,
        image_size=IMAGE_SIZE,
        robot=robot.name,
        action_mask=robot.action_mask,
        action_units=robot.action_units,
        video=video,
    )
