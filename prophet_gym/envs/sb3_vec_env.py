"""ProphetVecEnv: imagined robots for Stable-Baselines3."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from prophet_gym.envs.vector_env import ProphetVectorEnv

_PER_ENV = ("np_random", "np_random_seed")
_SINGLE = {"observation_space": "single_observation_space", "action_space": "single_action_space"}


class ProphetVecEnv(VecEnv):
    """A :class:`ProphetVectorEnv` as a Stable-Baselines3 ``VecEnv``; behaves as ``DummyVecEnv`` over ``ProphetEnv``.

        envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=64, autoreset_mode="SameStep")
        venv = VecMonitor(ProphetVecEnv(envs), info_keywords=("is_success",))

    ``seed()`` and ``set_options()`` act at the next ``reset()`` and only there. Envs that get equal seeds have the same
    start, member and noise; ``set_options({"group_size": G})`` gives groups of G neighbours one start and member and
    different noise.

    :param envs: must autoreset in the same step, as Stable-Baselines3 does.
    :raises TypeError: not a ProphetVectorEnv.
    :raises ValueError: another autoreset mode.
    """

    def __init__(self, envs: ProphetVectorEnv) -> None:
        if not isinstance(envs, ProphetVectorEnv):
            raise TypeError(f"ProphetVecEnv wraps an unwrapped ProphetVectorEnv, got {type(envs).__name__}.")
        if envs.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                "Stable-Baselines3 resets in the step that ends an episode, and this env's autoreset_mode is "
                f'{envs.autoreset_mode.value!r}: make it with autoreset_mode="SameStep".'
            )
        self.envs = envs
        self._attributes: list[dict[str, Any]] = [{} for _ in range(envs.num_envs)]  # what set_attr() has added
        self._actions: NDArray[np.float32] | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        # As of a single env: recorders take the frame rate from it.
        self.metadata = {name: value for name, value in envs.metadata.items() if name != "autoreset_mode"}

    @property
    def paused(self) -> NDArray[np.bool_]:
        """bool (num_envs,), see :class:`ProphetVectorEnv`; FAGRPO sets it."""
        return self.envs.paused

    @paused.setter
    def paused(self, paused: NDArray[np.bool_]) -> None:
        self.envs.paused = paused

    def reset(self) -> VecEnvObs:
        """Begin an episode in every env, with the seeds and options set since the last reset."""
        try:
            obs, infos = self.envs.reset(seed=self._seeds, options=self._options)
        finally:  # wrong options are not to spoil the next reset
            self._reset_seeds()
            self._reset_options()
        self.reset_infos = [_of_env(infos, i) for i in range(self.num_envs)]
        return obs

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Take the actions (num_envs, chunk, 7 an arm) for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations, rewards float32 (num_envs,), dones (num_envs,) and one info dict per env.

        The info of a finished episode has ``terminal_observation``; the observation is the next episode's first one.
        """
        if self._actions is None:
            raise gym.error.ResetNeeded("Call step_async() before step_wait().")
        obs, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        self._actions = None
        dones = terminated | truncated
        env_infos = [_of_env(infos, i) for i in range(self.num_envs)]
        for i in np.flatnonzero(dones).tolist():
            final_info, final_obs = env_infos[i].pop("final_info"), env_infos[i].pop("final_obs")
            self.reset_infos[i] = env_infos[i]
            env_infos[i] = {**final_info, "terminal_observation": final_obs}
        for i, info in enumerate(env_infos):
            info["TimeLimit.truncated"] = bool(truncated[i])
        return obs, rewards.astype(np.float32), dones, env_infos

    def close(self) -> None:
        """Close the envs."""
        self.envs.close()

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """The newest frame of every env, uint8 (H, W, 3), or None each without ``render_mode="rgb_array"``."""
        frames = self.envs.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute as every single env would have it."""
        chosen = list(self._get_indices(indices))
        if all(attr_name in self._attributes[i] for i in chosen):
            return [self._attributes[i][attr_name] for i in chosen]
        value = getattr(self.envs, _SINGLE.get(attr_name, attr_name))
        return [value[i] for i in chosen] if attr_name in _PER_ENV else [value for _ in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of your own on some envs; one that the envs share can only be set on all of them.

        :raises ValueError: an attribute that all envs share, with ``indices`` of some of them.
        """
        chosen = list(self._get_indices(indices))
        if not hasattr(self.envs, attr_name):
            for i in chosen:
                self._attributes[i][attr_name] = value
        elif len(set(chosen)) == self.num_envs and attr_name not in _PER_ENV:
            setattr(self.envs, _SINGLE.get(attr_name, attr_name), value)
        else:
            raise ValueError(
                f"{attr_name!r} belongs to all {self.num_envs} envs at once and cannot be set on envs {chosen} alone."
            )

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call ``render``, ``clip`` or ``get_wrapper_attr`` as on single envs.

        :raises AttributeError: another method: the envs step together, so whole-batch methods are on :attr:`envs`.
        """
        chosen = list(self._get_indices(indices))
        if method_name == "get_wrapper_attr":
            return self.get_attr(method_args[0], chosen)
        if method_name not in ("render", "clip"):
            raise AttributeError(
                f"No per-env method {method_name!r}: the envs step together. Valid: ['clip', 'get_wrapper_attr', "
                "'render']. For the whole batch call ProphetVecEnv.envs, e.g. .envs.get_state()."
            )
        results = self.get_images() if method_name == "render" else self.envs.clips()
        return [results[i] for i in chosen]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False for every env: there are no single envs to wrap (use ``VecEnvWrapper``, e.g. ``VecMonitor``)."""
        return [False for _ in self._get_indices(indices)]


def _of_env(infos: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The infos of env i, out of a vector env's (Gymnasium's ``_key`` masks say which env has a key)."""
    info: dict[str, Any] = {}
    for name, values in infos.items():
        if name.startswith("_") or not infos[f"_{name}"][i]:
            continue
        value = _of_env(values, i) if isinstance(values, Mapping) else values[i]
        info[name] = value.item() if isinstance(value, np.generic) else value
    return info
