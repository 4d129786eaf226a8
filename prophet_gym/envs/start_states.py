"""Where an episode begins: recorded starts, a user's own start, and what ``reset(options=...)`` may ask for."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from prophet_gym.data.episode import PROPRIO_BOUND, PROPRIO_DIM, SPLITS, Episode
from prophet_gym.data.instructions import embed_instructions

DEFAULT_PATH = Path(__file__).parents[1] / "weights" / "start_states.parquet"
"""The starts in the wheel: one per task and official initial state of every suite that ships."""

USER_SUITE = "user"
"""``info["suite"]`` of an episode that began from the user's own start (its task and init_state are -1)."""

_SCHEMA = pa.schema(
    [
        ("suite", pa.string()),
        ("task", pa.int32()),
        ("task_name", pa.string()),
        ("instruction", pa.string()),
        ("init_state", pa.int32()),
        ("split", pa.string()),
        ("proprio", pa.list_(pa.float32())),
        ("image", pa.binary()),
    ]
)
_START_KEYS = {"image", "proprio", "instruction"}
_TABLE_KEYS = {"suite", "task", "init_state"}


@dataclass(frozen=True, eq=False)
class StartState:
    """The moment before the first action of an episode.

    :param suite: task suite, e.g. ``"libero_object"``; ``"user"`` for a start that the user gave.
    :param task: index of the task in its suite; -1 for a user's start.
    :param task_name: the task's name in snake case.
    :param instruction: the task in words.
    :param init_state: index of the initial state; -1 for a user's start.
    :param split: ``"train"``, ``"val"`` or ``"test"``; ``"user"`` for a start that the user gave.
    :param proprio: float32 (8 K,), for each of the robot's K arms in turn: end-effector position (3, metres, world),
        orientation as axis-angle (3, radians), gripper finger positions (2, metres).
    :param image: uint8 (H, W, 3), upright RGB.
    """

    suite: str
    task: int
    task_name: str
    instruction: str
    init_state: int
    split: str
    proprio: NDArray[np.float32]
    image: NDArray[np.uint8]


class StartStates:
    """A table of start states, drawn from by suite, task, split and initial state.

    :param path: a parquet file as :func:`write_start_states` writes it.
    :raises FileNotFoundError: there is no such file.
    :raises ValueError: the file is damaged, empty or of another layout.
    """

    def __init__(self, path: str | os.PathLike[str] = DEFAULT_PATH) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"No start states at {self.path}. Pass start_states=PATH of a file made by "
                "prophet_gym.envs.start_states.write_start_states."
            )
        try:
            table = pq.read_table(self.path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{self.path} is not a readable parquet file ({error}): write or download it again."
            ) from error
        missing = [name for name in _SCHEMA.names if name not in table.column_names]
        if missing or not len(table):
            what = f"it lacks the columns {missing}" if missing else "it has no rows"
            raise ValueError(f"{self.path} holds no start states: {what}. Write it with write_start_states.")
        self._rows = table.select(_SCHEMA.names).cast(_SCHEMA).to_pylist()
        if wrong := [row for row, values in enumerate(self._rows) if not _is_proprio(np.array(values["proprio"]))]:
            raise ValueError(
                f"{self.path}, row {wrong[0]}: proprio must be {PROPRIO_DIM} numbers for each arm, got "
                f"{self._rows[wrong[0]]['proprio']}. Write it with write_start_states."
            )
        # suite -> task -> split -> {init_state: row}
        self._index: dict[str, dict[int, dict[str, dict[int, int]]]] = {}
        self._task_numbers: dict[tuple[str, str], int] = {}
        for number, row in enumerate(self._rows):
            by_split = self._index.setdefault(row["suite"], {}).setdefault(row["task"], {})
            by_split.setdefault(row["split"], {})[row["init_state"]] = number
            self._task_numbers[row["suite"], row["task_name"]] = row["task"]
        sizes = [_image_size(row["image"], f"{self.path}, row {number}") for number, row in enumerate(self._rows)]
        self.image_size = sizes[0][0]
        if wrong := [number for number, size in enumerate(sizes) if size != (self.image_size, self.image_size)]:
            raise ValueError(
                f"{self.path}, row {wrong[0]}: the image has {sizes[wrong[0]]} pixels; all must be square and of one "
                f"size, row 0 has {sizes[0]}. Write it with write_start_states."
            )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def suites(self) -> list[str]:
        """The suites that have starts here."""
        return sorted(self._index)

    def tasks(self, suite: str, split: str) -> list[int]:
        """Tasks of ``suite`` with starts in ``split``.

        :raises ValueError: unknown suite or split, or no starts of this split.
        """
        if suite not in self._index:
            raise ValueError(
                f"Unknown suite {suite!r}. Valid suites: {self.suites}, of which {self.path.name} has starts. For "
                "another one write its starts (`write_start_states`, docs/environments.md) and pass start_states=PATH."
            )
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}. Valid splits: {list(SPLITS)}.")
        tasks = sorted(task for task, by_split in self._index[suite].items() if split in by_split)
        if not tasks:
            raise ValueError(f"{self.path} has no starts of {suite!r} in the split {split!r}.")
        return tasks

    def task_number(self, suite: str, split: str, task: int | str) -> int:
        """The number of a task given by number or by name.

        :raises ValueError: unknown suite, split or task.
        """
        valid = self.tasks(suite, split)
        number = self._task_numbers.get((suite, task)) if isinstance(task, str) else task
        if number not in valid or isinstance(number, bool):
            names = {self._task_numbers[key]: key[1] for key in self._task_numbers if key[0] == suite}
            listed = "\n".join(f"  {i}  {names[i]}" for i in valid)
            raise ValueError(f"Unknown task {task!r} of {suite!r}. Valid tasks, by number or by name:\n{listed}")
        return int(number)

    def pairs(self, suite: str, split: str) -> NDArray[np.int64]:
        """Task and initial state of all starts of a suite in a split, int64 (N, 2).

        :raises ValueError: as :meth:`tasks`.
        """
        tasks = self.tasks(suite, split)
        return np.array([(task, state) for task in tasks for state in sorted(self._index[suite][task][split])])

    def draw(
        self,
        np_random: np.random.Generator,
        *,
        suite: str,
        split: str,
        task: int | str | None = None,
        init_state: int | None = None,
    ) -> StartState:
        """The start of one episode; what is None is drawn from ``np_random``: the task first, then the initial state.

        :raises ValueError: unknown suite, split, task or initial state, or an initial state of another split.
        """
        if task is None:
            tasks = self.tasks(suite, split)
            number = tasks[int(np_random.integers(len(tasks)))]
        else:
            number = self.task_number(suite, split, task)
        rows = self._index[suite][number][split]
        if init_state is None:
            states = sorted(rows)
            init_state = states[int(np_random.integers(len(states)))]
        elif init_state not in rows or isinstance(init_state, bool):
            raise ValueError(
                f"Unknown init_state {init_state!r} of task {number} of {suite!r} in the split {split!r}. "
                f"Valid: {sorted(rows)}. Others belong to other splits: make the env with one of split={list(SPLITS)}."
            )
        row = self._rows[rows[init_state]]
        return StartState(
            suite=row["suite"],
            task=row["task"],
            task_name=row["task_name"],
            instruction=row["instruction"],
            init_state=row["init_state"],
            split=row["split"],
            proprio=np.array(row["proprio"], dtype=np.float32),
            image=_decode_image(row["image"], f"{self.path}, row {rows[init_state]}"),
        )


@lru_cache(maxsize=8)
def _read(path: Path, modified_ns: int) -> StartStates:
    return StartStates(path)


def load_start_states(path: str | os.PathLike[str] | None = None) -> StartStates:
    """The table at ``path`` (None: the one in the wheel), read once per process unless the file changes.

    :raises FileNotFoundError, ValueError: see :class:`StartStates`.
    """
    path = DEFAULT_PATH if path is None else Path(path).resolve()
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else StartStates(path)


@lru_cache(maxsize=4096)
def _embed(instruction: str) -> NDArray[np.float32]:
    embedding = np.asarray(embed_instructions([instruction])[0], dtype=np.float32)
    embedding.setflags(write=False)
    return embedding


def instruction_embedding(instruction: str) -> NDArray[np.float32]:
    """Sentence embedding float32 (384,) of one instruction, computed once per process (read-only)."""
    return _embed(instruction)


def user_start(image: ArrayLike, proprio: ArrayLike, instruction: str, *, image_size: int) -> StartState:
    """Check a start that the user gives, and bring its image to the size the world model works at.

    A square image of any size is accepted: it is averaged over areas when larger than ``image_size``, interpolated
    bicubically when smaller, and unchanged when equal. Nothing is ever cropped.

    :param image: uint8 (S, S, 3), upright RGB, the view of the training camera.
    :param proprio: float (8 K,), as :class:`StartState`.
    :param instruction: the task in words.
    :param image_size: pixels per side of the world model's frames.
    :raises TypeError: the image is not uint8, or the instruction not a str.
    :raises ValueError: a wrong shape, a non-square image, proprioception that is not finite or out of bounds, an empty
        instruction.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise TypeError(
            f"start['image'] must be uint8 in [0, 255], got {pixels.dtype}. "
            "If it is a float image in [0, 1]: (image * 255).round().astype(np.uint8)."
        )
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"start['image'] must have shape (S, S, 3) per env (RGB, channels last), got {pixels.shape}.")
    height, width = pixels.shape[:2]
    if height != width:
        short, long = sorted((height, width))
        raise ValueError(
            f"start['image'] must be square, got {height} x {width} pixels. Nothing is cropped for you, because that "
            f"would move the camera: crop to {short} x {short} or pad to {long} x {long} yourself."
        )
    if height != image_size:
        method = Image.Resampling.BOX if height > image_size else Image.Resampling.BICUBIC
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((image_size, image_size), method))
    state = np.asarray(proprio)
    if not _is_proprio(state) or not np.issubdtype(state.dtype, np.floating):
        raise ValueError(
            f"start['proprio'] must be a float array of shape ({PROPRIO_DIM},) per env, or as often again for each "
            "further arm: end-effector position (3, m), axis-angle (3, rad), gripper fingers (2, m). Got "
            f"{state.dtype} {state.shape}."
        )
    if not (np.abs(state) <= PROPRIO_BOUND).all():
        raise ValueError(
            f"start['proprio'] must be finite and within {PROPRIO_BOUND} m and rad of zero, got {state}: are its units "
            "millimetres or degrees?"
        )
    if not isinstance(instruction, str):
        raise TypeError(f"start['instruction'] must be a str per env, got {type(instruction).__name__}.")
    if not instruction.strip():
        raise ValueError("start['instruction'] must not be empty: say what the robot is to do.")
    return StartState(USER_SUITE, -1, USER_SUITE, instruction, -1, USER_SUITE, state.astype(np.float32), pixels.copy())


def _is_proprio(state: NDArray[Any]) -> bool:
    """Whether it has the shape of the proprioception of one arm or several."""
    return state.ndim == 1 and len(state) > 0 and len(state) % PROPRIO_DIM == 0


@dataclass(frozen=True)
class ResetRequest:
    """What ``reset(options=...)`` of a vector env asks for, checked and spread over its envs.

    :param mask: bool (num_envs,), the envs to reset.
    :param group_size: envs ``i * group_size ... (i + 1) * group_size - 1`` share one start and member.
    :param per_env: for each env any of ``{"suite", "task", "init_state", "member"}``, or of
        ``{"start": {"image", "proprio", "instruction"}, "member"}``.
    """

    mask: NDArray[np.bool_]
    group_size: int
    per_env: list[dict[str, Any]]

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, num_envs: int) -> "ResetRequest":
        """Read the options of a vector env (see ``ProphetVectorEnv.reset``), or one dict of single-env options per env.

        :raises TypeError: options, a mask or a start of the wrong type.
        :raises ValueError: unknown option names, wrong lengths, options that contradict each other.
        """
        if options is None:
            options = {}
        if isinstance(options, Mapping):
            shared = dict(options)
            mask = _check_mask(shared.pop("reset_mask", None), num_envs)
            group_size = shared.pop("group_size", 1)
            per_env = _spread(shared, num_envs)
        else:
            if len(options) != num_envs:
                raise ValueError(f"A list of reset options needs one dict per env ({num_envs}), got {len(options)}.")
            mask = np.ones(num_envs, dtype=np.bool_)
            per_env = [dict(one) for one in options]
            sizes = [one.pop("group_size", 1) for one in per_env]
            if any(size != sizes[0] for size in sizes):
                raise ValueError(f"The envs of one reset must agree on group_size, got {sizes}.")
            group_size = sizes[0]
            for one in per_env:
                _check_names(one, ("group_size",))
        _check_groups(group_size, mask, per_env)
        return cls(mask, int(group_size), per_env)


def _check_names(options: Mapping[str, Any], taken: Sequence[str]) -> None:
    """:param taken: further options, which have been taken out already"""
    unknown = sorted(set(options) - _TABLE_KEYS - {"member", "start"})
    if unknown:
        valid = [*sorted(_TABLE_KEYS), "member", "start", *taken]
        raise ValueError(f"Unknown reset options {unknown}. Valid options: {valid}.")
    if "start" not in options:
        return
    if clash := sorted(_TABLE_KEYS & set(options)):
        raise ValueError(
            f"Reset options {clash} choose a recorded start and 'start' gives your own: pass one or the other."
        )
    start = options["start"]
    if not isinstance(start, Mapping):
        raise TypeError(
            f"Reset option 'start' must be a dict with the keys {sorted(_START_KEYS)}, got {type(start).__name__}."
        )
    if set(start) != _START_KEYS:
        raise ValueError(f"Reset option 'start' must have the keys {sorted(_START_KEYS)}, got {sorted(start)}.")


def _spread(options: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """One dict of single-env options per env, from options whose values are shared or have one entry per env."""
    _check_names(options, ("group_size", "reset_mask"))
    per_env: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, value in options.items():
        if name == "start":
            for key, batch in value.items():
                if not hasattr(batch, "__len__") or isinstance(batch, str) or len(batch) != num_envs:
                    got = len(batch) if hasattr(batch, "__len__") and not isinstance(batch, str) else repr(batch)
                    raise ValueError(f"start[{key!r}] of a vector env needs one entry per env ({num_envs}), got {got}.")
                for i in range(num_envs):
                    per_env[i].setdefault("start", {})[key] = batch[i]
        elif value is not None and not isinstance(value, str) and hasattr(value, "__len__"):
            if len(value) != num_envs:
                raise ValueError(
                    f"Reset option {name!r} must be one value or one per env ({num_envs}), got {len(value)}."
                )
            for i in range(num_envs):
                per_env[i][name] = value[i]
        else:
            for i in range(num_envs):
                per_env[i][name] = value
    return per_env


def _check_mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        got = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"Reset option 'reset_mask' must be a bool array, got {got}.")
    if mask.shape != (num_envs,) or not mask.any():
        raise ValueError(f"Reset option 'reset_mask' must have shape ({num_envs},) and at least one True, got {mask}.")
    return mask


def _check_groups(group_size: Any, mask: NDArray[np.bool_], per_env: list[dict[str, Any]]) -> None:
    num_envs = len(mask)
    if isinstance(group_size, bool) or not isinstance(group_size, int | np.integer) or group_size < 1:
        raise ValueError(f"Reset option 'group_size' must be a positive int, got {group_size!r}.")
    if num_envs % group_size:
        raise ValueError(f"Reset option 'group_size' must divide the number of envs ({num_envs}), got {group_size}.")
    if group_size == 1:
        return
    by_group = mask.reshape(-1, group_size)
    if (by_group.any(axis=1) != by_group.all(axis=1)).any():
        raise ValueError(f"'reset_mask' must reset whole groups of {group_size} envs when 'group_size' is given.")
    if any("start" in one for one in per_env):
        raise ValueError(
            "'group_size' groups recorded starts: for your own start, repeat it once per env and leave group_size out."
        )
    if any(one != per_env[i - i % group_size] for i, one in enumerate(per_env)):
        raise ValueError(
            f"The {group_size} envs of a group share one start: give them the same suite, task, init_state and member."
        )


def write_start_states(rows: Iterable[StartState], path: str | os.PathLike[str]) -> None:
    """Write start states to a parquet file (lossless WebP images), atomically.

    :param rows: the starts; every (suite, task, init_state) once.
    :param path: the file to write; a file that is there is replaced.
    :raises ValueError: no rows, two rows of one initial state, images of several sizes, or a row with a wrong image,
        proprioception or split.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    seen: set[tuple[str, int, int]] = set()
    size = 0
    for row in rows:
        key = (row.suite, row.task, row.init_state)
        if key in seen:
            raise ValueError(f"Two start states for suite, task, init_state = {key}: keep one.")
        seen.add(key)
        if row.image.dtype != np.uint8 or row.image.ndim != 3 or row.image.shape[2] != 3:
            raise ValueError(
                f"Start state {key}: image must be uint8 (H, W, 3), got {row.image.dtype} {row.image.shape}."
            )
        size = size or len(row.image)
        if row.image.shape[:2] != (size, size):
            raise ValueError(
                f"Start state {key}: images must be square and of one size, got {row.image.shape[:2]} after {size}."
            )
        if not _is_proprio(row.proprio) or not np.isfinite(row.proprio).all():
            raise ValueError(
                f"Start state {key}: proprio must be {PROPRIO_DIM} finite numbers for each arm, got {row.proprio}."
            )
        if row.split not in SPLITS:
            raise ValueError(f"Start state {key}: split must be one of {list(SPLITS)}, got {row.split!r}.")
        for name in _SCHEMA.names:
            columns[name].append(getattr(row, name))
        columns["image"][-1] = _encode_image(row.image)
        columns["proprio"][-1] = row.proprio.astype(np.float32)
    if not seen:
        raise ValueError("No start states to write.")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.table(columns, schema=_SCHEMA), temporary, compression="zstd")
    os.replace(temporary, path)


def _encode_image(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="WEBP", lossless=True, quality=100)
    return buffer.getvalue()


@contextmanager
def _open_image(data: bytes, where: str) -> Iterator[Image.Image]:
    """The image, whose pixels are decoded when they are asked for."""
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP", "PNG"]) as image:
            yield image
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where}: the image is not a readable WebP or PNG ({error}).") from error


def _image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height."""
    with _open_image(data, where) as image:
        return image.size


@lru_cache(maxsize=1024)  # resets come back to the same starts
def _decode_image(data: bytes, where: str) -> NDArray[np.uint8]:
    with _open_image(data, where) as image:
        pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    pixels.setflags(write=False)
    return pixels


def start_states_from_env(env: gym.Env[Any, Any], tasks: Iterable[int], init_states: Iterable[int]) -> list[StartState]:
    """One start per task and initial state, by resetting an environment of the real simulator to each.

        env = gym.make("LIBERO-v0", suite="libero_object", split="val").unwrapped
        starts = start_states_from_env(env, range(10), range(40, 45))

    :param env: has ``split``, takes the reset options ``task`` and ``init_state``, observes ``image`` and ``proprio``,
        and gives ``suite`` and ``instruction`` in its infos, as ``LiberoEnv`` does.
    :return: starts in the order of tasks, then init_states.
    """
    starts = []
    states = list(init_states)
    for task in tasks:
        for init_state in states:
            obs, info = env.reset(seed=0, options={"task": task, "init_state": init_state})
            starts.append(
                StartState(
                    suite=info["suite"],
                    task=task,
                    task_name=_snake_case(info["instruction"]),
                    instruction=info["instruction"],
                    init_state=init_state,
                    split=env.get_wrapper_attr("split"),
                    proprio=obs["proprio"],
                    image=obs["image"],
                )
            )
    return starts


def _snake_case(instruction: str) -> str:
    return instruction.lower().replace(" ", "_")


def start_states_from_episodes(datasets: Iterable[Iterable[Episode]]) -> list[StartState]:
    """One start per (suite, task, init_state): the first frame of the first clean episode that began there.

    Give it recordings that begin in the initial states as they are: a recorder that moves objects or the arm before the
    first frame leaves no trace in its episodes (for LIBERO see :func:`start_states_from_env`).

    :param datasets: data sets of episodes, e.g. ``EpisodeDataset`` objects.
    :return: starts sorted by suite, task and init_state.
    """
    starts: dict[tuple[str, int, int], StartState] = {}
    for dataset in datasets:
        for episode in dataset:
            key = (episode.suite, episode.task, episode.init_state)
            if episode.kind == "clean" and key not in starts:
                starts[key] = StartState(
                    suite=episode.suite,
                    task=episode.task,
                    task_name=_snake_case(episode.instruction),
                    instruction=episode.instruction,
                    init_state=episode.init_state,
                    split=episode.split,
                    proprio=episode.proprio[0].copy(),
                    image=episode.frames[0].copy(),
                )
    return [starts[key] for key in sorted(starts)]
