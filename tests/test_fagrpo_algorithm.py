"""FAGRPO: its objective against theory, and that success rises."""

import copy
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from fagrpo import FAGRPO, Demonstrations, FlowPolicy, behaviour_cloning
from fagrpo.flow_sde import chain_means, score_chain, time_grid, transition_coefficients
from fagrpo.objective import aggregate_log_ratio, clipped_objective
from fagrpo.rollout_buffer import GroupRolloutSamples

SMALL: dict[str, Any] = {
    "num_flow_steps": 4,
    "features_extractor_kwargs": {"features_dim": 32, "vector_dim": 32},
    "flow_head_kwargs": {"width": 32, "hidden": 64, "num_blocks": 1},
}


class PointReach(gym.Env):
    """Reach a random goal in the plane with chunks of four velocities; reward 1 at the goal, else 0."""

    observation_space = spaces.Box(-4, 4, (4,), np.float32)
    action_space = spaces.Box(-1, 1, (4, 2), np.float32)

    def __init__(self, horizon: int = 3, radius: float = 0.1) -> None:
        self.horizon, self.radius = horizon, radius

    def observe(self) -> np.ndarray:
        return np.concatenate([self.position, self.goal]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        self.time = 0
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position = self.position + 0.25 * np.asarray(action, dtype=np.float64).sum(axis=0)
        self.time += 1
        success = bool(np.linalg.norm(self.position - self.goal) < self.radius)
        return (
            self.observe(),
            float(success),
            success,
            self.time >= self.horizon and not success,
            {"is_success": success},
        )


def point_demonstrations(count: int, bias: float, noise: float) -> Demonstrations:
    """An expert that misses by ``bias`` and trembles."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (count, 4)).astype(np.float32)
    chunk = (obs[:, None, 2:] + bias - obs[:, None, :2]).repeat(4, axis=1)
    actions = np.clip(chunk + noise * rng.normal(size=chunk.shape), -1, 1).astype(np.float32)
    return Demonstrations(obs, actions, np.arange(count) // 3)


def point_envs(count: int, **arguments: Any) -> VecMonitor:
    return VecMonitor(DummyVecEnv([lambda: PointReach(**arguments) for _ in range(count)]))


@pytest.fixture(scope="module")
def cloned() -> FlowPolicy:
    torch.manual_seed(0)
    policy = FlowPolicy(PointReach.observation_space, PointReach.action_space, **SMALL)
    behaviour_cloning(
        policy,
        point_demonstrations(3000, bias=0.07, noise=0.3),
        num_updates=300,
        batch_size=64,
        flow_samples=2,
        learning_rate=3e-3,
        ema_decay=0.98,
        progress_bar=False,
    )
    return policy


class Recorder(KVWriter):
    """Keeps every dump of an SB3 logger."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


def train(
    policy: FlowPolicy, updates: int, num_envs: int = 16, **arguments: Any
) -> tuple[FAGRPO, list[dict[str, Any]]]:
    settings: dict[str, Any] = {"group_size": 8, "seed": 0, "device": "cpu", "max_episode_steps": 3} | arguments
    model = FAGRPO(policy, point_envs(num_envs), **settings)
    recorder = Recorder()
    model.set_logger(Logger(None, [recorder]))
    for _ in range(updates):
        model.learn(1, reset_num_timesteps=False)
    model.logger.dump()
    return model, recorder.rows


def success(policy: FlowPolicy, episodes: int = 200) -> float:
    """Deterministic success on starts that training never uses (episodes side by side)."""
    envs = [PointReach() for _ in range(episodes)]
    obs = np.stack([env.reset(seed=10**6 + i)[0] for i, env in enumerate(envs)])
    solved = np.zeros(episodes, dtype=bool)
    for _ in range(3):
        actions, _ = policy.predict(obs, deterministic=True)
        for i, env in enumerate(envs):
            if not solved[i]:
                obs[i], _, solved[i], _, _ = env.step(actions[i])
    return float(solved.mean())


def test_success_rises_on_unseen_starts(cloned: FlowPolicy) -> None:
    before = success(cloned)
    model, _ = train(cloned, 25, num_envs=64, learning_rate=5e-4, n_epochs=2, batch_size=128)
    after = success(model.policy)
    assert before < 0.85, "the cloned policy leaves no room"
    assert after > before + 0.1


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("ratio", ["chunk", "dim", "flow_step"])
@pytest.mark.parametrize("noise_schedule", ["flow", "constant"])
def test_the_first_ratio_is_one(cloned: FlowPolicy, ratio: str, batch_size: int | None, noise_schedule: str) -> None:
    arguments = {"ratio": ratio, "batch_size": batch_size, "noise_schedule": noise_schedule}
    model, rows = train(cloned, 1, n_epochs=1, learning_rate=1e-6, **arguments)
    assert rows[-1]["train/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)
    assert model.rollout_buffer.samples is not None
    chain = model.rollout_buffer.samples.chain
    assert chain.schedule == noise_schedule and chain.noise_level == model.noise_level


def test_dropout_is_reported_as_the_cause() -> None:
    class Noisy(torch.nn.Module):
        def __init__(self, action_shape: tuple[int, ...], context_dim: int) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(context_dim, int(np.prod(action_shape)))

        def forward(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(self.layer(context), 0.5).reshape(x_t.shape)

    policy = FlowPolicy(PointReach.observation_space, PointReach.action_space, flow_head_class=Noisy, num_flow_steps=3)
    model = FAGRPO(policy, point_envs(8, radius=1.0), seed=0, max_episode_steps=3)
    with pytest.warns(UserWarning, match="dropout"):
        model.learn(200)


def test_all_ratios_share_the_first_gradient_and_the_placements_too(cloned: FlowPolicy) -> None:
    gradients = {}
    for ratio in ("chunk", "dim", "flow_step"):
        for placement in ("advantage", "log_prob"):
            model, _ = train(
                cloned, 1, ratio=ratio, flow_scale_placement=placement, learning_rate=0.0, batch_size=None, n_epochs=1
            )
            samples = model.rollout_buffer.samples
            assert samples is not None and len(samples) > 0
            model._accumulate_gradients(samples, model._flow_scale_weights(samples.chain), 0.2, 0.2)
            gradients[ratio, placement] = torch.cat([p.grad.flatten() for p in model.policy.parameters()])  # type: ignore[union-attr]
    first = gradients["chunk", "advantage"]
    for key, gradient in gradients.items():
        assert float((gradient - first).norm() / first.norm()) < 1e-3, key


def test_micro_batches_accumulate_to_the_same_gradient(cloned: FlowPolicy) -> None:
    model, _ = train(cloned, 1, kl_coef=0.1, learning_rate=1e-3)
    samples = model.rollout_buffer.samples
    assert samples is not None
    gradients = []
    for size in (None, 5):
        model.micro_batch_size = size
        values, norms = model._accumulate_gradients(samples, model._flow_scale_weights(samples.chain), 0.2, 0.2)
        gradients.append(torch.cat([p.grad.flatten() for p in model.policy.parameters()]))  # type: ignore[union-attr]
    assert values["kl_loss"] > 0 and len(norms) == 4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ratio", ["chunk", "dim", "flow_step"])
def test_the_gradient_over_four_flow_steps_is_that_of_the_exact_recursion(ratio: str) -> None:
    """v = w x + b: the action's mean and variance follow a recursion, and with them the gradient of E[-(action - 1)^2].

    With one action dimension all three kinds of ratio have the policy gradient at ratio 1.
    """

    class Linear(torch.nn.Module):
        def __init__(self, action_shape: tuple[int, ...], context_dim: int) -> None:
            super().__init__()
            self.weights = torch.nn.Parameter(torch.tensor([0.4, -0.3]))

        def forward(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.weights[0] * x_t + self.weights[1]

    space = spaces.Box(-10, 10, (1,), np.float32)
    arguments = SMALL | {"flow_head_class": Linear, "flow_head_kwargs": {}, "num_flow_steps": 4}
    policy = FlowPolicy(space, space, **arguments)
    policy.set_action_statistics(torch.zeros(1), torch.ones(1))
    count, noise_level = 100_000, 0.7
    chain = policy.sample(torch.zeros(count, 1), noise_level, generator=torch.Generator().manual_seed(0))
    returns = -(chain.sample.flatten() - 1).square()
    model = FAGRPO("FlowPolicy", "Pendulum-v1", group_size=2, flow_scale="none", noise_level=noise_level, ratio=ratio)
    model.policy = policy
    mask = torch.ones(count, 1, dtype=torch.bool)
    samples = GroupRolloutSamples(torch.zeros(count, 1), chain, returns - returns.mean(), mask)
    model._accumulate_gradients(samples, torch.ones(4), 0.2, 0.2)

    weights = policy.flow_head.weights.detach().clone().requires_grad_()
    mean, variance = torch.zeros(()), torch.ones(())
    for t, t_next in itertools.pairwise(time_grid(4)):
        of_sample, of_velocity, std = transition_coefficients(t, t_next, noise_level, "flow")
        mean = of_sample * mean + of_velocity * (weights[0] * mean + weights[1])
        variance = (of_sample + of_velocity * weights[0]).square() * variance + std**2
    loss = (mean - 1).square() + variance
    (expected,) = torch.autograd.grad(loss, weights)
    assert policy.flow_head.weights.grad is not None
    torch.testing.assert_close(policy.flow_head.weights.grad, expected, rtol=0.04, atol=0.02)


def test_clipping_table() -> None:
    rows = [  # ratio, advantage, low, high, dual clip -> objective
        (1.0, 2.0, 0.2, 0.2, None, 2.0),
        (1.5, 2.0, 0.2, 0.2, None, 2.4),
        (1.5, 2.0, 0.2, 0.4, None, 2.8),
        (0.5, 2.0, 0.2, 0.2, None, 1.0),
        (1.5, -2.0, 0.2, 0.2, None, -3.0),
        (0.5, -2.0, 0.2, 0.2, None, -1.6),
        (0.5, -2.0, 0.4, 0.2, None, -1.2),
        (9.0, -2.0, 0.2, 0.2, 3.0, -6.0),
        (9.0, 2.0, 0.2, 0.2, 3.0, 2.4),
    ]
    for ratio, advantage, low, high, dual, expected in rows:
        value = clipped_objective(torch.tensor(ratio).log(), torch.tensor(advantage), low, high, dual)
        assert float(value) == pytest.approx(expected, rel=1e-5), (ratio, advantage, low, high, dual)


def test_a_bad_action_that_became_likely_is_pushed_back_however_far_it_went() -> None:
    log_ratio = torch.tensor([1.0, 25.0, 50.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(clipped_objective(log_ratio, torch.tensor(-1.0), 0.2, 0.2).sum(), log_ratio)
    torch.testing.assert_close(gradient, -log_ratio.detach().exp())
    far = torch.tensor([90.0, 1000.0]).requires_grad_()  # no overflow either
    (gradient,) = torch.autograd.grad(clipped_objective(far, torch.tensor(-1.0), 0.2, 0.2).sum(), far)
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ratio", ["chunk", "dim", "flow_step"])
def test_masked_entries_do_not_count(ratio: str) -> None:
    difference = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 4, 2, dtype=torch.bool)
    mask[1, 2:] = False
    mask[:, :, 1] = False
    weights = torch.tensor([0.5, 1.0, 1.5])
    changed = torch.where(mask, difference, torch.full_like(difference, 100.0))
    for placement in ("advantage", "log_prob"):
        expected = aggregate_log_ratio(difference, weights, mask, ratio, placement)
        torch.testing.assert_close(aggregate_log_ratio(changed, weights, mask, ratio, placement), expected)
    kept = torch.where(mask, difference, 0.0)
    shapes = {"chunk": kept.sum((0, 2, 3)), "dim": kept.sum(0), "flow_step": kept.sum((2, 3))}
    torch.testing.assert_close(aggregate_log_ratio(difference, weights, mask, ratio, "advantage"), shapes[ratio])


@pytest.mark.parametrize("placement", ["advantage", "log_prob"])
@pytest.mark.parametrize("ratio", ["chunk", "dim", "flow_step"])
def test_flow_scale_weighs_the_gradient_of_each_flow_step(ratio: str, placement: str) -> None:
    difference = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, mask = torch.tensor([0.2, 1.0, 1.8]), torch.ones(5, 4, 2, dtype=torch.bool)
    value = aggregate_log_ratio(difference, weights, mask, ratio, placement)
    (gradient,) = torch.autograd.grad(value.sum(), difference)
    torch.testing.assert_close(gradient, weights[:, None, None, None].expand_as(difference))
    scaled = difference * (1.0 if placement == "advantage" else weights[:, None, None, None])
    torch.testing.assert_close(value.detach().sum(), scaled.detach().sum(), rtol=1e-5, atol=1e-5)


def test_the_update_uses_the_weights(cloned: FlowPolicy) -> None:
    """The velocity's gradient norm at each flow step, before any update: in proportion to the weights."""
    norms, weights = {}, {}
    for flow_scale in ("none", "paper"):
        _, rows = train(cloned, 1, flow_scale=flow_scale, learning_rate=0.0, batch_size=None, n_epochs=1)
        norms[flow_scale] = np.array([rows[-1][f"train/flow_step_grad_norm_{k}"] for k in range(4)])
        weights[flow_scale] = np.array([rows[-1][f"train/flow_scale_w_{k}"] for k in range(4)])
    assert weights["paper"].max() > 1.3 * weights["paper"].min()
    np.testing.assert_allclose(norms["paper"] / norms["none"], weights["paper"], rtol=1e-3)


def test_actions_that_were_not_executed_are_masked(cloned: FlowPolicy) -> None:
    class Interrupted(PointReach):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            obs, reward, terminated, truncated, info = super().step(action)
            return obs, reward, terminated, truncated, {**info, "executed_actions": 3}

    mask = np.array([[True, False]] * 4)
    model = FAGRPO(cloned, DummyVecEnv([Interrupted for _ in range(16)]), action_mask=mask, seed=0, max_episode_steps=3)
    model.learn(1)
    samples = model.rollout_buffer.samples
    assert samples is not None and len(samples) > 0
    assert samples.action_mask.tolist() == [[[True, False]] * 3 + [[False, False]]] * len(samples)


def test_constant_groups_leave_the_parameters_bit_identical(cloned: FlowPolicy) -> None:
    model = FAGRPO(cloned, point_envs(8, radius=0.0), seed=0, kl_coef=0.1, max_episode_steps=3)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(50)
    assert all(torch.equal(value, before[key]) for key, value in model.policy.state_dict().items())
    assert model._n_updates == 0


def test_the_kl_penalty_holds_the_policy_back(cloned: FlowPolicy) -> None:
    distances = []
    for kl_coef in (0.0, 100.0):
        model, _ = train(cloned, 3, kl_coef=kl_coef, learning_rate=1e-3, max_grad_norm=1e9)
        pairs = zip(model.policy.parameters(), cloned.parameters(), strict=True)
        distances.append(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert distances[1] < distances[0]


def test_target_kl_stops_an_update_early(cloned: FlowPolicy) -> None:
    free, _ = train(cloned, 1, n_epochs=10, batch_size=8, learning_rate=1e-2, max_grad_norm=1e9)
    stopped, _ = train(cloned, 1, n_epochs=10, batch_size=8, learning_rate=1e-2, max_grad_norm=1e9, target_kl=1e-3)
    assert stopped._n_updates < free._n_updates == 10


@pytest.mark.parametrize("flow_scale", ["none", "paper", "equalizing"])
def test_what_is_logged(cloned: FlowPolicy, flow_scale: str) -> None:
    _, rows = train(cloned, 2, flow_scale=flow_scale, kl_coef=0.01, sde_window=None)
    row = rows[-1]
    names = {"rollout/group_success_std", "rollout/informative_groups", "rollout/success_rate", "rollout/ep_rew_mean"}
    assert names <= set().union(*rows)
    for name in (
        "loss",
        "policy_gradient_loss",
        "kl_loss",
        "approx_kl",
        "clip_fraction",
        "clip_range",
        "learning_rate",
        "grad_norm",
    ):
        assert np.isfinite(row[f"train/{name}"]), name
    weights = [row[f"train/flow_scale_w_{k}"] for k in range(4)]
    assert np.mean(weights) == pytest.approx(1.0, abs=1e-5)
    assert all(row[f"train/flow_step_grad_norm_{k}"] > 0 for k in range(4))


@pytest.mark.parametrize(("num_envs", "window"), [(256, None), (16, None), (16, 4)])
def test_the_logged_success_rate_is_that_of_the_rollout(cloned: FlowPolicy, num_envs: int, window: int | None) -> None:
    """Failures are the last to end: a window shorter than the rollout would see little else."""
    model, rows = train(cloned, 1, num_envs=num_envs, stats_window_size=window)
    row = {key: value for part in rows for key, value in part.items()}
    assert 0 < row["rollout/return_mean"] < 1
    if window is None:
        assert row["rollout/success_rate"] == pytest.approx(row["rollout/return_mean"])
    else:
        assert row["rollout/success_rate"] < row["rollout/return_mean"]
    assert model.ep_info_buffer is not None and model.ep_info_buffer.maxlen == (window or num_envs)


def test_a_model_that_goes_on_with_more_environments_has_a_wider_window(cloned: FlowPolicy, tmp_path: Path) -> None:
    train(cloned, 1, num_envs=16)[0].save(tmp_path / "model")
    for window in (None, 5):
        model = FAGRPO.load(tmp_path / "model", env=point_envs(32), stats_window_size=window)
        model.learn(1, reset_num_timesteps=False)
        assert model.ep_info_buffer.maxlen == model.ep_success_buffer.maxlen == (window or 32)


def test_a_window_of_stochastic_steps(cloned: FlowPolicy) -> None:
    model, rows = train(cloned, 1, sde_window=2, batch_size=None, n_epochs=1)
    samples = model.rollout_buffer.samples
    assert samples is not None and len(samples.chain.sde_steps) == 2
    assert rows[-1]["train/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("flow_scale", ["none", "paper", "equalizing"])
def test_a_window_has_the_weights_of_the_whole_flow(cloned: FlowPolicy, flow_scale: str) -> None:
    """Normalised within the window, a late one would move the policy several times as far as an early one."""
    model = FAGRPO(cloned, point_envs(8), group_size=8, sde_window=2, flow_scale=flow_scale, noise_level=0.7, seed=0)
    obs = torch.from_numpy(point_demonstrations(2, 0.0, 0.0).observations)
    whole = model._flow_scale_weights(cloned.sample(obs, 0.7))
    assert float(whole.mean()) == pytest.approx(1.0)
    norms = []
    for first in range(3):
        chain = cloned.sample(obs, 0.7, sde_steps=[first, first + 1])
        weights = model._flow_scale_weights(chain)
        torch.testing.assert_close(weights, whole[first : first + 2])
        _, coefficients, stds = transition_coefficients(chain.times[:-1], chain.times[1:], 0.7)
        norms.append(float((weights * (coefficients / stds)[first : first + 2].abs()).square().sum().sqrt()))
    assert (max(norms) / min(norms) < 1.3) == (flow_scale != "none")


class Disturb(BaseCallback):
    """Change the policy between a rollout and its update, so that ratios are spread and there is a KL."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.model.policy.flow_head.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=noise)


def disturbed(policy: FlowPolicy, **arguments: Any) -> tuple[FAGRPO, dict[str, Any]]:
    """A model whose one update was made from a disturbed policy, with a learning rate of 0, and what it logged."""
    settings: dict[str, Any] = {"learning_rate": 0.0, "n_epochs": 1, "batch_size": None, "seed": 0} | arguments
    model = FAGRPO(policy, point_envs(64), max_episode_steps=3, device="cpu", **settings)
    recorder = Recorder()
    model.set_logger(Logger(None, [recorder]))
    with pytest.warns(UserWarning, match="before the first update"):
        model.learn(1, callback=Disturb())
    model.logger.dump()
    return model, recorder.rows[-1]


@pytest.mark.parametrize("micro_batch_size", [None, 50])
@pytest.mark.parametrize("ratio", ["chunk", "dim", "flow_step"])
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, None, None), (0.1, 0.4, None), (0.1, 0.4, 1.3)])
def test_the_update_minimises_the_published_objective(
    cloned: FlowPolicy, ratio: str, low: float, high: float | None, dual: float | None, micro_batch_size: int | None
) -> None:
    """The logged loss against one written out with plain exponentials, where clips bind on both sides."""
    arguments = {"clip_range": low, "clip_range_high": high, "dual_clip": dual, "micro_batch_size": micro_batch_size}
    model, row = disturbed(cloned, ratio=ratio, flow_scale="none", **arguments)
    samples = model.rollout_buffer.samples
    assert samples is not None
    with torch.no_grad():
        context = model.policy.encode(samples.observations)
        scores = score_chain(lambda x, t: model.policy.velocity(x, t, context), samples.chain)
    difference = scores - samples.chain.log_probs  # (K, B, 4, 2)
    r = {"chunk": difference.sum((0, 2, 3)), "dim": difference.sum(0), "flow_step": difference.sum((2, 3))}[ratio].exp()
    a = samples.advantages.reshape(-1, 1, 1) if ratio == "dim" else samples.advantages
    top = low if high is None else high
    objective = torch.minimum(r * a, r.clamp(1 - low, 1 + top) * a)
    if dual is not None:
        assert bool(((a < 0) & (objective < dual * a)).any()), "the dual clip never binds"
        objective = torch.where(a < 0, torch.maximum(objective, dual * a), objective)
    assert bool((r > 1 + top).any()) and bool((r < 1 - low).any()), "a clip never binds"
    expected = -objective.sum() / len(samples)
    assert row["train/policy_gradient_loss"] == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
    clipped = ((r > 1 + top) | (r < 1 - low)).float().mean()
    assert row["train/clip_fraction"] == pytest.approx(float(clipped), abs=2e-3)
    action = difference.sum((0, 2, 3))
    assert row["train/approx_kl"] == pytest.approx(float((action.exp() - 1 - action).mean()), rel=1e-3)


def test_the_kl_is_that_of_the_transitions_as_distributions(cloned: FlowPolicy) -> None:
    mask = np.array([[True, False]] * 4)
    model, row = disturbed(cloned, kl_coef=0.3, flow_scale="none", action_mask=mask)
    samples, reference = model.rollout_buffer.samples, model.reference_policy
    assert samples is not None and reference is not None
    with torch.no_grad():
        means = []
        for policy in (model.policy, reference):
            context = policy.encode(samples.observations)
            means.append(
                chain_means(lambda x, t, policy=policy, context=context: policy.velocity(x, t, context), samples.chain)
            )
    std = samples.chain.stds.reshape(-1, 1, 1, 1)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(means[0], std), normal(means[1], std))
    expected = float(divergence[..., 0].sum() / len(samples))
    assert expected > 0.01
    assert row["train/kl_loss"] == pytest.approx(expected, rel=1e-3)
    assert row["train/loss"] == pytest.approx(row["train/policy_gradient_loss"] + 0.3 * expected, rel=1e-3)


def test_learning_rate_and_clip_ranges_follow_their_schedules(cloned: FlowPolicy) -> None:
    model = FAGRPO(
        cloned,
        point_envs(8, radius=0.2),
        learning_rate=lambda remaining: 1e-3 * remaining,
        clip_range=lambda remaining: 0.1 + 0.1 * remaining,
        clip_range_high=lambda remaining: 0.2 + 0.2 * remaining,
        max_episode_steps=3,
        seed=0,
        device="cpu",
    )
    rates: list[float] = []

    class Rates(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            rates.append(self.model.policy.optimizer.param_groups[0]["lr"])

    recorder = Recorder()
    model.set_logger(Logger(None, [recorder]))
    model.learn(96, callback=Rates())
    model.logger.dump()
    rates.append(model.policy.optimizer.param_groups[0]["lr"])
    rows = [row for row in recorder.rows if "train/clip_range" in row]
    assert len(rows) >= 3
    counts = [row["time/total_timesteps"] for row in rows[:-1]] + [model.num_timesteps]
    remaining = 1 - np.array(counts) / 96
    # A dump comes before the update of its rollout, so it holds the values of the update before.
    logged = remaining[:-1]
    assert [row["train/clip_range"] for row in rows[1:]] == pytest.approx(0.1 + 0.1 * logged)
    assert [row["train/clip_range_high"] for row in rows[1:]] == pytest.approx(0.2 + 0.2 * logged)
    assert [row["train/learning_rate"] for row in rows[1:]] == pytest.approx(1e-3 * logged)
    assert rates[-1] == pytest.approx(1e-3 * remaining[-1])


def test_gradients_are_clipped_to_their_norm(cloned: FlowPolicy) -> None:
    """Plain gradient descent moves the weights by exactly learning rate times the clipped norm."""
    policy = FlowPolicy(PointReach.observation_space, PointReach.action_space, optimizer_class=torch.optim.SGD, **SMALL)
    policy.load_state_dict(cloned.state_dict())
    model, rows = train(policy, 1, learning_rate=0.1, max_grad_norm=0.01, batch_size=None, n_epochs=1)
    pairs = zip(model.policy.parameters(), cloned.parameters(), strict=True)
    moved = float(torch.stack([(a - b).detach().square().sum() for a, b in pairs]).sum().sqrt())
    assert rows[-1]["train/grad_norm"] > 0.01
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_actions_are_clipped_for_the_environment_and_nowhere_else(cloned: FlowPolicy) -> None:
    sent: list[np.ndarray] = []

    class Listening(PointReach):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            sent.append(action)
            return super().step(action)

    model = FAGRPO(cloned, DummyVecEnv([Listening] * 16), noise_level=1.0, seed=0, max_episode_steps=3, device="cpu")
    model.learn(1)
    assert np.abs(sent).max() == 1.0
    samples = model.rollout_buffer.samples
    assert samples is not None
    assert float(model.policy.unnormalize_action(samples.chain.sample).abs().max()) > 1.0


def test_demonstrations_regularise(cloned: FlowPolicy) -> None:
    data = point_demonstrations(100, 0.07, 0.3)
    model, rows = train(cloned, 1, bc_coef=0.5, demonstrations=data, learning_rate=0.0)
    row = rows[-1]
    assert row["train/bc_loss"] > 0
    assert row["train/loss"] == pytest.approx(row["train/policy_gradient_loss"] + 0.5 * row["train/bc_loss"], rel=1e-3)
    model.set_env(VecNormalize(point_envs(16)))
    with pytest.raises(ValueError, match="norm_obs=False"):
        model.learn(1)
    with pytest.raises(ValueError, match="needs demonstrations"):
        FAGRPO(cloned, point_envs(8), bc_coef=0.5)


class StartRecorder(PointReach):
    """Remembers the start of each episode that was acted in."""

    starts: list[tuple[float, ...]]

    def __init__(self) -> None:
        super().__init__(horizon=2, radius=0.0)
        self.starts = []

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.time == 0:
            self.starts.append(tuple(self.observe().tolist()))
        return super().step(action)


def collected_starts(num_envs: int, **arguments: Any) -> Iterator[list[tuple[float, ...]]]:
    envs = [StartRecorder() for _ in range(num_envs)]
    waiting = iter(envs)
    model = FAGRPO(
        "FlowPolicy", DummyVecEnv([lambda: next(waiting)] * num_envs), policy_kwargs=SMALL, seed=0, **arguments
    )
    model.learn(1)
    for env in envs:
        yield env.starts


def test_a_group_shares_its_start_and_groups_differ() -> None:
    starts = [starts[0] for starts in collected_starts(8, group_size=4)]
    assert len(set(starts[:4])) == len(set(starts[4:])) == 1 and starts[0] != starts[4]


class Task(PointReach):
    """The start is an option; the seed draws a wind."""

    seen: list[tuple[int, float]]

    def __init__(self) -> None:
        super().__init__(horizon=2, radius=0.5)
        self.seen = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if options:
            self.seen.append((options["task"], float(self.np_random.uniform())))
            self.position = self.goal = np.full(2, options["task"] / 10)
        return self.observe(), {}


def test_a_group_shares_its_options_and_nothing_else(tmp_path: Path) -> None:
    def options(rng: np.random.Generator) -> dict[str, Any]:
        return {"task": int(rng.integers(10_000))}

    def seen(num_envs: int, updates: int, model: FAGRPO | None = None) -> tuple[FAGRPO, list[list[tuple[int, float]]]]:
        envs = [Task() for _ in range(num_envs)]
        waiting = iter(envs)
        venv = VecMonitor(DummyVecEnv([lambda: next(waiting)] * num_envs))
        model = model or FAGRPO(
            "FlowPolicy", venv, group_size=4, n_groups=2, group_options=options, policy_kwargs=SMALL, seed=0
        )
        model.set_env(venv)
        for _ in range(updates):
            model.learn(1, reset_num_timesteps=False)
        return model, [env.seen for env in envs]

    model, starts = seen(8, 1)
    assert all(len(of_env) == 1 for of_env in starts)
    tasks, winds = zip(*(of_env[0] for of_env in starts), strict=True)
    assert len(set(tasks[:4])) == len(set(tasks[4:])) == 1 and tasks[0] != tasks[4]
    assert len(set(winds)) == 8
    # Fewer environments take turns at the same groups.
    _, rounds = seen(2, 1)
    assert [task for task, _ in rounds[0]] == [task for task, _ in rounds[1]] == [tasks[0]] * 2 + [tasks[4]] * 2
    # A saved model goes on with the groups that an unbroken run would have.
    model.save(tmp_path / "model")
    _, unbroken = seen(8, 1, model)
    _, resumed = seen(8, 1, FAGRPO.load(tmp_path / "model"))
    assert resumed == unbroken != starts


def test_fewer_environments_than_a_group_take_turns() -> None:
    starts = list(collected_starts(2, group_size=4, n_groups=2))
    assert starts[0] == starts[1] and len(starts[0]) == 4
    assert starts[0][0] == starts[0][1] != starts[0][2] == starts[0][3]


def test_one_environment_repeats_a_start_over_consecutive_episodes() -> None:
    (starts,) = collected_starts(1, group_size=3, n_groups=2)
    assert len(starts) == 6 and len(set(starts[:3])) == len(set(starts[3:])) == 1 and starts[0] != starts[3]
    (starts,) = collected_starts(1, group_size=3, n_steps=12)
    assert len(starts) == 6 and len(set(starts[:3])) == len(set(starts[3:])) == 1 and starts[0] != starts[3]


@pytest.mark.parametrize("num_envs", [1, 2, 4, 6])
def test_fixed_collection_counts_time_steps_exactly(num_envs: int) -> None:
    model = FAGRPO("FlowPolicy", point_envs(num_envs), group_size=4, n_steps=10, policy_kwargs=SMALL, seed=0)
    model.learn(20 * num_envs)
    assert model.num_timesteps == 20 * num_envs


def test_episodes_that_a_fixed_collection_cuts_off_are_left_out_unless_they_are_the_first() -> None:
    """Episodes of two steps, of which five steps hold two and a half, and one step a half."""
    for n_steps, stored in ((5, 4), (1, 1)):
        model = FAGRPO("FlowPolicy", DummyVecEnv([Chunks] * 4), group_size=4, n_steps=n_steps, seed=0)
        model.learn(1)
        samples = model.rollout_buffer.samples
        assert samples is not None and len(samples) == 4 * stored


def test_the_epsilon_is_added_to_the_deviation_of_a_group(cloned: FlowPolicy) -> None:
    advantages = []
    for eps in (1e-6, 1.0):
        model, _ = train(cloned, 1, advantage_eps=eps)
        assert model.rollout_buffer.samples is not None
        advantages.append(model.rollout_buffer.samples.advantages)
    assert advantages[0].abs().max() > 1.2 * advantages[1].abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": "token"}, "chunk, dim, flow_step"),
        ({"flow_scale": "yes"}, "none, paper, equalizing"),
        ({"flow_scale_placement": "loss"}, "advantage, log_prob"),
        ({"advantage": "gae"}, "episode, step"),
        ({"noise_schedule": "cosine"}, "flow, constant"),
        ({"noise_level": 0.0}, "noise_level"),
        ({"group_size": 1}, "group_size"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"group_size": 5, "n_groups": 3}, "do not divide"),
        ({"sde_window": 11}, "sde_window"),
        ({"action_mask": np.ones(3)}, "action_mask"),
        ({"group_options": lambda rng: {}, "n_steps": 4}, "whole episodes"),
        ({"n_groups": 2, "n_steps": 4}, "whole episodes"),
        ({"kl_coef": -1.0}, "kl_coef must not be negative"),
        ({"advantage_eps": -1.0}, "advantage_eps"),
        ({"target_kl": 0.0}, "target_kl"),
        ({"clip_range": -0.2}, "clip_range must be positive"),
        ({"clip_range_high": -0.5}, "clip_range_high must be positive"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive"),
        ({"gamma": 1.5}, "gamma"),
        ({"flow_scale_kwargs": {"alpha": 0.5}}, "alpha.*see fagrpo.flow_scale"),
        ({"flow_scale_kwargs": {"blend": 2.0}}, "blend"),
        ({"flow_scale_kwargs": {"blend": 0.5}, "flow_scale": "none"}, "belong to flow_scale='paper'"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FAGRPO("FlowPolicy", point_envs(8), **arguments)
    FAGRPO("FlowPolicy", point_envs(8), policy_kwargs=SMALL).save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        FAGRPO.load(tmp_path / "model", env=point_envs(8), **arguments)


def test_a_policy_for_other_spaces_is_refused(cloned: FlowPolicy) -> None:
    with pytest.raises(ValueError, match="does not fit the environment"):
        FAGRPO(cloned, "Pendulum-v1", group_size=2)
    with pytest.raises(ValueError, match="one or the other"):
        FAGRPO(cloned, point_envs(8), policy_kwargs={})
    with pytest.raises(ValueError, match="choose one of FlowPolicy, FlowMultiInputPolicy"):
        FAGRPO("MlpPolicy", point_envs(8))
    with pytest.raises(TypeError, match="got a Linear"):
        FAGRPO(torch.nn.Linear(2, 2), point_envs(8))  # type: ignore[arg-type]


def test_a_policy_cloned_from_recordings_fits_whatever_the_bounds_of_its_observations(cloned: FlowPolicy) -> None:
    recorded = copy.deepcopy(cloned)
    space = recorded.observation_space
    assert isinstance(space, spaces.Box)
    recorded.observation_space = spaces.Box(-np.inf, np.inf, space.shape, space.dtype)  # type: ignore[arg-type]
    model = FAGRPO(recorded, point_envs(8), group_size=2)
    assert all(torch.equal(model.policy.state_dict()[key], value) for key, value in cloned.state_dict().items())


class PausingVecEnv(DummyVecEnv):
    """Keeps what it is told about environments that nobody waits for."""

    def __init__(self, env_fns: list[Any]) -> None:
        super().__init__(env_fns)
        self.told: list[list[bool]] = []

    @property
    def paused(self) -> list[bool]:
        return self.told[-1] if self.told else []

    @paused.setter
    def paused(self, paused: np.ndarray) -> None:
        self.told.append(paused.tolist())


def test_environments_whose_episode_is_over_are_paused() -> None:
    env = PausingVecEnv([lambda horizon=horizon: PointReach(horizon, radius=0.0) for horizon in (1, 3, 1, 3)])
    model = FAGRPO("FlowPolicy", env, group_size=2, batch_size=None, policy_kwargs=SMALL, seed=0, device="cpu")
    model.learn(12)
    waiting = [True, False, True, False]
    assert env.told == [[False] * 4, waiting, waiting, [False] * 4]


def test_nothing_is_learned_from_environments_whose_episode_is_over() -> None:
    class Paying(PointReach):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            obs, _, terminated, truncated, info = super().step(action)
            return obs, float(self.horizon), terminated, truncated, info

    horizons = (1, 3, 2, 5)
    env = DummyVecEnv([lambda horizon=horizon: Paying(horizon, radius=0.0) for horizon in horizons])
    model = FAGRPO("FlowPolicy", env, group_size=4, batch_size=None, policy_kwargs=SMALL, seed=0, device="cpu")
    model.learn(1)
    samples = model.rollout_buffer.samples
    assert samples is not None and model.num_timesteps == 4 * 5
    returns = np.array([horizon**2 for horizon in horizons])  # of the first episode alone
    expected = np.repeat((returns - returns.mean()) / returns.std(), horizons)
    assert len(samples) == sum(horizons)
    np.testing.assert_allclose(np.sort(samples.advantages.numpy()), np.sort(expected), rtol=1e-4)


class Chunks(gym.Env):
    """A robot's chunk of 8 x 7 actions, two steps an episode; pays for the first number."""

    observation_space = spaces.Box(-4, 4, (16,), np.float32)
    action_space = spaces.Box(-1, 1, (8, 7), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.uniform(-1, 1, 16).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        return self.np_random.uniform(-1, 1, 16).astype(np.float32), float(action[0, 0]), False, self.time >= 2, {}


@pytest.mark.parametrize("num_envs", [1, 2, 16])
@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_the_first_ratio_is_one_at_a_robots_scale(num_envs: int, batch_size: int | None) -> None:
    """560 Gaussians an action, at ten flow steps, in batches that a library may round in its own way."""
    model = FAGRPO("FlowPolicy", DummyVecEnv([Chunks] * num_envs), group_size=4, batch_size=batch_size, seed=0)
    recorder = Recorder()
    model.set_logger(Logger(None, [recorder]))
    model.learn(1)
    model.logger.dump()
    assert recorder.rows[-1]["train/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)


def test_a_running_reward_scale_does_not_make_equal_returns_differ(cloned: FlowPolicy) -> None:
    """Every episode pays 1, sooner or later; behind VecNormalize too nothing is to be learned from that."""

    class PaysOne(PointReach):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            obs, *_ = super().step(action)
            done = self.time >= self.horizon
            return obs, float(done), done, False, {}

    envs = DummyVecEnv([lambda horizon=1 + i % 3: PaysOne(horizon) for i in range(8)])
    model = FAGRPO(cloned, VecNormalize(envs, norm_obs=False), group_size=8, seed=0, max_episode_steps=3)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(24)
    assert all(torch.equal(value, before[key]) for key, value in model.policy.state_dict().items())


@pytest.mark.parametrize(("advantage", "dual_clip"), [(1.0, None), (-1.0, None), (-1.0, 3.0)])
def test_an_enormous_ratio_has_a_finite_gradient(advantage: float, dual_clip: float | None) -> None:
    log_ratio = torch.tensor([300.0, -300.0], requires_grad=True)
    clipped_objective(log_ratio, torch.tensor(advantage), 0.2, 0.2, dual_clip).sum().backward()
    assert log_ratio.grad is not None and torch.isfinite(log_ratio.grad).all()


def test_a_callback_that_ends_training_does_not_turn_back_the_counter(cloned: FlowPolicy, tmp_path: Path) -> None:
    model = FAGRPO(cloned, point_envs(8), group_size=8, seed=0, max_episode_steps=3)
    model.learn(1000, callback=StopTrainingOnMaxEpisodes(1))
    model.save(tmp_path / "model")
    assert FAGRPO.load(tmp_path / "model").num_timesteps == model.num_timesteps > 0


def test_a_save_that_is_cut_off_leaves_the_old_file(
    cloned: FlowPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAGRPO(cloned, point_envs(8), group_size=8, seed=0, max_episode_steps=3)
    model.save(tmp_path / "model")

    def killed(self: Any, path: Path, *arguments: Any) -> None:
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(OnPolicyAlgorithm, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "model.zip")
    assert FAGRPO.load(tmp_path / "model").group_size == 8


def test_a_group_of_one_is_reported(cloned: FlowPolicy) -> None:
    model = FAGRPO(cloned, point_envs(1, radius=0.0), group_size=4, n_steps=2, seed=0)
    with pytest.warns(UserWarning, match="No group of this rollout has two"):
        model.learn(2)


def test_seeding_a_made_model_seeds_its_noise_and_its_starts(cloned: FlowPolicy) -> None:
    first, second = (FAGRPO(cloned, point_envs(8), group_size=8, max_episode_steps=3) for _ in range(2))
    for model in (first, second):
        model.set_random_seed(3)
        model.learn(1)
    one, other = first.policy.state_dict(), second.policy.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_any_number_of_environments_does(cloned: FlowPolicy) -> None:
    model = FAGRPO(cloned, point_envs(3, radius=0.0), group_size=4, seed=0, max_episode_steps=3)
    model.learn(1)
    assert model.num_timesteps == 12 * 3  # 3 groups of 4, in four rounds of 3 environments


def test_a_reference_policy_comes_with_the_parameters(cloned: FlowPolicy) -> None:
    first, second = (
        FAGRPO(cloned, point_envs(8), group_size=8, kl_coef=0.1, seed=0, max_episode_steps=3) for _ in range(2)
    )
    first.learn(1)
    second.set_parameters(first.get_parameters())
    assert first.reference_policy is not None and second.reference_policy is not None
    for one, other in zip(first.reference_policy.parameters(), second.reference_policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_average_policy_is_the_moving_average_of_the_weights_after_each_update(cloned: FlowPolicy) -> None:
    model = FAGRPO(
        cloned, point_envs(32), group_size=8, ema_decay=0.75, learning_rate=1e-3, seed=0, max_episode_steps=3
    )
    assert model.average_policy is not None
    expected = [weight.detach().clone() for weight in cloned.parameters()]
    for rollout in range(1, 4):
        model.learn(1, reset_num_timesteps=False)
        assert model._n_updates == rollout * model.n_epochs, "a rollout without anything to learn"
        expected = [
            0.75 * mean + 0.25 * weight.detach()
            for mean, weight in zip(expected, model.policy.parameters(), strict=True)
        ]
    means, lasts = list(model.average_policy.parameters()), list(model.policy.parameters())
    for mean, value in zip(means, expected, strict=True):
        torch.testing.assert_close(mean, value)
    assert max(float((mean - last).detach().abs().max()) for mean, last in zip(means, lasts, strict=True)) > 1e-5
    without = FAGRPO(cloned, point_envs(8), group_size=8)
    assert without.average_policy is None
    without.set_parameters(model.get_parameters())
    assert without.average_policy is None
    assert all(torch.equal(a, b) for a, b in zip(without.policy.parameters(), lasts, strict=True))
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1"):
        FAGRPO(cloned, point_envs(8), group_size=8, ema_decay=1)


def test_an_average_begins_with_learning_and_comes_and_goes_with_its_decay(cloned: FlowPolicy, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"group_size": 8, "seed": 0, "max_episode_steps": 3, "learning_rate": 1e-12}
    model = FAGRPO(cloned, point_envs(32), ema_decay=0.5, **arguments)
    with torch.no_grad():  # weights that are loaded or cloned after the model was made
        for weight in model.policy.parameters():
            weight += 0.01
    model.learn(1)
    assert model.average_policy is not None
    for mean, weight in zip(model.average_policy.parameters(), model.policy.parameters(), strict=True):
        torch.testing.assert_close(mean, weight, atol=1e-6, rtol=0)

    kept = [mean.detach().clone() for mean in model.average_policy.parameters()]
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        model.set_parameters({})
    assert all(torch.equal(a, b) for a, b in zip(model.average_policy.parameters(), kept, strict=True))

    model.save(tmp_path / "with")
    assert FAGRPO.load(tmp_path / "with", ema_decay=0.0).average_policy is None
    FAGRPO(cloned, point_envs(8), **arguments).save(tmp_path / "without")
    begun = FAGRPO.load(tmp_path / "without", ema_decay=0.5).average_policy
    assert begun is not None
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), cloned.parameters(), strict=True))


def test_parameters_come_from_a_file_too(cloned: FlowPolicy, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"group_size": 8, "kl_coef": 0.1, "max_episode_steps": 3}
    first, second = (FAGRPO(cloned, point_envs(8), seed=seed, **arguments) for seed in (0, 1))
    first.learn(1)
    first.save(tmp_path / "model.zip")
    second.set_parameters(tmp_path / "model.zip")
    one, other = first.policy.state_dict(), second.policy.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one) and second.reference_policy is not None


def test_a_loaded_model_takes_another_seed(cloned: FlowPolicy, tmp_path: Path) -> None:
    FAGRPO(cloned, point_envs(16), group_size=8, seed=0, max_episode_steps=3).save(tmp_path / "model")
    learned = []
    for seed in (1, 2, 2):
        model = FAGRPO.load(tmp_path / "model", env=point_envs(16), seed=seed).learn(1)
        learned.append(torch.cat([weight.detach().flatten() for weight in model.policy.parameters()]))
    assert torch.equal(learned[1], learned[2]) and not torch.equal(learned[0], learned[1])


def test_what_is_frozen_stays_frozen(cloned: FlowPolicy, tmp_path: Path) -> None:
    given = copy.deepcopy(cloned)
    given.features_extractor.requires_grad_(False)
    FAGRPO(given, point_envs(16), group_size=8, max_episode_steps=3, seed=0).save(tmp_path / "model")
    model = FAGRPO.load(tmp_path / "model", env=point_envs(16)).learn(1)
    assert model._n_updates > 0
    for name, weight in model.policy.named_parameters():
        assert torch.equal(weight, cloned.get_parameter(name)) == name.startswith("features_extractor."), name


class CountEpisodes(BaseCallback):
    """Episodes that the infos tell of."""

    count = 0

    def _on_step(self) -> bool:
        self.count += sum("episode" in info for info in self.locals["infos"])
        return True


def test_callbacks_do_not_hear_of_episodes_that_nobody_waits_for(cloned: FlowPolicy) -> None:
    """Without an action to speak of, the point stays where it is; its environment goes on resetting itself."""
    envs = VecMonitor(DummyVecEnv([lambda horizon=horizon: PointReach(horizon, 0.0) for horizon in (1, 2, 3, 6) * 2]))
    callback = CountEpisodes()
    FAGRPO(cloned, envs, group_size=8, max_episode_steps=6, seed=0).learn(1, callback)
    assert callback.count == 8


class Careless(PointReach):
    """Draws its start without its seed."""

    rng = np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = self.rng.uniform(-1, 1, 2)
        return self.observe(), {}


def test_a_group_without_a_common_start_is_reported(cloned: FlowPolicy) -> None:
    for num_envs, arguments in (
        (16, {}),
        (8, {"n_steps": 6}),
        (4, {}),  # in two rounds
        (1, {}),
        (1, {"n_steps": 24}),
        (8, {"group_options": lambda rng: {"tsk": int(rng.integers(10))}}),
    ):
        for envs in ([Careless] * num_envs, [PointReach] * num_envs):
            env = VecNormalize(DummyVecEnv(envs))  # whose scale differs from round to round
            model = FAGRPO(cloned, env, **{"group_size": 8, "max_episode_steps": 3} | arguments)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.learn(1)
            warned = any("begin with different observations" in str(one.message) for one in caught)
            assert warned == (envs[0] is Careless or "group_options" in arguments), (num_envs, arguments)


def test_demonstrations_of_another_shape_are_refused_before_anything_is_collected(cloned: FlowPolicy) -> None:
    good = point_demonstrations(50, 0.0, 0.0)
    for wrong, message in (
        (
            Demonstrations(good.observations, good.actions[:, :1], good.episode_ids),
            r"shape \(1, 2\), the policy's \(4, 2\)",
        ),
        (Demonstrations({"state": good.observations}, good.actions, good.episode_ids), "lack the observations"),
    ):
        model = FAGRPO(cloned, point_envs(8), group_size=8, bc_coef=0.1, demonstrations=wrong, max_episode_steps=3)
        with pytest.raises(ValueError, match=message):
            model.learn(1)
        assert model.num_timesteps == 0
