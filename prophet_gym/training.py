"""The one training loop of the package: precision, EMA, schedule, logs, checkpoints.

Randomness is drawn from a generator seeded by (seed, step, process), so a run that was killed goes on to the same
numbers, and several processes, as `torchrun` starts them, see different batches and average their gradients.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from prophet_gym.data.lerobot_format.schema import write_json

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20
"""Batches in a row without a finite gradient, after which training gives up."""

NOT_THE_FILE = (MemoryError, torch.OutOfMemoryError, ImportError, PermissionError)
"""What may go wrong where a file is read without its being damaged."""

LossFn = Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]


def best_precision(device: torch.device) -> str:
    """Return accelerate's mixed precision mode: "bf16" where the hardware has it, else "no".

    CPUs without AVX512-BF16 emulate bfloat16 fifty times slower than they compute float32; old GPUs emulate it too.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "no"


def best_autocast(device: torch.device) -> torch.autocast:
    """The context in which models compute in `best_precision`."""
    # Not accelerate's, which in some versions stays on where a loss raises.
    return torch.autocast(device.type, torch.bfloat16, enabled=best_precision(device) == "bf16")


def fit(
    name: str,
    module: ModelMixin,
    loss_fn: LossFn,
    out: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    ema_decay: float = 0.999,
    weight_decay: float = 0.01,
    warmup_steps: int = 200,
    checkpoint_every: int = 250,
    validate: Callable[[SummaryWriter, int], None] | None = None,
    validate_every: int = 1000,
    finish: Callable[[], None] | None = None,
) -> None:
    """Train one module in place; on return it holds the EMA weights, which are also saved to `out / name`.

    A checkpoint (weights, optimizer, EMA, schedule, step) is written to `out / checkpoints / name` under a temporary
    name and renamed. Calling again resumes from it, or returns at once when the stage is finished.

    Of several processes, each must call this, with the same arguments and an `out` that all of them see. They start
    from the weights of the first, each draws its own batches, and a step follows the mean of their gradients: N
    processes take the steps that one would with batches N times as large. The first one alone writes and validates.

    Args:
        name: of the stage; part of the file names and TensorBoard tags.
        module: the model to train, on any device; those of its weights that require a gradient.
        loss_fn: (step, generator seeded for this step) -> scalar loss and numbers to log. What it carries from step to
            step, if it has `state_dict` and `load_state_dict`, is part of the checkpoint.
        out: folder of the run.
        steps: optimizer steps in all. learning_rate: peak of a cosine schedule after `warmup_steps`.
        seed: of the random stream.
        ema_decay, weight_decay: as usual. checkpoint_every: steps between checkpoints.
        validate: called with the EMA weights in place every `validate_every` steps and at the end.
        finish: called, in every process, with the final weights in place before they are saved: it may change them.

    Raises:
        ValueError: the checkpoint or the finished stage is damaged, or of another number of processes.
        RuntimeError: another kind of device than this process has trained on before.
        FloatingPointError: the gradient of many batches in a row is not finite; one such batch is left out.
    """
    device = next(module.parameters()).device
    accelerator = Accelerator(
        mixed_precision=best_precision(device),
        cpu=device.type == "cpu",
        device_placement=False,
        step_scheduler_with_optimizer=False,  # it would step once per process
    )
    if accelerator.device.type != device.type:  # it would train in the other one's precision
        raise RuntimeError(
            f"This process has trained on {accelerator.device.type} before and cannot go on with {device.type} "
            "(accelerate keeps one device for each process): start another."
        )
    finished = (out / name).exists()
    accelerator.wait_for_everyone()  # before the first process can make it exist
    if finished:
        try:
            saved = type(module).from_pretrained(out / name, use_safetensors=True, local_files_only=True)
            module.load_state_dict(saved.state_dict())
        except NOT_THE_FILE:
            raise
        except Exception as error:  # as in `_load_checkpoint`
            raise ValueError(
                f"{out / name} cannot be read ({error}): it is damaged, or another version's. Delete it to train that "
                "stage again."
            ) from error
        module.eval()
        return
    for weight in module.state_dict().values():
        broadcast(weight)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=min(warmup_steps, steps // 10), num_training_steps=steps
    )
    ema = EMAModel(weights, decay=ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    # Not for evaluation, but this leaves out DistributedDataParallel, which synchronises only what goes through
    # `forward`: the losses call other methods too. `_average_gradients` takes its place.
    accelerator.prepare_model(module, evaluation_mode=True)
    # `loss_fn` runs in autocast; outside of it, in validation and in later stages, the module keeps its own precision.
    for name_of_forward in ("forward", "_original_forward"):
        vars(module).pop(name_of_forward, None)

    checkpoint = out / "checkpoints" / name
    previous = checkpoint.with_name(f"{name}.previous")
    if accelerator.is_main_process and previous.exists() and not checkpoint.exists():
        os.replace(previous, checkpoint)  # killed between the two renames of `_save_checkpoint`
    accelerator.wait_for_everyone()
    start = 0
    if checkpoint.exists():
        start = _load_checkpoint(accelerator, checkpoint, ema, loss_fn)
        logger.info("%s: resumed at step %d of %d", name, start, steps)

    main = accelerator.is_main_process
    # A folder for each stage: what is purged after a kill would be purged from all that share one.
    writer = SummaryWriter(str(out / "tensorboard" / name), purge_step=start or None) if main else None
    skipped = 0
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5.0, disable=not main)
    for step in progress:
        module.train()
        batch = step * accelerator.num_processes + accelerator.process_index
        generator = torch.Generator().manual_seed(1_000_003 * seed + batch)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), best_autocast(device):
            torch.manual_seed(1_000_003 * seed + batch)  # of the dropout
            loss, logs = loss_fn(step, generator)
        accelerator.backward(loss)
        _average_gradients(accelerator, module)
        norm = accelerator.clip_grad_norm_(weights, 1.0)
        skipped = 0 if torch.isfinite(norm) else skipped + 1  # one batch may overflow; a run must not
        if skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"{name}: the gradient of the last {MAX_SKIPPED} batches is not finite (step {step}): lower the "
                "learning rate, or look for non-finite data. The last checkpoint is intact."
            )
        if not skipped:
            optimizer.step()
            schedule.step()
            ema.step(weights)
        optimizer.zero_grad()

        done = step + 1
        if writer and (done % 50 == 0 or done == steps):
            logs |= {"loss": loss.item(), "grad_norm": float(norm), "learning_rate": schedule.get_last_lr()[0]}
            for key, value in logs.items():
                writer.add_scalar(f"{name}/{key}", value, done)
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if done % checkpoint_every == 0 and done < steps:
            _save_checkpoint(accelerator, checkpoint, done, ema, loss_fn)
        if writer and validate and (done % validate_every == 0 or done == steps):
            module.eval()
            ema.store(weights)
            ema.copy_to(weights)
            validate(writer, done)
            ema.restore(weights)
    ema.copy_to(weights)
    module.eval()
    if finish:
        finish()
    if writer:
        writer.close()
        temporary = out / f".{name}.tmp"
        module.save_pretrained(temporary)
        os.replace(temporary, out / name)
        for folder in (checkpoint, previous):
            shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()


def _average_gradients(accelerator: Accelerator, module: torch.nn.Module) -> None:
    """Give every process the mean of all processes' gradients; each runs the same graph, so the same ones exist."""
    if accelerator.num_processes == 1:
        return
    for weight in module.parameters():
        if weight.grad is not None:
            weight.grad = accelerator.reduce(weight.grad, "mean")


def _loss_file(accelerator: Accelerator) -> str:
    """Where a checkpoint has what this process's loss carries from step to step."""
    return f"loss_{accelerator.process_index}.safetensors"


def _load_checkpoint(accelerator: Accelerator, path: Path, ema: EMAModel, loss_fn: LossFn) -> int:
    """Go on from what `_save_checkpoint` wrote: the step that is next."""
    try:
        progress = json.loads((path / "progress.json").read_text())
        if progress["processes"] == accelerator.num_processes:
            accelerator.load_state(str(path))
            averages = load_file(path / "ema.safetensors")
            for index, average in enumerate(ema.shadow_params):
                average.copy_(averages[str(index)])
            ema.optimization_step = progress["ema_step"]
            if isinstance(loss_fn, Stateful):
                loss_fn.load_state_dict(load_file(path / _loss_file(accelerator)))
    except NOT_THE_FILE:
        raise
    except Exception as error:  # of whatever kind: by a damaged file each reader raises errors of its own
        raise ValueError(
            f"The checkpoint {path} is damaged ({error}): delete it to begin this stage again, the ones before it stay."
        ) from error
    if progress["processes"] != accelerator.num_processes:
        raise ValueError(
            f"The checkpoint {path} is of {progress['processes']} processes, these are {accelerator.num_processes}: "
            "resume with as many, or delete it to begin this stage again."
        )
    return int(progress["step"])


def _save_checkpoint(accelerator: Accelerator, path: Path, step: int, ema: EMAModel, loss_fn: LossFn) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    accelerator.save_state(str(temporary))  # every process adds the state of its random numbers
    if isinstance(loss_fn, Stateful):
        save_file(loss_fn.state_dict(), temporary / _loss_file(accelerator))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    # Not by accelerate, which would pickle it, and what is unpickled runs.
    averages = {str(index): average.contiguous() for index, average in enumerate(ema.shadow_params)}
    save_file(averages, temporary / "ema.safetensors")
    progress = {"step": step, "ema_step": ema.optimization_step, "processes": accelerator.num_processes}
    write_json(temporary / "progress.json", progress)
    # A folder cannot replace a full one: the old checkpoint steps aside, and `fit` finds it after a kill in between.
    previous = path.with_name(f"{path.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
    shutil.rmtree(previous, ignore_errors=True)
