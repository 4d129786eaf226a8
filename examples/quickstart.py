"""Post-train a flow policy inside a learned simulator, on a laptop CPU, in a few minutes.

    python examples/quickstart.py

loads the shipped Prophet world model, its reward model and a flow policy that was cloned from 40 demonstrations of each
of two LIBERO suites and needs no image; improves it on libero_object with FA-GRPO inside Prophet-LIBERO-v0, where
thousands of episodes are imagined without video, on training starts only; and compares it before and after on
validation starts, now with video. With `pip install -e ".[libero]"` the same comparison is made in the real
simulator, which training never touched. Results go to runs/quickstart: results.json, learning_curve.png,
before_after_*.mp4, TensorBoard logs, the policy.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor
from tqdm.auto import tqdm

import prophet_gym  # noqa: F401  (registers the environments)
from fagrpo import FAGRPO, FlowPolicy
from prophet_gym.data.episode import SPLITS
from prophet_gym.data.lerobot_format.schema import write_json
from prophet_gym.envs.models import checkpoint_path
from prophet_gym.envs.sb3_vec_env import ProphetVecEnv
from prophet_gym.evaluation.eval_callback import ProphetEvalCallback
from prophet_gym.evaluation.policy_success import Rollouts, evaluate_in_libero, evaluate_in_prophet, starts_of
from prophet_gym.simulators.libero import task_names
from prophet_gym.training import best_precision


class LearningCurve(BaseCallback):
    """Keep the success rate of every rollout, show progress, and stop when the time is up."""

    def __init__(self, minutes: float) -> None:
        super().__init__()
        self.success: list[float] = []
        self.steps: list[int] = []
        self.seconds = 60 * minutes
        self.outcomes: list[bool] = []

    def _on_training_start(self) -> None:
        self.begin = time.monotonic()
        self.progress = tqdm(total=round(self.seconds), desc="FA-GRPO in Prophet", unit="s")

    def _on_step(self) -> bool:
        dones, infos = self.locals["dones"], self.locals["infos"]
        # Environments whose episode in this rollout is over idle until the others are done.
        self.outcomes += [infos[row]["is_success"] for row in self.locals["rows"] if dones[row]]
        self.progress.n = min(round(self.seconds), round(time.monotonic() - self.begin))
        self.progress.refresh()
        return time.monotonic() - self.begin < self.seconds

    def _on_rollout_end(self) -> None:
        self.success.append(float(np.mean(self.outcomes)) if self.outcomes else float("nan"))
        self.steps.append(self.num_timesteps)
        self.outcomes = []
        self.progress.set_postfix(success=f"{100 * self.success[-1]:.0f}%")

    def _on_training_end(self) -> None:
        self.progress.close()


def main() -> None:
    """Run the comparison and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="of post-training")
    parser.add_argument("--suite", default="libero_object", help="libero_object or libero_spatial")
    parser.add_argument("--policy", default="flow-policy-libero-40", help="name of a shipped one, or folder")
    parser.add_argument("--num-envs", type=int, default=256, help="groups of 8 share a start")
    parser.add_argument("--learning-rate", type=float, default=8e-5)
    parser.add_argument("--video", action="store_true", help="train with video, for policies that look: far slower")
    parser.add_argument(
        "--repeats", type=int, default=1, help="evaluation episodes of each of the 50 validation starts"
    )
    parser.add_argument("--prophet-only", action="store_true", help="leave the real simulator out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    policy = FlowPolicy.from_safetensors(checkpoint_path(arguments.policy))
    if not arguments.video and isinstance(policy.used_space, gym.spaces.Dict) and "image" in policy.used_space.spaces:
        parser.error(f"{arguments.policy} looks at images: add --video")
    starts = starts_of(range(10), SPLITS["val"], arguments.repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if best_precision(device) == "bf16" else "float32"
    simulators: dict[str, Callable[..., Rollouts]] = {"Prophet": partial(evaluate_in_prophet, dtype=dtype)}
    if not arguments.video:
        many = starts_of(range(10), SPLITS["val"], 4)
        simulators["Prophet without video"] = lambda policy, suite, _: evaluate_in_prophet(
            policy, suite, many, video=False
        )
    if not arguments.prophet_only:
        try:
            task_names(arguments.suite)
        except ImportError as error:  # not installed, or no OpenGL
            print(f"Without the real simulator: {error}")
        else:
            simulators["LIBERO (real)"] = evaluate_in_libero
            simulators["LIBERO (real), deterministic"] = partial(evaluate_in_libero, deterministic=True)
    before = {name: evaluate(policy, arguments.suite, starts) for name, evaluate in simulators.items()}

    envs = gym.make_vec(
        "Prophet-LIBERO-v0",
        num_envs=arguments.num_envs,
        suite=arguments.suite,
        split="train",
        dtype=dtype,
        video=arguments.video,
        autoreset_mode="SameStep",
    )
    model = FAGRPO(
        policy,
        VecMonitor(ProphetVecEnv(envs), info_keywords=("is_success",)),
        learning_rate=arguments.learning_rate,
        batch_size=1024,
        kl_coef=0.01,
        target_kl=0.1,
        # Four of the ten flow steps are stochastic in each rollout: less work, and smaller steps.
        sde_window=4,
        noise_level=0.7,
        # The average over about ten rollouts holds up better in reality than the last weights.
        ema_decay=0.9,
        group_size=8,
        max_episode_steps=20,
        tensorboard_log=str(arguments.out),
        seed=arguments.seed,
    )
    curve = LearningCurve(arguments.minutes)
    evaluations = {}
    if not arguments.video:
        # Part of what is gained is gained by sampling less widely; this is the rest. And another Prophet, which rewards
        # nothing here, sees a part of what is gained by the first one's errors.
        options = {"suite": arguments.suite, "every": 10 * 20 * arguments.num_envs}  # about ten rollouts
        evaluations = {
            "Prophet without video, deterministic": ProphetEvalCallback("rewarding", **options),
            "held-out Prophet, deterministic": ProphetEvalCallback(
                "held_out", world_model="prophet-libero-held-out", **options
            ),
        }
    model.learn(total_timesteps=10**9, callback=[curve, *evaluations.values()])
    if not curve.success:
        parser.error(f"no rollout was over after {arguments.minutes} minutes: give it more.")
    improved = model.average_policy
    improved.export_safetensors(arguments.out / "policy")
    after = {name: evaluate(improved, arguments.suite, starts) for name, evaluate in simulators.items()}

    expected = {}
    for name, evaluation in evaluations.items():
        before[name], after[name] = evaluation.history[0][1], evaluation.history[-1][1]
        rollouts = np.searchsorted(curve.steps, [steps for steps, _ in evaluation.history], side="right")
        rates = [outcome.expected_rate for _, outcome in evaluation.history]
        expected[evaluation.name] = {"rollouts": rollouts.tolist(), "rates": rates}
    report(before, after, curve.success, expected, arguments.out)


def report(
    before: dict[str, Rollouts],
    after: dict[str, Rollouts],
    curve: list[float],
    expected: dict[str, dict[str, list[float]]],
    out: Path,
) -> None:
    """Print the table; write results.json, the learning curve and the videos."""
    table = Table(title="Success on validation starts [95% interval] of episodes, actions sampled unless deterministic")
    for column in ("simulator", "cloned policy", "after FA-GRPO in Prophet"):
        table.add_column(column)
    for name in before:
        table.add_row(name, str(before[name]), str(after[name]))
    Console().print(table)
    if "LIBERO (real)" not in before:
        print(
            "FA-GRPO improves what Prophet rewards, and may exploit where Prophet errs (docs/results.md): believe a "
            'policy after it has shown itself in the real simulator, pip install -e ".[libero]".'
        )

    summary = {
        name: {"before": before[name].success.tolist(), "after": after[name].success.tolist()} for name in before
    }
    write_json(out / "results.json", {"success": summary, "training_curve": curve, "expected": expected})

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    axes.plot(
        np.arange(len(curve)), 100 * np.array(curve), color="C0", alpha=0.4, label="each rollout, training starts"
    )
    if len(curve) >= 5:
        smooth = np.convolve(curve, np.ones(5) / 5, mode="valid")
        axes.plot(np.arange(2, len(smooth) + 2), 100 * smooth, color="C0", label="mean of 5")
    for color, (name, it) in zip(("C2", "C1"), expected.items(), strict=False):
        label = f"{name.replace('_', '-')} Prophet, validation starts, deterministic, expected"
        axes.plot(it["rollouts"], 100 * np.array(it["rates"]), "o-", color=color, label=label)
    axes.set(xlabel="FA-GRPO rollouts so far", ylabel="success in Prophet (%)", ylim=(0, 100))
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(out / "learning_curve.png", dpi=120)

    for name in before:
        if not before[name].videos or name.endswith("deterministic"):
            continue
        # Upper row before, lower row after; a column per task.
        length = max(len(video) for run in (before[name], after[name]) for video in run.videos)
        rows = []
        for run in (before[name], after[name]):
            padded = [np.concatenate([v, np.repeat(v[-1:], length - len(v), axis=0)]) for v in run.videos[:6]]
            rows.append(np.concatenate(padded, axis=2))
        video = np.concatenate(rows, axis=1)
        imageio.mimwrite(out / f"before_after_{name.split()[0].lower()}.mp4", list(video), fps=5, macro_block_size=None)
    print(f"Plot and videos are in {out}.")


if __name__ == "__main__":
    main()
