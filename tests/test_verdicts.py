"""When an episode counts as solved: in the environments, in the evaluation of policies, in the report."""

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from test_envs import FakeRewardModel, fake, starts  # noqa: F401
from test_policy_success import Ramp, Still

from prophet_gym.envs.single_env import ProphetEnv
from prophet_gym.envs.vector_env import ProphetVectorEnv
from prophet_gym.evaluation.agreement import Verdicts
from prophet_gym.evaluation.policy_success import evaluate_in_prophet, starts_of
from prophet_gym.world_model import ProphetPipeline

NO_ACTION = np.zeros((2, 8, 7), np.float32)


class HalfSure(Ramp):
    """Gives every episode one half, which is enough in one suite, and by the motion alone in both."""

    threshold = {"libero_object": 0.5, "libero_spatial": 0.6}  # type: ignore[assignment]  # noqa: RUF012
    motion_threshold = 0.4
    balanced_threshold = {"libero_object": 0.45, "libero_spatial": 0.5}  # noqa: RUF012

    def score(self, frames: Any, proprio: Any, lengths: NDArray[np.int64], *told: Any) -> NDArray[np.float32]:
        return np.full(len(lengths), 0.5, np.float32)


@pytest.mark.parametrize(("video", "ended"), [(True, [True, False]), (False, [True, True])])
def test_an_episode_ends_at_the_threshold_of_its_suite_and_of_what_is_seen(
    fake: dict[str, Any],  # noqa: F811
    video: bool,
    ended: list[bool],
) -> None:
    arguments = {**fake, "reward_model": HalfSure(), "video": video, "world_model": ProphetPipeline.tiny_random()}
    envs = ProphetVectorEnv(num_envs=2, **arguments)
    envs.reset(seed=0, options={"suite": ["libero_object", "libero_spatial"]})
    _, rewards, terminated, _, _ = envs.step(NO_ACTION)
    assert terminated.tolist() == ended and rewards.tolist() == [float(end) for end in ended]


@pytest.mark.parametrize(("threshold", "ended"), [("strict", [True, False]), ("balanced", [True, True])])
def test_an_episode_ends_at_the_threshold_that_was_asked_for(
    fake: dict[str, Any],  # noqa: F811
    threshold: str,
    ended: list[bool],
) -> None:
    arguments = {**fake, "reward_model": HalfSure(), "threshold": threshold}
    suites = ("libero_object", "libero_spatial")
    envs = ProphetVectorEnv(num_envs=2, **arguments)
    envs.reset(seed=0, options={"suite": list(suites)})
    _, rewards, terminated, _, infos = envs.step(NO_ACTION)
    assert terminated.tolist() == infos["is_success"].tolist() == ended and rewards.tolist() == list(map(float, ended))
    for suite, end in zip(suites, ended, strict=True):
        env = ProphetEnv(suite=suite, **arguments)
        env.reset(seed=0)
        assert env.step(NO_ACTION[0])[2] == end


@pytest.mark.parametrize(
    ("threshold", "video", "message"),
    [
        ("lenient", True, r"Unknown threshold 'lenient'. Valid: \['strict', 'balanced'\]"),
        ("balanced", False, "the reward model HalfSure has no balanced_motion_threshold"),
    ],
)
def test_a_threshold_that_there_is_not_is_refused(
    fake: dict[str, Any],  # noqa: F811
    threshold: str,
    video: bool,
    message: str,
) -> None:
    arguments = {**fake, "reward_model": HalfSure(), "world_model": ProphetPipeline.tiny_random()}
    with pytest.raises(ValueError, match=message):
        ProphetVectorEnv(num_envs=2, **arguments, threshold=threshold, video=video)


def test_an_episode_that_is_over_waits_for_its_reset_while_it_is_paused(fake: dict[str, Any]) -> None:  # noqa: F811
    never = FakeRewardModel(threshold=2.0)
    arguments = {**fake, "reward_model": never, "max_chunks": 1, "autoreset_mode": AutoresetMode.NEXT_STEP}
    envs = ProphetVectorEnv(num_envs=2, **arguments)
    envs.reset(seed=0)
    last, _, _, truncated, _ = envs.step(NO_ACTION)
    assert truncated.all()
    envs.paused[1] = True
    for _ in range(2):
        now, rewards, terminated, truncated, _ = envs.step(NO_ACTION)
        assert np.array_equal(now["image"][1], last["image"][1])
        assert rewards[1] == 0 and not terminated[1] and not truncated[1]
    envs.paused[1] = False
    first, _, _, truncated, _ = envs.step(NO_ACTION)
    assert not truncated[1] and not np.array_equal(first["image"][1], last["image"][1])


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_policy_is_evaluated_as_deterministically_as_asked(deterministic: bool) -> None:
    class Recording(Still):
        def predict(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
            asked.add(deterministic)
            return super().predict(observation, deterministic)

    asked: set[bool] = set()
    evaluate_in_prophet(
        Recording(), "libero_object", starts_of([0], [40]), world_model=ProphetPipeline.tiny_random(),
        reward_model=Ramp(), max_chunks=2, deterministic=deterministic,
    )  # fmt: skip
    assert asked == {deterministic}


def test_the_report_counts_by_kind_and_by_horizon() -> None:
    """Two kinds, four chunks: a success in the third chunk, which imagination has in the fourth; a failure that
    imagination passes in the first, and one that it does not."""
    solved = np.array([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
    imagined = np.array([[0.1, 0.1, 0.2, 0.9], [0.8, 0.1, 0.1, 0.1], [0.1, 0.2, 0.1, 0.1]])
    real = np.where(solved, 0.9, 0.1)
    ones = np.ones(3)
    kinds = np.array(["policy", "policy", "clean"])
    report = Verdicts(kinds, solved, real, imagined, imagined, 0.5 * ones, 0.15 * ones, 0.85 * ones).report()
    assert report.keys() == {"all", "policy", "clean", "within 1 chunks", "within 2 chunks", "within 3 chunks"}

    def numbers(group: str, source: str) -> tuple[float, float, float, float]:
        row = report[group][source]
        return row["episodes"], row["success_rate"], row["accuracy"], row["false_success_rate"]

    assert numbers("all", "imagined_frames") == pytest.approx((3, 1 / 3, 2 / 3, 1 / 2))
    assert numbers("policy", "imagined_frames") == pytest.approx((2, 1 / 2, 1 / 2, 1))
    assert numbers("clean", "imagined_frames") == pytest.approx((1, 0, 1, 0))
    assert numbers("within 3 chunks", "imagined_frames") == pytest.approx((3, 1 / 3, 1 / 3, 1 / 2))
    assert numbers("within 1 chunks", "imagined_frames") == pytest.approx((3, 0, 2 / 3, 1 / 3))
    assert numbers("all", "imagined_frames_balanced") == pytest.approx((3, 1 / 3, 1 / 3, 1))
    assert numbers("all", "actions_only_as_strict") == pytest.approx((3, 1 / 3, 1, 0))
    assert all(report[group]["real_frames"]["accuracy"] == 1 for group in report)
