"""The world model: shapes, conditioning, streams of randomness, saving, and a short training that resumes exactly."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import given, settings
from hypothesis import strategies as st

from prophet_gym.data.camera import camera_projection
from prophet_gym.data.clips import EpisodeArrays, concatenate, episode_folds, subset, without_pictures
from prophet_gym.data.lerobot_format import EpisodeRecord
from prophet_gym.envs.models import load_world_model
from prophet_gym.envs.vector_env import ProphetVectorEnv
from prophet_gym.training import LossFn, fit
from prophet_gym.world_model import (
    ProphetAutoencoder,
    ProphetPipeline,
    ProphetTransformer3DModel,
    ProprioceptionModel,
)
from prophet_gym.world_model.action_conditioning import (
    carry,
    draw_action_frames,
    image_motion,
    init_hold,
    look_around,
    update_hold,
)
from prophet_gym.world_model.adaptation import adapt
from prophet_gym.world_model.history import advance_history
from prophet_gym.world_model.imagination import (
    RehearsedPolicy,
    imagine_episodes,
    imagine_motions,
    replay_episodes,
    track_holds,
)
from prophet_gym.world_model.losses import (
    ProprioceptionLoss,
    _Window,
    autoencoder_loss,
    contact_weights,
    suite_weights,
)
from prophet_gym.world_model.pipeline import ImaginedChunk, frame_condition, frames_to_pixels, pixels_to_frames
from prophet_gym.world_model.training import check_validation, fit_proprioception, set_robots, train
from prophet_gym.world_model.video_rollouts import VideoModels, VideoRolloutLoss


@pytest.fixture(scope="module")
def pipeline() -> ProphetPipeline:
    return ProphetPipeline.tiny_random()


def inputs(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 96, 96, 3), generator=generator, dtype=torch.uint8)
    proprio = 0.1 * torch.randn(batch, 8, generator=generator)
    actions = 2 * torch.rand(batch, 8, 7, generator=generator) - 1
    return images, proprio, actions


def twice(images: torch.Tensor) -> torch.Tensor:
    """The first and the latest frame, at an episode's beginning."""
    return torch.stack([images, images], dim=1)


SUITES = ["libero_object", "libero_object", "of another camera", "libero_object", "libero_object"]


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + row) for row in range(batch)]


def episodes(count: int, length: int = 9, seed: int = 0) -> EpisodeArrays:
    """A bright square that moves with the first action: a world small enough to learn."""
    rng = np.random.default_rng(seed)
    frames = np.full((count, length, 96, 96, 3), 40, np.uint8)
    actions = rng.uniform(-1, 1, (count, length, 4, 7)).astype(np.float32)
    proprio = np.zeros((count, length, 8), np.float32)
    for episode in range(count):
        column = 40.0
        for k in range(length):
            left = int(np.clip(column, 0, 80))
            frames[episode, k, 40:56, left : left + 16] = (220, 80, 40)
            proprio[episode, k, 0] = column / 100
            column += 4 * float(actions[episode, k, :, 0].sum())
    return EpisodeArrays(
        frames=torch.from_numpy(frames).flatten(0, 1),
        proprio=torch.from_numpy(proprio).flatten(0, 1),
        actions=torch.from_numpy(actions).flatten(0, 1),
        success=torch.zeros(count * length, dtype=torch.bool),
        starts=torch.arange(count) * length,
        lengths=torch.full((count,), length),
        first_frames=torch.from_numpy(frames[:, 0]),
        records=tuple(
            EpisodeRecord(k, length, "train", "clean", "libero_object", 0, 0, 0, True, "push the square", "panda")
            for k in range(count)
        ),
    )


def test_the_autoencoder_keeps_what_stands_still_and_what_is_carried() -> None:
    """A decoder that wants the reference, or a carried frame, everywhere returns it, whatever the latents are."""
    vae = small_autoencoder()
    torch.nn.init.zeros_(vae.to_pixels[1].weight)
    reference, carried = torch.rand(2, 3, 48, 48) * 2 - 1, torch.rand(2, 3, 2, 3, 48, 48) * 2 - 1
    choices = [(12, reference[:, None].expand(-1, 3, -1, -1, -1)), (20, carried[:, :, 0]), (24, carried[:, :, 1])]
    for choice, expected in choices:
        torch.nn.init.zeros_(vae.to_pixels[1].bias)
        vae.to_pixels[1].bias.data[choice : choice + 4] = 20.0
        pixels = vae.decode(torch.randn(2, 3, 4, 6, 6), reference, carried)
        torch.testing.assert_close(pixels, expected)


def test_a_chunk_has_the_promised_shapes_and_types(pipeline: ProphetPipeline) -> None:
    images, proprio, actions = inputs(3)
    history, state = pipeline.init_history(images), pipeline.init_state(proprio)
    chunk = pipeline.imagine(history, state, actions, twice(images), SUITES[:3], generators(3))
    assert chunk.frames.shape == (3, 2, 96, 96, 3) and chunk.frames.dtype == torch.uint8
    assert chunk.history.shape == history.shape
    assert chunk.state.shape == state.shape and chunk.state.dtype == torch.float32


def test_actions_change_the_video(pipeline: ProphetPipeline) -> None:
    images, proprio, actions = inputs(2)
    history = pipeline.init_history(images)
    one = pipeline.imagine(
        history, pipeline.init_state(proprio), actions, twice(images), SUITES[: len(images)], generators(2)
    ).history
    other = pipeline.imagine(
        history, pipeline.init_state(proprio), -actions, twice(images), SUITES[:2], generators(2)
    ).history
    assert (one - other).abs().max() > 1e-4


@settings(max_examples=10)
@given(batch=st.integers(1, 5), row=st.integers(0, 4), steps=st.integers(1, 3))
def test_a_row_does_not_depend_on_its_neighbours(pipeline: ProphetPipeline, batch: int, row: int, steps: int) -> None:
    row %= batch
    images, proprio, actions = inputs(batch)
    history = pipeline.init_history(images)
    together = pipeline.imagine(
        history, pipeline.init_state(proprio), actions, twice(images), SUITES[:batch], generators(batch), steps
    )
    one = slice(row, row + 1)
    alone = pipeline.imagine(
        history[one],
        pipeline.init_state(proprio[one]),
        actions[one],
        twice(images)[one],
        SUITES[one],
        generators(batch)[one],
        steps,
    )
    torch.testing.assert_close(together.history[one], alone.history, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.state[one], alone.state)


def test_replay_is_repeated_imagination(pipeline: ProphetPipeline) -> None:
    images, proprio, actions = inputs(2)
    suites = SUITES[:2]
    clip, poses = pipeline.replay(images, proprio, torch.cat([actions, -actions], dim=1), suites, generators(2))
    noise = generators(2)
    first = pipeline.imagine(
        pipeline.init_history(images), pipeline.init_state(proprio), actions, twice(images), suites, noise
    )
    latest = torch.stack([images, first.frames[:, -1]], dim=1)
    second = pipeline.imagine(first.history, first.state, -actions, latest, suites, noise)
    assert torch.equal(poses, torch.cat([proprio[:, None], first.proprio, second.proprio], dim=1))
    assert torch.equal(poses[:, 2::2], torch.stack([first.state[:, :8], second.state[:, :8]], dim=1))
    assert torch.equal(clip, torch.cat([images[:, None], first.frames, second.frames], dim=1))


MILK = "pick up the milk and place it in the basket"


class Watching:
    """A policy whose actions depend on all that it is shown, and leave the range."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def predict(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
        self.seen.append({name: value.copy() for name, value in observation.items()})
        sums = [value.astype(np.float64).sum() for value in observation.values()]
        return np.sin(np.arange(56).reshape(1, 8, 7) + sum(sums)) * 1.5, None


@pytest.mark.parametrize("video", [True, False])
def test_a_policy_acts_on_what_prophet_imagines_of_its_actions(pipeline: ProphetPipeline, video: bool) -> None:
    images, proprio, _ = inputs(1)
    policy = Watching()
    start = (SUITES[0], images[0].numpy(), proprio[0].numpy(), MILK)
    actions = RehearsedPolicy(pipeline, policy, video).plan(*start, 28, seed=7)
    assert actions.shape == (28, 7) and actions.dtype == np.float32 and np.abs(actions).max() == 1
    whole = torch.from_numpy(actions[:24])[None]  # the last chunk was cut short
    clip, poses = pipeline.replay(images, proprio, whole, SUITES[:1], [torch.Generator().manual_seed(7)])
    assert len(policy.seen) == 4
    for chunk, observation in enumerate(policy.seen):
        assert np.array_equal(observation["image"], clip[:, 2 * chunk if video else 0])
        np.testing.assert_allclose(observation["proprio"], poses[:, 2 * chunk], atol=1e-6)
        assert observation["instruction"].shape == (1, 384)
    assert np.array_equal(RehearsedPolicy(pipeline, Watching(), video).plan(*start, 28, seed=7), actions)


def test_the_member_of_a_rehearsal_follows_from_the_seed() -> None:
    pipeline = ProphetPipeline.tiny_random()
    pipeline.register_modules(proprioception=pipeline.proprioception.untrained(2).eval())
    with torch.no_grad():  # a fresh one corrects nothing
        for weight in pipeline.proprioception.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    images, proprio, _ = inputs(1)
    acts = RehearsedPolicy(pipeline, Watching(), video=False)
    plans = [acts.plan(SUITES[0], images[0].numpy(), proprio[0].numpy(), MILK, 16, seed) for seed in (4, 5, 6)]
    assert np.array_equal(plans[0], plans[2]) and not np.array_equal(plans[0], plans[1])


def test_a_rehearsed_policy_is_known_by_who_acts_and_where(pipeline: ProphetPipeline) -> None:
    here = RehearsedPolicy(pipeline, Watching(), video=False).checksum()
    assert here == RehearsedPolicy(pipeline, Watching(), video=False).checksum()
    assert here != RehearsedPolicy(ProphetPipeline.tiny_random(1), Watching(), video=False).checksum()
    assert here != RehearsedPolicy(pipeline, torch.nn.Linear(1, 1), video=False).checksum()


def test_a_rehearsed_policy_of_another_robot_is_refused(pipeline: ProphetPipeline) -> None:
    class Other:
        def predict(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
            return np.zeros((1, 4, 7), np.float32), None

    images, proprio, _ = inputs(1)
    with pytest.raises(ValueError, match=r"shape \(4, 7\), and libero_object takes \(8, 7\)"):
        RehearsedPolicy(pipeline, Other(), video=False).plan(
            "libero_object", images[0].numpy(), proprio[0].numpy(), MILK, 16, 0
        )


def test_save_and_load_give_the_same_video(pipeline: ProphetPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and len(list(tmp_path.rglob("*.safetensors"))) == 3
    loaded = ProphetPipeline.from_pretrained(tmp_path)
    images, proprio, actions = inputs(2)
    for one, other in zip(
        *(
            one.imagine(
                one.init_history(images), one.init_state(proprio), actions, twice(images), SUITES[:2], generators(2)
            ).values()
            for one in (pipeline, loaded)
        ),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert loaded.chunk_frames == 2 and loaded.image_size == 96


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("history", (2, 3, 4, 11, 12)),
        ("state", (2, 8)),
        ("actions", (2, 8, 6)),
        ("actions", (3, 8, 7)),
        ("images", (2, 96, 96, 3)),
    ],
)
def test_wrong_shapes_are_named(pipeline: ProphetPipeline, name: str, shape: tuple[int, ...]) -> None:
    values = {
        "history": torch.zeros(2, 3, 4, 12, 12),
        "state": torch.zeros(2, 49),
        "actions": torch.zeros(2, 8, 7),
        "images": torch.zeros(2, 2, 96, 96, 3, dtype=torch.uint8),
        "suites": SUITES[:2],
    }
    values[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"Expected {name} of shape"):
        pipeline.imagine(**values)


def test_other_bad_input_is_refused(pipeline: ProphetPipeline) -> None:
    with pytest.raises(ValueError, match="uint8"):
        pipeline.init_history(torch.zeros(1, 96, 96, 3))
    images, proprio, actions = inputs(1)
    history = pipeline.init_history(images)
    with pytest.raises(ValueError, match=r"proprio of shape \(B, 8\), got \(1, 7\)"):
        pipeline.init_state(proprio[:, :7])
    with pytest.raises(ValueError, match=r"one member per robot, \(1,\), got \(2,\)"):
        pipeline.init_state(proprio, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"Members must be in 0 ... 0, got \[1\]"):
        pipeline.init_state(proprio, torch.tensor([1]))
    with pytest.raises(ValueError, match="num_members must be at least 1, got 0"):
        ProprioceptionModel(num_members=0)
    with pytest.raises(ValueError, match="at least 1"):
        pipeline.imagine(history, pipeline.init_state(proprio), actions, twice(images), SUITES[:1], None, 0)
    with pytest.raises(ValueError, match="one suite per episode, 1 in all"):
        pipeline.imagine(history, pipeline.init_state(proprio), actions, twice(images), "libero_object")
    with pytest.raises(ValueError, match="multiple of 8"):
        pipeline.replay(images, proprio, torch.zeros(1, 9, 7), SUITES[:1])
    with pytest.raises(ValueError, match="multiples of 8"):
        pipeline.vae.encode(torch.zeros(1, 3, 90, 96))
    with pytest.raises(ValueError, match="multiple of frame_stride"):
        ProphetPipeline(pipeline.vae, pipeline.transformer, pipeline.proprioception, pipeline.scheduler, chunk_size=9)


def test_history_keeps_the_first_frame_and_the_latest() -> None:
    history = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1, 1)
    later = advance_history(history, torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1, 1))
    assert later.flatten().tolist() == [0.0, 3.0, 4.0]
    assert advance_history(later, torch.tensor([5.0]).reshape(1, 1, 1, 1, 1)).flatten().tolist() == [0.0, 4.0, 5.0]


@given(st.integers(0, 255))
def test_frames_and_pixels_are_inverse(level: int) -> None:
    frames = torch.full((1, 8, 8, 3), level, dtype=torch.uint8)
    assert torch.equal(pixels_to_frames(frames_to_pixels(frames)), frames)


TINY = dict(
    latent_channels=4,
    conv_channels=8,
    conv_blocks=(1, 1),
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    adaln_lora_dim=8,
)


def transformer_inputs(sigma: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a scene where nothing has moved yet, nor moves."""
    history = torch.randn(2, 1, 4, 12, 12).repeat(1, 3, 1, 1, 1)
    return {
        "sample": torch.randn(2, 2, 4, 12, 12),
        "sigma": sigma,
        "history": history,
        "condition": torch.randn(2, 2, 52),
        "action_frames": torch.rand(2, 3, 3, 48, 48),
        "carried": history[:, None, :2].expand(-1, 2, -1, -1, -1, -1),
    }


def test_an_untrained_transformer_predicts_a_still() -> None:
    """The output layer starts at zero, so what stood still and is not carried stays, at any noise level."""
    transformer = ProphetTransformer3DModel(**TINY)
    sigma = torch.tensor([1.0, 0.3])
    inputs = transformer_inputs(sigma)
    clean = inputs["sample"] - sigma[:, None, None, None, None] * transformer(**inputs)
    torch.testing.assert_close(clean, inputs["history"][:, -1:].expand_as(clean), atol=1e-5, rtol=1e-5)
    transformer.video_out.bias.data[:4] = 0.5  # a residual
    shifted = inputs["sample"] - sigma[:, None, None, None, None] * transformer(**inputs)
    torch.testing.assert_close(shifted, clean + 0.5, atol=1e-5, rtol=1e-5)


def test_leaving_out_the_text_changes_nothing() -> None:
    """Cosmos's cross-attention to an all-zero text has no biases: its output is zero."""
    reference = CosmosTransformer3DModel(
        in_channels=16, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, text_embed_dim=12,
        adaln_lora_dim=8, max_size=(8, 64, 64), rope_scale=(1.0, 1.0, 1.0), concat_padding_mask=False,
    )  # fmt: skip
    block = reference.transformer_blocks[0]
    hidden = torch.randn(1, 5, 24)
    assert block.attn2(hidden, encoder_hidden_states=torch.zeros(1, 3, 12)).abs().max() == 0


def test_the_config_is_what_the_constructor_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformer = ProphetTransformer3DModel(**TINY)
    transformer.save_pretrained(tmp_path)
    ProphetTransformer3DModel.from_pretrained(tmp_path)
    assert "not expected" not in caplog.text


def test_imagined_episodes_keep_actions_and_verdicts(pipeline: ProphetPipeline) -> None:
    arrays = episodes(5)
    imagined = imagine_episodes(pipeline, arrays, count=3, seed=0)
    assert [record.episode_index for record in imagined.records] == [0, 2, 4]
    for k, episode in enumerate((0, 2, 4)):
        rows, real = torch.arange(9) + imagined.starts[k], torch.arange(9) + arrays.starts[episode]
        assert torch.equal(imagined.actions[rows], arrays.actions[real])
        assert torch.equal(imagined.success[rows], arrays.success[real])
        for own, recorded in ((imagined.frames, arrays.frames), (imagined.proprio, arrays.proprio)):
            assert torch.equal(own[rows[0]], recorded[real[0]])
            assert not torch.equal(own[rows[1:]], recorded[real[1:]])
    both = concatenate([arrays, imagined])
    assert torch.equal(both.frames[both.starts[6]], arrays.frames[arrays.starts[2]])
    assert len(both.records) == len(both.lengths) == 8


def test_episodes_of_different_lengths_are_imagined_to_their_ends(pipeline: ProphetPipeline) -> None:
    arrays = concatenate([episodes(2, length=5), episodes(2, length=9, seed=1)])
    imagined = imagine_episodes(pipeline, arrays, count=4, seed=0)
    assert imagined.lengths.tolist() == [5, 5, 9, 9]
    last = arrays.starts + arrays.lengths - 1
    assert all(not torch.equal(imagined.frames[row], arrays.frames[row]) for row in last)


def test_imagined_motions_are_those_of_imagined_episodes(pipeline: ProphetPipeline) -> None:
    arrays = concatenate([episodes(2, length=5), episodes(3, length=9, seed=1)])
    with_video = imagine_episodes(pipeline, arrays, count=5, seed=0)
    motions = imagine_motions(pipeline, without_pictures(arrays))
    torch.testing.assert_close(motions.proprio, with_video.proprio, atol=1e-5, rtol=1e-5)
    assert torch.equal(motions.success, arrays.success) and motions.records == arrays.records
    assert not torch.equal(motions.proprio, arrays.proprio) and motions.frames.shape == (len(arrays.frames), 1, 1, 3)


def test_frame_condition_is_masked_and_standardised_for_each_robot() -> None:
    model = ProprioceptionModel(robots=3)
    model.proprio_mean[2], model.proprio_std[2], model.action_mask[2, 3:6] = 1.0, 0.5, 0.0
    actions = torch.full((2, 3, 4, 7), 0.5)
    condition = frame_condition(model, torch.zeros(2, 3, 8), torch.ones(2, 3, 8), actions, torch.tensor([0, 2]))
    assert condition.shape == (2, 3, 4 * 7 + 2 * 8 + 3)
    moves, before, after, which = condition.split([28, 8, 8, 3], dim=-1)
    assert moves[0].unique().tolist() == [0.5]
    assert moves[1, 0].view(4, 7)[2].tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5]
    assert [part[:, 0, 0].tolist() for part in (before, after)] == [[0.0, -2.0], [1.0, 0.0]]
    assert which[:, 1].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_robots_take_slots_with_their_statistics() -> None:
    """What is known of a robot stays; a new one takes the next slot; there are only so many."""
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(6)
    arrays.actions[:, :, 5] = 0.0
    elsewhere = tuple(replace(record, suite="elsewhere") for record in arrays.records)
    set_robots(pipeline, replace(arrays, records=elsewhere))
    assert pipeline.config.robots == [["panda", ["libero_object", "elsewhere"]]]
    assert pipeline.proprioception.proprio_std[0].eq(1.0).all()  # known before

    records = tuple(replace(record, robot="fetch", suite="fetch") for record in arrays.records[:3])
    mixed = replace(arrays, records=records + arrays.records[3:])
    set_robots(pipeline, mixed)
    end = int(arrays.starts[3])
    model, own = pipeline.proprioception, arrays.proprio[:end]
    assert [name for name, _ in pipeline.config.robots] == ["panda", "fetch"]
    assert pipeline.robot(["fetch", "libero_object", "unheard of"]).tolist() == [1, 0, 0]
    torch.testing.assert_close(model.proprio_mean[1], own.mean(0))
    inside = torch.ones(end, dtype=torch.bool)
    inside[arrays.starts[1:4] - 1] = False
    change = (arrays.proprio[1 : end + 1] - own)[inside]
    torch.testing.assert_close(model.delta_std[1], change.std(0).clamp(min=0.001))
    assert model.action_mask[1, 5] == 0 and model.action_mask[1, :2].eq(1).all()

    arrays.actions[0, 0, 5] = 0.5
    with pytest.raises(ValueError, match=r"'fetch' obeys the actions \[0, 1, 2, 3, 4, 6\]"):
        set_robots(pipeline, mixed)
    with pytest.raises(ValueError, match="The suite 'fetch' is 'fetch''s, and these episodes of it are 'ur5''s"):
        set_robots(pipeline, replace(arrays, records=tuple(replace(record, robot="ur5") for record in records * 2)))
    with pytest.raises(ValueError, match="Validation has episodes of"):
        check_validation(ProphetPipeline.tiny_random(), mixed)
    crowd = [replace(record, robot=f"robot-{k}", suite=f"{k}") for k, record in enumerate(arrays.records)]
    with pytest.raises(ValueError, match="No slot is free for 'robot-1'"):
        set_robots(ProphetPipeline.tiny_random(robots=2), replace(arrays, records=tuple(crowd)))


def test_robots_keep_their_slots_on_disk(tmp_path: Path) -> None:
    """Whatever the order of their names."""
    made = ProphetPipeline.tiny_random()
    robots = [("panda", ["libero_object"]), ("fetch", ["b", "a"]), ("aloha", ["c"])]
    pipeline = ProphetPipeline(made.vae, made.transformer, made.proprioception, made.scheduler, robots=robots)
    pipeline.proprioception.proprio_mean[1] = 1.0
    pipeline.save_pretrained(tmp_path)
    suites = ["c", "a", "b", "libero_object"]
    assert pipeline.robot(suites).tolist() == [2, 1, 1, 0]
    loaded = ProphetPipeline.from_pretrained(tmp_path)
    assert loaded.robot(suites).tolist() == [2, 1, 1, 0]
    assert loaded.proprioception.proprio_mean[:, 0].tolist() == [0.0, 1.0] + 6 * [0.0]


def test_pipelines_of_parts_that_do_not_fit_are_refused() -> None:
    made = ProphetPipeline.tiny_random(robots=2)
    parts = (made.vae, made.transformer, made.proprioception, made.scheduler)
    with pytest.raises(ValueError, match="2 slots, got 3 robots"):
        ProphetPipeline(*parts, robots=[("a", []), ("b", []), ("c", [])])
    with pytest.raises(ValueError, match="choose one of"):
        ProphetPipeline(*parts, action_streams="none")
    with pytest.raises(ValueError, match="build it with condition_dim=47"):
        ProphetPipeline(made.vae, made.transformer, ProprioceptionModel(robots=3), made.scheduler)
    with pytest.raises(ValueError, match="pass both, or neither"):
        ProphetPipeline(made.vae, None, made.proprioception, made.scheduler)


def test_a_prophet_without_video_moves_robots_alike_and_says_what_it_lacks(
    pipeline: ProphetPipeline, tmp_path: Path
) -> None:
    assert pipeline.has_video
    settings = {name: pipeline.config[name] for name in ("cameras", "robots")}
    ProphetPipeline(None, None, pipeline.proprioception, pipeline.scheduler, **settings).save_pretrained(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    felt = load_world_model(tmp_path, "cpu")
    images, proprio, actions = inputs(3)
    (one, _), (other, _) = (
        prophet.imagine_motion(prophet.init_state(proprio), actions, images, SUITES[:3]) for prophet in (pipeline, felt)
    )
    assert torch.equal(one, other) and not felt.has_video
    envs = ProphetVectorEnv(2, world_model=tmp_path, video=False)
    envs.reset(seed=0)
    assert np.isfinite(envs.step(envs.action_space.sample())[1]).all()
    arrays = episodes(2)
    for use in (
        lambda: ProphetVectorEnv(2, world_model=tmp_path),
        lambda: felt.replay(images, proprio, actions, SUITES[:3]),
        lambda: adapt(felt, arrays, arrays, tmp_path / "out", recipe="adapt"),
    ):
        with pytest.raises(ValueError, match="it imagines the motion alone, for environments"):
            use()


@pytest.mark.parametrize("streams", ["both", "scalars", "frames"])
def test_an_action_stream_that_is_left_out_says_nothing(streams: str) -> None:
    made = ProphetPipeline.tiny_random()
    torch.nn.init.normal_(made.transformer.action_frame_in.weight, std=0.1)
    camera = made.config.cameras["libero_object"]
    images, proprio, actions = inputs(2)

    def imagine(moved_camera: float, scalar_weights: float) -> ImaginedChunk:
        pipeline = ProphetPipeline(
            made.vae,
            made.transformer,
            made.proprioception,
            made.scheduler,
            cameras={"libero_object": (np.array(camera) * [[moved_camera], [1.0], [1.0]]).tolist()},
            action_streams=streams,
        )
        torch.nn.init.constant_(made.transformer.action_embed.trunk[0].weight, scalar_weights)
        history, state = pipeline.init_history(images), pipeline.init_state(proprio)
        return pipeline.imagine(history, state, actions, twice(images), SUITES[:2], generators(2))

    usual = imagine(1.0, 0.01)
    assert torch.equal(usual.history, imagine(0.5, 0.01).history) == (streams == "scalars")
    assert torch.equal(usual.history, imagine(1.0, 0.02).history) == (streams == "frames")


def test_a_robot_does_not_feel_actions_that_it_does_not_obey() -> None:
    pipeline = ProphetPipeline.tiny_random()
    images, proprio, actions = inputs(1)
    turned = actions.clone()
    turned[:, :, 3:6] *= -1

    def imagine(actions: torch.Tensor) -> ImaginedChunk:
        history, state = pipeline.init_history(images), pipeline.init_state(proprio)
        return pipeline.imagine(history, state, actions, twice(images), SUITES[:1], generators(1))

    one, other = imagine(actions), imagine(turned)
    assert not torch.equal(one.state, other.state) and not torch.equal(one.history, other.history)
    pipeline.proprioception.action_mask[0, 3:6] = 0.0
    one, other = imagine(actions), imagine(turned)
    assert torch.equal(one.state, other.state) and torch.equal(one.history, other.history)


def test_windows_contain_what_moves() -> None:
    arrays = episodes(4)
    rows = arrays.starts + 5
    arrays.frames[arrays.starts] = 40
    windows = [_Window.choose(arrays, rows, arrays.starts, torch.Generator().manual_seed(k)) for k in range(20)]
    crops = torch.cat([window.pixels(arrays.frames[rows]) for window in windows])
    assert crops.shape == (80, 3, 48, 48)
    assert (crops[:, 0] > 0.7).flatten(1).any(1).float().mean() > 0.7
    row, column = windows[0].corner[1].tolist()
    expected = frames_to_pixels(arrays.frames[rows[1], row : row + 48, column : column + 48])
    assert torch.equal(windows[0].pixels(arrays.frames[rows])[1], expected)


def improvement(module: ModelMixin, make: Callable[[], LossFn], out: Path, steps: int, rate: float) -> float:
    """What a short training leaves of a loss, on the same draws and without being told the past."""

    def loss() -> float:
        loss_fn = make()  # rollouts of its own
        with torch.no_grad():
            return float(np.mean([loss_fn(steps, torch.Generator().manual_seed(k))[0] for k in range(6)]))

    before = loss()
    fit("stage", module, make(), out, steps=steps, learning_rate=rate, seed=0, ema_decay=0.9)
    return loss() / before


def small_autoencoder() -> ProphetAutoencoder:
    return ProphetAutoencoder(4, (8, 8, 16), (0, 0, 0), (0, 0, 0))


def test_the_autoencoder_learns(tmp_path: Path) -> None:
    arrays, vae = episodes(16), small_autoencoder()
    encoder = vae.encoder[1].weight.clone()
    make = partial(autoencoder_loss, vae, arrays, torch.zeros(16, 1, 3, 4), 8, 2)
    assert improvement(vae, make, tmp_path, steps=60, rate=5e-3) < 0.6
    assert (vae.encoder[1].weight - encoder).abs().max() > 1e-3


def test_the_proprioception_learns(tmp_path: Path) -> None:
    pipeline, model = ProphetPipeline.tiny_random(), ProprioceptionModel(hidden_dim=32, width=32)
    model.delta_std.fill_(0.1)
    model.delta_std[:, 6:] = 0.005
    pipeline.register_modules(proprioception=model.eval())
    arrays = episodes(16)

    def error() -> float:
        return float((imagine_motions(pipeline, arrays).proprio - arrays.proprio)[:, 0].abs().mean())

    before, make = error(), partial(ProprioceptionLoss, pipeline, arrays, 64, 60)
    assert improvement(model, make, tmp_path, steps=60, rate=1e-2) < 0.2
    assert error() < 0.3 * before


def test_transformer_and_decoder_learn_on_rollouts(tmp_path: Path) -> None:
    """The hand is where the square is, and the camera sees it; the encoder stays as it is."""
    arrays, vae = episodes(16), small_autoencoder()
    pipeline = ProphetPipeline(
        vae,
        ProphetTransformer3DModel(**TINY),
        ProprioceptionModel(hidden_dim=32, width=32),
        FlowMatchEulerDiscreteScheduler(),
        cameras={"libero_object": [[100, 0, 0, 8], [0, 0, 0, 48], [0, 0, 0, 1]]},
        robots=[("panda", ["libero_object"])],
    )
    with torch.no_grad():
        latents = vae.encode(frames_to_pixels(arrays.frames))
        vae.latent_mean.copy_(latents.mean((0, 2, 3)))
        vae.latent_std.copy_(latents.std((0, 2, 3)))
        latents = vae.encode(frames_to_pixels(arrays.frames)).half()
    encoder = [weight.clone() for weight in vae.encoder.parameters()]
    make = partial(VideoRolloutLoss, pipeline, arrays, latents, batch_size=4, steps=40)
    assert improvement(VideoModels.of(pipeline), make, tmp_path, steps=40, rate=1e-2) < 0.4
    assert all(torch.equal(one, other) for one, other in zip(encoder, vae.encoder.parameters(), strict=True))


def ensemble() -> ProprioceptionModel:
    torch.manual_seed(0)
    model = ProprioceptionModel(hidden_dim=8, width=16, num_members=3).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


@given(members=st.lists(st.integers(0, 2), min_size=1, max_size=7))
@settings(max_examples=20)
def test_each_robot_is_moved_by_its_member(members: list[int]) -> None:
    """Whatever the others of the batch are moved by, and for as many frames as it likes."""
    model, count = ensemble(), len(members)
    start, projection = torch.rand(count, 3, 96, 96), torch.rand(count, 1, 3, 4)
    robot, actions = torch.zeros(count, dtype=torch.int64), torch.rand(2, count, 4, 7)
    with torch.inference_mode():
        states = [model.init_state(torch.rand(count, 8), torch.tensor(members))]
        for action in actions:
            states.append(model(states[-1], action, start, projection, robot))
        for row, member in enumerate(members):
            alone, one = model.member(member), slice(row, row + 1)
            state = alone.init_state(states[0][one, :8])
            for action in actions:
                state = alone(state, action[one], start[one], projection[one], robot[one])
            torch.testing.assert_close(states[-1][one, :-1], state[:, :-1])
            assert states[-1][row, -1] == member


@torch.no_grad()
@pytest.mark.parametrize("left_out", ["to_map", "correction"])
def test_a_memory_moves_the_robot_by_the_map_and_by_the_correction(left_out: str) -> None:
    """Each alone."""
    model = ensemble()
    layer = getattr(model.members[0], left_out)
    torch.nn.init.zeros_((layer[-1] if left_out == "correction" else layer).weight)
    forgetful = model.init_state(torch.rand(1, 8))
    mindful = forgetful.clone()
    mindful[:, 24:32] = 1.0
    what_else = (torch.rand(1, 4, 7), torch.rand(1, 3, 96, 96), CAMERA[:, None], torch.zeros(1, dtype=torch.int64))
    assert not torch.equal(model(forgetful, *what_else)[:, :8], model(mindful, *what_else)[:, :8])


@torch.no_grad()
def listening() -> ProphetPipeline:
    """Two robots, of which the second has learned from rehearsed episodes."""
    pipeline = ProphetPipeline.tiny_random()
    pipeline.register_to_config(robots=[["panda", ["libero_object"]], ["sawyer", ["metaworld"]]])
    for weight in pipeline.proprioception.parameters():  # a fresh one corrects nothing
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    for layer in told_layers(pipeline.proprioception):
        layer.weight[:, 16:24] = 0
        layer.weight[:, 17] = 1
    return pipeline


def told_layers(model: ProprioceptionModel) -> list[torch.nn.Linear]:
    """Those that hear whether actions are rehearsed, in their columns 16 to 24: of each of eight slots."""
    return [model.members[0].where[0], model.members[0].encoder]


def test_a_robot_is_moved_as_its_actions_are_meant() -> None:
    """By what its robot has learned from rehearsed episodes, unless they were recorded; each as if it were alone."""
    pipeline, (images, proprio, actions) = listening(), inputs(4)
    images, proprio, actions = (value[:1].expand(4, *value.shape[1:]) for value in (images, proprio, actions))
    suites = ["metaworld", "metaworld", "libero_object", "libero_object"]
    told = torch.tensor([True, False, True, False])
    moved = []
    for rehearsed in (told, ~told, torch.ones(4, dtype=torch.bool), None):
        state = pipeline.init_state(proprio, rehearsed=rehearsed)
        for _ in range(2):
            poses, state = pipeline.imagine_motion(state, actions, images, suites)
        moved.append(poses)
    assert torch.equal(moved[2], moved[3]), "who acts in Prophet need not say so"
    torch.testing.assert_close(moved[0], moved[1][[1, 0, 3, 2]])
    assert not torch.allclose(moved[0][0], moved[0][1], atol=1e-4)
    torch.testing.assert_close(moved[0][2], moved[0][3])


@pytest.mark.parametrize("kind", ["clean", "policy", "rehearsed"])
def test_an_episode_is_imagined_as_it_was_recorded(kind: str) -> None:
    arrays, pipeline = episodes(3, length=5), listening()
    pipeline.register_to_config(robots=[["sawyer", []], ["panda", ["libero_object"]]])
    arrays = replace(arrays, records=tuple(replace(record, kind=kind) for record in arrays.records))
    assert arrays.rehearsed.tolist() == [kind == "rehearsed"] * 3
    imagined = [
        pipeline.replay(
            arrays.first_frames,
            arrays.proprio[arrays.starts],
            arrays.actions.view(3, 5, 4, 7)[:, :4].flatten(1, 2),
            arrays.suites,
            generators(3),
            rehearsed=torch.full((3,), rehearsed),
        )[1]
        for rehearsed in (False, True)
    ]
    expected, other = imagined if kind != "rehearsed" else imagined[::-1]
    _, poses = replay_episodes(pipeline, arrays, torch.arange(3), [0, 1, 2])
    motions = imagine_motions(pipeline, arrays).proprio.view(3, 5, 8)
    for shown in (poses, motions):
        torch.testing.assert_close(shown, expected)
        assert not torch.allclose(shown, other, atol=1e-4)


def test_only_rehearsed_episodes_teach_what_rehearsed_actions_mean() -> None:
    """And they alone of their robot: the columns of the others stay zero."""
    arrays, pipeline = episodes(4), ProphetPipeline.tiny_random()
    rehearsed = tuple(replace(record, kind="rehearsed") for record in arrays.records)
    for records, taught in ((arrays.records, False), (rehearsed, True)):
        loss = ProprioceptionLoss(pipeline, replace(arrays, records=records), 8, steps=1)
        loss(0, torch.Generator().manual_seed(0))[0].backward()
        for layer in told_layers(pipeline.proprioception):
            assert layer.weight.grad is not None
            assert layer.weight.grad[:, 16:24].any(dim=0).tolist() == [taught] + [False] * 7
        pipeline.proprioception.zero_grad()


def test_a_member_alone_has_the_ensembles_own_weights() -> None:
    model = ensemble()
    alone = model.member(1)
    assert alone.config.num_members == 1 and alone.proprio_mean is model.proprio_mean
    with torch.no_grad():
        for weight in alone.parameters():
            weight.zero_()
    zero = [all((weight == 0).all() for weight in member.parameters()) for member in model.members]
    assert zero == [False, True, False]


def test_folds_do_not_depend_on_what_else_is_loaded() -> None:
    arrays = episodes(40)
    folds = episode_folds(arrays, 4)
    assert folds.bincount(minlength=4).min() > 0
    some = subset(arrays, 15, seed=2)
    chosen = torch.tensor([record.episode_index for record in some.records])
    assert torch.equal(some.first_frames, arrays.first_frames[chosen])
    assert torch.equal(episode_folds(some, 4), folds[chosen]) and chosen.tolist() != list(range(15))
    assert not episode_folds(arrays, 1).any()


def test_no_member_learns_from_its_own_fold() -> None:
    """A fold that is spoilt spoils the loss of all members but its own."""
    arrays, pipeline = episodes(24), ProphetPipeline.tiny_random()
    pipeline.register_modules(proprioception=ensemble())
    spoilt = arrays.proprio.clone()
    spoilt[(episode_folds(arrays, 3) == 1).repeat_interleave(arrays.lengths)] = float("nan")
    arrays = replace(arrays, proprio=spoilt)
    losses = [
        ProprioceptionLoss(pipeline, arrays, 64, 1, member=member)(0, torch.Generator().manual_seed(0))[0]
        for member in range(3)
    ]
    assert [bool(loss.isnan()) for loss in losses] == [True, False, True]


def test_a_member_whose_fold_is_everything_learns_from_it() -> None:
    arrays, pipeline = episodes(1), ProphetPipeline.tiny_random()
    pipeline.register_modules(proprioception=ensemble())
    (fold,) = episode_folds(arrays, 3).tolist()
    loss, _ = ProprioceptionLoss(pipeline, arrays, 4, 1, member=fold)(0, torch.Generator().manual_seed(0))
    assert loss.isfinite()


def test_every_member_is_trained_and_a_kill_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = episodes(12)
    stage = {"proprioception": {"steps": 40, "batch_size": 32, "learning_rate": 1e-2, "ema_decay": 0.9}}

    def losses(pipeline: ProphetPipeline) -> list[float]:
        with torch.no_grad():
            every = [ProprioceptionLoss(pipeline, arrays, 64, 1, member=member) for member in range(3)]
            return [float(loss(0, torch.Generator().manual_seed(0))[0]) for loss in every]

    def run(out: Path) -> ProphetPipeline:
        pipeline = ProphetPipeline.tiny_random()
        pipeline.register_modules(proprioception=ProprioceptionModel(hidden_dim=8, width=16, num_members=3))
        pipeline.proprioception.load_state_dict(begin)
        set_robots(pipeline, arrays)
        fit_proprioception(pipeline, arrays, out, stage, seed=0)
        return pipeline

    begin = ProprioceptionModel(hidden_dim=8, width=16, num_members=3).state_dict()
    untrained = ProphetPipeline.tiny_random()
    untrained.register_modules(proprioception=ProprioceptionModel(hidden_dim=8, width=16, num_members=3).eval())
    untrained.proprioception.load_state_dict(begin)
    set_robots(untrained, arrays)
    trained = run(tmp_path / "whole")
    assert all(after < 0.9 * before for after, before in zip(losses(trained), losses(untrained), strict=True))

    def killed(name: str, *args: object, **kwargs: object) -> None:
        if name.endswith("1"):
            raise KeyboardInterrupt
        fit(name, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prophet_gym.world_model.training.fit", killed)
        run(tmp_path / "killed")
    again = run(tmp_path / "killed")
    weights = again.proprioception.members[0].state_dict()
    for name, weight in trained.proprioception.members[0].state_dict().items():
        assert torch.equal(weight, weights[name])
    assert all(after < 0.9 * before for after, before in zip(losses(again), losses(untrained), strict=True))


def test_recorded_episodes_are_imagined_by_the_member_that_has_not_learned_from_them() -> None:
    arrays, pipeline = episodes(6), ProphetPipeline.tiny_random()
    pipeline.register_modules(proprioception=ensemble())
    folds = episode_folds(arrays, 3)
    imagined = imagine_motions(pipeline, arrays).proprio.view(6, -1, 8)
    _, replayed = replay_episodes(pipeline, arrays, torch.arange(6), list(range(6)))
    for fold in range(3):
        pipeline.register_modules(proprioception=ensemble().member(fold))
        alone = imagine_motions(pipeline, arrays).proprio.view(6, -1, 8)
        torch.testing.assert_close(imagined[folds == fold], alone[folds == fold])
        assert (imagined[folds != fold] != alone[folds != fold]).flatten(1).any(1).all()
    torch.testing.assert_close(replayed, imagined[:, : replayed.shape[1]])


def test_robots_go_on_from_where_they_are_and_are_told_the_truth_in_the_beginning() -> None:
    """Each step begins with the state that the last one ended with, or with the true proprioception; an episode of a
    length that is no multiple of the window ends with its own last step."""
    arrays, pipeline = episodes(5), ProphetPipeline.tiny_random()
    last = arrays.starts + arrays.lengths - 1
    arrays.actions[last] = torch.nan  # of no step
    loss = ProprioceptionLoss(pipeline, arrays, batch_size=32, steps=100, frames=3)
    assert (arrays.lengths[0] - 1) % 3
    begun: list[torch.Tensor] = []
    forward = loss.model.forward

    def spy(state: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        begun.append(state.detach())
        return forward(state, *args)

    loss.model.forward = spy
    generator = torch.Generator().manual_seed(0)
    assert not loss.state_dict()
    for step, told_before in ((0, 32), (0, 32), (90, 16), (90, 16)):
        ended = {name: value.clone() for name, value in loss.state_dict().items()}
        begun.clear()
        value, _ = loss(step, generator)
        assert value.isfinite() and len(begun) == 3
        now = loss.state_dict()
        rows = arrays.starts[now["episodes"]] + now["time"] - 3
        told = (begun[0][:, :8] == arrays.proprio[rows]).all(1)
        assert told.sum() >= told_before if step == 0 else told.sum() <= told_before
        if ended:
            goes_on = (now["episodes"] == ended["episodes"]) & (now["time"] - 3 == ended["time"])
            assert (goes_on | (now["time"] == 3)).all() and goes_on.any()
            assert torch.equal(begun[0][goes_on, 8:], ended["state"][goes_on, 8:])
            assert torch.equal(begun[0][~told, :8], ended["state"][~told, :8])


def twelve_steps(out: Path, stop_at: int | None) -> ProprioceptionModel:
    """A training with a checkpoint after every fifth step, killed at `stop_at`."""

    class Killed(ProprioceptionLoss):
        def __call__(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            if step == stop_at:
                raise KeyboardInterrupt
            return super().__call__(step, generator)

    pipeline = ProphetPipeline.tiny_random()
    model, loss_fn = pipeline.proprioception, Killed(pipeline, episodes(4), 8, 12)
    fit("model", model, loss_fn, out, steps=12, learning_rate=1e-2, seed=3, checkpoint_every=5)
    return model


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = twelve_steps(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        twelve_steps(tmp_path / "killed", 8)
    torch.manual_seed(1)  # no random number but those of its seed matters, not even in a dropout
    resumed = twelve_steps(tmp_path / "killed", None)
    assert not resumed.training and not twelve_steps(tmp_path / "killed", None).training
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_loss_that_goes_on_from_another_one_looks_at_the_pictures_there() -> None:
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(6)
    arrays = replace(arrays, first_frames=torch.randint_like(arrays.first_frames, 256))
    for weight in pipeline.proprioception.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    losses = [ProprioceptionLoss(pipeline, arrays, 8, 10) for _ in range(2)]
    for seed, loss_fn in enumerate(losses):
        loss_fn(0, torch.Generator().manual_seed(seed))
    losses[0].load_state_dict(losses[1].state_dict())
    one, other = (loss_fn(1, torch.Generator().manual_seed(2))[0] for loss_fn in losses)
    assert torch.equal(one, other)


def test_training_leaves_out_a_batch_without_a_finite_gradient_and_gives_up_after_many(tmp_path: Path) -> None:
    pipeline = ProphetPipeline.tiny_random()
    model, loss_fn = pipeline.proprioception, ProprioceptionLoss(pipeline, episodes(4), 8, 5)

    def overflowing(first: int, last: int) -> LossFn:
        def loss(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            value, logs = loss_fn(step, generator)
            return (value * float("nan") if first <= step < last else value), logs

        return loss

    fit("once", model, overflowing(2, 3), tmp_path, steps=5, learning_rate=1e-2, seed=0)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    with pytest.raises(FloatingPointError, match="not finite"):
        fit("always", model, overflowing(2, 99), tmp_path, steps=99, learning_rate=1e-2, seed=0)


def test_train_writes_a_pipeline_and_returns_it_again(tmp_path: Path) -> None:
    trained = train(episodes(4), episodes(2, seed=1), tmp_path, preset="debug")
    again = train(episodes(4), episodes(2, seed=1), tmp_path, preset="debug")
    for name in ("vae", "transformer", "proprioception"):
        one, other = getattr(trained, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert again.transformer.buffer_frames == 9 and again.transformer.transformer_blocks[0].attn2.to_out[0].weight.any()
    assert list(tmp_path.glob("validation-*.mp4")) and list((tmp_path / "tensorboard" / "rollouts").iterdir())
    assert not (tmp_path / "checkpoints" / "transformer").exists()
    with pytest.raises(ValueError, match="choose one of"):
        train(episodes(4), episodes(2), tmp_path, preset="huge")


def test_action_frames_draw_the_pose_where_the_camera_sees_it() -> None:
    """A camera at the origin that looks along z: x / z and y / z times the focal length, from the middle."""
    projection = torch.tensor([[[100.0, 0, 48, 0], [0, 100, 48, 0], [0, 0, 1, 0]]])
    proprio = torch.tensor([[0.2, -0.1, 1.0, torch.pi, 0, 0, 0.04, -0.04], [0.0, 0.0, 1.0, 0, 0, 0, 0.0, 0.0]])
    assert not draw_action_frames(proprio[None], torch.zeros(1, 1, 3, 4), 96).any()
    frames = draw_action_frames(proprio[None], projection[:, None], 96)[0]
    assert frames.shape == (2, 3, 48, 48) and frames.min() >= 0 and frames.max() <= 1
    row, column = divmod(int(frames[0].sum(0).argmax()), 48)
    assert abs(2 * row + 1 - 38) <= 1 and abs(2 * column + 1 - 68) <= 1
    # Open fingers draw a longer line than closed ones.
    assert frames[0, 1].sum() > 1.5 * frames[1, 1].sum()


def test_the_camera_matrix_inverts_the_extrinsics() -> None:
    camera = {
        "intrinsics": [[100, 0, 48], [0, 100, 48], [0, 0, 1]],
        "extrinsics": [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, -1], [0, 0, 0, 1]],
    }
    projection = torch.tensor(camera_projection(np.array(camera["intrinsics"]), np.array(camera["extrinsics"])))
    pixel = projection @ torch.tensor([2.0, 0, 0, 1])  # one metre in front of the camera
    assert torch.allclose(pixel / pixel[2], torch.tensor([48.0, 48, 1]))


def test_an_untrained_action_frame_stream_changes_nothing() -> None:
    transformer = ProphetTransformer3DModel(**TINY)
    torch.nn.init.normal_(transformer.video_out.weight)
    inputs = transformer_inputs(torch.ones(2))
    black = inputs | {"action_frames": torch.zeros(2, 3, 3, 48, 48)}
    assert torch.equal(transformer(**inputs), transformer(**black))


CAMERA = torch.tensor([[[100.0, 0, 48, 0], [0, 100, 48, 0], [0, 0, 1, 0]]])


def test_what_the_hand_carries_moves_as_the_hand_does() -> None:
    """A bright pixel where the hand is seen is, in the carried image, where the hand is seen later."""
    before = torch.tensor([[[0.1, -0.2, 1.0]]]).expand(-1, 2, -1)
    after = torch.tensor([[[0.2, -0.1, 1.0], [0.05, -0.1, 0.5]]])  # seen at (58, 28); then at (68, 38), (58, 28)
    motion = image_motion(before, after, CAMERA)
    torch.testing.assert_close(motion, torch.tensor([[[-10.0, -10.0, 1.0], [29.0, 14.0, 0.5]]]))
    images = torch.zeros(1, 2, 3, 96, 96)
    images[:, 0, :, 28, 58] = 1.0
    images[:, 1, :, 26:30, 56:60] = 1.0
    carried = carry(images, motion[:, :, None].expand(-1, -1, 2, -1))
    assert carried.shape == (1, 2, 2, 3, 96, 96)
    torch.testing.assert_close(carried[0, 0, 0, :, 38, 68], torch.ones(3))
    assert carried[0, 0, 0].sum() == pytest.approx(3.0, abs=1e-3)
    # Half as far away, the square of four pixels has eight, around the same place.
    torch.testing.assert_close(carried[0, 1, 1, 0, 24:32, 54:62].round(), torch.ones(8, 8))
    assert carried[0, 1, 1, 0].sum() == pytest.approx(64.0, abs=1.0)
    still = torch.tensor([0.0, 0.0, 1.0]).expand(1, 2, 3)
    assert torch.equal(image_motion(before, after, torch.zeros(1, 3, 4)), still)
    torch.testing.assert_close(carry(images, still[:, :, None].expand(-1, -1, 2, -1))[:, 0], images)


def test_the_latest_frame_is_carried_with_the_hand_and_the_first_with_what_it_holds(pipeline: ProphetPipeline) -> None:
    """In the condition of a chunk: by as many pixels as they move before the camera since the present."""
    poses, holds = torch.zeros(1, 3, 8), torch.zeros(1, 2, 7)
    poses[..., 0], poses[..., 2] = torch.tensor([0.1, 0.2, 0.3]), 1.0
    holds[..., 3], holds[..., 2], holds[..., 5] = torch.tensor([0.2, 0.4]), 1.0, 1.0  # taken at 0
    robot = torch.zeros(1, dtype=torch.int64)
    motion = pipeline.observed_condition(poses, holds, torch.zeros(1, 2, 4, 7), CAMERA[:, None], robot).motion
    torch.testing.assert_close(motion[..., 0], torch.tensor([[[-10.0, -20.0], [-20.0, -40.0]]]))


def test_a_hold_is_where_something_was_taken_and_where_it_was_brought() -> None:
    """Open, close at x = 1, move to 2, open, move to 3; the fingers open slowly; then close again at 4."""
    closing = torch.tensor([-1.0, 1, 1, -1, -1, 1, -1, -1, 1])
    position = torch.tensor([0.0, 1, 2, 2.5, 3, 3.5, 3.6, 3.8, 4])
    opening = torch.tensor([0.08, 0.05, 0.03, 0.03, 0.06, 0.06, 0.06, 0.08, 0.05])
    expected = [(0, 0), (1, 1), (1, 2), (1, 2), (1, 2), (1, 3.5), (1, 3.5), (1, 3.5), (4, 4)]
    hold = init_hold(torch.zeros(1, 8))
    for command, x, width, (taken, brought) in zip(closing, position, opening, expected, strict=True):
        proprio, actions = torch.zeros(1, 8), torch.zeros(1, 4, 7)
        proprio[0, 0], proprio[0, 6], proprio[0, 7] = x, width / 2, -width / 2
        actions[0, -1, -1] = command
        hold = update_hold(hold, proprio, actions)
        assert (hold[0, 0].item(), hold[0, 3].item()) == (taken, brought)


def test_holds_of_recorded_episodes_are_those_of_their_frames() -> None:
    arrays = episodes(3)
    arrays.proprio[:, 6] = 0.04 * (torch.arange(27) % 4 != 0)
    arrays.proprio[:, 7] = -arrays.proprio[:, 6]
    arrays.lengths[1] = 5
    holds = track_holds(arrays)
    for start, length in zip(arrays.starts, arrays.lengths, strict=True):
        hold = init_hold(arrays.proprio[start : start + 1])
        for row in range(int(start) + 1, int(start + length)):
            assert torch.equal(holds[row - 1 : row], hold)
            hold = update_hold(hold, arrays.proprio[row : row + 1], arrays.actions[row - 1 : row])


def test_looking_around_shows_what_is_at_the_hand() -> None:
    image = torch.zeros(2, 3, 96, 96)
    image[..., 27:29, 57:59] = 1.0
    proprio = torch.tensor([[0.1, -0.2, 1.0, 0, 0, 0, 0, 0]]).repeat(2, 1)
    crops = look_around(image, proprio, torch.cat([CAMERA, torch.zeros(1, 3, 4)])[:, None], 8)
    assert crops.shape == (2, 3, 8, 8) and not crops[1].any()
    row, column = divmod(int(crops[0, 0].argmax()), 8)
    assert row in (3, 4) and column in (3, 4)


def test_frames_around_a_movement_of_the_fingers_count_more() -> None:
    arrays = episodes(2, length=20)
    arrays.proprio[10:, 6] = 0.04
    weights = contact_weights(arrays)
    assert weights[7:14].eq(4).all() and weights[:7].eq(1).all() and weights[14:].eq(1).all()
    arrays.proprio[:, 6] = 0
    arrays.proprio[19, 6] = 0.04  # at the end of the first of two episodes
    weights = contact_weights(arrays)
    assert weights[16:20].eq(4).all() and weights[:16].eq(1).all() and weights[20:].eq(1).all()


def test_what_overflowed_in_the_memory_is_not_carried_on() -> None:
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(5, length=40)
    loss_fn = ProprioceptionLoss(pipeline, arrays, batch_size=4, steps=10)
    loss_fn(0, torch.Generator().manual_seed(0))
    loss_fn.state_dict()["state"][2, -2] = float("nan")
    loss, _ = loss_fn(9, torch.Generator().manual_seed(1))
    assert loss.isfinite() and loss_fn.state_dict()["state"].isfinite().all()
    assert loss_fn.state_dict()["time"][2] == loss_fn.frames  # it began anew


def test_conventions_that_would_be_learned_as_motion_are_named() -> None:
    arrays = episodes(2)
    turned = arrays.proprio.clone()
    turned[:, 3] = torch.where(torch.arange(len(turned)) % 2 == 0, 3.1, -3.1)
    apart, together = arrays.proprio.clone(), arrays.proprio.clone()
    together[:, 6:], apart[:, 6:] = torch.tensor([0.04, 0.04]), torch.tensor([0.04, -0.04])
    binary = arrays.actions.clone()
    binary[..., 6] = (binary[..., 6] > 0).float()
    set_robots(ProphetPipeline.tiny_random(), replace(arrays, proprio=apart))
    for changed, message in (
        ({"proprio": turned}, "changes by 6.2 rad between two frames"),
        ({"proprio": together}, "up to 0.040 m from the middle and never apart"),
        ({"actions": binary}, "0 and 1 and never negative"),
    ):
        with pytest.raises(ValueError, match=message):
            set_robots(ProphetPipeline.tiny_random(), replace(arrays, **changed))


def test_a_history_has_room_for_the_first_and_the_latest_frame() -> None:
    with pytest.raises(ValueError, match="history_frames must be at least 2, got 1"):
        ProphetTransformer3DModel.from_config(ProphetPipeline.tiny_random().transformer.config, history_frames=1)


def test_a_robot_whose_first_arm_was_at_rest_still_has_both() -> None:
    pipeline = ProphetPipeline.tiny_random(num_arms=2)
    pipeline.proprioception.action_mask[0] = torch.tensor([0.0] * 7 + [1.0] * 7)
    assert pipeline.arms("libero_object") == 2


def test_a_suite_with_few_episodes_is_visited_more_often_than_its_share() -> None:
    """The frames that the proprioception learns from: in proportion to the root of 450 and 50, however long the
    episodes are."""
    many, few = episodes(50, length=9), episodes(10, length=5)
    few = replace(few, records=tuple(replace(record, suite="fetch") for record in few.records))
    arrays = concatenate([many, few])
    weights = suite_weights(arrays) * arrays.lengths
    assert (float(weights[:50].sum() / weights.sum())) == pytest.approx(0.75)
    pipeline = ProphetPipeline.tiny_random()
    set_robots(pipeline, arrays)
    loss = ProprioceptionLoss(pipeline, arrays, batch_size=128, steps=10**9)
    generator, visited = torch.Generator().manual_seed(0), torch.zeros(2)
    for step in range(30):
        loss(step, generator)
        if step >= 10:  # the first robots begin anywhere
            visited += (loss.state_dict()["episodes"] < 50).long().bincount(minlength=2)
    assert float(visited[1] / visited.sum()) == pytest.approx(0.75, abs=0.05)
    assert suite_weights(many).unique().numel() == 1


def test_a_subset_keeps_whole_episodes() -> None:
    arrays = episodes(6, length=9)
    some = subset(arrays, 4, seed=1)
    assert len(some.records) == len(some.starts) == 4
    for k, record in enumerate(some.records):
        own, all_of_it = some.starts[k] + torch.arange(9), arrays.starts[record.episode_index] + torch.arange(9)
        for name in ("frames", "proprio", "actions", "success"):
            assert torch.equal(getattr(some, name)[own], getattr(arrays, name)[all_of_it])
