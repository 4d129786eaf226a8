"""prophet_gym: a Gymnasium environment that imagines robot manipulation. Importing it registers the environment ids.

The names below are imported when they are first used, so that this import is fast and torch is loaded by the first env.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prophet_gym.registration import register_envs

if TYPE_CHECKING:
    from prophet_gym.envs.models import WEIGHTS
    from prophet_gym.envs.sb3_vec_env import ProphetVecEnv
    from prophet_gym.envs.single_env import ProphetEnv
    from prophet_gym.envs.vector_env import ProphetVectorEnv
    from prophet_gym.reward.success_classifier import SuccessClassifier
    from prophet_gym.simulators.libero import LiberoEnv
    from prophet_gym.world_model.pipeline import ProphetPipeline

__version__ = "0.1.0"

__all__ = [
    "WEIGHTS",
    "LiberoEnv",
    "ProphetEnv",
    "ProphetPipeline",
    "ProphetVecEnv",
    "ProphetVectorEnv",
    "SuccessClassifier",
    "register_envs",
]

_MODULES = {
    "WEIGHTS": "prophet_gym.envs.models",
    "LiberoEnv": "prophet_gym.simulators.libero",
    "ProphetEnv": "prophet_gym.envs.single_env",
    "ProphetPipeline": "prophet_gym.world_model.pipeline",
    "ProphetVecEnv": "prophet_gym.envs.sb3_vec_env",
    "ProphetVectorEnv": "prophet_gym.envs.vector_env",
    "SuccessClassifier": "prophet_gym.reward.success_classifier",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_envs()
