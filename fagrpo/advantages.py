"""Group-relative advantages (GRPO): how much better a rollout is than the others that began at the same start."""

import torch
from torch import Tensor


def group_advantages(returns: Tensor, group_ids: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalise returns within each group: (R - mean) / (std + eps), with the population standard deviation.

    A group whose returns are all equal says nothing about which action was better. Its advantages are exactly 0,
    decided by the range (a rounded std over a small eps would give spurious advantages), and its rows are masked.

    :param returns: (N,) finite
    :param group_ids: (N,) integers; rows in any order, groups of any size
    :param eps: added to the standard deviation, >= 0
    :return: advantages float32 (N,) (float64 for float64 returns) and mask bool (N,)
    :raises ValueError: shapes that differ, returns that are not finite
    """
    if returns.ndim != 1 or group_ids.shape != returns.shape:
        raise ValueError(
            f"returns and group_ids must both have shape (N,), got {tuple(returns.shape)} and {tuple(group_ids.shape)}"
        )
    if eps < 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    dtype = torch.float64 if returns.dtype == torch.float64 else torch.float32
    if len(returns) == 0:
        return returns.to(dtype), torch.zeros(0, dtype=torch.bool, device=returns.device)
    values = returns.double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("returns must be finite: a NaN or infinite reward reached the rollout buffer")
    _, group = torch.unique(group_ids, return_inverse=True)
    num_groups = int(group.max()) + 1
    count = torch.zeros(num_groups, dtype=torch.float64, device=values.device).index_add_(
        0, group, torch.ones_like(values)
    )
    # The exact range first: centring on the minimum makes a constant group exactly zero from here on.
    minimum = torch.full_like(count, torch.inf).scatter_reduce_(0, group, values, "amin")
    maximum = torch.full_like(count, -torch.inf).scatter_reduce_(0, group, values, "amax")
    informative = (maximum > minimum)[group]
    shifted = values - minimum[group]
    mean = torch.zeros_like(count).index_add_(0, group, shifted) / count
    centred = shifted - mean[group]
    std = (torch.zeros_like(count).index_add_(0, group, centred.square()) / count).sqrt()
    advantages = torch.where(informative, centred / (std[group] + eps), torch.zeros_like(centred))
    return advantages.to(dtype), informative
