"""Episodes in memory, on disk (LeRobot v3.0, LIBERO's HDF5) and as training windows."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from prophet_gym.data.clips import ClipSampler, EpisodeArrays, load_arrays, subset
from prophet_gym.data.episode import Episode, to_upright
from prophet_gym.data.instructions import TABLE, write_table
from prophet_gym.data.lerobot_format import EpisodeDataset, EpisodeRecord, ForeignFields, LeRobotWriter, schema
from prophet_gym.data.libero_hdf5 import read_libero_hdf5
from prophet_gym.run_folder import claim

INTRINSICS = np.array([[100.0, 0, 8], [0, 100, 6], [0, 0, 1]])
CAMERA = {"intrinsics": INTRINSICS, "extrinsics": np.eye(4)}
DATA_FILE = "data/chunk-000/file-001.parquet"


def make_episode(seed: int = 0, steps: int = 5, stride: int = 4, **fields: Any) -> Episode:
    rng = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "frames": rng.integers(0, 256, (steps + 1, 12, 16, 3), dtype=np.uint8),
        "proprio": rng.normal(size=(steps + 1, 8)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, stride, 7)).astype(np.float32),
        "success": rng.random(steps + 1) < 0.5,
        "instruction": f"pick up object {seed % 2}",
        "suite": "libero_object",
        "task": seed % 2,
        "init_state": seed % 50,
        "split": "train",
        "kind": "clean",
        "robot": "panda",
        "seed": seed,
    }
    return Episode(**(values | fields))


def make_writer(root: Path, **arguments: Any) -> LeRobotWriter:
    defaults: dict[str, Any] = {"fps": 5, "frame_stride": 4, "camera": CAMERA, "image_size": (12, 16)}
    return LeRobotWriter(root, **(defaults | arguments))


EPISODES = [
    make_episode(0, 5),
    make_episode(1, 3, split="val", kind="noisy"),
    make_episode(2, 7, suite="libero_spatial"),
    make_episode(3, 1, split="test", kind="policy"),
]


def write_all(root: Path) -> EpisodeDataset:
    writer = make_writer(root)
    for index, episode in enumerate(EPISODES):
        writer.write_episode(index, episode)
    writer.finalize()
    return EpisodeDataset(root)


def assert_equal(a: Episode, b: Episode) -> None:
    for field in dataclasses.fields(Episode):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y), field.name
        np.testing.assert_array_equal(x, y, err_msg=field.name)


# Episode


def test_episode_properties() -> None:
    episode = make_episode(success=np.array([0, 1, 1, 0, 0, 1], bool))
    assert len(episode) == 5 and episode.frame_stride == 4 and episode.outcome is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        episode.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"frames": np.zeros((6, 12, 16, 3))}, TypeError, "frames must be a numpy array of uint8, got float64"),
        ({"frames": torch.zeros(6, 12, 16, 3)}, TypeError, "frames must be a numpy array"),
        ({"frames": np.zeros((5, 12, 16, 3), np.uint8)}, ValueError, r"T \+ 1 = 6"),
        ({"frames": np.zeros((6, 3, 12, 16), np.uint8)}, ValueError, "frames must have shape"),
        ({"proprio": np.zeros((6, 8))}, TypeError, "proprio must be a numpy array of float32"),
        ({"proprio": np.zeros((6, 7), np.float32)}, ValueError, r"\(6, 8\)"),
        ({"proprio": np.full((6, 8), np.nan, np.float32)}, ValueError, "NaN"),
        ({"actions": np.zeros((5, 4, 6), np.float32)}, ValueError, "actions must have shape"),
        ({"actions": np.zeros((0, 4, 7), np.float32)}, ValueError, "actions must have shape"),
        ({"actions": np.full((5, 4, 7), 1.001, np.float32)}, ValueError, "normalise the actions"),
        ({"actions": np.full((5, 4, 7), np.nan, np.float32)}, ValueError, "finite"),
        ({"success": np.zeros(5, bool)}, ValueError, "success must have shape"),
        ({"success": np.zeros(6, int)}, TypeError, "success must be a numpy array of bool"),
        ({"instruction": " "}, ValueError, "instruction must not be empty"),
        ({"suite": None}, TypeError, "suite must be a str"),
        ({"task": 1.5}, TypeError, "task must be an int"),
        ({"init_state": -1}, ValueError, "init_state must be >= 0"),
        ({"split": "dev"}, ValueError, r"\['train', 'val', 'test'\]"),
        ({"kind": "dirty"}, ValueError, "counterfactual"),
    ],
)
def test_episode_refuses(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_episode(**fields)


@settings(max_examples=30)
@given(control_steps=st.integers(1, 30), stride=st.integers(1, 6))
def test_with_frame_stride_keeps_actions_between_frames(control_steps: int, stride: int) -> None:
    fine = make_episode(0, control_steps, stride=1)
    if control_steps < stride:
        with pytest.raises(ValueError, match="fewer than"):
            fine.with_frame_stride(stride)
        return
    coarse = fine.with_frame_stride(stride)
    first = control_steps % stride
    assert coarse.frame_stride == stride and coarse.outcome == fine.outcome
    np.testing.assert_array_equal(coarse.actions.reshape(-1, 7), fine.actions.reshape(-1, 7)[first:])
    for step in range(len(coarse) + 1):
        np.testing.assert_array_equal(coarse.frames[step], fine.frames[first + step * stride])
        np.testing.assert_array_equal(coarse.proprio[step], fine.proprio[first + step * stride])


def test_with_frame_stride_refuses_a_finer_one() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        make_episode().with_frame_stride(6)


@pytest.mark.parametrize("orientation", ["upright", "upside_down", "mirrored", "rotated_180"])
def test_to_upright(orientation: str) -> None:
    frames = EPISODES[0].frames
    np.testing.assert_array_equal(to_upright(to_upright(frames, orientation), orientation), frames)
    corner = to_upright(frames, orientation)[:, 0, 0]
    row, column = {"upright": (0, 0), "upside_down": (-1, 0), "mirrored": (0, -1), "rotated_180": (-1, -1)}[orientation]
    np.testing.assert_array_equal(corner, frames[:, row, column])
    with pytest.raises(ValueError, match="mirrored"):
        to_upright(frames, "sideways")


# Instructions


def test_write_table_keeps_the_rows_that_are_there(tmp_path: Path) -> None:
    write_table(["open the drawer"], tmp_path / "table.safetensors")  # shipped: needs no encoder
    with safe_open(tmp_path / "table.safetensors", "numpy") as new, safe_open(TABLE, "numpy") as shipped:
        assert new.metadata() == shipped.metadata()
        np.testing.assert_array_equal(new.get_tensor("embeddings"), shipped.get_tensor("embeddings"))


# Writing and reading LeRobot data sets


def test_round_trip(tmp_path: Path) -> None:
    dataset = write_all(tmp_path)
    assert len(dataset) == 4 and dataset.fps == 5 and dataset.frame_stride == 4
    for episode, written in zip(dataset, EPISODES, strict=True):
        assert_equal(episode, written)
    assert [record.success for record in dataset.records] == [episode.outcome for episode in EPISODES]
    assert [record.length for record in dataset.records] == [len(episode.frames) for episode in EPISODES]
    intrinsics, extrinsics = dataset.camera("libero_object")
    np.testing.assert_array_equal(intrinsics, INTRINSICS)
    np.testing.assert_array_equal(extrinsics, np.eye(4))


def test_files_are_what_lerobot_reads(tmp_path: Path) -> None:
    """Field names and types of LeRobot 0.4's loader, against which the writer was verified."""
    write_all(tmp_path)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["robot_type"] == "panda" and info["fps"] == 5
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 20, 2)
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["splits"] == {"val": "1:2", "test": "3:4"}, "train is not one range of episodes"
    assert info["features"]["action"]["shape"] == [28] and len(info["features"]["action"]["names"]) == 28
    assert info["features"]["observation.images.agentview"]["shape"] == [12, 16, 3]
    extras = info["prophet"]
    assert extras["control_hz"] == 20 and extras["orientation"] == "upright" and len(extras["episodes"]) == 4

    tables = [pq.read_table(tmp_path / f"data/chunk-000/file-{k:03d}.parquet") for k in range(4)]
    assert set(tables[0].column_names) == set(info["features"])
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert tables[0].schema.field("observation.images.agentview").type == image_type
    assert tables[0].schema.field("action").type.list_size == 28
    schema = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
    assert schema["observation.images.agentview"] == {"_type": "Image"} and set(schema) == set(info["features"])
    assert [i for table in tables for i in table["index"].to_pylist()] == list(range(20))
    assert [set(table["task_index"].to_pylist()) for table in tables] == [{0}, {1}, {0}, {1}]
    last = np.array(tables[0]["action"][-1].as_py(), np.float32).reshape(4, 7)
    assert not last[:, :6].any() and (last[:, 6] == EPISODES[0].actions[-1, -1, -1]).all()

    tasks = pq.read_table(tmp_path / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["pick up object 0", "pick up object 1"]}

    rows = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"]) for r in rows] == [(0, 6), (6, 10), (10, 18), (18, 20)]
    assert [r["data/file_index"] for r in rows] == [0, 1, 2, 3] and rows[1]["tasks"] == ["pick up object 1"]
    assert rows[1]["prophet/split"] == "val" and np.shape(rows[0]["stats/action/mean"]) == (28,)
    assert not list(tmp_path.rglob("*.tmp"))


def test_statistics(tmp_path: Path) -> None:
    write_all(tmp_path)
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    proprio = np.concatenate([episode.proprio for episode in EPISODES])
    pixels = np.concatenate([episode.frames.reshape(-1, 3) for episode in EPISODES]) / 255
    for values, stored in ((proprio, stats["observation.state"]), (pixels, stats["observation.images.agentview"])):
        for name in ("min", "max", "mean", "std"):
            expected = getattr(values.astype(np.float64), name)(axis=0)
            np.testing.assert_allclose(np.ravel(stored[name]), expected, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(np.ravel(stored["q90"]), np.quantile(values, 0.9, axis=0), atol=0.006)
        assert stored["count"] == [20]
    assert np.shape(stats["observation.images.agentview"]["mean"]) == (3, 1, 1)


def test_parallel_writers_and_resume(tmp_path: Path) -> None:
    def write(index: int) -> None:
        make_writer(tmp_path).write_episode(index, EPISODES[index])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, (0, 1, 3)))
    writer = make_writer(tmp_path)
    assert [writer.written(index) is not None for index in range(5)] == [True, True, False, True, False]
    for total in (None, 4):
        with pytest.raises(FileNotFoundError, match="lacks 1 of 4 episodes, the first is 2"):
            writer.finalize(total)
    with pytest.raises(FileNotFoundError, match="unfinished recording, run the same record command again"):
        EpisodeDataset(tmp_path)
    write(2)
    writer.finalize(4)
    for episode, written in zip(EpisodeDataset(tmp_path), EPISODES, strict=True):
        assert_equal(episode, written)


def test_a_data_set_without_video_says_so(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "blind", video=False)
    writer.write_episode(0, EPISODES[0])
    writer.finalize()
    blind, seen = EpisodeDataset(tmp_path / "blind"), write_all(tmp_path / "seen")
    assert seen.video and not blind.video
    with pytest.raises(ValueError, match=r"blind'. were recorded without video: leave them out"):
        load_arrays([seen, blind], "train")
    still, moving = load_arrays([seen, blind], "train", video=False), load_arrays(seen, "train")
    assert len(still.records) == len(moving.records) + 1
    assert len(still.frames) == len(still.proprio) and still.frames.untyped_storage().nbytes() == 3
    torch.testing.assert_close(moving.first_frames, moving.frames[moving.starts])
    torch.testing.assert_close(still.first_frames[:-1], moving.first_frames)
    np.testing.assert_array_equal(still.first_frames[-1], EPISODES[0].frames[0])
    with pytest.raises(ValueError, match="was written with the settings"):
        make_writer(tmp_path / "blind").written(0)


def test_an_episode_of_another_camera_is_not_taken_over(tmp_path: Path) -> None:
    make_writer(tmp_path).write_episode(0, make_episode())
    nearly = {name: np.array(matrix) + 1e-9 for name, matrix in CAMERA.items()}
    assert make_writer(tmp_path, camera=nearly).written(0) is not None
    moved = CAMERA | {"extrinsics": np.array(CAMERA["extrinsics"]) + 0.1}
    for other in (moved, {"libero_object": CAMERA}):
        with pytest.raises(ValueError, match="was written with the settings"):
            make_writer(tmp_path, camera=other).written(0)


def test_a_finalize_that_fails_leaves_a_finished_data_set_as_it_is(tmp_path: Path) -> None:
    write_all(tmp_path)
    before = (tmp_path / "meta/info.json").read_bytes()
    with pytest.raises(ValueError, match="was written with the settings"):
        make_writer(tmp_path, fps=10).finalize()
    path = tmp_path / "data/chunk-000/file-001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"file-001\.parquet"):
        make_writer(tmp_path).finalize()
    path.write_bytes(content)
    assert (tmp_path / "meta/info.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"file-000\.parquet has actions other than zero"):
        make_writer(tmp_path, action_mask=(True,) * 3 + (False,) * 3 + (True,)).finalize()


def test_a_damaged_info_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "meta/info.json"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"info\.json is damaged"):
        EpisodeDataset(tmp_path)


def test_finalize_is_repeatable_and_extension_unfinalizes(tmp_path: Path) -> None:
    write_all(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    writer = make_writer(tmp_path)
    writer.finalize(4)
    assert {path: path.read_bytes() for path in files} == before
    with pytest.raises(ValueError, match="total_episodes=4"):
        writer.finalize(3)
    writer.write_episode(4, make_episode(4))
    with pytest.raises(FileNotFoundError, match=r"info\.json is absent"):
        EpisodeDataset(tmp_path)
    writer.finalize()
    assert len(EpisodeDataset(tmp_path)) == 5


def test_crossing_a_chunk_of_files(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.write_episode(1001, EPISODES[0])
    assert (tmp_path / "data/chunk-001/file-001.parquet").is_file() and writer.written(1001) is not None


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no episode yet"):
        writer.finalize()
    with pytest.raises(ValueError, match="frame stride 2, but this data set is written with 4"):
        writer.write_episode(0, make_episode(stride=2))
    with pytest.raises(ValueError, match="image size"):
        make_writer(tmp_path, image_size=96).write_episode(0, make_episode())
    with pytest.raises(ValueError, match="robot"):
        writer.write_episode(0, make_episode(robot="sawyer"))
    with pytest.raises(ValueError, match=">= 0"):
        writer.write_episode(-1, make_episode())
    writer.write_episode(0, make_episode())
    with pytest.raises(ValueError, match="written with the settings"):
        make_writer(tmp_path, fps=10).finalize()


def test_a_robot_without_rotation_says_so(tmp_path: Path) -> None:
    mask = [True, True, True, False, False, False, True]
    writer = make_writer(tmp_path, robot="sawyer", action_mask=mask, action_units="1.0 moves the goal by 1.6 cm")
    episode = make_episode(robot="sawyer")
    with pytest.raises(ValueError, match="zero where the action mask"):
        writer.write_episode(0, episode)
    writer.write_episode(0, dataclasses.replace(episode, actions=episode.actions * np.float32(mask)))
    writer.finalize()
    dataset = EpisodeDataset(tmp_path)
    assert dataset.action_mask.tolist() == mask and dataset.info["robot_type"] == "sawyer"
    assert "1.0 moves the goal by 1.6 cm" in dataset.info["prophet"]["action_convention"]
    del dataset.info["prophet"]["action_mask"]  # as data sets were written before there were other robots
    assert dataset.action_mask.all() and dataset.action_mask.shape == (7,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"fps": 0},
        {"frame_stride": 1.5},
        {"image_size": 0},
        {"action_mask": (True,) * 6},
        {"camera": {}},
        {"camera": {"intrinsics": np.eye(3)}},
        {"camera": {"intrinsics": np.eye(4), "extrinsics": np.eye(4)}},
        {"camera": {"libero_object": {"intrinsics": np.eye(3), "extrinsics": np.full((4, 4), np.nan)}}},
    ],
)
def test_writer_refuses_arguments(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        make_writer(tmp_path, **arguments)


def test_one_camera_per_suite(tmp_path: Path) -> None:
    other = CAMERA | {"extrinsics": np.eye(4) * 2}
    writer = make_writer(tmp_path, camera={"libero_object": CAMERA, "libero_spatial": other})
    writer.write_episode(0, EPISODES[0])
    writer.finalize()
    dataset = EpisodeDataset(tmp_path)
    np.testing.assert_array_equal(dataset.camera("libero_spatial")[1], np.eye(4) * 2)
    with pytest.raises(KeyError, match="libero_goal"):
        dataset.camera("libero_goal")


def test_select_and_slice(tmp_path: Path) -> None:
    dataset = write_all(tmp_path)
    assert [record.episode_index for record in dataset.select(split="train").records] == [0, 2]
    assert [record.episode_index for record in dataset.select(split=["val", "test"]).records] == [1, 3]
    both = dataset.select(split="train", suite="libero_spatial")
    assert len(both) == 1
    assert_equal(both[0], EPISODES[2])
    assert len(dataset.select(kind="counterfactual")) == 0
    assert_equal(dataset[1:][-1], EPISODES[3])
    with pytest.raises(ValueError, match=r"Unknown split 'dev': choose from \['train', 'val', 'test'\]"):
        dataset.select(split="dev")
    with pytest.raises(ValueError, match=r"choose from \['libero_object', 'libero_spatial'\]"):
        dataset.select(suite="libero_goal")
    with pytest.raises(ValueError, match="policy"):
        dataset.select(kind="dirty")
    with pytest.raises(IndexError):
        dataset[4]


def test_reader_reports_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data set folder"):
        EpisodeDataset(tmp_path / "nowhere")
    dataset = write_all(tmp_path)
    (tmp_path / DATA_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"file-001\.parquet is missing"):
        dataset[1]
    (tmp_path / "meta/episodes/chunk-000/file-000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="lists 0 episodes"):
        EpisodeDataset(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_reader_reports_a_truncated_file(tmp_path: Path, keep: float) -> None:
    dataset = write_all(tmp_path)
    content = (tmp_path / DATA_FILE).read_bytes()
    (tmp_path / DATA_FILE).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"file-001\.parquet is not a readable parquet file"):
        dataset[1]
    with pytest.raises(ValueError, match="not a readable parquet file"):
        make_writer(tmp_path).finalize()


def rewrite(path: Path, name: str, column: pa.Array | None) -> None:
    table = pq.read_table(path, partitioning=None)
    index = table.column_names.index(name)
    pq.write_table(table.remove_column(index) if column is None else table.set_column(index, name, column), path)


def test_reader_reports_wrong_content(tmp_path: Path) -> None:
    dataset = write_all(tmp_path)
    path = tmp_path / DATA_FILE
    original = path.read_bytes()
    rewrite(path, "action", pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * 7, np.float32)), 7))
    with pytest.raises(ValueError, match=r"7 numbers a row in 'action', info\.json says 28"):
        dataset[1]
    path.write_bytes(original)
    rewrite(path, "action", None)
    with pytest.raises(ValueError, match=r"lacks the columns \['action'\]"):
        dataset[1]
    path.write_bytes(original)
    pq.write_table(pq.read_table(path, partitioning=None).slice(0, 2), path)
    with pytest.raises(ValueError, match="2 of the 4 rows"):
        dataset[1]
    path.write_bytes(original)
    images = pq.read_table(path, partitioning=None)["observation.images.agentview"].to_pylist()
    for broken, message in ((images[1]["bytes"][:80], "damaged"), (b"", "damaged"), (None, "not embedded")):
        images[1] = {"bytes": broken, "path": "frame.png"}
        rewrite(path, "observation.images.agentview", pa.array(images))
        with pytest.raises(ValueError, match=f"row 1: the image is {message}"):
            dataset[1]


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reader_refuses_other_formats(tmp_path: Path) -> None:
    dataset = write_all(tmp_path)
    features = dataset.info["features"]
    edit_info(tmp_path, features=features | {"action": {"dtype": "float32", "shape": [6], "names": None}})
    with pytest.raises(ValueError, match=r"of shapes \[\[6\], \[8\]\], expected \[\[28\], \[8\]\]"):
        EpisodeDataset(tmp_path)
    edit_info(tmp_path, features=features | {"observation.images.wrist": {"dtype": "image", "shape": [1, 1, 3]}})
    with pytest.raises(ValueError, match="pass one as image_key"):
        EpisodeDataset(tmp_path)
    assert_equal(EpisodeDataset(tmp_path, image_key="observation.images.agentview")[0], EPISODES[0])
    edit_info(tmp_path, codebase_version="v2.1")
    with pytest.raises(ValueError, match=r"format v2\.1, this reader needs v3"):
        EpisodeDataset(tmp_path)


# Data sets of other software: several episodes a file, video, one row per control step


def write_foreign(root: Path, lengths: tuple[int, ...] = (9, 6), with_success: bool = True) -> list[Episode]:
    """A data set as LeRobot itself writes it: all episodes in one parquet file and one mp4, mirrored images."""
    av = pytest.importorskip("av")
    total, key, fps = sum(lengths), "observation.images.front", 20
    rng = np.random.default_rng(0)
    levels = rng.integers(30, 220, (total, 2, 2, 3), dtype=np.uint8)
    frames = np.kron(levels, np.ones((1, 32, 32, 1), np.uint8))
    state = rng.normal(size=(total, 8)).astype(np.float32)
    action = rng.uniform(-1, 1, (total, 7)).astype(np.float32)
    success = np.concatenate([np.arange(n) >= n - 3 for n in lengths])
    after = np.concatenate([np.arange(n) + 1 >= n - 3 for n in lengths])  # what the action of a row leads to
    episode_index = np.repeat(np.arange(len(lengths)), lengths)
    columns = {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), 8),
        "action": pa.array(action.tolist(), pa.list_(pa.float32())),
        "frame_index": pa.array(np.concatenate([np.arange(n) for n in lengths])),
        "episode_index": pa.array(episode_index),
    } | ({"next.success": pa.array(after)} if with_success else {})
    shapes = {"observation.state": [8], "action": [7], "next.success": [1], "frame_index": [1], "episode_index": [1]}
    features: dict[str, Any] = {name: {"dtype": "float32", "shape": shapes[name], "names": None} for name in columns}
    features[key] = {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channels"]}
    ends = np.cumsum(lengths)
    location = {"chunk_index": 0, "file_index": 0}
    rows = {
        "episode_index": list(range(len(lengths))),
        "tasks": [["open the drawer"]] * len(lengths),
        "length": list(lengths),
        f"videos/{key}/from_timestamp": (ends - lengths) / fps,
        f"videos/{key}/to_timestamp": ends / fps,
    } | {f"{what}/{name}": [0] * len(lengths) for what in ("data", f"videos/{key}") for name in location}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": len(lengths),
        "fps": fps,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    for folder in ("data/chunk-000", "meta/episodes/chunk-000", f"videos/{key}/chunk-000"):
        (root / folder).mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.table(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "__index_level_0__": ["open the drawer"]}), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(info))
    with av.open(str(root / f"videos/{key}/chunk-000/file-000.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "g": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return [
        make_episode(
            steps=end - start - 1,
            stride=1,
            frames=frames[start:end, :, ::-1],
            proprio=state[start:end],
            actions=action[start : end - 1, None],
            success=success[start:end],
            instruction="open the drawer",
            suite="mine",
            task=0,
            init_state=index,
            seed=0,
        )
        for index, (start, end) in enumerate(zip(ends - lengths, ends, strict=True))
    ]


MINE = ForeignFields(orientation="mirrored", suite="mine")


@pytest.mark.parametrize("stride", [1, 4])
def test_foreign_video_dataset(tmp_path: Path, stride: int) -> None:
    expected = [episode.with_frame_stride(stride) for episode in write_foreign(tmp_path)]
    dataset = EpisodeDataset(tmp_path, foreign=dataclasses.replace(MINE, frame_stride=stride))
    assert [record.length for record in dataset.records] == [len(episode.frames) for episode in expected]
    assert dataset.fps == 20 / stride and dataset.frame_stride == stride
    assert all(record.success for record in dataset.records)
    for episode, reference in zip(dataset, expected, strict=True):
        assert np.abs(episode.frames.astype(int) - reference.frames).max() <= 6, "beyond the codec's error"
        assert_equal(dataclasses.replace(episode, frames=reference.frames), reference)


def test_foreign_dataset_must_be_explained(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a", with_success=False)
    with pytest.raises(ValueError, match="ForeignFields"):
        EpisodeDataset(tmp_path / "a")
    with pytest.raises(ValueError, match="success=True"):
        EpisodeDataset(tmp_path / "a", foreign=MINE)
    episode = EpisodeDataset(tmp_path / "a", foreign=dataclasses.replace(MINE, success=True))[1]
    assert episode.outcome and not episode.success[:-1].any()
    with pytest.raises(ValueError, match="upside_down"):
        ForeignFields(orientation="tilted", suite="mine")
    with pytest.raises(ValueError, match="frame_stride must be >= 1"):
        dataclasses.replace(MINE, frame_stride=0)
    write_foreign(tmp_path / "c")
    with pytest.raises(ValueError, match=r"leave ForeignFields\.success out"):
        EpisodeDataset(tmp_path / "c", foreign=dataclasses.replace(MINE, success=False))
    write_all(tmp_path / "b")
    with pytest.raises(ValueError, match="leave that argument out"):
        EpisodeDataset(tmp_path / "b", foreign=MINE)


def test_reader_reports_broken_video(tmp_path: Path) -> None:
    write_foreign(tmp_path)
    dataset = EpisodeDataset(tmp_path, foreign=MINE)
    path = tmp_path / "videos/observation.images.front/chunk-000/file-000.mp4"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable video"):
        dataset[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"file-000\.mp4 is missing"):
        dataset[0]


def test_reader_reports_a_video_that_is_too_short(tmp_path: Path) -> None:
    write_foreign(tmp_path)
    path = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    rewrite(path, "videos/observation.images.front/from_timestamp", pa.array([0.0, 0.6]))
    dataset = EpisodeDataset(tmp_path, foreign=MINE)
    with pytest.raises(ValueError, match="3 of the 6 frames of episode 1"):
        dataset[1]


# LIBERO's HDF5


def write_hdf5(path: Path, rows: int = 9) -> dict[str, NDArray[Any]]:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    arrays = {
        "obs/agentview_rgb": rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8),
        "obs/ee_states": rng.normal(size=(rows, 6)),
        "obs/gripper_states": rng.normal(size=(rows, 2)),
        "actions": rng.uniform(-1, 1, (rows, 7)),
        "rewards": (np.arange(rows) == rows - 1).astype(np.uint8),
    }
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the bowl on the plate"})
        for number in (0, 10, 2):
            for name, array in arrays.items():
                data.create_dataset(f"demo_{number}/{name}", data=array)
    return arrays


FILE: dict[str, Any] = {"orientation": "upside_down", "suite": "libero_goal", "task": 3}


def test_libero_hdf5(tmp_path: Path) -> None:
    arrays = write_hdf5(tmp_path / "demo.hdf5")
    episodes = list(read_libero_hdf5(tmp_path / "demo.hdf5", alignment="action_before_frame", **FILE))
    assert [episode.init_state for episode in episodes] == [0, 2, 10]
    episode = episodes[0]
    assert episode.instruction == "put the bowl on the plate" and episode.outcome and len(episode) == 2
    np.testing.assert_array_equal(episode.frames, arrays["obs/agentview_rgb"][::4, ::-1])
    np.testing.assert_array_equal(episode.actions.reshape(8, 7), arrays["actions"][1:].astype(np.float32))
    np.testing.assert_array_equal(episode.proprio[:, :6], arrays["obs/ee_states"][::4].astype(np.float32))

    replayed = read_libero_hdf5(tmp_path / "demo.hdf5", alignment="frame_before_action", frame_stride=1, **FILE)
    episode = next(replayed)
    np.testing.assert_array_equal(episode.actions[:, 0], arrays["actions"][:-1].astype(np.float32))
    assert not episode.success.any(), "the frame after the last action is not in the file"


def test_libero_hdf5_resizes_on_request(tmp_path: Path) -> None:
    arrays = write_hdf5(tmp_path / "demo.hdf5")
    episode = next(
        read_libero_hdf5(tmp_path / "demo.hdf5", alignment="action_before_frame", image_size=8, instruction="x", **FILE)
    )
    area = arrays["obs/agentview_rgb"][::4, ::-1].reshape(3, 8, 2, 8, 2, 3).mean((2, 4))
    assert episode.instruction == "x" and np.abs(episode.frames - area).max() <= 1


def test_libero_hdf5_errors(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "demo.hdf5"
    with pytest.raises(FileNotFoundError, match="no file"):
        read_libero_hdf5(path, alignment="action_before_frame", **FILE)
    write_hdf5(path)
    with pytest.raises(ValueError, match="frame_before_action"):
        read_libero_hdf5(path, alignment="same", **FILE)
    with pytest.raises(ValueError, match="upside_down"):
        read_libero_hdf5(path, alignment="action_before_frame", **(FILE | {"orientation": "down"}))
    with h5py.File(path, "a") as file:
        del file["data/demo_2/actions"]
        del file["data/demo_10/obs/gripper_states"]
        file["data/demo_10/obs/gripper_states"] = np.zeros((3, 2))
    episodes = read_libero_hdf5(path, alignment="action_before_frame", **FILE)
    next(episodes)
    with pytest.raises(ValueError, match="demo_2 has no 'actions'"):
        next(episodes)
    with h5py.File(path, "a") as file:
        del file["data/demo_2"]
    episodes = read_libero_hdf5(path, alignment="action_before_frame", **FILE)
    next(episodes)
    with pytest.raises(ValueError, match="equally many rows"):
        next(episodes)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable HDF5"):
        read_libero_hdf5(path, alignment="action_before_frame", **FILE)


# Training windows


def test_load_arrays(tmp_path: Path) -> None:
    dataset = write_all(tmp_path)
    arrays = load_arrays(dataset, "train", progress=False)
    assert arrays.frames.shape == (14, 12, 16, 3) and arrays.frames.dtype == torch.uint8
    assert arrays.starts.tolist() == [0, 6] and arrays.lengths.tolist() == [6, 8]
    for start, length, record in zip(arrays.starts, arrays.lengths, arrays.records, strict=True):
        episode, rows = EPISODES[record.episode_index], slice(int(start), int(start + length))
        np.testing.assert_array_equal(arrays.frames[rows], episode.frames)
        np.testing.assert_array_equal(arrays.proprio[rows], episode.proprio)
        np.testing.assert_array_equal(arrays.success[rows], episode.success)
        np.testing.assert_array_equal(arrays.actions[rows][:-1], episode.actions)
        no_op = arrays.actions[rows][-1]
        assert not no_op[:, :6].any() and (no_op[:, 6] == episode.actions[-1, -1, -1]).all()
    assert len(load_arrays(dataset, None, progress=False).records) == 4
    with pytest.raises(ValueError, match="Unknown split"):
        load_arrays(dataset, "dev")
    with pytest.raises(ValueError, match="No episode of split 'val'"):
        load_arrays(dataset.select(split="train"), "val")


def test_a_few_episodes_are_drawn_from_all_suites_in_turn_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = make_writer(tmp_path)
    for index in range(12):
        writer.write_episode(index, make_episode(index, suite="libero_spatial" if index == 7 else "libero_object"))
    writer.finalize(12)
    dataset = EpisodeDataset(tmp_path)
    whole = load_arrays(dataset, "train", progress=False)
    decoded: list[int] = []
    one = EpisodeDataset.__getitem__
    monkeypatch.setattr(EpisodeDataset, "__getitem__", lambda self, index: decoded.append(index) or one(self, index))
    draws = [load_arrays(dataset, "train", episodes=3, seed=seed, progress=False) for seed in range(4)]
    assert all(sorted(draw.suites) == ["libero_object"] * 2 + ["libero_spatial"] for draw in draws)
    assert len({tuple(record.episode_index for record in draw.records) for draw in draws}) > 1
    assert len(set(decoded)) < 12
    again = subset(whole, 3, 0)
    assert again.records == draws[0].records and torch.equal(again.frames, draws[0].frames)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_arrays(dataset, "train", episodes=0)


@pytest.mark.parametrize("kind", ["json", "table"])
def test_a_file_whose_writing_is_cut_off_stays_as_it_was(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(number: int) -> None:
        if kind == "json":
            schema.write_json(tmp_path / "file", {"number": number})
        else:
            schema.write_table(tmp_path / "file", pa.table({"number": [number]}))

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    write(1)
    before = (tmp_path / "file").read_bytes()
    monkeypatch.setattr("prophet_gym.data.lerobot_format.schema.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(2)
    assert (tmp_path / "file").read_bytes() == before


def test_a_folder_that_does_not_say_whose_it_is_is_refused(tmp_path: Path) -> None:
    claim(tmp_path, command="train", seed=0)
    claim(tmp_path, command="train", seed=0)
    (tmp_path / "run.json").write_text('{"command": "tr')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        claim(tmp_path, command="train", seed=0)


def test_load_arrays_of_several_data_sets(tmp_path: Path) -> None:
    first = write_all(tmp_path / "a")
    writer = make_writer(tmp_path / "b")
    writer.write_episode(0, EPISODES[2])
    writer.finalize()
    arrays = load_arrays([first, EpisodeDataset(tmp_path / "b")], "train", progress=False)
    assert arrays.lengths.tolist() == [6, 8, 8]
    np.testing.assert_array_equal(arrays.frames[6:14], arrays.frames[14:])
    writer = make_writer(tmp_path / "c", frame_stride=2)
    writer.write_episode(0, make_episode(stride=2))
    writer.finalize()
    with pytest.raises(ValueError, match="same"):
        load_arrays([first, EpisodeDataset(tmp_path / "c")], "train")
    writer = make_writer(tmp_path / "d", image_size=(8, 8))
    writer.write_episode(0, make_episode(frames=np.zeros((6, 8, 8, 3), np.uint8)))
    writer.finalize()
    with pytest.raises(ValueError, match=r"frames of shape \(8, 8, 3\)"):
        load_arrays([first, EpisodeDataset(tmp_path / "d")], "train", progress=False)


def fake_arrays(lengths: list[int]) -> EpisodeArrays:
    total = sum(lengths)
    sizes = torch.tensor(lengths)
    record = EpisodeRecord(0, 1, "train", "clean", "s", 0, 0, 0, False, "i", "panda")
    return EpisodeArrays(
        frames=torch.zeros(total, 1, 1, 3, dtype=torch.uint8),
        proprio=torch.zeros(total, 8),
        actions=torch.zeros(total, 4, 7),
        success=torch.zeros(total, dtype=torch.bool),
        starts=sizes.cumsum(0) - sizes,
        lengths=sizes,
        first_frames=torch.zeros(len(lengths), 1, 1, 3, dtype=torch.uint8),
        records=(record,) * len(lengths),
    )


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    horizon=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_windows_stay_in_their_episode(lengths: list[int], horizon: int, seed: int) -> None:
    arrays = fake_arrays(lengths)
    expected = {}  # every window there is, by the slow definition
    for episode, (start, length) in enumerate(zip(arrays.starts.tolist(), lengths, strict=True)):
        for present in range(length - horizon):
            expected[tuple(range(start + present, start + present + horizon + 1))] = (start, episode)
    generator = torch.Generator().manual_seed(seed)
    if not expected:
        with pytest.raises(ValueError, match="No episode has more than"):
            ClipSampler(arrays, horizon, 8)
        return
    sampler = ClipSampler(arrays, horizon, 400)
    assert sampler.num_windows == len(expected)
    clip = sampler.draw(generator)
    assert clip.rows.shape == (400, 1 + horizon)
    drawn = [tuple(row) for row in clip.rows.tolist()]
    assert set(drawn) <= set(expected)
    assert [expected[row] for row in drawn] == list(zip(clip.first_rows.tolist(), clip.episodes.tolist(), strict=True))


def test_windows_are_drawn_uniformly() -> None:
    sampler = ClipSampler(fake_arrays([3, 2, 12]), 2, 60_000)
    present = sampler.draw(torch.Generator().manual_seed(0)).rows[:, 0]
    counts = torch.bincount(present, minlength=17)
    assert counts[counts > 0].numel() == sampler.num_windows == 11
    assert (counts[counts > 0] / 60_000 - 1 / 11).abs().max() < 0.01


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_sampler_refuses_sizes(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        ClipSampler(fake_arrays([5]), *numbers)
