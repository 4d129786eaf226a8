"""Imagined chunks per second at several numbers of envs, beside real LIBERO chunks per second on the same machine.

    python benchmarks/env_speed.py --out env_speed.json

One chunk is one step of one env: 8 control steps, 0.4 s of robot time. Imagined and real steps take the same random
actions; resets and the first step (allocation, caches) are not timed. LIBERO runs one simulation in one process, as
``LIBERO-v0`` does; without ``prophet-gym[libero]`` its part is skipped. What is imagined without video
(``video=False``) is compared with LIBERO without any picture.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

import prophet_gym
from prophet_gym.data.lerobot_format.schema import write_json

CHUNK_SECONDS = 0.4


def time_imagined(num_envs: int, steps: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Step a vector env ``steps`` times; seconds of every step and what follows from them."""
    envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=num_envs, max_chunks=steps + 1, **arguments)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    envs.step(envs.action_space.sample())
    seconds = []
    for _ in tqdm(range(steps), desc=f"imagined, {num_envs} envs", leave=False):
        actions = envs.action_space.sample()
        begin = time.perf_counter()
        envs.step(actions)
        seconds.append(time.perf_counter() - begin)
    envs.close()
    device = str(envs.unwrapped.world_model.device)
    return _summary("imagined", envs.unwrapped.video, num_envs, seconds) | {"device": device}


def time_libero(steps: int, suite: str, video: bool) -> dict[str, Any] | str:
    """The same for the real simulator, with or without its pictures; a message where it cannot run."""
    try:
        env = gym.make("LIBERO-v0", suite=suite, task=0, max_chunks=steps + 1)
        env.reset(seed=0)
    except (ImportError, RuntimeError) as error:
        return str(error)
    simulation = env.unwrapped.simulation
    if not video:
        picture = simulation.render()
        simulation.render = lambda: picture
    env.action_space.seed(0)
    env.step(env.action_space.sample())
    seconds = []
    for _ in tqdm(range(steps), desc="LIBERO", leave=False):
        action = env.action_space.sample()
        begin = time.perf_counter()
        *_, terminated, truncated, _ = env.step(action)
        seconds.append(time.perf_counter() - begin)
        if terminated or truncated:
            env.reset()
    env.close()
    return _summary("LIBERO", video, 1, seconds)


def _summary(name: str, video: bool, num_envs: int, seconds: list[float]) -> dict[str, Any]:
    return {
        "env": name,
        "video": video,
        "num_envs": num_envs,
        "steps": len(seconds),
        "median_step_seconds": float(np.median(seconds)),
        "chunks_per_second": num_envs * len(seconds) / sum(seconds),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 16, 64], help="sizes of the vector env")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per size, and of LIBERO")
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--world-model", help="name or path; default: the shipped one")
    parser.add_argument("--reward-model", help="name or path; default: the shipped one")
    parser.add_argument("--start-states", help="parquet file; default: the shipped one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the world model: float32, bfloat16 or float16")
    parser.add_argument("--num-sampling-steps", type=int, help="denoising steps per chunk; default: the model's own")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("env_speed.json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("suite", "world_model", "reward_model", "start_states", "device", "dtype", "num_sampling_steps")
    arguments = {name: getattr(options, name) for name in names if getattr(options, name) is not None}

    rows = []
    for video in (True, False):
        imagined = [
            time_imagined(num_envs, options.steps, arguments | {"video": video}) for num_envs in options.num_envs
        ]
        libero = time_libero(options.steps, options.suite, video)
        rows += imagined
        if isinstance(libero, str):
            print(f"LIBERO skipped: {libero}", file=sys.stderr)
            continue
        for row in imagined:
            row["times_libero"] = row["chunks_per_second"] / libero["chunks_per_second"]
        rows.append(libero)

    print(f"{'env':10} {'video':>5} {'envs':>5} {'ms a step':>10} {'chunks/s':>9} {'x real time':>12} {'x LIBERO':>9}")
    for row in rows:
        real_time, ratio = row["chunks_per_second"] * CHUNK_SECONDS, row.get("times_libero")
        print(
            f"{row['env']:10} {'yes' if row['video'] else 'no':>5} {row['num_envs']:5} "
            f"{1000 * row['median_step_seconds']:10.1f} {row['chunks_per_second']:9.1f} "
            f"{real_time:12.1f} {'' if ratio is None else f'{ratio:.1f}':>9}"
        )
    report = {
        "prophet_gym": prophet_gym.__version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu" if rows[0]["device"] == "cpu" else torch.cuda.get_device_name(),
        "arguments": arguments,
        "rows": rows,
    }
    write_json(options.out, report)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
