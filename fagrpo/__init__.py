"""fagrpo: flow-action GRPO for flow-head policies, on Stable-Baselines3."""

from fagrpo.demonstrations import Demonstrations
from fagrpo.fagrpo import FAGRPO
from fagrpo.flow_head import FlowHead
from fagrpo.imitation import behaviour_cloning
from fagrpo.policies import FlowPolicy, average_policies

__all__ = ["FAGRPO", "Demonstrations", "FlowHead", "FlowPolicy", "average_policies", "behaviour_cloning"]
