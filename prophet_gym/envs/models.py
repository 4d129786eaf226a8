"""Which models an environment uses: by name, by path or by object, loaded once per process."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from prophet_gym.reward.base import RewardModel

if TYPE_CHECKING:
    from prophet_gym.reward.success_classifier import SuccessClassifier
    from prophet_gym.world_model.pipeline import ProphetPipeline

WEIGHTS = Path(__file__).parents[1] / "weights"
"""The folder of the checkpoints in the wheel."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Imagined(Protocol):
    """What :meth:`WorldModel.imagine` returns: frames uint8 (B, chunk_frames, H, W, 3), the proprioception at each of
    them, float32 (B, chunk_frames, 8 K), history, state."""

    frames: torch.Tensor
    proprio: torch.Tensor
    history: torch.Tensor
    state: torch.Tensor


class WorldModel(Protocol):
    """What an environment asks of a world model; ``ProphetPipeline`` is one."""

    @property
    def chunk_size(self) -> int:
        """Low-level actions per chunk."""

    @property
    def chunk_frames(self) -> int:
        """Frames imagined per chunk."""

    @property
    def image_size(self) -> int:
        """Pixels per side of a frame."""

    @property
    def action_dim(self) -> int:
        """Numbers in one low-level action, 7 for each arm that a robot can have."""

    def arms(self, suite: str) -> int:
        """Arms of the robot of a suite; the numbers of others that a robot could have are zeros."""

    def init_history(self, images: NDArray[np.uint8]) -> torch.Tensor:
        """Images uint8 (B, H, W, 3) -> history, batch first."""

    @property
    def num_members(self) -> int:
        """Members of the ensemble that the world model is, 1 if it is none: each episode is one member's."""

    def init_state(self, proprio: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """Proprio float32 (B, 8 K) and members int64 (B,) -> state (B, S)."""

    def imagine(
        self,
        history: torch.Tensor,
        state: torch.Tensor,
        actions: torch.Tensor,
        *,
        images: NDArray[np.uint8],
        suites: Sequence[str],
        generator: list[torch.Generator] | None,
        num_inference_steps: int | None,
    ) -> Imagined:
        """What happens during one chunk of actions float32 (B, chunk_size, action_dim).

        :param images: uint8 (B, 2, H, W, 3), the first and the latest frames of these episodes.
        :param suites: B names, by which a world model knows the cameras.
        """

    def imagine_motion(
        self, state: torch.Tensor, actions: torch.Tensor, *, starts: NDArray[np.uint8], suites: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the proprioception does during one chunk, float32 (B, chunk_frames, 8 K), and the state after it.

        :param starts: uint8 (B, H, W, 3), the first frames of these episodes.
        """


def resolve_models(
    world_model: str | Path | WorldModel,
    reward_model: str | Path | RewardModel,
    device: str,
    dtype: str,
    video: bool = True,
) -> tuple[WorldModel, RewardModel]:
    """The models themselves, each from its name in the wheel, a path written by ``save_pretrained``, or itself.

    :param device: of models given by name or path: ``"auto"`` (CUDA if there is any), ``"cpu"``, ``"cuda:0"`` ...
    :param dtype: of a world model given by name or path: ``"auto"`` (float32) or one of :data:`DTYPES`.
    :param video: what they are needed for: video, or the motion alone.
    :raises FileNotFoundError: no such name or path.
    :raises ValueError: damaged weights, an unknown device or dtype, or one for a model that is given as an object; a
        world model without video where it is needed.
    :raises TypeError: an object that lacks what :class:`WorldModel` or ``RewardModel`` has.
    """
    by_name = isinstance(world_model, str | Path), isinstance(reward_model, str | Path)
    if (device != "auto" and not any(by_name)) or (dtype != "auto" and not by_name[0]):
        raise ValueError(
            "device and dtype place a model that is loaded by name or path. A model object stays as it is: leave them "
            "out and call its .to()."
        )
    world: Any = world_model
    if isinstance(world_model, str | Path):
        world = load_world_model(world_model, device, dtype)
    reward: Any = reward_model
    if isinstance(reward_model, str | Path):
        reward = load_reward_model(reward_model, device)
    imagines = ("init_history", "imagine") if video else ("imagine_motion",)
    knows = ("num_members", "arms", "chunk_size", "chunk_frames", "image_size", "action_dim")
    for model, needs in (
        (world, (*imagines, "init_state", *knows)),
        (reward, ("score", "threshold" if video else "motion_threshold")),
    ):
        if missing := [name for name in needs if getattr(model, name, None) is None]:
            raise TypeError(
                f"{type(model).__name__} cannot be used here: it has no {missing}. "
                "Pass a name, a path or a model that has them."
            )
    if video and (require_video := getattr(world, "require_video", None)):
        require_video()
    return world, reward


def load_world_model(world_model: str | Path, device: str = "auto", dtype: str = "auto") -> "ProphetPipeline":
    """The world model of a name in the wheel or a path; loaded once, so change only a copy. See `resolve_models`."""
    folder = _checkpoint(world_model, "world model", "model_index.json")
    return _load_world_model(folder, _modified(folder), resolve_device(device), _dtype(dtype))


def load_reward_model(reward_model: str | Path, device: str = "auto") -> "SuccessClassifier":
    """The reward model of a name in the wheel or a path; loaded once, so change only a copy. See `resolve_models`."""
    folder = _checkpoint(reward_model, "reward model", "config.json")
    return _load_reward_model(folder, _modified(folder), resolve_device(device))


def _modified(folder: Path) -> int:
    """When the newest file of a checkpoint was written, so that one that was trained again is read again."""
    return max(file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file())


@lru_cache(maxsize=4)
def _load_world_model(path: Path, modified_ns: int, device: str, dtype: torch.dtype) -> "ProphetPipeline":
    from prophet_gym.world_model.pipeline import ProphetPipeline

    _check_weights(path)
    pipeline = ProphetPipeline.from_pretrained(path, use_safetensors=True, local_files_only=True)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    if lacking := [name for name, part in parts.items() if any(weight.is_meta for weight in part.parameters())]:
        raise ValueError(
            f"The files of {path} lack weights of {lacking}: they were saved by another version of these models. Train "
            "them again."
        )
    pipeline.to(device)
    for part in (pipeline.vae, pipeline.transformer) if pipeline.has_video else ():
        # (`ModelMixin.to` would warn of modules to keep in float32: none.) Channels last is a third faster on a CPU.
        torch.nn.Module.to(part, dtype=dtype)
        torch.nn.utils.convert_conv2d_weight_memory_format(part, torch.channels_last)
    return pipeline


@lru_cache(maxsize=4)
def _load_reward_model(path: Path, modified_ns: int, device: str) -> "SuccessClassifier":
    from prophet_gym.reward.success_classifier import SuccessClassifier

    _check_weights(path)
    try:
        model = SuccessClassifier.from_pretrained(path, use_safetensors=True, local_files_only=True).to(device).eval()
    except ValueError as error:
        raise ValueError(
            f"The judge in {path} does not fit: it was saved by another version. Train it again ({error})."
        ) from error
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return model


def resolve_device(device: str) -> str:
    """The torch device of this name, "auto" being CUDA where there is one.

    :raises ValueError: there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"Unknown device {device!r}: use 'auto', 'cpu', 'cuda' or 'cuda:0'.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but this torch finds no CUDA device: use device='cpu'.")
    return device


def _dtype(dtype: str) -> torch.dtype:
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"Unknown dtype {dtype!r}. Valid: {['auto', *DTYPES]}.")
    return DTYPES.get(dtype, torch.float32)


def checkpoint_path(name: str | Path) -> Path:
    """Where a checkpoint lies, or would lie: a shipped one by its name, any other by its folder."""
    shipped = WEIGHTS / name
    return shipped if isinstance(name, str) and shipped.is_dir() else Path(name).expanduser().resolve()


def _checkpoint(name: str | Path, kind: str, index: str) -> Path:
    """The folder of a checkpoint; ``index`` is the JSON file that every such folder has."""
    path = checkpoint_path(name)
    if not path.is_dir():
        names = sorted(folder.name for folder in WEIGHTS.glob("*") if (folder / index).is_file())
        raise FileNotFoundError(
            f"No {kind} {str(name)!r}: it is neither a folder nor one of the shipped names {names}. Nothing is "
            "downloaded: pass a name, the path of a folder written by save_pretrained, or the model itself."
        )
    if not (path / index).is_file():
        raise FileNotFoundError(f"{path} is not a saved {kind}: it lacks {index}. Save one with save_pretrained.")
    return path


def _check_weights(path: Path) -> None:
    """Open every weights file, so that a damaged one is refused by name before anything is loaded."""
    files = sorted(path.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} has no *.safetensors file (other weight formats are never loaded).")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                if not list(weights.keys()):
                    raise ValueError(f"The weights file {file} is empty: download or train it again.")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The weights file {file} is damaged or truncated ({error}): download or train it again."
            ) from error
