"""Training in two processes: each draws its own batches, their gradients are averaged, one of them writes.

The fixture starts this file as a script, twice, with torchrun.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from test_world_model import episodes, twelve_steps

import prophet_gym.training
from prophet_gym.training import LossFn, fit
from prophet_gym.world_model import ProphetAutoencoder, ProphetPipeline
from prophet_gym.world_model.losses import autoencoder_loss
from prophet_gym.world_model.training import train

SEED = 3
LEARNING_RATE = 1e-2


def autoencoder(seed: int) -> ProphetAutoencoder:
    """In channels last, as `train` makes it."""
    torch.manual_seed(seed)
    vae = ProphetAutoencoder(4, (8, 8, 16), (0, 0, 0), (0, 0, 0))
    return vae.to(memory_format=torch.channels_last)


def loss_of(vae: ProphetAutoencoder) -> LossFn:
    return autoencoder_loss(vae, episodes(4), torch.zeros(4, 1, 3, 4), batch_size=4, chunk_frames=2)


def one_step(vae: ProphetAutoencoder, loss_fn: LossFn, out: Path) -> ProphetAutoencoder:
    fit("one-step", vae, loss_fn, out, steps=1, learning_rate=LEARNING_RATE, seed=SEED)
    return vae


def work(out: Path) -> None:
    """What each of the processes does; all its results go to `out / result-RANK.safetensors`."""
    rank = int(os.environ["RANK"])
    prophet_gym.training.best_precision = lambda device: "no"  # so that sums agree to the last digits
    vae = autoencoder(seed=rank)
    models: dict[str, ModelMixin] = {"one-step": one_step(vae, loss_of(vae), out / "one-step")}
    models["whole"] = twelve_steps(out / "whole", None)
    try:
        twelve_steps(out / "killed", 8)
    except KeyboardInterrupt:
        models["resumed"] = twelve_steps(out / "killed", None)
    pipeline = train(episodes(4), episodes(2, seed=1), out / "train", preset="debug")
    models |= {name: getattr(pipeline, name) for name in ("vae", "transformer", "proprioception")}
    weights = {
        f"{name}/{key}": value.contiguous()
        for name, model in models.items()
        for key, value in model.state_dict().items()
    }
    save_file(weights, out / f"result-{rank}.safetensors")


Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(folder)], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def of_model(out: Path) -> Callable[[str, int], Weights]:
    results = [load_file(out / f"result-{rank}.safetensors") for rank in range(2)]

    def select(name: str, rank: int) -> Weights:
        found = {key.split("/")[1]: value for key, value in results[rank].items() if key.startswith(f"{name}/")}
        assert found
        return found

    return select


def equal(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps the precision that a process began with: other tests may have begun with another one."""
    monkeypatch.setattr(prophet_gym.training, "best_precision", lambda device: "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("full_precision")
def test_a_step_follows_the_mean_gradient_of_both_batches(
    of_model: Callable[[str, int], Weights], tmp_path: Path
) -> None:
    """The second process starts from other weights: those of the first count."""

    def single(batches: range) -> Weights:
        vae = autoencoder(seed=0)
        loss_fn = loss_of(vae)

        def mean(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            seed = generator.initial_seed()
            losses = [loss_fn(step, torch.Generator().manual_seed(seed + batch))[0] for batch in batches]
            return torch.stack(losses).mean(), {}

        return one_step(vae, mean, tmp_path / f"{batches.start}-{batches.stop}").state_dict()

    both, first, start = single(range(2)), single(range(1)), autoencoder(seed=0).state_dict()
    for key, value in of_model("one-step", 0).items():
        # Adam's first step goes as far whatever the gradient's size: only one next to zero may go the other way.
        assert ((value - both[key]).abs() > 1e-2 * LEARNING_RATE).float().mean() < 0.01
    moved = torch.cat([(both[key] - start[key]).flatten() for key in both])
    apart = torch.cat([(both[key] - first[key]).flatten() for key in both])
    assert moved.abs().mean() > 0.5 * LEARNING_RATE and apart.abs().mean() > 0.1 * LEARNING_RATE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-step", "whole", "resumed", "vae", "transformer", "proprioception"])
def test_both_processes_end_with_the_same_weights(of_model: Callable[[str, int], Weights], name: str) -> None:
    assert equal(of_model(name, 0), of_model(name, 1))


@pytest.mark.slow
def test_both_resume_to_the_weights_of_a_training_that_was_not_killed(of_model: Callable[[str, int], Weights]) -> None:
    assert equal(of_model("whole", 0), of_model("resumed", 0))


@pytest.mark.slow
def test_one_process_writes(out: Path, of_model: Callable[[str, int], Weights]) -> None:
    saved = ProphetPipeline.from_pretrained(out / "train" / "pipeline")
    for name in ("vae", "transformer", "proprioception"):
        assert equal(getattr(saved, name).state_dict(), of_model(name, 0))
    logs = list((out / "train" / "tensorboard").rglob("events.*"))
    assert logs and len({log.name.split(".")[-2] for log in logs}) == 1  # the process's number
    assert list((out / "train").glob("validation-*.mp4"))
    assert not list((out / "train").glob(".*.tmp")) and not list((out / "train" / "checkpoints").glob("*"))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
