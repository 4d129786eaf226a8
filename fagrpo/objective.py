"""What FA-GRPO maximises: ratios of action probabilities, aggregated over the flow steps, and clipped as PPO's."""

import torch
from torch import Tensor

RATIOS = ("chunk", "dim", "flow_step")
PLACEMENTS = ("advantage", "log_prob")
MAX_LOG_RATIO = 60.0
"""Log-ratios beyond this have no gradient. float32 overflows from 88 on; sums and gradients of ratios need room too."""


def aggregate_log_ratio(
    difference: Tensor, weights: Tensor, action_mask: Tensor, ratio: str = "chunk", placement: str = "advantage"
) -> Tensor:
    """Log-ratio of new to old probability at the chosen granularity, FlowScale included.

    With placement "log_prob" the weights multiply the per-step differences, so that they change the ratio itself. With
    "advantage" the ratio keeps its true value, for clipping too, and flow step k contributes to its gradient with
    weight w_k (for "flow_step", where each step has its own ratio, that is the same as weighting the advantage).

    :param difference: (K, B, \\*A) elementwise log pi_new - log pi_old of the stochastic flow steps
    :param weights: (K,) FlowScale weights, ones for none
    :param action_mask: bool (B, \\*A), False entries do not count
    :param ratio: "chunk": (B,), one ratio per environment action; "dim": (B, \\*A), one per chunk position and
        dimension (the paper's); "flow_step": (K, B), one per flow step (Flow-GRPO)
    :param placement: "advantage" or "log_prob"
    :return: log-ratio of the shape above
    """
    difference = torch.where(action_mask, difference, torch.zeros_like(difference))
    if ratio == "dim":
        per_step = difference
    else:
        per_step = difference.flatten(2).sum(dim=2)  # (K, B)
    scaled = per_step * weights.reshape((-1,) + (1,) * (per_step.ndim - 1))
    if ratio != "flow_step":
        per_step, scaled = per_step.sum(dim=0), scaled.sum(dim=0)
    if placement == "log_prob":
        return scaled
    return scaled + (per_step - scaled).detach()


def clipped_objective(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's clipped objective, elementwise, to be maximised.

    min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with a dual clip c > 1, for A < 0 not below c A (Ye et al. 2020).

    :param log_ratio: any shape
    :param advantages: broadcastable
    :param clip_low: lower clip range
    :param clip_high: upper clip range
    :param dual_clip: c, or None
    :return: the broadcast shape
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return objective
