"""Scripted experts that record demonstrations, and failures, in the real simulators."""

from prophet_gym.simulators.experts.noise import NOISE_RECIPES, NOISE_SHARES, ActionNoise, NoiseRecipe, RandomMotion
from prophet_gym.simulators.experts.pick_and_place import PickAndPlace

EXPERT_TASKS = {
    "libero_object": tuple(range(10)),
    "libero_spatial": tuple(range(10)),
    "libero_goal": (1, 2, 4, 6, 8, 9),
    "libero_10": (0, 1, 7),
    "libero_90": (0, 6, 11, 18, 22, 28, 33, 35, 38, 40),
}
"""The tasks of each suite that are pick-and-place; the others open drawers, push a plate or turn a knob. Of libero_10
those that put two things into the basket: the mugs slip out of the fingers. Of libero_90 one task for each kitchen,
which all have one camera, and in which the script plays: most of its tasks are no pick-and-place."""

__all__ = [
    "EXPERT_TASKS",
    "NOISE_RECIPES",
    "NOISE_SHARES",
    "ActionNoise",
    "NoiseRecipe",
    "PickAndPlace",
    "RandomMotion",
]
