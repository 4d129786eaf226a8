"""Whose folder it is: a run that is given again resumes, and another one does not take its results for its own."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch

from prophet_gym.data.episode import Policy, policy_network
from prophet_gym.data.lerobot_format.schema import write_json


def claim(out: Path, **settings: Any) -> None:
    """Make the folder of a run, or see that it is this run's, of the first process of several: what is finished in it
    is not done again, and must be what these settings would make.

    Args:
        out: the folder. settings: what decides on the result, as JSON can hold it; kept in `out / run.json`.

    Raises:
        ValueError: the folder belongs to a run with other settings, or does not say to which.
    """
    file = out / "run.json"
    settings = json.loads(json.dumps(settings))  # a tuple becomes a list
    if file.exists():
        try:
            theirs = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): choose another folder.") from error
        other = sorted(name for name in settings | theirs if settings.get(name) != theirs.get(name))
        if not other:
            return
        if len(list(out.iterdir())) > 1:  # else that run made nothing
            raise ValueError(
                f"{out} belongs to a run with {', '.join(f'{name} {theirs.get(name)}' for name in other)}, this one "
                f"has {', '.join(f'{name} {settings.get(name)}' for name in other)}: choose another folder, or the "
                "same settings to resume."
            )
    elif made := [name for name in ("pipeline", "reward", "checkpoints", "checkpoint_*.zip") if any(out.glob(name))]:
        raise ValueError(f"{out} holds {made}, but no {file.name} that says of what run: choose another folder.")
    write_json(file, settings)


def policy_checksum(policy: Policy) -> int | str:
    """What tells a policy from another: one number for its weights, or its class where it has none."""
    network = policy_network(policy)
    return weights_checksum(network) if isinstance(network, torch.nn.Module) else type(policy).__name__


def weights_checksum(*modules: torch.nn.Module | None) -> int:
    """One number for the weights of some modules, to tell whether they are the same. None, a part that a pipeline
    lacks, adds nothing."""
    checksum = 0
    for module in modules:
        for weight in () if module is None else module.state_dict().values():
            checksum = zlib.crc32(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), checksum)
    return checksum
