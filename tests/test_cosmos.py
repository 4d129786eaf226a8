"""Prophet on diffusers' Cosmos and Wan classes, in a tiny random configuration of their full layout."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from test_adapt import LORA
from test_envs import FakeRewardModel, starts  # noqa: F401
from test_world_model import episodes
from torch.nn import functional as F

from prophet_gym.envs.vector_env import ProphetVectorEnv
from prophet_gym.training import fit
from prophet_gym.world_model import ProphetCosmosAutoencoder, ProphetCosmosTransformer3DModel, ProphetPipeline
from prophet_gym.world_model.adaptation import RECIPES, adapt
from prophet_gym.world_model.training import PRESETS, train
from prophet_gym.world_model.transformer import with_memory

TRANSFORMER = dict(
    in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, text_embed_dim=12,
    adaln_lora_dim=8, max_size=(8, 64, 64), rope_scale=(1.0, 3.0, 3.0), concat_padding_mask=True,
    extra_pos_embed_type=None,
)  # fmt: skip
VAE = dict(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.1, 0.2, 0.3, 0.4],
    latents_std=[0.5, 0.6, 0.7, 0.8],
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the layout of Cosmos-Predict2-2B-Video2World's folder."""
    path = tmp_path_factory.mktemp("cosmos")
    torch.manual_seed(0)
    CosmosTransformer3DModel(**TRANSFORMER).save_pretrained(path / "transformer")
    AutoencoderKLWan(**VAE).save_pretrained(path / "vae")
    return path


MEMORY = ((2, 1, 2), (4, 2, 8))


def transformer_inputs(buffer_frames: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "sample": (2, 2, 4, 12, 12),
        "history": (2, buffer_frames, 4, 12, 12),
        "condition": (2, 2, 52),
        "action_frames": (2, 3, 3, 48, 48),
        "carried": (2, 2, 2, 4, 12, 12),
    }
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"sigma": torch.tensor([1.0, 0.3])}


@torch.no_grad()
@pytest.mark.parametrize("memory", [(), MEMORY])
def test_before_training_the_output_is_that_of_the_pretrained_model(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, memory: tuple[tuple[int, int, int], ...]
) -> None:
    """Called as diffusers' video-to-world pipeline calls it, with one given frame and a text of zeros."""
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size))
    mode = SimpleNamespace(NEAREST="nearest")  # torchvision, which the base class resizes an empty mask with
    transforms = SimpleNamespace(functional=resize, InterpolationMode=mode)
    monkeypatch.setattr(transformer_cosmos, "transforms", transforms, raising=False)
    model = ProphetCosmosTransformer3DModel.from_cosmos(pretrained / "transformer", memory=memory)
    inputs = transformer_inputs(model.buffer_frames)
    given = torch.zeros(2, 1, 3, 12, 12)
    given[:, :, 0] = 1
    sigma = inputs["sigma"][:, None].expand(-1, 3).clone()
    sigma[:, 0] = 1e-4 / (1 + 1e-4)
    expected = CosmosTransformer3DModel.from_pretrained(pretrained / "transformer")(
        hidden_states=torch.cat([inputs["history"][:, -1:], inputs["sample"]], dim=1).transpose(1, 2),
        timestep=sigma[:, None, :, None, None],
        encoder_hidden_states=torch.zeros(2, 5, 12),
        fps=16,
        condition_mask=given,
        padding_mask=torch.zeros(1, 1, 96, 96),
        return_dict=False,
    )[0]
    assert model.buffer_frames == (9 if memory else 3)
    # The same sums, but for the modulation, which is computed for a frame in place of each of its tokens.
    torch.testing.assert_close(model(**inputs), expected.transpose(1, 2)[:, 1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["history", "condition", "action_frames", "carried"])
def test_every_condition_has_a_way_in(pretrained: Path, name: str) -> None:
    model = ProphetCosmosTransformer3DModel.from_cosmos(pretrained / "transformer")
    inputs = transformer_inputs()
    changed = inputs | {name: inputs[name].clone()}
    changed[name][:, 0] += 1  # of the history that is the first frame, which is not given
    assert torch.equal(model(**inputs), model(**changed))
    for layer in (model.condition_embed.proj, model.action_embed.to_timestep, model.action_embed.to_adaln):
        torch.nn.init.normal_(layer.weight, std=0.1)
    assert (model(**inputs) - model(**changed)).abs().max() > 1e-3


@torch.no_grad()
def test_a_memory_takes_the_place_of_the_text(pretrained: Path, tmp_path: Path) -> None:
    """The pretrained cross-attention is kept, all but its output; a memory can also be given to a model without one."""
    text = CosmosTransformer3DModel.from_pretrained(pretrained / "transformer").transformer_blocks[0]
    model = ProphetCosmosTransformer3DModel.from_cosmos(pretrained / "transformer", memory=MEMORY)
    block = model.transformer_blocks[0]
    assert torch.equal(block.attn2.to_k.weight, text.attn2.to_k.weight) and not block.attn2.to_out[0].weight.any()
    inputs = transformer_inputs(model.buffer_frames)
    changed = inputs | {"history": inputs["history"].clone()}
    changed["history"][:, 1:-2] += torch.randn(6, 4, 12, 12)
    later = with_memory(ProphetCosmosTransformer3DModel.from_cosmos(pretrained / "transformer"), MEMORY)
    assert torch.equal(later(**inputs), model(**inputs))
    for one in (model, later):
        assert torch.equal(one(**inputs), one(**changed))
        torch.nn.init.normal_(one.transformer_blocks[0].attn2.to_out[0].weight)
        assert (one(**inputs) - one(**changed)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(ProphetCosmosTransformer3DModel.from_pretrained(tmp_path)(**inputs), model(**inputs))


def test_other_cosmos_models_are_refused(tmp_path: Path) -> None:
    CosmosTransformer3DModel(**TRANSFORMER | {"extra_pos_embed_type": "learnable"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected the layout of Cosmos-Predict2-2B-Video2World"):
        ProphetCosmosTransformer3DModel.from_cosmos(tmp_path)


@torch.no_grad()
def test_each_frame_is_the_first_frame_of_a_clip(pretrained: Path) -> None:
    """The causal autoencoder codes a clip's first frame by itself, whatever follows."""
    vae = ProphetCosmosAutoencoder.from_pretrained(pretrained / "vae")
    wan = AutoencoderKLWan.from_pretrained(pretrained / "vae")
    clip = torch.rand(1, 3, 5, 48, 48) * 2 - 1
    raw = wan.encode(clip).latent_dist.mode()
    mean, std = (torch.tensor(VAE[key])[:, None, None] for key in ("latents_mean", "latents_std"))
    latents = vae.encode(clip[0].movedim(1, 0))
    assert latents.shape == (5, 4, 6, 6)
    torch.testing.assert_close(latents[0], (raw[0, :, 0] - mean) / std)
    decoded = vae.decode(latents[None], torch.zeros(1, 3, 48, 48))
    assert decoded.shape == (1, 5, 3, 48, 48)
    torch.testing.assert_close(decoded[0, 0], wan.decode(raw).sample[0, :, 0])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, LORA])
def test_one_step_of_every_stage_then_a_rollout(
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: str,  # noqa: F811
    rank: int | None,
) -> None:
    for recipes, name in ((PRESETS, "cosmos-2b"), (RECIPES, "adapt"), (RECIPES, "video")):
        short = {
            stage: arguments | {"steps": 1, "batch_size": 2} if "steps" in arguments else arguments
            for stage, arguments in recipes[name].items()
            if stage != "halfway"
        }
        monkeypatch.setitem(recipes, name, short)
    rates: dict[str, float] = {}

    def fit_and_note(stage: str, *arguments: Any, learning_rate: float, **settings: Any) -> None:
        rates[stage] = learning_rate
        fit(stage, *arguments, learning_rate=learning_rate, **settings)

    monkeypatch.setattr("prophet_gym.world_model.training.fit", fit_and_note)
    data = episodes(2), episodes(1, seed=1)
    pipeline = train(*data, tmp_path / "train", preset="cosmos-2b", pretrained=pretrained)
    transformer = pipeline.transformer
    assert transformer.condition_embed.proj.weight.any() and transformer.action_embed.to_adaln.bias.any()
    assert transformer.buffer_frames == 21 and transformer.transformer_blocks[0].attn2.to_out[0].weight.any()
    if rank is None:  # the autoencoder's own stage is not for this one
        pipeline = adapt(pipeline, *data, tmp_path / "video", recipe="video")
    for key, value in ProphetCosmosAutoencoder.from_pretrained(pretrained / "vae").state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[key], value)  # stays as it was pretrained
    pipeline = adapt(pipeline, *data, tmp_path / "adapt", lora_rank=rank)
    # All the weights of a large model follow slowly.
    assert rates["rollouts"] == pytest.approx(
        (0.1 if rank is None else 1.0) * RECIPES["adapt"]["rollouts"]["learning_rate"]
    )
    loaded = ProphetPipeline.from_pretrained(tmp_path / "adapt" / "pipeline")
    assert type(loaded.vae) is ProphetCosmosAutoencoder and type(loaded.transformer) is ProphetCosmosTransformer3DModel

    frames = []
    for world_model in (pipeline, tmp_path / "adapt" / "pipeline"):
        envs = ProphetVectorEnv(
            num_envs=2, world_model=world_model, reward_model=FakeRewardModel(2.0), start_states=starts,
        )  # fmt: skip
        envs.reset(seed=0)
        frames += [envs.step(np.full((2, 8, 7), 0.5, np.float32))[0]["image"] for _ in range(2)]
    assert frames[0].shape == (2, 96, 96, 3)
    # What is loaded by path is laid out for speed, and sums in another order.
    assert all(np.abs(frames[k].astype(int) - frames[k + 2]).max() <= 1 for k in range(2))
    assert not np.array_equal(frames[0], frames[1])


def test_the_preset_and_the_pretrained_weights_go_together(pretrained: Path, tmp_path: Path) -> None:
    for preset, folder in (("cosmos-2b", None), ("debug", pretrained)):
        with pytest.raises(ValueError, match="begins from pretrained weights"):
            train(episodes(2), episodes(1), tmp_path, preset=preset, pretrained=folder)
