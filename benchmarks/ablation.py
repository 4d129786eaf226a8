"""FA-GRPO's choices against each other and against PPO, at equal environment steps, on two tasks of sparse success.

    python benchmarks/ablation.py --out runs/ablation

``reach``: a point with inertia must come to rest on a goal. ``push``: a disc must go round a puck, on one side or
the other, and push it onto a goal; contact is a discontinuity, and the demonstrations are bimodal. Both are driven by
action chunks and paid 1 at success, nothing else. Every variant of FA-GRPO starts from the same flow policy of its
seed, cloned from an imperfect expert, and PPO from a Gaussian policy of as many weights (and a critic of as many),
cloned from the same demonstrations. Learning rates were chosen on a seed of its own:

    python benchmarks/ablation.py --names chunk --first-seed 100 --seeds 1 --learning-rate 1e-4 --out runs/tuning

Writes results.json (every run), ablation.png and the table: interquartile means over seeds with 95% bootstrap
intervals (Agarwal et al. 2021), over both tasks with the bootstrap stratified by task. A run that was finished with the
same settings is not repeated; the settings, the task's source included, are part of its key.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import trim_mean
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from torch.nn import functional as F
from tqdm import tqdm

from fagrpo import FAGRPO, Demonstrations, FlowPolicy, behaviour_cloning
from fagrpo.objective import PLACEMENTS, RATIOS
from prophet_gym.data.lerobot_format.schema import write_json

Array = NDArray[np.float64]

NUM_ENVS = 32
EVALUATION_EPISODES = 500
POLICY = {
    "num_flow_steps": 5,
    "features_extractor_kwargs": {"features_dim": 64, "vector_dim": 64},
    "flow_head_kwargs": {"width": 64, "hidden": 128, "num_blocks": 2},
}
CLONING = {"num_updates": 2500, "learning_rate": 2e-3, "batch_size": 128}
FAGRPO_SETTINGS = {"group_size": 8, "batch_size": 128, "n_epochs": 2}
PPO_SETTINGS = {"batch_size": 80, "n_epochs": 10, "policy_kwargs": {"net_arch": [256, 256]}}
LEARNING_RATES = {"FA-GRPO": 5e-5, "PPO": 1e-4}


class PlaneTask(VecEnv):
    """Many points in the plane in one array; an episode is ``horizon`` chunks of ``chunk`` moves in [-1, 1]^2."""

    chunk: ClassVar[int]
    horizon: ClassVar[int]
    observed: ClassVar[int]
    """Numbers in an observation."""

    def __init__(self, num_envs: int) -> None:
        self.render_mode = None
        self.state = np.zeros((num_envs, self.observed))
        self.time = np.zeros(num_envs, dtype=np.int64)
        self.generators = [np.random.default_rng() for _ in range(num_envs)]
        super().__init__(
            num_envs,
            spaces.Box(-10, 10, (self.observed,), np.float32),
            spaces.Box(-1, 1, (self.chunk, 2), np.float32),
        )

    def start(self, rng: np.random.Generator) -> Array:
        """A state to begin with."""
        raise NotImplementedError

    @staticmethod
    def move(state: Array, action: Array) -> Array:
        """States (N, observed) after one move (N, 2)."""
        raise NotImplementedError

    @staticmethod
    def solved(state: Array) -> NDArray[np.bool_]:
        """Which states (N, observed) are successes."""
        raise NotImplementedError

    @staticmethod
    def expert(state: Array, miss: Array, side: Array) -> Array:
        """The moves (N, 2) of an expert that takes the goal to be off by miss (N, 2) and prefers a side (N,), +-1."""
        raise NotImplementedError

    def reset(self) -> NDArray[np.float32]:
        for i, seed in enumerate(self._seeds):
            if seed is not None:
                self.generators[i] = np.random.default_rng(seed)
            self._begin(i)
        self._reset_seeds()
        return self.state.astype(np.float32)

    def _begin(self, i: int) -> None:
        self.state[i], self.time[i] = self.start(self.generators[i]), 0

    def step_async(self, actions: NDArray[np.float32]) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        for k in range(self.chunk):
            self.state = self.move(self.state, self.actions[:, k].astype(np.float64))
        self.time += 1
        success = self.solved(self.state)
        dones = success | (self.time >= self.horizon)
        infos: list[dict[str, Any]] = [{"is_success": bool(value)} for value in success]
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = self.state[i].astype(np.float32)
            infos[i]["TimeLimit.truncated"] = not success[i]
            self._begin(i)
        return self.state.astype(np.float32), success.astype(np.float32), dones, infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("these environments share their attributes")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("these environments have no methods of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


class ReachAndStop(PlaneTask):
    """Come to rest within 0.04 of the goal, by accelerations. State: position, velocity, goal."""

    chunk, horizon, observed = 4, 10, 6

    def start(self, rng: np.random.Generator) -> Array:
        position, goal = rng.uniform(-1, 1, (2, 2))
        return np.concatenate([position, np.zeros(2), goal])

    @staticmethod
    def move(state: Array, action: Array) -> Array:
        position, velocity, goal = np.split(state, 3, axis=1)
        velocity = velocity + 0.25 * action
        return np.concatenate([position + 0.1 * velocity, velocity, goal], axis=1)

    @staticmethod
    def solved(state: Array) -> NDArray[np.bool_]:
        position, velocity, goal = np.split(state, 3, axis=1)
        near = np.linalg.norm(position - goal, axis=1) < 0.04
        return near & (np.linalg.norm(velocity, axis=1) < 0.2)

    @staticmethod
    def expert(state: Array, miss: Array, side: Array) -> Array:
        position, velocity, goal = np.split(state, 3, axis=1)
        return 2.5 * (goal + miss - position) - 3.0 * velocity


class PushAround(PlaneTask):
    """Push a puck onto the goal; the hand begins between the two and must go round the puck, on one side or the other.

    Quasi-static: the hand moves the puck out of its way, and only then. State: hand, puck, goal.
    """

    chunk, horizon, observed = 8, 10, 6
    contact = 0.15  # sum of the two radii
    speed = 0.03

    def start(self, rng: np.random.Generator) -> Array:
        puck = rng.uniform(-0.4, 0.4, 2)
        angle = rng.uniform(-np.pi, np.pi)
        goal = puck + rng.uniform(0.4, 0.6) * np.array([np.cos(angle), np.sin(angle)])
        angle += rng.uniform(-0.3, 0.3)
        hand = puck + rng.uniform(0.2, 0.3) * np.array([np.cos(angle), np.sin(angle)])
        return np.concatenate([hand, puck, goal])

    @staticmethod
    def move(state: Array, action: Array) -> Array:
        hand, puck, goal = np.split(state, 3, axis=1)
        hand = hand + PushAround.speed * action
        apart = puck - hand
        distance = np.linalg.norm(apart, axis=1, keepdims=True)
        pushed = hand + PushAround.contact * apart / np.maximum(distance, 1e-6)
        return np.concatenate([hand, np.where(distance < PushAround.contact, pushed, puck), goal], axis=1)

    @staticmethod
    def solved(state: Array) -> NDArray[np.bool_]:
        return np.linalg.norm(state[:, 2:4] - state[:, 4:6], axis=1) < 0.05

    @staticmethod
    def expert(state: Array, miss: Array, side: Array) -> Array:
        hand, puck, goal = np.split(state, 3, axis=1)
        rest = goal + miss - puck
        left = np.linalg.norm(rest, axis=1, keepdims=True)
        forward = rest / np.maximum(left, 1e-6)
        offset = hand - puck
        radius = np.linalg.norm(offset, axis=1, keepdims=True)
        outward = offset / np.maximum(radius, 1e-6)
        behind = -np.sum(outward * forward, axis=1, keepdims=True)  # 1: the puck is exactly ahead
        tangent = side[:, None] * np.stack([-outward[:, 1], outward[:, 0]], axis=1)
        circle = tangent + 8.0 * (PushAround.contact + 0.06 - radius) * outward
        lateral = offset - np.sum(offset * forward, axis=1, keepdims=True) * forward
        push = np.minimum(1.0, left / PushAround.speed / 2) * forward - 10.0 * lateral
        return np.where(behind > 0.95, push, circle)


TASKS: dict[str, type[PlaneTask]] = {"reach": ReachAndStop, "push": PushAround}
EPISODES = 600
MISS = {"reach": 0.05, "push": 0.04}
"""Standard deviation of what the expert takes the goal to be off by; makes it succeed in about half of the episodes."""


def demonstrate(task: str, rng: np.random.Generator) -> Demonstrations:
    """Episodes of the imperfect expert, with noise on every move."""
    envs = TASKS[task](EPISODES)
    envs._seeds = rng.integers(2**31, size=EPISODES).tolist()
    observation = envs.reset()
    miss, side = rng.normal(0.0, MISS[task], (EPISODES, 2)), rng.choice([-1.0, 1.0], EPISODES)
    observations, actions, owners = [], [], []
    running = np.ones(EPISODES, bool)
    for _ in range(envs.horizon):
        state, chunk = envs.state.copy(), np.zeros((EPISODES, envs.chunk, 2))
        for k in range(envs.chunk):
            chunk[:, k] = np.clip(envs.expert(state, miss, side), -1, 1)
            state = envs.move(state, chunk[:, k])
        noisy = np.clip(chunk + rng.normal(0.0, 0.1, chunk.shape), -1, 1).astype(np.float32)
        observations.append(observation[running])
        actions.append(noisy[running])
        owners.append(np.flatnonzero(running))
        observation, _, dones, _ = envs.step(noisy)
        running &= ~dones
    return Demonstrations(np.concatenate(observations), np.concatenate(actions), np.concatenate(owners))


def variants() -> dict[str, dict[str, Any]]:
    """Arguments of FAGRPO by name."""
    chosen: dict[str, dict[str, Any]] = {}
    for ratio, scale in itertools.product(RATIOS, ("none", "paper", "equalizing")):
        for placement in PLACEMENTS if scale != "none" else PLACEMENTS[:1]:
            name = ratio if scale == "none" else f"{ratio}, {scale} on {placement}"
            chosen[name] = {"ratio": ratio, "flow_scale": scale, "flow_scale_placement": placement}
    return chosen


def success_rate(task: str, model: BaseAlgorithm, deterministic: bool) -> float:
    """Over fixed starts."""
    envs = TASKS[task](EVALUATION_EPISODES)
    envs.seed(1_000_000)
    observation = envs.reset()
    solved, running = np.zeros(len(observation), bool), np.ones(len(observation), bool)
    for _ in range(envs.horizon):
        actions, _ = model.predict(observation, deterministic=deterministic)
        observation, _, dones, infos = envs.step(actions)
        solved |= running & np.array([info["is_success"] for info in infos])
        running &= ~dones
    return float(solved.mean())


def settings_of(task: str, name: str, steps: int, learning_rate: float | None) -> dict[str, Any]:
    """All that a run's result depends on, except its seed."""
    algorithm = "PPO" if name == "PPO" else "FA-GRPO"
    return {
        "task": inspect.getsource(PlaneTask) + inspect.getsource(TASKS[task]) + inspect.getsource(demonstrate),
        "expert": [EPISODES, MISS[task]],
        "evaluation_episodes": EVALUATION_EPISODES,
        "num_envs": NUM_ENVS,
        "steps": steps,
        "learning_rate": learning_rate or LEARNING_RATES[algorithm],
        "cloning": CLONING if algorithm == "FA-GRPO" else inspect.getsource(clone_gaussian),
        "policy": POLICY if algorithm == "FA-GRPO" else {},
        "algorithm": PPO_SETTINGS if name == "PPO" else FAGRPO_SETTINGS | variants()[name],
    }


def hash_of(settings: dict[str, Any]) -> str:
    """A short name of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def cloned_flow(task: str, seed: int, folder: Path) -> Path:
    """The exported flow policy that all variants of a seed start from, trained once."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = {key: value for key, value in settings_of(task, "chunk", 0, 1.0).items() if key != "algorithm"}
    path = folder / f"{task}_{seed}_{hash_of(recipe)}"
    if not path.exists():
        envs = TASKS[task](1)
        policy = FlowPolicy(envs.observation_space, envs.action_space, **POLICY)
        demonstrations = demonstrate(task, np.random.default_rng(seed))
        behaviour_cloning(policy, demonstrations, **CLONING, seed=seed, progress_bar=False)
        temporary = folder / f".{path.name}"
        policy.export_safetensors(temporary)
        os.replace(temporary, path)
    return path


def run(task: str, name: str, seed: int, steps: int, learning_rate: float | None, folder: Path) -> dict[str, Any]:
    """Clone, evaluate, train, evaluate."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    settings = settings_of(task, name, steps, learning_rate)
    envs = VecMonitor(TASKS[task](NUM_ENVS))
    common = {"learning_rate": settings["learning_rate"], "seed": seed, "device": "cpu"}
    model: BaseAlgorithm
    if name == "PPO":
        model = PPO("MlpPolicy", envs, n_steps=TASKS[task].horizon, **PPO_SETTINGS, **common)
        clone_gaussian(model, demonstrate(task, np.random.default_rng(seed)))
    else:
        model = FAGRPO(
            FlowPolicy.from_safetensors(cloned_flow(task, seed, folder)), envs, **settings["algorithm"], **common
        )
    result = {"task": task, "name": name, "seed": seed, "settings": hash_of(settings)}
    result |= {"before": success_rate(task, model, True), "before_sampled": success_rate(task, model, False)}
    model.learn(steps)
    return result | {"after": success_rate(task, model, True), "after_sampled": success_rate(task, model, False)}


def clone_gaussian(model: PPO, demonstrations: Demonstrations) -> None:
    """Maximum likelihood of the demonstrated actions under PPO's Gaussian policy."""
    observations = torch.as_tensor(np.asarray(demonstrations.observations))
    actions = torch.as_tensor(demonstrations.actions)
    optimizer = torch.optim.Adam(model.policy.parameters(), lr=1e-3)
    for _ in range(3000):
        rows = torch.randint(len(actions), (256,))
        _, log_prob, _ = model.policy.evaluate_actions(observations[rows], actions[rows].flatten(1))
        loss = -log_prob.mean() + F.relu(-2.0 - model.policy.log_std).sum()  # a floor of the noise: it must explore
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def interquartile(scores: Array, levels: tuple[float, float] = (2.5, 97.5)) -> tuple[float, float, float]:
    """Interquartile mean of scores (tasks, seeds) and its bootstrap interval, seeds drawn anew within each task."""
    rng = np.random.default_rng(0)
    tasks, seeds = scores.shape
    drawn = scores[np.arange(tasks)[:, None], rng.integers(seeds, size=(2000, tasks, seeds))]
    low, high = np.percentile(trim_mean(drawn.reshape(2000, -1), 0.25, axis=1), levels)
    return float(trim_mean(scores.ravel(), 0.25)), float(low), float(high)


def effects(scores: dict[str, Array]) -> dict[str, Array]:
    """Differences (tasks, seeds) of one choice from another, averaged over all the other choices; seeds are paired.

    :param scores: success (tasks, seeds) by name of the variant, all of them
    """

    def mean(ratio: str = "", scale: str = "") -> Array:
        chosen = [
            values
            for name, values in scores.items()
            if name.split(",")[0] in (ratio or RATIOS) and name.partition(", ")[2].startswith(scale)
        ]
        return np.mean(chosen, axis=0)

    plain = np.mean([scores[ratio] for ratio in RATIOS], axis=0)
    found = {f"{ratio} - flow_step": mean(ratio) - mean("flow_step") for ratio in ("chunk", "dim")}
    for scale, placement in itertools.product(("paper", "equalizing"), PLACEMENTS):
        found[f"{scale} on {placement} - none"] = mean(scale=f"{scale} on {placement}") - plain
    found["chunk, paper on advantage - chunk"] = scores["chunk, paper on advantage"] - scores["chunk"]
    return found


MODES = {"deterministic": "", "sampled": "_sampled"}
"""How the policies act in the evaluation, and the ending of the results' keys."""

Collected = dict[str, dict[str, Array]]
"""Success (tasks, seeds) by mode and name."""


def draw(scores: Collected, before: Collected, tasks: Sequence[str], path: Path) -> None:
    """A row of panels per mode; a bar per name, and a tick for the cloned policy it began from."""
    names = list(scores["sampled"])
    size = (4 * len(tasks) + 5, len(MODES) * (0.25 * len(names) + 1.2))
    figure, axes = plt.subplots(len(MODES), len(tasks) + 1, figsize=size, sharey=True, sharex=True, squeeze=False)
    for row, mode in enumerate(MODES):
        for column, title in enumerate([*tasks, "all tasks"]):
            chosen = slice(column, column + 1) if column < len(tasks) else slice(None)
            values = 100 * np.array([interquartile(scores[mode][name][chosen]) for name in names])
            began = [100 * interquartile(before[mode][name][chosen])[0] for name in names]
            errors = np.abs(values[:, 1:].T - values[:, 0])
            colors = ["C1" if name == "PPO" else "C0" for name in names]
            panel = axes[row, column]
            panel.barh(names, values[:, 0], xerr=errors, color=colors, alpha=0.8)
            panel.plot(began, names, "k|", markersize=11, markeredgewidth=2, label="cloned policy, before")
            panel.set(title=f"{title}, {mode} action", xlim=(0, 100))
            panel.grid(axis="x", alpha=0.3)
    for panel in axes[-1]:
        panel.set(xlabel="success (%)")
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(results: list[dict[str, Any]], tasks: Sequence[str], names: Sequence[str], folder: Path) -> None:
    """Tables of success, and of effects where every variant was run, and the plot."""

    def collected(key: str, name: str) -> Array:
        def of(task: str) -> list[float]:
            return [result[key] for result in results if (result["task"], result["name"]) == (task, name)]

        return np.array([of(task) for task in tasks])

    def text(values: Array) -> str:
        middle, low, high = (100 * value for value in interquartile(values))
        return f"{middle:.0f} [{low:.0f}, {high:.0f}]"

    def cells(values: Array) -> list[str]:
        return [*(text(values[task : task + 1]) for task in range(len(tasks))), text(values)]

    scores = {mode: {name: collected(f"after{end}", name) for name in names} for mode, end in MODES.items()}
    before = {mode: {name: collected(f"before{end}", name) for name in names} for mode, end in MODES.items()}
    console = Console(width=140)
    for mode in MODES:
        table = Table(title=f"Success in %, {mode} action: interquartile mean over seeds [95% interval]")
        for column in ("variant", *tasks, "all tasks"):
            table.add_column(column)
        if set(names) >= {"PPO", "chunk"}:
            for name, title in (("chunk", "cloned flow policy"), ("PPO", "cloned Gaussian policy")):
                table.add_row(title, *cells(before[mode][name]))
        for name in names:
            table.add_row(name, *cells(scores[mode][name]))
        console.print(table)
        if set(names) >= set(variants()):
            table = Table(title=f"Differences in percentage points, {mode} action, averaged over the other choices")
            for column in ("difference", *tasks, "all tasks"):
                table.add_column(column)
            for name, values in effects({name: scores[mode][name] for name in variants()}).items():
                table.add_row(name, *cells(values))
            console.print(table)
    draw(scores, before, tasks, folder / "ablation.png")


def main() -> None:
    """Run what is missing, then summarise everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--names", nargs="+", default=[*variants(), "PPO"], choices=[*variants(), "PPO"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30_000, help="environment steps (chunks) of each run")
    parser.add_argument("--learning-rate", type=float, help="instead of the tuned ones")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    clones = options.out / "clones"
    clones.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def key(task: str, name: str, seed: int) -> tuple[str, str, int, str]:
        return task, name, seed, hash_of(settings_of(task, name, options.steps, options.learning_rate))

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    wanted = [key(task, name, seed) for seed in seeds for task in options.tasks for name in options.names]
    done = {(result["task"], result["name"], result["seed"], result["settings"]) for result in results}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        flows = [(task, seed) for seed in seeds for task in options.tasks if {*options.names} - {"PPO"}]
        cloning = [pool.submit(cloned_flow, task, seed, clones) for task, seed in flows]
        for future in tqdm(as_completed(cloning), total=len(cloning), desc="cloned policies"):
            future.result()
        futures = [
            pool.submit(run, *job[:3], options.steps, options.learning_rate, clones)
            for job in wanted
            if job not in done
        ]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            results.append(future.result())
            write_json(path, results)

    chosen = {(result["task"], result["name"], result["seed"], result["settings"]): result for result in results}
    report([chosen[job] for job in wanted], options.tasks, options.names, options.out)


if __name__ == "__main__":
    main()
