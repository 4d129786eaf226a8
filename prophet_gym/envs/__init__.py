"""The imagined environments: vectorized, single, and for Stable-Baselines3."""
