"""The `prophet` command: what it offers, and what it says of mistakes."""

import json
from pathlib import Path

import pytest
from test_agreement import data  # noqa: F401  (a fixture)

from prophet_gym.cli import PRESETS, RECIPES, main
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.reward.success_classifier import SuccessClassifier
from prophet_gym.world_model import ProphetPipeline, adaptation, imagination, training
from prophet_gym.world_model.pipeline import ACTION_STREAMS


def test_it_offers_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(PRESETS) == set(training.PRESETS) and set(RECIPES) == set(adaptation.RECIPES)
    for option, choices in (("--preset", training.PRESETS), ("--action-streams", ACTION_STREAMS)):
        with pytest.raises(SystemExit):
            main(["train", "data", "--out", "out", option, "nothing"])
        message = capsys.readouterr().err
        assert all(f"'{choice}'" in message for choice in choices)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["record", "--suite", "libero_objects", "--out", "data"], "libero_object"),
        (["record", "--suite", "fetch", "--out", "data", "--world-model", "prophet-libero-tiny"], "give --policy"),
        (["train", "nowhere", "--out", "out"], "There is no data set folder nowhere"),
        (["train", ".", "--out", "out"], "otherwise it is no data set"),
        (["train", ".", "--out", "out", "--device", "gpu"], "Unknown device 'gpu': use 'auto'"),
        (["adapt", "nobody", "nowhere", "--out", "out"], "There is no data set folder nowhere"),
        (["evaluate", "nobody", "nowhere", "--report", "report"], "nobody"),
        (["train", "nowhere", "--out", "out", "--preset", "cosmos-2b"], 'The preset "cosmos-2b", and no other'),
        (["train", "nowhere", "--out", "out", "--preset", "cosmos-2b", "--pretrained", "x"], "nothing is downloaded"),
        (["adapt", "nobody", "nowhere", "--out", "out", "--members", "2"], "leave num_members out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_end_with_a_line(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"prophet {command[0]}: ") and message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--steps", "0", "at least 1"), ("--imagined", "-1", "at least 1"), ("--max-false-success-rate", "2", "[0, 1)")],
)
def test_numbers_out_of_range_are_refused_at_once(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train-reward", "nowhere", "--out", "out", option, value])
    assert option in (error := capsys.readouterr().err) and message in error


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prophet_gym.simulators.recording.record", interrupted)
    assert main(["record", "--suite", "libero_object", "--out", "data"]) == 130
    assert capsys.readouterr().err == "prophet record: stopped. The same command resumes.\n"


def test_a_judge_is_trained_and_evaluated(
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ProphetPipeline.tiny_random().save_pretrained(tmp_path / "pipeline")
    world, out = str(tmp_path / "pipeline"), str(tmp_path / "out")
    command = ["train-reward", str(data), "--motion", str(data), "--world-model", world, "--steps", "2", "--out", out]
    assert main(command) == 0
    monkeypatch.setattr(imagination, "imagine_motions", None)  # what is finished is not imagined again
    assert main(command) == 0
    judge = SuccessClassifier.from_pretrained(tmp_path / "out" / "reward")
    assert isinstance(judge.threshold, dict) and judge.motion_threshold is not None
    assert set(judge.config.cameras) == {record.suite for record in EpisodeDataset(data).records}
    assert main([*command, "--seed", "1"]) == 2
    assert "belongs to a run with seed 0, this one has seed 1" in capsys.readouterr().err
    report = ["--reward-model", str(tmp_path / "out" / "reward"), "--report", str(tmp_path / "report")]
    assert main(["evaluate", world, str(data), "--episodes", "2", "--split", "test", *report]) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["libero_object"]["video"]["episodes"] == 2
