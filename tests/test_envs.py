"""The imagined environments: Gymnasium's and Stable-Baselines3's contracts, seeds, groups, state, errors."""

import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import prophet_gym
from prophet_gym.envs.sb3_vec_env import ProphetVecEnv
from prophet_gym.envs.single_env import ProphetEnv
from prophet_gym.envs.start_states import StartState, start_states_from_env, write_start_states
from prophet_gym.envs.vector_env import ProphetVectorEnv
from prophet_gym.reward.success_classifier import SuccessClassifier
from prophet_gym.world_model.pipeline import ProphetPipeline

INSTRUCTIONS = [
    "pick up the alphabet soup and place it in the basket",
    "pick up the cream cheese and place it in the basket",
    "pick up the salad dressing and place it in the basket",
]
INIT_STATES = {0: "train", 1: "train", 2: "train", 40: "val", 45: "test"}


class FakeWorldModel:
    """Frames that depend on the start, every action, and each env's own noise; every row on itself alone, exactly."""

    chunk_size, chunk_frames, image_size, action_dim, num_members = 8, 2, 96, 7, 3

    def arms(self, suite: str) -> int:
        return 1

    def init_history(self, images: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(images[:, None, ::24, ::24].astype(np.float64))

    def init_state(self, proprio: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        return torch.cat([proprio, member[:, None].float()], dim=1)

    def imagine(
        self,
        history: torch.Tensor,
        state: torch.Tensor,
        actions: torch.Tensor,
        *,
        images: NDArray[np.uint8],
        suites: Sequence[str],
        generator: list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> SimpleNamespace:
        assert generator is not None and len(images) == len(suites) == len(actions)
        noise = torch.stack([torch.randn(2, 4, 4, 3, generator=one, dtype=torch.float64) for one in generator])
        drift = 40 * (actions[:, ::4, None, None, :3].double() + 0.1 * noise)
        latents = (history + drift.cumsum(dim=1)) % 256
        frames = latents.to(torch.uint8).repeat_interleave(24, dim=2).repeat_interleave(24, dim=3)
        state = state + 0.01 * (1 + state[:, -1:]) * actions[:, -1, :1] * (torch.arange(9) < 8)
        poses = torch.stack([state[:, :8] - 0.5, state[:, :8]], dim=1)
        return SimpleNamespace(frames=frames, proprio=poses, history=latents[:, -1:], state=state)


@dataclass
class FakeRewardModel:
    """A probability that any change of the last frame changes, above the threshold now and then."""

    threshold: float = 0.8

    def score(
        self,
        frames: NDArray[np.uint8],
        proprio: NDArray[np.float32],
        lengths: NDArray[np.int64],
        instructions: Sequence[str],
        embeddings: NDArray[np.float32],
        starts: NDArray[np.uint8],
        suites: Sequence[str],
    ) -> NDArray[np.float32]:
        assert len(frames) == len(lengths) == len(instructions) == len(embeddings) and frames.shape[1] >= lengths.max()
        assert proprio.shape == (*frames.shape[:2], 8) and len(suites) == len(frames)
        np.testing.assert_array_equal(starts, frames[:, 0])
        last = frames[np.arange(len(frames)), lengths - 1, ::24, ::24].reshape(len(frames), -1).astype(np.int64)
        return np.float32(last.sum(axis=1) % 97 / 97)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("starts") / "start_states.parquet"
    rng = np.random.default_rng(0)
    write_start_states(
        [
            StartState(
                suite=suite,
                task=task,
                task_name=INSTRUCTIONS[task].replace(" ", "_"),
                instruction=INSTRUCTIONS[task],
                init_state=init_state,
                split=split,
                proprio=rng.normal(size=8, scale=0.3).astype(np.float32),
                image=rng.integers(0, 256, (12, 12, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1),
            )
            for suite in ("libero_object", "libero_spatial")
            for task in range(3)
            for init_state, split in INIT_STATES.items()
        ],
        path,
    )
    return str(path)


@pytest.fixture
def fake(starts: str) -> dict[str, Any]:
    """Arguments of an env on the fakes, with short episodes."""
    return {"start_states": starts, "world_model": FakeWorldModel(), "reward_model": FakeRewardModel(), "max_chunks": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Paths of an untrained world model and reward model of the real classes."""
    folder = tmp_path_factory.mktemp("weights")
    ProphetPipeline.tiny_random(seed=0).save_pretrained(folder / "world")
    SuccessClassifier.tiny_random().save_pretrained(folder / "reward")
    return {"world_model": str(folder / "world"), "reward_model": str(folder / "reward")}


@pytest.fixture
def real(starts: str, saved: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an env on the real model classes, untrained, by path."""
    return {"start_states": starts, **saved}


def rollout(envs: ProphetVectorEnv | SyncVectorEnv, steps: int, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    envs.action_space.seed(seed)
    for _ in range(steps):
        yield envs.step(envs.action_space.sample())


# --- the ids and what Gymnasium and Stable-Baselines3 demand ----------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reward_type", ["sparse", "probability"])
@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_gymnasium_check_env(real: dict[str, Any], reward_type: str, render_mode: str | None) -> None:
    env = gym.make("Prophet-LIBERO-v0", **real, reward_type=reward_type, render_mode=render_mode)
    check_env(env.unwrapped)


@pytest.mark.filterwarnings("error")
def test_sb3_check_env(real: dict[str, Any]) -> None:
    sb3_check_env(
        gym.make("Prophet-LIBERO-v0", **real, render_mode="rgb_array").unwrapped, warn=True, skip_render_check=False
    )


@pytest.mark.filterwarnings("error")
def test_make_vec(real: dict[str, Any]) -> None:
    envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=64, **real, max_chunks=2)
    assert isinstance(envs, ProphetVectorEnv) and envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    obs, infos = envs.reset(seed=0)
    assert obs in envs.observation_space and len(infos["instruction"]) == 64
    for obs, *_ in rollout(envs, 3):
        assert obs in envs.observation_space
    envs.close()


def test_spec_is_serialisable(real: dict[str, Any]) -> None:
    env = gym.make("Prophet-LIBERO-v0", **real)
    assert env.spec is not None
    assert gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json())).action_space == env.action_space


def test_ids_are_registered_and_again_is_harmless() -> None:
    prophet_gym.register_envs()
    assert gym.spec("Prophet-LIBERO-v0").vector_entry_point is not None
    assert gym.spec("LIBERO-v0").entry_point == "prophet_gym.simulators.libero:LiberoEnv"


def test_import_is_light() -> None:
    heavy = "{'torch', 'diffusers', 'stable_baselines3', 'pyarrow'} & set(sys.modules)"
    code = f"import sys, prophet_gym; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names() -> None:
    assert prophet_gym.ProphetEnv is ProphetEnv and set(prophet_gym.__all__) <= set(dir(prophet_gym))
    with pytest.raises(AttributeError, match="no attribute 'ProphetEvn'"):
        prophet_gym.ProphetEvn  # noqa: B018


# --- without video ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_without_video_the_contracts_hold(real: dict[str, Any]) -> None:
    env = gym.make("Prophet-LIBERO-v0", **real, video=False)
    assert set(env.observation_space.spaces) == {"proprio", "instruction"}
    check_env(env.unwrapped)
    sb3_check_env(env.unwrapped, warn=True)


def test_without_video_the_robot_moves_the_same(real: dict[str, Any]) -> None:
    arguments = {**real, "max_chunks": 3, "autoreset_mode": "SameStep"}
    seen, felt = (ProphetVectorEnv(num_envs=4, **arguments, video=video) for video in (True, False))
    first, other = seen.reset(seed=5)[0], felt.reset(seed=5)[0]
    assert "image" not in other
    for with_video, without in zip(rollout(seen, 4), rollout(felt, 4), strict=True):
        np.testing.assert_allclose(without[0]["proprio"], with_video[0]["proprio"], atol=1e-6)
        assert data_equivalence(without[0]["instruction"], with_video[0]["instruction"], exact=True)
        np.testing.assert_array_equal(without[3], with_video[3])
        assert "frames" not in without[4]
    assert not np.array_equal(first["proprio"], without[0]["proprio"])


def test_without_video_the_motion_alone_is_judged(real: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=3, **real, video=False, reward_type="probability")
    envs.reset(seed=0)
    for _, _, _, _, infos in rollout(envs, 3):
        motion = torch.from_numpy(envs._proprio[:, : envs._lengths[0]])
        judge = envs.reward_model
        assert isinstance(judge, SuccessClassifier)
        with torch.inference_mode():
            starts = torch.from_numpy(np.stack([start.image for start in envs._starts if start is not None]))
            projection = judge.projection(["libero_object"] * 3)
            logits = judge.motion_logits(motion, torch.from_numpy(envs._embeddings), starts, projection)[:, -1]
            expected = judge.motion_probability(logits).numpy()
        np.testing.assert_allclose(infos["success_probability"], expected, atol=1e-6)


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_what_the_judge_remembers_is_of_the_episode_at_hand(real: dict[str, Any], mode: str, video: bool) -> None:
    """Whatever else has ended, begun anew or been left alone: it says what it would of the whole rollout."""
    arguments = {**real, "max_chunks": 2, "autoreset_mode": mode}
    envs = ProphetVectorEnv(num_envs=3, **arguments, video=video)
    judge = envs.reward_model
    assert isinstance(judge, SuccessClassifier)
    envs.reset(seed=0)
    rng, lengths = np.random.default_rng(0), set()
    for step in range(6):
        envs.paused = np.array([False, step == 1, step == 2])  # so that their episodes are of different lengths
        envs.step(rng.uniform(-1, 1, envs.action_space.shape).astype(np.float32))
        starts = envs._starts_of(np.arange(3))
        expected = judge.score(
            envs._clips if video else None, envs._proprio, envs._lengths, [start.instruction for start in starts],
            envs._embeddings, np.stack([start.image for start in starts]), ["libero_object"] * 3,
        )  # fmt: skip
        np.testing.assert_allclose(envs._probability, expected, atol=1e-6)
        lengths.add(tuple(envs._lengths.tolist()))
    assert any(len(set(some)) > 1 for some in lengths)


def test_without_video_state_is_restored_and_nothing_can_be_seen(real: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=3, **real, video=False)
    envs.reset(seed=0)
    list(rollout(envs, 2))
    state = envs.get_state()
    future = list(rollout(envs, 3, seed=1))
    envs.set_state(state)
    for ours, again in zip(future, rollout(envs, 3, seed=1), strict=True):
        assert data_equivalence(ours, again, exact=True)
    with pytest.raises(ValueError, match="do not fit"):
        ProphetVectorEnv(num_envs=3, **real).set_state(state)
    with pytest.raises(ValueError, match="video=True to see clips"):
        envs.clips()
    with pytest.raises(TypeError, match="nothing to render: leave render_mode out"):
        ProphetVectorEnv(**real, video=False, render_mode="rgb_array")


def test_without_video_other_models_are_needed(fake: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"FakeWorldModel cannot be used here.*imagine_motion"):
        ProphetVectorEnv(**fake, video=False)


def test_a_judge_whose_motion_was_never_calibrated_is_refused_without_video(real: dict[str, Any]) -> None:
    judge = SuccessClassifier.tiny_random()
    judge.register_to_config(motion_threshold=None)
    with pytest.raises(TypeError, match="motion_threshold"):
        ProphetVectorEnv(**{**real, "reward_model": judge}, video=False)
    ProphetVectorEnv(**{**real, "reward_model": judge})


# --- the native vector env equals SyncVectorEnv over single envs ------------------------------------------------------


def both(arguments: dict[str, Any], mode: AutoresetMode, num_envs: int = 5) -> tuple[ProphetVectorEnv, SyncVectorEnv]:
    native = ProphetVectorEnv(num_envs=num_envs, autoreset_mode=mode, **arguments)
    sync = SyncVectorEnv([lambda: ProphetEnv(**arguments)] * num_envs, autoreset_mode=mode)
    assert native.observation_space == sync.observation_space and native.action_space == sync.action_space
    assert native.metadata == sync.metadata
    return native, sync


@pytest.mark.parametrize("reward_type", ["sparse", "probability"])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_equals_sync_vector_env(fake: dict[str, Any], mode: AutoresetMode, reward_type: str) -> None:
    native, sync = both({**fake, "reward_type": reward_type, "render_mode": "rgb_array"}, mode)
    assert data_equivalence(native.reset(seed=3), sync.reset(seed=3), exact=True)
    ends = np.zeros(2, int)
    for ours, theirs in zip(rollout(native, 20), rollout(sync, 20), strict=True):
        assert data_equivalence(ours, theirs, exact=True)
        assert data_equivalence(native.render(), sync.render(), exact=True)
        ends += ours[2].sum(), ours[3].sum()
    assert (ends > 2).all()  # both kinds of end were seen
    assert native.np_random_seed == sync.np_random_seed == (3, 4, 5, 6, 7)
    assert data_equivalence(native.reset(), sync.reset(), exact=True)
    assert data_equivalence(native.reset(options={"task": 1}), sync.reset(options={"task": 1}), exact=True)


def test_equals_sync_vector_env_with_reset_mask(fake: dict[str, Any]) -> None:
    native, sync = both(fake, AutoresetMode.DISABLED)
    assert data_equivalence(native.reset(seed=[9, 8, 7, 7, 7]), sync.reset(seed=[9, 8, 7, 7, 7]), exact=True)
    resets = 0
    for ours, theirs in zip(rollout(native, 20), rollout(sync, 20), strict=True):
        assert data_equivalence(ours, theirs, exact=True)
        done = ours[2] | ours[3]
        if done.any():
            seeds = [resets if i % 2 else None for i in range(5)]
            ours, theirs = (e.reset(seed=seeds, options={"reset_mask": done.copy(), "task": 2}) for e in (native, sync))
            assert data_equivalence(ours, theirs, exact=True)
            resets += 1
    assert resets > 2


def test_equals_sync_vector_env_on_the_real_models(real: dict[str, Any]) -> None:
    native, sync = both({**real, "max_chunks": 2}, AutoresetMode.NEXT_STEP, num_envs=3)
    assert data_equivalence(native.reset(seed=3), sync.reset(seed=3))
    for ours, theirs in zip(rollout(native, 5), rollout(sync, 5), strict=True):
        grey_levels = np.abs(ours[0].pop("image").astype(int) - theirs[0].pop("image"))
        assert grey_levels.max() <= 1  # rounding of a batched float32 product
        for infos in (ours[4], theirs[4]):
            infos.pop("frames", None)
        assert data_equivalence(ours, theirs)


def test_a_suite_that_the_world_model_was_not_trained_on_warns(starts: str) -> None:
    models = {
        "world_model": ProphetPipeline.tiny_random(),
        "reward_model": FakeRewardModel(2.0),
        "start_states": starts,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = ProphetVectorEnv(suite="libero_object", **models)
    with pytest.warns(UserWarning, match=r"not trained on 'libero_spatial' \(but on \['libero_object'\]\)"):
        ProphetVectorEnv(suite="libero_spatial", **models)
    with pytest.warns(UserWarning, match="not trained on 'libero_spatial'"):
        envs.reset(options={"suite": "libero_spatial"})


def test_a_suite_that_the_judge_was_not_calibrated_on_warns(fake: dict[str, Any]) -> None:
    judge = FakeRewardModel({"libero_object": 2.0})  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = ProphetVectorEnv(**fake | {"suite": "libero_object", "reward_model": judge})
    with pytest.warns(UserWarning, match=r"The judge knows \['libero_object'\] and not 'libero_spatial'"):
        envs.reset(options={"suite": "libero_spatial"})


def test_what_is_seen_is_what_the_world_model_replays(starts: str) -> None:
    """Two suites with cameras and robots of their own, two sampling steps: each env as the pipeline by itself."""
    world = ProphetPipeline.tiny_random(robots=2)
    one, other = ([[focal, 0, 48, 10], [0, focal, 48, 20], [0, 0, 1, 1]] for focal in (60.0, 90.0))
    world.register_to_config(
        cameras={"libero_object": one, "libero_spatial": other},
        robots=[["panda", ["libero_object"]], ["sawyer", ["libero_spatial"]]],
    )
    torch.nn.init.normal_(world.transformer.action_frame_in.weight, std=0.1)
    envs = ProphetVectorEnv(
        num_envs=2, start_states=starts, world_model=world, reward_model=FakeRewardModel(2.0), num_sampling_steps=2
    )
    suites = ["libero_object", "libero_spatial"]
    observation, _ = envs.reset(seed=5, options={"suite": suites})
    first = {name: values.copy() for name, values in observation.items()}
    noise = [torch.Generator().manual_seed(0) for _ in suites]
    for generator, state in zip(noise, envs.get_state()["noise"], strict=True):
        generator.set_state(state)
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(3)]
    for chunk in actions:
        observation, *_ = envs.step(chunk)
    frames, poses = world.replay(
        first["image"], torch.from_numpy(first["proprio"]), torch.from_numpy(np.concatenate(actions, axis=1)), suites,
        noise, num_inference_steps=2,
    )  # fmt: skip
    np.testing.assert_array_equal(np.stack(envs.clips()), frames.numpy())
    np.testing.assert_allclose(observation["proprio"], poses[:, -1].numpy(), atol=1e-6)


def test_disabled_autoreset_wants_a_reset(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=2, autoreset_mode="Disabled", **{**fake, "max_chunks": 1})
    envs.reset(seed=0)
    list(rollout(envs, 1))
    with pytest.raises(gym.error.ResetNeeded, match=r"envs \[0, 1\] are over"):
        list(rollout(envs, 1))
    envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gym.error.ResetNeeded, match=r"envs \[1\] are over"):
        list(rollout(envs, 1))


# --- rewards, ends, infos ---------------------------------------------------------------------------------------------


def test_sparse_reward_is_one_at_success_only(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=8, **fake)
    envs.reset(seed=0)
    for _, rewards, terminated, truncated, infos in rollout(envs, 12):
        np.testing.assert_array_equal(rewards, terminated)
        np.testing.assert_array_equal(infos["is_success"], terminated)
        assert not (terminated & truncated).any()


def test_probability_rewards_sum_to_the_increase(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(
        num_envs=8, reward_type="probability", **{**fake, "reward_model": FakeRewardModel(threshold=2.0)}
    )
    _, infos = envs.reset(seed=0)
    first, total = infos["success_probability"], np.zeros(8)
    for step in rollout(envs, 4):
        total += step[1]
        assert not step[2].any()
    assert step[3].all()
    np.testing.assert_allclose(total, step[4]["success_probability"] - first)


def test_infos_and_clips_show_the_whole_video(fake: dict[str, Any]) -> None:
    env = ProphetEnv(
        **{**fake, "reward_model": FakeRewardModel(threshold=2.0)}, task=1, split="val", render_mode="rgb_array"
    )
    obs, info = env.reset(seed=5)
    assert "frames" not in info and not info["is_success"]
    assert {k: info[k] for k in ("suite", "task", "init_state", "seed")} == {
        "suite": "libero_object", "task": 1, "init_state": 40, "seed": 5
    }  # fmt: skip
    assert info["instruction"] == INSTRUCTIONS[1]
    video = [obs["image"][None]]
    for _ in range(4):
        obs, *_, info = env.step(env.action_space.sample())
        assert info["frames"].shape == (2, 96, 96, 3)
        np.testing.assert_array_equal(info["frames"][-1], obs["image"])
        np.testing.assert_array_equal(env.render(), obs["image"])
        video.append(info["frames"])
    np.testing.assert_array_equal(env.clip(), np.concatenate(video))


# --- seeds, noise, groups, state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [2, 7])
def test_a_video_does_not_depend_on_the_envs_beside_it(real: dict[str, Any], num_envs: int) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 8, 7)).astype(np.float32)

    def video(count: int, place: int) -> NDArray[np.uint8]:
        envs = ProphetVectorEnv(num_envs=count, **real)
        envs.reset(seed=[17 if i == place else 100 + i for i in range(count)])
        for step in range(4):
            others = np.random.default_rng([count, step]).uniform(-1, 1, (count, 8, 7)).astype(np.float32)
            others[place] = actions[step]
            envs.step(others)
        return envs.clips()[place]

    alone, beside = video(1, 0).astype(int), video(num_envs, num_envs - 1).astype(int)
    assert alone.shape == (9, 96, 96, 3) and np.ptp(alone[1:] - alone[0]) > 0
    # The noise is the same bit for bit; a batched float32 product may round differently, and a pixel move by one level.
    assert np.abs(alone - beside).max() <= 1


def test_same_seed_same_video_other_seed_other_video(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=3, **fake)
    videos = []
    for seed in (1, 1, 2):
        envs.reset(seed=seed)
        list(rollout(envs, 2))
        videos.append(envs.clips())
    assert data_equivalence(tuple(videos[0]), tuple(videos[1]), exact=True)
    assert not data_equivalence(tuple(videos[0]), tuple(videos[2]), exact=True)


def test_the_reported_seed_replays_an_unseeded_env(fake: dict[str, Any]) -> None:
    env = ProphetEnv(**fake)
    obs, info = env.reset()
    again, info_again = ProphetEnv(**fake).reset(seed=info["seed"])
    assert data_equivalence((obs, info), (again, info_again), exact=True)
    assert env.reset()[1]["seed"] == info["seed"] == env.np_random_seed


def test_noise_leaves_the_order_of_the_starts_alone(fake: dict[str, Any]) -> None:
    """The stream of starts is np_random's: task, then initial state, whatever happens in the episodes."""
    envs = ProphetVectorEnv(num_envs=1, autoreset_mode="SameStep", **fake)
    rng = np.random.default_rng(np.random.SeedSequence(4))
    _, infos = envs.reset(seed=4)
    seen = [(infos["task"][0], infos["init_state"][0])]
    for *_, terminated, truncated, infos in rollout(envs, 20):
        if terminated[0] or truncated[0]:
            seen.append((infos["task"][0], infos["init_state"][0]))
    assert len(seen) > 4 and seen == [(rng.integers(3), rng.integers(3)) for _ in seen]


def test_equal_seeds_share_start_and_noise(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=4, **fake)
    envs.reset(seed=[5, 5, 6, 6])
    action = envs.single_action_space.sample()
    envs.step(np.stack([action] * 4))
    clips = envs.clips()
    np.testing.assert_array_equal(clips[0], clips[1])
    np.testing.assert_array_equal(clips[2], clips[3])
    assert (clips[0] != clips[2]).any()


def test_groups_share_the_start_and_not_the_noise(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=6, **fake)
    obs, infos = envs.reset(seed=0, options={"group_size": 3})
    for group in (slice(0, 3), slice(3, 6)):
        assert len(set(zip(*(infos[name][group] for name in ("task", "init_state", "member")), strict=True))) == 1
        assert (obs["image"][group] == obs["image"][group.start]).all()
    envs.step(np.zeros(envs.action_space.shape, np.float32))
    clips = envs.clips()
    assert (clips[0] != clips[1]).any()
    alone = ProphetVectorEnv(num_envs=2, **fake).reset(seed=[0, 3])[0]
    np.testing.assert_array_equal(obs["image"][[0, 3]], alone["image"])


def test_options_choose_the_start(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=2, task=0, **fake)
    _, infos = envs.reset(options={"suite": ["libero_spatial", None], "task": [2, None], "init_state": 1})
    assert infos["suite"].tolist() == ["libero_spatial", "libero_object"]
    assert infos["task"].tolist() == [2, 0] and infos["init_state"].tolist() == [1, 1]


def test_every_episode_is_one_members(fake: dict[str, Any]) -> None:
    """Drawn among the world model's, or chosen: the same start and actions, and another motion for another member."""
    envs = ProphetVectorEnv(num_envs=30, task=0, **fake)
    drawn = envs.reset(seed=0)[1]["member"]
    assert set(drawn) == {0, 1, 2}
    chosen = [0, 1, 2] * 10
    options = {"init_state": 0, "member": chosen}
    obs, infos = envs.reset(seed=0, options=options)
    assert infos["member"].tolist() == chosen
    obs, *_, infos = envs.step(np.full(envs.action_space.shape, 0.5, np.float32))
    assert infos["member"].tolist() == chosen
    assert (
        len(np.unique(obs["proprio"], axis=0)) == 3 and (obs["proprio"] == np.tile(obs["proprio"][:3], (10, 1))).all()
    )
    with pytest.raises(ValueError, match=r"Unknown member 3. Valid: None, which draws one, and \[0, 1, 2\]."):
        envs.reset(options={"member": 3})
    with pytest.raises(ValueError, match="member"):
        envs.reset(options={"group_size": 3, "member": chosen})
    with pytest.raises(ValueError, match="Unknown member -1"):
        ProphetVectorEnv(num_envs=1, member=-1, **fake)


def test_episodes_that_begin_by_themselves_are_drawn_members_or_the_chosen_one(fake: dict[str, Any]) -> None:
    for member, seen in ((None, {0, 1, 2}), (1, {1})):
        envs = ProphetVectorEnv(num_envs=4, autoreset_mode="SameStep", member=member, **fake)
        _, infos = envs.reset(seed=0)
        members, replayed = set(infos["member"].tolist()), []
        state = envs.get_state()
        for *_, infos in rollout(envs, 20):
            members |= set(infos["member"].tolist())
            replayed.append(infos["member"].tolist())
        assert members == seen and any(now != replayed[0] for now in replayed) == (member is None)
        envs.set_state(state)
        assert [infos["member"].tolist() for *_, infos in rollout(envs, 20)] == replayed


def test_a_user_start(fake: dict[str, Any]) -> None:
    start = {
        "image": np.full((2, 256, 256, 3), 7, np.uint8),
        "proprio": np.arange(16, dtype=np.float32).reshape(2, 8) / 16,
        "instruction": INSTRUCTIONS[:2],
    }
    envs = ProphetVectorEnv(num_envs=2, **fake)
    obs, infos = envs.reset(seed=0, options={"start": start})
    assert (obs["image"] == 7).all() and infos["instruction"].tolist() == INSTRUCTIONS[:2]
    np.testing.assert_array_equal(obs["proprio"], start["proprio"])
    assert infos["suite"].tolist() == ["user"] * 2 and infos["task"].tolist() == infos["init_state"].tolist() == [
        -1,
        -1,
    ]

    env = ProphetEnv(**fake)
    single = {name: value[1] for name, value in start.items()}
    one, _ = env.reset(seed=1, options={"start": single})
    assert data_equivalence(one, {name: value[1] for name, value in obs.items()}, exact=True)
    np.testing.assert_array_equal(
        env.step(np.ones((8, 7), np.float32))[0]["image"], envs.step(np.ones((2, 8, 7)))[0]["image"][1]
    )


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_state_is_restored_exactly(fake: dict[str, Any], mode: AutoresetMode) -> None:
    envs = ProphetVectorEnv(
        num_envs=4, autoreset_mode=mode, **{**fake, "reward_model": FakeRewardModel(threshold=0.97)}
    )
    envs.reset(seed=0)
    list(rollout(envs, 2))
    state = envs.get_state()
    steps = 1 if mode is AutoresetMode.DISABLED else 9
    once = [*rollout(envs, steps, seed=1), envs.reset(), envs.clips()]
    envs.set_state(state)
    again = [*rollout(envs, steps, seed=1), envs.reset(), envs.clips()]
    other = ProphetVectorEnv(
        num_envs=4, autoreset_mode=mode, **{**fake, "reward_model": FakeRewardModel(threshold=0.97)}
    )
    other.reset(seed=99)
    other.set_state(state)
    elsewhere = [*rollout(other, steps, seed=1), other.reset(), other.clips()]
    for results in zip(once, again, elsewhere, strict=True):
        assert data_equivalence(tuple(results[0]), tuple(results[1]), exact=True)
        assert data_equivalence(tuple(results[0]), tuple(results[2]), exact=True)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_paused_envs_stay_as_they_are(fake: dict[str, Any], mode: AutoresetMode) -> None:
    """The others go on as if nothing had happened, and so does a paused env once it is let go."""
    arguments = {**fake, "autoreset_mode": mode, "reward_model": FakeRewardModel(threshold=2.0)}
    envs, untouched = (ProphetVectorEnv(num_envs=3, **arguments) for _ in range(2))
    start, _ = envs.reset(seed=0)
    untouched.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 3, 8, 7)).astype(np.float32)
    wrong = actions[0].copy()
    wrong[1] = np.nan  # not looked at
    for rows in ([1, 0], np.zeros(envs.num_envs, np.int64), np.zeros(envs.num_envs + 1, np.bool_)):
        with pytest.raises(ValueError, match="paused must be bool of shape"):
            envs.paused = rows  # type: ignore[assignment]
    envs.paused[1] = True
    obs, rewards, terminated, truncated, _ = envs.step(wrong)
    expected, *_ = untouched.step(actions[0])
    assert rewards[1] == 0 and not terminated[1] and not truncated[1]
    for name in obs:
        assert np.array_equal(obs[name][1], start[name][1])
        assert np.array_equal(obs[name][[0, 2]], expected[name][[0, 2]])
    envs.paused[:] = False
    now, *_ = envs.step(actions[0])
    assert np.array_equal(now["image"][1], expected["image"][1])


def test_state_on_the_real_models(real: dict[str, Any]) -> None:
    env = ProphetEnv(**real)
    env.reset(seed=0)
    action = env.action_space.sample()
    env.step(action)
    state = env.get_state()
    once = env.step(action)
    env.set_state(state)
    assert data_equivalence(once, env.step(action), exact=True)


def test_state_of_another_shape_is_refused(fake: dict[str, Any]) -> None:
    never = FakeRewardModel(threshold=2.0)
    envs, fewer = (ProphetVectorEnv(num_envs=n, **fake) for n in (3, 2))
    with pytest.raises(gym.error.ResetNeeded, match="before the first reset"):
        envs.get_state()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        fewer.set_state(envs.get_state())
    longer, shorter = (ProphetVectorEnv(num_envs=1, **{**fake, "max_chunks": n, "reward_model": never}) for n in (4, 2))
    longer.reset(seed=0)
    for _ in range(2):
        longer.step(np.zeros((1, 8, 7), np.float32))
    with pytest.raises(ValueError, match="room for another chunk"):
        shorter.set_state(longer.get_state())


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------


def sb3_env(arguments: dict[str, Any], num_envs: int) -> ProphetVecEnv:
    return ProphetVecEnv(ProphetVectorEnv(num_envs=num_envs, autoreset_mode="SameStep", **arguments))


def test_equals_dummy_vec_env(fake: dict[str, Any]) -> None:
    arguments = {**fake, "render_mode": "rgb_array"}
    ours, dummy = sb3_env(arguments, 5), DummyVecEnv([lambda: ProphetEnv(**arguments)] * 5)
    rng = np.random.default_rng(0)
    for venv in (ours, dummy):
        venv.seed(11)
        venv.set_options([{"task": i % 3} for i in range(5)])
    assert data_equivalence(dict(ours.reset()), dict(dummy.reset()), exact=True)
    finished = 0
    for _ in range(12):
        actions = rng.uniform(-1, 1, (5, 8, 7)).astype(np.float32)
        (obs, *rest), (dummy_obs, *dummy_rest) = ours.step(actions), dummy.step(actions)
        assert data_equivalence((dict(obs), *rest[:2]), (dict(dummy_obs), *dummy_rest[:2]), exact=True)
        for info, dummy_info in zip(rest[2], dummy_rest[2], strict=True):
            assert data_equivalence(info, dummy_info, exact=True)
            assert all(type(info[name]) is type(dummy_info[name]) for name in info)
        finished += rest[1].sum()
        assert all(
            data_equivalence(*pair, exact=True) for pair in zip(ours.reset_infos, dummy.reset_infos, strict=True)
        )
    assert finished > 5
    np.testing.assert_array_equal(ours.render(), dummy.render())
    for venv in (ours, dummy):
        venv.set_attr("label", "a", indices=[1, 2])
    for name in ("render_mode", "action_space", "observation_space"):
        assert ours.get_attr(name) == dummy.get_attr(name)
    assert ours.metadata == dummy.metadata and ours.metadata["render_fps"] == 2.5
    assert ours.get_attr("label", [1, 2]) == dummy.get_attr("label", [1, 2]) == ["a", "a"]
    assert not ours.has_attr("label") and not dummy.has_attr("label")
    assert ours.get_attr("np_random_seed", 3) == dummy.get_attr("np_random_seed", 3) == [14]
    assert data_equivalence(
        tuple(ours.env_method("clip", indices=[0, 4])), tuple(dummy.env_method("clip", indices=[0, 4])), exact=True
    )
    assert ours.env_is_wrapped(gym.Wrapper, [0, 1]) == dummy.env_is_wrapped(gym.Wrapper, [0, 1]) == [False, False]


def test_seed_and_options_act_at_the_next_reset_only(fake: dict[str, Any]) -> None:
    venv = sb3_env(fake, 4)
    venv.seed(5)
    venv.reset()
    venv.seed(0)
    venv.set_options({"group_size": 2, "init_state": 1})
    dones = np.zeros(4, bool)
    while not dones.any():  # an autoreset takes neither
        dones = venv.step(np.zeros((4, 8, 7), np.float32))[2]
    assert [info["seed"] for info in venv.reset_infos] == [5, 6, 7, 8]
    assert {info["init_state"] for info in venv.reset_infos} != {1}
    venv.reset()
    assert [info["seed"] for info in venv.reset_infos] == [0, 1, 2, 3]
    assert {info["init_state"] for info in venv.reset_infos} == {1}
    assert venv.reset_infos[0]["task"] == venv.reset_infos[1]["task"]
    assert venv._seeds == [None] * 4 and venv._options == [{}] * 4


def test_groups_by_equal_seeds(fake: dict[str, Any]) -> None:
    venv = sb3_env(fake, 4)
    VecMonitor(venv).unwrapped._seeds = [3, 3, 9, 9]
    obs = venv.reset()
    assert isinstance(obs, dict)
    np.testing.assert_array_equal(obs["image"][::2], obs["image"][1::2])


def test_vec_env_errors(fake: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='autoreset_mode="SameStep"'):
        ProphetVecEnv(ProphetVectorEnv(num_envs=2, **fake))
    with pytest.raises(TypeError, match="got ProphetEnv"):
        ProphetVecEnv(ProphetEnv(**fake))  # type: ignore[arg-type]
    venv = sb3_env(fake, 2)
    venv.set_options({"tsk": 1})
    with pytest.raises(ValueError, match="Unknown reset options"):
        venv.reset()
    venv.reset()  # wrong options are forgotten
    with pytest.raises(ValueError, match="belongs to all 2 envs"):
        venv.set_attr("max_chunks", 3, indices=0)
    with pytest.raises(AttributeError, match="No per-env method 'get_state'"):
        venv.env_method("get_state")
    with pytest.raises(gym.error.ResetNeeded, match="step_async"):
        venv.step_wait()


@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "SAC", "TD3"])
def test_sb3_algorithms_train_save_and_load(fake: dict[str, Any], tmp_path: Path, algorithm: str) -> None:
    venv = VecMonitor(sb3_env(fake, 4), info_keywords=("is_success",))
    arguments: dict[str, Any] = {"PPO": {"n_steps": 32, "batch_size": 64, "n_epochs": 1}, "A2C": {"n_steps": 16}}.get(
        algorithm, {"learning_starts": 64, "buffer_size": 256, "batch_size": 16, "gradient_steps": 1, "train_freq": 8}
    )
    cls = getattr(sb3, algorithm)
    model = cls("MultiInputPolicy", venv, **arguments, policy_kwargs={"net_arch": [16]}, seed=0, device="cpu")
    model.learn(256)
    assert model.num_timesteps >= 256
    obs = venv.reset()
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=venv, device="cpu")
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


# --- beside the real simulator ---------------------------------------------------------------------------------------


@pytest.mark.libero
def test_a_policy_and_a_seed_move_between_the_real_and_the_imagined_env(fake: dict[str, Any], tmp_path: Path) -> None:
    real_env = gym.make("LIBERO-v0", task=0, split="val")
    write_start_states(start_states_from_env(real_env, [0], range(40, 45)), tmp_path / "starts.parquet")
    imagined = ProphetEnv(**{**fake, "start_states": tmp_path / "starts.parquet"}, task=0, split="val")
    assert imagined.observation_space == real_env.observation_space
    assert imagined.action_space == real_env.action_space
    for seed in (0, None, None, 1):
        (obs, info), (real_obs, real_info) = imagined.reset(seed=seed), real_env.reset(seed=seed)
        assert data_equivalence(obs, real_obs, exact=True)
        assert info.keys() - {"member"} == real_info.keys() and info["init_state"] == real_info["init_state"]
        assert info["instruction"] == real_info["instruction"]
    action = np.zeros((8, 7), np.float32)
    assert imagined.step(action)[4].keys() - {"member"} == real_env.step(action)[4].keys()
    real_env.close()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(starts: str) -> ProphetVectorEnv:
    envs = ProphetVectorEnv(
        num_envs=2,
        start_states=starts,
        world_model=FakeWorldModel(),
        reward_model=FakeRewardModel(threshold=2.0),
        max_chunks=1000,
    )
    envs.reset(seed=0)
    return envs


@settings(max_examples=60)
@given(
    value=st.floats(width=32),
    dtype=st.sampled_from([np.float32, np.float64]),
    index=st.tuples(st.integers(0, 1), st.integers(0, 7), st.integers(0, 6)),
)
def test_actions_are_taken_or_refused_never_clipped(
    started: ProphetVectorEnv, value: float, dtype: Any, index: tuple[int, ...]
) -> None:
    actions = np.zeros(started.action_space.shape, dtype)
    actions[index] = value
    if abs(value) <= 1 + 1e-6:
        started.step(actions)
    else:
        before = started.clips()
        with pytest.raises(ValueError, match=rf"finite and within \[-1, 1\]; envs \[{index[0]}\]"):
            started.step(actions)
        assert data_equivalence(tuple(before), tuple(started.clips()), exact=True)


@given(shape=st.lists(st.integers(1, 8), max_size=4).map(tuple).filter(lambda shape: shape != (2, 8, 7)))
def test_actions_of_another_shape_are_refused(started: ProphetVectorEnv, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 8, 7\), got float32"):
        started.step(np.zeros(shape, np.float32))


def test_actions_that_are_not_numbers_are_refused(started: ProphetVectorEnv) -> None:
    for actions in (None, np.full((2, 8, 7), "a"), np.zeros((2, 8, 7), bool), np.zeros((2, 8, 7), complex)):
        with pytest.raises(ValueError, match="must be numbers"):
            started.step(actions)  # type: ignore[arg-type]


def test_the_least_int8_is_no_action(started: ProphetVectorEnv) -> None:
    with pytest.raises(ValueError, match=r"largest magnitudes \[128.0, 128.0\]"):
        started.step(np.full((2, 8, 7), -128, np.int8))  # type: ignore[arg-type]


def test_a_mask_that_was_given_stays_the_callers(started: ProphetVectorEnv) -> None:
    mask = np.array([True, False])
    started.paused = mask
    mask[:] = False
    assert started.paused.tolist() == [True, False]
    started.paused = mask


def test_an_action_that_a_reset_ignores_is_not_judged(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=1, **{**fake, "max_chunks": 1})
    envs.reset(seed=0)
    assert envs.step(np.zeros((1, 8, 7), np.float32))[3].all()
    envs.step(np.full((1, 8, 7), np.nan, np.float32))


def test_step_before_reset(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=2, render_mode="rgb_array", **fake)
    for too_early in (envs.render, envs.clips):
        with pytest.raises(gym.error.ResetNeeded, match="before the first reset"):
            too_early()
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        envs.step(np.zeros((2, 8, 7), np.float32))
    with pytest.raises(gym.error.ResetNeeded, match="first reset"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="one per env"):
        envs.reset(seed=[1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"suite": "libero_objects"}, ValueError, "Unknown suite 'libero_objects'. Valid suites"),
        ({"task": 12}, ValueError, "Unknown task 12.*\n  0  pick_up_the_alphabet_soup"),
        ({"task": "pick"}, ValueError, "Unknown task 'pick'"),
        ({"split": "training"}, ValueError, "Unknown split 'training'"),
        ({"max_chunks": 0}, ValueError, "max_chunks must be a positive int"),
        ({"num_sampling_steps": 1.5}, ValueError, "num_sampling_steps must be a positive int"),
        ({"reward_type": "dense"}, ValueError, r"Unknown reward_type 'dense'. Valid: \['sparse', 'probability'\]"),
        ({"render_mode": "human"}, ValueError, r"Unknown render_mode 'human'. Valid: \[None, 'rgb_array'\]"),
        ({"world_model": object()}, TypeError, r"object cannot be used here: it has no \['init_history'"),
        ({"reward_model": object()}, TypeError, r"it has no \['score', 'threshold'\]"),
        (
            {"world_model": "prophet-huge"},
            FileNotFoundError,
            "No world model 'prophet-huge'.*shipped names.*Nothing is downloaded",
        ),
        ({"reward_model": "nobody"}, FileNotFoundError, "No reward model 'nobody'"),
        ({"device": "cpu"}, ValueError, "call its .to"),
        ({"dtype": "bfloat16"}, ValueError, "call its .to"),
        ({"start_states": "nowhere.parquet"}, FileNotFoundError, "nowhere.parquet"),
    ],
)
def test_bad_arguments(fake: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProphetEnv(**{**fake, **arguments})


def test_a_reset_that_fails_changes_nothing(fake: dict[str, Any]) -> None:
    """Neither the seeds, nor the episode, nor its instruction, whatever it is that fails."""
    env = ProphetEnv(**fake)
    obs, info = env.reset(seed=3)
    image, proprio = np.zeros((96, 96, 3), np.uint8), np.zeros(8, np.float32)
    start = {"image": image, "proprio": proprio, "instruction": "sing"}  # a sentence beyond the shipped table
    for options, error in (({"task": 99}, ValueError), ({"start": start}, ImportError)):
        with (
            patch("prophet_gym.envs.start_states.embed_instructions", side_effect=ImportError),
            pytest.raises(error),
        ):
            env.reset(seed=7, options=options)
        assert env.np_random_seed == 3
        np.testing.assert_array_equal(env.clip()[0], obs["image"])
    after, _, _, _, later = env.step(np.zeros((8, 7), np.float32))
    assert later["instruction"] == info["instruction"] and later["seed"] == 3
    twin = ProphetEnv(**fake)
    twin.reset(seed=3)
    assert data_equivalence(after, twin.step(np.zeros((8, 7), np.float32))[0], exact=True)
    assert data_equivalence(env.reset()[0], twin.reset()[0], exact=True)


def test_a_reset_that_fails_in_a_later_env_leaves_the_random_streams_alone(fake: dict[str, Any]) -> None:
    envs, twin = (ProphetVectorEnv(num_envs=2, **fake) for _ in range(2))
    for one in (envs, twin):
        one.reset(seed=3)
    with pytest.raises(ValueError, match="Unknown task 99"):
        envs.reset(options={"task": [None, 99]})
    assert data_equivalence(envs.reset(), twin.reset(), exact=True)


def test_the_random_stream_can_be_read_and_set_before_the_first_reset(fake: dict[str, Any]) -> None:
    env, other = ProphetEnv(**fake), ProphetEnv(**fake)
    seed = env.np_random_seed
    assert env.reset()[1]["seed"] == seed
    for one in (env, other):
        one.np_random = np.random.default_rng(5)
    assert env.np_random_seed == -1
    starts = [
        [(info["task"], info["init_state"]) for _, info in (one.reset() for _ in range(8))] for one in (env, other)
    ]
    assert starts[0] == starts[1] and len(set(starts[0])) > 1


def test_numpy_numbers_are_numbers(fake: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=np.int64(2), **{**fake, "max_chunks": np.int32(3)})  # type: ignore[arg-type]
    assert envs.reset(seed=np.int64(4))[1]["seed"].tolist() == [4, 5]  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integer"):
        envs.reset(seed=[0.9, 1.9])  # type: ignore[list-item]
    assert envs.reset(seed=np.arange(6, 8))[1]["seed"].tolist() == [6, 7]  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [2**63, 2**63 - 1, -1, [0, 2**100]])
def test_seeds_that_infos_cannot_tell_are_refused_before_anything_changes(fake: dict[str, Any], seed: Any) -> None:
    envs = ProphetVectorEnv(num_envs=2, **fake)
    before, _ = envs.reset(seed=3)
    with pytest.raises(ValueError, match="Seeds must be in 0"):
        envs.reset(seed=seed)
    assert envs.np_random_seed == (3, 4) and data_equivalence(envs._observations(), before, exact=True)


def test_make_vec_env_of_sb3_without_video(real: dict[str, Any]) -> None:
    """It asks for a render mode first."""
    arguments = {**real, "video": False}
    venv = make_vec_env("Prophet-LIBERO-v0", n_envs=2, env_kwargs=arguments)
    assert "image" not in venv.reset()


def test_bad_autoreset_mode(fake: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"Unknown autoreset_mode 'sometimes'. Valid: \['NextStep', 'SameStep', 'Disabled'\]"
    ):
        ProphetVectorEnv(num_envs=2, autoreset_mode="sometimes", **fake)


def test_a_typo_in_an_argument_is_an_error(fake: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="max_chunk"):
        gym.make("Prophet-LIBERO-v0", **{k: v for k, v in fake.items() if k == "start_states"}, max_chunk=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": "float8"}, "Unknown dtype 'float8'. Valid"), ({"device": "gpu"}, "Unknown device 'gpu'")],
)
def test_bad_placement(real: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProphetEnv(**real, **arguments)


def test_a_checkpoint_that_was_written_again_is_read_again(real: dict[str, Any], tmp_path: Path) -> None:
    for seed in (0, 1):
        pipeline = ProphetPipeline.tiny_random(seed)
        pipeline.save_pretrained(tmp_path / "pipeline")
        world = ProphetVectorEnv(**{**real, "world_model": tmp_path / "pipeline"}).world_model
        assert torch.equal(world.vae.encoder[1].weight, pipeline.vae.encoder[1].weight)  # type: ignore[attr-defined]


def test_a_pipeline_in_bfloat16_keeps_its_proprioception(real: dict[str, Any], tmp_path: Path) -> None:
    original = ProphetPipeline.tiny_random()
    original.save_pretrained(tmp_path / "pipeline")
    for pipeline in (
        ProphetPipeline.tiny_random().to(torch.bfloat16),
        ProphetPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.bfloat16),
    ):
        assert pipeline.transformer.dtype == torch.bfloat16
        for name, weight in original.proprioception.state_dict().items():
            assert torch.equal(weight, pipeline.proprioception.state_dict()[name]), name
        env = ProphetEnv(**{**real, "world_model": pipeline})
        env.reset(seed=0)
        env.step(np.zeros((8, 7), np.float32))


def test_a_pipeline_that_is_moved_to_bfloat16_does_not_round_its_proprioception() -> None:
    moved, first = ProphetPipeline.tiny_random().to(torch.bfloat16), ProphetPipeline.tiny_random()
    weights = zip(moved.proprioception.parameters(), first.proprioception.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_start_states_of_another_image_size(fake: dict[str, Any], tmp_path: Path) -> None:
    start = StartState("s", 0, "t", "t", 0, "train", np.zeros(8, np.float32), np.zeros((64, 64, 3), np.uint8))
    write_start_states([start], tmp_path / "small.parquet")
    with pytest.raises(ValueError, match="64 pixels a side and this world model works at 96"):
        ProphetEnv(**{**fake, "start_states": tmp_path / "small.parquet", "suite": "s"})


class BrokenWorldModel(FakeWorldModel):
    """Returns NaN for the last row of its state or of its history."""

    def __init__(self, broken: str) -> None:
        super().__init__()
        self.broken = broken

    def imagine(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        chunk = super().imagine(*args, **kwargs)
        getattr(chunk, self.broken)[-1] = torch.nan
        return chunk


@pytest.mark.parametrize("broken", ["state", "history"])
def test_a_world_model_that_returns_nan_is_not_believed(fake: dict[str, Any], broken: str) -> None:
    envs = ProphetVectorEnv(num_envs=2, **{**fake, "world_model": BrokenWorldModel(broken)})
    envs.reset(seed=0)
    with pytest.raises(FloatingPointError, match=r"envs \[1\]"):
        envs.step(np.zeros((2, 8, 7), np.float32))


@pytest.mark.parametrize("verdict", [np.float32(np.nan), np.float32([0.5, np.nan]), np.float32([0.5, 1.5]), 0.5])
def test_a_judge_that_returns_no_probabilities_is_not_believed(fake: dict[str, Any], verdict: Any) -> None:
    class BrokenJudge(FakeRewardModel):
        def score(self, *arguments: Any) -> Any:
            return verdict

    envs = ProphetVectorEnv(num_envs=2, **{**fake, "reward_model": BrokenJudge()})
    with pytest.raises(ValueError, match=r"must return 2 probabilities in \[0, 1\]"):
        envs.reset(seed=0)


@pytest.mark.parametrize("kind", ["world_model", "reward_model"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_weights_are_refused_by_name(
    starts: str, saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: str
) -> None:
    source, copy = Path(saved[kind]), tmp_path / "copy"
    for file in source.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(source)).write_bytes(file.read_bytes())
    weights = sorted(copy.rglob("*.safetensors"))
    if damage == "missing":
        for file in weights:
            file.unlink()
        error, message = FileNotFoundError, r"copy has no \*\.safetensors file"
    else:
        data = weights[-1].read_bytes()
        weights[-1].write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\xff" * len(data))
        error, message = ValueError, rf"weights file .*{weights[-1].name} is damaged or truncated"  # type: ignore[assignment]
    with pytest.raises(error, match=message):
        ProphetEnv(start_states=starts, **{**saved, kind: str(copy)})


def test_weights_of_another_version_are_refused(starts: str, saved: dict[str, Any], tmp_path: Path) -> None:
    pipeline = ProphetPipeline.from_pretrained(saved["world_model"])
    pipeline.save_pretrained(tmp_path / "old")
    (file,) = (tmp_path / "old" / "proprioception").glob("*.safetensors")
    save_file({name.removeprefix("members.0."): value for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"lack weights of \['proprioception'\]: they were saved by another version"):
        ProphetEnv(start_states=starts, **{**saved, "world_model": str(tmp_path / "old")})


def test_a_judge_of_another_version_is_refused(starts: str, saved: dict[str, Any], tmp_path: Path) -> None:
    SuccessClassifier.from_pretrained(saved["reward_model"]).save_pretrained(tmp_path / "old")
    (file,) = (tmp_path / "old").glob("*.safetensors")
    weights = load_file(file)
    first = "motion.sequence_in.0.weight"
    weights[first] = weights[first][:, :18].contiguous()  # without a view
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"judge in .*old does not fit: it was saved by another version"):
        ProphetEnv(start_states=starts, **{**saved, "reward_model": str(tmp_path / "old")})


def test_a_folder_without_a_model(starts: str, saved: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a saved world model: it lacks model_index\.json"):
        ProphetEnv(start_states=starts, **{**saved, "world_model": str(tmp_path)})


def test_models_are_loaded_once_per_process(real: dict[str, Any]) -> None:
    first, second = ProphetEnv(**real).envs, ProphetVectorEnv(num_envs=2, **real)
    assert first.world_model is second.world_model and first.reward_model is second.reward_model
    assert ProphetEnv(**real, dtype="bfloat16").envs.world_model is not first.world_model


def test_any_dtype(real: dict[str, Any]) -> None:
    envs = ProphetVectorEnv(num_envs=2, dtype="bfloat16", **real)
    envs.reset(seed=0)
    for obs, *_ in rollout(envs, 2):
        assert obs in envs.observation_space
