"""FlowScale weights: mean, bounds, and the equalisation they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fagrpo.flow_scale import equalizing_weights, flow_scale_weights
from fagrpo.flow_sde import sample_chain, score_chain, time_grid, transition_coefficients


def coefficients(num_steps: int, noise_level: float) -> tuple[torch.Tensor, torch.Tensor]:
    times = time_grid(num_steps)
    _, velocity, std = transition_coefficients(times[:-1], times[1:], noise_level)
    return velocity, std


@settings(max_examples=100)
@given(
    st.lists(st.floats(1e-3, 2.0), min_size=1, max_size=20),
    st.floats(-1, 2),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(1, 5),
)
def test_mean_is_one_within_the_bounds(
    stds: list[float], exponent: float, blend: float, w_min: float, w_max: float
) -> None:
    weights = flow_scale_weights(torch.tensor(stds), exponent, 1e-6, blend, w_min, w_max)
    assert weights.shape == (len(stds),)
    assert float(weights.double().mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(weights.min()) >= w_min - 1e-6 and float(weights.max()) <= w_max + 1e-6


def test_the_paper_formula_without_clipping() -> None:
    std = torch.tensor([0.7, 0.3, 0.1], dtype=torch.float64)
    power = (std**2 + 1e-3) ** 0.5
    expected = 0.8 * power / power.mean() + 0.2
    torch.testing.assert_close(flow_scale_weights(std, 0.5, 1e-3, 0.2, 0.0, 10.0), expected)


def test_switching_it_off() -> None:
    std = torch.tensor([0.7, 0.3, 0.1])
    torch.testing.assert_close(flow_scale_weights(std, blend=1.0), torch.ones(3))
    torch.testing.assert_close(flow_scale_weights(std, exponent=0.0), torch.ones(3))


def test_the_imbalance_and_its_exact_equalisation() -> None:
    """Measured gradient norms at K = 10, a = 0.7: 11.8-fold imbalance, within 1% after equalising."""
    num_steps, noise_level, batch = 10, 0.7, 20_000
    chain = sample_chain(
        lambda x, t: torch.zeros_like(x),
        torch.zeros(batch, 8),
        num_steps,
        noise_level,
        "flow",
        torch.Generator().manual_seed(0),
    )
    velocities = torch.zeros(num_steps, batch, 8, requires_grad=True)
    steps = iter(range(num_steps))
    (gradient,) = torch.autograd.grad(score_chain(lambda x, t: velocities[next(steps)], chain).sum(), velocities)
    norms = gradient.norm(dim=2).mean(dim=1)
    velocity, std = coefficients(num_steps, noise_level)
    assert float(norms.max() / norms.min()) == pytest.approx((10 * 9) ** 0.5 * (1 + 0.7**2 / 2), rel=0.02)
    equal = norms * equalizing_weights(std, velocity)
    assert float(equal.max() / equal.min()) < 1.01
    halved = (norms * flow_scale_weights(std, 0.5, 0.0, 0.0, 0.0, 1e9))[1:]
    assert float(halved.max() / halved.min()) < 1.01


@pytest.mark.parametrize(
    "arguments", [{"blend": 1.5}, {"w_min": 1.2}, {"w_max": 0.9}, {"eps": -1.0}], ids=lambda a: next(iter(a))
)
def test_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        flow_scale_weights(torch.tensor([0.5, 0.2]), **arguments)


def test_bad_stds() -> None:
    for std in (torch.tensor([0.5, 0.0]), torch.tensor(0.5), torch.tensor([]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="std"):
            flow_scale_weights(std)
    with pytest.raises(ValueError, match="velocity_coefficient"):
        equalizing_weights(torch.tensor([0.5, 0.2]), torch.tensor([1.0, 0.0]))
