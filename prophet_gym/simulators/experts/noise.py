"""Noise recipes: how far a scripted expert is disturbed, so that its episodes fail as honestly as they succeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prophet_gym.data.episode import PROPRIO_DIM


@dataclass(frozen=True)
class NoiseRecipe:
    """Disturbances of one expert episode.

    Attributes:
        action_sigma: standard deviation of AR(1) noise on the six motion actions, in action units.
        grasp_offset: largest horizontal error of the grasp point (m), drawn uniformly from a disc.
        place_offset: largest horizontal error of the place point (m), drawn uniformly from a disc.
        early_release: probability that the fingers open somewhere on the way of the first object.
        wrong_object: probability that another object of the scene is picked and placed instead.
        play: whether the task is ignored: any object of the scene is put on any other or on a surface, and then another
            one, as far as the time allows.
    """

    action_sigma: float = 0.0
    grasp_offset: float = 0.0
    place_offset: float = 0.0
    early_release: float = 0.0
    wrong_object: float = 0.0
    play: bool = False


NOISE_RECIPES = {
    "clean": NoiseRecipe(),
    "light": NoiseRecipe(action_sigma=0.1, grasp_offset=0.008, place_offset=0.015, wrong_object=0.05),
    "medium": NoiseRecipe(action_sigma=0.2, grasp_offset=0.02, place_offset=0.03, early_release=0.15, wrong_object=0.1),
    "heavy": NoiseRecipe(action_sigma=0.3, grasp_offset=0.035, place_offset=0.05, early_release=0.3, wrong_object=0.1),
    "play": NoiseRecipe(action_sigma=0.2, grasp_offset=0.03, place_offset=0.05, early_release=0.2, play=True),
}
NOISE_SHARES = {
    "libero_object": {"clean": 0.30, "light": 0.22, "medium": 0.28, "heavy": 0.20},
    "libero_spatial": {"clean": 0.40, "light": 0.30, "medium": 0.20, "heavy": 0.10},
    "libero_goal": {"clean": 0.40, "light": 0.30, "medium": 0.20, "heavy": 0.10},
    "libero_10": {"clean": 0.40, "light": 0.30, "medium": 0.20, "heavy": 0.10},
    "libero_90": {"play": 1.0},
    "metaworld": {"clean": 0.30, "light": 0.22, "medium": 0.28, "heavy": 0.20},
    "fetch": {"clean": 0.30, "light": 0.22, "medium": 0.28, "heavy": 0.20},
    "two_arm_lift": {"clean": 0.20, "light": 0.10, "medium": 0.20, "heavy": 0.50},
}
"""Share of each recipe in a suite's recordings: 61% of 700 libero_object episodes succeeded, 73% of 600 libero_spatial
ones."""


class ActionNoise:
    """AR(1) noise on one arm's motion: ``n[t] = rho n[t-1] + sqrt(1 - rho^2) sigma w[t]``, stationary from the first
    draw.

    Args:
        sigma: standard deviation of every component, in action units.
        rng: the source of randomness.
        rho: correlation of successive steps.
    """

    def __init__(self, sigma: float, rng: np.random.Generator, rho: float = 0.8) -> None:
        self._sigma, self._rho, self._rng = sigma, rho, rng
        self._state = sigma * rng.standard_normal(6)

    def __call__(self) -> NDArray[np.float64]:
        """The next sample (6,)."""
        fresh = self._sigma * np.sqrt(1.0 - self._rho**2) * self._rng.standard_normal(6)
        self._state = self._rho * self._state + fresh
        return self._state.copy()


class RandomMotion:
    """A policy that moves for the sake of data: every chunk a new direction, any speed.

    Scripts and policies only do what leads somewhere. A world model that has seen nothing else learns where the arm
    usually goes instead of what the actions do.
    """

    def predict(self, observation: dict[str, Any], *, deterministic: bool = False) -> tuple[NDArray[np.float32], None]:
        """Chunks (B, 8, 7 K) for any observations, whose proprioception (B, 8 K) tells the number of arms; from torch's
        global random stream."""
        batch, arms = len(observation["proprio"]), observation["proprio"].shape[1] // PROPRIO_DIM
        motion = 2 * torch.rand(batch, arms, 6) - 1
        motion[..., 3:] *= 0.4  # turned much further, the arm would soon be at its joints' limits
        gripper = torch.where(torch.rand(batch, arms, 1) < 0.3, 1.0, -1.0)
        return torch.cat([motion, gripper], dim=-1).reshape(batch, 1, -1).repeat(1, 8, 1).numpy(), None


def point_in_disc(radius: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A uniform draw (2,) from a disc of this radius (m)."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    distance = radius * np.sqrt(rng.uniform())
    return distance * np.array([np.cos(angle), np.sin(angle)])
