"""The flow SDE against theory: densities, limits, marginals, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from fagrpo.flow_sde import (
    SCHEDULES,
    FlowChain,
    chain_means,
    gaussian_kl,
    gaussian_log_prob,
    log_prob_difference,
    sample_chain,
    score_chain,
    sde_transition,
    time_grid,
    transition_coefficients,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_time_grid_runs_from_one_to_zero(num_steps: int, shift: float) -> None:
    times = time_grid(num_steps, shift)
    assert times.shape == (num_steps + 1,) and times.dtype == torch.float32
    assert times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())
    if shift == 1.0:
        torch.testing.assert_close(times, torch.linspace(1, 0, num_steps + 1))


def test_bad_grids_and_transitions_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        time_grid(0)
    with pytest.raises(ValueError, match="shift"):
        time_grid(3, 0.0)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="choose one of flow, constant"):
        sde_transition(x, x, 0.5, 0.4, 0.7, "cosine")
    with pytest.raises(ValueError, match="times must satisfy"):
        sde_transition(x, x, 0.4, 0.5, 0.7)
    with pytest.raises(ValueError, match="noise_level"):
        sde_transition(x, x, 0.5, 0.4, -1.0)
    with pytest.raises(ValueError, match="same shape"):
        sde_transition(x, x[:1], 0.5, 0.4, 0.7)
    with pytest.raises(ValueError, match="does not broadcast"):
        sde_transition(x, x, torch.full((2, 3, 1), 0.5), 0.4, 0.7)
    with pytest.raises(ValueError, match="sde_steps"):
        sample_chain(lambda x, t: x, x, 3, 0.7, sde_steps=[3])


@settings(max_examples=50)
@given(
    t=st.floats(0.01, 1.0), fraction=st.floats(0.0, 0.95), a=st.floats(0.0, 2.0), schedule=st.sampled_from(SCHEDULES)
)
def test_transition_is_the_published_formula(t: float, fraction: float, a: float, schedule: str) -> None:
    t_next = t * fraction
    delta = t - t_next
    x = torch.randn(4, 3, generator=generator())
    v = torch.randn(4, 3, generator=generator(1))
    sigma = a if schedule == "constant" else a * math.sqrt(t / ((1 - t) if t < 1 else (1 - t_next)))
    mean, std = sde_transition(x, v, t, t_next, a, schedule)
    expected = x * (1 - sigma**2 * delta / (2 * t)) - v * delta * (1 + sigma**2 * (1 - t) / (2 * t))
    torch.testing.assert_close(mean, expected)
    assert float(std) == pytest.approx(sigma * math.sqrt(delta), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_noise_is_the_euler_step_exactly(schedule: str) -> None:
    x, v = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    for t, t_next in [(1.0, 0.9), (0.5, 0.25), (0.1, 0.0)]:
        mean, std = sde_transition(x, v, t, t_next, 0.0, schedule)
        assert torch.equal(mean, x - v * (t - t_next)) and float(std) == 0.0
    small, _ = sde_transition(x, v, 0.5, 0.25, 1e-5, schedule)
    torch.testing.assert_close(small, x - v * 0.25, atol=1e-6, rtol=0)


def test_first_std_is_the_noise_level_and_half_precision_is_lifted() -> None:
    x = torch.randn(3, 4).bfloat16()
    mean, std = sde_transition(x, x, 1.0, 0.9, 0.7)
    assert mean.dtype == torch.float32 and float(std) == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_everything_is_computed_in_float32(dtype: torch.dtype) -> None:
    """The result is that of the same numbers given as float32, to the bit."""
    x, v, other = torch.randn(3, 6, 4, generator=generator()).to(dtype).unbind(0)
    for t, t_next in [(0.75, 0.5), (torch.full((6,), 0.75, dtype=dtype), torch.full((6,), 0.5, dtype=dtype))]:
        mean, std = sde_transition(x, v, t, t_next, 0.7)
        expected, expected_std = sde_transition(x.float(), v.float(), 0.75, 0.5, 0.7)
        assert mean.dtype == std.dtype == torch.float32
        assert torch.equal(mean, expected) and bool((std == expected_std).all())
    std = torch.tensor(0.3, dtype=dtype)
    for function in (gaussian_log_prob, gaussian_kl):
        value = function(x, other, std)
        assert value.dtype == torch.float32
        assert torch.equal(value, function(x.float(), other.float(), std.float()))
    chain = sample_chain(lambda x, t: 0.5 * x, x, 4, 0.7, "flow", generator(1))
    same = sample_chain(lambda x, t: 0.5 * x, x.float(), 4, 0.7, "flow", generator(1))
    for name in ("states", "means", "stds", "log_probs"):
        assert getattr(chain, name).dtype == torch.float32
        assert torch.equal(getattr(chain, name), getattr(same, name)), name
    seen = []
    score_chain(lambda x, t: seen.append((x.dtype, t.dtype)) or (0.5 * x).to(dtype), chain)
    assert set(seen) == {(torch.float32, torch.float32)}


def test_times_broadcast_against_the_batch() -> None:
    x, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    t, t_next = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.9, 0.5, 0.0])
    mean, std = sde_transition(x, v, t, t_next, 0.5)
    assert std.shape == (3, 1, 1)
    for i in range(3):
        row, row_std = sde_transition(x[i : i + 1], v[i : i + 1], t[i].item(), t_next[i].item(), 0.5)
        torch.testing.assert_close(mean[i : i + 1], row)
        torch.testing.assert_close(std[i].squeeze(), row_std.squeeze())


def test_log_prob_and_kl_equal_torch_distributions() -> None:
    x, mean, reference = torch.randn(3, 50, 4, generator=generator()).unbind(0)
    std = torch.tensor(0.3)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x))
    exact = torch.distributions.kl_divergence(Normal(mean, std), Normal(reference, std))
    torch.testing.assert_close(gaussian_kl(mean, reference, std), exact)
    difference = log_prob_difference(x, mean, reference, std)
    torch.testing.assert_close(
        difference, Normal(mean, std).log_prob(x) - Normal(reference, std).log_prob(x), atol=1e-4, rtol=1e-5
    )
    for function in (gaussian_log_prob, gaussian_kl):
        with pytest.raises(ValueError, match="positive"):
            function(x, mean, torch.tensor(0.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chain_scores_reproduce_the_sample(schedule: str) -> None:
    network = torch.nn.Linear(7, 6)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(torch.cat([x.flatten(1), t[:, None]], dim=1)).reshape(x.shape)

    chain = sample_chain(velocity, torch.randn(9, 2, 3, generator=generator()), 5, 0.7, schedule, generator(1))
    assert chain.states.shape == (6, 9, 2, 3) and chain.means.shape == chain.log_probs.shape == (5, 9, 2, 3)
    scores = score_chain(velocity, chain)
    assert torch.equal(scores, chain.log_probs)
    part = score_chain(velocity, chain.rows(torch.tensor([2, 5])))
    assert (part - chain.log_probs[:, [2, 5]]).abs().max() < 1e-5


def test_only_the_chosen_steps_are_stochastic() -> None:
    noise = torch.randn(4, 3, generator=generator())
    chain = sample_chain(lambda x, t: x, noise, 6, 0.7, "flow", generator(1), sde_steps=[1, 2])
    assert chain.sde_steps == [1, 2] and (chain.stds > 0).tolist() == [False, True, True, False, False, False]
    assert bool((chain.log_probs[[0, 3, 4, 5]] == 0).all()) and bool((chain.log_probs[[1, 2]] != 0).any())
    assert torch.equal(chain.states[1], chain.means[0]) and not torch.equal(chain.states[2], chain.means[1])
    assert torch.equal(score_chain(lambda x, t: x, chain), chain.log_probs)
    ode = sample_chain(lambda x, t: x, noise, 6, 0.0, "flow", generator(1))
    assert ode.sde_steps == [] and bool((ode.log_probs == 0).all())
    assert bool((score_chain(lambda x, t: x, ode) == 0).all())


def test_chains_of_one_sampler_are_one_batch_and_others_are_refused() -> None:
    noise = torch.randn(4, 3, generator=generator())
    one, other = (sample_chain(lambda x, t: x, noise, 6, 0.7, generator=generator(seed)) for seed in (1, 2))
    both = FlowChain.concatenate([one, other])
    assert torch.equal(both.states, torch.cat([one.states, other.states], dim=1))
    for level in (0.0, 0.7):  # without noise the stds do not tell the grids apart
        chains = [sample_chain(lambda x, t: x, noise, 6, level, generator=generator(), shift=s) for s in (1.0, 3.0)]
        with pytest.raises(ValueError, match="different times"):
            FlowChain.concatenate(chains)
    with pytest.raises(ValueError, match="stochastic steps"):
        FlowChain.concatenate([one, sample_chain(lambda x, t: x, noise, 6, 0.7, generator=generator(), sde_steps=[1])])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_marginals_of_a_gaussian_follow_the_exact_recursion(schedule: str) -> None:
    """Data ~ N(m, s^2): v = E[eps - x0 | x_t] is linear, so mean and variance of each state are known exactly."""
    m, s, a, num_steps, batch = 0.8, 0.5, 0.7, 8, 400_000

    def affine(t: float) -> tuple[float, float]:
        variance = (1 - t) ** 2 * s**2 + t**2
        slope = (t - (1 - t) * s**2) / variance
        return slope, -m - slope * (1 - t) * m

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        slope, offset = affine(t[0].item())
        return slope * x + offset

    chain = sample_chain(velocity, torch.randn(batch, 1, generator=generator()), num_steps, a, schedule, generator(1))
    mean, variance = 0.0, 1.0
    for k in range(num_steps):
        t, t_next = chain.times[k : k + 1].double(), chain.times[k + 1 : k + 2].double()
        cx, cv, std = (float(c) for c in transition_coefficients(t, t_next, a, schedule))
        slope, offset = affine(float(t))
        mean = (cx + cv * slope) * mean + cv * offset
        variance = (cx + cv * slope) ** 2 * variance + std**2
        tolerance = 5 * math.sqrt(variance / batch)
        assert float(chain.states[k + 1].mean()) == pytest.approx(mean, abs=tolerance)
        assert float(chain.states[k + 1].var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / batch))


def test_many_small_steps_reach_the_data_distribution() -> None:
    m, s = 0.8, 0.5

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = t[0]
        slope = (time - (1 - time) * s**2) / ((1 - time) ** 2 * s**2 + time**2)
        return slope * (x - (1 - time) * m) - m

    for a in (0.0, 0.7):
        chain = sample_chain(velocity, torch.randn(50_000, 1, generator=generator()), 200, a, "flow", generator(1))
        assert float(chain.sample.mean()) == pytest.approx(m, abs=0.02)
        assert float(chain.sample.std()) == pytest.approx(s, abs=0.02)


def test_gradient_is_the_closed_form_and_finite_differences() -> None:
    """d log p_k / d v = c_k eps_k / std_k."""
    noise = torch.randn(3, 4, generator=generator())
    base = torch.randn(3, 4, generator=generator(2))
    chain = sample_chain(lambda x, t: base, noise, 5, 0.7, "flow", generator(1))
    offsets = torch.zeros(5, 3, 4, requires_grad=True)
    steps = iter(range(5))
    score = score_chain(lambda x, t: base + offsets[next(steps)], chain).sum()
    (gradient,) = torch.autograd.grad(score, offsets)
    _, coefficient, std = transition_coefficients(chain.times[:-1], chain.times[1:], 0.7)
    eps = (chain.states[1:] - chain.means) / chain.stds[:, None, None]
    torch.testing.assert_close(gradient, (coefficient / std)[:, None, None] * eps, rtol=1e-4, atol=1e-5)

    def total(shift: float, k: int) -> float:
        calls = iter(range(5))
        return float(score_chain(lambda x, t: base + (shift if next(calls) == k else 0.0), chain).sum())

    for k in range(5):  # the log-density is quadratic in the velocity, so central differences are exact at any step
        numeric = (total(0.5, k) - total(-0.5, k)) / 1.0
        assert numeric == pytest.approx(float(gradient[k].sum()), rel=1e-4, abs=1e-3)


def test_the_expected_ratio_is_one() -> None:
    chain = sample_chain(lambda x, t: x, torch.randn(200_000, 1, generator=generator()), 4, 0.7, "flow", generator(1))
    means = chain_means(lambda x, t: x + 0.15, chain)
    log_ratio = log_prob_difference(chain.states[1:], means, chain.means, chain.stds[:, None, None]).sum(0).flatten()
    ratio = log_ratio.double().exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * float(ratio.std()) / math.sqrt(len(ratio)))
    assert float(ratio.std()) > 0.1
