"""The cases of Stable-Baselines3's own test modules that apply to FAGRPO, with it in PPO's place: see docs/fagrpo.md.

Settings as there: one environment, `n_steps`, few steps. With one environment a group is consecutive episodes from one
start, so episodes are short and `n_steps` holds several groups.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    EvalCallback,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    sync_envs_normalization,
)
from test_fagrpo_sb3_behaviour import SMALL, DictTarget, Target, parameters

from fagrpo import FAGRPO

ONE = {"group_size": 2, "n_steps": 16, "n_epochs": 2, "policy_kwargs": SMALL, "seed": 0, "device": "cpu"}


def one(env: Any = Target, **arguments: Any) -> FAGRPO:
    """A model as SB3's tests make them."""
    return FAGRPO("FlowPolicy", DummyVecEnv([env]), **(ONE | arguments))


# ---- test_save_load


def test_num_timesteps_are_exact_with_one_environment_and_something_is_learned() -> None:
    model = one().learn(48)
    assert model.num_timesteps == 48 and model._n_updates > 0


def test_set_env_and_going_on(tmp_path: Path) -> None:
    model = one().learn(16)
    model.save(tmp_path / "model")
    for force_reset in (True, False):
        loaded = FAGRPO.load(tmp_path / "model", env=DummyVecEnv([Target]), force_reset=force_reset)
        loaded.learn(16, reset_num_timesteps=False)
        assert loaded.num_timesteps == 32
    model.set_env(DummyVecEnv([Target]))
    model.learn(16)
    with pytest.raises(ValueError, match="do not match"):
        model.set_env(DummyVecEnv([DictTarget]))
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(DummyVecEnv([Target] * 2))


def test_exclude_include_and_custom_objects(tmp_path: Path) -> None:
    model = one(n_epochs=3)
    model.save(tmp_path / "small", exclude=["n_epochs"], include=["_custom_logger"])
    loaded = FAGRPO.load(tmp_path / "small", custom_objects={"learning_rate": 0.5})
    assert loaded.learning_rate == 0.5 and loaded.n_epochs == FAGRPO("FlowPolicy", DummyVecEnv([Target])).n_epochs


def test_parameters_that_do_not_fit_are_refused() -> None:
    model = one()
    original = parameters(model)
    scrambled = {
        name: ({key: torch.rand_like(value) for key, value in entry.items()} if name == "policy" else entry)
        for name, entry in model.get_parameters().items()
    }
    model.set_parameters(scrambled, exact_match=True)
    assert not torch.equal(parameters(model), original)
    partial = {"policy": dict(list(scrambled["policy"].items())[1:])}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({**scrambled, **partial}, exact_match=True)
    model.set_parameters({"policy": scrambled["policy"]}, exact_match=False)
    with pytest.raises(ValueError, match="invalid object"):
        model.set_parameters({"dummy": {}}, exact_match=False)


# ---- test_predict


@pytest.mark.parametrize("env_id", ["Pendulum-v1"])
def test_predict_from_an_id(env_id: str) -> None:
    model = FAGRPO("FlowPolicy", env_id, **ONE)
    env = gym.make(env_id)
    obs, _ = env.reset(seed=0)
    action, state = model.predict(obs)
    assert action.shape == env.action_space.shape and state is None and env.action_space.contains(action)
    assert model.predict(np.stack([obs, obs]))[0].shape == (2, *env.action_space.shape)


def test_a_subclass_of_box_will_do() -> None:
    class MyBox(spaces.Box):
        pass

    class Subclassed(Target):
        observation_space = MyBox(-1, 1, (1,), np.float32)
        action_space = MyBox(-1, 1, (1,), np.float32)

    assert one(Subclassed).learn(16).num_timesteps == 16


# ---- test_spaces


class OfSpace(gym.Env):
    """Observations of any space, short episodes, reward for the first number of the action."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.time += 1
        return self.observation_space.sample(), float(np.ravel(action)[0]), False, self.time == 4, {}


BOX = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.MultiBinary([2, 2]),
        spaces.Box(-1, 1, (2, 3), np.float64),
        spaces.Box(-np.inf, np.inf, (2,), np.float32),
    ],
    ids=str,
)
def test_observation_spaces(observation_space: spaces.Space) -> None:
    model = one(lambda: OfSpace(observation_space, BOX)).learn(16)
    assert model.predict(observation_space.sample())[0].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_have_the_dtype_of_the_space(dtype: Any) -> None:
    space = spaces.Box(-1, 2, (3,), dtype)
    model = one(lambda: OfSpace(BOX, space)).learn(16)
    action, _ = model.predict(BOX.sample())
    assert action.dtype == dtype and space.contains(action)


@pytest.mark.parametrize(
    "action_space",
    [spaces.Discrete(3), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2), spaces.Box(-np.inf, np.inf, (2,))],
    ids=str,
)
def test_other_action_spaces_are_refused(action_space: spaces.Space) -> None:
    with pytest.raises((ValueError, AssertionError), match=r"Box|only supports|finite"):
        one(lambda: OfSpace(BOX, action_space))


# ---- test_dict_env


def test_a_dict_behind_wrappers_and_in_subprocesses() -> None:
    def vectors() -> gym.Env:
        return OfSpace(spaces.Dict(a=BOX, b=spaces.Box(-1, 1, (3,), np.float32)), BOX)

    def images() -> gym.Env:
        return OfSpace(spaces.Dict(img=spaces.Box(0, 255, (36, 36, 1), np.uint8), a=BOX), BOX)

    arguments = ONE | {"group_size": 4, "n_steps": 8}
    for env in (
        VecNormalize(DummyVecEnv([vectors] * 4), norm_obs_keys=["a"]),
        VecFrameStack(DummyVecEnv([images] * 4), 2),
        SubprocVecEnv([vectors] * 4),
    ):
        model = FAGRPO("FlowMultiInputPolicy", env, **arguments)
        model.learn(32)
        assert model.num_timesteps == 32
        env.close()


def test_a_dict_of_one_entry_is_the_entry() -> None:
    flat = one(lambda: OfSpace(BOX, BOX))
    keyed = one(lambda: OfSpace(spaces.Dict(box=BOX), BOX))
    keyed.policy.load_state_dict(flat.policy.state_dict(), strict=True)
    obs = BOX.sample()
    expected, _ = flat.predict(obs, deterministic=True)
    np.testing.assert_allclose(keyed.predict({"box": obs}, deterministic=True)[0], expected, atol=1e-6)


def test_nested_dicts_are_refused() -> None:
    nested = spaces.Dict(a=spaces.Dict(b=BOX))
    with pytest.raises((NotImplementedError, ValueError), match=r"[Nn]ested|space"):
        one(lambda: OfSpace(nested, BOX))


def test_goal_environments() -> None:
    model = one(lambda: BitFlippingEnv(n_bits=4, continuous=True, max_steps=4))
    assert model.learn(16).num_timesteps == 16


# ---- test_cnn


@pytest.mark.parametrize("channels_first", [False, True])
def test_image_policies_save_and_load(tmp_path: Path, channels_first: bool) -> None:
    def make_env() -> gym.Env:
        return gym.wrappers.TimeLimit(
            FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=channels_first),
            4,
        )

    model = one(make_env).learn(16)
    obs = make_env().reset()[0]
    expected, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model")
    loaded = FAGRPO.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    assert isinstance(model.get_env(), VecTransposeImage) is not channels_first


# ---- test_vec_normalize


def test_normalisation_is_swapped_and_synchronised() -> None:
    env, evaluation = (VecNormalize(DummyVecEnv([Target] * 4)) for _ in range(2))
    model = FAGRPO("FlowPolicy", env, **(ONE | {"group_size": 4, "n_steps": 8}))
    model.learn(32)
    sync_envs_normalization(model.get_env(), evaluation)
    np.testing.assert_array_equal(env.obs_rms.mean, evaluation.obs_rms.mean)
    model.set_env(evaluation)
    assert model.get_vec_normalize_env() is evaluation
    model.learn(32)


# ---- test_callbacks


def test_stopping_at_a_reward_and_without_improvement() -> None:
    for child, argument in (
        (StopTrainingOnRewardThreshold(reward_threshold=-1000), "callback_on_new_best"),
        (StopTrainingOnNoModelImprovement(max_no_improvement_evals=0, min_evals=0), "callback_after_eval"),
    ):
        evaluation = EvalCallback(Monitor(Target()), eval_freq=4, n_eval_episodes=1, verbose=0, **{argument: child})
        model = one()
        model.learn(10_000, callback=evaluation)
        assert model.num_timesteps < 100


def test_callbacks_count_calls_see_observations_and_may_be_none_or_a_list() -> None:
    class Watching(BaseCallback):
        def _on_step(self) -> bool:
            assert self.locals["new_obs"].shape == (1, 1)
            return True

    watching = Watching()
    model = one()
    model.learn(32, callback=[watching])
    assert watching.n_calls == model.num_timesteps == 32
    model.learn(16, callback=None)


def test_success_is_logged() -> None:
    class Succeeding(Target):
        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
            obs, reward, terminated, truncated, info = super().step(action)
            return obs, reward, terminated, truncated, {**info, "is_success": True}

    model = FAGRPO("FlowPolicy", VecMonitor(DummyVecEnv([Succeeding] * 4)), **(ONE | {"n_steps": 8}))
    model.learn(32)
    assert list(model.ep_success_buffer) and all(model.ep_success_buffer)


# ---- test_logger


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_output_by_verbosity(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    one(verbose=verbose).learn(16)
    assert ("total_timesteps" in capsys.readouterr().out) is (verbose > 0)


def test_the_log_folder_of_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path))
    model = one(tensorboard_log=str(tmp_path / "board"))
    model.learn(16, tb_log_name="name")
    assert (tmp_path / "board/name_1").is_dir()


# ---- test_deterministic


def test_two_trained_models_sample_the_same_actions() -> None:
    sampled = []
    for _ in range(2):
        model = one().learn(32)
        obs = np.linspace(-1, 1, 10, dtype=np.float32)[:, None]
        torch.manual_seed(0)
        sampled.append([model.predict(obs, deterministic=flag)[0] for flag in (False, True)])
    np.testing.assert_array_equal(sampled[0], sampled[1])


# ---- test_train_eval_mode


class BatchNormDropout(BaseFeaturesExtractor):
    """What a flow policy had better not have."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(observation_space.shape[0], 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.layers(observations)


def test_batch_norm_and_dropout_stay_as_they_are() -> None:
    """SB3 trains them; here the ratio must be 1 before the first update, so they are used as in evaluation."""
    kwargs = {**SMALL, "features_extractor_class": BatchNormDropout, "features_extractor_kwargs": {}}
    model = one(policy_kwargs=kwargs)
    norm = model.policy.features_extractor.layers[1]
    before = norm.running_mean.clone(), norm.running_var.clone()
    model.learn(32)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    obs = np.zeros((3, 1), np.float32)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


# ---- test_identity, the continuous case


@pytest.mark.filterwarnings("ignore:Environments of one group")  # SB3's draws its states without a seed
@pytest.mark.slow
def test_identity_as_in_sb3() -> None:
    """IdentityEnvBox(eps=0.5), a reward of at least 90 of 100; groups of 16 environments in place of one."""
    env = DummyVecEnv([lambda: IdentityEnvBox(eps=0.5)] * 16)
    model = FAGRPO(
        "FlowPolicy",
        env,
        learning_rate=3e-3,
        group_size=16,
        advantage="step",
        gamma=0.0,
        n_epochs=4,
        batch_size=400,
        policy_kwargs=SMALL,
        seed=0,
        device="cpu",
    )
    model.learn(48_000)
    reward, _ = evaluate_policy(model, DummyVecEnv([lambda: IdentityEnvBox(eps=0.5)]), n_eval_episodes=20, warn=False)
    assert reward > 90
