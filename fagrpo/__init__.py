"""fagrpo: flow-action GRPO for flow-head policies, on Stable-Baselines3."""

from fagrpo.fagrpo import FAGRPO
from fagrpo.imitation import Demonstrations, behaviour_cloning
from fagrpo.policies import FlowHead, FlowPolicy

__all__ = ["FAGRPO", "Demonstrations", "FlowHead", "FlowPolicy", "behaviour_cloning"]
