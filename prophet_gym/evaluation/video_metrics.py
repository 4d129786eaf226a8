"""How close an imagined video is to the real one, pixel by pixel.

Videos are (..., T, H, W, 3), uint8 or floating point in [0, 1]; leading dimensions are batches. Every function returns
one number per frame, so that the caller decides over what to average: open-loop error grows with time.
"""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Video: TypeAlias = NDArray[np.uint8] | NDArray[np.floating] | Tensor

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MOVING_THRESHOLD = 0.05


def psnr(imagined: Video, real: Video) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, peak 1; infinite for equal frames.

    :param imagined: (..., T, H, W, 3).
    :param real: same shape.
    :return: float64 (..., T).
    :raises TypeError: a video is neither uint8 nor floating point.
    :raises ValueError: the shapes differ or values leave [0, 1].
    """
    x, y = _as_pair(imagined, real)
    return _to_db((x - y).square().mean((-3, -2, -1)))


def moving_psnr(imagined: Video, real: Video, threshold: float = MOVING_THRESHOLD) -> Tensor:
    """PSNR over the pixels that move, as :func:`moving_mask` finds them in the real video.

    :param imagined: (..., T, H, W, 3), beginning with the frame both videos start from.
    :param real: same shape.
    :param threshold: see :func:`moving_mask`.
    :return: float64 (..., T) in dB; NaN where no pixel moves, as always in the first frame.
    :raises TypeError: a video is neither uint8 nor floating point.
    :raises ValueError: the shapes differ or values leave [0, 1].
    """
    x, y = _as_pair(imagined, real)
    mask = moving_mask(y, threshold)
    error = (x - y).square().mean(-1)  # (..., T, H, W)
    # 0 / 0 is the NaN of a frame where nothing moves.
    return _to_db((error * mask).sum((-2, -1)) / mask.sum((-2, -1)))


def moving_mask(real: Video, threshold: float = MOVING_THRESHOLD) -> Tensor:
    """Pixels of each frame that the motion has touched.

    A pixel counts when any of its channels differs by more than ``threshold`` from the video's first frame (something
    has come, or has left a hole) or from the previous frame (something moves now).

    :param real: (..., T, H, W, 3).
    :param threshold: in units of the full range, in [0, 1); 0.05 is 13 of 255 levels.
    :return: bool (..., T, H, W); all False in the first frame.
    :raises ValueError: the threshold or a value is out of range.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}.")
    video = _as_float(real, "real")
    first, previous = video[..., :1, :, :, :], torch.cat([video[..., :1, :, :, :], video[..., :-1, :, :, :]], dim=-4)
    from_first = (video - first).abs().amax(-1) > threshold
    from_previous = (video - previous).abs().amax(-1) > threshold
    return from_first | from_previous


def ssim(imagined: Video, real: Video) -> Tensor:
    """Structural similarity of each frame (Wang et al. 2004): 11 x 11 Gaussian of sigma 1.5, range 1, K = 0.01, 0.03.

    Windows lie wholly inside the image; the mean is over windows and the three channels. Equals scikit-image's
    ``structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)``.

    :param imagined: (..., T, H, W, 3), H and W at least 11.
    :param real: same shape.
    :return: float64 (..., T) in [-1, 1].
    :raises TypeError: a video is neither uint8 nor floating point.
    :raises ValueError: the shapes differ, are too small, or values leave [0, 1].
    """
    x, y = _as_pair(imagined, real)
    return _ssim(x, y)


def temporal_ssim(imagined: Video, real: Video) -> Tensor:
    """tSSIM: :func:`ssim` of the signed differences of consecutive frames, which judges motion rather than content.

    A difference d lies in [-1, 1]. It is mapped to [0, 1] by (d + 1) / 2 and compared with range 1, which is the same
    as comparing d with range 2, except that no motion has luminance 1/2 instead of 0. (The paper does not state its
    mapping.)

    :param imagined: (..., T, H, W, 3) with T >= 2; begin with the start frame to judge the first motion too.
    :param real: same shape.
    :return: float64 (..., T - 1) in [-1, 1]; entry t is about the step from frame t to frame t + 1.
    :raises TypeError: a video is neither uint8 nor floating point.
    :raises ValueError: the shapes differ, are too small, or values leave [0, 1].
    """
    x, y = _as_pair(imagined, real)
    if x.shape[-4] < 2:
        raise ValueError("temporal_ssim needs at least 2 frames, got 1: begin with the start frame.")
    return _ssim((x.diff(dim=-4) + 1) / 2, (y.diff(dim=-4) + 1) / 2)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of float64 videos (..., T, H, W, 3) in [0, 1] -> (..., T)."""
    *batch, height, width, channels = x.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {height} x {width}.")
    distance = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    kernel = torch.exp(-distance.square() / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()

    def band(size: int) -> Tensor:
        """The blur along one axis as a matrix (size, size - 10): in float64 a product is faster than a convolution."""
        padded = functional.pad(kernel, (0, size - SSIM_WINDOW + 1)).repeat(size - SSIM_WINDOW + 1)
        return padded[: size * (size - SSIM_WINDOW + 1)].view(-1, size).T

    rows, columns = band(height).T, band(width)

    def blur(image: Tensor) -> Tensor:
        return rows @ image @ columns

    x, y = (v.movedim(-1, -3).reshape(-1, height, width) for v in (x, y))  # (N * 3, H, W)
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x * mean_x
    var_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    )
    return similarity.reshape(*batch, channels, -1).mean((-2, -1))


def _to_db(mean_squared_error: Tensor) -> Tensor:
    return -10 * torch.log10(mean_squared_error)


def _as_pair(imagined: Video, real: Video) -> tuple[Tensor, Tensor]:
    x, y = _as_float(imagined, "imagined"), _as_float(real, "real")
    if x.shape != y.shape:
        raise ValueError(f"Both videos must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    return x, y


def _as_float(video: Video, name: str) -> Tensor:
    # torch takes no negative strides, which a flipped video has.
    tensor = video if isinstance(video, Tensor) else torch.as_tensor(np.ascontiguousarray(video))
    if tensor.ndim < 4 or tensor.shape[-1] != 3 or tensor.numel() == 0:
        raise ValueError(f"The {name} video must have shape (..., T, H, W, 3), got {tuple(tensor.shape)}.")
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float64) / 255
    if not tensor.is_floating_point():
        raise TypeError(f"The {name} video must be uint8 or floating point in [0, 1], got {tensor.dtype}.")
    if not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(f"The {name} video is floating point and leaves [0, 1]: divide by 255 or clamp it.")
    return tensor.to(torch.float64)
