"""The training loop: averages, clipping, checkpoints and what is wrong with them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.tensorboard import SummaryWriter

from prophet_gym.training import fit

STEPS = 12


class Point(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(size))
        self.fixed = torch.nn.Parameter(torch.ones(size), requires_grad=False)


def run(
    out: Path, stop_at: int | None = None, spike: float = 1.0, **settings: float
) -> tuple[Point, list[torch.Tensor]]:
    """A point that is pulled to a place that moves; and where it was before each step."""
    point, places = Point(), []

    def loss(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        places.append(point.place.detach().clone())
        if step == stop_at:
            raise KeyboardInterrupt
        goal = torch.rand(3, generator=generator) + point.fixed
        return (spike if step == 3 else 1.0) * (point.place - goal).square().sum(), {}

    arguments = {"steps": STEPS, "learning_rate": 0.1, "seed": 0, "ema_decay": 0.9, "checkpoint_every": 4} | settings
    fit("point", point, loss, out, **arguments)  # type: ignore[arg-type]
    return point, places


def test_on_return_the_module_holds_the_average_of_its_weights(tmp_path: Path) -> None:
    point, places = run(tmp_path)
    average = EMAModel([torch.nn.Parameter(places[0])], decay=0.9, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for place in places[1:]:  # the last step, of a learning rate of nearly nothing, is not among them
        average.step([torch.nn.Parameter(place)])
    assert (average.shadow_params[0] - places[-1]).abs().max() > 0.05
    torch.testing.assert_close(point.place.data, average.shadow_params[0], rtol=0.1, atol=0.02)
    saved = Point.from_pretrained(tmp_path / "point")
    assert torch.equal(saved.place, point.place) and torch.equal(saved.fixed, torch.ones(3))


def follow(out: Path, validated: bool) -> tuple[Point, list[torch.Tensor], list[torch.Tensor]]:
    """A point after a short training, where it was after each step, and where it was when it was validated."""
    point, places, seen = Point(), [], []

    def loss(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return (point.place - torch.rand(3, generator=generator)).square().sum(), {}

    def validate(writer: SummaryWriter, step: int) -> None:
        seen.append(point.place.detach().clone())

    with register_optimizer_step_post_hook(lambda *_: places.append(point.place.detach().clone())):
        fit(
            "point", point, loss, out, steps=12, learning_rate=0.1, seed=0, ema_decay=0.5,
            validate=validate if validated else None, validate_every=4,
        )  # fmt: skip
    return point, places, seen


def test_validation_sees_the_average_and_training_goes_on_from_the_weights(tmp_path: Path) -> None:
    point, places, seen = follow(tmp_path / "validated", validated=True)
    average, averages = torch.zeros(3), []
    for step, place in enumerate(places):
        decay = min(0.5, 1 - (1 + step) ** -0.75)  # it warms up
        average = decay * average + (1 - decay) * place
        averages.append(average)
    torch.testing.assert_close(torch.stack(seen), torch.stack(averages[3::4]))
    torch.testing.assert_close(point.place.data, average)
    _, expected, _ = follow(tmp_path / "not", validated=False)
    assert torch.equal(torch.stack(places), torch.stack(expected)) and not torch.allclose(average, places[-1])


def test_the_optimiser_takes_what_is_trained_at_the_scheduled_rate(tmp_path: Path) -> None:
    """Gradients are not longer than one; the rate rises linearly, at most for a tenth of the steps, and falls as a
    cosine."""
    norms, rates = [], []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        (weight,) = group["params"]
        norms.append(weight.grad.norm().item())
        rates.append(group["lr"])
        assert group["weight_decay"] == 0.2

    with register_optimizer_step_post_hook(note):
        run(tmp_path, steps=40, spike=1e3, weight_decay=0.2)
    assert norms[3] == pytest.approx(1.0, abs=1e-3) and max(norms) < 1.001 and min(norms) < 0.9
    falling = [0.05 * (1 + np.cos(np.pi * step / 36)) for step in range(36)]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, *falling])


def test_another_seed_is_another_training(tmp_path: Path) -> None:
    one, other, same = (run(tmp_path / name, seed=seed)[0] for name, seed in (("a", 0), ("b", 1), ("c", 0)))
    assert torch.equal(one.place, same.place) and not torch.equal(one.place, other.place)


def test_a_steep_batch_is_clipped(tmp_path: Path) -> None:
    """A gradient that is longer than one leads to the same weights, however long it is."""
    one, places = run(tmp_path / "one", spike=1e2)
    other, _ = run(tmp_path / "other", spike=1e6)
    assert (places[-1] - places[4]).abs().max() > 0.05
    torch.testing.assert_close(one.place, other.place, rtol=1e-3, atol=1e-4)


def killed(out: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(out, stop_at=9)
    return out / "checkpoints" / "point"


def test_a_run_killed_between_the_two_renames_of_a_checkpoint_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, places = run(tmp_path / "whole")
    checkpoint = killed(tmp_path / "killed")
    os.replace(checkpoint, checkpoint.with_name("point.previous"))
    resumed, rest = run(tmp_path / "killed")
    assert len(rest) == STEPS - 8 and torch.equal(rest[0], places[8])
    assert torch.equal(resumed.place, whole.place)
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())


def test_a_checkpoint_has_no_pickle_of_ours(tmp_path: Path) -> None:
    checkpoint = killed(tmp_path)
    assert (checkpoint / "ema.safetensors").is_file() and not list(checkpoint.glob("custom_checkpoint*"))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["point"]  # the one before it is gone


@pytest.mark.parametrize("name", ["ema.safetensors", "progress.json", "optimizer.bin"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    checkpoint = killed(tmp_path)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{checkpoint} is damaged"):
        run(tmp_path)


def test_a_checkpoint_of_more_processes_is_refused(tmp_path: Path) -> None:
    checkpoint = killed(tmp_path)
    progress = json.loads((checkpoint / "progress.json").read_text())
    (checkpoint / "progress.json").write_text(json.dumps(progress | {"processes": 2}))
    with pytest.raises(ValueError, match="of 2 processes, these are 1"):
        run(tmp_path)


def test_a_damaged_stage_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "point" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="Delete it to train that stage again"):
        run(tmp_path)
