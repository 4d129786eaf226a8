"""Scripted experts that record demonstrations, and failures, in the real simulators."""

from prophet_gym.simulators.experts.noise import NOISE_RECIPES, NOISE_SHARES, NoiseRecipe
from prophet_gym.simulators.experts.pick_and_place import PickAndPlace

__all__ = ["NOISE_RECIPES", "NOISE_SHARES", "NoiseRecipe", "PickAndPlace"]
