"""FlowScale: one weight per flow step, so that no flow step drowns the others in the policy gradient.

The gradient of the log-probability of flow step k with respect to the velocity has the expected norm |c_k| / std_k
times a constant, where c_k = d mean_k / d v (``velocity_coefficient`` of
:func:`fagrpo.flow_sde.transition_coefficients`). Late, low-noise steps dominate. FlowScale (arXiv 2511.20633) weights
step k by a power of its variance. It is a biased preconditioner of the policy gradient; without it the gradient is the
plain one.
"""

import math

import torch
from torch import Tensor


def _check_std(std: Tensor) -> Tensor:
    if std.ndim != 1 or len(std) == 0:
        raise ValueError(f"std must have shape (K,) with K >= 1, got {tuple(std.shape)}")
    std = std.double()
    if not bool(torch.isfinite(std).all() & (std > 0).all()):
        raise ValueError(f"every std must be finite and positive (leave deterministic steps out), got {std.tolist()}")
    return std


def _clip_to_unit_mean(weights: Tensor, w_min: float, w_max: float) -> Tensor:
    """``clip(c w, w_min, w_max)`` with the c that makes the mean 1; the clipped mean grows with c, so c is bisected."""

    def clipped(log_scale: float) -> Tensor:
        return (weights * math.exp(log_scale)).clamp(w_min, w_max)

    if clipped(0.0).equal(weights):
        return weights
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(clipped(middle).mean()) < 1.0 else (low, middle)
    result = clipped(0.5 * (low + high))
    return (result / result.mean()).clamp(w_min, w_max)


def flow_scale_weights(
    std: Tensor,
    exponent: float = 0.5,
    eps: float = 1e-6,
    blend: float = 0.0,
    w_min: float = 0.1,
    w_max: float = 10.0,
) -> Tensor:
    """The paper's FlowScale weights, normalised to mean 1 also after clipping.

    With s_k = std_k^2 and u_k = (s_k + eps)^exponent: ``w_k = clip((1 - blend) u_k / mean(u) + blend, w_min, w_max)``.
    Clipping breaks the mean; the weights are rescaled before the clip so that it comes out as 1 and the bounds hold.

    :param std: (K,) standard deviations of the stochastic flow steps, positive
    :param exponent: 0.5 equalises the gradient norms up to the first step, 1 their squares, 0 is no scaling
    :param eps: added to the variance, >= 0
    :param blend: alpha in [0, 1]; 1 is no scaling
    :param w_min: smallest weight, in [0, 1]
    :param w_max: largest weight, >= 1
    :return: float32 (K,), mean 1
    :raises ValueError: arguments out of range
    """
    variance = _check_std(std).square()
    if not 0 <= blend <= 1:
        raise ValueError(f"blend must lie in [0, 1], got {blend}")
    if not 0 <= w_min <= 1 <= w_max:
        raise ValueError(f"need 0 <= w_min <= 1 <= w_max for a mean of 1, got w_min={w_min}, w_max={w_max}")
    if eps < 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    power = (variance + eps) ** exponent
    weights = (1 - blend) * power / power.mean() + blend
    return _clip_to_unit_mean(weights, w_min, w_max).to(std.dtype if std.dtype == torch.float64 else torch.float32)


def equalizing_weights(std: Tensor, velocity_coefficient: Tensor) -> Tensor:
    """Closed form that makes the expected gradient norm E||w_k g_k|| the same for all flow steps, with mean 1.

    :param std: (K,) standard deviations of the stochastic flow steps, positive
    :param velocity_coefficient: (K,) c_k = d mean_k / d velocity, non-zero
    :return: float32 (K,), proportional to std_k / |c_k|
    :raises ValueError: shapes that differ or coefficients that are zero
    """
    std64 = _check_std(std)
    coefficient = velocity_coefficient.double().abs()
    if coefficient.shape != std64.shape or not bool((coefficient > 0).all()):
        raise ValueError(
            f"velocity_coefficient must be non-zero and of shape {tuple(std.shape)}, "
            f"got {velocity_coefficient.tolist()}"
        )
    weights = std64 / coefficient
    return (weights / weights.mean()).to(std.dtype if std.dtype == torch.float64 else torch.float32)
