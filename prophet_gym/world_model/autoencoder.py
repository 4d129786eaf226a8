"""Frames <-> latents: a per-frame convolutional autoencoder, small enough to decode hundreds of frames a second on a
CPU.

Every frame is coded by itself, so that a latent frame belongs to exactly one video frame and to the actions between
it and its predecessor. The full-scale path uses a causal video autoencoder with the same two methods.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, with group normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(8, channels), channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv_in(F.silu(self.norm(hidden_states)))
        return hidden_states + self.conv_out(F.silu(residual))


class ProphetAutoencoder(ModelMixin, ConfigMixin):
    r"""
    Per-frame autoencoder with 8x spatial compression.

    The first factor of two is a pixel-unshuffle, which costs nothing; the others are strided convolutions. The
    latents are standardised per channel with the buffers `latent_mean` and `latent_std`, which training fills in, so
    that the transformer works on zero mean and unit variance.

    Args:
        latent_channels (`int`, defaults to `16`): channels C of a latent frame.
        block_channels (`tuple[int, int, int]`, defaults to `(24, 48, 128)`): widths at 1/2, 1/4 and 1/8 resolution.
        encoder_blocks (`tuple[int, int, int]`, defaults to `(0, 1, 1)`): residual blocks at each resolution, encoder.
        decoder_blocks (`tuple[int, int, int]`, defaults to `(0, 2, 2)`): the same for the decoder.
    """

    spatial_compression = 8

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_channels: tuple[int, int, int] = (24, 48, 128),
        encoder_blocks: tuple[int, int, int] = (0, 1, 1),
        decoder_blocks: tuple[int, int, int] = (0, 2, 2),
    ) -> None:
        super().__init__()
        half, quarter, eighth = block_channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, half, 3, padding=1),
            *(ResidualBlock(half) for _ in range(encoder_blocks[0])),
            nn.Conv2d(half, quarter, 4, stride=2, padding=1),
            *(ResidualBlock(quarter) for _ in range(encoder_blocks[1])),
            nn.Conv2d(quarter, eighth, 4, stride=2, padding=1),
            *(ResidualBlock(eighth) for _ in range(encoder_blocks[2])),
            nn.SiLU(),
            nn.Conv2d(eighth, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, eighth, 3, padding=1),
            *(ResidualBlock(eighth) for _ in range(decoder_blocks[2])),
            nn.Conv2d(eighth, 4 * quarter, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(quarter) for _ in range(decoder_blocks[1])),
            nn.Conv2d(quarter, 4 * half, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(half) for _ in range(decoder_blocks[0])),
            nn.SiLU(),
            nn.Conv2d(half, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode frames.

        Args:
            pixels: float (N, 3, H, W) in [-1, 1]; H and W are multiples of 8.

        Returns:
            Standardised latents, float (N, C, H / 8, W / 8).

        Raises:
            ValueError: the shape is not (N, 3, H, W) with H and W multiples of 8.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % 8 or pixels.shape[3] % 8:
            raise ValueError(
                f"Expected pixels of shape (N, 3, H, W) with H and W multiples of 8, got {tuple(pixels.shape)}. "
                "Resize the frames first (the environments do it on reset)."
            )
        latents = self.encoder(pixels)
        return (latents - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode standardised latents (N, C, h, w) to pixels, float (N, 3, 8 h, 8 w), nominally in [-1, 1]."""
        return self.decoder(latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Reconstruct pixels (N, 3, H, W) -> (N, 3, H, W)."""
        return self.decode(self.encode(pixels))
