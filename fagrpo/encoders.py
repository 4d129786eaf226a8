"""Observations to the context that a flow head is conditioned on."""

from collections.abc import Sequence

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import (
    get_flattened_obs_dim,
    is_image_space,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn


class _ChannelNorm(nn.Module):
    """Layer normalisation over the channels of (B, C, H, W), independent of the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class _ImageTrunk(nn.Module):
    """Convolutions that keep the layout of an image: /8 in size, then keypoints and a flattened low-channel map.

    The vectors of the observation (an instruction, proprioception) modulate the channels (FiLM), so that the network
    can look for the object that is named; two coordinate channels tell it where a feature is.
    """

    def __init__(
        self, shape: tuple[int, ...], condition_dim: int, channels: Sequence[int], keypoints: int, map_channels: int
    ) -> None:
        super().__init__()
        first, second = channels
        self.stem = nn.Sequential(nn.Conv2d(shape[0], first, 8, stride=4, padding=2), _ChannelNorm(first), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(first, second, 3, stride=2, padding=1), _ChannelNorm(second))
        self.film_down = nn.Linear(condition_dim, 2 * second)
        self.mix = nn.Sequential(nn.Conv2d(second + 2, second, 3, padding=1), _ChannelNorm(second))
        self.film_mix = nn.Linear(condition_dim, 2 * second)
        self.refine = nn.Sequential(nn.Conv2d(second, second, 3, padding=1), _ChannelNorm(second), nn.ReLU())
        self.keypoints = nn.Conv2d(second, keypoints, 1)
        self.map = nn.Conv2d(second, map_channels, 1)
        with torch.no_grad():
            height, width = self.down(self.stem(torch.zeros(1, *shape))).shape[2:]
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("grid", torch.stack([columns, rows]), persistent=False)  # (2, h, w)
        self.grid: Tensor
        self.output_dim = 2 * keypoints + map_channels * height * width

    @staticmethod
    def _film(x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        return nn.functional.relu(x * (1 + scale) + shift)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """Image (B, C, H, W) in [0, 1] and condition (B, condition_dim) -> (B, output_dim)."""
        x = self.stem((2 * image - 1).contiguous(memory_format=torch.channels_last))
        x = self._film(self.down(x), self.film_down(condition))
        grid = self.grid.expand(len(x), -1, -1, -1)
        x = self._film(self.mix(torch.cat([x, grid], dim=1)), self.film_mix(condition))
        x = x + self.refine(x)
        attention = self.keypoints(x).flatten(2).softmax(dim=2)  # (B, keypoints, h w)
        points = attention @ self.grid.flatten(1).t()  # (B, keypoints, 2)
        return torch.cat([points.flatten(1), self.map(x).flatten(1)], dim=1)


class FlowObservationEncoder(BaseFeaturesExtractor):
    """Default encoder of a Box or Dict observation: convolutions for images, normalised vectors for all the rest.

    Vectors are normalised with statistics that :meth:`set_statistics` stores (the identity until then) and limited to
    +-10 standard deviations.

    :param observation_space: Box or Dict; images are uint8, channels first
    :param features_dim: C, the size of the context
    :param observation_keys: keys of a Dict to use, in this order; None: all. Leaving an image out gives a blind
        control.
    :param vector_dim: embedding size of each vector
    :param channels: channels of the two convolution stages
    :param keypoints: number of spatial-softmax keypoints per image
    :param map_channels: channels of the flattened map per image
    :raises ValueError: an unknown key (the message lists the valid ones), or an image smaller than 32 pixels
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        features_dim: int = 256,
        observation_keys: Sequence[str] | None = None,
        vector_dim: int = 128,
        channels: tuple[int, int] = (48, 64),
        keypoints: int = 32,
        map_channels: int = 12,
    ) -> None:
        super().__init__(observation_space, features_dim)
        self.is_dict = isinstance(observation_space, spaces.Dict)
        entries = (
            dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {"box": observation_space}
        )
        if observation_keys is not None:
            if not self.is_dict:
                raise ValueError("observation_keys needs a Dict observation space; this one has no keys")
            unknown = [key for key in observation_keys if key not in entries]
            if unknown or not observation_keys:
                raise ValueError(f"unknown or no observation_keys {unknown}; choose from {', '.join(entries)}")
            entries = {key: entries[key] for key in observation_keys}
        self.image_keys = [key for key, space in entries.items() if is_image_space(space)]
        self.vector_keys = [key for key in entries if key not in self.image_keys]

        self.vectors = nn.ModuleDict()
        for key in self.vector_keys:
            dim = get_flattened_obs_dim(entries[key])
            self.register_buffer(f"mean_{key}", torch.zeros(dim))
            self.register_buffer(f"std_{key}", torch.ones(dim))
            self.vectors[key] = nn.Sequential(nn.Linear(dim, vector_dim), nn.LayerNorm(vector_dim), nn.SiLU())
        condition_dim = max(1, vector_dim * len(self.vector_keys))
        self.images = nn.ModuleDict()
        for key in self.image_keys:
            shape = entries[key].shape
            if shape is None or min(shape[1:]) < 32:
                raise ValueError(f"image {key!r} must be channels first and at least 32x32 pixels, got {shape}")
            trunk = _ImageTrunk(shape, condition_dim, channels, keypoints, map_channels)
            self.images[key] = trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        total = vector_dim * len(self.vector_keys) + sum(trunk.output_dim for trunk in self.images.values())  # type: ignore[misc]
        self.fuse = nn.Sequential(
            nn.Linear(total, features_dim), nn.LayerNorm(features_dim), nn.SiLU(), nn.Linear(features_dim, features_dim)
        )

    def set_statistics(self, key: str, mean: Tensor, std: Tensor) -> None:
        """Store the mean and standard deviation of a vector entry of the training data.

        :param key: of the Dict, or "box" for a plain Box
        :param mean: (D,)
        :param std: (D,), not negative; a floor of a thousandth of the entry's root mean square keeps constants harmless
        """
        floor = 1e-3 * (mean.square() + std.square()).mean().sqrt() + 1e-6
        self.get_buffer(f"mean_{key}").copy_(mean)
        self.get_buffer(f"std_{key}").copy_(std.clamp(min=float(floor)))

    def forward(self, observations: Tensor | dict[str, Tensor]) -> Tensor:
        entries = observations if isinstance(observations, dict) else {"box": observations}
        vectors = []
        for key in self.vector_keys:
            normalised = (entries[key].flatten(1) - self.get_buffer(f"mean_{key}")) / self.get_buffer(f"std_{key}")
            vectors.append(self.vectors[key](normalised.clamp(-10, 10)))
        batch = len(next(iter(entries.values())))
        some = next(self.parameters())
        condition = torch.cat(vectors, dim=1) if vectors else some.new_zeros(batch, 1)
        features = [*vectors, *(self.images[key](entries[key], condition) for key in self.image_keys)]
        context: Tensor = self.fuse(torch.cat(features, dim=1))
        return context
