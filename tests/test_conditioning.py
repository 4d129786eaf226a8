"""What the world model is told reaches its networks, and what the losses weigh is what they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_world_model import SUITES, TINY, episodes, generators, inputs, transformer_inputs, twice

from prophet_gym.world_model import ProphetPipeline, ProphetTransformer3DModel
from prophet_gym.world_model.losses import latent_error, noise_levels, pixel_loss
from prophet_gym.world_model.training import train

WAYS_IN = {
    "sigma": ("sigma", np.s_[:]),
    "scalars": ("condition", np.s_[:, 1]),
    "the action frame of the present": ("action_frames", np.s_[:, 0]),
    "the action frame of the last new frame": ("action_frames", np.s_[:, 2]),
    "the first frame": ("history", np.s_[:, 0]),
    "the last frame but one": ("history", np.s_[:, 1]),
    "the latest frame": ("history", np.s_[:, 2]),
    "the latest frame, carried": ("carried", np.s_[:, :, 0]),
    "the first frame, carried": ("carried", np.s_[:, :, 1]),
}


def distinct_inputs() -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(2, 2, 4, 12, 12),
        "sigma": torch.tensor([1.0, 0.4]),
        "history": torch.randn(2, 3, 4, 12, 12),
        "condition": torch.randn(2, 2, 52),
        "action_frames": torch.rand(2, 3, 3, 48, 48),
        "carried": torch.randn(2, 2, 2, 4, 12, 12),
    }


@torch.no_grad()
@pytest.mark.parametrize("scalars_by", ["to_timestep", "to_adaln"])
@pytest.mark.parametrize("way", WAYS_IN)
def test_every_condition_reaches_the_network(way: str, scalars_by: str) -> None:
    """Before the output's own copying of what was there. Scalars have two ways in, each of which does alone."""
    transformer = ProphetTransformer3DModel(**TINY).eval()
    for layer in (transformer.action_frame_in, getattr(transformer.action_embed, scalars_by)):
        torch.nn.init.normal_(layer.weight, std=0.1)
    seen: list[torch.Tensor] = []
    transformer.head[-1].register_forward_hook(lambda module, given, output: seen.append(output))
    told = distinct_inputs()
    name, where = WAYS_IN[way]
    changed = told | {name: told[name].clone()}
    changed[name][where] *= 0.5
    transformer(**told)
    transformer(**changed)
    assert (seen[0] - seen[1]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["sample", "condition", "action_frames", "carried"])
def test_each_frame_is_told_what_is_its_own(name: str) -> None:
    """Before the blocks, where the frames of a chunk see each other."""
    transformer = ProphetTransformer3DModel(**TINY).eval()
    for layer in (transformer.action_frame_in, transformer.action_embed.to_timestep):
        torch.nn.init.normal_(layer.weight, std=0.1)
    seen: list[torch.Tensor] = []
    transformer.stem[-1].register_forward_hook(lambda module, given, output: seen.append(output))
    told = transformer_inputs(torch.tensor([1.0, 0.3]))
    transformer(**told)
    for frame in range(2):
        changed = told | {name: told[name].clone()}
        changed[name][:, frame + (name == "action_frames")] += 1.0  # the first one is of the present
        transformer(**changed)
        reached = (seen[-1] != seen[0]).unflatten(0, (2, 2)).flatten(2).any(2)
        assert reached.tolist() == 2 * [[frame == 0, frame == 1]]


@torch.no_grad()
def test_the_blocks_know_time_row_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = ProphetTransformer3DModel(**TINY).eval()
    seen: list[torch.Tensor] = []
    transformer.head[-1].register_forward_hook(lambda module, given, output: seen.append(output))
    told = transformer_inputs(torch.tensor([1.0, 0.3]))
    transformer(**told)
    for name in ("pos_emb_t", "pos_emb_h", "pos_emb_w"):
        places = getattr(transformer.learnable_pos_embed, name)
        places.neg_()
        transformer(**told)
        places.neg_()
    rope = transformer.rope.forward
    monkeypatch.setattr(transformer.rope, "forward", lambda tokens: rope(tokens)[::-1])
    transformer(**told)
    assert all((changed - seen[0]).abs().max() > 1e-4 for changed in seen[1:])


@torch.no_grad()
def test_the_convolutions_after_the_blocks_go_on_from_those_before_and_are_told_the_same() -> None:
    transformer = ProphetTransformer3DModel(**TINY)
    torch.nn.init.zeros_(transformer.proj_out.weight)  # the blocks between add nothing
    seen: list[tuple[torch.Tensor, ...]] = []
    for block in (transformer.stem[-1], transformer.head[0]):
        block.register_forward_hook(lambda module, given, output: seen.append((*given, output)))
    transformer(**transformer_inputs(torch.tensor([1.0, 0.3])))
    (_, told_before, output), (goes_on, told_after, _) = seen
    assert torch.equal(output, goes_on) and output.any()
    assert torch.equal(told_before, told_after) and not torch.equal(told_after[0], told_after[-1])


@torch.no_grad()
def test_the_output_chooses_between_the_frames_that_there_were() -> None:
    told = distinct_inputs()
    transformer = ProphetTransformer3DModel(**TINY)
    transformer.video_out.bias[-4:] = torch.tensor([0.0, 1.0, 2.0, 3.0])  # or the carried frames had equal shares
    velocity = transformer(**told)
    clean = told["sample"] - told["sigma"][:, None, None, None, None] * velocity
    latest, first, carried_latest, carried_first = torch.tensor([4.0, 1.0, 2.0, 3.0]).softmax(0)
    history, carried = told["history"], told["carried"]
    expected = latest * history[:, -1:] + first * history[:, :1]
    expected = expected + carried_latest * carried[:, :, 0] + carried_first * carried[:, :, 1]
    torch.testing.assert_close(clean, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_integrates_the_velocity_from_noise_to_data(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a velocity that is the sample, each of K Euler steps leaves 1 - 1 / K."""
    pipeline = ProphetPipeline.tiny_random()
    images, proprio, actions = inputs(2)
    latents: list[torch.Tensor] = []
    decode = pipeline.vae.decode

    def look(given: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        latents.append(given)
        return decode(given, *rest)

    monkeypatch.setattr(pipeline.vae, "decode", look)
    monkeypatch.setattr(pipeline.transformer, "forward", lambda sample, *conditions: sample)
    history, state = pipeline.init_history(images), pipeline.init_state(proprio)
    pipeline.imagine(history, state, actions, twice(images), ["libero_object"] * 2, generators(2), steps)
    noise = torch.cat([torch.randn(1, 2, 4, 12, 12, generator=generator) for generator in generators(2)])
    torch.testing.assert_close(latents[0], noise * (1 - 1 / steps) ** steps)


@torch.no_grad()
def test_sampling_tells_the_transformer_the_noise_level_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, levels = ProphetPipeline.tiny_random(), []

    def velocity(sample: torch.Tensor, sigma: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        levels.append(sigma)
        return sample

    monkeypatch.setattr(pipeline.transformer, "forward", velocity)
    images, proprio, actions = inputs(2)
    history, state = pipeline.init_history(images), pipeline.init_state(proprio)
    pipeline.imagine(history, state, actions, twice(images), SUITES[:2], generators(2), 4)
    torch.testing.assert_close(torch.stack(levels, dim=1), torch.tensor([[1.0, 0.75, 0.5, 0.25]] * 2))


@torch.no_grad()
def test_the_proprioception_sees_remembers_and_stays_bounded() -> None:
    pipeline = ProphetPipeline.tiny_random()
    model = pipeline.proprioception
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    projection, robot = pipeline.projection(["libero_object"]), torch.zeros(1, dtype=torch.int64)
    actions, picture = torch.rand(1, 4, 7), torch.rand(1, 3, 96, 96)
    velocity, memory = slice(8, 24), slice(24, 40)

    def moved(pose: float = 0.0, velocity_is: float = 0.0, memory_is: float = 0.0, dark: bool = False) -> torch.Tensor:
        state = model.init_state(torch.full((1, 8), pose))
        state[:, velocity], state[:, memory] = velocity_is, memory_is
        after = model(state, actions, -picture if dark else picture, projection, robot)
        remembered.append(after[:, memory])
        return (after - state)[:, :8]

    remembered: list[torch.Tensor] = []
    assert not torch.equal(moved(), moved(dark=True))
    assert not torch.equal(moved(), moved(memory_is=1.0))
    assert not torch.equal(remembered[-2], remembered[-1])
    torch.testing.assert_close(moved(velocity_is=1e3), moved(velocity_is=1e4))
    far, farther = moved(pose=1e3), moved(pose=1e4)
    torch.testing.assert_close(far, farther, rtol=0, atol=2e-3)  # as far as float32 tells at ten kilometres


def test_what_moves_counts_more_in_latents() -> None:
    history, clean = torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    clean[..., 0, 0] = 1.0  # a quarter of the places moves
    everywhere_off = latent_error(clean + 1.0, clean, history)
    assert everywhere_off.item() == pytest.approx(5.0)  # the mean weight is 1 + 4
    still = clean.clone()
    still[..., 1, 1] = 1.0
    assert latent_error(still, clean, history).item() == pytest.approx(1 / 4)  # a place that stays: weight 1
    still = clean.clone()
    still[..., 0, 0] = 0.0
    assert latent_error(still, clean, history).item() == pytest.approx((1 + 4 * 4) / 4)  # all movement is there
    nothing = torch.zeros_like(clean)
    assert latent_error(nothing + 1.0, nothing, history).item() == pytest.approx(1.0)


def test_what_differs_from_the_reference_counts_five_times_in_pixels() -> None:
    reference = torch.zeros(1, 3, 4, 4)
    pixels = reference.clone()
    pixels[..., :2] = 0.5  # half of it differs
    assert pixel_loss(pixels + 0.1, pixels, reference).item() == pytest.approx(10 * 0.01 * (5 + 1) / 2, rel=1e-4)
    sharp = reference.clone()
    sharp[..., 1] = 0.08  # one column of four: a rise and a fall in each row of three differences
    assert pixel_loss(sharp, reference, reference).item() == pytest.approx(10 * 0.08**2 / 4 + 2 / 3 * 0.08, rel=1e-4)


def test_noise_levels_are_mostly_pure_noise_and_else_logit_normal() -> None:
    levels = noise_levels(20_000, 0.8, torch.Generator().manual_seed(0))
    assert (levels == 1).float().mean().item() == pytest.approx(0.8, abs=0.01)
    rest = levels[levels < 1]
    assert rest.min() >= 0.02 and torch.logit(rest).mean().abs() < 0.1 and abs(torch.logit(rest).std() - 1) < 0.1


@pytest.mark.parametrize("size", [(88, 88), (32, 32), (96, 80)])
def test_frames_that_the_networks_cannot_take_are_refused_before_any_stage(
    size: tuple[int, int], tmp_path: Path
) -> None:
    arrays = episodes(3)
    frames = arrays.frames[:, : size[0], : size[1]]
    arrays = replace(arrays, frames=frames, first_frames=frames[arrays.starts])
    with pytest.raises(ValueError, match=f"got {size[0]} x {size[1]}"):
        train(arrays, arrays, tmp_path, preset="debug")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
