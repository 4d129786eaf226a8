"""The environment ids, in one table: id -> entry points and default arguments."""

from typing import Any

import gymnasium as gym

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "Prophet-LIBERO-v0": {
        "entry_point": "prophet_gym.envs.single_env:ProphetEnv",
        "vector_entry_point": "prophet_gym.envs.vector_env:ProphetVectorEnv",
        "kwargs": {"suite": "libero_object", "world_model": "prophet-libero-tiny", "reward_model": "reward-libero"},
    },
    "LIBERO-v0": {
        "entry_point": "prophet_gym.simulators.libero:LiberoEnv",
        "kwargs": {"suite": "libero_object"},
    },
}


def register_envs() -> None:
    """Register the ids with Gymnasium; again is harmless. Importing ``prophet_gym`` calls it."""
    for env_id, arguments in ENVIRONMENTS.items():
        if env_id not in gym.registry:
            gym.register(env_id, **arguments)
