"""What can be recorded: each suite's tasks, robot, starts and experts, and what a simulator must provide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prophet_gym.data.episode import ACTION_DIM, CHUNK_SIZE, SEED_SPLITS, SPLITS
from prophet_gym.data.lerobot_format.schema import PANDA_ACTION_UNITS
from prophet_gym.simulators import fetch, libero, metaworld, two_arm
from prophet_gym.simulators.experts import EXPERT_TASKS, NOISE_SHARES, NoiseRecipe, PickAndPlace
from prophet_gym.simulators.experts.rehearsal import Expert, disturbed


class Simulation(Protocol):
    """One task of a suite in a real simulator, at 20 control steps a second."""

    suite: str
    task: int
    instruction: str

    def reset(self, init_state: int) -> None:
        """Begin at a start; the same number gives the same start, and the same actions the same episode."""
        ...

    def step(self, action: NDArray[np.float64]) -> None:
        """Execute one low-level action (7 K,) in [-1, 1] for 50 ms, with the K arms of the robot."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """The scene now: uint8 (image_size, image_size, 3), upright RGB."""
        ...

    def proprio(self) -> NDArray[np.float32]:
        """float32 (8 K,), see :class:`~prophet_gym.data.episode.Episode`."""
        ...

    def camera(self) -> dict[str, list[list[float]]]:
        """Intrinsics and extrinsics, see :class:`~prophet_gym.data.lerobot_format.LeRobotWriter`."""
        ...

    def is_success(self) -> bool:
        """The simulator's own verdict on the present state."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(frozen=True)
class Robot:
    """A robot as its data sets describe it.

    Attributes:
        name: as in ``Episode.robot``.
        action_mask: which of the 7 numbers of an action, of each arm in turn, it obeys; the others are zero in its
            recordings.
        action_units: what an action of 1.0 does, in words.
    """

    name: str
    action_mask: tuple[bool, ...]
    action_units: str

    @property
    def num_arms(self) -> int:
        """K: how many arms it has."""
        return len(self.action_mask) // ACTION_DIM


NO_ROTATION = (True, True, True, False, False, False, True)
PANDA = Robot("panda", (True,) * 7, PANDA_ACTION_UNITS)
SAWYER = Robot("sawyer", NO_ROTATION, "1.0 moves the goal by 1.6 cm; the orientation is fixed")
TWO_PANDAS = Robot("two_pandas", (True,) * 14, f"{PANDA_ACTION_UNITS}, for each arm")
FETCH = Robot("fetch", NO_ROTATION, "1.0 is a goal 1.25 cm from the current position; the orientation is fixed")


@dataclass(frozen=True)
class Suite:
    """What a recording needs to know of a suite.

    Attributes:
        robot: the robot that acts.
        tasks: indices of the tasks that are recorded.
        noise_shares: share of each recipe of ``NOISE_RECIPES``.
        load: builds the simulation of (suite, task, image size); raises ``ImportError`` where the extra is missing.
        expert: makes the scripted expert of (simulation at its start, recipe, random stream).
        starts: the initial states of each split; seeds, but for LIBERO.
        counterfactuals: where a counterfactual episode's actions come from, see ``recording.COUNTERFACTUALS``;
            without any there are none.
        control_steps: length of every episode, a multiple of 8.
        jitter_share: share of training episodes whose start is displaced, because the suite's own hardly differ.
    """

    robot: Robot
    tasks: tuple[int, ...]
    noise_shares: Mapping[str, float]
    load: Callable[[str, int, int], Simulation]
    expert: Callable[[Any, NoiseRecipe, np.random.Generator], Expert]
    starts: Mapping[str, Sequence[int]]
    counterfactuals: tuple[str, ...]
    control_steps: int
    jitter_share: float

    @property
    def recipes(self) -> list[str]:
        """The noise recipes that its script can follow."""
        return list(dict.fromkeys([*self.noise_shares, *(["play"] if self.expert is PickAndPlace else [])]))

    @property
    def max_chunks(self) -> int:
        """Length of every episode in chunks, as the environments count it."""
        return self.control_steps // CHUNK_SIZE


_SEEDED: tuple[tuple[str, Robot, int, Callable[[str, int, int], Simulation], int], ...] = (
    ("metaworld", SAWYER, len(metaworld.TASKS), metaworld.MetaWorldSimulation, metaworld.CONTROL_STEPS),
    ("fetch", FETCH, len(fetch.TASKS), fetch.FetchSimulation, fetch.CONTROL_STEPS),
    ("two_arm_lift", TWO_PANDAS, len(two_arm.TASKS), two_arm.TwoArmSimulation, two_arm.CONTROL_STEPS),
)
"""Suites that draw their starts from seeds: name, robot, number of tasks, simulation, control steps of an episode."""

SUITES = {
    suite: Suite(
        robot=PANDA,
        tasks=tasks,
        noise_shares=NOISE_SHARES[suite],
        load=libero.load_simulation,
        expert=PickAndPlace,
        starts=SPLITS,
        counterfactuals=() if suite == "libero_90" else ("shifted", "elsewhere"),
        control_steps=240 if suite == "libero_10" else 160,  # two objects, one after the other
        jitter_share=0.5,
    )
    for suite, tasks in EXPERT_TASKS.items()
} | {
    suite: Suite(
        robot=robot,
        tasks=tuple(range(tasks)),
        noise_shares=NOISE_SHARES[suite],
        load=load,
        expert=partial(disturbed, steps=control_steps),
        starts=SEED_SPLITS,
        counterfactuals=("elsewhere",),
        control_steps=control_steps,
        jitter_share=0.0,
    )
    for suite, robot, tasks, load, control_steps in _SEEDED
}
