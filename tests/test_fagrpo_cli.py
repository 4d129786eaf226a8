"""The fagrpo command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv

from fagrpo import FAGRPO, FlowPolicy
from fagrpo.cli import build_parser, main
from prophet_gym.data.episode import Episode
from prophet_gym.data.lerobot_format import LeRobotWriter
from prophet_gym.envs.models import WEIGHTS


def test_training_writes_a_policy_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = PendulumEnv()
    head = {"width": 16, "hidden": 16, "num_blocks": 1}
    encoder = {"features_dim": 16, "vector_dim": 16}
    policy = FlowPolicy(
        env.observation_space,
        env.action_space,
        num_flow_steps=2,
        features_extractor_kwargs=encoder,
        flow_head_kwargs=head,
    )
    policy.export_safetensors(tmp_path / "sft")
    command = ["train", str(tmp_path / "sft"), "--env", "Pendulum-v1", "--out", str(tmp_path / "rl"), "--quiet"]
    command += ["--num-envs", "2", "--group-size", "2", "--checkpoint-every", "400", "--seed", "0", "--device", "cpu"]
    command += ["--sde-window", "2", "--target-kl", "0.5", "--ema-decay", "0.5"]
    assert main([*command, "--steps", "400"]) == 0
    first = FlowPolicy.from_safetensors(tmp_path / "rl")
    assert main([*command, "--steps", "800"]) == 0
    assert "Resuming" in capsys.readouterr().out
    second = FlowPolicy.from_safetensors(tmp_path / "rl")
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert np.isfinite(second.predict(env.observation_space.sample())[0]).all()
    assert main([*command, "--steps", "1200", "--learning-rate", "1e-3", "--seed", "1"]) == 2
    assert "belongs to a run with learning_rate 1e-05, seed 0, this one has" in capsys.readouterr().err
    second.export_safetensors(tmp_path / "other")
    command[1] = str(tmp_path / "other")
    assert main([*command, "--steps", "1200"]) == 2
    assert "belongs to a run with policy " in capsys.readouterr().err
    (tmp_path / "rl" / "run.json").unlink()
    assert main([*command, "--steps", "1200"]) == 2
    assert "no run.json" in capsys.readouterr().err

    checkpoints = [str(tmp_path / "rl" / f"checkpoint_{steps}_steps.zip") for steps in (400, 800)]
    assert main(["average", *checkpoints, str(tmp_path / "rl"), "--out", str(tmp_path / "mean")]) == 0
    mean = FlowPolicy.from_safetensors(tmp_path / "mean")
    parts = [FAGRPO.load(path).average_policy.state_dict() for path in checkpoints] + [second.state_dict()]
    for key, value in mean.state_dict().items():
        torch.testing.assert_close(value, sum(part[key] for part in parts) / 3)


def test_cloning_writes_a_policy_and_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camera = {"intrinsics": np.eye(3), "extrinsics": np.eye(4)}
    writer = LeRobotWriter(tmp_path / "data", fps=5, frame_stride=4, image_size=96, camera=camera)
    for index in range(4):
        rng = np.random.default_rng(index)
        episode = Episode(
            frames=rng.integers(0, 256, (7, 96, 96, 3), dtype=np.uint8),
            proprio=rng.normal(size=(7, 8)).astype(np.float32),
            actions=np.tile(np.float32(0.5), (6, 4, 7)),
            success=np.array([False] * 6 + [index < 3]),
            instruction="pick up the milk and place it in the basket",
            suite="libero_object",
            task=0,
            init_state=index,
            split="train",
            kind="clean",
            robot="panda",
            seed=index,
        )
        writer.write_episode(index, episode)
    writer.finalize(4)
    command = ["sft", str(tmp_path / "data"), "--blind", "--updates", "20", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    policy = FlowPolicy.from_safetensors(tmp_path / "out")
    assert set(policy.used_space.spaces) == {"proprio", "instruction"} and policy.action_shape == (8, 7)
    assert "20 updates" in capsys.readouterr().out
    assert main(command) == 0
    again = FlowPolicy.from_safetensors(tmp_path / "out")
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), again.parameters(), strict=True))
    assert main([*command, "--seed", "1"]) == 2
    assert capsys.readouterr().err


def test_a_run_without_a_checkpoint_of_the_way_is_resumed_and_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = PendulumEnv()
    FlowPolicy(env.observation_space, env.action_space, num_flow_steps=2).export_safetensors(tmp_path / "sft")
    command = ["train", str(tmp_path / "sft"), "--env", "Pendulum-v1", "--out", str(tmp_path / "rl"), "--quiet"]
    command += ["--num-envs", "2", "--group-size", "2", "--device", "cpu", "--steps"]
    assert main([*command, "400"]) == 0
    written = (tmp_path / "rl" / "model.safetensors").read_bytes()
    assert main([*command, "400", "--seed", "1"]) == 2
    assert "belongs to a run with seed 0, this one has seed 1" in capsys.readouterr().err
    assert (tmp_path / "rl" / "model.safetensors").read_bytes() == written
    assert main([*command, "800"]) == 0
    assert "Resuming from" in capsys.readouterr().out


def test_a_shipped_policy_by_its_name_from_starts_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "flow-policy-libero-40", "--suite", "libero_spatial", "--no-video", "--max-chunks", "2"]
    command += ["--num-envs", "4", "--group-size", "2", "--steps", "8", "--quiet", "--device", "cpu"]
    command += ["--out", str(tmp_path / "rl"), "--reward-type", "probability", "--advantage-eps", "0.1"]
    command += ["--threshold", "balanced"]
    command += ["--start-states"]
    assert main([*command, str(tmp_path / "none.parquet")]) == 2
    assert "none.parquet" in capsys.readouterr().err
    starts = shutil.copy(WEIGHTS / "start_states.parquet", tmp_path / "starts.parquet")
    assert main([*command, str(starts)]) == 0
    run = json.loads((tmp_path / "rl" / "run.json").read_text())
    assert (run["start_states"], run["reward_type"], run["advantage_eps"]) == (str(starts), "probability", 0.1)
    assert run["threshold"] == "balanced"
    mean = ["average", "flow-policy-libero-40", str(tmp_path / "rl"), "--out", str(tmp_path / "mean")]
    assert main(mean) == 0
    shipped, learned, average = (
        FlowPolicy.from_safetensors(path).state_dict()
        for path in (WEIGHTS / "flow-policy-libero-40", tmp_path / "rl", tmp_path / "mean")
    )
    for key, value in average.items():
        torch.testing.assert_close(value, (shipped[key] + learned[key]) / 2)


def test_mistakes_end_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none"), "--env", "Pendulum-v1", "--out", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none"), "--env", "CartPole-v1", "--out", str(tmp_path)]) == 2
    assert "a flow policy needs a Box" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "x", "--out", "y", "--ratio", "token"])
    for command in (["train", "x", "--num-envs", "0"], ["train", "x", "--steps", "-8"], ["sft", "x", "--updates", "0"]):
        with pytest.raises(SystemExit):
            main([*command, "--out", "y"])
        assert f"{command[2]}: must be at least 1, got {command[3]}" in capsys.readouterr().err
