"""JoinedVecEnv: several vectorized environments side by side, as one."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn


class JoinedVecEnv(VecEnv):
    """Robots of several world models in one batch: what a policy gains under all of them is less likely to be what one
    of them gets wrong.

        parts = [ProphetVecEnv(gym.make_vec("Prophet-LIBERO-v0", num_envs=64, ..., world_model=one)) for one in models]
        venv = VecMonitor(JoinedVecEnv(parts))

    The environments of the first part come first. Seeds and options go to the part that has the environment; a group of
    FAGRPO lies within one part if every part's number of environments is a multiple of the group's size.

    :param parts: with the same spaces.
    :raises ValueError: no part, or spaces that differ.
    """

    def __init__(self, parts: Sequence[VecEnv]) -> None:
        if not parts:
            raise ValueError("JoinedVecEnv needs at least one VecEnv, got none.")
        spaces = [(part.observation_space, part.action_space) for part in parts]
        if any(other != spaces[0] for other in spaces):
            raise ValueError(f"All parts must have the same spaces, got {spaces}.")
        self.parts = list(parts)
        self._ends = np.cumsum([part.num_envs for part in parts])
        super().__init__(int(self._ends[-1]), *spaces[0])

    @property
    def paused(self) -> NDArray[np.bool_]:
        """bool (num_envs,), see :class:`ProphetVectorEnv`; FAGRPO sets it."""
        return np.concatenate([part.paused for part in self.parts])  # type: ignore[attr-defined]

    @paused.setter
    def paused(self, paused: NDArray[np.bool_]) -> None:
        for part, own in zip(self.parts, self._split(paused), strict=True):
            part.paused = own  # type: ignore[attr-defined]

    def reset(self) -> VecEnvObs:
        """Begin an episode in every env, with the seeds and options set since the last reset."""
        observations = []
        for part, seeds, options in zip(self.parts, self._split(self._seeds), self._split(self._options), strict=True):
            part.unwrapped._seeds, part.unwrapped._options = seeds, options
            observations.append(part.reset())
        self.reset_infos = [info for part in self.parts for info in part.reset_infos]
        self._reset_seeds()
        self._reset_options()
        return _concatenate(observations)

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Take the actions (num_envs, ...) for :meth:`step_wait`."""
        for part, own in zip(self.parts, self._split(actions), strict=True):
            part.step_async(own)

    def step_wait(self) -> VecEnvStepReturn:
        """As the parts': observations, rewards, dones and infos of all."""
        results = [part.step_wait() for part in self.parts]
        observations, rewards, dones, infos = zip(*results, strict=True)
        self.reset_infos = [info for part in self.parts for info in part.reset_infos]
        return (
            _concatenate(observations),
            np.concatenate(rewards),
            np.concatenate(dones),
            [info for some in infos for info in some],
        )

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """The newest frame of every env."""
        return [image for part in self.parts for image in part.get_images()]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of some envs."""
        return [part.get_attr(attr_name, [index])[0] for part, index in self._located(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of some envs."""
        located = self._located(indices)
        for part in self.parts:
            if own := [index for owner, index in located if owner is part]:
                part.set_attr(attr_name, value, own)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of some envs."""
        return [
            part.env_method(method_name, *method_args, indices=[index], **method_kwargs)[0]
            for part, index in self._located(indices)
        ]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether some envs are wrapped."""
        return [part.env_is_wrapped(wrapper_class, [index])[0] for part, index in self._located(indices)]

    def _split(self, values: Any) -> list[Any]:
        """What belongs to each part, of a sequence with an entry for each env."""
        return [values[end - part.num_envs : end] for part, end in zip(self.parts, self._ends, strict=True)]

    def _located(self, indices: VecEnvIndices) -> list[tuple[VecEnv, int]]:
        """Part and index in it of some envs."""
        located = []
        for index in self._get_indices(indices):
            part = int(np.searchsorted(self._ends, index, side="right"))
            located.append((self.parts[part], int(index - self._ends[part] + self.parts[part].num_envs)))
        return located


def _concatenate(observations: Sequence[VecEnvObs]) -> VecEnvObs:
    first = observations[0]
    if isinstance(first, dict):
        return {key: np.concatenate([some[key] for some in observations]) for key in first}  # type: ignore[call-overload, index]
    return np.concatenate(observations)  # type: ignore[arg-type]
