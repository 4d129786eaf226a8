"""The two action streams: scalars, embedded per frame, and action frames, the end-effector drawn through the camera."""

import torch
from torch import nn

GRIPPER_AXIS_LENGTH = 0.08
"""Length of the drawn approach axis, metres."""
LINE_WIDTH = 1.5
"""Standard deviation of a drawn line's profile, pixels."""


class FrameActionEmbedding(nn.Module):
    """Embed, for every new frame, the actions that lead to it and the proprioception before and after them.

    The result is added to the timestep embedding and to the AdaLN vector (paper, action conditioning), so that action k
    acts on frame k. Both output layers start at zero: an untrained embedding leaves the transformer as it was.

    Args:
        condition_dim: D_c, size of one frame's condition: frame_stride * action_dim + 2 * proprio_dim.
        hidden_dim: D, width of the transformer.
    """

    def __init__(self, condition_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(condition_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()
        )
        self.to_timestep = nn.Linear(hidden_dim, hidden_dim)
        self.to_adaln = nn.Linear(hidden_dim, 3 * hidden_dim)
        for layer in (self.to_timestep, self.to_adaln):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map conditions (B, F, D_c) to timestep offsets (B, F, D) and AdaLN offsets (B, F, 3 D)."""
        hidden = self.trunk(condition)
        return self.to_timestep(hidden), self.to_adaln(hidden)


def draw_action_frames(proprio: torch.Tensor, projection: torch.Tensor, image_size: int) -> torch.Tensor:
    """Draw end-effector poses as soft lines on a black canvas, seen through the camera (paper, action frames).

    Red is the approach axis, from the grip site towards the wrist; green joins the two finger tips; blue lies along the
    palm, across both.

    Args:
        proprio: float32 (..., 8): position (m, world), axis-angle (rad), finger positions (m).
        projection: float32 (3, 4), intrinsics times world-to-camera extrinsics, in pixels of the canvas.
        image_size: side of the canvas, pixels.

    Returns:
        float32 (..., 3, image_size, image_size) in [0, 1].
    """
    position, axis_angle, fingers = proprio.split([3, 3, 2], dim=-1)
    zero = torch.zeros_like(axis_angle[..., 0])
    x, y, z = axis_angle.unbind(-1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    along_palm, across_fingers, approach = torch.linalg.matrix_exp(skew).unbind(-1)
    tips = across_fingers[..., None, :] * fingers[..., :, None]  # (..., 2, 3)
    begin = torch.stack([position, position + tips[..., 0, :], position - 0.03 * along_palm], dim=-2)
    end = torch.stack(
        [position - GRIPPER_AXIS_LENGTH * approach, position + tips[..., 1, :], position + 0.03 * along_palm], dim=-2
    )
    begin, end = _project(begin, projection), _project(end, projection)  # (..., 3 lines, 2), pixels

    centres = torch.arange(image_size, device=proprio.device) + 0.5
    pixels = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)  # (H, W, 2)
    offset = pixels - begin[..., None, None, :]  # (..., 3, H, W, 2)
    direction = (end - begin)[..., None, None, :]
    share = (offset * direction).sum(-1) / direction.square().sum(-1).clamp(min=1e-6)
    distance = (offset - share.clamp(0, 1)[..., None] * direction).square().sum(-1)
    return torch.exp(-distance / (2 * LINE_WIDTH**2))


def _project(points: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Pixel coordinates (..., 2) of world points (..., 3)."""
    homogeneous = points @ projection[:, :3].T + projection[:, 3]
    return homogeneous[..., :2] / homogeneous[..., 2:].clamp(min=1e-3)
