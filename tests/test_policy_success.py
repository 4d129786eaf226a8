"""Success rates and their intervals."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from prophet_gym import ProphetVecEnv
from prophet_gym.envs.start_states import StartState, write_start_states
from prophet_gym.evaluation.eval_callback import ProphetEvalCallback
from prophet_gym.evaluation.policy_success import Rollouts, evaluate_in_prophet, starts_of
from prophet_gym.world_model import ProphetPipeline


@pytest.mark.parametrize(
    ("solved", "episodes", "low", "high"),
    [(0, 5, 0.0, 0.434), (34, 50, 0.542, 0.792), (6, 6, 0.610, 1.0), (27, 100, 0.193, 0.364)],
)
def test_wilsons_interval(solved: int, episodes: int, low: float, high: float) -> None:
    nothing = np.zeros(episodes, np.int64)
    rollouts = Rollouts(np.arange(episodes) < solved, nothing, nothing)
    assert rollouts.rate == solved / episodes
    assert rollouts.interval == pytest.approx((low, high), abs=5e-4)
    assert 0 <= rollouts.interval[0] <= rollouts.rate <= rollouts.interval[1] <= 1
    assert "-0" not in str(rollouts)


class Ramp:
    """A judge whose probability rises by 0.1 a chunk; it begins at 0.25 in other tasks than the first one."""

    threshold, motion_threshold = 0.9, 0.9

    def score(
        self,
        frames: NDArray[np.uint8] | None,
        proprio: NDArray[np.float32],
        lengths: NDArray[np.int64],
        instructions: Sequence[str],
        embeddings: NDArray[np.float32],
        starts: NDArray[np.uint8],
        suites: Sequence[str],
    ) -> NDArray[np.float32]:
        first = instructions[0]
        began = 0.25 * np.array([text != first for text in instructions])
        return np.float32(began + 0.1 * (lengths // 2))


class Balanced(Ramp):
    balanced_threshold = balanced_motion_threshold = 0.5


class Still:
    def predict(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
        return np.zeros((len(observation["proprio"]), 8, 7), np.float32), None


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("video", [True, False])
def test_episodes_count_by_the_balanced_threshold(video: bool, mode: str) -> None:
    """In every autoreset mode. After three chunks the first task has 0.3 and the other one 0.55."""
    starts, world = starts_of([0, 1], [40, 41]), ProphetPipeline.tiny_random()

    def solved(judge: Ramp, chunks: int) -> list[bool]:
        return evaluate_in_prophet(
            Still(), "libero_object", starts, world_model=world, reward_model=judge, max_chunks=chunks, video=video,
            autoreset_mode=mode,
        ).success.tolist()  # fmt: skip

    assert solved(Ramp(), 3) == [False] * 4
    assert solved(Balanced(), 2) == [False] * 4
    assert solved(Balanced(), 3) == [False, False, True, True]
    assert solved(Balanced(), 5) == [True] * 4


def test_the_expected_rate_is_of_each_episodes_highest_probability() -> None:
    """The first task's falls after the second chunk; the other one's episode ends past the strict threshold."""

    class Falling(Balanced):
        def score(self, frames: None, proprio: np.ndarray, lengths: np.ndarray, *rest: Any) -> NDArray[np.float32]:
            rising = super().score(frames, proprio, lengths, *rest)
            first = np.array([text == rest[0][0] for text in rest[0]])
            return np.where(first, 0.2 - 0.02 * np.abs(lengths // 2 - 2), rising).astype(np.float32)

    result = evaluate_in_prophet(
        Still(), "libero_object", starts_of([0, 1], [40]), world_model=ProphetPipeline.tiny_random(),
        reward_model=Falling(), max_chunks=12, video=False,
    )  # fmt: skip
    assert result.probability == pytest.approx([0.2, 0.95]) and result.expected_rate == pytest.approx(0.575)
    assert str(result).endswith("of 2, expected 57%") and result.rate == 0.5


def test_the_video_ends_where_the_episode_counts_as_solved() -> None:
    rollouts = evaluate_in_prophet(
        Still(), "libero_object", starts_of([0, 1], [40]), world_model=ProphetPipeline.tiny_random(),
        reward_model=Balanced(), max_chunks=8,
    )  # fmt: skip
    assert [len(video) for video in rollouts.videos] == [1 + 2 * 5, 1 + 2 * 3]


def learner(wrap: Callable[[VecEnv], VecEnv] = lambda envs: envs, video: bool = False) -> PPO:
    envs = gym.make_vec(
        "Prophet-LIBERO-v0", num_envs=4, world_model=ProphetPipeline.tiny_random(), reward_model=Ramp(), video=video,
        max_chunks=3, autoreset_mode="SameStep",
    )  # fmt: skip
    return PPO("MultiInputPolicy", wrap(ProphetVecEnv(envs)), n_steps=4, batch_size=8, n_epochs=1, seed=0)


def evaluation(**options: Any) -> ProphetEvalCallback:
    models = {"world_model": ProphetPipeline.tiny_random(1), "reward_model": Balanced()}
    return ProphetEvalCallback(every=20, **models | {"max_chunks": 4} | options)


def test_a_second_opinion_is_asked_every_so_often_and_changes_nothing() -> None:
    held_out = evaluation(suite="libero_spatial")
    asked = learner().learn(40, held_out).policy.state_dict()
    alone = learner().learn(40)
    unasked = alone.policy.state_dict()
    assert all(torch.equal(asked[key], unasked[key]) for key in unasked)
    assert [steps for steps, _ in held_out.history] == [0, 32, 48]
    # Four chunks of a probability that rises: the first start's task has 0.4, the others' 0.65.
    outcomes = [outcome for _, outcome in held_out.history]
    assert all(len(outcome.success) == 50 and outcome.rate == 0.9 for outcome in outcomes)
    assert [outcome.expected_rate for outcome in outcomes] == pytest.approx([0.625] * 3)
    # Another training begins another history.
    alone.learn(16, held_out)
    assert [steps for steps, _ in held_out.history] == [0, 16]


def test_what_acts_in_an_evaluation_is_the_average_where_there_is_one() -> None:
    class Lifting(Still):
        def predict(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
            assert deterministic
            acted.append(len(observation["proprio"]))
            return super().predict(observation)

    acted: list[int] = []
    model = learner()
    model.average_policy = Lifting()
    model.learn(16, evaluation(task=3))
    assert acted == 2 * 4 * [5]


def test_an_evaluation_of_other_observations_is_refused() -> None:
    def normalized(envs: VecEnv) -> VecEnv:
        return VecNormalize(envs, norm_obs_keys=["proprio"])

    for model in (learner(normalized), learner(lambda envs: VecFrameStack(envs, 2)), learner(video=True)):
        with pytest.raises(ValueError, match="Train on a Prophet environment with video=False"):
            model.learn(16, evaluation())
    with pytest.raises(ValueError, match="every must be at least 1"):
        ProphetEvalCallback(every=0)
    with pytest.raises(ValueError, match="Unknown suite 'libero_90'"):
        ProphetEvalCallback(suite="libero_90")


def test_every_episode_has_noise_of_its_own_that_the_seed_decides() -> None:
    """Two from the same start, by a policy that does nothing."""

    class Watching(Still):
        def predict(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
            self.seen = observation["image"].astype(int)
            return super().predict(observation, deterministic)

    def last_seen(seed: int) -> np.ndarray:
        policy = Watching()
        evaluate_in_prophet(
            policy, "libero_object", starts_of([0], [40], repeats=2), world_model=ProphetPipeline.tiny_random(),
            reward_model=Ramp(), max_chunks=2, seed=seed,
        )  # fmt: skip
        return policy.seen

    first, again, other = last_seen(4), last_seen(4), last_seen(7)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 1  # a batched product rounds by a grey level
    assert (np.abs(first - other).max(axis=(1, 2, 3)) > 1).all()


@pytest.mark.parametrize(("suite", "chunks"), [("libero_object", 20), ("metaworld", 12), ("a_suite_of_yours", 20)])
def test_prophet_gives_as_much_time_as_the_real_simulator(tmp_path: Path, suite: str, chunks: int) -> None:
    seen: list[int] = []

    class Counting(Ramp):
        threshold = motion_threshold = 2.0

        def score(self, frames: None, proprio: np.ndarray, lengths: np.ndarray, *rest: object) -> np.ndarray:
            seen.append(int(lengths.max()))
            return np.zeros(len(lengths), np.float32)

    start = StartState(suite, 0, "a", "pick up the milk and place it in the basket", 40, "val",
                       np.zeros(8, np.float32), np.zeros((96, 96, 3), np.uint8))  # fmt: skip
    write_start_states([start], tmp_path / "starts.parquet")
    evaluate_in_prophet(
        Still(), suite, starts_of([0], [40]), world_model=ProphetPipeline.tiny_random(), reward_model=Counting(),
        video=False, start_states=tmp_path / "starts.parquet",
    )  # fmt: skip
    assert max(seen) == 1 + 2 * chunks
