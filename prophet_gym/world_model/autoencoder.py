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


class _GroupNorm(nn.GroupNorm):
    """For a CPU and numbers of 16 bits, whose channels come last: torch's kernel takes many times as long where a group
    has few of them, longer than to put them first and back."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float32 or hidden_states.device.type != "cpu":
            return super().forward(hidden_states)
        return super().forward(hidden_states.contiguous()).contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, with group normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _GroupNorm(min(8, channels), channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv_in(F.silu(self.norm(hidden_states)))
        return hidden_states + self.conv_out(F.silu(residual))


class ProphetAutoencoder(ModelMixin, ConfigMixin):
    r"""
    Per-frame autoencoder with 8x spatial compression, whose decoder also sees the frame that the episode began with,
    frames as each hand carries them, and the drawn poses of the arms.

    Encoder: a frame by itself. Its first factor of two is a pixel-unshuffle, which costs nothing; the others are
    strided convolutions. The latents are standardised per channel with the buffers `latent_mean` and `latent_std`,
    which training fills in, so that the transformer works on zero mean and unit variance.

    Decoder: features of the reference frame, the carried frames and the action frame are added at every resolution,
    and the last layer mixes, pixel by pixel, the reference, the carried frames and new colour. Before a fixed camera
    most of the scene never moves, and what moves is in the hand: both are copied and keep their look however long a
    rollout lasts, the arm appears where it is drawn, and the latents say which of them to believe, and what none of
    them shows.

    Args:
        latent_channels (`int`, defaults to `16`): channels C of a latent frame.
        block_channels (`tuple[int, int, int]`, defaults to `(24, 48, 128)`): widths at 1/2, 1/4 and 1/8 resolution.
        encoder_blocks (`tuple[int, int, int]`, defaults to `(0, 1, 1)`): residual blocks at each resolution, encoder.
        decoder_blocks (`tuple[int, int, int]`, defaults to `(1, 2, 2)`): the same for the decoder.
        num_arms (`int`, defaults to `1`): K, hands that carry something.
    """

    spatial_compression = 8
    frozen = False  # its weights are for training

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_channels: tuple[int, int, int] = (24, 48, 128),
        encoder_blocks: tuple[int, int, int] = (0, 1, 1),
        decoder_blocks: tuple[int, int, int] = (1, 2, 2),
        num_arms: int = 1,
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
        # Coarse to fine in all lists. Action frames have half the video's resolution, as the unshuffled frames.
        self.condition = nn.ModuleList(
            [
                nn.Sequential(nn.SiLU(), nn.Conv2d(quarter, eighth, 4, stride=2, padding=1)),
                nn.Sequential(nn.SiLU(), nn.Conv2d(half, quarter, 4, stride=2, padding=1)),
                nn.Conv2d(12 + 2 * num_arms * 12 + 3, half, 3, padding=1),
            ]
        )
        self.upsample = nn.ModuleList(
            [
                nn.Conv2d(latent_channels, eighth, 3, padding=1),
                nn.Sequential(nn.Conv2d(eighth, 4 * quarter, 1), nn.PixelShuffle(2)),
                nn.Sequential(nn.Conv2d(quarter, 4 * half, 1), nn.PixelShuffle(2)),
            ]
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(channels) for _ in range(count)))
            for channels, count in zip((eighth, quarter, half), decoder_blocks[::-1], strict=True)
        )
        # New colour, and the choice between the reference, it, and the carried frames.
        mixed = 4 * (3 + 2 + 2 * num_arms)
        self.to_pixels = nn.Sequential(nn.SiLU(), nn.Conv2d(half, mixed, 3, padding=1), nn.PixelShuffle(2))
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

    def decode(
        self,
        latents: torch.Tensor,
        reference: torch.Tensor,
        carried: torch.Tensor | None = None,
        action_frames: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode the latents of some frames of each episode.

        Args:
            latents: standardised, float (B, F, C, h, w).
            reference: pixels of the frame that each episode began with, float (B, 3, 8 h, 8 w) in [-1, 1].
            carried: pixels of the latest frame and of the reference, moved as each hand moves what it holds until each
                frame, float (B, F, 2 K, 3, 8 h, 8 w), see `ChunkCondition`; None is the reference, not moved.
            action_frames: float (B, F, 3, 4 h, 4 w), see `draw_action_frames`; None is black, an unknown camera.

        Returns:
            Pixels, float (B, F, 3, 8 h, 8 w), nominally in [-1, 1].
        """
        batch, frames = latents.shape[:2]
        if carried is None:
            carried = reference[:, None, None].expand(-1, frames, 2 * self.config.num_arms, -1, -1, -1)
        known = F.pixel_unshuffle(reference, 2).repeat_interleave(frames, dim=0)
        moved = F.pixel_unshuffle(carried.flatten(2, 3).flatten(0, 1), 2)
        if action_frames is None:
            drawn = known.new_zeros(len(known), 3, *known.shape[-2:])
        else:
            drawn = action_frames.flatten(0, 1)
        features = [torch.cat([known, moved, drawn], dim=1)]
        for stage in reversed(self.condition):
            features.insert(0, stage(features[0]))
        latents = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        hidden_states = latents.flatten(0, 1)
        for upsample, feature, blocks in zip(self.upsample, features[:-1], self.decoder, strict=True):
            hidden_states = blocks(upsample(hidden_states) + feature)
        new, logits = self.to_pixels(hidden_states).unflatten(0, (batch, frames)).tensor_split([3], dim=2)
        copy, paint, *follow = logits.softmax(dim=2).unsqueeze(3).unbind(2)  # (B, F, 1, H, W) each
        followed = [share * image for share, image in zip(follow, carried.unbind(2), strict=True)]
        return copy * reference[:, None] + sum(followed[1:], followed[0]) + paint * new

    def forward(
        self,
        pixels: torch.Tensor,
        reference: torch.Tensor,
        carried: torch.Tensor | None = None,
        action_frames: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Reconstruct pixels (B, F, 3, H, W); the other arguments are those of `decode`."""
        latents = self.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return self.decode(latents, reference, carried, action_frames)
