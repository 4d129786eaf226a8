"""Flow sampling as a chain of Gaussian transitions: pure functions on tensors.

Convention (everywhere in fagrpo): time t runs from 1 (noise) to 0 (data), ``x_t = (1 - t) x_0 + t eps``, velocity
``v = dx/dt = eps - x_0``, and a flow step goes from t to ``t_next < t`` with ``delta = t - t_next > 0``.

The ODE sampler is ``x_next = x - v delta``. Flow-GRPO (Liu et al. 2025, arXiv 2505.05470, eq. 9-12) replaces it by an
SDE with the same marginals, so that each step is Gaussian and has a log-density:

    mean = x (1 - sigma^2 delta / (2 t)) - v delta (1 + sigma^2 (1 - t) / (2 t)),    std = sigma sqrt(delta)

Everything is computed in float32, whatever the precision of the input or of the network is; only the coefficients of a
transition, functions of the times, are computed in float64 first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SCHEDULES = ("flow", "constant")

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""``(x_t (B, *A), t (B,)) -> velocity (B, *A)``."""


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """Times of a flow sampler, from 1 (noise) down to 0 (data).

    :param num_steps: number of flow steps K, at least 1
    :param shift: 1 is the uniform grid; larger values spend more steps near the noise,
        ``t' = shift t / (1 + (shift - 1) t)`` (Esser et al. 2024, SD3)
    :return: float32 (K + 1,), strictly decreasing, first 1, last 0
    :raises ValueError: num_steps < 1 or shift <= 0
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive (1.0 is the uniform grid), got {shift}")
    uniform = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return (shift * uniform / (1.0 + (shift - 1.0) * uniform)).float()


def _as_time(value: float | Tensor, like: Tensor) -> Tensor:
    """A time as a tensor whose dimensions line up with the leading dimensions of ``like``."""
    time = torch.as_tensor(value, dtype=torch.float64, device="cpu")  # not every accelerator has float64
    if time.ndim > like.ndim:
        raise ValueError(f"a time of shape {tuple(time.shape)} does not broadcast against a batch {tuple(like.shape)}")
    return time.reshape(time.shape + (1,) * (like.ndim - time.ndim))


def transition_coefficients(
    t: Tensor, t_next: Tensor, noise_level: float, schedule: str = "flow"
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of one transition: ``mean = sample_coefficient * x + velocity_coefficient * v`` and its std.

    :param t: times, any shape, in (0, 1]
    :param t_next: next times, same shape, in [0, t)
    :param noise_level: a >= 0; 0 is the Euler step of the ODE (coefficients exactly 1 and -delta, std 0)
    :param schedule: "flow": sigma = a sqrt(t / (1 - t)), where 1 - t is replaced by 1 - t_next at t = 1, so that the
        first std is exactly a on a grid that starts at 1; "constant": sigma = a
    :return: (sample_coefficient, velocity_coefficient, std), each of the broadcast shape of t
    :raises ValueError: an unknown schedule, a negative noise level, times out of order or out of range
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if not (noise_level >= 0 and math.isfinite(noise_level)):
        raise ValueError(f"noise_level must be finite and >= 0, got {noise_level}")
    if not bool(((t <= 1) & (t > t_next) & (t_next >= 0)).all()):
        raise ValueError(f"times must satisfy 1 >= t > t_next >= 0, got t = {t.tolist()}, t_next = {t_next.tolist()}")
    delta = t - t_next
    if schedule == "flow":
        variance_rate = noise_level**2 * t / torch.where(t == 1, 1 - t_next, 1 - t)
    else:
        variance_rate = torch.full_like(delta, noise_level**2)
    sample_coefficient = 1 - variance_rate * delta / (2 * t)
    velocity_coefficient = -delta * (1 + variance_rate * (1 - t) / (2 * t))
    return sample_coefficient, velocity_coefficient, (variance_rate * delta).sqrt()


def sde_transition(
    sample: Tensor,
    velocity: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    noise_level: float,
    schedule: str = "flow",
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the Gaussian transition from x_t to x_{t_next}.

    :param sample: x_t, (B, *A)
    :param velocity: v(x_t, t), same shape
    :param t: time, a float or a tensor whose dimensions match the leading ones of sample, in (0, 1]
    :param t_next: next time, likewise, in [0, t)
    :param noise_level: a >= 0; 0 is the Euler ODE step exactly, with std 0
    :param schedule: "flow" or "constant", see :func:`transition_coefficients`
    :return: mean (B, *A) and std (broadcastable against it), float32
    :raises ValueError: shapes that differ, times out of order, an unknown schedule, a negative noise level
    """
    if sample.shape != velocity.shape:
        raise ValueError(f"sample {tuple(sample.shape)} and velocity {tuple(velocity.shape)} must have the same shape")
    sample, velocity = sample.float(), velocity.float()
    sample_coefficient, velocity_coefficient, std = (
        coefficient.float().to(sample.device)
        for coefficient in transition_coefficients(_as_time(t, sample), _as_time(t_next, sample), noise_level, schedule)
    )
    return sample_coefficient * sample + velocity_coefficient * velocity, std


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log-density of ``Normal(mean, std)`` at x, constants kept.

    :param x: (B, *A)
    :param mean: same shape
    :param std: broadcastable, positive
    :return: float32, the broadcast shape
    :raises ValueError: a std that is not positive: a deterministic step has no density and must be left out
    """
    x, mean, std = x.float(), mean.float(), std.float()
    if not bool((std > 0).all()):
        raise ValueError(
            "every std must be positive: a deterministic flow step (noise_level 0 or outside sde_steps) has no "
            "log-probability; leave it out of the score"
        )
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """Elementwise KL(Normal(mean, std) || Normal(mean_ref, std)) = (mean - mean_ref)^2 / (2 std^2).

    :param mean: (B, *A)
    :param mean_ref: same shape
    :param std: broadcastable, positive: the transition's std, which both policies share
    :return: float32, >= 0
    :raises ValueError: a std that is not positive
    """
    mean, mean_ref, std = mean.float(), mean_ref.float(), std.float()
    if not bool((std > 0).all()):
        raise ValueError("every std must be positive: between two deterministic flow steps the KL is infinite or 0")
    return 0.5 * ((mean - mean_ref) / std).square()


@dataclass(frozen=True)
class FlowChain:
    """One batch of sampled flow chains, with all that is needed to score them again.

    K flow steps, B rows, A the shape of one sample (an action chunk).

    :param states: (K + 1, B, *A), states[0] is the noise, states[-1] the sample; never clipped
    :param times: (K + 1,) from 1 to 0
    :param means: (K, B, *A), the transition means under the sampling policy
    :param stds: (K,), 0 on deterministic steps
    :param noise_level: a
    :param schedule: "flow" or "constant"
    """

    states: Tensor
    times: Tensor
    means: Tensor
    stds: Tensor
    noise_level: float
    schedule: str

    @property
    def sample(self) -> Tensor:
        """The end of the chain x_0, (B, *A)."""
        return self.states[-1]

    @property
    def num_steps(self) -> int:
        """Number of flow steps K."""
        return len(self.stds)

    @property
    def sde_steps(self) -> list[int]:
        """Indices of the stochastic steps, in order."""
        return [k for k, std in enumerate(self.stds.tolist()) if std > 0]

    @property
    def log_probs(self) -> Tensor:
        """Elementwise log-densities (K, B, *A) under the sampling policy, 0 on deterministic steps."""
        return _log_probs(self, self.means[self.sde_steps])

    def rows(self, index: Tensor | slice) -> "FlowChain":
        """The chains of some rows of the batch."""
        return replace(self, states=self.states[:, index], means=self.means[:, index])

    def to(self, device: torch.device | str) -> "FlowChain":
        """The chain on another device; ``times`` stay on the CPU."""
        return replace(self, states=self.states.to(device), means=self.means.to(device), stds=self.stds.to(device))

    @staticmethod
    def concatenate(chains: "Sequence[FlowChain]") -> "FlowChain":
        """Chains of one sampler setting, as one batch.

        :raises ValueError: none, or chains whose times, stds or schedules differ
        """
        if not chains:
            raise ValueError("there are no chains to concatenate")
        first = chains[0]
        if any(
            chain.schedule != first.schedule
            or not torch.equal(chain.times, first.times)
            or not torch.equal(chain.stds, first.stds)
            for chain in chains
        ):
            raise ValueError("chains of different times, noise schedules or stochastic steps cannot be concatenated")
        return replace(
            first,
            states=torch.cat([chain.states for chain in chains], dim=1),
            means=torch.cat([chain.means for chain in chains], dim=1),
        )


def _stochastic_steps(num_steps: int, noise_level: float, sde_steps: Sequence[int] | None) -> list[bool]:
    if noise_level == 0:
        return [False] * num_steps
    if sde_steps is None:
        return [True] * num_steps
    outside = [k for k in sde_steps if not 0 <= k < num_steps]
    if outside:
        raise ValueError(f"sde_steps must lie in 0..{num_steps - 1}, got {outside}")
    return [k in set(sde_steps) for k in range(num_steps)]


@torch.no_grad()
def sample_chain(
    velocity_fn: VelocityFn,
    noise: Tensor,
    num_steps: int,
    noise_level: float,
    schedule: str = "flow",
    generator: torch.Generator | None = None,
    sde_steps: Sequence[int] | None = None,
    shift: float = 1.0,
) -> FlowChain:
    """Sample a chain from noise to data and keep every state, mean and std.

    :param velocity_fn: ``(x_t (B, *A), t (B,)) -> v (B, *A)``
    :param noise: x_1, (B, *A), standard normal
    :param num_steps: number of flow steps K
    :param noise_level: a >= 0 of the stochastic steps
    :param schedule: "flow" or "constant", see :func:`transition_coefficients`
    :param generator: the source of the transitions' noise; one on the CPU also serves a chain on a GPU
    :param sde_steps: indices of the stochastic steps (all, a window, or one); None: all. The others are ODE steps.
    :param shift: of the time grid, see :func:`time_grid`
    :return: the chain
    :raises ValueError: a step out of range, a velocity of another shape, or what :func:`sde_transition` refuses
    """
    x = noise.float()
    times = time_grid(num_steps, shift)
    stochastic = _stochastic_steps(num_steps, noise_level, sde_steps)
    noise_device = x.device if generator is None else generator.device
    states, means, stds = [x], [], []
    for k in range(num_steps):
        t, t_next = times[k].item(), times[k + 1].item()
        velocity = velocity_fn(x, torch.full((len(x),), t, device=x.device))
        mean, std = sde_transition(x, velocity, t, t_next, noise_level if stochastic[k] else 0.0, schedule)
        if stochastic[k]:
            eps = torch.randn(x.shape, generator=generator, device=noise_device).to(x.device)
            x = mean + std * eps
        else:
            x = mean
        states.append(x)
        means.append(mean)
        stds.append(std.reshape(()))
    return FlowChain(
        states=torch.stack(states),
        times=times,
        means=torch.stack(means),
        stds=torch.stack(stds),
        noise_level=noise_level,
        schedule=schedule,
    )


def chain_means(velocity_fn: VelocityFn, chain: FlowChain, steps: Sequence[int] | None = None) -> Tensor:
    """Transition means of a stored chain under a (changed) velocity function, differentiable in its parameters.

    :param velocity_fn: ``(x_t (B, *A), t (B,)) -> v (B, *A)``
    :param chain: as sampled
    :param steps: flow steps to compute; None: the stochastic ones
    :return: (len(steps), B, *A)
    """
    means = []
    for k in chain.sde_steps if steps is None else steps:
        x, t, t_next = chain.states[k], chain.times[k].item(), chain.times[k + 1].item()
        velocity = velocity_fn(x, torch.full((len(x),), t, device=x.device))
        noise_level = chain.noise_level if chain.stds[k] > 0 else 0.0
        means.append(sde_transition(x, velocity, t, t_next, noise_level, chain.schedule)[0])
    return torch.stack(means)


def score_chain(velocity_fn: VelocityFn, chain: FlowChain) -> Tensor:
    """Elementwise log-probabilities of a stored chain under a velocity function; with the one it was sampled from, they
    reproduce ``chain.log_probs``.

    :param velocity_fn: ``(x_t (B, *A), t (B,)) -> v (B, *A)``
    :param chain: as sampled
    :return: (K, B, *A), differentiable, 0 on deterministic steps
    """
    steps = chain.sde_steps
    return _log_probs(chain, chain_means(velocity_fn, chain, steps) if steps else chain.means[:0])


def _log_probs(chain: FlowChain, means: Tensor) -> Tensor:
    """Log-densities (K, B, *A) of a chain's states under the means of its stochastic steps."""
    log_probs = [torch.zeros_like(mean) for mean in chain.means]
    for k, mean in zip(chain.sde_steps, means, strict=True):
        log_probs[k] = gaussian_log_prob(chain.states[k + 1], mean, chain.stds[k])
    return torch.stack(log_probs)


def log_prob_difference(x: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """Elementwise log Normal(x; mean, std) - log Normal(x; mean_old, std), without subtracting two large numbers.

    With z = (x - mean_old) / std and d = (mean - mean_old) / std it is z d - d^2 / 2, exactly 0 for equal means:
    summed over hundreds of dimensions, the difference of two rounded log-densities would not be.

    :param x: (..., *A) the sampled state
    :param mean: same shape, under the current policy
    :param mean_old: same shape, under the sampling policy
    :param std: broadcastable, positive
    :return: same shape
    """
    shift = (mean - mean_old) / std
    return shift * ((x - mean_old) / std - 0.5 * shift)
