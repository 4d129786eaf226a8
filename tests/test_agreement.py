"""`prophet evaluate`, on a recorded world whose outcomes, videos and judge are known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prophet_gym.data.clips import concatenate, episode_folds, load_arrays, subset
from prophet_gym.data.episode import SPLITS, Episode
from prophet_gym.data.lerobot_format import EpisodeDataset, LeRobotWriter
from prophet_gym.evaluation import actions_only
from prophet_gym.evaluation.agreement import (
    Verdicts,
    _moving_epe,
    _next_chunks,
    _proprio_report,
    actions_report,
    as_strict,
    concatenate_verdicts,
    evaluate,
    video_report,
)
from prophet_gym.evaluation.video_metrics import psnr
from prophet_gym.world_model import ProphetPipeline
from prophet_gym.world_model.imagination import episode_seeds, replay_episodes
from prophet_gym.world_model.proprioception import ProprioceptionModel

STEPS = 4
CAMERA = {"intrinsics": np.array([[100.0, 0, 48], [0, 100, 48], [0, 0, 1]]), "extrinsics": np.eye(4)}


class RedCornerJudge:
    """Right about every real frame: success paints the upper left corner red."""

    threshold = 0.5

    def score(
        self,
        frames: NDArray[np.uint8],
        proprio: NDArray[np.float32],
        lengths: NDArray[np.int64],
        instructions: Sequence[str],
        embeddings: NDArray[np.float32],
        starts: NDArray[np.uint8],
        suites: Sequence[str],
    ) -> NDArray[np.float32]:
        last = frames[np.arange(len(frames)), lengths - 1, :16, :16].astype(np.float32)
        return np.float32((last[..., 0] - last[..., 1]).mean((1, 2)) > 100)


class HeightJudge(RedCornerJudge):
    """Takes a hand above 2 cm for a success."""

    def score(self, frames: NDArray[np.uint8], proprio: NDArray[np.float32], *args: Any) -> NDArray[np.float32]:
        return np.float32(proprio[:, -1, 2] > 0.02)


class Oracle(ProphetPipeline):
    """Knows what the recorded actions lead to; other actions change nothing. Its proprioception is off by 3 cm and by
    10 degrees."""

    episodes: Sequence[Episode]

    def _find(self, actions: torch.Tensor) -> tuple[Episode, int] | None:
        for one in self.episodes:
            recorded = one.actions.reshape(-1, 7)
            for first in range(0, len(recorded) - len(actions) + 1, 8):
                if np.array_equal(recorded[first : first + len(actions)], actions.numpy()):
                    return one, first // 4
        return None

    def _follow(self, image: Any, actions: torch.Tensor) -> torch.Tensor:
        found, count = self._find(actions), len(actions) // 4 + 1
        if found is None:
            return torch.as_tensor(image)[None].repeat(count, 1, 1, 1)
        one, first = found
        return torch.from_numpy(one.frames[first : first + count])

    def replay(self, images: Any, proprio: torch.Tensor, actions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        clips = torch.stack([self._follow(*row) for row in zip(images, actions, strict=True)])
        poses = proprio[:, None].repeat(1, clips.shape[1], 1)
        poses[:, 1:, 2] += 0.03
        poses[:, 1:, 5] += np.radians(10)
        return clips, poses

    def imagine(self, history: Any, state: Any, actions: torch.Tensor, images: torch.Tensor, *args: Any) -> Any:
        chunks = [self._follow(row[1], own)[1:] for row, own in zip(images, actions, strict=True)]
        return SimpleNamespace(frames=torch.stack(chunks))


def episode(index: int, split: str, misleading: bool = False) -> Episode:
    """The even ones succeed, and their first action says so, or the opposite."""
    rng = np.random.default_rng(index)
    frames = np.broadcast_to(rng.integers(40, 80, (1, 96, 96, 3), dtype=np.uint8), (STEPS + 1, 96, 96, 3)).copy()
    success = np.zeros(STEPS + 1, bool)
    actions = rng.uniform(-0.2, 0.2, (STEPS, 4, 7)).astype(np.float32)
    actions[..., 0] = 0.8 if misleading else -0.8
    if index % 2 == 0:
        success[2:] = True
        frames[success, :16, :16] = (250, 20, 20)
        actions[..., 0] *= -1
    return Episode(
        frames=frames,
        proprio=np.zeros((STEPS + 1, 8), np.float32),
        actions=actions,
        success=success,
        instruction="pick up the milk and place it in the basket",
        suite="libero_object",
        task=0,
        init_state=SPLITS[split][0],
        split=split,
        kind="clean",
        robot="panda",
        seed=index,
    )


@pytest.fixture(autouse=True)
def quick_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be learned from these actions is learned soon."""
    monkeypatch.setattr(actions_only, "STEPS", 150)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    writer = LeRobotWriter(root, fps=5, frame_stride=4, camera=CAMERA, image_size=96)
    for index in range(32):
        writer.write_episode(index, episode(index, "train" if index < 24 else "val" if index < 30 else "test"))
    writer.finalize()
    return root


def test_the_report_measures_what_it_says(data: Path, tmp_path: Path) -> None:
    results = evaluate(ProphetPipeline.tiny_random(), [data], tmp_path, reward_model=RedCornerJudge())
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "drift_libero_object.png").is_file()
    assert (tmp_path / "contact_sheet_libero_object.png").is_file()
    page = (tmp_path / "report.html").read_text()
    assert "imagined_frames" in page and page.count("base64") == 3 and "flatter" in page

    report = results["libero_object"]
    assert results["all"]["outcome"] == report["outcome"]
    outcome = report["outcome"]["all"]
    assert report["outcome"]["clean"] == outcome
    assert outcome["real_frames"]["accuracy"] == 1 and outcome["real_frames"]["auroc"] == 1
    # An untrained world model paints nothing red: it is right about the failures alone.
    assert outcome["imagined_frames"]["accuracy"] == 0.5 and outcome["imagined_frames"]["recall"] == 0
    assert outcome["actions_only"]["accuracy"] == 1
    # The real frames are red from the first chunk's end, so within it, too, the judge is right.
    names = ["real_frames", "imagined_frames", "imagined_frames_balanced", "actions_only", "actions_only_as_strict"]
    assert list(report["outcome"]["within 1 chunks"]) == names
    assert report["outcome"]["within 1 chunks"]["real_frames"]["accuracy"] == 1

    video = report["video"]
    real = np.stack([episode(index, "val").frames for index in range(24, 30)])
    copied = np.repeat(real[:, :1], STEPS + 1, axis=1)
    assert video["episode_psnr_copy"] == pytest.approx(float(psnr(copied, real)[:, 1:].clamp(max=60).mean()))
    assert video["episode_ssim_copy"] > video["episode_ssim_prophet"]
    # In the second chunk nothing changes any more, so the last frame is a perfect copy; in the first, frame 2 does.
    assert video["next_chunk_psnr_copy"] > video["episode_psnr_copy"]
    assert report["proprio"]["end_cm"] > 0 and report["actions"]["episodes"] == 6


def test_one_that_knows_everything_gets_full_marks_and_the_control_does_not_see_what_it_judges(tmp_path: Path) -> None:
    """In validation the actions say the opposite of what they say in training, which has no video."""
    data = []
    for split, count in (("train", 24), ("val", 6)):
        data.append(tmp_path / split)
        writer = LeRobotWriter(data[-1], fps=5, frame_stride=4, camera=CAMERA, image_size=96, video=split == "val")
        for index in range(count):
            one = episode(index, split, misleading=split == "val")
            blind = np.broadcast_to(one.frames[:1], one.frames.shape).copy()
            writer.write_episode(index, one if split == "val" else replace(one, frames=blind))
        writer.finalize()
    oracle = Oracle.tiny_random()
    oracle.episodes = list(EpisodeDataset(data[1]))
    reports = {
        judge: evaluate(oracle, data, tmp_path / "report", reward_model=judge())["libero_object"]
        for judge in (RedCornerJudge, HeightJudge)
    }
    video, outcome = reports[RedCornerJudge]["video"], reports[RedCornerJudge]["outcome"]["all"]
    for name in ("episode", "final", "next_chunk"):
        assert video[f"{name}_psnr_prophet"] == 60 > video[f"{name}_psnr_autoencoder"] > 0
    for name in ("episode_ssim", "episode_tssim", "next_chunk_ssim", "next_chunk_tssim"):
        assert video[f"{name}_prophet"] == pytest.approx(1.0) and video[f"{name}_autoencoder"] < 1
    assert video["episode_epe_prophet"] == 0 < video["episode_epe_still"]
    assert video["episode_moving_epe_prophet"] == 0 < video["episode_moving_epe_still"]
    assert video["episode_flow_cosine_prophet"] == pytest.approx(1.0)
    assert outcome["imagined_frames"]["accuracy"] == 1 and outcome["actions_only"]["accuracy"] == 0
    # What is imagined is judged by its own proprioception, and reality by the real one.
    lifted = reports[HeightJudge]["outcome"]["all"]
    assert lifted["imagined_frames"]["false_success_rate"] == 1 and lifted["real_frames"]["false_success_rate"] == 0
    proprio, actions = reports[RedCornerJudge]["proprio"], reports[RedCornerJudge]["actions"]
    for name in ("mean", "end"):
        assert proprio[f"{name}_cm"] == pytest.approx(3.0, abs=1e-4)
        assert proprio[f"{name}_degrees"] == pytest.approx(10.0, abs=1e-3)
    assert actions["psnr_own"] == 60 > actions["psnr_swapped"] and actions["psnr_own"] > actions["psnr_none"]


def test_episodes_of_one_suite_must_be_equally_long(tmp_path: Path) -> None:
    writer = LeRobotWriter(tmp_path / "data", fps=5, frame_stride=4, camera=CAMERA, image_size=96)
    for index in range(2):
        whole = episode(index, "val")
        some = {name: getattr(whole, name)[: 3 + index] for name in ("frames", "proprio", "success")}
        writer.write_episode(index, replace(whole, actions=whole.actions[: 2 + index], **some))
    writer.finalize()
    with pytest.raises(ValueError, match=r"equally long to be compared, got \[3, 4\] frames"):
        evaluate(ProphetPipeline.tiny_random(), [tmp_path / "data"], tmp_path / "report", reward_model=RedCornerJudge())


def test_the_control_learns_from_episodes_of_any_length(data: Path) -> None:
    """One that is cut short does not cut the others."""
    dataset = EpisodeDataset(data)
    train, val = (load_arrays([dataset], split, progress=False) for split in ("train", "val"))
    for arrays in (train, val):
        arrays.success[arrays.starts + 2] = False  # nothing is solved before the third step
    short = subset(train, 1, 0)
    kept = {name: getattr(short, name)[:3] for name in ("frames", "proprio", "actions", "success")}
    with_short = concatenate([train, replace(short, **kept, lengths=torch.tensor([3]))])
    for training in (train, with_short):
        verdicts = actions_only.predict_from_actions(training, val, chunk_frames=2)
        assert verdicts.shape == (6, 2)
        assert ((verdicts[:, -1] > 0.5) == val.success.unflatten(0, (6, -1))[:, -1].numpy()).all()


def test_single_chunks_begin_from_what_is_true(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each episode of its own suite and member; the first chunk is a whole replay's."""
    pipeline = ProphetPipeline.tiny_random()
    pipeline.register_modules(proprioception=ProprioceptionModel(hidden_dim=8, width=8, num_members=3).eval())
    arrays = load_arrays([EpisodeDataset(data)], "train", progress=False)
    arrays.proprio.copy_(0.1 * torch.randn(arrays.proprio.shape, generator=torch.Generator().manual_seed(0)))
    given: list[tuple[torch.Tensor, list[str]]] = []
    imagine = pipeline.imagine

    def recording(*arguments: Any) -> Any:
        given.append((arguments[1], arguments[4]))
        return imagine(*arguments)

    monkeypatch.setattr(pipeline, "imagine", recording)
    chunks = _next_chunks(pipeline, arrays, count=5, length=STEPS + 1, seed=0)
    members, size = episode_folds(arrays, 3), pipeline.proprioception.state_dim
    assert len(set(members[:5].tolist())) > 1
    for index, (state, suites) in enumerate(given):
        rows = arrays.starts[index] + torch.arange(0, STEPS, 2)
        torch.testing.assert_close(state[:, :8], arrays.proprio[rows])
        assert state[:, size - 1].tolist() == [members[index]] * 2 and suites == [arrays.suites[index]] * 2
        assert not state[0, 8 : size - 1].any() and state[1, 8 : size - 1].any()  # at rest, and then on the way
    seeds = [episode_seeds(arrays.starts[index : index + 1], 0)[0] for index in range(5)]
    whole, _ = replay_episodes(pipeline, arrays, torch.arange(5), seeds)
    # Another batch rounds differently, here and there by a grey level.
    np.testing.assert_allclose(chunks[:, 0].astype(float), whole[:, 1:3].numpy(), atol=1)


def test_a_video_is_measured_on_the_way_and_at_its_end(data: Path) -> None:
    """Frame k is brighter by k levels than it should be."""
    episode = subset(load_arrays([EpisodeDataset(data)], "val", progress=False), 1, 0)
    rows = torch.arange(23).clamp(max=STEPS)
    kept = {name: getattr(episode, name)[rows] for name in ("frames", "proprio", "actions", "success")}
    arrays = replace(episode, **kept | {"frames": kept["frames"] // 2}, lengths=torch.tensor([23]))
    real = arrays.frames[None].numpy()
    brighter = np.arange(23, dtype=np.uint8)[:, None, None, None]
    report, curves = video_report(ProphetPipeline.tiny_random(), arrays, real, real + brighter, seed=0)
    expected = 20 * np.log10(255 / np.arange(1, 23))
    np.testing.assert_allclose(curves["prophet"], expected)
    assert report["episode_psnr_prophet"] == pytest.approx(expected.mean())
    assert report["final_psnr_prophet"] == pytest.approx(expected[-1])
    assert report["moving_psnr_frame_20_prophet"] == pytest.approx(expected[19])


def test_pixels_that_hardly_move_do_not_count_as_moving() -> None:
    """All moving pixels count the same, in whatever video and direction they move."""
    slow, fast, error = np.array([0.3, 0.3]), np.array([-0.4, 0.4]), np.array([3.0, 4.0])
    few = np.stack([slow] * 12 + [fast] * 4).reshape(1, 4, 4, 2).astype(np.float32)
    many = np.stack([slow] * 4 + [fast] * 12).reshape(1, 4, 4, 2).astype(np.float32)
    wrong = [flow + np.where(flow[..., :1] < 0, error * scale, 99) for flow, scale in ((few, 1.0), (many, 0.2))]
    assert _moving_epe(wrong, [few, many]) == pytest.approx((4 * 5 + 12 * 1) / 16)


def test_estimated_motions_are_measured_on_the_way_and_at_their_ends() -> None:
    """Each robot drifts by so many centimetres, and twice as many degrees, a frame."""
    true = torch.zeros(3, 4, 8)
    true[..., :3] = torch.rand(3, 4, 3)
    drift = torch.outer(torch.tensor([1.0, 2.0, 6.0]), torch.arange(1.0, 5.0))
    estimated = true.clone()
    estimated[..., 1] -= 0.01 * drift
    estimated[..., 5] += torch.deg2rad(2 * drift)
    estimated[..., 6:] += 1  # the fingers are no part of the pose
    assert _proprio_report(estimated, true, 1) == pytest.approx(
        {"mean_cm": 7.5, "end_cm": 12, "end_median_cm": 8, "mean_degrees": 15, "end_degrees": 24}, abs=1e-3
    )


def test_other_actions_are_all_that_a_counterfactual_changes(data: Path) -> None:
    """An episode by itself is swapped with itself: the same member, noise and start give the same video."""
    pipeline = ProphetPipeline.tiny_random()
    members = ProprioceptionModel(hidden_dim=8, width=8, num_members=3).eval()
    for weight in (*members.parameters(), pipeline.transformer.action_frame_in.weight):
        torch.nn.init.normal_(weight, std=0.1)
    pipeline.register_modules(proprioception=members)
    arrays = load_arrays([EpisodeDataset(data)], "val", progress=False)
    folds = set()
    for seed in range(3):
        alone = subset(arrays, 1, seed)
        folds |= set(episode_folds(alone, 3).tolist())
        imagined, _ = replay_episodes(pipeline, alone, torch.arange(1), episode_seeds(torch.arange(1), seed))
        report = actions_report(pipeline, alone, alone.frames[None].numpy(), imagined.numpy(), seed)
        assert report["psnr_own"] == report["psnr_swapped"] != report["psnr_none"]
    assert len(folds) > 1


@pytest.mark.parametrize("num_arms", [1, 2])
def test_two_splits_are_measured_together(data: Path, tmp_path: Path, num_arms: int) -> None:
    """Also by a Prophet that knows robots of more arms than this one."""
    pipeline = ProphetPipeline.tiny_random(num_arms=num_arms)
    results = evaluate(pipeline, [data], tmp_path, reward_model=RedCornerJudge(), splits=("val", "test"))
    assert results["libero_object"]["splits"] == ["val", "test"]
    assert results["libero_object"]["video"]["episodes"] == 8
    assert results["all"]["outcome"]["all"]["real_frames"]["episodes"] == 8


def test_suites_of_different_lengths_are_counted_together() -> None:
    """Peaks decide, and a shorter episode's peak stays what it was."""

    def verdicts(chunks: int, peak_at: int) -> Verdicts:
        peaks = np.zeros((2, chunks))
        peaks[0, peak_at] = 0.9
        ones = np.ones(2)
        return Verdicts(np.array(["clean"] * 2), peaks > 0.5, peaks, peaks, peaks, ones * 0.5, ones * 0.5, ones * 0.5)

    together = concatenate_verdicts([verdicts(3, 1), verdicts(5, 4)])
    assert together.solved.shape == (4, 5)
    report = together.report()["all"]
    assert report["imagined_frames"]["accuracy"] == 1 and report["imagined_frames"]["episodes"] == 4
    assert together.solved.any(1).tolist() == [True, False, True, False]


def test_the_control_is_compared_when_it_is_as_strict_as_the_judge() -> None:
    """Of four failures the judge passes one; the control, at 0.5, three, and then one as well, and misses a success."""
    solved = np.array([[False], [False], [False], [False], [True], [True]])
    judge = np.array([[0.9], [0.1], [0.1], [0.1], [0.9], [0.9]])
    control = np.array([[0.9], [0.8], [0.7], [0.2], [0.95], [0.75]])
    threshold = np.full(6, 0.5)
    strict = as_strict(control, judge, threshold, solved)
    assert 0.8 < strict <= 0.9
    kinds = np.array(["policy"] * 6)
    lenient = np.full(6, judge.min() - 0.01)
    report = Verdicts(kinds, solved, judge, judge, control, threshold, lenient, np.full(6, strict)).report()["all"]
    balanced, usual = report["imagined_frames_balanced"], report["imagined_frames"]
    assert balanced["recall"] == balanced["false_success_rate"] == 1 and usual["false_success_rate"] == 0.25
    assert balanced["auroc"] == usual["auroc"]
    loose, as_judge = report["actions_only"], report["actions_only_as_strict"]
    assert (loose["false_success_rate"], loose["recall"]) == (0.75, 1.0)
    assert (as_judge["false_success_rate"], as_judge["recall"]) == (0.25, 0.5)
    assert as_judge["auroc"] == loose["auroc"]
    assert as_strict(control, judge, threshold, np.ones_like(solved)) == pytest.approx(0.5)  # nothing fails


def test_training_data_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='Expected the splits "val", "test" or both'):
        evaluate(ProphetPipeline.tiny_random(), [data], tmp_path, reward_model=RedCornerJudge(), splits=("train",))
