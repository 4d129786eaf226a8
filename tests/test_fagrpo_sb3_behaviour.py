"""FAGRPO as a Stable-Baselines3 citizen: saving, resuming, callbacks, loggers, spaces, wrappers, modes."""

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from fagrpo import FAGRPO, FlowPolicy

SMALL: dict[str, Any] = {
    "num_flow_steps": 3,
    "features_extractor_kwargs": {"features_dim": 16, "vector_dim": 16},
    "flow_head_kwargs": {"width": 16, "hidden": 16, "num_blocks": 1},
}


class Target(gym.Env):
    """Name the number that is shown: reward -|action - target|, four steps."""

    observation_space: spaces.Space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def observe(self) -> Any:
        return self.target.astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        self.target = self.np_random.uniform(-1, 1, 1)
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(np.asarray(action, np.float32))
        reward = -float(np.abs(action - self.target).sum())
        self.time += 1
        self.target = self.np_random.uniform(-1, 1, 1)
        return self.observe(), reward, False, self.time == 4, {}


class DictTarget(Target):
    """The same with an image, a vector and a one-hot entry."""

    def __init__(self, channels_last: bool = True) -> None:
        shape = (36, 40, 3) if channels_last else (3, 36, 40)
        self.observation_space = spaces.Dict(
            image=spaces.Box(0, 255, shape, np.uint8),
            vector=spaces.Box(-1, 1, (2, 2), np.float32),
            kind=spaces.Discrete(3),
        )

    def observe(self) -> dict[str, Any]:
        shape = self.observation_space["image"].shape  # type: ignore[index]
        level = int(127 * (1 + self.target[0]))
        return {
            "image": np.full(shape, level, np.uint8),
            "vector": np.full((2, 2), self.target[0], np.float32),
            "kind": 1,
        }


class ImageTarget(Target):
    """The same with nothing but an image."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def observe(self) -> np.ndarray:
        return np.full((36, 36, 1), int(127 * (1 + self.target[0])), np.uint8)


def make(num_envs: int = 4, env: Any = Target, **arguments: Any) -> FAGRPO:
    settings: dict[str, Any] = {"group_size": 4, "policy_kwargs": SMALL, "seed": 0, "device": "cpu"} | arguments
    return FAGRPO("FlowPolicy", DummyVecEnv([env] * num_envs), **settings)


def parameters(model: FAGRPO) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in model.policy.parameters()])


# ---- saving and loading


def test_saved_models_predict_the_same(tmp_path: Path) -> None:
    model = make().learn(64)
    model.save(tmp_path / "model")
    loaded = FAGRPO.load(tmp_path / "model")
    obs = np.linspace(-1, 1, 10, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert loaded.num_timesteps == model.num_timesteps and loaded.group_size == 4
    buffer = io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    torch.testing.assert_close(parameters(FAGRPO.load(buffer)), parameters(model))


@pytest.mark.parametrize(
    "arguments", [{}, {"n_steps": 8}, {"kl_coef": 0.1}, {"sde_window": 1}, {"ema_decay": 0.5}], ids=str
)
def test_a_run_resumed_from_its_checkpoint_reaches_the_same_numbers(tmp_path: Path, arguments: dict[str, Any]) -> None:
    def linear(progress_remaining: float) -> float:
        return 1e-3 * progress_remaining

    whole = make(learning_rate=linear, **arguments)
    whole.learn(128, callback=CheckpointCallback(9, str(tmp_path), name_prefix="run"))
    # The checkpoint was written in the middle of a rollout, which is collected again from its beginning.
    resumed = FAGRPO.load(tmp_path / "run_72_steps.zip", env=DummyVecEnv([Target] * 4))
    assert resumed.num_timesteps == 64
    resumed.learn(128 - 64, reset_num_timesteps=False)
    assert torch.equal(parameters(whole), parameters(resumed))
    state, other = whole.policy.optimizer.state_dict()["state"], resumed.policy.optimizer.state_dict()["state"]
    assert all(torch.equal(state[i]["exp_avg"], other[i]["exp_avg"]) for i in state)
    if arguments.get("kl_coef"):
        assert whole.reference_policy is not None and resumed.reference_policy is not None
        for a, b in zip(whole.reference_policy.parameters(), resumed.reference_policy.parameters(), strict=True):
            assert torch.equal(a, b)
    if arguments.get("ema_decay"):
        assert whole.average_policy is not None and resumed.average_policy is not None
        for a, b in zip(whole.average_policy.parameters(), resumed.average_policy.parameters(), strict=True):
            assert torch.equal(a, b)


def test_set_parameters_and_exact_match() -> None:
    first, second = make(seed=0), make(seed=1)
    assert not torch.equal(parameters(first), parameters(second))
    second.set_parameters(first.get_parameters())
    assert torch.equal(parameters(first), parameters(second))
    with pytest.raises(ValueError, match="do not match"):
        first.set_parameters({"policy": first.policy.state_dict()})


def test_loading_with_another_number_of_environments(tmp_path: Path) -> None:
    make(4).save(tmp_path / "model")
    model = FAGRPO.load(tmp_path / "model", env=DummyVecEnv([Target] * 8))
    assert model.n_envs == 8
    model.learn(32)
    with pytest.raises(ValueError, match="do not match"):
        FAGRPO.load(tmp_path / "model", env=DummyVecEnv([ImageTarget] * 4))


def test_policies_save_and_load_alone(tmp_path: Path) -> None:
    policy = make().policy
    policy.save(str(tmp_path / "policy.pt"))
    loaded = FlowPolicy.load(str(tmp_path / "policy.pt"))
    obs = np.zeros((2, 1), np.float32)
    np.testing.assert_array_equal(
        policy.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
    )


# ---- learning


def test_learning_twice_continues() -> None:
    model = make().learn(32)
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 64
    model.learn(32)
    assert model.num_timesteps == 32


@pytest.mark.parametrize("n_steps", [None, 8])
def test_the_same_seed_gives_the_same_run(n_steps: int | None) -> None:
    runs = [parameters(make(n_steps=n_steps, learning_rate=1e-3).learn(64)) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], parameters(make(n_steps=n_steps, learning_rate=1e-3, seed=1).learn(64)))


@pytest.mark.filterwarnings("ignore:Environments of one group")  # SB3's draws its states without a seed
def test_identity_is_learned() -> None:
    """SB3's IdentityEnvBox: the action that equals the observation is rewarded at once, so returns count per step."""
    env = make_vec_env(lambda: IdentityEnvBox(low=-1, high=1, eps=0.1, ep_length=20), n_envs=16)
    model = FAGRPO(
        "FlowPolicy",
        env,
        learning_rate=4e-3,
        group_size=16,
        advantage="step",
        gamma=0.0,
        n_epochs=4,
        batch_size=64,
        policy_kwargs=SMALL,
        seed=0,
        device="cpu",
    )
    before, _ = evaluate_policy(model, env, n_eval_episodes=16, warn=False)
    model.learn(6400)
    after, _ = evaluate_policy(model, env, n_eval_episodes=16, warn=False)
    assert after > before + 2


def test_groups_run_in_subprocesses() -> None:
    model = FAGRPO("FlowPolicy", SubprocVecEnv([Target] * 2), group_size=2, policy_kwargs=SMALL, seed=0)
    model.learn(16)
    assert model.num_timesteps == 16
    assert model.env is not None
    model.env.close()


# ---- callbacks, logger, progress


def test_callbacks(tmp_path: Path) -> None:
    class Counting(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.rollouts = self.steps = 0

        def _on_rollout_end(self) -> None:
            self.rollouts += 1

        def _on_step(self) -> bool:
            assert {"rewards", "dones", "infos", "actions"} <= set(self.locals)
            self.steps += 1
            return True

    counting = Counting()
    evaluation = EvalCallback(DummyVecEnv([Target]), eval_freq=4, n_eval_episodes=1, verbose=0, warn=False)
    model = make()
    model.learn(64, CallbackList([counting, evaluation, EveryNTimesteps(16, CheckpointCallback(1, str(tmp_path)))]))
    assert counting.steps == 16 and counting.rollouts == 4 and list(tmp_path.glob("*.zip"))
    model = make()
    model.learn(10_000, StopTrainingOnMaxEpisodes(2))
    assert model.num_timesteps < 200
    assert make().learn(10_000, lambda local, _: local["self"].num_timesteps < 20).num_timesteps <= 20


def test_loggers_and_progress_bar(tmp_path: Path) -> None:
    model = FAGRPO(
        "FlowPolicy",
        VecMonitor(DummyVecEnv([Target] * 4)),
        group_size=4,
        policy_kwargs=SMALL,
        tensorboard_log=str(tmp_path / "board"),
        seed=0,
    )
    model.learn(32, progress_bar=True)
    assert list((tmp_path / "board/FAGRPO_1").glob("events*"))
    model.set_logger(configure(str(tmp_path / "csv"), ["csv"]))
    model.learn(32)
    header = (tmp_path / "csv/progress.csv").read_text().splitlines()[0].split(",")
    assert {"time/total_timesteps", "rollout/ep_rew_mean", "train/loss", "train/ratio_first_minibatch"} <= set(header)


# ---- observations and wrappers


@pytest.mark.parametrize("channels_last", [True, False])
def test_dict_observations(channels_last: bool) -> None:
    model = FAGRPO(
        "FlowMultiInputPolicy",
        DummyVecEnv([lambda: DictTarget(channels_last)] * 4),
        group_size=4,
        policy_kwargs=SMALL,
        seed=0,
    )
    model.learn(16)
    obs, _ = DictTarget(channels_last).reset(seed=0)
    assert model.predict(obs)[0].shape == (1,)


def test_images_alone() -> None:
    model = make(env=ImageTarget).learn(16)
    assert model.predict(ImageTarget().reset(seed=0)[0])[0].shape == (1,)


def test_stacked_frames() -> None:
    env = VecFrameStack(DummyVecEnv([ImageTarget] * 4), 3)
    model = FAGRPO("FlowPolicy", env, group_size=4, policy_kwargs=SMALL)
    model.learn(16)
    assert model.observation_space.shape == (3, 36, 36)


def test_normalised_observations() -> None:
    model = FAGRPO("FlowPolicy", VecNormalize(DummyVecEnv([Target] * 4)), group_size=4, policy_kwargs=SMALL, seed=0)
    model.learn(32)
    assert model.get_vec_normalize_env() is not None


class Doubling(BaseFeaturesExtractor):
    """A user's own encoder."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 2 * int(np.prod(observation_space.shape)))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return observations.flatten(1).repeat(1, 2)


@pytest.mark.parametrize(
    ("env", "extractor"), [(Target, Doubling), (ImageTarget, NatureCNN), (DictTarget, CombinedExtractor)]
)
def test_custom_encoders(env: Any, extractor: type[BaseFeaturesExtractor], tmp_path: Path) -> None:
    policy_kwargs = {**SMALL, "features_extractor_class": extractor, "features_extractor_kwargs": {}}
    model = FAGRPO("FlowPolicy", DummyVecEnv([env] * 4), group_size=4, policy_kwargs=policy_kwargs, seed=0)
    model.learn(16)
    model.save(tmp_path / "model")
    assert torch.equal(parameters(FAGRPO.load(tmp_path / "model")), parameters(model))


def test_custom_optimisers_and_frozen_encoders() -> None:
    policy_kwargs = {**SMALL, "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}
    model = make(policy_kwargs=policy_kwargs, learning_rate=1e-2)
    model.policy.features_extractor.requires_grad_(False)
    frozen = [value.clone() for value in model.policy.features_extractor.parameters()]
    head = [value.clone() for value in model.policy.flow_head.parameters()]
    model.learn(64)
    pairs = zip(frozen, model.policy.features_extractor.parameters(), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(head, model.policy.flow_head.parameters(), strict=True))


def test_the_policy_stays_in_evaluation_mode() -> None:
    """Sampling and scoring must be one function, so FAGRPO never switches dropout on, unlike SB3's critics."""
    modes = []

    class Watching(BaseCallback):
        def _on_step(self) -> bool:
            modes.append(self.model.policy.training)
            return True

    model = make()
    model.learn(32, Watching())
    assert not any(modes) and not model.policy.training


def test_mixing_up_the_gym_and_vec_env_interfaces_is_explained() -> None:
    model = make()
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict(Target().reset(seed=0))  # type: ignore[arg-type]
