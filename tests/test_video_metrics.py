"""Image and motion metrics against known values, reference implementations and their defining properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from prophet_gym.evaluation.flow_metrics import end_point_error, flow_cosine, optical_flow
from prophet_gym.evaluation.video_metrics import moving_mask, moving_psnr, psnr, ssim, temporal_ssim


def smooth_video(seed: int, *shape: int) -> NDArray[np.uint8]:
    """A smooth random video uint8 (*shape, 3), the last three of shape being T, H, W."""
    noise = np.random.default_rng(seed).random((*shape, 3))
    blurred = gaussian_filter(noise, [0] * (len(shape) - 2) + [2, 2, 0])
    low, high = blurred.min(), blurred.max()
    return ((blurred - low) / (high - low) * 255).astype(np.uint8)


def noisy(video: NDArray[np.uint8], sigma: float) -> NDArray[np.float64]:
    noise = np.random.default_rng(0).uniform(-1, 1, video.shape)
    return np.clip(video / 255 * 0.5 + 0.25 + sigma * noise, 0, 1)


def test_psnr_of_a_constant_error() -> None:
    real = np.full((2, 3, 16, 16, 3), 0.5)
    assert psnr(real + 0.1, real).shape == (2, 3)
    np.testing.assert_allclose(psnr(real + 0.1, real), 20.0)
    np.testing.assert_allclose(psnr(np.full((1, 8, 8, 3), 255, np.uint8), np.zeros((1, 8, 8, 3), np.uint8)), 0.0)


def test_agrees_with_scikit_image() -> None:
    real, imagined = smooth_video(0, 3, 24, 20), smooth_video(1, 3, 24, 20)
    for t in range(3):
        a, b = real[t] / 255, imagined[t] / 255
        expected = structural_similarity(
            a, b, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        np.testing.assert_allclose(ssim(imagined, real)[t], expected, rtol=1e-9)
        np.testing.assert_allclose(psnr(imagined, real)[t], peak_signal_noise_ratio(a, b, data_range=1), rtol=1e-9)
    steps = [(np.diff(v / 255, axis=0) + 1) / 2 for v in (imagined, real)]
    np.testing.assert_allclose(temporal_ssim(imagined, real), ssim(*steps))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), batch=st.sampled_from([(), (2,), (2, 2)]))
def test_identity_and_symmetry(seed: int, batch: tuple[int, ...]) -> None:
    real, other = smooth_video(seed, *batch, 3, 13, 16), smooth_video(seed + 1, *batch, 3, 13, 16)
    assert torch.isinf(psnr(real, real)).all()
    assert (ssim(real, real) == 1).all() and (temporal_ssim(real, real) == 1).all()
    for metric, frames in ((psnr, 3), (ssim, 3), (temporal_ssim, 2)):
        assert metric(other, real).shape == (*batch, frames)
        torch.testing.assert_close(metric(other, real), metric(real, other))
    assert (ssim(other, real).abs() <= 1).all()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), sigma=st.floats(0.02, 0.1), factor=st.floats(1.5, 2.4))
def test_more_noise_scores_lower(seed: int, sigma: float, factor: float) -> None:
    video = smooth_video(seed, 2, 24, 24)
    clean, less, more = noisy(video, 0), noisy(video, sigma), noisy(video, sigma * factor)
    for metric in (psnr, ssim, temporal_ssim):
        assert (metric(more, clean) < metric(less, clean)).all()


def test_tssim_judges_motion_not_content() -> None:
    real = smooth_video(0, 3, 24, 24) / 255 * 0.5
    brighter = real + 0.4
    np.testing.assert_allclose(temporal_ssim(brighter, real), 1.0)
    assert (ssim(brighter, real) < 0.9).all()
    frozen = np.repeat(real[:1], 3, axis=0)
    assert (temporal_ssim(frozen, real) < 0.9).all()


def test_moving_mask_follows_a_square() -> None:
    video = np.zeros((3, 16, 16, 3), np.uint8)
    for t in range(3):
        video[t, 4:8, 2 + 4 * t : 6 + 4 * t, 1] = 200
    mask = moving_mask(video).numpy()
    assert not mask[0].any()
    expected = np.zeros((3, 16, 16), bool)
    expected[1, 4:8, 2:10] = True  # where the square was and where it is
    expected[2, 4:8, 2:14] = True  # and what it has crossed since the start
    np.testing.assert_array_equal(mask, expected)
    assert not moving_mask(video // 20).any(), "10 of 255 levels are below the threshold"


def test_moving_psnr_ignores_the_background() -> None:
    real = np.full((2, 16, 16, 3), 0.5)
    real[1, :4, :4] = 0.9
    imagined = real.copy()
    imagined[:, 8:] = 0.0
    imagined[1, :4, :4] = 0.8
    score = moving_psnr(imagined, real)
    assert torch.isnan(score[0])
    np.testing.assert_allclose(score[1], 20.0)
    assert psnr(imagined, real)[1] < 10


@pytest.mark.parametrize("metric", [psnr, ssim, temporal_ssim, moving_psnr])
def test_metrics_refuse_what_they_cannot_compare(metric: object) -> None:
    assert callable(metric)
    video = smooth_video(0, 2, 16, 16)
    with pytest.raises(ValueError, match="same shape"):
        metric(video, video[:, :12])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric(video.astype(np.float32), video)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric(np.full(video.shape, np.nan), video)
    with pytest.raises(TypeError, match="uint8 or floating"):
        metric(video.astype(np.int64), video)
    with pytest.raises(ValueError, match="T, H, W, 3"):
        metric(video[0], video[0])


def test_ssim_refuses_small_frames_and_tssim_one_frame() -> None:
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(smooth_video(0, 2, 10, 16), smooth_video(1, 2, 10, 16))
    with pytest.raises(ValueError, match="at least 2 frames"):
        temporal_ssim(smooth_video(0, 1, 16, 16), smooth_video(1, 1, 16, 16))
    with pytest.raises(ValueError, match="threshold"):
        moving_mask(smooth_video(0, 2, 16, 16), threshold=1.0)


def shifted(step_x: int, step_y: int) -> NDArray[np.uint8]:
    """A textured video (3, 64, 64, 3) that moves by whole pixels a frame."""
    texture = smooth_video(3, 1, 64, 64)[0]
    return np.stack([np.roll(texture, (step_y * t, step_x * t), axis=(0, 1)) for t in range(3)])


@pytest.mark.parametrize("step", [(2, 0), (0, 2), (-1, 2)])
def test_flow_measures_a_shift(step: tuple[int, int]) -> None:
    flow = optical_flow(shifted(*step))
    assert flow.shape == (2, 64, 64, 2) and flow.dtype == np.float32
    np.testing.assert_allclose(np.median(flow, axis=(0, 1, 2)), step, atol=0.1)


def test_flow_metrics_of_known_flows() -> None:
    right = np.zeros((2, 8, 8, 2), np.float32)
    right[..., 0] = 3
    up = np.zeros_like(right)
    up[..., 1] = -4
    still = np.zeros_like(right)
    np.testing.assert_allclose(end_point_error(right, up), [5, 5])
    np.testing.assert_allclose(flow_cosine(right, up), [0, 0], atol=1e-12)
    np.testing.assert_allclose(flow_cosine(right, right * 0.5), [1, 1])
    np.testing.assert_allclose(flow_cosine(right, -right), [-1, -1])
    assert np.isnan(flow_cosine(right, still)).all(), "no pixel moves in both"
    half = right.copy()
    half[:, :, :4] = 5e-4  # too slow to have a direction
    half[:, :, 4:] = up[:, :, 4:]
    np.testing.assert_allclose(flow_cosine(half, right), [0, 0], atol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 10))
def test_flow_metric_properties(seed: int, scale: float) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, 3, 8, 8, 2)).astype(np.float32)
    np.testing.assert_array_equal(end_point_error(x, x), 0)
    np.testing.assert_allclose(flow_cosine(x, x), 1)
    np.testing.assert_allclose(end_point_error(x, y), end_point_error(y, x))
    np.testing.assert_allclose(flow_cosine(x, y), flow_cosine(y, x))
    assert (np.abs(flow_cosine(x, y)) <= 1).all() and (end_point_error(x, y) >= 0).all()
    np.testing.assert_allclose(end_point_error(x * scale, y * scale), scale * end_point_error(x, y), rtol=1e-4)


def test_flow_of_the_opposite_motion() -> None:
    right, left = optical_flow(shifted(2, 0)), optical_flow(shifted(-2, 0))
    assert (flow_cosine(right, right) > 0.999).all() and (flow_cosine(left, right) < -0.9).all()
    assert (end_point_error(left, right) > 3).all()


def test_flow_refuses_wrong_videos() -> None:
    video = smooth_video(0, 3, 16, 16)
    with pytest.raises(TypeError, match="uint8"):
        optical_flow(video / 255)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="T >= 2"):
        optical_flow(video[:1])
    with pytest.raises(ValueError, match="same shape"):
        end_point_error(np.zeros((2, 8, 8, 2), np.float32), np.zeros((1, 8, 8, 2), np.float32))
