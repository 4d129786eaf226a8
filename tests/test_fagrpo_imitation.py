"""Behaviour cloning: it learns, it resumes, it refuses what does not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from test_envs import INSTRUCTIONS
from test_episode_data import make_episode, make_writer

from fagrpo import Demonstrations, FlowPolicy, behaviour_cloning
from fagrpo.cli import load_demonstrations
from fagrpo.imitation import DemonstrationTensors, color_jitter, flow_matching_loss, random_shift, set_statistics

SMALL = {
    "num_flow_steps": 4,
    "features_extractor_kwargs": {"features_dim": 32, "vector_dim": 32},
    "flow_head_kwargs": {"width": 32, "hidden": 64, "num_blocks": 1},
}
OBSERVATION, ACTION = spaces.Box(-3, 3, (3,), np.float32), spaces.Box(-1, 1, (2, 2), np.float32)


def linear_demonstrations(count: int = 600) -> Demonstrations:
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
    mixing = rng.uniform(-0.4, 0.4, (3, 4))
    return Demonstrations(obs, (obs @ mixing).reshape(count, 2, 2).astype(np.float32), np.arange(count) // 10)


def rows_of(data: Demonstrations, rows: np.ndarray) -> Demonstrations:
    observations = data.observations[rows]  # type: ignore[index]
    return Demonstrations(observations, data.actions[rows], data.episode_ids[rows], data.rows_per_step)


def make_policy() -> FlowPolicy:
    torch.manual_seed(0)
    return FlowPolicy(OBSERVATION, ACTION, **SMALL)


def clone(policy: FlowPolicy, data: Demonstrations | None = None, **arguments: object) -> object:
    settings = {"batch_size": 32, "num_updates": 150, "validate_every": 50, "warmup_updates": 10}
    settings |= {"learning_rate": 3e-3, "ema_decay": 0.95, "progress_bar": False, **arguments}
    return behaviour_cloning(policy, data or linear_demonstrations(), **settings)  # type: ignore[arg-type]


def test_it_learns_and_keeps_the_best_average() -> None:
    policy = make_policy()
    data = linear_demonstrations()
    result = clone(policy)
    predicted, _ = policy.predict(data.observations, deterministic=True)
    error = np.abs(predicted - data.actions).mean()
    assert error < 0.2 * np.abs(data.actions).mean()
    losses = [entry["validation_loss"] for entry in result.history]  # type: ignore[attr-defined]
    assert result.best_validation_loss == min(losses)  # type: ignore[attr-defined]
    assert not policy.training


def test_statistics_are_stored_in_the_policy() -> None:
    policy, data = make_policy(), linear_demonstrations()
    set_statistics(policy, data, np.arange(len(data)))
    x = policy.normalize_action(torch.as_tensor(data.actions)).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(
        policy.unnormalize_action(policy.normalize_action(torch.ones(1, 2, 2))), torch.ones(1, 2, 2)
    )
    constant = Demonstrations(data.observations, np.zeros_like(data.actions), data.episode_ids)
    set_statistics(policy, constant, np.arange(len(constant)))
    assert float(policy.action_std.min()) == pytest.approx(0.01)
    set_statistics(policy, data, np.arange(300))
    some = torch.as_tensor(data.actions[:300]).flatten(0, 1).mean(0)
    torch.testing.assert_close(policy.action_mean, some.expand(2, 2))


def test_a_padding_dimension_has_no_range_and_does_no_harm() -> None:
    space = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32))
    policy, data = FlowPolicy(OBSERVATION, space, **SMALL), linear_demonstrations()
    padded = replace(data, actions=data.actions[:, 0] * np.array([1, 0], np.float32))
    clone(policy, padded, num_updates=20)
    action, _ = policy.predict(data.observations)
    assert np.isfinite(action).all() and not action[:, 1].any()


def test_observations_of_another_shape_are_refused() -> None:
    data = linear_demonstrations()
    with pytest.raises(ValueError, match=r"'box' has shape \(1,\), the policy's \(3,\)"):
        clone(make_policy(), replace(data, observations=data.observations[:, :1]))


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = make_policy(), make_policy()
    clone(whole, num_updates=100)
    path = tmp_path / "state.safetensors"

    class KilledError(Exception):
        pass

    original = torch.optim.AdamW.step
    count = 0

    def dying(self: torch.optim.AdamW, *arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 71:
            raise KilledError
        return original(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(KilledError):
            clone(parts, num_updates=100, checkpoint=path)
    resumed = make_policy()
    result = clone(resumed, num_updates=100, checkpoint=path)
    assert [entry["update"] for entry in result.history] == [50, 100]  # type: ignore[attr-defined]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    clone(make_policy(), num_updates=50, checkpoint=path)
    with pytest.raises(ValueError, match="same settings"):
        clone(make_policy(), num_updates=50, checkpoint=path, seed=1)
    data = linear_demonstrations()
    other = Demonstrations(data.observations, -data.actions, data.episode_ids)
    with pytest.raises(ValueError, match="same settings"):
        clone(make_policy(), other, num_updates=50, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete training checkpoint"):
        clone(make_policy(), num_updates=50, checkpoint=path)


def test_early_stopping_and_no_validation(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    arguments = {"num_updates": 500, "validate_every": 10, "patience": 1, "learning_rate": 0.0, "checkpoint": path}
    result = clone(make_policy(), **arguments)
    assert result.num_updates == 20  # type: ignore[attr-defined]
    result = clone(make_policy(), **arguments)  # it has stopped, and stays so
    assert result.num_updates == 20  # type: ignore[attr-defined]
    result = clone(make_policy(), num_updates=50, validation_fraction=0.0)
    assert result.best_update == 50  # type: ignore[attr-defined]


def test_the_loss_of_the_true_velocity_is_zero() -> None:
    class Oracle(torch.nn.Module):
        """Knows that every action is 0.3 in flow units."""

        def __init__(self, action_shape: tuple[int, ...], context_dim: int) -> None:
            super().__init__()

        def forward(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return (x_t - 0.3) / t.reshape(-1, 1, 1)

    policy = FlowPolicy(
        OBSERVATION, ACTION, flow_head_class=Oracle, **{"features_extractor_kwargs": SMALL["features_extractor_kwargs"]}
    )
    loss = flow_matching_loss(policy, torch.zeros(8, 3), torch.full((8, 2, 2), 0.3))
    assert float(loss) < 1e-10


def test_the_loss_is_the_error_of_the_clean_action_over_all_times() -> None:
    """A velocity that is off by one errs by t in the clean action: the mean of t^2 over (0, 1] is a third, and strata
    of a quarter each leave little to chance."""

    class OffByOne(torch.nn.Module):
        def __init__(self, action_shape: tuple[int, ...], context_dim: int) -> None:
            super().__init__()

        def forward(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            times.append(t)
            return (x_t - 0.3) / t.reshape(-1, 1, 1) + 1

    times: list[torch.Tensor] = []
    policy = FlowPolicy(
        OBSERVATION,
        ACTION,
        flow_head_class=OffByOne,
        **{"features_extractor_kwargs": SMALL["features_extractor_kwargs"]},
    )
    loss = flow_matching_loss(policy, torch.zeros(256, 3), torch.full((256, 2, 2), 0.3))
    assert float(loss) == pytest.approx(1 / 3, abs=0.02)
    assert torch.equal((4 * times[0]).ceil().long().reshape(256, 4), torch.tensor([4, 3, 2, 1]).expand(256, 4))


def test_augmentation_keeps_shape_type_and_content() -> None:
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.int64).reshape(2, 3, 32, 32).remainder(251).to(torch.uint8)
    assert torch.equal(random_shift(images, 0), images)
    shifted = random_shift(images, 4, torch.Generator().manual_seed(3))
    assert shifted.shape == images.shape and shifted.dtype == torch.uint8
    assert any(
        torch.equal(shifted[0, :, 4:-4, 4:-4], images[0, :, 4 + dy : 28 + dy, 4 + dx : 28 + dx])
        for dy in range(-4, 5)
        for dx in range(-4, 5)
    )
    jittered = color_jitter(images, 0.1)
    assert jittered.dtype == torch.uint8 and (jittered.float() - images.float()).abs().max() < 30
    assert torch.equal(color_jitter(images, 0.0), images)


@pytest.mark.parametrize(("shift", "jitter"), [(4, 0.1), (4, 0.0), (0, 0.1), (0, 0.0)])
def test_training_images_are_augmented_and_validation_images_are_not(
    shift: int, jitter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 3, 36, 36), dtype=np.uint8)
    actions = rng.uniform(-1, 1, (40, 2, 2)).astype(np.float32)
    small = {"features_dim": 16, "channels": (8, 8), "keypoints": 4, "map_channels": 2}
    policy = FlowPolicy(space, ACTION, num_flow_steps=2, features_extractor_kwargs=small)
    known = {image.tobytes() for image in images}
    inside = {image[:, 4:-4, 4:-4].tobytes() for image in images}
    seen: dict[bool, list[np.ndarray]] = {True: [], False: []}
    encode = FlowPolicy.encode

    def watched(self: FlowPolicy, obs: torch.Tensor, min_rows: int = 1) -> torch.Tensor:
        seen[self.training] += list(obs.numpy())
        return encode(self, obs, min_rows)

    monkeypatch.setattr(FlowPolicy, "encode", watched)
    behaviour_cloning(
        policy,
        Demonstrations(images, actions, np.arange(40) // 4),
        num_updates=4,
        batch_size=16,
        image_shift=shift,
        color_jitter_strength=jitter,
        progress_bar=False,
    )
    assert len(seen[True]) == 64 and len(seen[False]) == 4
    assert all(image.tobytes() in known for image in seen[False])
    unchanged = sum(image.tobytes() in known for image in seen[True])
    if shift or jitter:
        assert unchanged < 10
    else:
        assert unchanged == 64
    if shift and not jitter:  # moved by up to 4 pixels: the middle of the result is a piece of the original
        pieces = {
            image[:, 4 + dy : 32 + dy, 4 + dx : 32 + dx].tobytes()
            for image in images
            for dy in range(-4, 5)
            for dx in range(-4, 5)
        }
        assert all(image[:, 4:-4, 4:-4].tobytes() in pieces for image in seen[True])
        assert any(image[:, 4:-4, 4:-4].tobytes() not in inside for image in seen[True])


def test_the_result_is_the_exponential_average_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop by hand; without validation data the last average is kept."""
    policy, decay = make_policy(), 0.95
    average = [weight.detach().clone() for weight in policy.parameters()]
    last: list[torch.Tensor] = []
    original, count = torch.optim.AdamW.step, 0

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        nonlocal count
        result = original(self, *arguments)  # type: ignore[arg-type]
        current = min(decay, (1 + count) / (10 + count)) if count else 0.0  # a short memory at first
        count += 1
        for mean, weight in zip(average, policy.parameters(), strict=True):
            mean.mul_(current).add_(weight.detach(), alpha=1 - current)
        last[:] = [weight.detach().clone() for weight in policy.parameters()]
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    clone(policy, num_updates=300, ema_decay=decay, validation_fraction=0.0)
    assert count == 300
    for mean, weight in zip(average, policy.parameters(), strict=True):
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-4, atol=1e-5)
    distance = max(float((a - b).abs().max()) for a, b in zip(last, average, strict=True))
    assert distance > 1e-4, "the average is the last weight: the test shows nothing"


def test_stacked_demonstrations_look_like_vec_frame_stack() -> None:
    class Counter(gym.Env):
        observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (40, 40, 3), np.uint8), proprio=spaces.Box(-9, 9, (2,), np.float32)
        )
        action_space = spaces.Box(-1, 1, (1,), np.float32)

        def observe(self) -> dict[str, np.ndarray]:
            return {
                "image": np.full((40, 40, 3), 10 * self.time + 1, np.uint8),
                "proprio": np.array([self.time + 1, -1], np.float32),
            }

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
            self.time = 0
            return self.observe(), {}

        def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
            self.time += 1
            return self.observe(), 0.0, self.time == 4, False, {}

    plain, stacked = Counter(), VecFrameStack(DummyVecEnv([Counter]), 3)
    rows, expected = [], []
    obs, _ = plain.reset()
    stacked_obs = stacked.reset()
    for episode in range(2):
        done = False
        while not done:
            rows.append((obs, episode))
            expected.append({key: value[0].copy() for key, value in stacked_obs.items()})
            obs, _, done, _, _ = plain.step(np.zeros(1))
            stacked_obs, _, _, _ = stacked.step(np.zeros((1, 1)))
        obs, _ = plain.reset()
    demonstrations = Demonstrations(
        {key: np.stack([obs[key] for obs, _ in rows]) for key in ("image", "proprio")},
        np.zeros((len(rows), 1), np.float32),
        np.array([episode for _, episode in rows]),
    ).stack_frames(3)
    for key in ("image", "proprio"):
        np.testing.assert_array_equal(
            demonstrations.observations[key],  # type: ignore[call-overload, index]
            np.stack([row[key] for row in expected]),
        )


def test_frames_are_stacked_within_episodes_that_were_recorded_side_by_side() -> None:
    data = linear_demonstrations(40)  # four episodes of ten rows
    together = data.stack_frames(3)
    mixed = np.arange(40).reshape(4, 10).T.flatten()  # the first rows of all, then the second ones ...
    np.testing.assert_array_equal(
        rows_of(data, mixed).stack_frames(3).observations, rows_of(together, mixed).observations
    )


def test_frames_are_stacked_a_step_of_the_environment_apart() -> None:
    """Every frame is a row, and a policy acts at every second one."""
    data = replace(linear_demonstrations(20), rows_per_step=2)
    stacked = data.stack_frames(3).observations
    obs = data.observations
    np.testing.assert_array_equal(stacked[17], np.concatenate([obs[13], obs[15], obs[17]]))  # type: ignore[index]
    np.testing.assert_array_equal(stacked[12], np.concatenate([0 * obs[10], obs[10], obs[12]]))  # type: ignore[index]


def test_a_recording_is_never_in_training_and_in_validation(tmp_path: Path) -> None:
    """Nor is a row of it; and one that is solved in all its frames has one chunk."""
    writer = make_writer(tmp_path / "data")
    for index in range(20):
        success = np.arange(6) >= 4 if index else np.ones(6, bool)
        writer.write_episode(index, make_episode(index, success=success, instruction=INSTRUCTIONS[0]))
    writer.finalize()
    data = load_demonstrations([tmp_path / "data"], kinds=["clean"], split="train")
    assert data.rows_per_step == 2 and len(data) == 1 + 19 * 5
    assert data.episode_ids.tolist() == [0] + [index for index in range(1, 20) for _ in range(5)]
    train, held_out = data.split(0.2, seed=0)
    assert len(set(data.episode_ids[train])) == 16 and not set(data.episode_ids[train]) & set(
        data.episode_ids[held_out]
    )
    slow = make_writer(tmp_path / "slow", frame_stride=8)
    slow.write_episode(0, make_episode(0, stride=8, success=np.arange(6) >= 4, instruction=INSTRUCTIONS[0]))
    slow.finalize()
    with pytest.raises(ValueError, match="one frame_stride"):
        load_demonstrations([tmp_path / "data", tmp_path / "slow"], kinds=["clean"], split="train")


def test_validation_looks_at_rows_of_all_held_out_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = linear_demonstrations(200), []
    monkeypatch.setattr("fagrpo.imitation.MAX_VALIDATION_ROWS", 7)
    batch = DemonstrationTensors.batch

    def spy(self: DemonstrationTensors, rows: torch.Tensor, *arguments: object) -> object:
        if not torch.is_grad_enabled():
            seen.append(rows)
        return batch(self, rows, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DemonstrationTensors, "batch", spy)
    clone(make_policy(), data, num_updates=50, validation_fraction=0.3)
    assert {len(rows) for rows in seen} == {7} and len(set((seen[0] // 10).tolist())) >= 5


def broken_length(data: Demonstrations) -> Demonstrations:
    return Demonstrations(data.observations[:-1], data.actions, data.episode_ids)  # type: ignore[index]


def broken_value(data: Demonstrations) -> Demonstrations:
    return Demonstrations(data.observations, np.full_like(data.actions, np.nan), data.episode_ids)


def empty(data: Demonstrations) -> Demonstrations:
    return rows_of(data, np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize("breaking", [broken_length, broken_value, empty])
def test_bad_demonstrations(breaking: Callable[[Demonstrations], Demonstrations]) -> None:
    with pytest.raises(ValueError, match=r"rows|NaN|no demonstrations"):
        breaking(linear_demonstrations())


def test_demonstrations_that_do_not_fit_the_policy() -> None:
    data = linear_demonstrations()
    wrong = Demonstrations(data.observations, data.actions[:, :1], data.episode_ids)
    with pytest.raises(ValueError, match="actions have shape"):
        behaviour_cloning(make_policy(), wrong, progress_bar=False)
    with pytest.raises(ValueError, match="one episode"):
        Demonstrations(data.observations, data.actions, np.zeros(len(data), int)).split(0.1, 0)
    train, held_out = data.split(0.1, 0)
    assert not set(data.episode_ids[train]) & set(data.episode_ids[held_out])
    assert len(train) + len(held_out) == len(data)
