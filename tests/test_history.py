"""What a rollout remembers: the order of the history, and the memory, in which old frames cost few tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from test_envs import FakeRewardModel, both, starts  # noqa: F401
from test_world_model import SUITES, TINY, episodes, generators, inputs, transformer_inputs, twice

from prophet_gym.envs.vector_env import ProphetVectorEnv
from prophet_gym.evaluation.agreement import _next_chunks
from prophet_gym.world_model import ProphetPipeline, ProphetTransformer3DModel
from prophet_gym.world_model.history import FramePackMemory, advance_history, split_history
from prophet_gym.world_model.imagination import encode_frames, replay_episodes
from prophet_gym.world_model.transformer import with_memory
from prophet_gym.world_model.video_rollouts import VideoRolloutLoss

LEVELS = ((2, 1, 2), (4, 2, 6))
"""Of six frames of 12 x 12 latents: 2 * 36 + 2 * 4 tokens."""


def attend(transformer: torch.nn.Module) -> None:
    """Let the cross-attention say something."""
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.attn2.to_out[0].weight, std=0.5)


@pytest.fixture(scope="module")
def pipeline() -> ProphetPipeline:
    """An untrained one that remembers six frames between the first and the two latest."""
    torch.manual_seed(0)
    pipeline = ProphetPipeline.tiny_random()
    pipeline.register_modules(transformer=with_memory(pipeline.transformer, LEVELS))
    attend(pipeline.transformer)
    return pipeline


@given(chunks=st.lists(st.integers(1, 4), max_size=6), length=st.integers(2, 9))
def test_a_history_is_the_first_frame_and_the_latest_ones_in_order(chunks: list[int], length: int) -> None:
    history, shown = torch.zeros(1, length, 1, 1, 1), [0]
    for frames in chunks:
        new = list(range(shown[-1] + 1, shown[-1] + 1 + frames))
        history, shown = advance_history(history, torch.tensor(new).reshape(1, -1, 1, 1, 1)), shown + new
    padded = [0] * length + shown
    assert history.flatten().tolist() == [0, *padded[len(padded) - length + 1 :]]
    near, older = split_history(history, length - 2)
    assert near.flatten().tolist() == [0, shown[-1]]
    assert older.flatten().tolist() == history[:, 1:-1].flatten().tolist()


def test_the_latest_frames_are_pooled_least() -> None:
    """With projections that do nothing, tokens are means of the latents in areas of the frames of their level."""
    memory = FramePackMemory(3, 3, ((2, 1, 2), (4, 1, 4), (12, 3, 6)))
    for layer in memory.embed:
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.zeros_(memory.time)
    torch.nn.init.zeros_(memory.place.weight)
    older = torch.randn(2, 18, 3, 12, 12)
    tokens = memory(older)
    assert tokens.shape == (2, 72 + 36 + 16, 3)
    # The last frame, rows 4 and 5, columns 10 and 11; the oldest of the middle level; the three oldest frames.
    torch.testing.assert_close(tokens[:, 36 + 2 * 6 + 5], older[:, 17, :, 4:6, 10:12].mean((2, 3)))
    torch.testing.assert_close(tokens[:, 72 + 3], older[:, 12, :, 4:8, 0:4].mean((2, 3)))
    torch.testing.assert_close(tokens[:, 108 + 1], older[:, :3, :, 0:6, 6:12].mean((1, 3, 4)))


@pytest.mark.parametrize(
    ("frame", "tokens"),
    [(17, (36, 72)), (16, (0, 36)), (15, (99, 108)), (12, (72, 81)), (11, (120, 124)), (2, (108, 112))],
)
def test_a_frame_is_in_the_tokens_of_its_level_and_time_alone(frame: int, tokens: tuple[int, int]) -> None:
    memory, older = FramePackMemory(4, 24, ((2, 1, 2), (4, 1, 4), (12, 3, 6))), torch.randn(1, 18, 4, 12, 12)
    other = older.clone()
    other[:, frame] += 1
    changed = (memory(older) != memory(other)).any(dim=2)[0]
    assert changed.nonzero()[:, 0].tolist() == list(range(*tokens))


def test_tokens_say_when_and_where() -> None:
    tokens = FramePackMemory(4, 24, LEVELS)(torch.ones(1, 6, 4, 12, 12))[0]
    assert len(tokens) == 80 and len(tokens.unique(dim=0)) == 80


@pytest.mark.parametrize(("height", "width", "count"), [(32, 32, 2 * 256 + 2 * 36), (7, 12, 2 * 24 + 2 * 4)])
def test_latents_of_any_size_are_pooled_and_none_left_out(height: int, width: int, count: int) -> None:
    memory, older = FramePackMemory(4, 24, LEVELS), torch.zeros(1, 6, 4, height, width, requires_grad=True)
    tokens = memory(older)
    assert tokens.shape == (1, count, 24)
    tokens.square().sum().backward()
    assert older.grad is not None and older.grad.ne(0).any(dim=2).all()


@pytest.mark.parametrize("level", [(4, 3, 2), (2, 1), (2, 0, 2), (0, 1, 2)])
def test_levels_that_cannot_be_are_named(level: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\(frames, temporal_pool, spatial_pool\).*got \({level[0]}, {level[1]}"):
        ProphetTransformer3DModel(**TINY, memory=((2, 1, 2), level))


@torch.no_grad()
def test_a_memory_changes_nothing_until_it_is_trained() -> None:
    before = ProphetTransformer3DModel(**TINY).eval()
    torch.nn.init.normal_(before.video_out.weight)
    assert not [key for key in before.state_dict() if "attn2" in key or "norm2" in key or "framepack" in key]
    after = with_memory(before, LEVELS)
    assert (before.buffer_frames, after.buffer_frames) == (3, 9) and not after.training
    given = transformer_inputs(torch.tensor([1.0, 0.3]))
    history = torch.randn(2, 9, 4, 12, 12)
    expected = before(**given | {"history": history[:, [0, 7, 8]]})
    assert torch.equal(after(**given | {"history": history}), expected)
    attend(after)
    assert (after(**given | {"history": history}) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="has a memory already"):
        with_memory(after, LEVELS)


@torch.no_grad()
def test_every_remembered_frame_has_its_say() -> None:
    transformer = with_memory(ProphetTransformer3DModel(**TINY), LEVELS)
    torch.nn.init.normal_(transformer.video_out.weight)
    attend(transformer)
    given = transformer_inputs(torch.ones(2)) | {"history": torch.randn(2, 9, 4, 12, 12)}
    expected = transformer(**given)
    for frame in range(1, 7):
        changed = given["history"].clone()
        changed[:, frame] += torch.randn(4, 12, 12)
        assert (transformer(**given | {"history": changed}) - expected).abs().max() > 1e-4
    # Two frames of one average may change places, two of different ones may not.
    swapped, other = (given["history"][:, order] for order in ([0, 2, 1, *range(3, 9)], [0, 1, 3, 2, *range(4, 9)]))
    torch.testing.assert_close(transformer(**given | {"history": swapped}), expected)
    assert (transformer(**given | {"history": other}) - expected).abs().max() > 1e-4


def test_a_rollout_costs_the_same_however_long(pipeline: ProphetPipeline) -> None:
    """Every chunk's history is the last one's, moved up; the memory makes the same number of tokens of it."""
    images, proprio, actions = inputs(2)
    history, state, shown = pipeline.init_history(images), pipeline.init_state(proprio), twice(images)
    assert history.shape == (2, 9, 4, 12, 12) and torch.equal(history, history[:, :1].expand_as(history))
    tokens: list[torch.Tensor] = []
    hook = pipeline.transformer.framepack.register_forward_hook(lambda module, given, result: tokens.append(result))
    for _ in range(7):
        chunk = pipeline.imagine(history, state, actions, shown, SUITES[:2], generators(2))
        assert torch.equal(chunk.history[:, 1:-2], history[:, 3:]) and torch.equal(chunk.history[:, 0], history[:, 0])
        assert not torch.equal(chunk.history[:, -1], history[:, -1])
        history, state, shown = chunk.history, chunk.state, torch.stack([images, chunk.frames[:, -1]], dim=1)
    hook.remove()
    assert [one.shape for one in tokens] == [(2, 80, 24)] * 7 and not torch.equal(tokens[5], tokens[6])


def test_a_pipeline_with_a_memory_is_saved_and_loaded(pipeline: ProphetPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = ProphetPipeline.from_pretrained(tmp_path)
    images, proprio, actions = inputs(2)
    videos = [
        one.replay(images, proprio, actions.repeat(1, 3, 1), SUITES[:2], generators(2))[0] for one in (pipeline, loaded)
    ]
    assert torch.equal(*videos)


def test_training_shows_histories_as_a_rollout_has_them(pipeline: ProphetPipeline) -> None:
    """Latents that say what frame they are of; before an episode's beginning its first frame is repeated."""
    arrays = episodes(4, length=14)
    latents = torch.arange(56)[:, None, None, None].expand(-1, 4, 12, 12).half()
    seen: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    loss_fn = VideoRolloutLoss(pipeline, arrays, latents, batch_size=8, steps=1, told=1.0)
    for step in range(8):
        loss_fn(step, torch.Generator().manual_seed(step))
    hook.remove()
    ages = []
    for history in seen:
        numbers = history[:, :, 0, 0, 0]
        start, present = numbers[:, 0], numbers[:, -1]
        assert torch.equal(start % 14, torch.zeros(8))
        assert torch.equal(numbers[:, 1:], (present[:, None] + torch.arange(-7, 1)).maximum(start[:, None]))
        ages += (present - start).tolist()
    assert set(ages) == {0, 2, 4, 6, 8, 10}  # a chunk of two is left of 14 frames


def test_single_chunks_are_imagined_from_real_histories(pipeline: ProphetPipeline) -> None:
    arrays = episodes(2, length=14)
    seen: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    _next_chunks(pipeline, arrays, count=2, length=13, seed=0)
    hook.remove()
    latents = encode_frames(pipeline.vae, arrays.frames).float()
    for start, histories in zip(arrays.starts, seen, strict=True):
        present = torch.arange(0, 12, 2)[:, None]
        rows = torch.cat([torch.zeros_like(present), (present + torch.arange(-7, 1)).clamp(min=0)], dim=1)
        torch.testing.assert_close(histories, latents[start + rows], atol=1e-3, rtol=1e-3)


def test_training_reaches_the_memory(pipeline: ProphetPipeline) -> None:
    arrays = episodes(2)
    transformer = pipeline.transformer
    loss_fn = VideoRolloutLoss(pipeline, arrays, torch.randn(18, 4, 12, 12).half(), batch_size=4, steps=1)
    loss_fn(0, torch.Generator().manual_seed(0))[0].backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in transformer.framepack.parameters())
    transformer.zero_grad()
    before, _ = replay_episodes(pipeline, arrays, torch.arange(2), [0, 1])
    transformer.framepack.time.data.add_(1.0)
    assert not torch.equal(before, replay_episodes(pipeline, arrays, torch.arange(2), [0, 1])[0])
    transformer.framepack.time.data.sub_(1.0)


@settings(max_examples=3)
@given(st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
def test_envs_that_begin_anew_have_a_history_of_their_own(
    pipeline: ProphetPipeline,
    starts: str,  # noqa: F811
    mask: list[bool],
) -> None:
    """Some envs of a batch are reset in the midst: all go on as envs by themselves do."""
    arguments: dict[str, Any] = {
        "world_model": pipeline, "reward_model": FakeRewardModel(2.0), "start_states": starts, "max_chunks": 9,
    }  # fmt: skip
    native, sync = both(arguments, AutoresetMode.DISABLED, num_envs=3)
    for envs in (native, sync):
        envs.reset(seed=3)
        envs.action_space.seed(0)
    for step in range(6):
        if step == 3:
            for envs in (native, sync):
                envs.reset(seed=[7, 8, 9], options={"reset_mask": np.array(mask)})
        one, other = (envs.step(envs.action_space.sample())[0]["image"].astype(int) for envs in (native, sync))
        assert np.abs(one - other).max() <= 1  # rounding of a batched float32 product


def test_a_group_shares_the_start_of_its_history(pipeline: ProphetPipeline, starts: str) -> None:  # noqa: F811
    """And every episode, the first one or the next, begins with nothing but its own start."""
    envs = ProphetVectorEnv(
        4, world_model=pipeline, reward_model=FakeRewardModel(2.0), start_states=starts, max_chunks=3
    )
    envs.reset(seed=0, options={"group_size": 2})
    actions = np.full((4, 8, 7), 0.3, np.float32)
    history = envs.get_state()["_history"]
    assert torch.equal(history[0], history[1]) and not torch.equal(history[0], history[2])
    assert torch.equal(history, history[:, :1].expand(4, 9, 4, 12, 12))
    for _ in range(3):
        envs.step(actions)
    later = envs.get_state()["_history"]
    assert torch.equal(later[:, :3], history[:, :3]) and not torch.equal(later[0, 3:], later[1, 3:])
    envs.step(actions)  # the next episode
    anew = envs.get_state()["_history"]
    assert torch.equal(anew, anew[:, :1].expand(4, 9, 4, 12, 12)) and not torch.equal(anew[:, 0], history[:, 0])
