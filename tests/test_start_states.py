"""Start states: the table on disk, drawing from it, a user's own start, and the options of reset()."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prophet_gym.data.episode import Episode
from prophet_gym.envs.start_states import (
    ResetRequest,
    StartState,
    StartStates,
    load_start_states,
    start_states_from_episodes,
    user_start,
    write_start_states,
)

SPLIT_OF = {0: "train", 1: "train", 39: "train", 40: "val", 45: "test"}


def make_start(suite: str = "libero_object", task: int = 0, init_state: int = 0) -> StartState:
    rng = np.random.default_rng([task, init_state])
    return StartState(
        suite=suite,
        task=task,
        task_name=f"pick_up_thing_{task}",
        instruction=f"pick up thing {task}",
        init_state=init_state,
        split=SPLIT_OF[init_state],
        proprio=rng.normal(size=8).astype(np.float32),
        image=rng.integers(0, 256, (96, 96, 3), dtype=np.uint8),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("starts") / "start_states.parquet"
    starts = [make_start(s, t, i) for s in ("libero_object", "libero_spatial") for t in range(3) for i in SPLIT_OF]
    write_start_states(starts, file)
    return file


def test_a_table_of_png_images_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def png(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        return buffer.getvalue()

    monkeypatch.setattr("prophet_gym.envs.start_states._encode_image", png)
    write_start_states([make_start()], tmp_path / "png.parquet")
    start = StartStates(tmp_path / "png.parquet").draw(np.random.default_rng(0), suite="libero_object", split="train")
    np.testing.assert_array_equal(start.image, make_start().image)


def test_write_then_draw_is_lossless(path: Path) -> None:
    table = StartStates(path)
    assert len(table) == 30 and table.suites == ["libero_object", "libero_spatial"] and table.image_size == 96
    held_out = [(task, state) for task in range(3) for state, split in sorted(SPLIT_OF.items()) if split == "val"]
    assert table.pairs("libero_object", "val").tolist() == [list(pair) for pair in held_out] != []
    rng = np.random.default_rng(0)
    for task, init_state in ((0, 0), (2, 39)):
        expected = make_start("libero_spatial", task, init_state)
        start = table.draw(rng, suite="libero_spatial", split="train", task=task, init_state=init_state)
        np.testing.assert_array_equal(start.image, expected.image)
        np.testing.assert_array_equal(start.proprio, expected.proprio)
        assert start.proprio.dtype == np.float32 and start.image.dtype == np.uint8
        for name in ("suite", "task", "task_name", "instruction", "init_state", "split"):
            assert getattr(start, name) == getattr(expected, name)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    small = replace(make_start(init_state=1), image=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"'libero_object', 0, 1\): images must be square and of one size"):
        write_start_states([make_start(), small], tmp_path / "starts.parquet")
    parts = []
    for number, start in enumerate((make_start(), small)):
        write_start_states([start], tmp_path / f"{number}.parquet")
        parts.append(pq.read_table(tmp_path / f"{number}.parquet"))
    pq.write_table(pa.concat_tables(parts), tmp_path / "mixed.parquet")
    with pytest.raises(ValueError, match=r"row 1: the image has \(64, 64\) pixels"):
        StartStates(tmp_path / "mixed.parquet")


def test_columns_are_the_documented_ones(path: Path) -> None:
    names = ["suite", "task", "task_name", "instruction", "init_state", "split", "proprio", "image"]
    assert pq.read_schema(path).names == names


def test_task_is_drawn_before_the_initial_state(path: Path) -> None:
    table = load_start_states(path)
    start = table.draw(np.random.default_rng(7), suite="libero_object", split="train")
    rng = np.random.default_rng(7)
    assert (start.task, start.init_state) == (rng.integers(3), [0, 1, 39][rng.integers(3)])
    given_task = table.draw(np.random.default_rng(7), suite="libero_object", split="train", task=1)
    assert given_task.init_state == [0, 1, 39][np.random.default_rng(7).integers(3)]


@pytest.mark.parametrize(("split", "states"), [("train", {0, 1, 39}), ("val", {40}), ("test", {45})])
def test_a_split_never_yields_the_starts_of_another(path: Path, split: str, states: set[int]) -> None:
    rng = np.random.default_rng(0)
    table = load_start_states(path)
    assert {table.draw(rng, suite="libero_object", split=split).init_state for _ in range(40)} == states


def test_tasks_by_name(path: Path) -> None:
    assert load_start_states(path).task_number("libero_object", "train", "pick_up_thing_2") == 2


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"suite": "libero_sptial"},
            r"Unknown suite 'libero_sptial'. Valid suites: \['libero_object', 'libero_spatial'\]",
        ),
        ({"split": "valid"}, r"Unknown split 'valid'. Valid splits: \['train', 'val', 'test'\]"),
        ({"task": 10}, r"Unknown task 10 of 'libero_object'.*\n  0  pick_up_thing_0"),
        ({"task": "pick_up"}, "Unknown task 'pick_up'"),
        ({"task": 1, "init_state": 45}, r"Unknown init_state 45 .*split 'train'. Valid: \[0, 1, 39\]"),
        ({"init_state": -1}, "Unknown init_state -1"),
    ],
)
def test_unknown_choices_list_the_valid_ones(path: Path, choice: dict[str, object], message: str) -> None:
    arguments = {"suite": "libero_object", "split": "train", **choice}
    with pytest.raises(ValueError, match=message):
        load_start_states(path).draw(np.random.default_rng(0), **arguments)  # type: ignore[arg-type]


def test_missing_and_damaged_files(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.parquet.*write_start_states"):
        StartStates(tmp_path / "nothing.parquet")
    truncated = tmp_path / "truncated.parquet"
    truncated.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"truncated\.parquet is not a readable parquet file"):
        StartStates(truncated)
    narrow = tmp_path / "narrow.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["image"]), narrow)
    with pytest.raises(ValueError, match=r"lacks the columns \['image'\]"):
        StartStates(narrow)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "starts.parquet"
    write_start_states([make_start()], file)
    assert len(load_start_states(file)) == 1 and load_start_states(file) is load_start_states(file)
    write_start_states([make_start(), make_start(task=1)], file)
    assert len(load_start_states(file)) == 2


def test_writer_refuses_bad_rows(tmp_path: Path) -> None:
    good = make_start()
    for rows, message in (
        ([], "No start states"),
        ([good, good], "Two start states"),
        ([StartState(**{**vars(good), "image": good.image.astype(np.float32)})], "image must be uint8"),
        ([StartState(**{**vars(good), "proprio": good.proprio * np.nan})], "proprio must be 8 finite"),
        ([StartState(**{**vars(good), "split": "dev"})], "split must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            write_start_states(rows, tmp_path / "bad.parquet")
    assert not list(tmp_path.iterdir())


def test_starts_from_episodes_keep_one_clean_first_frame() -> None:
    def episode(kind: str, init_state: int, shade: int) -> Episode:
        return Episode(
            frames=np.full((3, 96, 96, 3), shade, np.uint8),
            proprio=np.full((3, 8), shade, np.float32),
            actions=np.zeros((2, 4, 7), np.float32),
            success=np.zeros(3, np.bool_),
            instruction="pick up the butter and place it in the basket",
            suite="libero_object",
            task=6,
            init_state=init_state,
            split="train",
            kind=kind,
            robot="panda",
            seed=0,
        )

    first = [episode("noisy", 3, 1), episode("clean", 3, 2)]
    second = [episode("clean", 3, 4), episode("clean", 1, 5), episode("counterfactual", 2, 6)]
    starts = start_states_from_episodes([first, second])
    assert [(start.init_state, int(start.image[0, 0, 0])) for start in starts] == [(1, 5), (3, 2)]
    assert starts[0].task_name == "pick_up_the_butter_and_place_it_in_the_basket"


# --- a user's own start ---------------------------------------------------------------------------------------------

PROPRIO = np.zeros(8, np.float32)


@pytest.mark.parametrize("size", [1, 37, 96, 97, 256, 480])
def test_user_image_of_any_size(size: int) -> None:
    image = np.full((size, size, 3), (10, 100, 200), np.uint8)
    start = user_start(image, PROPRIO, "open the drawer", image_size=96)
    assert (start.image == np.uint8([10, 100, 200])).all() and start.image.shape == (96, 96, 3)


def test_user_image_of_the_right_size_is_unchanged_and_copied() -> None:
    image = make_start().image.copy()
    start = user_start(image, PROPRIO, "open the drawer", image_size=96)
    np.testing.assert_array_equal(start.image, image)
    image[:] = 0
    assert start.image.any()


def test_larger_user_images_are_averaged_over_areas() -> None:
    blocks = make_start().image
    image = blocks.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(user_start(image, PROPRIO, "x", image_size=96).image, blocks)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ({"image": np.zeros((96, 96, 3), np.float32)}, TypeError, r"must be uint8 .* got float32.*\* 255"),
        ({"image": np.zeros((96, 96), np.uint8)}, ValueError, r"shape \(S, S, 3\)"),
        ({"image": np.zeros((3, 96, 96), np.uint8)}, ValueError, r"channels last.*\(3, 96, 96\)"),
        ({"image": np.zeros((96, 96, 4), np.uint8)}, ValueError, r"shape \(S, S, 3\)"),
        (
            {"image": np.zeros((480, 640, 3), np.uint8)},
            ValueError,
            r"square, got 480 x 640.*crop to 480 x 480 or pad to 640 x 640",
        ),
        ({"proprio": np.zeros(7)}, ValueError, r"shape \(8,\) per env.*\(7,\)"),
        ({"proprio": np.zeros(8, np.int64)}, ValueError, "float array"),
        ({"proprio": np.full(8, np.nan)}, ValueError, "must be finite"),
        ({"instruction": 3}, TypeError, "must be a str"),
        ({"instruction": " "}, ValueError, "must not be empty"),
    ],
)
def test_bad_user_starts(start: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"image": np.zeros((96, 96, 3), np.uint8), "proprio": PROPRIO, "instruction": "open the drawer"}
    with pytest.raises(error, match=message):
        user_start(**{**good, **start}, image_size=96)  # type: ignore[arg-type]


# --- reset options --------------------------------------------------------------------------------------------------


def test_options_are_shared_or_one_per_env() -> None:
    request = ResetRequest.parse(
        {"suite": "libero_spatial", "task": [0, None, 2], "init_state": np.array([1, 2, 3])}, 3
    )
    assert request.mask.all() and request.group_size == 1
    assert request.per_env[1] == {"suite": "libero_spatial", "task": None, "init_state": 2}


def test_options_are_left_as_they_are() -> None:
    options = {"task": 1, "reset_mask": np.array([True, False])}
    ResetRequest.parse(options, 2)
    assert set(options) == {"task", "reset_mask"}


START = {"image": np.zeros((2, 96, 96, 3), np.uint8), "proprio": np.zeros((2, 8)), "instruction": ["a", "b"]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tsak": 1}, ValueError, r"Unknown reset options \['tsak'\]. Valid options: .*'task'"),
        ({"task": [1, 2, 3]}, ValueError, r"one value or one per env \(2\), got 3"),
        ({"group_size": 0}, ValueError, "positive int"),
        ({"group_size": True}, ValueError, "positive int"),
        ({"group_size": 3}, ValueError, r"divide the number of envs \(2\)"),
        ({"group_size": 2, "start": START}, ValueError, "repeat it once per env"),
        ({"group_size": 2, "task": [0, 1]}, ValueError, "the same suite, task, init_state and member"),
        ({"group_size": 2, "reset_mask": np.array([True, False])}, ValueError, "whole groups"),
        ({"reset_mask": [True, False]}, TypeError, "bool array"),
        ({"reset_mask": np.ones(2)}, TypeError, "bool array, got float64"),
        ({"reset_mask": np.zeros(2, bool)}, ValueError, "at least one True"),
        ({"reset_mask": np.ones(3, bool)}, ValueError, r"shape \(2,\)"),
        ({"start": START, "task": 1}, ValueError, r"\['task'\] choose a recorded start"),
        ({"start": 3}, TypeError, "must be a dict"),
        ({"start": {"image": START["image"]}}, ValueError, "must have the keys"),
        ({"start": {**START, "instruction": "a"}}, ValueError, r"one entry per env \(2\), got 'a'"),
        ({"start": {**START, "proprio": np.zeros((3, 8))}}, ValueError, r"one entry per env \(2\), got 3"),
        ([{}], ValueError, "one dict per env"),
        ([{"group_size": 2}, {}], ValueError, "agree on group_size"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ResetRequest.parse(options, 2)


@given(groups=st.integers(1, 6), group_size=st.integers(1, 6), task=st.none() | st.integers(0, 9))
def test_groups_of_any_size(groups: int, group_size: int, task: int | None) -> None:
    request = ResetRequest.parse({"group_size": group_size, "task": task}, groups * group_size)
    assert request.group_size == group_size and len(request.per_env) == groups * group_size
