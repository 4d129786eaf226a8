"""The one training loop of the package: precision, EMA, schedule, logs, checkpoints.

Randomness is drawn from a generator seeded by (seed, step), so a run that was killed goes on to the same numbers.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20
"""Batches in a row without a finite gradient, after which training gives up."""

LossFn = Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]


def best_precision(device: torch.device) -> str:
    """Return accelerate's mixed precision mode: "bf16" where the hardware has it, else "no".

    CPUs without AVX512-BF16 emulate bfloat16 fifty times slower than they compute float32.
    """
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "no"


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
) -> None:
    """Train one module in place; on return it holds the EMA weights, which are also saved to `out / name`.

    A checkpoint (weights, optimizer, EMA, schedule, step) is written to `out / checkpoints / name` under a temporary
    name and renamed. Calling again resumes from it, or returns at once when the stage is finished.

    Args:
        name: of the stage; part of the file names and TensorBoard tags.
        module: the model to train, on any device.
        loss_fn: (step, generator seeded for this step) -> scalar loss and numbers to log.
        out: folder of the run.
        steps: optimizer steps in all. learning_rate: peak of a cosine schedule after `warmup_steps`.
        seed: of the random stream.
        ema_decay, weight_decay: as usual. checkpoint_every: steps between checkpoints.
        validate: called with the EMA weights in place every `validate_every` steps and at the end.

    Raises:
        FloatingPointError: the gradient of many batches in a row is not finite; one such batch is left out.
    """
    if (out / name).exists():
        module.load_state_dict(type(module).from_pretrained(out / name).state_dict())
        return
    device = next(module.parameters()).device
    accelerator = Accelerator(mixed_precision=best_precision(device), cpu=device.type == "cpu", device_placement=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=min(warmup_steps, steps // 10), num_training_steps=steps
    )
    ema = EMAModel(module.parameters(), decay=ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
    accelerator.register_for_checkpointing(ema)
    # `loss_fn` runs in autocast; outside of it, in validation and in later stages, the module keeps its own precision.
    for name_of_forward in ("forward", "_original_forward"):
        vars(module).pop(name_of_forward, None)

    checkpoint = out / "checkpoints" / name
    previous = checkpoint.with_name(f"{name}.previous")
    if previous.exists() and not checkpoint.exists():  # killed between the two renames of `_save_checkpoint`
        os.replace(previous, checkpoint)
    start = 0
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
        ema.to(device)
        start = json.loads((checkpoint / "progress.json").read_text())["step"]
        logger.info("%s: resumed at step %d of %d", name, start, steps)

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start or None)
    skipped = 0
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5.0)
    for step in progress:
        model.train()
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        with accelerator.autocast():
            loss, logs = loss_fn(step, generator)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        skipped = 0 if torch.isfinite(norm) else skipped + 1  # one batch may overflow; a run must not
        if skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"{name}: the gradient of the last {MAX_SKIPPED} batches is not finite (step {step}): lower the "
                "learning rate, or look for non-finite data. The last checkpoint is intact."
            )
        if not skipped:
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(module.parameters())

        done = step + 1
        if done % 50 == 0 or done == steps:
            logs |= {"loss": loss.item(), "grad_norm": float(norm), "learning_rate": schedule.get_last_lr()[0]}
            for key, value in logs.items():
                writer.add_scalar(f"{name}/{key}", value, done)
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if done % checkpoint_every == 0 and done < steps:
            _save_checkpoint(accelerator, checkpoint, done)
        if validate and (done % validate_every == 0 or done == steps):
            model.eval()
            ema.store(module.parameters())
            ema.copy_to(module.parameters())
            validate(writer, done)
            ema.restore(module.parameters())
    writer.close()
    ema.copy_to(module.parameters())
    module.eval()
    temporary = out / f".{name}.tmp"
    module.save_pretrained(temporary)
    os.replace(temporary, out / name)
    for folder in (checkpoint, previous):
        shutil.rmtree(folder, ignore_errors=True)


def _save_checkpoint(accelerator: Accelerator, path: Path, step: int) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    accelerator.save_state(str(temporary))
    (temporary / "progress.json").write_text(json.dumps({"step": step}))
    # A folder cannot replace a full one: the old checkpoint steps aside, and `fit` finds it after a kill in between.
    previous = path.with_name(f"{path.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
