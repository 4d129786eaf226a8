"""FA-GRPO's choices against each other and against PPO, at equal environment steps.

    python benchmarks/ablation.py --out runs/ablation

A point with inertia must come to rest on a goal; it is pushed by chunks of four accelerations, and is paid 1 at success
and nothing else. A flow policy is cloned from an expert that misses the goal a little, and so succeeds in about half
of the episodes; every variant of FA-GRPO starts from the same clone of its seed, and PPO from a Gaussian policy cloned
from the same demonstrations. Writes results.json (every run) and ablation.png (interquartile means over seeds with 95%
bootstrap intervals, after Agarwal et al. 2021), and prints the table. A finished run is not repeated.
"""

import argparse
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap, trim_mean
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch.nn import functional as F
from tqdm import tqdm

from fagrpo import FAGRPO, Demonstrations, FlowPolicy, behaviour_cloning
from fagrpo.objective import PLACEMENTS, RATIOS

CHUNK = 4
HORIZON = 10
RADIUS, REST = 0.04, 0.2
NUM_ENVS = 32


class ReachAndStop(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Come to rest (speed below ``REST``) within ``RADIUS`` of a goal in the plane, in ``HORIZON`` chunks."""

    observation_space = spaces.Box(-10, 10, (6,), np.float32)
    action_space = spaces.Box(-1, 1, (CHUNK, 2), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a position and a goal; the point is at rest."""
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        self.velocity, self.time = np.zeros(2), 0
        return self._observation(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Four accelerations."""
        for push in action.astype(np.float64):
            self.velocity = self.velocity + 0.25 * push
            self.position = self.position + 0.1 * self.velocity
        self.time += 1
        near = np.linalg.norm(self.position - self.goal) < RADIUS
        success = bool(near and np.linalg.norm(self.velocity) < REST)
        return self._observation(), float(success), success, self.time >= HORIZON, {"is_success": success}

    def _observation(self) -> NDArray[np.float32]:
        return np.concatenate([self.position, self.velocity, self.goal]).astype(np.float32)


def demonstrate(episodes: int, rng: np.random.Generator) -> Demonstrations:
    """A damped spring towards a point beside the goal, with noise on every push."""
    env = ReachAndStop()
    observations, actions, owners = [], [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=int(rng.integers(2**31)))
        miss = rng.normal(0.0, 0.05, 2)
        for _ in range(HORIZON):
            position, velocity, goal = np.split(observation.astype(np.float64), 3)
            chunk = np.zeros((CHUNK, 2))
            for k in range(CHUNK):
                chunk[k] = np.clip(2.5 * (goal + miss - position) - 3.0 * velocity, -1, 1)
                velocity = velocity + 0.25 * chunk[k]
                position = position + 0.1 * velocity
            chunk = np.clip(chunk + rng.normal(0.0, 0.1, chunk.shape), -1, 1).astype(np.float32)
            observations.append(observation)
            actions.append(chunk)
            owners.append(episode)
            observation, *_ = env.step(chunk)
    return Demonstrations(np.stack(observations), np.stack(actions), np.array(owners))


def variants() -> dict[str, dict[str, Any]]:
    """Arguments of FAGRPO by name."""
    chosen: dict[str, dict[str, Any]] = {}
    for ratio, scale in itertools.product(RATIOS, ("none", "paper", "equalizing")):
        for placement in PLACEMENTS if scale != "none" else PLACEMENTS[:1]:
            name = ratio if scale == "none" else f"{ratio}, {scale} on {placement}"
            chosen[name] = {"ratio": ratio, "flow_scale": scale, "flow_scale_placement": placement}
    return chosen


def success_rate(model: BaseAlgorithm | FlowPolicy, episodes: int = 200) -> float:
    """Over fixed starts, with the policy's deterministic action."""
    envs = DummyVecEnv([ReachAndStop] * episodes)
    envs.seed(10_000)
    observation = envs.reset()
    solved, running = np.zeros(episodes, bool), np.ones(episodes, bool)
    for _ in range(HORIZON):
        actions, _ = model.predict(observation, deterministic=True)
        observation, _, dones, infos = envs.step(actions)
        solved |= running & np.array([info["is_success"] for info in infos])
        running &= ~dones
    return float(solved.mean())


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Clone, evaluate, train, evaluate."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    demonstrations = demonstrate(300, np.random.default_rng(seed))
    envs = VecMonitor(DummyVecEnv([ReachAndStop] * NUM_ENVS))
    model: BaseAlgorithm
    if name == "PPO":
        model = PPO("MlpPolicy", envs, n_steps=HORIZON, batch_size=NUM_ENVS * HORIZON // 4, seed=seed, device="cpu")
        clone_gaussian(model, demonstrations)
    else:
        policy = FlowPolicy(
            ReachAndStop.observation_space,
            ReachAndStop.action_space,
            num_flow_steps=5,
            features_extractor_kwargs={"features_dim": 64, "vector_dim": 64},
            flow_head_kwargs={"width": 64, "hidden": 128, "num_blocks": 2},
        )
        behaviour_cloning(policy, demonstrations, num_updates=1500, learning_rate=2e-3, seed=seed, progress_bar=False)
        model = FAGRPO(policy, envs, learning_rate=2e-4, seed=seed, device="cpu", **variants()[name])
    before = success_rate(model)
    model.learn(steps)
    return {"name": name, "seed": seed, "steps": steps, "before": before, "after": success_rate(model)}


def clone_gaussian(model: PPO, demonstrations: Demonstrations) -> None:
    """Maximum likelihood of the demonstrated actions under PPO's Gaussian policy."""
    observations = torch.as_tensor(np.asarray(demonstrations.observations))
    actions = torch.as_tensor(demonstrations.actions)
    optimizer = torch.optim.Adam(model.policy.parameters(), lr=1e-3)
    for _ in range(1500):
        rows = torch.randint(len(actions), (256,))
        _, log_prob, _ = model.policy.evaluate_actions(observations[rows], actions[rows].flatten(1))
        loss = -log_prob.mean() + F.relu(-2.0 - model.policy.log_std).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def summarize(results: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Interquartile mean of the final success over seeds, and its 95% bootstrap interval, by name."""
    summary = {}
    for name in dict.fromkeys(result["name"] for result in results):
        scores = np.array([result["after"] for result in results if result["name"] == name])
        middle = float(trim_mean(scores, 0.25))
        low, high = middle, middle
        if len(np.unique(scores)) > 1:
            interval = bootstrap(
                (scores,), lambda x, axis: trim_mean(x, 0.25, axis=axis), method="percentile", rng=0
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
        summary[name] = (middle, low, high)
    return summary


def draw(summary: dict[str, tuple[float, float, float]], cloned: float, path: Path) -> None:
    """One horizontal bar per name."""
    names = list(summary)
    values = 100 * np.array([summary[name] for name in names])
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(names) + 1.2))
    errors = np.abs(values[:, 1:].T - values[:, 0])
    axes.barh(names, values[:, 0], xerr=errors, color=["C1" if name == "PPO" else "C0" for name in names], alpha=0.8)
    axes.axvline(100 * cloned, color="k", linestyle=":", label="cloned flow policy")
    axes.set(xlabel="success (%), interquartile mean and 95% interval over seeds", xlim=(0, 100))
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run what is missing, then summarise everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps (chunks) of each run")
    parser.add_argument("--names", nargs="+", default=[*variants(), "PPO"], choices=[*variants(), "PPO"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(result["name"], result["seed"], result["steps"]) for result in results}
    wanted = [(name, seed, options.steps) for seed in range(options.seeds) for name in options.names]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, *job) for job in wanted if job not in done]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            results.append(future.result())
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1))
            os.replace(temporary, path)

    results = [result for result in results if (result["name"], result["seed"], result["steps"]) in set(wanted)]
    results.sort(key=lambda result: options.names.index(result["name"]))
    summary = summarize(results)
    table = Table(title=f"Success after {options.steps} steps, {options.seeds} seeds")
    for column in ("variant", "cloned", "after [95% interval]"):
        table.add_column(column)
    for name, (middle, low, high) in summary.items():
        before = np.mean([result["before"] for result in results if result["name"] == name])
        table.add_row(name, f"{100 * before:.0f}%", f"{100 * middle:.0f}% [{100 * low:.0f}, {100 * high:.0f}]")
    Console().print(table)
    cloned = float(np.mean([result["before"] for result in results if result["name"] != "PPO"] or [0.0]))
    draw(summary, cloned, options.out / "ablation.png")


if __name__ == "__main__":
    main()
