"""Names, paths and files of the LeRobot dataset format v3.0, shared by its writer and its reader."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

CODEBASE_VERSION = "v3.0"
CHUNKS_SIZE = 1000
IMAGE_KEY = "observation.images.agentview"
FILE_PATTERN = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILE_PATTERN}.parquet"
EPISODES_PATH = f"meta/episodes/{FILE_PATTERN}.parquet"
ACTION_CONVENTION = (
    "frame_stride actions of 7 values for each arm in [-1, 1], executed between this row's frame and the next one: "
    "delta xyz, delta rotation in the world frame ({units}), gripper (-1 opens, +1 closes). "
    "The last row of an episode is a no-op with the last gripper command."
)
PANDA_ACTION_UNITS = "1.0 is a goal 5 cm / 0.5 rad from the current pose"
PROPRIO_NAMES = ("x", "y", "z", "rx", "ry", "rz", "finger_0", "finger_1")
ACTION_NAMES = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
"""Of one arm; of two, the second one's names begin with ``arm_1_``."""
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class EpisodeRecord:
    """What is known about an episode without reading its frames.

    :param episode_index: place in the data set.
    :param length: number of frames (rows), T + 1.
    :param success: whether the task stands solved at the last frame.

    The other fields are those of :class:`~prophet_gym.data.episode.Episode`.
    """

    episode_index: int
    length: int
    split: str
    kind: str
    suite: str
    task: int
    init_state: int
    seed: int
    success: bool
    instruction: str
    robot: str


def arm_names(names: Sequence[str], num_arms: int) -> list[str]:
    """The names of one arm's numbers, once for each arm."""
    return [f"arm_{arm}_{name}" if arm else name for arm in range(num_arms) for name in names]


def episode_path(root: Path, index: int) -> Path:
    """Where the writer puts an episode: a file of its own."""
    return root / DATA_PATH.format(chunk_index=index // CHUNKS_SIZE, file_index=index % CHUNKS_SIZE)


def numeric_column(table: pa.Table, name: str) -> NDArray[Any]:
    """A numeric column as an array (N, D); scalars have D = 1."""
    column = table.column(name).combine_chunks()
    if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    return np.asarray(values).reshape(len(table), -1)


def read_table(path: Path, columns: Sequence[str] | None = None, episode_index: int | None = None) -> pa.Table:
    """Read a parquet file, or some columns of it, or the rows of one episode.

    :raises FileNotFoundError: the file is absent.
    :raises ValueError: the file is damaged, or lacks one of the columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the data set is incomplete, copy or record it again.")
    filters = None if episode_index is None else [("episode_index", "=", episode_index)]
    try:
        absent = sorted(set(columns or ()) - set(pq.read_schema(path).names))
        if not absent:
            return pq.read_table(path, partitioning=None, columns=columns, filters=filters)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a readable parquet file (truncated or damaged: {error}). "
            "Delete it and run the same record command again, or copy it again."
        ) from error
    raise ValueError(f"{path} lacks the columns {absent}: it is from another data set, copy or record it again.")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    pq.write_table(table, temporary, compression="snappy")
    os.replace(temporary, path)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what is not defined (a rate of nothing) becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)
