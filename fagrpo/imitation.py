"""Behaviour cloning by flow matching: the supervised policy that reinforcement learning starts from."""

import json
import math
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import configure_logger
from torch import Tensor
from tqdm import tqdm

from fagrpo.demonstrations import Demonstrations
from fagrpo.encoders import FlowObservationEncoder
from fagrpo.policies import FlowPolicy

MAX_VALIDATION_ROWS = 2048


@dataclass
class BehaviourCloningResult:
    """What a training run did.

    :param num_updates: optimiser steps in total, over all resumed parts
    :param best_update: the update whose averaged weights the policy now has
    :param best_validation_loss: its validation loss (NaN without validation data)
    :param seconds: time spent training, over all resumed parts
    :param history: one dict per validation: update, loss, validation_loss
    """

    num_updates: int = 0
    best_update: int = 0
    best_validation_loss: float = math.inf
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def flow_matching_loss(
    policy: FlowPolicy,
    obs: PyTorchObs,
    actions: Tensor,
    generator: torch.Generator | None = None,
    flow_samples: int = 4,
) -> Tensor:
    """Flow-matching loss, weighted by t^2: the mean squared error of the clean action that the velocity implies.

    The encoder runs once per observation, the head for ``flow_samples`` noised actions.

    :param policy: any FlowPolicy
    :param obs: batch of observations, B rows
    :param actions: (B, \\*A), environment units
    :param generator: of times and noise
    :param flow_samples: (t, noise) pairs per observation, times stratified over (0, 1]
    :return: scalar
    """
    context = policy.encode(obs)
    batch, device = len(actions), context.device
    x_0 = policy.normalize_action(actions.to(device)).repeat_interleave(flow_samples, 0)
    noise = torch.randn(x_0.shape, generator=generator).to(device)
    strata = torch.arange(flow_samples).repeat(batch)
    t = (1 - (strata + torch.rand(len(strata), generator=generator)) / flow_samples).to(device)  # in (0, 1]
    time = t.reshape((-1,) + (1,) * (x_0.ndim - 1))
    velocity = policy.velocity((1 - time) * x_0 + time * noise, t, context.repeat_interleave(flow_samples, 0))
    return (time * (velocity - (noise - x_0))).square().mean()


def random_shift(images: Tensor, pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """Move each image by up to ``pixels`` in both directions, repeating its border (DrQ; Kostrikov et al. 2020).

    :param images: (B, C, H, W), any dtype
    :param pixels: largest shift
    :return: same shape and dtype
    """
    batch, _, height, width = images.shape
    shift = torch.randint(-pixels, pixels + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]).clamp(0, height - 1).to(images.device)
    columns = (torch.arange(width) + shift[1]).clamp(0, width - 1).to(images.device)
    index = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def color_jitter(images: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Change contrast (per image) and colour balance (per channel) by up to ``strength``, relative to the full range.

    :param images: uint8 (B, C, H, W)
    :param strength: 0.1 means contrast 0.9..1.1 and offsets of -0.05..0.05 of the range
    :return: uint8, same shape
    """
    batch, channels = images.shape[:2]
    contrast = 1 + strength * (2 * torch.rand(batch, 1, 1, 1, generator=generator) - 1)
    offset = 255 * strength * (torch.rand(batch, channels, 1, 1, generator=generator) - 0.5)
    jittered = (images.float() - 128) * contrast.to(images.device) + 128 + offset.to(images.device)
    return jittered.round_().clamp_(0, 255).to(torch.uint8)


def set_statistics(policy: FlowPolicy, demonstrations: Demonstrations, rows: np.ndarray) -> None:
    """Store the normalisation of vector observations and actions in the policy.

    Action statistics are per last dimension, over rows and chunk positions. Custom encoders keep their own
    normalisation.

    :param policy: changed in place
    :param demonstrations: in memory
    :param rows: int (N,), those of the training
    """
    encoder = policy.features_extractor
    if isinstance(encoder, FlowObservationEncoder):
        observations = demonstrations.observations
        entries = observations if isinstance(observations, dict) else {"box": observations}
        for key in encoder.vector_keys:
            if isinstance(policy.observation_space, spaces.Dict):
                space = policy.observation_space[key]
            else:
                space = policy.observation_space
            if not isinstance(space, spaces.Box):  # one-hot encoded by SB3: nothing to normalise
                continue
            values = torch.as_tensor(entries[key][rows]).double().flatten(1)
            encoder.set_statistics(key, values.mean(0).float(), values.std(0, correction=0).float())
    actions = torch.as_tensor(demonstrations.actions[rows]).double().flatten(0, -2)
    mean, std = actions.mean(0).float(), actions.std(0, correction=0).float()
    policy.set_action_statistics(mean.expand(policy.action_shape), std.expand(policy.action_shape))


class DemonstrationTensors:
    """Demonstrations as tensors, from which batches are drawn, of what a policy sees.

    :param demonstrations: in memory, which the tensors share
    :param policy: whose observations and actions they are to fit
    :raises ValueError: actions or observations of another shape than the policy's, or a lack of observations
    """

    def __init__(self, demonstrations: Demonstrations, policy: FlowPolicy) -> None:
        if demonstrations.actions.shape[1:] != policy.action_shape:
            raise ValueError(
                f"the demonstrations' actions have shape {demonstrations.actions.shape[1:]}, "
                f"the policy's {policy.action_shape}"
            )
        observations, space = demonstrations.observations, policy.used_space
        self.is_dict = isinstance(observations, dict)
        entries = observations if isinstance(observations, dict) else {"box": observations}
        wanted = list(space) if isinstance(space, spaces.Dict) else ["box"]
        missing = [key for key in wanted if key not in entries]
        if missing:
            raise ValueError(f"the demonstrations lack the observations {missing}; they have {', '.join(entries)}")
        for key in wanted:
            expected, got = (space[key] if isinstance(space, spaces.Dict) else space).shape, entries[key].shape[1:]
            # Channels of an image come first or last.
            if got != expected and not (len(got) == 3 and sorted(got) == sorted(expected or ())):
                raise ValueError(f"the demonstrations' {key!r} has shape {got}, the policy's {expected}")
        self.entries = {key: torch.from_numpy(np.ascontiguousarray(entries[key])) for key in wanted}
        self.actions = torch.from_numpy(np.ascontiguousarray(demonstrations.actions, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.actions)

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        image_shift: int = 0,
        jitter: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PyTorchObs, Tensor]:
        """Observations, images channels first, and actions of some rows (B,), augmented where asked to."""
        obs = {}
        for key, value in self.entries.items():
            rows = value[index]
            if rows.dtype == torch.uint8 and rows.ndim == 4:
                if int(np.argmin(rows.shape[1:])) != 0:
                    rows = rows.permute(0, 3, 1, 2)
                if image_shift:
                    rows = random_shift(rows, image_shift, generator)
                if jitter:
                    rows = color_jitter(rows, jitter, generator)
            obs[key] = rows.to(device)
        return (obs if self.is_dict else obs["box"]), self.actions[index].to(device)


def behaviour_cloning(
    policy: FlowPolicy,
    demonstrations: Demonstrations,
    *,
    num_updates: int = 5000,
    max_seconds: float | None = None,
    batch_size: int = 64,
    flow_samples: int = 4,
    learning_rate: float = 1e-3,
    warmup_updates: int = 100,
    weight_decay: float = 1e-3,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.999,
    image_shift: int = 4,
    color_jitter_strength: float = 0.1,
    validation_fraction: float = 0.1,
    validate_every: int = 250,
    patience: int | None = None,
    bfloat16: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    tensorboard_log: str | None = None,
    logger: Logger | None = None,
    verbose: int = 0,
    progress_bar: bool = True,
) -> BehaviourCloningResult:
    """Train a flow policy to imitate demonstrations; it ends with the averaged weights of the best validation loss.

    :param policy: trained in place; its normalisation statistics are set from the training rows
    :param demonstrations: in memory
    :param num_updates: optimiser steps; the learning rate falls to 0 over them along a cosine
    :param max_seconds: end after this wall-clock time, the cosine adapted; None: no limit
    :param batch_size: observations per step
    :param flow_samples: (t, noise) pairs per observation
    :param learning_rate: peak, after ``warmup_updates`` of linear warm-up
    :param weight_decay: of AdamW
    :param max_grad_norm: gradient clipping
    :param ema_decay: of the weight average, which begins with a shorter memory: (1 + n) / (10 + n) after n updates
    :param image_shift: random shift of images, in pixels; 0: none
    :param color_jitter_strength: see :func:`color_jitter`; 0: none
    :param validation_fraction: share of episodes held out, of which at most ``MAX_VALIDATION_ROWS`` rows, spread over
        all of them, are used; 0: none, the last weights are kept
    :param validate_every: updates between validations (and checkpoints)
    :param patience: stop after this many validations without improvement; None: never
    :param bfloat16: run the network under bfloat16 autocast (fast only where the processor supports it)
    :param seed: of split, batches, augmentation and noise
    :param checkpoint: a safetensors file written at each validation and resumed from if it exists
    :param tensorboard_log: folder for TensorBoard
    :param logger: an SB3 logger instead
    :param verbose: 1 prints the logged values
    :param progress_bar: show one
    :return: losses and the best update
    :raises ValueError: demonstrations that do not fit the policy, or a checkpoint of other settings or damaged
    :raises FloatingPointError: the loss is not finite
    """
    from diffusers.training_utils import EMAModel  # imported here: it takes seconds, and inference does not need it

    data = DemonstrationTensors(demonstrations, policy)
    if validation_fraction > 0:
        train_rows, validation_rows = demonstrations.split(validation_fraction, seed)
    else:
        train_rows, validation_rows = np.arange(len(demonstrations)), np.zeros(0, dtype=np.int64)
    train_index = torch.from_numpy(train_rows)
    every = -(-len(validation_rows) // MAX_VALIDATION_ROWS) or 1
    validation_index = torch.from_numpy(validation_rows[::every])
    set_statistics(policy, demonstrations, train_rows)
    device = policy.device
    policy.set_training_mode(True)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    ema = EMAModel(parameters, decay=ema_decay)
    generator = torch.Generator().manual_seed(seed)
    result = BehaviourCloningResult()
    best = {key: value.clone() for key, value in policy.state_dict().items()}
    settings = {
        "batch_size": batch_size,
        "flow_samples": flow_samples,
        "learning_rate": learning_rate,
        "warmup_updates": warmup_updates,
        "weight_decay": weight_decay,
        "ema_decay": ema_decay,
        "image_shift": image_shift,
        "color_jitter_strength": color_jitter_strength,
        "validation_fraction": validation_fraction,
        "seed": seed,
        # What it learns from: a checkpoint of other demonstrations would bring their weights and statistics.
        "demonstrations": [len(demonstrations), zlib.crc32(demonstrations.actions.tobytes())],
    }
    if checkpoint is not None and Path(checkpoint).exists():
        best = _load_checkpoint(Path(checkpoint), policy, optimizer, ema, generator, result, settings)
    if logger is None:
        logger = configure_logger(verbose, tensorboard_log, "behaviour_cloning")

    def validation_loss() -> float:
        if len(validation_index) == 0:
            return math.nan
        policy.set_training_mode(False)
        fixed = torch.Generator().manual_seed(seed)
        total = 0.0
        with torch.no_grad():
            for rows in validation_index.split(256):
                obs, actions = data.batch(rows, device)
                total += float(flow_matching_loss(policy, obs, actions, fixed, 4)) * len(rows)
        policy.set_training_mode(True)
        return total / len(validation_index)

    started = time.monotonic() - result.seconds
    running: list[Tensor] = []

    def out_of_patience() -> bool:
        stale = sum(entry["update"] > result.best_update for entry in result.history)
        return patience is not None and stale >= patience

    bar = tqdm(
        total=num_updates, initial=result.num_updates, disable=not progress_bar, desc="behaviour cloning", unit="update"
    )
    finished = result.num_updates >= num_updates or out_of_patience()
    while not finished:
        progress = result.num_updates / num_updates
        if max_seconds is not None:
            progress = max(progress, min(1.0, (time.monotonic() - started) / max_seconds))
        warmup = min(1.0, (result.num_updates + 1) / max(1, warmup_updates))
        rate = learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = train_index[torch.randint(len(train_index), (batch_size,), generator=generator)]
        obs, actions = data.batch(rows, device, image_shift, color_jitter_strength, generator)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = flow_matching_loss(policy, obs, actions, generator, flow_samples)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        ema.step(parameters)
        running.append(loss.detach())
        result.num_updates += 1
        bar.update()
        result.seconds = time.monotonic() - started
        out_of_time = max_seconds is not None and result.seconds >= max_seconds
        finished = result.num_updates >= num_updates or out_of_time
        if not (finished or result.num_updates % validate_every == 0):
            continue

        train_loss = float(torch.stack(running).mean())
        running.clear()
        if not math.isfinite(train_loss):
            raise FloatingPointError(
                f"the loss became {train_loss} at update {result.num_updates}; lower the learning_rate"
            )
        ema.store(parameters)
        ema.copy_to(parameters)
        validation = validation_loss()
        if len(validation_index) == 0 or validation < result.best_validation_loss:
            result.best_validation_loss, result.best_update = validation, result.num_updates
            best = {key: value.clone() for key, value in policy.state_dict().items()}
        ema.restore(parameters)
        result.history.append({"update": result.num_updates, "loss": train_loss, "validation_loss": validation})
        finished = finished or out_of_patience()
        logger.record("bc/loss", train_loss)
        logger.record("bc/validation_loss", validation)
        logger.record("bc/learning_rate", rate)
        logger.record("bc/grad_norm", float(grad_norm))
        logger.record("time/samples_per_second", result.num_updates * batch_size / max(result.seconds, 1e-9))
        logger.dump(result.num_updates)
        bar.set_postfix(loss=f"{train_loss:.4f}", validation=f"{validation:.4f}")
        if checkpoint is not None:
            _save_checkpoint(Path(checkpoint), policy, optimizer, ema, generator, result, settings, best)
    bar.close()
    policy.load_state_dict(best)
    policy.set_training_mode(False)
    return result


def _save_checkpoint(
    path: Path,
    policy: FlowPolicy,
    optimizer: torch.optim.Optimizer,
    ema: Any,
    generator: torch.Generator,
    result: BehaviourCloningResult,
    settings: dict[str, Any],
    best: dict[str, Tensor],
) -> None:
    """The whole training state in one safetensors file, written atomically."""
    tensors = {f"policy/{key}": value for key, value in policy.state_dict().items()}
    tensors |= {f"best/{key}": value for key, value in best.items()}
    tensors |= {f"ema/{i}": value for i, value in enumerate(ema.shadow_params)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
    tensors["generator"] = generator.get_state()
    counters = {
        "num_updates": result.num_updates,
        "best_update": result.best_update,
        "best_validation_loss": result.best_validation_loss,
        "seconds": result.seconds,
        "history": result.history,
    }
    metadata = {
        "counters": json.dumps(counters),
        "settings": json.dumps(settings),
        "ema_step": str(ema.optimization_step),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
        temporary,
        metadata=metadata,
    )
    os.replace(temporary, path)


def _load_checkpoint(
    path: Path,
    policy: FlowPolicy,
    optimizer: torch.optim.Optimizer,
    ema: Any,
    generator: torch.Generator,
    result: BehaviourCloningResult,
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """Restore what :func:`_save_checkpoint` wrote; returns the best weights."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        counters, saved_settings = json.loads(metadata["counters"]), json.loads(metadata["settings"])
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a complete training checkpoint: {error!r}; delete it to start again"
        ) from error
    if saved_settings != settings:
        raise ValueError(
            f"{path} was written with {saved_settings}, this run has {settings}: use the same settings to resume, or "
            "another checkpoint path to start afresh"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    try:
        policy.load_state_dict(part("policy/"))
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to a policy of another architecture: {error}") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer/").items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    averages = part("ema/")
    ema.shadow_params = [averages[str(i)].to(policy.device) for i in range(len(averages))]
    ema.optimization_step = int(metadata["ema_step"])
    generator.set_state(tensors["generator"])
    for name, value in counters.items():
        setattr(result, name, value)
    return {key: value.to(policy.device) for key, value in part("best/").items()}
