"""Success rates and their intervals."""

import numpy as np
import pytest

from prophet_gym.evaluation.policy_success import Rollouts


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
