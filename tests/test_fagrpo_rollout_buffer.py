"""The rollout buffer's numbers, by hand."""

import numpy as np
import pytest
import torch

from fagrpo.flow_sde import FlowChain, sample_chain
from fagrpo.rollout_buffer import GroupRolloutBuffer


def chains(count: int) -> FlowChain:
    generator = torch.Generator().manual_seed(0)
    return sample_chain(lambda x, t: -x, torch.randn(count, 2, generator=generator), 2, 0.5, "flow", generator)


@pytest.fixture
def buffer() -> GroupRolloutBuffer:
    """Episodes 0 and 1 (group 0) pay (1, 2) and (0, 4); 2 and 3 (group 1) both pay 1, in one step and in two."""
    filled = GroupRolloutBuffer()
    for episode in range(4):
        filled.start_episode(episode, episode // 2)
    mask = np.ones((4, 2), bool)
    filled.add(np.arange(4.0)[:, None], chains(4), np.arange(4), np.zeros(4), np.array([1.0, 0.0, 1.0, 0.0]), mask)
    running = np.array([0, 1, 3])
    filled.add(np.arange(3.0)[:, None], chains(3), running, np.ones(3), np.array([2.0, 4.0, 1.0]), mask[:3])
    return filled


def test_episode_advantages_are_of_discounted_returns_within_the_group(buffer: GroupRolloutBuffer) -> None:
    statistics = buffer.finish(gamma=0.5, advantage="episode", eps=0.0)
    # Group 0: both return 2, so nothing to learn; group 1: 1 against 0.5.
    assert buffer.samples is not None
    assert buffer.samples.advantages.tolist() == [1.0, -1.0, -1.0]
    assert buffer.samples.observations[:, 0].tolist() == [2.0, 3.0, 2.0]  # type: ignore[index]
    assert statistics["return_mean"] == pytest.approx((2 + 2 + 1 + 0.5) / 4)
    assert statistics["informative_groups"] == 1 and statistics["groups"] == 2 and statistics["largest_group"] == 2
    assert statistics["group_success_std"] == pytest.approx((0 + 0.25) / 2)


def test_step_advantages_compare_the_rest_of_the_episode_at_the_same_step(buffer: GroupRolloutBuffer) -> None:
    buffer.finish(gamma=1.0, advantage="step", eps=0.0)
    assert buffer.samples is not None
    # Step 0 of group 0: 3 against 4; its step 1: 2 against 4. Group 1: equal at step 0, alone at step 1.
    assert buffer.samples.advantages.tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_dropped_episodes_do_not_count(buffer: GroupRolloutBuffer) -> None:
    statistics = buffer.finish(drop_episodes=frozenset({1, 2, 3}))
    assert buffer.samples is not None and len(buffer.samples) == 0
    assert statistics["return_mean"] == 3 and statistics["largest_group"] == 1


def test_success_is_not_mixed_with_returns(buffer: GroupRolloutBuffer) -> None:
    buffer.successes = {0: True, 1: False, 2: True}
    assert buffer.finish()["group_success_std"] == pytest.approx(0.5)


def test_minibatches_hold_every_row_once(buffer: GroupRolloutBuffer) -> None:
    with pytest.raises(ValueError, match=r"finish\(\)"):
        next(buffer.minibatches(2, torch.Generator(), torch.device("cpu")))
    buffer.finish(gamma=1.0, advantage="step")
    batches = list(buffer.minibatches(3, torch.Generator().manual_seed(0), torch.device("cpu")))
    assert [len(batch) for batch in batches] == [3, 1]
    seen = torch.cat([batch.advantages for batch in batches])
    assert buffer.samples is not None and sorted(seen.tolist()) == sorted(buffer.samples.advantages.tolist())
