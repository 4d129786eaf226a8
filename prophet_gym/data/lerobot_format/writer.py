"""Writing episodes as a LeRobot v3.0 data set."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from prophet_gym.data.episode import ACTION_DIM, GRIPPERS, Episode
from prophet_gym.data.lerobot_format.schema import (
    ACTION_CONVENTION,
    ACTION_NAMES,
    CHUNKS_SIZE,
    CODEBASE_VERSION,
    DATA_PATH,
    EPISODES_PATH,
    IMAGE_KEY,
    PANDA_ACTION_UNITS,
    PROPRIO_NAMES,
    QUANTILES,
    EpisodeRecord,
    arm_names,
    episode_path,
    numeric_column,
    read_table,
    write_json,
    write_table,
)


class LeRobotWriter:
    """Writes episodes into a LeRobot v3.0 data set, from any number of processes, and can be resumed at any time.

    Every episode is a file of its own that appears atomically, so that processes share nothing but the folder. Calling
    :meth:`finalize` once, after all of them are done, makes the data set readable::

        writer = LeRobotWriter(root, fps=5, frame_stride=4, camera=camera, image_size=96, robot="panda")
        for index in mine:
            if writer.written(index) is None:
                writer.write_episode(index, record(index))
        ...
        writer.finalize(total_episodes=1000)

    :param root: folder of the data set; made if absent.
    :param fps: video frames per second (Hz), >= 1.
    :param frame_stride: control steps per video frame, >= 1; the control rate is ``fps * frame_stride``.
    :param camera: ``{"intrinsics": 3x3, "extrinsics": 4x4}`` as nested lists or arrays (pixels of the stored image, and
        camera-to-world in metres, OpenCV axes: x right, y down, z forward), or one such dict per suite name.
    :param image_size: pixels, one number for a square or (height, width).
    :param robot: name of the robot, as in ``Episode.robot``.
    :param action_mask: (7 K,) which numbers of an action a robot of K arms obeys; the others must be zero.
    :param action_units: what an action of 1.0 does, in words.
    :param video: False: the frames of every episode repeat its first one.
    :raises ValueError: a number is out of range or the camera or the mask is not of the form above.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        fps: int,
        frame_stride: int,
        camera: Mapping[str, Any],
        image_size: int | tuple[int, int],
        robot: str = "panda",
        action_mask: Sequence[bool] = (True,) * ACTION_DIM,
        action_units: str = PANDA_ACTION_UNITS,
        video: bool = True,
    ) -> None:
        for name, number in (("fps", fps), ("frame_stride", frame_stride)):
            if int(number) != number or number < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {number!r}.")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be positive, got {image_size}.")
        if len(action_mask) == 0 or len(action_mask) % ACTION_DIM:
            raise ValueError(f"action_mask must have {ACTION_DIM} values for each arm, got {list(action_mask)}.")
        self.root = Path(root)
        self.fps = int(fps)
        self.frame_stride = int(frame_stride)
        self.camera = _camera_to_lists(camera)
        self.image_size = (int(height), int(width))
        self.robot = robot
        self.action_mask = [bool(used) for used in action_mask]
        self.num_arms = len(action_mask) // ACTION_DIM
        self.action_units = action_units
        self.video = video

    def written(self, index: int) -> EpisodeRecord | None:
        """What episode ``index`` is, if it is completely on disk.

        :raises ValueError: its file is damaged, or was written with other settings than this writer's.
        """
        path = episode_path(self.root, index)
        if not path.is_file():
            return None
        metadata = read_table(path, columns=["episode_index"]).schema.metadata or {}
        if b"prophet" not in metadata:
            raise ValueError(f"{path} was not written by `prophet record`: choose another folder.")
        stored = json.loads(metadata[b"prophet"])
        self._check_settings(path, stored)
        return EpisodeRecord(**stored["record"])

    def write_episode(self, index: int, episode: Episode) -> Path:
        """Write one episode; its file appears whole or not at all. An earlier episode of that index is replaced.

        A data set that was finalized before becomes unfinalized: call :meth:`finalize` again.

        :param index: place of the episode in the data set, >= 0.
        :param episode: must have this writer's image size, frame stride, robot and arms, and zeros where its mask says
            so.
        :return: the file written.
        :raises ValueError: the episode does not fit this data set, or the index is negative.
        """
        if index < 0:
            raise ValueError(f"The episode index must be >= 0, got {index}.")
        for name, expected, got in (
            ("image size (height, width)", self.image_size, episode.frames.shape[1:3]),
            ("frame stride", self.frame_stride, episode.frame_stride),
            ("robot", self.robot, episode.robot),
            ("number of arms", self.num_arms, episode.num_arms),
        ):
            if expected != got:
                raise ValueError(f"Episode {index} has {name} {got}, but this data set is written with {expected}.")
        self._check_mask(f"Episode {index}", episode.actions)
        count = len(episode.frames)
        no_op = np.zeros((1, self.frame_stride, ACTION_DIM * self.num_arms), np.float32)
        no_op[..., GRIPPERS] = episode.actions[-1, -1, GRIPPERS]
        actions = np.concatenate([episode.actions, no_op]).reshape(count, -1)
        frame_index = np.arange(count)
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {
            IMAGE_KEY: pa.array([{"bytes": _to_png(frame), "path": None} for frame in episode.frames], image_type),
            "observation.state": _fixed_size_list(episode.proprio),
            "action": _fixed_size_list(actions),
            "next.success": pa.array(episode.success),
            "timestamp": pa.array((frame_index / self.fps).astype(np.float32)),
            "frame_index": pa.array(frame_index),
            "episode_index": pa.array(np.full(count, index)),
            # Both are known when all episodes are: finalize() sets them.
            "index": pa.array(frame_index),
            "task_index": pa.array(np.zeros(count, np.int64)),
        }
        record = EpisodeRecord(
            episode_index=int(index),
            length=count,
            split=episode.split,
            kind=episode.kind,
            suite=episode.suite,
            task=int(episode.task),
            init_state=int(episode.init_state),
            seed=int(episode.seed),
            success=episode.outcome,
            instruction=episode.instruction,
            robot=episode.robot,
        )
        histogram = np.stack([np.bincount(episode.frames[..., c].ravel(), minlength=256) for c in range(3)])
        metadata = {
            "prophet": json.dumps(
                {"settings": self._settings(), "record": asdict(record), "image_histogram": histogram.tolist()}
            ),
            "huggingface": json.dumps({"info": {"features": _huggingface_features(self._features())}}),
        }
        (self.root / "meta/info.json").unlink(missing_ok=True)
        path = episode_path(self.root, index)
        write_table(path, pa.table(columns, metadata=metadata))
        return path

    def finalize(self, total_episodes: int | None = None) -> None:
        """Number the rows and tasks over all episodes and write ``meta/``, ``info.json`` as the very last file.

        Call it once, when no process writes any more; calling it again is harmless.

        :param total_episodes: how many episodes there must be; ``None`` takes those found.
        :raises FileNotFoundError: there is no episode, or one below the highest index (or ``total_episodes``) is
            missing.
        :raises ValueError: an episode's file is damaged, was written with other settings than this writer's, or has
            actions that its mask leaves out.
        """
        paths = self._episode_files(total_episodes)
        for number in range(len(paths)):
            self.written(number)  # raises, while the data set is still as it was
        (self.root / "meta/info.json").unlink(missing_ok=True)
        records, histograms, episode_stats, numeric = [], [], [], []
        tasks: dict[str, int] = {}
        rows = 0
        for path in paths:
            table = read_table(path)
            stored = json.loads(table.schema.metadata[b"prophet"])
            record = EpisodeRecord(**stored["record"])
            task_index = tasks.setdefault(record.instruction, len(tasks))
            index = np.arange(rows, rows + record.length)
            if not (
                _equals(table, "index", index) and _equals(table, "task_index", np.full(record.length, task_index))
            ):
                table = _set_column(table, "index", index)
                table = _set_column(table, "task_index", np.full(record.length, task_index))
                write_table(path, table)
            values = {name: numeric_column(table, name) for name in table.column_names if name != IMAGE_KEY}
            self._check_mask(path, values["action"].reshape(record.length, self.frame_stride, -1))
            histogram = np.array(stored["image_histogram"], np.int64)
            records.append(record)
            histograms.append(histogram)
            numeric.append(values)
            episode_stats.append(_statistics(values, histogram))
            rows += record.length

        all_values = {name: np.concatenate([values[name] for values in numeric]) for name in numeric[0]}
        write_json(self.root / "meta/stats.json", _statistics(all_values, np.sum(histograms, axis=0)))
        write_table(self.root / "meta/tasks.parquet", _tasks_table(list(tasks)))
        write_table(
            self.root / EPISODES_PATH.format(chunk_index=0, file_index=0), _episodes_table(records, episode_stats)
        )
        info = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.robot,
            "total_episodes": len(records),
            "total_frames": rows,
            "total_tasks": len(tasks),
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": _split_ranges(records),
            "data_path": DATA_PATH,
            "video_path": None,
            "features": self._features(),
            "prophet": {
                "frame_stride": self.frame_stride,
                "control_hz": self.fps * self.frame_stride,
                "camera": self.camera,
                "orientation": "upright",
                "action_convention": ACTION_CONVENTION.format(units=self.action_units),
                "action_mask": self.action_mask,
                "video": self.video,
                "episodes": [asdict(record) for record in records],
            },
        }
        write_json(self.root / "meta/info.json", info)
        for leftover in self.root.glob("**/.*.tmp"):
            leftover.unlink(missing_ok=True)

    def _episode_files(self, total_episodes: int | None) -> list[Path]:
        found = {}
        for path in self.root.glob("data/chunk-*/file-*.parquet"):
            found[int(path.parent.name.removeprefix("chunk-")) * CHUNKS_SIZE + int(path.stem.removeprefix("file-"))] = (
                path
            )
        total = max(found, default=-1) + 1 if total_episodes is None else total_episodes
        if total == 0:
            raise FileNotFoundError(f"{self.root} holds no episode yet: call write_episode() before finalize().")
        missing = sorted(set(range(total)) - set(found))
        if missing:
            raise FileNotFoundError(
                f"{self.root} lacks {len(missing)} of {total} episodes, the first is {missing[0]}: "
                "run the same record command again to resume."
            )
        surplus = sorted(set(found) - set(range(total)))
        if surplus:
            raise ValueError(
                f"{self.root} holds episode {surplus[0]}, but only {total} were asked for: use another folder, or "
                f"finalize with total_episodes={surplus[-1] + 1}."
            )
        return [found[index] for index in range(total)]

    def _check_settings(self, path: Path, stored: Mapping[str, Any]) -> None:
        ours = self._settings()
        theirs = {"camera": ours["camera"]} | stored.get("settings", {})  # files of before do not say it
        if theirs | {"camera": None} != ours | {"camera": None} or not _same_camera(theirs["camera"], ours["camera"]):
            raise ValueError(
                f"{path} was written with the settings {stored.get('settings')}, this writer has "
                f"{self._settings()}: use another folder, or delete the file and record it again."
            )

    def _check_mask(self, name: Path | str, actions: NDArray[Any]) -> None:
        if actions[..., ~np.array(self.action_mask)].any():
            raise ValueError(
                f"{name} has actions other than zero where the action mask {self.action_mask} of the robot "
                f"{self.robot!r} says that it obeys none: set them to zero."
            )

    def _settings(self) -> dict[str, Any]:
        return {
            "fps": self.fps,
            "frame_stride": self.frame_stride,
            "image_size": list(self.image_size),
            "robot": self.robot,
            "camera": self.camera,
        } | ({} if self.video else {"video": False})

    def _features(self) -> dict[str, dict[str, Any]]:
        names = arm_names(ACTION_NAMES, self.num_arms)
        actions = [f"{name}_{step}" for step in range(self.frame_stride) for name in names]
        state = arm_names(PROPRIO_NAMES, self.num_arms)
        scalars = {"next.success": "bool", "timestamp": "float32"}
        scalars |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
        features: dict[str, dict[str, Any]] = {
            IMAGE_KEY: {
                "dtype": "image",
                "shape": [*self.image_size, 3],
                "names": ["height", "width", "channels"],
            },
            "observation.state": {"dtype": "float32", "shape": [len(state)], "names": state},
            "action": {"dtype": "float32", "shape": [len(actions)], "names": actions},
        }
        for name, dtype in scalars.items():
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return features


def _camera_to_lists(camera: Mapping[str, Any]) -> dict[str, Any]:
    """Check one camera, or one per suite, and turn its matrices into nested lists."""
    if not camera:
        raise ValueError(
            'camera must be {"intrinsics": 3x3, "extrinsics": 4x4} or one such dict per suite, got nothing.'
        )
    if not {"intrinsics", "extrinsics"} & set(camera):
        return {suite: _camera_to_lists(one) for suite, one in camera.items()}
    shapes = {"intrinsics": (3, 3), "extrinsics": (4, 4)}
    if set(camera) != set(shapes):
        raise ValueError(f"A camera must have exactly the keys {sorted(shapes)}, got {sorted(camera)}.")
    matrices = {name: np.asarray(camera[name], np.float64) for name in shapes}
    for name, matrix in matrices.items():
        if matrix.shape != shapes[name] or not np.isfinite(matrix).all():
            raise ValueError(
                f"The camera's {name} must be a finite matrix of shape {shapes[name]}, got {camera[name]!r}."
            )
    return {name: matrix.tolist() for name, matrix in matrices.items()}


def _same_camera(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two cameras, or cameras of suites, are the same but for rounding."""
    return one.keys() == other.keys() and all(
        _same_camera(value, other[name]) if isinstance(value, Mapping) else np.allclose(value, other[name])
        for name, value in one.items()
    )


def _to_png(frame: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def _fixed_size_list(rows: NDArray[np.float32]) -> pa.Array:
    """A float32 array (N, D) as an arrow column of N lists of D values."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])


def _equals(table: pa.Table, name: str, expected: NDArray[np.int64]) -> bool:
    return bool(np.array_equal(numeric_column(table, name)[:, 0], expected))


def _set_column(table: pa.Table, name: str, values: NDArray[np.int64]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def _statistics(values: Mapping[str, NDArray[Any]], image_histogram: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
    """LeRobot's statistics of each feature: lists per dimension, images per channel in [0, 1] as (3, 1, 1).

    :param values: (N, D) per numeric feature.
    :param image_histogram: int64 (3, 256), pixels per channel and level. Makes exact quantiles cheap.
    """
    stats: dict[str, dict[str, Any]] = {}
    for name, rows in values.items():
        rows = rows.astype(np.float64)
        summary = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
        summary |= {key: np.quantile(rows, q, axis=0) for key, q in QUANTILES.items()}
        stats[name] = {key: value.tolist() for key, value in summary.items()} | {"count": [len(rows)]}
    count = len(next(iter(values.values())))
    levels = np.arange(256) / 255
    share = image_histogram / image_histogram.sum(1, keepdims=True)
    cumulative = share.cumsum(1)
    mean = share @ levels
    present = image_histogram > 0
    summary = {
        "min": levels[present.argmax(1)],
        "max": levels[255 - present[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
    }
    summary |= {key: levels[(cumulative >= q).argmax(1)] for key, q in QUANTILES.items()}
    stats[IMAGE_KEY] = {key: value.reshape(3, 1, 1).tolist() for key, value in summary.items()} | {"count": [count]}
    return stats


def _episodes_table(records: Sequence[EpisodeRecord], stats: Sequence[Mapping[str, Mapping[str, Any]]]) -> pa.Table:
    ends = np.cumsum([record.length for record in records])
    columns: dict[str, Any] = {
        "episode_index": [record.episode_index for record in records],
        "tasks": [[record.instruction] for record in records],
        "length": [record.length for record in records],
        "data/chunk_index": [record.episode_index // CHUNKS_SIZE for record in records],
        "data/file_index": [record.episode_index % CHUNKS_SIZE for record in records],
        "dataset_from_index": ends - [record.length for record in records],
        "dataset_to_index": ends,
        "meta/episodes/chunk_index": [0] * len(records),
        "meta/episodes/file_index": [0] * len(records),
    }
    for feature in stats[0]:
        for key in stats[0][feature]:
            columns[f"stats/{feature}/{key}"] = [one[feature][key] for one in stats]
    for name in ("split", "kind", "suite", "task", "init_state", "seed", "success", "robot"):
        columns[f"prophet/{name}"] = [getattr(record, name) for record in records]
    return pa.table(columns)


def _tasks_table(tasks: Sequence[str]) -> pa.Table:
    """The table of tasks; its ``pandas`` metadata makes the sentence the index, which LeRobot looks tasks up by."""
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None, **text, "metadata": {"encoding": "UTF-8"}}],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {"name": "task", "field_name": "task", **text},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.3",
    }
    columns = {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())}
    return pa.table(columns, metadata={"pandas": json.dumps(pandas)})


def _split_ranges(records: Sequence[EpisodeRecord]) -> dict[str, str]:
    """``"from:to"`` in episodes for each split that is one contiguous range; the records say it for any order."""
    members: dict[str, list[int]] = {}
    for record in records:
        members.setdefault(record.split, []).append(record.episode_index)
    return {name: f"{m[0]}:{m[-1] + 1}" for name, m in members.items() if m[-1] - m[0] + 1 == len(m)}


def _huggingface_features(features: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The schema as the ``datasets`` library stores it in a parquet file."""
    described: dict[str, Any] = {}
    for name, feature in features.items():
        value = {"dtype": feature["dtype"], "_type": "Value"}
        if feature["dtype"] == "image":
            described[name] = {"_type": "Image"}
        elif feature["shape"] == [1]:
            described[name] = value
        else:
            described[name] = {"feature": value, "length": math.prod(feature["shape"]), "_type": "Sequence"}
    return described
