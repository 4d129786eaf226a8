"""Train a Stable-Baselines3 algorithm in Prophet-LIBERO-v0: what you have for any other environment works here.

python examples/train_sb3.py --algorithm SAC --timesteps 5000
"""

import argparse
from pathlib import Path

import gymnasium as gym
import stable_baselines3
from stable_baselines3.common.vec_env import VecMonitor

from prophet_gym import ProphetVecEnv

ALGORITHMS = ("PPO", "A2C", "SAC", "TD3")


def main() -> None:
    """Train and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="PPO")
    parser.add_argument("--timesteps", type=int, default=5000)
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--task", default=None, help="index or snake-case name; drawn at each reset by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sb3"))
    arguments = parser.parse_args()

    envs = gym.make_vec(
        "prophet_gym:Prophet-LIBERO-v0",
        num_envs=arguments.num_envs,
        task=int(arguments.task) if str(arguments.task).isdigit() else arguments.task,
        reward_type="probability",  # the success probability gained in a step: denser than success alone
        autoreset_mode="SameStep",
    )
    venv = VecMonitor(ProphetVecEnv(envs), info_keywords=("is_success",))
    # Off-policy algorithms keep transitions in memory: an image is 27 kB, twice a transition. PPO's 2048 steps of every
    # env before its first update would take many minutes: an episode has 20.
    settings = {"SAC": {"buffer_size": 10_000}, "TD3": {"buffer_size": 10_000}, "PPO": {"n_steps": 20}}
    model = getattr(stable_baselines3, arguments.algorithm)(
        "MultiInputPolicy",
        venv,
        seed=arguments.seed,
        verbose=1,
        tensorboard_log=str(arguments.out),
        **settings.get(arguments.algorithm, {}),
    )
    model.learn(arguments.timesteps, progress_bar=True)
    model.save(arguments.out / arguments.algorithm.lower())


if __name__ == "__main__":
    main()
