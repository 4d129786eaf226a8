"""The success classifier: shapes, training on an easy rule, calibration, threshold."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional

from prophet_gym.data.clips import EpisodeArrays, concatenate, without_pictures
from prophet_gym.data.instructions import embed_instructions
from prophet_gym.data.lerobot_format import EpisodeRecord
from prophet_gym.reward.base import RememberingRewardModel, clip_places, thresholds
from prophet_gym.reward.success_classifier import SuccessClassifier
from prophet_gym.reward.training import (
    _fit_logistic,
    balance_threshold,
    calibrate,
    check_episodes,
    choose_threshold,
    episode_metrics,
    episode_peaks,
    frame_logits,
    train_success_classifier,
)

INSTRUCTION = "pick up the milk and place it in the basket"


def episodes(count: int, length: int = 7, seed: int = 0, told_by: str = "frames") -> EpisodeArrays:
    """Half of the episodes succeed. Their frames have a red square in the corner from then on, or the hand has gone up
    just before and is down again."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 60, (count, length, 96, 96, 3), dtype=np.uint8)
    success = np.zeros((count, length), bool)
    success[::2, length // 2 :] = True
    proprio = np.zeros((count, length, 8), np.float32)
    if told_by == "frames":
        frames[success, :32, :32] = (250, 20, 20)
    else:
        proprio[::2, length // 2 - 1, 2] = 0.1
    records = tuple(
        EpisodeRecord(
            episode_index=index,
            length=length,
            split="train",
            kind="clean",
            suite="libero_object",
            task=0,
            init_state=0,
            seed=0,
            success=bool(success[index, -1]),
            instruction=INSTRUCTION,
            robot="panda",
        )
        for index in range(count)
    )
    return EpisodeArrays(
        frames=torch.from_numpy(frames).flatten(0, 1),
        proprio=torch.from_numpy(proprio).flatten(0, 1),
        actions=torch.zeros(count * length, 4, 7),
        success=torch.from_numpy(success).flatten(),
        starts=torch.arange(count) * length,
        lengths=torch.full((count,), length),
        first_frames=torch.from_numpy(frames[:, 0]),
        records=records,
    )


FROM_ABOVE = [[100.0, 0.0, 0.0, 48.0], [0.0, 100.0, 0.0, 48.0], [0.0, 0.0, 0.0, 1.0]]
"""A camera that sees (x, y) at pixel 48 + 100 (x, y), however high."""


def test_the_motion_sees_what_was_there_when_the_episode_began() -> None:
    """And nothing elsewhere, and nothing where the camera is not known; each arm where it is itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = SuccessClassifier(channels=(4, 8, 8), hidden_dim=8, num_arms=2, cameras={"known": FROM_ABOVE}).eval()
    proprio = torch.zeros(3, 2, 16)
    proprio[:, 1, 0], proprio[:, 1, 9] = 0.3, -0.3  # seen at columns 48 and 78, and rows 48 and 18
    starts = torch.full((3, 96, 96, 3), 128, dtype=torch.uint8)
    starts[1, 44:52, 74:82] = 255
    starts[2, 14:22, 44:52] = 255
    projection = judge.projection(["known"] * 3)
    with torch.no_grad():
        features = judge.view.features(starts)
        gray, first, second = judge.view(features, proprio, projection).unflatten(2, (2, -1)).unbind()  # (T, K, D)
        blind = judge.view(features, proprio, judge.projection(["unknown"] * 3))
    changed = [
        [(one[time, arm] != gray[time, arm]).any().item() for arm in (0, 1)]
        for time in (0, 1)
        for one in (first, second)
    ]
    assert changed == [[False, False], [False, False], [True, False], [False, True]]
    assert not blind.any()


def test_the_height_of_a_hand_does_not_hide_what_is_below_it() -> None:
    """Through a camera from the side, a thing below the hand is seen elsewhere than the hand."""
    from_the_side = [[100.0, 0.0, 0.0, 48.0], [0.0, 0.0, -100.0, 48.0], [0.0, 0.0, 0.0, 1.0]]
    judge = SuccessClassifier.tiny_random()
    judge.register_to_config(cameras={"side": from_the_side})
    starts = torch.full((2, 96, 96, 3), 128, dtype=torch.uint8)
    starts[1, 66:70, 46:50] = 255  # 20 cm below
    with torch.no_grad():
        for height, seen in ((0.0, True), (0.6, False)):
            proprio = torch.zeros(2, 1, 8)
            proprio[..., 2] = height
            nothing, thing = judge.view(judge.view.features(starts), proprio, judge.projection(["side"] * 2))
            assert (nothing != thing).any().item() == seen


def test_a_judge_learns_where_a_thing_must_be_put(tmp_path: Path) -> None:
    """Success is the hand's being above what the start frame shows, wherever that is: neither tells it alone."""

    def placed(count: int, seed: int) -> EpisodeArrays:
        arrays, rng = without_pictures(episodes(count, seed=seed)), np.random.default_rng(seed)
        hands = rng.uniform(-0.3, 0.3, (count, 2))
        things = np.where(arrays.success.unflatten(0, (count, -1)).any(1)[:, None], hands, -hands)
        starts, proprio = np.full((count, 96, 96, 3), 60, np.uint8), arrays.proprio.unflatten(0, (count, -1)).clone()
        for start, (column, row) in zip(starts, (48 + 100 * things).astype(int), strict=True):
            start[row - 5 : row + 5, column - 5 : column + 5] = (250, 20, 20)
        proprio[:, 3:, :2] = torch.from_numpy(hands)[:, None].float()
        return replace(arrays, proprio=proprio.flatten(0, 1), first_frames=torch.from_numpy(starts))

    train, val, tiny = episodes(16), episodes(12, seed=1), SuccessClassifier.tiny_random()
    for cameras, learned in (({"libero_object": FROM_ABOVE}, True), (None, False)):
        judge, _ = train_success_classifier(
            train, val, tmp_path / str(learned), motion_arrays=placed(256, 2), init=tiny, cameras=cameras, steps=150,
            batch_size=16, learning_rate=1e-2,
        )  # fmt: skip
        assert judge.config.cameras == (cameras or {})
        others = placed(64, 3)
        told = torch.from_numpy(embed_instructions(others.instructions)), others.first_frames
        with torch.no_grad():
            proprio = others.proprio.unflatten(0, (64, -1))
            ends = judge.motion_logits(proprio, *told, judge.projection(others.suites))[:, -1] > 0
        accuracy = (ends == others.success.unflatten(0, (64, -1))[:, -1]).float().mean().item()
        assert (accuracy > 0.9) == learned


def test_score_looks_at_the_start_and_the_valid_end() -> None:
    classifier = SuccessClassifier.tiny_random()
    rng = np.random.default_rng(0)
    frames, proprio = rng.integers(0, 256, (3, 6, 96, 96, 3), dtype=np.uint8), rng.normal(size=(3, 6, 8))
    lengths, embeddings = np.array([1, 4, 6]), rng.normal(size=(3, 384)).astype(np.float32)

    def score(frames: np.ndarray, proprio: np.ndarray) -> np.ndarray:
        told = [INSTRUCTION] * 3, embeddings, frames[:, 0], ["libero_object"] * 3
        return classifier.score(frames, proprio.astype(np.float32), lengths, *told)

    scores = score(frames, proprio)
    assert scores.shape == (3,) and scores.dtype == np.float32 and ((scores >= 0) & (scores <= 1)).all()
    other_start = frames.copy()
    other_start[2, 0] = 0
    assert scores[2] != score(other_start, proprio)[2]
    for values in (frames, proprio):
        kept = values.copy()
        values[1, 4:] = 0  # beyond the end
        np.testing.assert_array_equal(scores, score(frames, proprio))
        values[1, 3] = 0
        assert scores[1] != score(frames, proprio)[1] and scores[2] == score(frames, proprio)[2]
        values[...] = kept


def test_both_witnesses_listen_to_the_instruction(tmp_path: Path) -> None:
    """What solves one task does not solve the other one."""

    def two_tasks(count: int, seed: int) -> EpisodeArrays:
        milk, ketchup = (
            replace(episodes(count, seed=one), proprio=episodes(count, seed=one, told_by="motion").proprio)
            for one in (seed, seed + 1)
        )
        records = (replace(record, instruction=INSTRUCTION.replace("milk", "ketchup")) for record in ketchup.records)
        failed = torch.zeros_like(ketchup.success)
        return concatenate([milk, replace(ketchup, success=failed, records=tuple(records))])

    train, val = two_tasks(16, 0), two_tasks(8, 100)
    classifier, _ = train_success_classifier(train, val, tmp_path, steps=60, batch_size=32, learning_rate=3e-3)
    for logits in frame_logits(classifier, val).T:
        peak, solved = episode_peaks(val, logits.sigmoid())
        assert solved.sum() == 4 and peak[solved].min() > peak[~solved].max()


@pytest.mark.parametrize("told_by", ["frames", "motion"])
def test_training_finds_the_rule_and_is_saved(tmp_path: Path, told_by: str) -> None:
    train, val = episodes(16, told_by=told_by), episodes(12, seed=1, told_by=told_by)
    classifier, metrics = train_success_classifier(train, val, tmp_path, steps=60, batch_size=16, learning_rate=3e-3)
    suite, balanced, motion, balanced_motion = metrics
    assert (balanced, motion, balanced_motion) == (f"{suite}/balanced", f"{suite}/motion", f"{suite}/motion/balanced")
    assert metrics[suite]["accuracy"] == 1.0 and metrics[suite]["frame_auroc"] > 0.99
    assert (metrics[motion]["accuracy"] == 1.0) == (told_by == "motion")
    loaded = SuccessClassifier.from_pretrained(tmp_path / "reward")
    assert loaded.threshold == classifier.threshold == {suite: metrics[suite]["threshold"]}
    assert loaded.balanced_threshold == classifier.balanced_threshold
    logits = frame_logits(loaded, val)
    peak, solved = episode_peaks(val, loaded.probability(logits))
    assert (peak >= loaded.balanced_threshold[suite]).sum() == solved.sum()
    assert metrics[balanced]["threshold"] == loaded.balanced_threshold[suite]
    if told_by == "motion":
        peak, solved = episode_peaks(val, loaded.motion_probability(logits[:, 1]))
        assert (peak >= loaded.balanced_motion_threshold[suite]).sum() == solved.sum()
    assert loaded.motion_threshold == classifier.motion_threshold == {suite: metrics[motion]["threshold"]}
    for name in ("logit_scale", "motion_scale", "motion_bias"):
        assert torch.equal(loaded.get_buffer(name), classifier.get_buffer(name))
    # The same call returns what is finished; another one does not take its place.
    same = {"steps": 60, "batch_size": 16, "learning_rate": 3e-3}
    finished, known = train_success_classifier(train, val, tmp_path, **same)  # type: ignore[arg-type]
    assert known == metrics and finished.threshold == classifier.threshold
    assert all(torch.equal(one, other) for one, other in zip(finished.parameters(), loaded.parameters(), strict=True))
    for arguments, message in (({"seed": 1}, "seed 0, this one has seed 1"), ({"init": loaded}, "init None")):
        with pytest.raises(ValueError, match=f"belongs to a run with {message}"):
            train_success_classifier(train, val, tmp_path, **same | arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belongs to a run with episodes"):
        train_success_classifier(replace(train, proprio=-train.proprio), val, tmp_path, **same)  # type: ignore[arg-type]
    # Begun from the result, one step is enough.
    out = tmp_path / "again"
    _, again = train_success_classifier(train, val, out, steps=1, batch_size=16, learning_rate=1e-6, init=loaded)
    assert again[suite]["accuracy"] == 1.0


def test_a_judge_needs_solved_and_failed_episodes(tmp_path: Path) -> None:
    mixed = episodes(8)
    solved = replace(mixed, success=torch.ones_like(mixed.success))
    for arrays in (solved, replace(mixed, success=~solved.success)):
        with pytest.raises(ValueError, match="learns from solved and from failed episodes"):
            train_success_classifier(arrays, mixed, tmp_path)
    with pytest.raises(ValueError, match="max_false_success_rate"):
        train_success_classifier(mixed, mixed, tmp_path, max_false_success_rate=1.0)


def test_episodes_can_be_checked_before_anything_is_imagined_from_them() -> None:
    mixed = episodes(8)
    check_episodes(mixed, mixed)
    solved = replace(mixed, success=torch.ones_like(mixed.success))
    for wrong in (solved, replace(mixed, success=~solved.success), episodes(8, length=2)):
        with pytest.raises(ValueError, match="learns from solved and from failed episodes of three frames or more"):
            check_episodes(wrong, mixed)


def test_validation_that_calibrates_nothing_is_named_before_the_training(tmp_path: Path) -> None:
    train, val = episodes(8), episodes(4, seed=1)
    for wrong in (replace(val, success=torch.zeros_like(val.success)), episodes(4, length=2)):
        with pytest.raises(ValueError, match="calibrated on validation episodes of three frames or more, solved ones"):
            train_success_classifier(train, wrong, tmp_path / "wrong", steps=1, batch_size=4)
    assert not (tmp_path / "wrong" / "checkpoints").exists()
    solved = replace(val, success=(torch.arange(7) >= 3).repeat(4))  # all of them, after a while
    with pytest.warns(UserWarning, match=r"no failed episode of \['libero_object'\]"):
        train_success_classifier(train, solved, tmp_path / "out", steps=1, batch_size=4)
    metrics = (tmp_path / "out" / "reward" / "metrics.json").read_text()
    assert "NaN" not in metrics and json.loads(metrics)["libero_object"]["false_success_rate"] is None


@pytest.mark.parametrize("size", [1.0, 15.0, 40.0])
def test_overconfident_logits_are_calibrated_too(size: float) -> None:
    """As well as by any scale of a fine grid, where a tenth of the verdicts is wrong."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(1500, generator=generator) < 0.3
    said = truth ^ (torch.rand(1500, generator=generator) < 0.1)
    logits = size * (2 * said[:, None].float() - 1) + 0.4 * size * torch.randn(1500, 2, generator=generator)
    scale, bias = _fit_logistic(logits, truth)

    def loss(scale: torch.Tensor, bias: torch.Tensor) -> float:
        return float(functional.binary_cross_entropy_with_logits((logits * scale).sum(1) + bias, truth.float()))

    grid = [loss(torch.full((2,), s / size), torch.tensor(b)) for s in np.linspace(0, 3, 61) for b in (-1.0, -0.5, 0.0)]
    assert loss(scale, bias) < min(grid) + 1e-4
    with pytest.raises(FloatingPointError, match="cannot be calibrated"):
        _fit_logistic(logits * torch.nan, truth)


@pytest.mark.parametrize("video", [True, False])
def test_environments_hear_the_judge_that_was_calibrated(video: bool) -> None:
    """`score` of every length of an episode is the probability that training and calibration see at that frame."""
    classifier, arrays = SuccessClassifier.tiny_random(), episodes(3, told_by="motion")
    classifier.register_to_config(cameras={"libero_object": FROM_ABOVE})
    for buffer in ("logit_bias", "motion_bias"):
        classifier.get_buffer(buffer).fill_(0.3)
    logits = frame_logits(classifier, arrays)
    expected = classifier.probability(logits) if video else classifier.motion_probability(logits[:, 1])
    frames, proprio = (value.unflatten(0, (3, -1)).numpy() for value in (arrays.frames, arrays.proprio))
    told = arrays.instructions, embed_instructions(arrays.instructions), arrays.first_frames.numpy(), arrays.suites
    for length in range(1, frames.shape[1] + 1):
        lengths = np.full(3, length)
        given = frames[:, :length] if video else None
        score = classifier.score(given, proprio[:, :length], lengths, *told)
        np.testing.assert_allclose(score, expected.unflatten(0, (3, -1))[:, length - 1].detach(), atol=1e-5)


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("new", [1, 2, 3])
def test_what_a_judge_remembers_takes_the_place_of_seeing_it_again(video: bool, new: int) -> None:
    classifier, arrays = SuccessClassifier.tiny_random(), episodes(3, told_by="motion")
    classifier.register_to_config(cameras={"libero_object": FROM_ABOVE})
    frames, proprio = (value.unflatten(0, (3, -1)).numpy() for value in (arrays.frames, arrays.proprio))
    task = arrays.instructions, embed_instructions(arrays.instructions)
    starts = arrays.first_frames.numpy()
    memory, seen = classifier.init_memory(proprio[:, 0], starts), 0
    for length in (1, *range(1 + new, frames.shape[1] + 1, new)):
        lengths = np.full(3, length)
        clips = frames[np.arange(3)[:, None], clip_places(lengths).T] if video else None
        before = {name: kept.clone() for name, kept in memory.items()}
        scores, changed = classifier.score_next(memory, clips, proprio[:, seen:length], *task, arrays.suites)
        assert all(torch.equal(memory[name], kept) for name, kept in before.items())
        given = frames[:, :length] if video else None
        whole = classifier.score(given, proprio[:, :length], lengths, *task, starts, arrays.suites)
        np.testing.assert_allclose(scores, whole, atol=1e-6)
        memory, seen = memory | changed, length
    assert isinstance(classifier, RememberingRewardModel)


def test_no_more_failures_pass_than_allowed_however_sure_the_judge_is() -> None:
    for peak in (0.2, 0.9995, 1.0):
        peaks, failed = np.full(20, peak), np.zeros(20, dtype=bool)
        assert (peaks >= choose_threshold(peaks, failed, 0.05)).sum() == 0


def test_the_motion_learns_from_episodes_of_its_own(tmp_path: Path) -> None:
    train, val = episodes(16), episodes(12, seed=1, told_by="motion")
    motion = without_pictures(episodes(16, told_by="motion"))
    _, metrics = train_success_classifier(
        train, val, tmp_path, motion_arrays=motion, steps=60, batch_size=16, learning_rate=3e-3
    )
    assert metrics["libero_object/motion"]["accuracy"] == 1.0


def test_episodes_of_different_lengths_are_judged_as_alone() -> None:
    classifier = SuccessClassifier.tiny_random()
    short, long = episodes(2, length=5, told_by="motion"), episodes(2, length=9, seed=1, told_by="motion")
    together = frame_logits(classifier, concatenate([short, long]))
    apart = torch.cat([frame_logits(classifier, one) for one in (short, long)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert together.isfinite().all()


def test_each_suite_has_its_threshold_and_an_unknown_one_the_highest() -> None:
    judge = SuccessClassifier(channels=(4, 8, 8), threshold={"libero_object": 0.6, "libero_spatial": 0.8})
    assert thresholds(judge, ["libero_spatial", "libero_object", "another"]).tolist() == [0.8, 0.6, 0.8]
    assert thresholds(SuccessClassifier.tiny_random(), ["libero_object"] * 2).tolist() == [0.9, 0.9]


def test_peaks_are_taken_at_the_ends_of_chunks() -> None:
    arrays = episodes(2)
    probability = torch.zeros(14)
    probability[1] = 0.9  # in the middle of the first chunk: an environment does not look there
    probability[7 + 4] = 0.8
    peaks, solved = episode_peaks(arrays, probability)
    np.testing.assert_allclose(peaks, [0.0, 0.8], rtol=1e-6)
    assert solved.tolist() == [True, False]


@given(hnp.arrays(np.float64, st.integers(10, 200), elements=st.floats(0, 0.99)), st.floats(0, 0.5))
def test_the_threshold_lets_few_failures_pass(peak: np.ndarray, allowed: float) -> None:
    solved = np.arange(len(peak)) % 3 == 0
    threshold = choose_threshold(peak, solved, allowed)
    assert 0.5 <= threshold < 1
    assert (peak[~solved] >= threshold).mean() <= allowed


@given(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=2, max_size=60))
def test_the_balanced_threshold_passes_as_many_as_are_solved(outcomes: list[tuple[int, bool]]) -> None:
    """Or as nearly as any threshold can, where peaks are equal."""
    peak, solved = np.array([pair[0] for pair in outcomes]) / 100, np.array([pair[1] for pair in outcomes])
    missing = abs((peak >= balance_threshold(peak, solved)).sum() - solved.sum())
    assert missing <= min(abs((peak >= threshold).sum() - solved.sum()) for threshold in np.arange(0.005, 1.0, 0.01))
    if len(np.unique(peak)) == len(peak):
        judged = peak >= balance_threshold(peak, solved)
        assert missing == 0 and (judged & ~solved).sum() == (~judged & solved).sum()


def test_one_outcome_alone_balances_nothing() -> None:
    judge, arrays = SuccessClassifier.tiny_random(), episodes(6)
    calibrate(judge, replace(arrays, success=torch.zeros_like(arrays.success)), 0.05)
    assert judge.balanced_threshold == judge.threshold and judge.balanced_motion_threshold == judge.motion_threshold


def test_the_balanced_threshold_is_never_above_the_environments() -> None:
    judge = SuccessClassifier(
        channels=(4, 8, 8), threshold=0.7, balanced_threshold={"libero_object": 0.6, "libero_spatial": 0.8}
    )
    suites = ["libero_spatial", "libero_object"]
    assert thresholds(judge, suites).tolist() == [0.7, 0.7]
    assert thresholds(judge, suites, threshold="balanced").tolist() == [0.7, 0.6]
    without = SuccessClassifier.tiny_random()  # never calibrated
    assert thresholds(without, ["libero_object"], video=False, threshold="balanced").tolist() == [0.9]


def test_episode_metrics_on_a_known_table() -> None:
    peak, solved = np.array([0.9, 0.6, 0.2, 0.8]), np.array([True, True, False, False])
    metrics = episode_metrics(peak, solved, 0.7)
    assert metrics["accuracy"] == 0.5 and metrics["recall"] == 0.5 and metrics["false_success_rate"] == 0.5
    assert metrics["auroc"] == pytest.approx(0.75)
