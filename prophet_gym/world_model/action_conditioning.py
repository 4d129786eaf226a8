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
    palm, across both. The canvas has half the video's resolution, which soft lines do not feel.

    Args:
        proprio: float32 (B, F, 8): position (m, world), axis-angle (rad), finger positions (m).
        projection: float32 (B, 3, 4), intrinsics times world-to-camera extrinsics, in pixels of the video; zeros where
            the camera is not known.
        image_size: side S of the video, pixels, even.

    Returns:
        float32 (B, F, 3, S / 2, S / 2) in [0, 1]; black where the camera is not known.
    """
    position, axis_angle, fingers = proprio.split([3, 3, 2], dim=-1)
    zero = torch.zeros_like(axis_angle[..., 0])
    x, y, z = axis_angle.unbind(-1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    along_palm, across_fingers, approach = torch.linalg.matrix_exp(skew).unbind(-1)
    tips = across_fingers[..., None, :] * fingers[..., :, None]  # (B, F, 2, 3)
    begin = torch.stack([position, position + tips[..., 0, :], position - 0.03 * along_palm], dim=-2)
    end = torch.stack(
        [position - GRIPPER_AXIS_LENGTH * approach, position + tips[..., 1, :], position + 0.03 * along_palm], dim=-2
    )
    begin, end = _project(begin, projection), _project(end, projection)  # (B, F, 3 lines, 2), pixels

    # Distance of every pixel centre from each line segment; rows (B, F, 3, H, 1) and columns (B, F, 3, 1, W) apart.
    centres = torch.arange(1, image_size, 2, device=proprio.device, dtype=proprio.dtype)
    from_begin_x = centres - begin[..., 0, None, None]
    from_begin_y = centres[:, None] - begin[..., 1, None, None]
    along_x, along_y = (end - begin)[..., None, None].unbind(-3)
    length = (along_x.square() + along_y.square()).clamp(min=1e-6)
    share = ((from_begin_x * along_x + from_begin_y * along_y) / length).clamp(0, 1)
    distance = (from_begin_x - share * along_x).square() + (from_begin_y - share * along_y).square()
    known = projection.any(dim=2).any(dim=1)[:, None, None, None, None]
    return torch.exp(-distance / (2 * LINE_WIDTH**2)) * known


def _project(points: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Pixel coordinates (B, F, L, 2) of world points (B, F, L, 3) seen by cameras (B, 3, 4)."""
    homogeneous = torch.einsum("bij,bflj->bfli", projection[:, :, :3], points) + projection[:, None, None, :, 3]
    return homogeneous[..., :2] / homogeneous[..., 2:].clamp(min=1e-3)
