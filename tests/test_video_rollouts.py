"""Transformer and decoder on rollouts that last from step to step: what they go on from, what they learn, resuming."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_adapt import assert_same_weights, base, load, new_world  # noqa: F401
from test_world_model import episodes
from torch.utils.tensorboard import SummaryWriter

from prophet_gym.data.clips import EpisodeArrays, concatenate
from prophet_gym.training import fit
from prophet_gym.world_model import ProphetPipeline, adaptation
from prophet_gym.world_model.adaptation import adapt
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.imagination import (
    encode_frames,
    episode_seeds,
    frame_rows,
    observed_condition,
    replay_episodes,
    track_holds,
)
from prophet_gym.world_model.losses import latent_error, pixel_loss
from prophet_gym.world_model.pipeline import frames_to_pixels
from prophet_gym.world_model.training import _validate
from prophet_gym.world_model.video_rollouts import VideoModels, VideoRolloutLoss


def make(pipeline: ProphetPipeline, arrays: EpisodeArrays, batch_size: int = 6, steps: int = 1) -> VideoRolloutLoss:
    return VideoRolloutLoss(pipeline, arrays, encode_frames(pipeline.vae, arrays.frames), batch_size, steps)


def step(loss_fn: VideoRolloutLoss, number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The rollouts before and after a step."""
    before = dict(loss_fn.state_dict())
    with torch.no_grad():
        loss_fn(number, torch.Generator().manual_seed(number))
    return before, loss_fn.state_dict()


def test_rollouts_go_on_from_what_they_showed_until_their_episode_is_over() -> None:
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(5)
    loss_fn = make(pipeline, arrays)
    step(loss_fn, 0)
    went_on = began = 0
    for number in range(1, 30):
        before, after = step(loss_fn, number)
        assert (after["time"] <= arrays.lengths[after["episodes"]] - 1).all()  # no frame of the next episode
        over = before["time"] + pipeline.chunk_frames > arrays.lengths[before["episodes"]] - 1
        assert torch.equal(after["episodes"][~over], before["episodes"][~over])
        assert torch.equal(after["time"], torch.where(over, 0, before["time"]) + pipeline.chunk_frames)
        kept = (after["history"][:, 1:-2] == before["history"][:, 3:]).flatten(1).all(1)
        assert kept[~over].float().mean() > 0.5 or (~over).sum() < 3  # all but those that were told the truth
        went_on, began = went_on + int((kept & ~over).sum()), began + int(over.sum())
        shown = pipeline.vae.encode(after["latest"])
        torch.testing.assert_close(after["history"][:, -1], shown)
        first = pipeline.vae.encode(frames_to_pixels(arrays.first_frames[after["episodes"]]))
        torch.testing.assert_close(after["history"][:, 0], first, rtol=0.01, atol=0.01)  # float16
    assert went_on > 50 and began > 10


def test_a_step_gives_the_networks_what_a_step_of_an_environment_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """History, condition, carried frames: each robot for itself, two suites of two cameras, fingers that close."""
    pipeline = ProphetPipeline.tiny_random()
    parts = [episodes(3, length=10), episodes(2, length=9, seed=1)]
    parts[1] = replace(parts[1], records=tuple(replace(one, suite="square_world") for one in parts[1].records))
    arrays = concatenate(parts)
    arrays.proprio[:, 6] = 0.04 - 0.04 * (arrays.proprio[:, 0] > arrays.proprio[:, 0].median()).float()
    one, other = ([[focal, 0, 48, 10], [0, focal, 48, 20], [0, 0, 1, 1]] for focal in (60.0, 90.0))
    pipeline.register_to_config(
        cameras={"libero_object": one, "square_world": other},
        robots=[["panda", ["libero_object", "square_world"]]],
    )
    given: dict[str, list[tuple[torch.Tensor, ...]]] = {"transformer": [], "decode": []}
    forward, decode = pipeline.transformer.forward, pipeline.vae.decode

    def recording_forward(*arguments: torch.Tensor) -> torch.Tensor:
        given["transformer"].append(arguments)
        return forward(*arguments)

    def recording_decode(*arguments: torch.Tensor) -> torch.Tensor:
        given["decode"].append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(pipeline.transformer, "forward", recording_forward)
    monkeypatch.setattr(pipeline.vae, "decode", recording_decode)
    loss_fn = VideoRolloutLoss(pipeline, arrays, encode_frames(pipeline.vae, arrays.frames), 4, steps=1, told=0.0)
    where, compared = None, 0
    for number in range(1, 7):
        _, after = step(loss_fn, number)
        for row, (episode, time) in enumerate(zip(after["episodes"], after["time"], strict=True)):
            if where is None or episode != where["episodes"][row] or time != where["time"][row] + 2:
                continue
            # The same episode by itself, from what was shown: as `generate` goes on in an environment.
            start, now = arrays.starts[episode], arrays.starts[episode] + time - 2
            rows = torch.stack([now, now + 1, now + 2])[None]
            condition = observed_condition(
                pipeline, arrays, track_holds(arrays), rows,
                pipeline.projection([arrays.suites[episode]]), pipeline.robot([arrays.suites[episode]]),
            )  # fmt: skip
            shown, kept = where["latest"][row][None], where["history"][row][None]
            pipeline.generate(kept, condition, frames_to_pixels(arrays.frames[start][None]), shown)
            compared += 1
            for name, skipped in (("transformer", 2), ("decode", 1)):  # the sample and its noise level; the latents
                alone = given[name].pop()
                for told, expected in zip(given[name][-1][skipped:], alone[skipped:], strict=True):
                    torch.testing.assert_close(told[row], expected[0], rtol=1e-4, atol=1e-4)
        where = dict(after)
    assert len(given["transformer"]) == 6 and compared > 12


def test_episodes_without_a_whole_chunk_are_left_out(tmp_path: Path) -> None:
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(5)
    short = arrays.lengths.clone()
    with pytest.raises(ValueError, match="No training episode has 3 frames"):
        make(pipeline, replace(arrays, lengths=torch.full_like(short, pipeline.chunk_frames)))
    short[[0, 3]] = pipeline.chunk_frames
    writer = SummaryWriter(str(tmp_path))
    _validate(pipeline, replace(arrays, lengths=short), tmp_path, "rollouts", writer, 0)
    assert len(list(tmp_path.glob("*.mp4"))) == 1
    none = replace(arrays, lengths=torch.full_like(short, 2))
    _validate(pipeline, none, tmp_path, "rollouts", writer, 1)
    assert len(list(tmp_path.glob("*.mp4"))) == 1
    loss_fn = make(pipeline, replace(arrays, lengths=short))
    for number in range(12):
        _, after = step(loss_fn, number)
        assert not torch.isin(after["episodes"], torch.tensor([0, 3])).any()


def test_rollouts_are_told_the_true_past_in_the_beginning() -> None:
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(5)
    loss_fn = make(pipeline, arrays, steps=10**9)
    step(loss_fn, 0)
    for number in range(1, 6):
        before = loss_fn._begin_and_tell(number, torch.Generator().manual_seed(number))
        now = arrays.starts[before["episodes"]] + before["time"]
        assert torch.equal(before["latest"], frames_to_pixels(arrays.frames[now]))
        assert torch.equal(before["history"][:, -1], loss_fn.latents[now].float())
        first = arrays.starts[before["episodes"]]
        assert torch.equal(before["history"][:, 0], loss_fn.latents[first].float())
        assert torch.equal(before["history"][:, -2], loss_fn.latents[(now - 1).maximum(first)].float())  # padded left
        step(loss_fn, number)
    noisy = VideoRolloutLoss(pipeline, arrays, loss_fn.latents, 6, steps=1, told=1.0, history_noise=0.3)
    seen: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    step(noisy, 1)
    true = noisy._begin_and_tell(2, torch.Generator().manual_seed(2))["history"]
    step(noisy, 2)
    hook.remove()
    errors = seen[-1] - true  # what the transformer is given; what is carried on stays clean
    assert not errors[:, 0].any() and 0.28 < errors[:, 1:].std() < 0.32
    assert torch.equal(noisy.state_dict()["history"][:, 1:-2], true[:, 3:])


def test_a_model_that_is_right_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true velocity and the true picture, whatever the history: the target is the next chunk. What it is given is
    the truth and noise, to the level that it is told, which is all of it four times of five."""
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(3)
    loss_fn = make(pipeline, arrays, batch_size=4)
    truth: dict[str, torch.Tensor] = {}
    noise, levels = [], []
    begin = loss_fn._begin_and_tell

    def remember(number: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        rollouts = begin(number, generator)
        rows = (arrays.starts[rollouts["episodes"]] + rollouts["time"])[:, None] + torch.tensor([1, 2])
        truth["latents"], truth["pixels"] = loss_fn.latents[rows].float(), frames_to_pixels(arrays.frames[rows])
        return rollouts

    def velocity(sample: torch.Tensor, sigma: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        level = sigma[:, None, None, None, None]
        noise.append((sample - (1 - level) * truth["latents"]) / level)
        levels.append(sigma)
        return (sample - truth["latents"]) / level

    monkeypatch.setattr(loss_fn, "_begin_and_tell", remember)
    monkeypatch.setattr(pipeline.transformer, "forward", velocity)
    monkeypatch.setattr(pipeline.vae, "decode", lambda *arguments: truth["pixels"])
    for number in range(40):
        loss, logs = loss_fn(number, torch.Generator().manual_seed(number))
        assert loss.item() < 1e-6 and logs["psnr"] > 60
    assert abs(torch.cat(noise).mean()) < 0.02 and abs(torch.cat(noise).std() - 1) < 0.02
    assert 0.7 < (torch.cat(levels) == 1).float().mean() < 0.9


def test_places_count_that_differ_from_the_first_frame_or_from_the_latest() -> None:
    history, clean = torch.zeros(1, 3, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2)
    history[:, 0, :, 0, 0] = 1.0
    history[:, -1, :, 1, 1] = 1.0
    for place, weight in (((0, 0), 9.0), ((1, 1), 9.0), ((0, 1), 1.0)):  # they move twice as much as the mean
        predicted = clean.clone()
        predicted[(..., *place)] = 1.0
        assert latent_error(predicted, clean, history).item() == pytest.approx(weight / 4)


def test_pixels_count_where_the_truth_differs_in_any_channel_and_edges_in_both_directions() -> None:
    truth = torch.zeros(1, 3, 4, 4)
    for axis in (2, 3):
        stripe = truth.clone()
        stripe.select(axis, 1).fill_(0.5)  # only in what was decoded: a quarter of the error, two of three edges
        assert pixel_loss(stripe, truth, truth).item() == pytest.approx(10 * 0.5**2 / 4 + 0.5 * 2 / 3)
    red = truth.clone()
    red[:, 0] = 0.5
    assert pixel_loss(red + 0.1, red, truth).item() == pytest.approx(10 * 5 * 0.1**2, rel=1e-4)


def test_the_recipe_video_learns_the_video_and_leaves_the_motion(
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = {
        "autoencoder": {"steps": 60, "batch_size": 8, "learning_rate": 5e-3, "ema_decay": 0.9},
        "rollouts": {"steps": 60, "batch_size": 6, "learning_rate": 5e-3, "ema_decay": 0.9},
    }
    assert recipe.keys() == adaptation.RECIPES["video"].keys()
    monkeypatch.setitem(adaptation.RECIPES, "video", recipe)
    arrays, old = new_world(8), load(base)
    adapted = adapt(load(base), arrays, new_world(2, seed=1), tmp_path / "out", recipe="video")
    chosen = torch.arange(4)
    real = arrays.frames[frame_rows(arrays, chosen, 2)].float()
    errors = [
        (replay_episodes(some, arrays, chosen, episode_seeds(chosen, 0))[0].float() - real).square().mean().item()
        for some in (old, adapted)
    ]
    assert errors[1] < 0.8 * errors[0]
    saved = load(tmp_path / "out" / "pipeline")
    assert_same_weights(saved, adapted)
    for key, value in saved.proprioception.members.state_dict().items():
        assert torch.equal(value, old.proprioception.members.state_dict()[key])
    first = ProphetAutoencoder.from_pretrained(tmp_path / "out" / "autoencoder").state_dict()
    for key, value in saved.vae.state_dict().items():
        if key.startswith("encoder"):
            assert torch.equal(value, first[key])
    assert not torch.equal(saved.vae.to_pixels[1].weight, first["to_pixels.1.weight"])
    assert not torch.equal(saved.transformer.video_out.weight, old.transformer.video_out.weight)
    again = adapt(load(base), arrays, new_world(2, seed=1), tmp_path / "out", recipe="video")
    assert_same_weights(again, adapted)
    others = replace(arrays, records=tuple(replace(record, robot="sawyer") for record in arrays.records))
    with pytest.raises(ValueError, match=r"does not know \['sawyer'\]"):
        adapt(load(base), others, others, tmp_path / "new", recipe="video")


def test_what_overflowed_is_not_carried_on() -> None:
    pipeline, arrays = ProphetPipeline.tiny_random(), episodes(5)
    loss_fn = make(pipeline, arrays)
    step(loss_fn, 0)
    loss_fn.state_dict()["history"][2, -1] = float("nan")
    loss_fn.state_dict()["latest"][2] = float("nan")
    with torch.no_grad():
        loss, _ = loss_fn(1, torch.Generator().manual_seed(1))
    assert loss.isfinite()


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    arrays, results = episodes(4), []
    for name, kills in (("whole", False), ("killed", True)):
        pipeline = ProphetPipeline.tiny_random()

        def run(loss_fn: VideoRolloutLoss, pipeline: ProphetPipeline = pipeline, name: str = name) -> None:
            fit(
                "rollouts",
                VideoModels.of(pipeline),
                loss_fn,
                tmp_path / name,
                steps=12,
                learning_rate=1e-3,
                seed=0,
                checkpoint_every=4,
            )

        if kills:

            class Killed(VideoRolloutLoss):
                def __call__(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
                    if step == 10:
                        raise KeyboardInterrupt
                    return super().__call__(step, generator)

            latents = encode_frames(pipeline.vae, arrays.frames)
            with pytest.raises(KeyboardInterrupt):
                run(Killed(pipeline, arrays, latents, 4, 12))
        run(make(pipeline, arrays, 4, 12))
        results.append(pipeline)
        fresh = ProphetPipeline.tiny_random(seed=1)  # finished: it reads what was written
        run(make(fresh, arrays, 4, 12), fresh)
        for part in ("vae", "transformer"):
            for key, value in getattr(fresh, part).state_dict().items():
                assert torch.equal(value, getattr(pipeline, part).state_dict()[key])
    assert_same_weights(*results)
    assert not np.allclose(
        results[0].vae.to_pixels[1].bias.detach(), ProphetPipeline.tiny_random().vae.to_pixels[1].bias.detach()
    )
