"""The `prophet` command: what it offers, and what it says of mistakes."""

from pathlib import Path

import pytest

from prophet_gym.cli import PRESETS, RECIPES, main
from prophet_gym.world_model import adaptation, training
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
        (["train", "nowhere", "--out", "out"], "There is no data set folder nowhere"),
        (["train", ".", "--out", "out"], "otherwise it is no data set"),
        (["adapt", "nobody", "nowhere", "--out", "out"], "There is no data set folder nowhere"),
        (["evaluate", "nobody", "nowhere", "--report", "report"], "nobody"),
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
