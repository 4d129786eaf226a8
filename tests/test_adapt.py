"""`prophet adapt`: from a few episodes of a new world, by all weights or by LoRA, resumable, the base left as it is."""

import hashlib
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_world_model import episodes

import prophet_gym.world_model.training as stages
from prophet_gym.cli import main
from prophet_gym.data.clips import EpisodeArrays, concatenate
from prophet_gym.data.episode import SPLITS, Episode
from prophet_gym.data.lerobot_format import LeRobotWriter
from prophet_gym.world_model import ProphetPipeline, adaptation
from prophet_gym.world_model.adaptation import adapt
from prophet_gym.world_model.imagination import encode_frames, imagine_episodes
from prophet_gym.world_model.losses import ProprioceptionLoss, autoencoder_loss
from prophet_gym.world_model.proprioception import ProprioceptionModel
from prophet_gym.world_model.training import train
from prophet_gym.world_model.video_rollouts import VideoRolloutLoss

CAMERA = {"intrinsics": np.array([[100.0, 0, 48], [0, 100, 48], [0, 0, 1]]), "extrinsics": np.eye(4)}
LORA = pytest.param(4, marks=pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra `lora`"))


def new_world(count: int, seed: int = 0) -> EpisodeArrays:
    arrays = episodes(count, seed=seed)
    return replace(arrays, records=tuple(replace(record, suite="square_world") for record in arrays.records))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    ProphetPipeline.tiny_random().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(path: Path) -> ProphetPipeline:
    return ProphetPipeline.from_pretrained(path)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@torch.no_grad()
def losses(pipeline: ProphetPipeline) -> dict[str, float]:
    arrays = new_world(4)
    latents = encode_frames(pipeline.vae, arrays.frames)
    every = {
        "proprioception": ProprioceptionLoss(pipeline, arrays, 16, 1),
        "rollouts": VideoRolloutLoss(pipeline, arrays, latents, batch_size=8, steps=10**9),
    }
    return {
        name: float(np.mean([loss(0, torch.Generator().manual_seed(k))[0].item() for k in range(4)]))
        for name, loss in every.items()
    }


def assert_same_weights(one: ProphetPipeline, other: ProphetPipeline, **tolerance: float) -> None:
    for name in ("vae", "transformer", "proprioception"):
        first, second = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, **({"rtol": 0, "atol": 0} | tolerance))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, LORA])
def test_adapting_learns_the_new_world_and_leaves_the_base_as_it_is(
    base: Path, tmp_path: Path, rank: int | None
) -> None:
    files, before = digests(base), losses(load(base))
    adapted = adapt(
        load(base), new_world(4), new_world(2, seed=1), tmp_path / "out", recipe="debug", lora_rank=rank,
        cameras={"square_world": [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]},
    )  # fmt: skip
    after = losses(adapted)
    assert all(after[name] < 0.9 * before[name] for name in before)
    assert digests(base) == files
    saved, old = load(tmp_path / "out" / "pipeline"), load(base)
    assert set(saved.config.cameras) == {"libero_object", "square_world"}
    assert_same_weights(adapted, saved)
    assert saved.transformer.state_dict().keys() == old.transformer.state_dict().keys()
    for key, value in saved.vae.encoder.state_dict().items():
        assert torch.equal(value, old.vae.encoder.state_dict()[key])  # the transformer knows its latents


def test_a_folder_is_of_one_run(base: Path, tmp_path: Path) -> None:
    run = (new_world(4), new_world(2, seed=1), tmp_path / "out")
    first = adapt(load(base), *run, recipe="debug")
    assert_same_weights(first, adapt(load(base), *run, recipe="debug"))  # finished already
    with pytest.raises(ValueError, match="belongs to a run with seed 0, this one has seed 1"):
        adapt(load(base), *run, recipe="debug", seed=1)
    with pytest.raises(ValueError, match="belongs to a run with cameras None"):
        adapt(load(base), *run, recipe="debug", cameras={"square_world": [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]})
    repainted = replace(run[0], first_frames=255 - run[0].first_frames)
    with pytest.raises(ValueError, match="belongs to a run with episodes"):
        adapt(load(base), repainted, *run[1:], recipe="debug")
    with pytest.raises(ValueError, match="belongs to a run with checkpoint"):
        adapt(load(tmp_path / "out" / "pipeline"), *run, recipe="debug")
    with pytest.raises(ValueError, match=r"belongs to a run with .*command adapt"):
        train(*run, preset="debug")


def test_episodes_that_do_not_fit_are_refused_before_any_training(base: Path, tmp_path: Path) -> None:
    arrays, val = new_world(4), new_world(2, seed=1)
    with pytest.raises(ValueError, match="take 20 actions a second, those of the episodes 60"):
        adapt(load(base), replace(arrays, control_hz=60.0), val, tmp_path / "out", recipe="debug")
    small = replace(val, frames=val.frames[:, :48, :48])
    with pytest.raises(ValueError, match=r"takes frames of shape \(96, 96, 3\), the episodes have \(48, 48, 3\)"):
        adapt(load(base), arrays, small, tmp_path / "out", recipe="debug")
    with pytest.raises(ValueError, match=r"takes frames of shape \(96, 96, 3\), the episodes have \(48, 48, 3\)"):
        train(arrays, small, tmp_path / "other", preset="debug")
    for folder in ("out", "other"):
        assert not [path for path in (tmp_path / folder).glob("*") if path.is_dir()]


def test_a_pipeline_has_the_control_rate_of_its_episodes() -> None:
    assert concatenate([replace(new_world(2), control_hz=10.0)] * 2).control_hz == 10.0


def test_episodes_without_a_whole_chunk_are_not_imagined(base: Path) -> None:
    short = episodes(2, length=2)
    imagined = imagine_episodes(load(base), concatenate([short, episodes(3)]), count=5, seed=0)
    assert imagined.lengths.tolist() == [9, 9, 9]
    with pytest.raises(ValueError, match="No episode has 3 frames"):
        imagine_episodes(load(base), short, count=5, seed=0)


def test_a_new_robot_takes_a_slot_that_it_keeps_on_disk(base: Path, tmp_path: Path) -> None:
    """Its name sorts before the known one's."""
    train_arrays, val_arrays = (
        replace(arrays, records=tuple(replace(record, robot="fetch") for record in arrays.records))
        for arrays in (new_world(4), new_world(2, seed=1))
    )
    adapted = adapt(load(base), train_arrays, val_arrays, tmp_path / "out", recipe="debug")
    saved = load(tmp_path / "out" / "pipeline")
    assert saved.config.robots == [["panda", ["libero_object"]], ["fetch", ["square_world"]]]
    assert torch.equal(saved.proprioception.proprio_mean[0], load(base).proprioception.proprio_mean[0])
    torch.testing.assert_close(saved.proprioception.proprio_mean[1], train_arrays.proprio.mean(0))
    start, proprio, actions = train_arrays.frames[:1], torch.zeros(1, 8), torch.ones(1, 8, 7)
    one, other = (
        pipeline.replay(start, proprio, actions, ["square_world"], torch.Generator().manual_seed(0))
        for pipeline in (adapted, saved)
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_recipe_can_give_a_memory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ((2, 1, 2),)
    monkeypatch.setitem(adaptation.RECIPES, "debug", adaptation.RECIPES["debug"] | {"memory": memory})
    adapt(load(base), new_world(4), new_world(2, seed=1), tmp_path / "out", recipe="debug")
    assert load(tmp_path / "out" / "pipeline").transformer.buffer_frames == load(base).transformer.buffer_frames + 2
    assert "memory" in adaptation.RECIPES["extend"]


def test_the_recipe_motion_trains_the_proprioception_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = adaptation.RECIPES["motion"]["proprioception"] | {"steps": 60, "batch_size": 16, "warmup_steps": 5}
    monkeypatch.setitem(adaptation.RECIPES, "motion", {"anew": True, "proprioception": stage | {"ema_decay": 0.9}})
    untrained = load(base)
    untrained.register_modules(proprioception=untrained.proprioception.untrained().eval())
    adapted = adapt(load(base), new_world(8), new_world(2, seed=1), tmp_path / "out", recipe="motion", num_members=2)
    assert adapted.num_members == 2 and load(tmp_path / "out" / "pipeline").num_members == 2
    assert losses(adapted)["proprioception"] < 0.9 * losses(untrained)["proprioception"]
    saved, old = load(tmp_path / "out" / "pipeline"), load(base)
    for part in ("vae", "transformer"):
        for key, value in getattr(saved, part).state_dict().items():
            assert torch.equal(value, getattr(old, part).state_dict()[key])


def test_the_recipe_refine_goes_on_with_the_proprioception_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adaptation.RECIPES["refine"].keys() == {"proprioception"}
    stage = adaptation.RECIPES["refine"]["proprioception"] | {"steps": 60, "batch_size": 16, "warmup_steps": 5}
    monkeypatch.setitem(adaptation.RECIPES, "refine", {"proprioception": stage | {"ema_decay": 0.9}})
    arrays = new_world(8)
    rehearsed = tuple(replace(record, kind="rehearsed") for record in arrays.records)
    arrays = replace(arrays, records=rehearsed)
    refined, old = adapt(load(base), arrays, new_world(2, seed=1), tmp_path / "out", recipe="refine"), load(base)
    assert losses(refined)["proprioception"] < 0.9 * losses(old)["proprioception"]
    for part in ("vae", "transformer"):
        for key, value in getattr(old, part).state_dict().items():
            assert torch.equal(value, getattr(refined, part).state_dict()[key])
    # What says that actions are rehearsed was zero, and has learned.
    says = (pipeline.proprioception.members[0].encoder.weight for pipeline in (old, refined))
    told, robots = old.proprioception.proprio_dim + old.proprioception.config.robots, old.proprioception.config.robots
    before, after = (weight[:, told : told + robots] for weight in says)
    assert not before.any() and after.any()


def test_a_prophet_without_video_learns_a_motion_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = adaptation.RECIPES["motion"]["proprioception"] | {"steps": 2, "batch_size": 4}
    monkeypatch.setitem(adaptation.RECIPES, "motion", {"anew": True, "proprioception": stage})
    whole, arrays = load(base), (new_world(4), new_world(2, seed=1))
    settings = {name: whole.config[name] for name in ("cameras", "robots")}
    felt = ProphetPipeline(None, None, load(base).proprioception, whole.scheduler, **settings)
    one, other = (
        adapt(some, *arrays, tmp_path / name, recipe="motion").proprioception.state_dict()
        for some, name in ((whole, "whole"), (felt, "felt"))
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not load(tmp_path / "felt" / "pipeline").has_video


def test_the_recipe_motion_forgets_the_old_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = adaptation.RECIPES["motion"]["proprioception"] | {"steps": 1, "batch_size": 4, "learning_rate": 1e-9}
    monkeypatch.setitem(adaptation.RECIPES, "motion", {"anew": True, "proprioception": stage})
    one, other = load(base), load(base)
    for parameter in other.proprioception.parameters():
        torch.nn.init.normal_(parameter)
    arrays = new_world(4), new_world(2, seed=1)
    results = [
        adapt(some, *arrays, tmp_path / name, recipe="motion").proprioception.state_dict()
        for some, name in ((one, "one"), (other, "other"))
    ]
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key])


def test_an_untrained_proprioception_keeps_the_statistics(base: Path) -> None:
    model = load(base).proprioception
    model.proprio_std.uniform_()
    fresh, statistics = model.untrained(), dict(model.named_buffers())
    assert fresh.config == model.config
    assert all(torch.equal(fresh.get_buffer(name), value) for name, value in statistics.items())
    assert not torch.equal(fresh.members[0].cell.weight_ih, model.members[0].cell.weight_ih)


def test_a_recipe_can_train_the_encoder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"steps": 20, "batch_size": 4, "learning_rate": 3e-3}
    monkeypatch.setitem(adaptation.RECIPES, "debug", adaptation.RECIPES["debug"] | {"autoencoder": stage})
    arrays = new_world(4)
    adapted, old = adapt(load(base), arrays, new_world(2, seed=1), tmp_path / "out", recipe="debug"), load(base)
    projections = old.projection([record.suite for record in arrays.records])
    before, after = (
        np.mean([loss(0, torch.Generator().manual_seed(k))[0].item() for k in range(4)])
        for loss in (autoencoder_loss(some.vae, arrays, projections, 16, 2) for some in (old, adapted))
    )
    assert after < before
    assert not torch.equal(adapted.vae.encoder[1].weight, old.vae.encoder[1].weight)
    latents = encode_frames(load(tmp_path / "out" / "pipeline").vae, arrays.frames).float()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.01)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.01)
    assert "autoencoder" in adaptation.RECIPES["extend"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, LORA])
def test_a_killed_adaptation_resumes_to_the_same_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    """Killed in the midst of the rollouts, after a checkpoint, and again before the pipeline is written."""
    recipe = {name: stage | {"checkpoint_every": 5} for name, stage in adaptation.RECIPES["debug"].items()}
    monkeypatch.setitem(adaptation.RECIPES, "debug", {"halfway": True} | recipe)
    run = partial(adapt, train_arrays=new_world(4), val_arrays=new_world(2, seed=1), recipe="debug", lora_rank=rank)
    whole = run(load(base), out=tmp_path / "whole")

    class Killed(VideoRolloutLoss):
        def __call__(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            if step == 8:
                raise KeyboardInterrupt
            return super().__call__(step, generator)

    torch.manual_seed(0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "VideoRolloutLoss", Killed)
        run(load(base), out=tmp_path / "killed")
    assert (tmp_path / "killed" / "checkpoints" / "rollouts").is_dir()
    assert_same_weights(whole, run(load(base), out=tmp_path / "killed"))
    shutil.rmtree(tmp_path / "killed" / "pipeline")
    assert_same_weights(whole, run(load(base), out=tmp_path / "killed"))


@pytest.mark.parametrize(("robot", "members"), [("panda", 1), ("sawyer", 1), ("panda", 2)])
def test_the_motion_of_known_robots_ends_half_way(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, robot: str, members: int
) -> None:
    assert adaptation.RECIPES["adapt"]["halfway"] and "halfway" not in adaptation.RECIPES["extend"]
    short = {name: stage | {"steps": 5} for name, stage in adaptation.RECIPES["debug"].items()}
    monkeypatch.setitem(adaptation.RECIPES, "debug", {"halfway": True} | short)
    data = [
        replace(arrays, records=tuple(replace(record, robot=robot) for record in arrays.records))
        for arrays in (new_world(8), new_world(1, seed=1))
    ]
    many = load(base)
    many.register_modules(proprioception=many.proprioception.untrained(members))
    many.save_pretrained(base)
    adapted = adapt(load(base), *data, tmp_path / "out", recipe="debug").proprioception
    again = adapt(load(base), *data, tmp_path / "out", recipe="debug").proprioception
    old, number = load(base).proprioception.members.state_dict(), len(adapted.members)
    assert number == members
    for member in range(number):
        all_the_way = ProprioceptionModel.from_pretrained(tmp_path / "out" / f"proprioception-{member}")
        moved = 0
        for name, end in all_the_way.members.state_dict().items():
            key = f"{member}.{name.removeprefix('0.')}"
            weight = adapted.members.state_dict()[key]
            expected = end if robot == "sawyer" else (old[key] + end) / 2
            torch.testing.assert_close(weight, expected)
            assert torch.equal(again.members.state_dict()[key], weight)
            moved += int(not torch.equal(end, old[key]))
        assert moved > 5


@pytest.mark.slow
@pytest.mark.parametrize("rank", [LORA])
def test_the_saved_adapters_are_what_was_fused(base: Path, tmp_path: Path, rank: int) -> None:
    adapted = adapt(load(base), new_world(2), new_world(1), tmp_path / "out", recipe="debug", lora_rank=rank)
    by_hand = load(base)
    by_hand.transformer.load_lora_adapter(
        tmp_path / "out" / "rollouts-lora",
        prefix=None,
        weight_name="pytorch_lora_weights.safetensors",
        use_safetensors=True,
    )
    by_hand.transformer.fuse_lora()
    by_hand.transformer.unload_lora()
    by_hand.vae, by_hand.proprioception = adapted.vae, adapted.proprioception
    assert_same_weights(adapted, by_hand, atol=1e-6)
    start, proprio, actions = new_world(2).frames[:2], torch.zeros(2, 8), torch.ones(2, 8, 7)
    videos = [
        pipeline.replay(start, proprio, actions, ["square_world"] * 2, torch.Generator().manual_seed(0))[0].float()
        for pipeline in (adapted, by_hand, load(tmp_path / "out" / "pipeline"), load(base))
    ]
    assert torch.equal(videos[0], videos[2])
    assert (videos[0] - videos[1]).abs().max() <= 1
    assert (videos[0] - videos[3]).abs().max() > 1


def test_what_does_not_fit_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = new_world(2)
    run = partial(adapt, load(base), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"choose one of \['adapt', 'debug', 'extend', 'motion', 'refine', 'video'\]"):
        run(arrays, arrays, recipe="huge")
    coarse = replace(arrays, actions=arrays.actions[:, :2])
    with pytest.raises(ValueError, match=r"actions of shape \(4, 7\), the episodes have \(2, 7\)"):
        run(coarse, coarse, recipe="debug")
    short = episodes(2, length=2)
    with pytest.raises(ValueError, match="No training episode has 3 frames, its first one and a chunk"):
        run(short, short, out=tmp_path / "short", recipe="debug")
    with pytest.raises(ValueError, match="No training episode has 3 frames"):
        train(short, short, tmp_path / "shorter", preset="debug")
    assert not list(tmp_path.glob("short*/proprioception*"))
    with pytest.raises(ValueError, match="lora_rank must be at least 1, got 0"):
        run(arrays, arrays, recipe="debug", lora_rank=0)
    with pytest.raises(ValueError, match=r"'debug' keeps the members of the proprioception: leave num_members out"):
        run(arrays, arrays, recipe="debug", num_members=2)
    with pytest.raises(ValueError, match=r"'motion' has no use for adapters of the transformer: leave lora_rank out"):
        run(arrays, arrays, recipe="motion", lora_rank=4)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"prophet-gym\[lora\]"):
        run(arrays, arrays, recipe="debug", lora_rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_adapts_to_recorded_episodes(base: Path, tmp_path: Path) -> None:
    writer = LeRobotWriter(tmp_path / "data", fps=5, frame_stride=4, camera=CAMERA, image_size=96)
    arrays = new_world(5)
    for index, start in enumerate(arrays.starts.tolist()):
        rows, split = slice(start, start + 9), "train" if index < 4 else "val"
        episode = Episode(
            frames=arrays.frames[rows].numpy(),
            proprio=arrays.proprio[rows].numpy(),
            actions=arrays.actions[rows].numpy()[:-1],
            success=np.zeros(9, np.bool_),
            instruction="push the square",
            suite="square_world",
            task=0,
            init_state=SPLITS[split][0],
            split=split,
            kind="clean",
            robot="panda",
            seed=index,
        )
        writer.write_episode(index, episode)
    writer.finalize()
    arguments = [str(base), str(tmp_path / "data"), "--episodes", "2", "--recipe", "debug", "--out"]
    main(["adapt", *arguments, str(tmp_path / "out")])
    saved = load(tmp_path / "out" / "pipeline")
    assert saved.config.cameras["square_world"] == [[100.0, 0, 48, 0], [0, 100, 48, 0], [0, 0, 1, 0]]
    assert not torch.equal(saved.transformer.video_out.weight, load(base).transformer.video_out.weight)
