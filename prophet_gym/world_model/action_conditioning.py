"""The two action streams: scalars, embedded per frame, and action frames, the end-effector drawn through the camera;
and what else the camera is good for: what a hand carries, and what is near it.

A robot has K arms, whose proprioception (8 numbers each), actions (7) and holds (7) stand one after the other, and a
camera matrix for each arm: zeros where the camera is not known, or where the robot has no such arm.
"""

import torch
from torch import nn
from torch.nn import functional as F

from prophet_gym.data.camera import project_points
from prophet_gym.data.episode import GRIPPERS, PROPRIO_DIM, all_arms, finger_openings, per_arm

GRIPPER_AXIS_LENGTH = 0.08
"""Length of the drawn approach axis, metres."""
LINE_WIDTH = 1.5
"""Standard deviation of a drawn line's profile, pixels."""
HOLD_DIM = 7
"""Numbers in a hold, see `init_hold`, for each arm."""
OPEN_WIDTH = 0.075
"""Distance of the finger tips, metres, from which the fingers are open: nothing that fits between them is as wide."""


class FrameActionEmbedding(nn.Module):
    """Embed, for every new frame, the actions that lead to it and the proprioception before and after them.

    The result is added to the timestep embedding and to the AdaLN vector (paper, action conditioning), so that action k
    acts on frame k. Both output layers start at zero: an untrained embedding leaves the transformer as it was.

    Args:
        condition_dim: D_c, size of one frame's condition, see `frame_condition`.
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
    """Draw the poses of all end-effectors as soft lines on a black canvas, seen through the camera (paper, action
    frames).

    Red is the approach axis, from the grip site towards the wrist; green joins the two finger tips; blue lies along the
    palm, across both. The canvas has half the video's resolution, which soft lines do not feel.

    Args:
        proprio: float32 (B, F, 8 K): position (m, world), axis-angle (rad), finger positions (m) of each arm.
        projection: float32 (B, K, 3, 4), intrinsics times world-to-camera extrinsics, in pixels of the video; zeros
            where the camera is not known, or the robot has no such arm.
        image_size: side S of the video, pixels, even.

    Returns:
        float32 (B, F, 3, S / 2, S / 2) in [0, 1]; black where the camera is not known.
    """
    num_arms = projection.shape[1]
    proprio, projection = per_arm(proprio, num_arms), projection.flatten(0, 1)
    position, axis_angle, fingers = proprio.split([3, 3, 2], dim=-1)
    zero = torch.zeros_like(axis_angle[..., 0])
    x, y, z = axis_angle.unbind(-1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    along_palm, across_fingers, approach = torch.linalg.matrix_exp(skew).unbind(-1)
    tips = across_fingers[..., None, :] * fingers[..., :, None]  # (B K, F, 2, 3)
    begin = torch.stack([position, position + tips[..., 0, :], position - 0.03 * along_palm], dim=-2)
    end = torch.stack(
        [position - GRIPPER_AXIS_LENGTH * approach, position + tips[..., 1, :], position + 0.03 * along_palm], dim=-2
    )
    begin, end = (project_points(points, projection)[0] for points in (begin, end))  # (B K, F, 3 lines, 2), pixels

    # Distance of every pixel centre from each line segment; rows (B K, F, 3, H, 1), columns (B K, F, 3, 1, W) apart.
    centres = torch.arange(1, image_size, 2, device=proprio.device, dtype=proprio.dtype)
    from_begin_x = centres - begin[..., 0, None, None]
    from_begin_y = centres[:, None] - begin[..., 1, None, None]
    along_x, along_y = (end - begin)[..., None, None].unbind(-3)
    length = (along_x.square() + along_y.square()).clamp(min=1e-6)
    share = ((from_begin_x * along_x + from_begin_y * along_y) / length).clamp(0, 1)
    distance = (from_begin_x - share * along_x).square() + (from_begin_y - share * along_y).square()
    known = projection.any(dim=2).any(dim=1)[:, None, None, None, None]
    drawn = torch.exp(-distance / (2 * LINE_WIDTH**2)) * known
    return drawn.unflatten(0, (-1, num_arms)).amax(dim=1)


def init_hold(proprio: torch.Tensor) -> torch.Tensor:
    """The holds of hands that have taken nothing yet.

    A hold says what a hand has taken where, and where it has brought it: the end-effector's position (m, world) when
    the fingers last began to close after having been open, its position now, or when they opened again, and whether
    the fingers are ready to take something else.

    Args:
        proprio: float32 (B, 8 K), see `draw_action_frames`.

    Returns:
        float32 (B, 7 K).
    """
    num_arms = proprio.shape[1] // PROPRIO_DIM
    position = per_arm(proprio, num_arms)[:, :3]
    return all_arms(torch.cat([position, position, torch.ones_like(position[:, :1])], dim=1), num_arms)


def update_hold(hold: torch.Tensor, proprio: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """The holds (B, 7 K) one frame later.

    Args:
        hold: float32 (B, 7 K), see `init_hold`.
        proprio: float32 (B, 8 K), after the frame.
        actions: float (B, frame_stride, 7 K), of the frame; an arm's last number closes its gripper if positive.
    """
    num_arms = proprio.shape[1] // PROPRIO_DIM
    taken, brought, ready = per_arm(hold, num_arms).split([3, 3, 1], dim=1)
    position, opening = per_arm(proprio, num_arms)[:, :3], per_arm(finger_openings(proprio), num_arms)
    closing = per_arm(actions[:, -1, GRIPPERS], num_arms) > 0
    taken = torch.where(closing & (ready > 0), position, taken)
    brought = torch.where(closing, position, brought)
    ready = torch.where(closing, 0.0, torch.where(opening > OPEN_WIDTH, 1.0, ready))
    return all_arms(torch.cat([taken, brought, ready], dim=1), num_arms)


def image_motion(before: torch.Tensor, after: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """How the image of what is at `before` changes when it is moved to `after`: it shifts, and grows as it comes near.

    Args:
        before, after: float32 (B, F, 3), m, world. projection: float32 (B, 3, 4).

    Returns:
        float32 (B, F, 3): what is seen at pixel p (column, row) was at `scale * p + offset`, as (offset, scale); no
        motion, (0, 0, 1), where the camera is not known.
    """
    before, depth = project_points(before[:, :, None], projection)
    after, depth_after = project_points(after[:, :, None], projection)
    scale = (depth_after / depth).clamp(0.5, 2.0)
    motion = torch.cat([before - scale * after, scale], dim=-1)[:, :, 0]
    known = projection.any(dim=2).any(dim=1)[:, None, None]
    return torch.where(known, motion, motion.new_tensor([0.0, 0.0, 1.0]))


def carried_motion(
    present: torch.Tensor, poses: torch.Tensor, holds: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """How the two carried frames of each arm move: the latest one with the hand, the first one with what it holds or
    held last.

    Args:
        present: float32 (B, 1, 8 K), the proprioception now. poses: (B, F, 8 K), at each frame to come.
        holds: float32 (B, F, 7 K), see `init_hold`, at each frame to come. projection: float32 (B, K, 3, 4).

    Returns:
        float32 (B, F, 2 K, 3), see `image_motion`: of the latest frame and the first one, arm by arm.
    """
    num_arms = projection.shape[1]
    before, after = (per_arm(values, num_arms)[..., :3] for values in (present, poses))
    taken, brought = per_arm(holds, num_arms)[..., :6].split(3, dim=-1)
    projection = projection.flatten(0, 1)
    hand = image_motion(before.expand_as(after), after, projection)
    motion = torch.stack([hand, image_motion(taken, brought, projection)], dim=2)  # (B K, F, 2, 3)
    return motion.unflatten(0, (-1, num_arms)).movedim(1, 2).flatten(2, 3)


def carry(images: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Move images as a hand moves what it holds.

    What an object in the hand will look like, if nothing turns it; an image's edge is repeated where nothing comes in.

    Args:
        images: float (B, M, C, h, w).
        motion: float32 (B, F, M K, 3), of every image with every arm until each frame, see `image_motion`, in the
            images' own pixels.

    Returns:
        float (B, F, M K, C, h, w).
    """
    batch, frames, count = motion.shape[:3]
    images = images[:, None].expand(-1, count // images.shape[1], -1, -1, -1, -1).flatten(1, 2)
    height, width = images.shape[-2:]
    columns = torch.arange(width, device=images.device) + 0.5
    rows = torch.arange(height, device=images.device) + 0.5
    offset_x, offset_y, scale = motion.flatten(0, 2)[:, :, None, None].unbind(1)
    x = (2 / width * (scale * columns + offset_x) - 1).expand(-1, height, -1)
    y = (2 / height * (scale * rows[:, None] + offset_y) - 1).expand(-1, -1, width)
    repeated = images[:, None].expand(-1, frames, -1, -1, -1, -1).flatten(0, 2)
    # In float32: a grid in lower precision would blur, a little more with every chunk.
    moved = F.grid_sample(repeated.float(), torch.stack([x, y], dim=-1), padding_mode="border", align_corners=False)
    return moved.to(images.dtype).unflatten(0, (batch, frames, count))


def look_around(images: torch.Tensor, proprio: torch.Tensor, projection: torch.Tensor, size: int) -> torch.Tensor:
    """Crop images (B, 3, H, W) around where each end-effector is seen: (B, 3 K, size, size).

    Args:
        proprio: float32 (B, 8 K). projection: float32 (B, K, 3, 4); the crops are grey where it is zeros.
    """
    height, width = images.shape[-2:]
    num_arms = projection.shape[1]
    known = projection.flatten(2).any(dim=2)[:, None, :, None, None]  # (B, 1, K, 1, 1)
    position = per_arm(proprio, num_arms)[:, None, None, :3]
    centre = project_points(position, projection.flatten(0, 1))[0][:, 0, 0]  # (B K, 2)
    offsets = torch.arange(size, device=images.device) - (size - 1) / 2
    columns = (centre[:, :1] + offsets)[:, None].expand(-1, size, -1)
    rows = (centre[:, 1:] + offsets)[:, :, None].expand(-1, -1, size)
    source = torch.stack([columns, rows], dim=-1)  # (B K, size, size, 2)
    grid = 2 * source / torch.tensor([width, height], device=images.device) - 1
    grid = grid.unflatten(0, (-1, num_arms)).flatten(1, 2)  # one picture of all crops, one below the other
    crops = F.grid_sample(images, grid.to(images.dtype), align_corners=False).unflatten(2, (num_arms, size))
    return (crops * known).movedim(2, 1).flatten(1, 2)
