"""Time and peak memory of one update: FA-GRPO against Stable-Baselines3's PPO with a network of equal size.

    python benchmarks/update_cost.py --out runs/update_cost

Both learn from the same number of environment actions, in as many epochs and batches of the same size. FA-GRPO scores
every flow step of every action, so its cost grows with K; the table says how, and how it grows with the group size.
Every row is a process of its own; all ratios are to the PPO of the same run with as many actions. Memory is how far the
resident set grows during the first update, the optimizer's state included (Linux); time is the processor time of the
later ones, of one thread, so that other programs on the machine change it little.
"""

import argparse
import ctypes
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from tqdm import tqdm

from fagrpo import FAGRPO
from prophet_gym.data.lerobot_format.schema import write_json

HORIZON = 20
GROUPS = 8
EPOCHS = 2
BATCHES = 4  # per epoch


class Noise(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Chunks of 8 actions x 7, like a robot's; costs nothing and means nothing."""

    observation_space = spaces.Box(-10, 10, (64,), np.float32)
    action_space = spaces.Box(-1, 1, (8, 7), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode of ``HORIZON`` steps."""
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.standard_normal(64).astype(np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Noise, and the first number of the action as the reward."""
        self.time += 1
        observation = self.np_random.standard_normal(64).astype(np.float32)
        return observation, float(action[0, 0]), False, self.time >= HORIZON, {}


class UpdateCost(BaseCallback):
    """Processor seconds, and growth of the resident set in MB, of every update."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.megabytes: list[float] = []
        self._begin: tuple[float, float] | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what collecting freed is not there to be filled again
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._begin = time.process_time(), _resident("VmRSS")

    def _on_rollout_start(self) -> None:
        if self._begin is not None:
            self.seconds.append(time.process_time() - self._begin[0])
            self.megabytes.append(_resident("VmHWM") - self._begin[1])

    _on_training_end = _on_rollout_start


def _resident(field: str) -> float:
    """A field of /proc/self/status, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def parameters(model: BaseAlgorithm) -> int:
    """Trained numbers of a model's policy."""
    return sum(weight.numel() for weight in model.policy.parameters() if weight.requires_grad)


def measure(algorithm: str, group_size: int, flow_steps: int, updates: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    envs = DummyVecEnv([Noise] * (GROUPS * group_size))
    batch_size = envs.num_envs * HORIZON // BATCHES
    flow = FAGRPO(
        "FlowPolicy",
        envs,
        group_size=group_size,
        max_episode_steps=HORIZON,
        batch_size=batch_size,
        n_epochs=EPOCHS,
        policy_kwargs={"num_flow_steps": flow_steps},
        seed=0,
        device="cpu",
    )
    model: BaseAlgorithm = flow
    if algorithm == "PPO":
        sizes = {width: parameters(_ppo(envs, width, batch_size)) for width in range(64, 1025, 32)}
        width = min(sizes, key=lambda width: abs(sizes[width] - parameters(flow)))
        model = _ppo(envs, width, batch_size)
    cost = UpdateCost()
    model.learn((updates + 1) * envs.num_envs * HORIZON, callback=cost)
    return {
        "algorithm": algorithm,
        "group_size": group_size,
        "flow_steps": flow_steps,
        "actions": envs.num_envs * HORIZON,
        "parameters": parameters(model),
        "seconds": cost.seconds[1:],
        "megabytes": cost.megabytes[0],
    }


def _ppo(envs: DummyVecEnv, width: int, batch_size: int) -> PPO:
    network = {"net_arch": {"pi": [width] * 3, "vf": [width] * 3}}
    return PPO(
        "MlpPolicy",
        envs,
        n_steps=HORIZON,
        batch_size=batch_size,
        n_epochs=EPOCHS,
        policy_kwargs=network,
        seed=0,
        device="cpu",
    )


def main() -> None:
    """Measure every row, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/update_cost"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    settings = [("PPO", size, 10) for size in (4, 8, 16)]
    settings += [("FA-GRPO", 8, steps) for steps in (2, 5, 10, 20)]
    settings += [("FA-GRPO", size, 10) for size in (4, 16)]
    rows = []
    for setting in tqdm(settings, desc="measuring"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, *setting, arguments.updates).result())
    peers = {row["group_size"]: row for row in rows if row["algorithm"] == "PPO"}

    table = Table(title=f"One update: {EPOCHS} epochs of {BATCHES} batches, medians of {arguments.updates}")
    for column in ("algorithm", "G", "K", "actions", "parameters", "seconds", "x PPO", "MB", "x PPO"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds, megabytes = np.median(row["seconds"]), row["megabytes"]
        peer = peers[row["group_size"]]
        row["seconds_ratio"] = float(seconds / np.median(peer["seconds"]))
        row["megabytes_ratio"] = megabytes / peer["megabytes"]
        table.add_row(
            row["algorithm"],
            str(row["group_size"]),
            str(row["flow_steps"]) if row["algorithm"] != "PPO" else "",
            str(row["actions"]),
            f"{row['parameters']:,}",
            f"{seconds:.3f}",
            f"{row['seconds_ratio']:.1f}",
            f"{megabytes:.0f}",
            f"{row['megabytes_ratio']:.1f}",
        )
    Console().print(table)
    write_json(arguments.out / "results.json", rows)


if __name__ == "__main__":
    main()
