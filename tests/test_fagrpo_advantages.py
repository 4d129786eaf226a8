"""Group-relative advantages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fagrpo.advantages import group_advantages


def test_population_statistics_per_group() -> None:
    returns = torch.tensor([1.0, 0.0, 5.0, 0.0, 1.0, 9.0])
    groups = torch.tensor([3, 3, 7, 3, 3, 7])
    advantages, mask = group_advantages(returns, groups, eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0]))
    assert bool(mask.all())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-100, 100, width=32)), min_size=1, max_size=40), st.randoms())
def test_order_does_not_matter_and_groups_are_centred(rows: list[tuple[int, float]], random: object) -> None:
    groups = torch.tensor([group for group, _ in rows])
    returns = torch.tensor([value for _, value in rows], dtype=torch.float64)
    advantages, mask = group_advantages(returns, groups)
    order = torch.randperm(len(rows))
    shuffled, shuffled_mask = group_advantages(returns[order], groups[order])
    torch.testing.assert_close(shuffled, advantages[order])
    assert torch.equal(shuffled_mask, mask[order])
    for group in groups.unique():
        members = advantages[groups == group]
        assert abs(float(members.sum())) < 1e-6 * len(members) * max(1.0, float(members.abs().max()))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6 + 0.3, -3.3333333])
def test_constant_groups_are_exactly_zero(value: float) -> None:
    returns = torch.full((7,), value)
    advantages, mask = group_advantages(returns, torch.zeros(7, dtype=torch.long), eps=1e-8)
    assert bool((advantages == 0).all()) and not bool(mask.any())


def test_a_group_of_one_is_masked_and_nothing_is_nothing() -> None:
    advantages, mask = group_advantages(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 1, 1]))
    assert mask.tolist() == [False, True, True] and float(advantages[0]) == 0.0
    advantages, mask = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert len(advantages) == len(mask) == 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([float("nan"), 1.0]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="shape"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="eps"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), eps=-1.0)
