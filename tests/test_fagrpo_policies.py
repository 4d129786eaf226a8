"""FlowPolicy: spaces, samplers, statistics and files."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from fagrpo import FAGRPO, FlowHead, FlowPolicy, average_policies
from fagrpo.cli import main
from fagrpo.flow_sde import score_chain, time_grid

ROBOT = spaces.Dict(
    image=spaces.Box(0, 255, (40, 40, 3), np.uint8),
    proprio=spaces.Box(-np.inf, np.inf, (8,), np.float32),
    instruction=spaces.Box(-np.inf, np.inf, (16,), np.float32),
)
CHUNK = spaces.Box(-1, 1, (4, 7), np.float32)
SMALL = {
    "num_flow_steps": 3,
    "features_extractor_kwargs": {"features_dim": 32, "vector_dim": 16, "channels": [8, 8], "map_channels": 2},
    "flow_head_kwargs": {"width": 32, "hidden": 32, "num_blocks": 1},
}
VECTOR = {**SMALL, "features_extractor_kwargs": {"features_dim": 32, "vector_dim": 16}}


def batch(space: spaces.Dict, count: int) -> dict[str, np.ndarray]:
    space.seed(0)
    samples = [space.sample() for _ in range(count)]
    return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}


def perturb(policy: FlowPolicy) -> FlowPolicy:
    """The last layer begins at zero; give it weights so that the policy depends on its input."""
    torch.manual_seed(0)
    for parameter in policy.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("num_flow_steps", [1, 4])
@pytest.mark.parametrize(
    "action_space",
    [CHUNK, spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32)), spaces.Box(0, 1, (1,))],
    ids=["chunk", "asymmetric", "one"],
)
def test_actions_lie_in_any_bounded_box(action_space: spaces.Box, num_flow_steps: int) -> None:
    space = spaces.Box(-1, 1, (5,), np.float32)
    policy = perturb(FlowPolicy(space, action_space, **{**VECTOR, "num_flow_steps": num_flow_steps}))
    single, _ = policy.predict(space.sample())
    assert single.shape == action_space.shape and action_space.contains(single.astype(action_space.dtype))
    several, _ = policy.predict(np.stack([space.sample() for _ in range(6)]))
    assert several.shape == (6, *action_space.shape)


def test_deterministic_prediction_repeats_and_the_other_does_not() -> None:
    policy = perturb(FlowPolicy(ROBOT, CHUNK, **SMALL))
    obs = batch(ROBOT, 3)
    first, _ = policy.predict(obs, deterministic=True)
    second, _ = policy.predict(obs, deterministic=True)
    np.testing.assert_array_equal(first, second)
    assert np.ptp(first, axis=0).max() > 0  # the observation matters
    assert not np.array_equal(policy.predict(obs)[0], policy.predict(obs)[0])


def test_a_time_shift_is_that_of_sampling_and_of_prediction() -> None:
    policy = perturb(FlowPolicy(ROBOT, CHUNK, **SMALL, time_shift=3.0))
    times = time_grid(3, 3.0)
    obs, _ = policy.obs_to_tensor(batch(ROBOT, 2))
    chain = policy.sample(obs, 0.5, "flow", torch.Generator().manual_seed(0), None)
    torch.testing.assert_close(chain.times, times)
    context = policy.encode(obs)
    x = torch.zeros(2, *CHUNK.shape)  # where the deterministic flow begins
    for now, then in pairwise(times):
        x = x + (then - now) * policy.velocity(x, now.expand(2), context)
    torch.testing.assert_close(policy(obs, deterministic=True), policy.unnormalize_action(x), rtol=1e-4, atol=1e-5)


def test_images_come_channels_first_or_last() -> None:
    policy = perturb(FlowPolicy(ROBOT, CHUNK, **SMALL))
    obs = batch(ROBOT, 2)
    transposed = {**obs, "image": obs["image"].transpose(0, 3, 1, 2)}
    expected, _ = policy.predict(obs, deterministic=True)
    np.testing.assert_allclose(policy.predict(transposed, deterministic=True)[0], expected, atol=1e-5)
    tensors = {key: torch.as_tensor(value) for key, value in obs.items()}
    context = policy.encode({key: torch.as_tensor(value) for key, value in transposed.items()})
    torch.testing.assert_close(policy.encode(tensors), context)


def test_a_blind_policy_ignores_the_image_and_needs_none() -> None:
    policy = perturb(FlowPolicy(ROBOT, CHUNK, observation_keys=["proprio", "instruction"], **VECTOR))
    obs = batch(ROBOT, 2)
    expected, _ = policy.predict(obs, deterministic=True)
    changed = {**obs, "image": 255 - obs["image"]}
    np.testing.assert_array_equal(policy.predict(changed, deterministic=True)[0], expected)
    del changed["image"]
    np.testing.assert_array_equal(policy.predict(changed, deterministic=True)[0], expected)
    # The same weights on a space without the image are given one.
    unseen = spaces.Dict({key: ROBOT[key] for key in ("proprio", "instruction")})
    other = FlowPolicy(unseen, CHUNK, observation_keys=["proprio", "instruction"], **VECTOR)
    other.load_state_dict(policy.state_dict())
    np.testing.assert_array_equal(other.predict(obs, deterministic=True)[0], expected)


def test_an_encoder_of_ones_own_is_made_for_the_entries_it_is_given() -> None:
    class Proprio(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Dict, features_dim: int) -> None:
            assert list(observation_space.spaces) == ["proprio"]
            super().__init__(observation_space, features_dim)
            self.layer = torch.nn.Linear(observation_space["proprio"].shape[0], features_dim)

        def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.layer(observations["proprio"])

    policy = FlowPolicy(
        ROBOT,
        CHUNK,
        observation_keys=["proprio"],
        features_extractor_class=Proprio,
        features_extractor_kwargs={"features_dim": 8},
    )
    assert policy.predict(batch(ROBOT, 2))[0].shape == (2, *CHUNK.shape)


def test_bad_arguments_say_what_is_valid() -> None:
    with pytest.raises(ValueError, match="image, instruction, proprio"):
        FlowPolicy(ROBOT, CHUNK, observation_keys=["camera"])
    with pytest.raises(ValueError, match="no keys"):
        FlowPolicy(spaces.Box(-1, 1, (3,)), CHUNK, observation_keys=["proprio"])
    with pytest.raises(ValueError, match="Box action space"):
        FlowPolicy(ROBOT, spaces.Discrete(3))
    with pytest.raises(ValueError, match="finite bounds"):
        FlowPolicy(ROBOT, spaces.Box(-np.inf, np.inf, (3,)))
    with pytest.raises(ValueError, match="num_flow_steps"):
        FlowPolicy(ROBOT, CHUNK, num_flow_steps=0)
    tiny = spaces.Dict(image=spaces.Box(0, 255, (16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="32x32"):
        FlowPolicy(tiny, CHUNK)


@pytest.mark.parametrize("count", [1, 7])
def test_rows_do_not_depend_on_each_other_and_scores_reproduce(count: int) -> None:
    policy = perturb(FlowPolicy(ROBOT, CHUNK, **SMALL))
    obs = {key: torch.as_tensor(value) for key, value in batch(ROBOT, 8).items()}
    chain = policy.sample(obs, 0.5, generator=torch.Generator().manual_seed(0))
    part = {key: value[:count] for key, value in obs.items()}
    context = policy.encode(part)
    scores = score_chain(lambda x, t: policy.velocity(x, t, context), chain.rows(slice(0, count)))
    difference = (scores - chain.log_probs[:, :count]).detach().flatten(2).sum(2).sum(0)
    assert float(difference.abs().max()) < 1e-4  # rounding of two log-densities; the algorithm compares means instead


class ThirdPartyHead(nn.Module):
    """What a user writes: a network of their own with a velocity."""

    def __init__(self, action_shape: tuple[int, ...], context_dim: int, hidden: int = 16) -> None:
        super().__init__()
        size = int(np.prod(action_shape))
        self.network = nn.Sequential(nn.Linear(size + 1 + context_dim, hidden), nn.Tanh(), nn.Linear(hidden, size))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        velocity: torch.Tensor = self.network(torch.cat([x_t.flatten(1), t[:, None], context], dim=1))
        return velocity.reshape(x_t.shape)


def test_a_third_party_head_is_a_policy_head(tmp_path: Path) -> None:
    assert issubclass(ThirdPartyHead, FlowHead)
    env = gym.make("Pendulum-v1")
    model = FAGRPO(
        "FlowPolicy",
        env,
        group_size=2,
        n_steps=8,
        seed=0,
        policy_kwargs={"flow_head_class": ThirdPartyHead, "flow_head_kwargs": {"hidden": 8}, "num_flow_steps": 2},
    )
    model.learn(16)
    assert model.predict(env.observation_space.sample())[0].shape == (1,)
    model.policy.export_safetensors(tmp_path)
    with pytest.raises(ValueError, match="pass flow_head_class=ThirdPartyHead"):
        FlowPolicy.from_safetensors(tmp_path)
    loaded = FlowPolicy.from_safetensors(tmp_path, flow_head_class=ThirdPartyHead)
    obs = env.observation_space.sample()
    np.testing.assert_array_equal(
        loaded.predict(obs, deterministic=True)[0], model.policy.predict(obs, deterministic=True)[0]
    )


class SlowPolicy(FlowPolicy):
    """A policy with a velocity of its own."""

    def velocity(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return 0.5 * super().velocity(*arguments, **keywords)


def test_a_policy_is_loaded_by_its_own_class_or_one_that_extends_it(tmp_path: Path) -> None:
    for kind in (FlowPolicy, SlowPolicy):
        kind(ROBOT, CHUNK, observation_keys=["proprio"], **SMALL).export_safetensors(tmp_path / kind.__name__)
    assert type(SlowPolicy.from_safetensors(tmp_path / "SlowPolicy")) is SlowPolicy
    assert type(SlowPolicy.from_safetensors(tmp_path / "FlowPolicy")) is SlowPolicy
    with pytest.raises(ValueError, match=r"load it with SlowPolicy\.from_safetensors"):
        FlowPolicy.from_safetensors(tmp_path / "SlowPolicy")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_round_trip(tmp_path: Path, dtype: str) -> None:
    policy = perturb(FlowPolicy(ROBOT, CHUNK, observation_keys=["image", "proprio"], **SMALL))
    policy.set_action_statistics(torch.full((4, 7), 0.2), torch.full((4, 7), 0.3))
    policy.export_safetensors(tmp_path / "policy", dtype)
    loaded = FlowPolicy.from_safetensors(tmp_path / "policy")
    assert loaded.observation_space == policy.observation_space and loaded.action_space == policy.action_space
    obs = batch(ROBOT, 2)
    tolerance = {"float32": 0.0, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    expected, actual = policy.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
    np.testing.assert_allclose(actual, expected, atol=tolerance)
    assert torch.equal(loaded.action_mean, policy.action_mean)  # statistics are not rounded
    assert (tmp_path / "policy/model.safetensors").stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["config.json", "model.safetensors"]


def test_the_same_policy_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        perturb(FlowPolicy(ROBOT, CHUNK, **SMALL)).export_safetensors(tmp_path / name)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_policies_are_averaged_weight_by_weight(tmp_path: Path) -> None:
    first, second = (FlowPolicy(ROBOT, CHUNK, **SMALL) for _ in range(2))
    second.load_state_dict({key: value + 2.0 for key, value in first.state_dict().items()})
    average = average_policies([first, second])
    for key, value in first.state_dict().items():
        torch.testing.assert_close(average.state_dict()[key], value + 1.0)
    assert all(torch.equal(one, other) for one, other in zip(
        average_policies([first]).state_dict().values(), first.state_dict().values(), strict=True
    ))  # fmt: skip
    for name, policy in (("a", first), ("b", second)):
        policy.export_safetensors(tmp_path / name)
    assert main(["average", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "mean")]) == 0
    loaded = FlowPolicy.from_safetensors(tmp_path / "mean")
    for key, value in average.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)


def test_policies_of_different_makes_are_not_averaged() -> None:
    policy = FlowPolicy(ROBOT, CHUNK, **SMALL)
    with pytest.raises(ValueError, match="at least one policy"):
        average_policies([])
    with pytest.raises(ValueError, match="policies 0 and 1 differ"):
        average_policies([policy, FlowPolicy(ROBOT, CHUNK, **{**SMALL, "num_flow_steps": 4})])
    with pytest.raises(ValueError, match="policies 0 and 2 differ"):
        average_policies([policy, policy, FlowPolicy(ROBOT, spaces.Box(-1, 1, (3,)), **SMALL)])


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_without_spaces(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def truncated_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["arguments"]["flow_head_kwargs"]["width"] = 48
    (folder / "config.json").write_text(json.dumps(config))


def weights_that_are_no_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [damaged_config, config_without_spaces, truncated_weights, other_architecture, weights_that_are_no_numbers],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    FlowPolicy(ROBOT, CHUNK, **SMALL).export_safetensors(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        FlowPolicy.from_safetensors(tmp_path)


def test_an_export_that_is_cut_off_leaves_the_old_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FlowPolicy(ROBOT, CHUNK, **SMALL).export_safetensors(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fagrpo.policies.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        perturb(FlowPolicy(ROBOT, CHUNK, **SMALL)).export_safetensors(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_missing_files_and_unknown_dtypes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        FlowPolicy.from_safetensors(tmp_path)
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        FlowPolicy(ROBOT, CHUNK, **SMALL).export_safetensors(tmp_path, "int8")
