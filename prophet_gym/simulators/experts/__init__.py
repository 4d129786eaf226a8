"""Scripted experts that record demonstrations, and failures, in the real simulators."""

from prophet_gym.simulators.experts.noise import NOISE_RECIPES, NOISE_SHARES, ActionNoise, NoiseRecipe, RandomMotion
from prophet_gym.simulators.experts.pick_and_place import PickAndPlace

EXPERT_TASKS = {
    "libero_object": tuple(range(10)),
    "libero_spatial": tuple(range(10)),
    "libero_goal": (1, 2, 4, 6, 8, 9),
}
"""The tasks of each suite that are pick-and-place; the others open drawers, push a plate or turn a knob."""

__all__ = [
    "EXPERT_TASKS",
    "NOISE_RECIPES",
    "NOISE_SHARES",
    "ActionNoise",
    "NoiseRecipe",
    "PickAndPlace",
    "RandomMotion",
]
