"""What is in the wheel: it loads offline within seconds, and does what the README says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import prophet_gym
from fagrpo import FAGRPO, FlowPolicy
from fagrpo.cli import main as fagrpo_main
from prophet_gym.data.episode import SPLITS
from prophet_gym.envs.models import WEIGHTS, load_world_model
from prophet_gym.evaluation.eval_callback import ProphetEvalCallback
from prophet_gym.evaluation.policy_success import evaluate_in_prophet, starts_of

MIB = 2**20


def test_the_weights_keep_to_their_size() -> None:
    sizes = [file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()]
    assert max(sizes) <= 16 * MIB and sum(sizes) <= 40 * MIB


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_default_environment_passes_both_checkers() -> None:
    check_env(gym.make("Prophet-LIBERO-v0", render_mode="rgb_array").unwrapped, skip_render_check=False)
    sb3_check_env(gym.make("Prophet-LIBERO-v0").unwrapped)


def test_the_arm_follows_the_actions() -> None:
    """Opposite commands drive the imagined arm to opposite sides, in the picture and in the proprioception."""
    envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=2, split="val")
    start, _ = envs.reset(seed=[0, 0], options={"task": 3, "init_state": 40})
    np.testing.assert_array_equal(start["image"][0], start["image"][1])
    chunk = np.zeros((2, 8, 7), np.float32)
    chunk[..., 6] = -1
    chunk[0, :, 1], chunk[1, :, 1] = 0.8, -0.8
    for _ in range(3):
        observation, *_ = envs.step(chunk)
    sideways = observation["proprio"][:, 1] - start["proprio"][:, 1]
    assert sideways[0] > 0.05 and sideways[1] < -0.05
    changed = np.abs(observation["image"].astype(int) - start["image"]).max(-1) > 40
    columns = [np.argwhere(mask)[:, 1].mean() for mask in changed]
    assert abs(columns[0] - columns[1]) > 5 and changed.mean() < 0.5


def test_in_bfloat16_the_video_is_nearly_the_same() -> None:
    """It takes other paths through the networks (`autoencoder._GroupNorm`)."""
    images = []
    for dtype in ("float32", "bfloat16"):
        envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=2, dtype=dtype, device="cpu")
        envs.reset(seed=0)
        envs.action_space.seed(0)
        images.append(envs.step(envs.action_space.sample())[0]["image"].astype(float))
    assert 0 < np.abs(images[0] - images[1]).mean() < 0.1


def test_the_shipped_prophet_knows_three_robots() -> None:
    """Sawyer and Fetch have no say in their hand's orientation; the Panda has."""
    pipeline = load_world_model("prophet-libero-tiny", "cpu")
    assert {name for name, _ in pipeline.config.robots} == {"panda", "sawyer", "fetch"}
    assert pipeline.config.cameras.keys() >= {suite for _, suites in pipeline.config.robots for suite in suites}
    image = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    image[1] = image[0]
    actions = torch.full((2, 8, 7), 0.3)
    actions[1, :, 3:6] = -0.3
    for suite, turns in (("libero_spatial", True), ("metaworld", False), ("fetch", False)):
        noise = [torch.Generator().manual_seed(0) for _ in range(2)]
        frames, _ = pipeline.replay(image, torch.zeros(2, 8), actions, [suite] * 2, noise)
        assert torch.equal(frames[0], frames[1]) != turns


def test_the_shipped_policy_acts() -> None:
    policy = FlowPolicy.from_safetensors(WEIGHTS / "flow-policy-libero")
    result = evaluate_in_prophet(policy, "libero_object", starts_of([0, 1], [40, 41]), max_chunks=2)
    assert len(result.success) == 4 and len(result.videos) == 2
    low, high = result.interval
    assert 0 <= low <= result.rate <= high <= 1


@pytest.mark.parametrize("world_model", ["prophet-libero-tiny", "prophet-libero-held-out"])
def test_the_post_trained_policy_succeeds_more_often_in_either_prophet(world_model: str) -> None:
    cloned, trained = (
        evaluate_in_prophet(
            FlowPolicy.from_safetensors(WEIGHTS / name),
            "libero_object",
            starts_of(range(10), SPLITS["val"]),
            video=False,
            deterministic=True,
            world_model=world_model,
        )
        for name in ("flow-policy-libero-40", "flow-policy-libero-object-rl")
    )
    assert len(trained.success) == 50 and trained.rate > cloned.rate + 0.15
    assert trained.expected_rate > cloned.expected_rate + 0.15


def test_the_held_out_prophet_moves_by_weights_of_its_own() -> None:
    one, other = (load_world_model(f"prophet-libero-{name}", "cpu") for name in ("tiny", "held-out"))
    assert (
        not other.has_video and one.config.cameras == other.config.cameras and one.config.robots == other.config.robots
    )
    images, proprio = np.full((1, 96, 96, 3), 90, np.uint8), one.proprioception.proprio_mean[:1].clone()
    (left, _), (right, _) = (
        prophet.imagine_motion(prophet.init_state(proprio), torch.full((1, 8, 7), 0.3), images, ["libero_object"])
        for prophet in (one, other)
    )
    # In the air both know the way, each to its own digits.
    assert not torch.equal(left, right) and (left - right)[..., :3].norm(dim=-1).max() < 0.01


@pytest.mark.filterwarnings("error:The ratio of new to old")
def test_fagrpo_trains_the_shipped_blind_policy_without_video(tmp_path: Path) -> None:
    policy = FlowPolicy.from_safetensors(WEIGHTS / "flow-policy-libero-40")
    envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=8, video=False, max_chunks=4, autoreset_mode="SameStep")
    # Of whole episodes so short none succeeds: the increase of the probability differs within a group.
    envs.unwrapped.reward_type = "probability"
    model = FAGRPO(policy, prophet_gym.ProphetVecEnv(envs), learning_rate=1e-4, sde_window=4, max_episode_steps=4)
    model.learn(8 * 4 * 2)
    model.policy.export_safetensors(tmp_path)
    trained = FlowPolicy.from_safetensors(tmp_path)
    assert not torch.equal(trained.flow_head.project.weight, policy.flow_head.project.weight)
    starts = starts_of([0, 1], [40, 41])
    seen, felt = (evaluate_in_prophet(trained, "libero_object", starts, max_chunks=2, video=v) for v in (True, False))
    assert len(seen.success) == len(felt.success) == 4 and len(seen.videos) == 2 and not felt.videos


def test_held_out_evaluations_are_of_the_run_and_in_both_prophets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[ProphetEvalCallback] = []

    class Recorded(ProphetEvalCallback):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("prophet_gym.evaluation.eval_callback.ProphetEvalCallback", Recorded)
    command = ["train", "flow-policy-libero-40", "--no-video", "--suite", "libero_spatial", "--task", "3", "--quiet"]
    command += ["--max-chunks", "2", "--threshold", "balanced", "--num-envs", "8", "--steps", "16", "--device", "cpu"]
    command += ["--held-out", "prophet-libero-held-out", "--held-out-every", "7", "--out", str(tmp_path)]
    assert fagrpo_main(command) == 0
    assert [(one.name, one.env_arguments.get("world_model")) for one in made] == [
        ("held_out", "prophet-libero-held-out"),
        ("rewarding", None),
    ]
    for one in made:
        assert one.suite == "libero_spatial" and one.every == 7 and set(one.starts[:, 0]) == {3}
        assert one.env_arguments["max_chunks"] == 2 and "threshold" not in one.env_arguments
        assert [steps for steps, _ in one.history] == [0, 16]
    assert made[0].history[0][1].expected_rate != made[1].history[0][1].expected_rate


def test_the_command_trains_without_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(WEIGHTS / "flow-policy-libero-40"), "--no-video", "--suite", "libero_spatial", "--quiet"]
    command += ["--world-model", str(WEIGHTS / "prophet-libero-tiny"), "--reward-model", "reward-libero"]
    command += ["--num-envs", "16", "--steps", "100", "--out", str(tmp_path), "--device", "cpu"]
    assert fagrpo_main(command) == 0
    assert (tmp_path / "model.safetensors").stat().st_size > 1000
    # A second opinion changes nothing of what is learned, and stands in the log.
    learning = [*command[:-3], "alone", *command[-2:], "--reward-type", "probability", "--max-chunks", "4"]
    written = []
    for name, options in (("alone", []), ("asked", ["--held-out", "prophet-libero-held-out"])):
        learning[learning.index("--out") + 1] = str(tmp_path / name)
        assert fagrpo_main([*learning, *options]) == 0
        written.append(FlowPolicy.from_safetensors(tmp_path / name).state_dict())
    said = capsys.readouterr().out
    assert "held_out/" in said and "rewarding/" in said and "expected_rate" in said
    shipped = FlowPolicy.from_safetensors(WEIGHTS / "flow-policy-libero-40").state_dict()
    assert all(torch.equal(written[0][key], written[1][key]) for key in shipped)
    assert any(not torch.equal(written[0][key], shipped[key]) for key in shipped)
    for options, message in (
        (["--frame-stack", "2"], "without --frame-stack"),
        (["--env", "Pendulum-v1"], "with --no-video"),
    ):
        assert fagrpo_main([*learning, "--held-out", "prophet-libero-held-out", *options]) == 2
        assert message in capsys.readouterr().err
    seeing = [option for option in learning if option != "--no-video"]
    assert fagrpo_main([*seeing, "--held-out", "prophet-libero-held-out"]) == 2
    assert "with --no-video" in capsys.readouterr().err
    assert fagrpo_main([*learning, "--held-out", "none-such"]) == 2
    assert "'prophet-libero-held-out'" in capsys.readouterr().err
    # Another environment has no world model.
    other = ["train", command[1], "--env", "Pendulum-v1", "--num-envs", "8", "--out", str(tmp_path / "other")]
    assert fagrpo_main([*other, "--world-model", "prophet-libero-tiny"]) == 2
    assert "unexpected keyword argument 'world_model'" in capsys.readouterr().err
    # A policy that looks cannot be trained, or asked, there.
    command[1] = str(WEIGHTS / "flow-policy-libero")
    assert fagrpo_main([*command[:-3], str(tmp_path / "looking"), *command[-2:]]) == 2
    looking = FlowPolicy.from_safetensors(WEIGHTS / "flow-policy-libero")
    with pytest.raises(ValueError, match=r"the observation lacks \['image'\]"):
        evaluate_in_prophet(looking, "libero_object", starts_of([0], [40]), video=False)


def test_sb3_trains_on_the_shipped_world_model() -> None:
    envs = gym.make_vec("Prophet-LIBERO-v0", num_envs=4, autoreset_mode="SameStep")
    model = PPO("MultiInputPolicy", prophet_gym.ProphetVecEnv(envs), n_steps=4, batch_size=8, n_epochs=1)
    model.learn(32)
    assert model.num_timesteps == 32


@pytest.mark.slow
def test_the_quickstart(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "quickstart.py"
    arguments = ["--minutes", "0.5", "--num-envs", "8", "--repeats", "1", "--prophet-only", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(script), *arguments], check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["success"]["Prophet without video"]["before"]) == 200
    assert len(results["success"]["Prophet"]["after"]) == 50 and len(results["training_curve"]) >= 1
    for name in ("Prophet without video, deterministic", "held-out Prophet, deterministic"):
        assert len(results["success"][name]["after"]) == 50
    assert set(results["expected"]) == {"rewarding", "held_out"}
    for it in results["expected"].values():
        assert it["rollouts"][0] == 0 and it["rollouts"][-1] == len(results["training_curve"])
        assert len(it["rates"]) == len(it["rollouts"]) >= 2
    for name in ("learning_curve.png", "before_after_prophet.mp4", "policy/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000
