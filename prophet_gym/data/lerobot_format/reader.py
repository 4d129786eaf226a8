"""Reading episodes from a LeRobot v3.0 data set, ours or written by other software."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from prophet_gym.data.episode import ACTION_DIM, KINDS, ORIENTATIONS, PROPRIO_DIM, SPLITS, Episode, to_upright
from prophet_gym.data.lerobot_format.schema import EpisodeRecord, numeric_column, read_table


@dataclass(frozen=True)
class ForeignFields:
    """What a data set of other software cannot say, because LeRobot's format has no place for it.

    :param orientation: how its frames are stored, see :func:`~prophet_gym.data.episode.to_upright`.
    :param suite: suite name to give all its episodes.
    :param frame_stride: control steps per video frame to read it with; the stored rows are one control step each.
    :param split: split to give all its episodes.
    :param kind: kind to give all its episodes.
    :param success: whether its episodes end solved; needed only where it has no ``next.success`` column.
    """

    orientation: str
    suite: str
    frame_stride: int = 1
    split: str = "train"
    kind: str = "clean"
    success: bool | None = None

    def __post_init__(self) -> None:
        for name, choices in (("orientation", ORIENTATIONS), ("split", SPLITS), ("kind", KINDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}.")
        if self.frame_stride < 1:
            raise ValueError(f"frame_stride must be >= 1, got {self.frame_stride}.")


class EpisodeDataset(Sequence[Episode]):
    """The episodes of a LeRobot v3.0 data set; ``dataset[i]`` reads and decodes one.

    Nothing but the metadata is held in memory. Images stored with dtype ``image`` (PNG in parquet) and ``video`` (mp4)
    are both read. Reading is thread-safe::

        dataset = EpisodeDataset("recordings/libero_object").select(split="train", kind="clean")
        episode = dataset[0]

    :param root: folder of the data set.
    :param image_key: feature to take the frames from; needed only where there are several cameras.
    :param foreign: needed only for a data set that :class:`LeRobotWriter` did not write.
    :raises FileNotFoundError: there is no such folder, a file of it is missing, or it was not finalized.
    :raises ValueError: the format version, camera, action or state do not fit, or a file is damaged.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_key: str | None = None,
        foreign: ForeignFields | None = None,
    ) -> None:
        self.root = Path(root)
        self.info = _load_info(self.root)
        self.image_key = self._find_image_key(image_key)
        self._foreign = foreign
        if "prophet" in self.info:
            if foreign is not None:
                raise ValueError(f"{self.root} says itself what `foreign` would give: leave that argument out.")
            self._stored_stride: int = self.info["prophet"]["frame_stride"]
            self._orientation: str = self.info["prophet"]["orientation"]
            self.frame_stride: int = self._stored_stride
        else:
            if foreign is None:
                raise ValueError(
                    f"{self.root} was written by other software and does not say how its images are oriented, nor its "
                    'suite: pass foreign=ForeignFields(orientation="...", suite="...").'
                )
            self._stored_stride = 1
            self._orientation = foreign.orientation
            self.frame_stride = foreign.frame_stride
        self.fps: float = self.info["fps"] * self._stored_stride / self.frame_stride
        shapes = [self.info["features"].get(name, {}).get("shape") for name in ("action", "observation.state")]
        self.num_arms = shapes[1][0] // PROPRIO_DIM if shapes[1] else 0
        if not self.num_arms or shapes != [
            [self._stored_stride * ACTION_DIM * self.num_arms],
            [PROPRIO_DIM * self.num_arms],
        ]:
            raise ValueError(
                f"{self.root} has 'action' and 'observation.state' of shapes {shapes}, expected "
                f"{[[self._stored_stride * ACTION_DIM], [PROPRIO_DIM]]} (frame stride {self._stored_stride}, "
                f"{ACTION_DIM} numbers an action, {PROPRIO_DIM} of proprioception), or as often again for each further "
                "arm: convert the data set first."
            )
        self._rows = self._load_episode_rows()
        self.records = self._make_records()

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Episode: ...

    @overload
    def __getitem__(self, index: slice) -> "EpisodeDataset": ...

    def __getitem__(self, index: int | slice) -> "Episode | EpisodeDataset":
        if isinstance(index, slice):
            return self._subset(self.records[index])
        return self._read(self.records[index])

    def __iter__(self) -> Iterator[Episode]:
        return (self._read(record) for record in self.records)

    def select(
        self,
        *,
        split: str | Sequence[str] | None = None,
        suite: str | Sequence[str] | None = None,
        kind: str | Sequence[str] | None = None,
    ) -> "EpisodeDataset":
        """The episodes that match all that is given, each one name or several; possibly none.

        :raises ValueError: a split or kind does not exist, or a suite is not in this data set; lists those that are.
        """
        chosen = self.records
        suites = sorted({record.suite for record in self.records})
        for name, wanted, valid in (("split", split, SPLITS), ("suite", suite, suites), ("kind", kind, KINDS)):
            if wanted is None:
                continue
            names = [wanted] if isinstance(wanted, str) else list(wanted)
            unknown = [one for one in names if one not in valid]
            if unknown:
                raise ValueError(f"Unknown {name} {unknown[0]!r}: choose from {list(valid)}.")
            chosen = tuple(record for record in chosen if getattr(record, name) in names)
        return self._subset(chosen)

    def camera(self, suite: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The camera of a suite: float64 intrinsics (3, 3) in pixels, extrinsics (4, 4) camera-to-world in metres.

        :raises KeyError: the data set has no camera for it.
        """
        camera = self.info.get("prophet", {}).get("camera", {})
        camera = camera if "intrinsics" in camera else camera.get(suite)
        if camera is None:
            raise KeyError(f"{self.root} has no camera for suite {suite!r}.")
        return np.array(camera["intrinsics"], np.float64), np.array(camera["extrinsics"], np.float64)

    @property
    def action_mask(self) -> NDArray[np.bool_]:
        """Which numbers of an action the robot obeys, bool (7 an arm); all, where the data set does not say."""
        return np.array(self.info.get("prophet", {}).get("action_mask", [True] * ACTION_DIM * self.num_arms), np.bool_)

    @property
    def video(self) -> bool:
        """Whether the frames show the episodes; False where all of them repeat the first one."""
        return bool(self.info.get("prophet", {}).get("video", True))

    def _subset(self, records: tuple[EpisodeRecord, ...]) -> "EpisodeDataset":
        subset = object.__new__(EpisodeDataset)
        subset.__dict__.update(self.__dict__, records=records)
        return subset

    def _find_image_key(self, image_key: str | None) -> str:
        cameras = [name for name, feature in self.info["features"].items() if feature["dtype"] in ("image", "video")]
        if image_key is None and len(cameras) == 1:
            return cameras[0]
        if image_key is None or image_key not in cameras:
            raise ValueError(f"{self.root} has the cameras {cameras}: pass one as image_key, got {image_key!r}.")
        return image_key

    def _load_episode_rows(self) -> list[dict[str, Any]]:
        paths = sorted((self.root / "meta/episodes").glob("chunk-*/file-*.parquet"))
        tables = [read_table(path) for path in paths]
        rows = [
            row
            for table in tables
            for row in table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
        ]
        rows.sort(key=lambda row: row["episode_index"])
        if [row["episode_index"] for row in rows] != list(range(self.info["total_episodes"])):
            raise FileNotFoundError(
                f"{self.root}/meta/episodes lists {len(rows)} episodes, info.json {self.info['total_episodes']}: "
                "a file is missing, copy or finalize the data set again."
            )
        return rows

    def _make_records(self) -> tuple[EpisodeRecord, ...]:
        names = ("split", "kind", "suite", "task", "init_state", "seed", "success", "robot")
        records = []
        outcomes = self._foreign_outcomes() if self._foreign else {}
        for row in self._rows:
            if len(row["tasks"]) != 1:
                raise ValueError(
                    f"Episode {row['episode_index']} of {self.root} has the tasks {row['tasks']}: one is expected."
                )
            index, instruction = row["episode_index"], row["tasks"][0]
            length = row["length"]
            if self._foreign is None:
                fields = {name: row[f"prophet/{name}"] for name in names}
            else:
                length = (row["length"] - 1) // self._foreign.frame_stride + 1
                fields = {
                    "split": self._foreign.split,
                    "kind": self._foreign.kind,
                    "suite": self._foreign.suite,
                    "task": self._task_index(instruction),
                    "init_state": index,
                    "seed": 0,
                    "success": outcomes[index],
                    "robot": self.info["robot_type"] or "unknown",
                }
            records.append(EpisodeRecord(episode_index=index, length=length, instruction=instruction, **fields))
        return tuple(records)

    def _task_index(self, instruction: str) -> int:
        table = read_table(self.root / "meta/tasks.parquet")
        sentences = next(table.column(name) for name in table.column_names if name != "task_index").to_pylist()
        return int(table.column("task_index")[sentences.index(instruction)].as_py())

    def _foreign_outcomes(self) -> dict[int, bool]:
        """Whether each episode of a foreign data set ends solved."""
        assert self._foreign is not None
        if "next.success" not in self.info["features"]:
            if self._foreign.success is None:
                raise ValueError(
                    f"{self.root} has no 'next.success' column: say ForeignFields(success=True) if all its episodes "
                    "end solved, or False."
                )
            return {row["episode_index"]: self._foreign.success for row in self._rows}
        if self._foreign.success is not None:
            raise ValueError(f"{self.root} has a 'next.success' column: leave ForeignFields.success out.")
        outcomes: dict[int, bool] = {}
        for path in sorted({self._data_file(row) for row in self._rows}):
            table = read_table(path, ["episode_index", "next.success"])
            # Rows are in the order of time: the last one of an episode stays.
            outcomes.update(zip(table["episode_index"].to_pylist(), table["next.success"].to_pylist(), strict=True))
        return outcomes

    def _data_file(self, row: dict[str, Any]) -> Path:
        location = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        return self.root / str(self.info["data_path"]).format(**location)

    def _read(self, record: EpisodeRecord) -> Episode:
        row = self._rows[record.episode_index]
        path = self._data_file(row)
        columns = ["observation.state", "action"]
        columns += [name for name in ("next.success",) if name in self.info["features"]]
        is_video = self.info["features"][self.image_key]["dtype"] == "video"
        columns += [] if is_video else [self.image_key]
        table = read_table(path, columns, record.episode_index)
        if table.num_rows != row["length"]:
            raise ValueError(
                f"{path} holds {table.num_rows} of the {row['length']} rows of episode {record.episode_index}: "
                "it is damaged or from another data set, copy or record it again."
            )
        arrays = {}
        for name in ("observation.state", "action"):
            arrays[name] = numeric_column(table, name).astype(np.float32)
            width = self.info["features"][name]["shape"][0]
            if arrays[name].shape[1] != width:
                raise ValueError(
                    f"{path} has {arrays[name].shape[1]} numbers a row in {name!r}, info.json says {width}: "
                    "it is from another data set, copy or record it again."
                )
        if "next.success" in table.column_names:
            success = numeric_column(table, "next.success")[:, 0].astype(np.bool_)
            if self._foreign is not None:  # of other software row k has what frame k + 1 shows; the outcome stays
                success = np.concatenate([[False], success[:-2], success[-1:]])
        else:
            success = np.zeros(row["length"], np.bool_)
            success[-1] = record.success
        frames = self._read_video(row) if is_video else _decode_images(table.column(self.image_key), path)
        actions = arrays["action"].reshape(row["length"], self._stored_stride, -1)[:-1]
        episode = Episode(
            frames=np.ascontiguousarray(to_upright(frames, self._orientation)),
            proprio=arrays["observation.state"],
            actions=actions,
            success=success,
            instruction=record.instruction,
            suite=record.suite,
            task=record.task,
            init_state=record.init_state,
            split=record.split,
            kind=record.kind,
            robot=record.robot,
            seed=record.seed,
        )
        return episode if self._foreign is None else episode.with_frame_stride(self._foreign.frame_stride)

    def _read_video(self, row: dict[str, Any]) -> NDArray[np.uint8]:
        """The frames (T + 1, H, W, 3) of an episode from its stretch of an mp4 file."""
        key = self.image_key
        location = {"chunk_index": row[f"videos/{key}/chunk_index"], "file_index": row[f"videos/{key}/file_index"]}
        path = self.root / str(self.info["video_path"]).format(video_key=key, **location)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the data set is incomplete, copy it again.")
        try:
            import av
        except ImportError as error:
            raise ImportError('Reading mp4 needs PyAV: pip install "prophet-gym[video]".') from error
        start: float = row[f"videos/{key}/from_timestamp"]
        fps: float = self.info["fps"]
        half_frame = 0.5 / fps
        frames: list[NDArray[np.uint8]] = []
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                assert stream.time_base is not None
                container.seek(int(max(start - half_frame, 0) / stream.time_base), stream=stream)
                for frame in container.decode(stream):
                    assert frame.time is not None
                    if frame.time < start - half_frame:
                        continue
                    if len(frames) == row["length"]:
                        break
                    expected = start + len(frames) / fps
                    if abs(frame.time - expected) > half_frame:
                        raise ValueError(
                            f"{path}: frame {len(frames)} of episode {row['episode_index']} is at {frame.time:.3f} s, "
                            f"not {expected:.3f} s: the video does not have {fps} frames a second."
                        )
                    frames.append(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False))
        except av.FFmpegError as error:
            raise ValueError(
                f"{path} is not a readable video (truncated or damaged: {error}): copy it again."
            ) from error
        if len(frames) != row["length"]:
            raise ValueError(
                f"{path} holds {len(frames)} of the {row['length']} frames of episode {row['episode_index']}: "
                "copy it again."
            )
        return np.stack(frames)


def check_video(datasets: Sequence[EpisodeDataset]) -> None:
    """Raise a ValueError where a data set was recorded without video."""
    if blind := [str(dataset.root) for dataset in datasets if not dataset.video]:
        raise ValueError(
            f"{blind} were recorded without video: leave them out here. `prophet adapt --recipe motion` and "
            "`refine`, `prophet train-reward --motion` and `fagrpo sft --blind` learn from them."
        )


def _load_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not root.is_dir():
        raise FileNotFoundError(f"There is no data set folder {root}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is absent: if {root} is the folder of an unfinished recording, run the same record command again "
            "to resume it; otherwise it is no data set."
        )
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or finalize the data set again.") from error
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise ValueError(
            f"{root} is in LeRobot format {version}, this reader needs v3.x: convert it with LeRobot "
            "(lerobot.datasets.v30.convert_dataset_v21_to_v30)."
        )
    return info


def _decode_images(column: pa.ChunkedArray, path: Path) -> NDArray[np.uint8]:
    """A column of PNG or JPEG bytes as uint8 (N, H, W, 3)."""
    images: dict[bytes, NDArray[np.uint8]] = {}  # without video an episode is one image, many times
    frames = []
    for row, stored in enumerate(column.to_pylist()):
        if stored is None or (data := stored["bytes"]) is None:
            raise ValueError(f"{path}, row {row}: the image is not embedded in the file.")
        try:
            if data not in images:
                with Image.open(BytesIO(data)) as image:
                    if image.mode != "RGB":
                        raise ValueError(f"{path}, row {row}: the image has mode {image.mode}, expected RGB.")
                    images[data] = np.asarray(image)
            frames.append(images[data])
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{path}, row {row}: the image is damaged ({error}): record the episode again.") from error
    return np.stack(frames)
