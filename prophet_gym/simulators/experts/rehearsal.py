"""A disturbed expert that never looks at the objects: it follows the path of its own rehearsal.

Meta-World's scripted policies, and ours for Fetch, look at the objects in every step. Disturbed, they would correct
themselves, and try again after a failure: their actions alone would tell how the episode ends. So the undisturbed
script plays the episode first; then the simulation goes back to the start, and the arm follows that path with errors
and noise. All it sees is where the arm is, so its actions are those of a success, whatever happens to the objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prophet_gym.simulators.experts.noise import ActionNoise, NoiseRecipe, point_in_disc

Array = NDArray[np.float64]

OPEN = -1.0
_GAIN = 30.0  # action units per metre of distance from the path: a third of it in a control step
_CLOSING_STEPS = 10  # control steps from the command to close until the fingers hold something
_EARLIEST_RELEASE, _LATEST_RELEASE = 12, 50  # control steps after the command to close


class Expert(Protocol):
    """Whoever acts in a scripted episode."""

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (7 K,) in [-1, 1], for K arms."""
        ...


class Arm(Protocol):
    """What the rehearsed expert sees of a simulation: where its K end-effectors are (3 K,), m, world."""

    @property
    def eef_position(self) -> Array: ...


class Stage(Arm, Protocol):
    """What a rehearsal needs of a simulation."""

    @property
    def init_state(self) -> int: ...

    def reset(self, init_state: int) -> None: ...

    def step(self, action: Array) -> None: ...

    def script(self) -> Expert: ...


@dataclass(frozen=True)
class Rehearsal:
    """What an undisturbed script did with K arms: actions (T, 7 K), and where the end-effectors were before each,
    (T, 3 K) m, world."""

    actions: Array
    positions: Array


def disturbed(stage: Stage, recipe: NoiseRecipe, rng: np.random.Generator, steps: int) -> Expert:
    """The expert of a simulation that stands at its start: the script itself where nothing disturbs it.

    Args:
        stage: the simulation; it is played for ``steps`` control steps and put back to its start if need be.
        recipe: the disturbances. ``wrong_object`` has no meaning here.
        rng: the source of all randomness.
        steps: control steps of the episode.

    Raises:
        ValueError: the recipe is to play: these scripts know their own task alone.
    """
    if recipe.play:
        raise ValueError("This script can only do its task: the recipe 'play' is for the suites of LIBERO.")
    if recipe == NoiseRecipe():
        return stage.script()
    script = stage.script()
    actions, positions = [], []
    for _ in range(steps):
        actions.append(script.act().astype(np.float64))
        positions.append(stage.eef_position)
        stage.step(actions[-1])
    stage.reset(stage.init_state)
    return Rehearsed(stage, Rehearsal(np.array(actions), np.array(positions)), recipe, rng)


class Rehearsed:
    """Follows a rehearsal with the errors and the noise of a recipe.

    The path is shifted by the grasp error from the start, and by the place error too from the time when the fingers
    have closed; after an early release the fingers stay open. Each arm has errors and noise of its own.
    """

    def __init__(self, arm: Arm, rehearsal: Rehearsal, recipe: NoiseRecipe, rng: np.random.Generator) -> None:
        self._arm = arm
        steps = len(rehearsal.actions)
        self._actions = rehearsal.actions.reshape(steps, -1, 7).copy()
        self._path = rehearsal.positions.reshape(steps, -1, 3).copy()
        self._noises = []
        for arm_actions, arm_path in zip(np.moveaxis(self._actions, 1, 0), np.moveaxis(self._path, 1, 0), strict=True):
            closing = np.flatnonzero(arm_actions[:, 6] > 0)
            first = int(closing[0]) if len(closing) else steps
            arm_path[:, :2] += point_in_disc(recipe.grasp_offset, rng)
            arm_path[first + _CLOSING_STEPS :, :2] += point_in_disc(recipe.place_offset, rng)
            if rng.uniform() < recipe.early_release:
                arm_actions[first + int(rng.integers(_EARLIEST_RELEASE, _LATEST_RELEASE)) :, 6] = OPEN
            self._noises.append(ActionNoise(recipe.action_sigma, rng))
        self._step = 0

    def act(self) -> NDArray[np.float32]:
        """The next low-level action: float32 (7 K,) in [-1, 1]."""
        actions, positions = self._actions[self._step].copy(), self._arm.eef_position.reshape(-1, 3)
        noise = np.array([noise()[:3] for noise in self._noises])
        actions[:, :3] += _GAIN * (self._path[self._step] - positions) + noise
        self._step += 1
        return np.clip(actions, -1.0, 1.0).ravel().astype(np.float32)
