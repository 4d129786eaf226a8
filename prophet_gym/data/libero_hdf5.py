"""Reading LIBERO's own demonstrations: one HDF5 file per task, with groups ``data/demo_0``, ``data/demo_1``, ..."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prophet_gym.data.episode import Episode, to_upright

ACTION_ALIGNMENTS = ("action_before_frame", "frame_before_action")


def read_libero_hdf5(
    path: str | os.PathLike[str],
    *,
    orientation: str,
    alignment: str,
    suite: str,
    task: int,
    split: str = "train",
    frame_stride: int = 4,
    image_size: int | None = None,
    instruction: str | None = None,
) -> Iterator[Episode]:
    """Read the demonstrations of one LIBERO task, in the order of their numbers, one at a time.

    The file does not say how its images are oriented, nor whether row k of ``obs`` was taken before or after
    ``actions[k]``; both differ between the files in circulation and must be given:

    ============================================  =================  =========================
    file                                          ``orientation``    ``alignment``
    ============================================  =================  =========================
    LIBERO's own (``scripts/create_dataset.py``)  ``"upside_down"``  ``"action_before_frame"``
    replayed ones ("no-op filtered", OpenVLA)     ``"upside_down"``  ``"frame_before_action"``
    ============================================  =================  =========================

    With ``"frame_before_action"`` the frame after the last action is not in the file: the last action is left out, and
    ``success`` of the last frame is what ``rewards`` confirms for it, which for these files is False.
    ``Episode.init_state`` is the number of the demonstration, which is not the number of an official initial state.

    :param path: the HDF5 file. Frames are ``obs/agentview_rgb``, 20 a second.
    :param orientation: how frames are stored, see :func:`~prophet_gym.data.episode.to_upright`.
    :param alignment: ``"action_before_frame"`` (row k of ``obs`` is the outcome of ``actions[k]``) or
        ``"frame_before_action"`` (``actions[k]`` was chosen on row k).
    :param suite: name of the suite, e.g. ``"libero_object"``.
    :param task: index of the task in the suite.
    :param split: the split all its demonstrations are given.
    :param frame_stride: control steps per video frame; see :meth:`~prophet_gym.data.episode.Episode.with_frame_stride`.
    :param image_size: resize the frames to this square with an area filter (pixels); ``None`` keeps their size.
    :param instruction: the task in words; ``None`` takes it from the file.
    :return: iterator over the episodes.
    :raises ImportError: h5py is not installed.
    :raises FileNotFoundError: there is no such file.
    :raises ValueError: it is damaged, lacks a field, or an argument is none of its choices.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('Reading HDF5 needs h5py: pip install "prophet-gym[hdf5]".') from error
    if alignment not in ACTION_ALIGNMENTS:
        raise ValueError(f"alignment must be one of {list(ACTION_ALIGNMENTS)}, got {alignment!r}.")
    to_upright(np.empty((0, 0, 3), np.uint8), orientation)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file (truncated or damaged: {error}).") from error

    def episodes() -> Iterator[Episode]:
        with file:
            data = _get(file, "data", path)
            text = instruction if instruction is not None else _instruction(data, path)
            numbers = sorted(int(name.removeprefix("demo_")) for name in data if name.startswith("demo_"))
            if not numbers:
                raise ValueError(f"{path} holds no demonstration (data/demo_0, data/demo_1, ...).")
            for number in numbers:
                arrays = _demonstration(data[f"demo_{number}"], f"{path}:data/demo_{number}", alignment)
                frames = to_upright(arrays["frames"], orientation)
                episode = Episode(
                    frames=np.ascontiguousarray(frames),
                    proprio=arrays["proprio"],
                    actions=arrays["actions"],
                    success=arrays["success"],
                    instruction=text,
                    suite=suite,
                    task=task,
                    init_state=number,
                    split=split,
                    kind="clean",
                    robot="panda",
                    seed=0,
                ).with_frame_stride(frame_stride)
                yield episode if image_size is None else _resized(episode, image_size)

    return episodes()


def _get(group: Any, name: str, where: str | Path) -> Any:
    if name not in group:
        raise ValueError(f"{where} has no {name!r}; it has {sorted(group)}.")
    return group[name]


def _instruction(data: Any, path: Path) -> str:
    try:
        return "".join(json.loads(data.attrs["problem_info"])["language_instruction"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not say its task in words: pass instruction=... .") from error


def _demonstration(group: Any, where: str, alignment: str) -> dict[str, NDArray[Any]]:
    """The arrays of one demonstration at every control step: N frames and the N - 1 actions between them."""
    obs = _get(group, "obs", where)
    frames = np.asarray(_get(obs, "agentview_rgb", where))
    if "ee_states" in obs:
        pose = np.asarray(obs["ee_states"])
    else:
        pose = np.concatenate([_get(obs, "ee_pos", where), _get(obs, "ee_ori", where)], axis=1)
    gripper = np.asarray(_get(obs, "gripper_states", where))
    actions = np.asarray(_get(group, "actions", where))
    reward = np.asarray(group["rewards"] if "rewards" in group else _get(group, "dones", where)) > 0
    lengths = {
        "agentview_rgb": len(frames),
        "poses": len(pose),
        "gripper_states": len(gripper),
        "actions": len(actions),
        "rewards": len(reward),
    }
    if len(set(lengths.values())) != 1 or len(frames) < 2:
        raise ValueError(f"{where} must have equally many rows (at least 2) of everything, got {lengths}.")
    if alignment == "action_before_frame":
        actions, success = actions[1:], reward
    else:
        actions, success = actions[:-1], np.concatenate([[False], reward[:-1]])
    return {
        "frames": frames,
        "proprio": np.concatenate([pose, gripper], axis=1).astype(np.float32),
        "actions": actions.astype(np.float32).reshape(len(actions), 1, -1),
        "success": success,
    }


def _resized(episode: Episode, size: int) -> Episode:
    if size < 1:
        raise ValueError(f"image_size must be >= 1, got {size}.")
    images = [Image.fromarray(frame).resize((size, size), Image.Resampling.BOX) for frame in episode.frames]
    return replace(episode, frames=np.stack([np.asarray(image) for image in images]))
