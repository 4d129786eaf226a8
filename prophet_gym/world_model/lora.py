"""Low-rank adapters of the transformer, by peft: few weights to train, fused into the others when they are."""

import os

import torch
from diffusers import CosmosTransformer3DModel
from torch import nn


def check_lora(rank: int) -> None:
    """Raise what `add_lora` would raise, before hours of other stages.

    Raises:
        ImportError: peft is not installed.
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}.")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f'LoRA needs peft ({error}): pip install "prophet-gym[lora]".') from error


def add_lora(transformer: CosmosTransformer3DModel, rank: int, seed: int) -> None:
    """Put adapters on every linear and convolutional layer, and let nothing else train; the output stays the same.

    Args:
        rank: of the adapters, at least 1. seed: of their initial weights.

    Raises:
        ImportError, ValueError: as `check_lora`.
    """
    check_lora(rank)
    from peft import LoraConfig

    layers = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))


def fuse_lora(transformer: CosmosTransformer3DModel, path: str | os.PathLike[str] | None) -> None:
    """Add the adapters to the weights that they adapt and remove them: the transformer is a plain one again.

    Args:
        path: folder for the adapters themselves, which `transformer.load_lora_adapter` reads; None keeps none.
    """
    if path is not None:
        transformer.save_lora_adapter(path)
    transformer.fuse_lora()
    transformer.unload_lora()
    transformer.requires_grad_(True)
