"""Robots of two arms beside those of one: data, conditions, world model, judge and environment."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cosmos import pretrained, transformer_inputs  # noqa: F401
from test_envs import INSTRUCTIONS, FakeRewardModel, starts  # noqa: F401
from test_episode_data import make_episode, make_writer
from test_reward import episodes as judged_episodes
from test_world_model import CAMERA, episodes, twice

from fagrpo.cli import load_demonstrations
from prophet_gym.data.clips import EpisodeArrays, concatenate, load_arrays
from prophet_gym.data.episode import all_arms, finger_openings, per_arm
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.envs.start_states import load_start_states, write_start_states
from prophet_gym.envs.vector_env import ProphetVectorEnv
from prophet_gym.reward.training import train_success_classifier
from prophet_gym.world_model import ProphetAutoencoder, ProphetCosmosTransformer3DModel, ProphetPipeline
from prophet_gym.world_model.action_conditioning import (
    carried_motion,
    carry,
    draw_action_frames,
    init_hold,
    look_around,
    update_hold,
)
from prophet_gym.world_model.losses import ProprioceptionLoss
from prophet_gym.world_model.training import train

BEYOND = CAMERA * torch.tensor([1.1, 0.9, 1.0])[:, None]
"""Another camera."""


def two_armed(count: int, length: int = 9, seed: int = 0) -> EpisodeArrays:
    """The square is pushed by the second arm of another robot."""
    arrays = episodes(count, length, seed)
    idle, hand = torch.zeros_like(arrays.actions), torch.zeros_like(arrays.proprio)
    idle[..., 1] = 0.1
    records = (replace(record, robot="two_pandas", suite="two_arm_lift") for record in arrays.records)
    return replace(
        arrays,
        actions=torch.cat([idle, arrays.actions], dim=-1),
        proprio=torch.cat([hand, arrays.proprio], dim=-1),
        records=tuple(records),
    )


def widened(arrays: EpisodeArrays) -> EpisodeArrays:
    """Episodes of one arm as `load_arrays` gives them where there is room for two."""
    return replace(
        arrays,
        actions=torch.cat([arrays.actions, torch.zeros_like(arrays.actions)], dim=-1),
        proprio=torch.cat([arrays.proprio, torch.zeros_like(arrays.proprio)], dim=-1),
    )


def test_episodes_of_both_kinds_are_written_read_and_padded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    both = make_episode(
        0,
        5,
        actions=rng.uniform(-1, 1, (5, 4, 14)).astype(np.float32),
        proprio=rng.normal(size=(6, 16)).astype(np.float32),
        robot="two_pandas",
        suite="two_arm_lift",
    )
    one = make_episode(1, 5)
    assert (both.num_arms, one.num_arms) == (2, 1)
    writers = {
        "both": (make_writer(tmp_path / "both", robot="two_pandas", action_mask=(True,) * 14), both),
        "one": (make_writer(tmp_path / "one"), one),
    }
    for writer, episode in writers.values():
        writer.write_episode(0, episode)
        writer.finalize()
    with pytest.raises(ValueError, match="number of arms 1, but this data set is written with 2"):
        writers["both"][0].write_episode(1, replace(one, robot="two_pandas"))
    with pytest.raises(ValueError, match=r"proprio must have shape \(6, 16\)"):
        replace(both, proprio=one.proprio)

    datasets = [EpisodeDataset(tmp_path / name) for name in ("both", "one")]
    assert [dataset.num_arms for dataset in datasets] == [2, 1] and datasets[0].action_mask.all()
    names = datasets[0].info["features"]["observation.state"]["names"]
    assert names[:2] == ["x", "y"] and names[8:10] == ["arm_1_x", "arm_1_y"]
    np.testing.assert_array_equal(datasets[0][0].proprio, both.proprio)

    arrays = load_arrays(datasets, "train", progress=False)
    np.testing.assert_array_equal(arrays.actions[:5], both.actions)
    np.testing.assert_array_equal(arrays.proprio[6:, :8], one.proprio)
    np.testing.assert_array_equal(arrays.actions[6:11, :, :7], one.actions)
    assert not arrays.proprio[6:, 8:].any() and not arrays.actions[6:, :, 7:].any()
    # Rows after the last frames hold the last command of each gripper, and no motion.
    ends = arrays.actions[[5, 11]]
    np.testing.assert_array_equal(ends[0, :, [6, 13]], np.broadcast_to(both.actions[-1, -1, [6, 13]], (4, 2)))
    np.testing.assert_array_equal(ends[1, :, 6], np.repeat(one.actions[-1, -1, 6], 4))
    assert ends.count_nonzero() == 12
    assert load_arrays(datasets[1], "train", progress=False, num_arms=2).actions.shape == (6, 4, 14)
    with pytest.raises(ValueError, match="are of robots of 2 arms, and there is room for 1"):
        load_arrays(datasets, "train", progress=False, num_arms=1)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 3), frames=st.integers(1, 3))
def test_the_conditions_of_two_arms_are_those_of_each(seed: int, batch: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    poses = 0.2 * torch.randn(batch, 1 + frames, 16, generator=generator)
    poses[..., [2, 10]] += 1.0
    actions = torch.randn(batch, 4, 14, generator=generator)
    projection = torch.cat([CAMERA, BEYOND])[None].expand(batch, -1, -1, -1)
    image = torch.rand(batch, 3, 48, 48, generator=generator)
    assert torch.equal(all_arms(per_arm(poses, 2), 2), poses)

    actions[..., [6, 13]] = 1.0  # both hands close at the first pose and carry to the second
    closed = poses[:, :2] * torch.tensor([1.0] * 6 + [0.0] * 2).repeat(2)
    holds = update_hold(update_hold(init_hold(closed[:, 0]), closed[:, 0], actions), closed[:, 1], actions)
    drawn = draw_action_frames(poses, projection, 48)
    crops = look_around(image, poses[:, 0], projection, 8)
    later = holds[:, None].expand(-1, frames, -1)
    motion = carried_motion(poses[:, :1], poses[:, 1:], later, projection)
    carried = carry(torch.stack([image, 1 - image], dim=1), motion)
    openings = finger_openings(poses)
    alone = []
    for arm in range(2):
        own, seen = poses[..., 8 * arm : 8 * arm + 8], projection[:, arm : arm + 1]
        first, second = closed[..., 8 * arm : 8 * arm + 8].unbind(1)
        commands = actions[..., 7 * arm : 7 * arm + 7]
        hold = update_hold(update_hold(init_hold(first), first, commands), second, commands)
        assert torch.equal(hold[:, :6], torch.cat([first[:, :3], second[:, :3]], dim=1))
        assert torch.equal(holds[:, 7 * arm : 7 * arm + 7], hold)
        torch.testing.assert_close(crops[:, 3 * arm : 3 * arm + 3], look_around(image, own[:, 0], seen, 8))
        moved = carried_motion(own[:, :1], own[:, 1:], hold[:, None].expand(-1, frames, -1), seen)
        torch.testing.assert_close(motion[:, :, 2 * arm : 2 * arm + 2], moved)
        torch.testing.assert_close(
            carried[:, :, 2 * arm : 2 * arm + 2], carry(torch.stack([image, 1 - image], dim=1), moved)
        )
        assert torch.equal(openings[..., arm], own[..., 6] - own[..., 7])
        alone.append(draw_action_frames(own, seen, 48))
    torch.testing.assert_close(drawn, torch.maximum(*alone))
    assert (motion[:, :, 1::2, 2] != 1.0).all(), "what is held comes nearer or goes away"


@pytest.fixture(scope="module")
def pipeline() -> ProphetPipeline:
    """Of a robot of two arms and one of one, whose second half of an action is not obeyed."""
    two = ProphetPipeline.tiny_random(num_arms=2)
    camera = two.config.cameras["libero_object"]
    two.register_to_config(
        robots=[["panda", ["libero_object"]], ["two_pandas", ["two_arm_lift"]]],
        cameras={"libero_object": camera, "two_arm_lift": camera},
    )
    two.proprioception.action_mask[0, 7:] = 0
    torch.nn.init.normal_(two.proprioception.members[0].correction[-1].weight)  # untrained, it would be zero
    return two


def test_an_arm_that_a_robot_lacks_is_not_moved_drawn_or_looked_at(pipeline: ProphetPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 96, 96, 3), generator=generator, dtype=torch.uint8)
    proprio = torch.cat([0.1 * torch.randn(1, 8, generator=generator), torch.zeros(1, 8)], dim=1)
    actions = 2 * torch.rand(1, 8, 14, generator=generator) - 1
    others = torch.cat([actions[..., :7], -actions[..., 7:]], dim=-1)

    def imagine(actions: torch.Tensor, suite: str) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = pipeline.imagine(
            pipeline.init_history(images),
            pipeline.init_state(proprio),
            actions,
            twice(images),
            [suite],
            [torch.Generator().manual_seed(1)],
        )
        return chunk.frames, chunk.proprio

    (frames, poses), (same, same_poses) = (imagine(some, "libero_object") for some in (actions, others))
    assert torch.equal(frames, same) and torch.equal(poses, same_poses)
    assert not poses[..., 8:].any() and poses[..., :8].any()
    projection = pipeline.projection(["libero_object", "two_arm_lift"])
    assert projection.shape == (2, 2, 3, 4) and projection.flatten(2).any(2).tolist() == [[True, False], [True, True]]
    (frames, poses), (different, different_poses) = (imagine(some, "two_arm_lift") for some in (actions, others))
    assert not torch.equal(frames, different) and not torch.equal(poses[..., 8:], different_poses[..., 8:])


def test_the_models_must_have_the_same_arms(pipeline: ProphetPipeline) -> None:
    with pytest.raises(ValueError, match="must have the same num_arms"):
        ProphetPipeline(
            ProphetAutoencoder(4, (8, 8, 16), (0, 0, 0), (0, 0, 0)),
            pipeline.transformer,
            pipeline.proprioception,
            pipeline.scheduler,
        )


def test_a_world_of_both_robots_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    arrays = concatenate([two_armed(4), widened(episodes(3, seed=1))])
    camera = [[100.0, 0.0, 48.0, 0.0], [0.0, 100.0, 48.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    cameras = {"two_arm_lift": camera, "libero_object": camera}
    trained = train(arrays, two_armed(2, seed=2), tmp_path, preset="debug", cameras=cameras)
    loaded = ProphetPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.num_arms == 2 and loaded.action_dim == 14
    slots = [name for name, _ in loaded.config.robots]
    arms = loaded.proprioception.arm_mask
    assert arms[slots.index("panda")].tolist() == [True, False] and arms[slots.index("two_pandas")].all()
    (clip, poses), (again, _) = (
        some.replay(
            arrays.frames[:1],
            arrays.proprio[:1],
            arrays.actions[:8].flatten(0, 1)[None],
            ["two_arm_lift"],
            torch.Generator().manual_seed(0),
        )
        for some in (loaded, trained)
    )
    assert clip.shape == (1, 9, 96, 96, 3) and poses.shape == (1, 9, 16)
    torch.testing.assert_close(clip, again, atol=1, rtol=0)  # another memory layout rounds differently


@torch.no_grad()
def test_cosmos_sees_what_both_hands_carry(pretrained: Path) -> None:  # noqa: F811
    model = ProphetCosmosTransformer3DModel.from_cosmos(pretrained / "transformer", condition_dim=96, num_arms=2)
    torch.nn.init.normal_(model.condition_embed.proj.weight)
    inputs = transformer_inputs() | {"condition": torch.randn(2, 2, 96), "carried": torch.randn(2, 2, 4, 4, 12, 12)}
    other = inputs["carried"].clone()
    other[:, :, 3] += 1.0
    assert not torch.equal(model(**inputs), model(**inputs | {"carried": other}))


def test_a_judge_of_two_arms_learns_from_the_second(tmp_path: Path) -> None:
    def swapped(arrays: EpisodeArrays) -> EpisodeArrays:
        wide = widened(arrays)
        return replace(wide, proprio=wide.proprio.roll(8, dims=1))

    train_arrays, val_arrays = (swapped(judged_episodes(count, told_by="motion")) for count in (32, 16))
    judge, metrics = train_success_classifier(
        train_arrays, val_arrays, tmp_path, steps=60, batch_size=16, learning_rate=3e-3
    )
    assert judge.config.num_arms == 2 and metrics["libero_object/motion"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="proprioception of 16 numbers and got 8"):
        told = np.array([3]), ["x"], np.zeros((1, 384), np.float32), np.zeros((1, 96, 96, 3), np.uint8), ["x"]
        judge.score(None, np.zeros((1, 3, 8), np.float32), *told)


def test_an_environment_has_the_arms_of_its_suite(pipeline: ProphetPipeline, starts: str, tmp_path: Path) -> None:  # noqa: F811
    class Judge(FakeRewardModel):
        def score(self, frames, proprio, lengths, *told):  # type: ignore[no-untyped-def]
            assert proprio.shape[2] == 16
            return np.zeros(len(lengths), np.float32)

    arguments: dict[str, Any] = {"world_model": pipeline, "reward_model": Judge(), "num_envs": 2}
    one = ProphetVectorEnv(suite="libero_object", start_states=starts, **arguments)
    assert one.single_action_space.shape == (8, 7) and one.single_observation_space["proprio"].shape == (8,)
    one.reset(seed=0)
    first, *_ = one.step(np.ones((2, 8, 7), np.float32))
    assert one.observation_space.contains(first)

    row = load_start_states(starts).draw(np.random.default_rng(0), suite="libero_object", split="train")
    path = tmp_path / "starts.parquet"
    write_start_states([replace(row, suite="two_arm_lift", proprio=np.linspace(0, 1, 16, dtype=np.float32)), row], path)
    two = ProphetVectorEnv(suite="two_arm_lift", start_states=path, **arguments)
    assert two.single_action_space.shape == (8, 14) and two.single_observation_space["proprio"].shape == (16,)
    own = {
        "image": np.full((2, 96, 96, 3), 7, np.uint8),
        "proprio": np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 16),
        "instruction": INSTRUCTIONS[:2],
    }
    for options in (None, {"start": own}):
        before, _ = two.reset(seed=0, options=options)
        after, *_ = two.step(np.ones((2, 8, 14), np.float32))
        assert two.observation_space.contains(after)
        assert (after["proprio"] != before["proprio"]).any(axis=0)[[0, 8]].all(), "both arms move"
    with pytest.raises(ValueError, match="'two_arm_lift' has 2 arms in this world model, that of 'libero_object' 1"):
        two.reset(options={"suite": "libero_object"})
    with pytest.raises(ValueError, match="the start's proprioception 16 numbers, not 8 for each arm"):
        one.reset(options={"start": own})

    narrow = ProphetVectorEnv(
        suite="libero_object",
        start_states=starts,
        num_envs=2,
        world_model=ProphetPipeline.tiny_random(),
        reward_model=FakeRewardModel(),
    )
    narrow.reset(seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        one.set_state(narrow.get_state())
    one.step(np.ones((2, 8, 7), np.float32))  # as if nothing had been asked


def test_demonstrations_of_two_arms_end_with_both_grippers_as_they_were(tmp_path: Path) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 4, 14)).astype(np.float32)
    actions[-1, -1, [6, 13]] = 1.0, 0.5
    both = make_episode(
        actions=actions,
        proprio=np.zeros((6, 16), np.float32),
        success=np.arange(6) > 3,
        instruction=INSTRUCTIONS[0],
        robot="two_pandas",
    )
    for name, episode, mask in (("both", both, 14), ("one", make_episode(instruction=INSTRUCTIONS[0]), 7)):
        writer = make_writer(tmp_path / name, robot=episode.robot, action_mask=np.ones(mask, bool))
        writer.write_episode(0, episode)
        writer.finalize()
    demonstrations = load_demonstrations([tmp_path / "both"], kinds=["clean"], split="train")
    assert demonstrations.actions.shape[1:] == (8, 14)
    tail = demonstrations.actions[:, 4:][np.abs(demonstrations.actions[:, 4:, 0]).max(1) == 0]
    assert len(tail) and (tail[..., [6, 13]] == np.float32([1.0, 0.5])).all()
    with pytest.raises(ValueError, match="a policy is of one robot"):
        load_demonstrations([tmp_path / "both", tmp_path / "one"], kinds=["clean"], split="train")


def test_members_of_two_arms_are_trained(pipeline: ProphetPipeline) -> None:
    """A robot's missing arm stays where it is, and costs nothing."""
    arrays = concatenate([two_armed(2), widened(episodes(2, seed=1))])
    several = copy.copy(pipeline)
    several.register_modules(proprioception=pipeline.proprioception.untrained(2))
    loss, logs = ProprioceptionLoss(several, arrays, 4, 1, member=1)(0, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite() and logs["position_error_mm"] > 0
    assert several.proprioception.members[1].to_map.weight.grad is not None
    assert several.proprioception.members[0].to_map.weight.grad is None
