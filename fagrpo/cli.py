"""Command line: ``fagrpo sft`` (behaviour cloning), ``fagrpo train`` (reinforcement learning), ``fagrpo average``."""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor

from fagrpo.demonstrations import Demonstrations
from fagrpo.fagrpo import FAGRPO, FLOW_SCALES
from fagrpo.imitation import behaviour_cloning
from fagrpo.objective import PLACEMENTS, RATIOS
from fagrpo.policies import FlowPolicy, average_policies
from prophet_gym.cli import positive_int

CHUNK = 8


def load_demonstrations(
    roots: Sequence[Path], kinds: Sequence[str], split: str, max_episodes: int | None = None, video: bool = True
) -> Demonstrations:
    """Successful recorded episodes as pairs of observation and chunk, one per frame at which a chunk can begin.

    Frames after the task is solved are left out: an environment ends the episode there. Chunks that reach beyond an
    episode's end repeat the last gripper command without motion.

    :param roots: finalised data sets in the LeRobot format
    :param kinds: of episodes, for example "clean"
    :param split: "train" or "val"
    :param max_episodes: use at most this many of each data set; None: all
    :param video: whether all must have been recorded with video
    :return: observations image (N, H, W, 3), proprio (N, 8 K), instruction (N, 384); actions (N, 8, 7 K), of K arms
    :raises ValueError: no episode matches, a data set has no video, or they differ in arms or frame_stride
    """
    from prophet_gym.data.episode import GRIPPERS
    from prophet_gym.data.instructions import embed_instructions
    from prophet_gym.data.lerobot_format import EpisodeDataset, check_video

    images, proprio, actions, episode_ids = [], [], [], []
    texts: list[str] = []
    datasets = [EpisodeDataset(root) for root in roots]
    if video:
        check_video(datasets)
    if len({dataset.num_arms for dataset in datasets}) > 1:
        arms = {str(dataset.root): dataset.num_arms for dataset in datasets}
        raise ValueError(f"a policy is of one robot, got data sets of robots with so many arms: {arms}")
    strides = {dataset.frame_stride for dataset in datasets}
    if len(strides) > 1 or any(CHUNK % stride for stride in strides):
        each = {str(dataset.root): dataset.frame_stride for dataset in datasets}
        raise ValueError(f"expected one frame_stride that divides the chunk of {CHUNK} actions, got {each}")
    selected = [dataset.select(split=split, kind=kinds) for dataset in datasets]
    successes = itertools.chain.from_iterable(
        itertools.islice((episode for episode in dataset if episode.outcome), max_episodes) for dataset in selected
    )
    for number, episode in enumerate(successes):
        frame_stride = episode.actions.shape[1]
        commands = episode.actions.reshape(-1, episode.actions.shape[2])  # (T * stride, 7 K)
        idle = np.zeros((CHUNK, commands.shape[1]), dtype=np.float32)
        idle[:, GRIPPERS] = commands[-1, GRIPPERS]
        padded = np.concatenate([commands, idle])
        solved = int(np.flatnonzero(~episode.success).max(initial=-1)) + 1  # from here on the task stays solved
        for frame in range(min(solved + 1, len(episode.actions))):
            images.append(episode.frames[frame])
            proprio.append(episode.proprio[frame])
            actions.append(padded[frame * frame_stride : frame * frame_stride + CHUNK])
            texts.append(episode.instruction)
            episode_ids.append(number)
    if not episode_ids:
        raise ValueError(f"no successful {split} episode of kind {', '.join(kinds)} in {', '.join(map(str, roots))}")
    unique = sorted(set(texts))
    table = dict(zip(unique, embed_instructions(unique), strict=True))
    return Demonstrations(
        observations={
            "image": np.stack(images),
            "proprio": np.stack(proprio).astype(np.float32),
            "instruction": np.stack([table[text] for text in texts]).astype(np.float32),
        },
        actions=np.stack(actions).astype(np.float32),
        episode_ids=np.array(episode_ids),
        rows_per_step=CHUNK // frame_stride,
    )


def _spaces_of(demonstrations: Demonstrations) -> tuple[spaces.Dict, spaces.Box]:
    assert isinstance(demonstrations.observations, dict)
    entries: dict[str, spaces.Space] = {}
    for key, value in demonstrations.observations.items():
        if value.dtype == np.uint8:
            entries[key] = spaces.Box(0, 255, value.shape[1:], np.uint8)
        else:
            entries[key] = spaces.Box(-np.inf, np.inf, value.shape[1:], np.float32)
    return spaces.Dict(entries), spaces.Box(-1.0, 1.0, demonstrations.actions.shape[1:], np.float32)


def sft(arguments: argparse.Namespace) -> int:
    """Behaviour cloning from a recorded data set; writes the policy to ``--out``."""
    demonstrations = load_demonstrations(
        arguments.data, arguments.kind, "train", arguments.episodes, video=not arguments.blind
    ).stack_frames(arguments.frame_stack)
    policy_kwargs: dict[str, Any] = {"num_flow_steps": arguments.num_flow_steps}
    if arguments.blind:
        policy_kwargs["observation_keys"] = ["proprio", "instruction"]
    policy = FlowPolicy(*_spaces_of(demonstrations), **policy_kwargs).to(arguments.device)
    result = behaviour_cloning(
        policy,
        demonstrations,
        num_updates=arguments.updates,
        max_seconds=arguments.max_seconds,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        bfloat16=arguments.bfloat16,
        seed=arguments.seed,
        checkpoint=arguments.out / "training_state.safetensors",
        tensorboard_log=str(arguments.out / "tensorboard"),
        verbose=1,
    )
    policy.export_safetensors(arguments.out)
    print(
        f"{len(demonstrations)} chunks, {result.num_updates} updates in {result.seconds:.0f} s, best validation loss "
        f"{result.best_validation_loss:.4f} at update {result.best_update}; policy written to {arguments.out}"
    )
    return 0


def make_vec_env(env_id: str, num_envs: int, frame_stack: int, env_kwargs: dict[str, Any]) -> VecEnv:
    """SB3 environments of a Gymnasium id; Prophet's ids step all environments in one model call.

    :param env_id: an id, or "module:id" to import the module that registers it
    :param num_envs: number of environments
    :param frame_stack: observations stacked per step, 1: none
    :param env_kwargs: arguments of the environment
    :raises ValueError: the environment has no such argument
    """
    name = env_id.split(":")[-1]
    venv: VecEnv
    try:
        if name.startswith("Prophet"):
            from prophet_gym.envs.sb3_vec_env import ProphetVecEnv

            envs: Any = gym.make_vec(env_id, num_envs=num_envs, autoreset_mode="SameStep", **env_kwargs)
            venv = ProphetVecEnv(envs)
        else:
            makers: list[Callable[[], gym.Env]] = [lambda: gym.make(env_id, **env_kwargs) for _ in range(num_envs)]
            venv = DummyVecEnv(makers)
    except TypeError as error:
        if not any(f"unexpected keyword argument '{one}'" in str(error) for one in env_kwargs):
            raise
        raise ValueError(f"{env_id} does not take all of the arguments {env_kwargs}: {error}") from error
    venv = VecMonitor(venv)
    return VecFrameStack(venv, frame_stack) if frame_stack > 1 else venv


def train(arguments: argparse.Namespace) -> int:
    """FA-GRPO from a cloned policy; resumes from the newest checkpoint in ``--out``."""
    from prophet_gym.envs.models import checkpoint_path
    from prophet_gym.run_folder import claim, weights_checksum

    names = ("suite", "max_chunks", "dtype", "world_model", "reward_model", "reward_type", "threshold", "start_states")
    given = {name: getattr(arguments, name) for name in names}
    env_kwargs: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.no_video:
        env_kwargs["video"] = False
    if arguments.task is not None:
        env_kwargs["task"] = int(arguments.task) if arguments.task.isdigit() else arguments.task
    evaluations = _evaluations(arguments, env_kwargs)
    env = make_vec_env(arguments.env, arguments.num_envs, arguments.frame_stack, env_kwargs)
    if not isinstance(env.action_space, spaces.Box):
        raise ValueError(f"{arguments.env} has the action space {env.action_space}; a flow policy needs a Box")
    settings = {
        "learning_rate": arguments.learning_rate,
        "group_size": arguments.group_size,
        "batch_size": arguments.batch_size,
        "n_epochs": arguments.epochs,
        "advantage_eps": arguments.advantage_eps,
        "ratio": arguments.ratio,
        "flow_scale": arguments.flow_scale,
        "flow_scale_placement": arguments.flow_scale_placement,
        "noise_level": arguments.noise_level,
        "sde_window": arguments.sde_window,
        "kl_coef": arguments.kl_coef,
        "target_kl": arguments.target_kl,
        "ema_decay": arguments.ema_decay,
        "seed": arguments.seed,
    }
    policy = FlowPolicy.from_safetensors(checkpoint_path(arguments.policy))
    run = {"env": arguments.env, "num_envs": arguments.num_envs, "frame_stack": arguments.frame_stack}
    run |= env_kwargs | {"policy": weights_checksum(policy)} | settings
    checkpoints = sorted(arguments.out.glob("checkpoint_*_steps.zip"), key=lambda path: int(path.stem.split("_")[1]))
    claim(arguments.out, **run)
    if checkpoints:
        print(f"Resuming from {checkpoints[-1]}")
        model = FAGRPO.load(checkpoints[-1], env=env, device=arguments.device)
    else:
        model = FAGRPO(
            policy,
            env,
            **settings,
            tensorboard_log=str(arguments.out / "tensorboard"),
            verbose=1,
            device=arguments.device,
        )
    remaining = arguments.steps - model.num_timesteps
    if remaining > 0:
        every = max(1, arguments.checkpoint_every // arguments.num_envs)
        callbacks = [CheckpointCallback(every, str(arguments.out), name_prefix="checkpoint"), *evaluations]
        model.learn(remaining, callbacks, reset_num_timesteps=not checkpoints, progress_bar=not arguments.quiet)
        model.save(arguments.out / f"checkpoint_{model.num_timesteps}_steps")  # from which more --steps go on
    (model.average_policy or model.policy).export_safetensors(arguments.out)
    print(f"Policy written to {arguments.out}")
    env.close()
    return 0


def _evaluations(arguments: argparse.Namespace, env_kwargs: dict[str, Any]) -> list[BaseCallback]:
    """With --held-out: the policy evaluated in that Prophet, and in the one that rewards it, to compare.

    :raises ValueError: the policy is not trained on the motion alone of a Prophet
    :raises FileNotFoundError: no such Prophet
    """
    if arguments.held_out is None:
        return []
    if not (arguments.no_video and arguments.env.split(":")[-1].startswith("Prophet")) or arguments.frame_stack > 1:
        raise ValueError("--held-out is for policies on Prophet's motion alone: with --no-video, without --frame-stack")
    from prophet_gym.envs.models import load_world_model
    from prophet_gym.evaluation.eval_callback import ProphetEvalCallback

    load_world_model(arguments.held_out)
    shared = {name: value for name, value in env_kwargs.items() if name not in ("threshold", "reward_type")}
    shared["every"] = arguments.held_out_every
    return [
        ProphetEvalCallback("held_out", **shared | {"world_model": arguments.held_out}),
        ProphetEvalCallback("rewarding", **shared),
    ]


def average(arguments: argparse.Namespace) -> int:
    """Average the weights of policies, each a folder, a shipped one's name or a checkpoint."""
    from prophet_gym.envs.models import checkpoint_path

    policies = []
    for policy in arguments.policies:
        if policy.endswith(".zip"):
            model = FAGRPO.load(policy, device="cpu")
            policies.append(model.average_policy or model.policy)
        else:
            policies.append(FlowPolicy.from_safetensors(checkpoint_path(policy)))
    average_policies(policies).export_safetensors(arguments.out)
    print(f"Policy written to {arguments.out}")
    return 0


class _DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Without the default None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    formatter = _DefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="fagrpo", description="Train flow-head policies: imitation, then FA-GRPO.")
    commands = parser.add_subparsers(dest="command", required=True)

    clone = commands.add_parser("sft", help="clone recorded demonstrations", formatter_class=formatter)
    clone.add_argument("data", type=Path, nargs="+", help="data sets in the LeRobot format, as `prophet record` writes")
    clone.add_argument("--out", type=Path, required=True, help="folder for policy, TensorBoard and training state")
    clone.add_argument(
        "--kind",
        nargs="+",
        default=["clean"],
        help="of episodes to imitate, where they succeed: clean, noisy, counterfactual, policy",
    )
    clone.add_argument("--episodes", type=positive_int, help="use at most this many episodes of each data set")
    clone.add_argument("--updates", type=positive_int, default=5000, help="optimiser steps")
    clone.add_argument("--max-seconds", type=float, help="stop after this wall-clock time")
    clone.add_argument("--batch-size", type=positive_int, default=64, help="chunks of an optimiser step")
    clone.add_argument("--learning-rate", type=float, default=1e-3, help="peak of the schedule")
    clone.add_argument("--num-flow-steps", type=positive_int, default=10, help="from noise to an action")
    clone.add_argument("--frame-stack", type=positive_int, default=1, help="observations per input, for `train` alone")
    clone.add_argument("--blind", action="store_true", help="leave the image out (control)")
    clone.add_argument("--bfloat16", action="store_true", help="train under bfloat16 autocast")
    clone.add_argument("--seed", type=int, default=0, help="of weights and batches")
    clone.add_argument("--device", default="cpu", help="of torch")
    clone.set_defaults(run=sft)

    learn = commands.add_parser("train", help="post-train a policy with FA-GRPO", formatter_class=formatter)
    learn.add_argument("policy", help="folder written by `fagrpo sft`, or name of a shipped policy")
    learn.add_argument("--env", default="prophet_gym:Prophet-LIBERO-v0", help="Gymnasium id, or module:id")
    learn.add_argument("--out", type=Path, required=True, help="folder for checkpoints, TensorBoard and the policy")
    learn.add_argument("--suite", help="argument of the environment")
    learn.add_argument("--task", help="argument of the environment")
    learn.add_argument("--max-chunks", type=positive_int, help="argument of the environment: steps of an episode")
    learn.add_argument("--start-states", help="argument of Prophet's environments: table of starts of your own")
    learn.add_argument("--world-model", help="argument of Prophet's environments, name or folder")
    learn.add_argument("--reward-model", help="argument of Prophet's environments, name or folder")
    learn.add_argument("--reward-type", help="argument of Prophet's environments: sparse or probability")
    learn.add_argument("--threshold", help="argument of Prophet's environments: strict or balanced")
    learn.add_argument("--dtype", help="argument of the environment: bfloat16 is faster where the hardware has it")
    learn.add_argument(
        "--no-video", action="store_true", help="imagine the motion alone, for policies that need no image"
    )
    learn.add_argument("--num-envs", type=positive_int, default=64, help="episodes side by side")
    learn.add_argument("--frame-stack", type=positive_int, default=1, help="as in `fagrpo sft`")
    learn.add_argument("--steps", type=positive_int, default=50_000, help="environment steps in total")
    learn.add_argument(
        "--group-size", type=positive_int, default=8, help="episodes that share a start and are compared"
    )
    learn.add_argument("--batch-size", type=positive_int, default=256, help="actions of an optimiser step")
    learn.add_argument("--epochs", type=positive_int, default=2, help="how often each rollout is used")
    learn.add_argument("--learning-rate", type=float, default=1e-5, help="8e-5 with --sde-window 4 and --target-kl 0.1")
    learn.add_argument(
        "--advantage-eps",
        type=float,
        default=1e-6,
        help="added to the spread of a group's returns: 0.1 with --reward-type probability, whose small differences "
        "say little",
    )
    learn.add_argument("--ratio", choices=RATIOS, default="chunk", help="what one probability ratio is of")
    learn.add_argument("--flow-scale", choices=FLOW_SCALES, default="paper", help="weights of the flow steps")
    learn.add_argument("--flow-scale-placement", choices=PLACEMENTS, default="advantage", help="where they stand")
    learn.add_argument("--noise-level", type=float, default=0.5, help="a of the SDE: sigma = a sqrt(t / (1 - t))")
    learn.add_argument("--sde-window", type=positive_int, help="stochastic flow steps of each rollout; all by default")
    learn.add_argument("--kl-coef", type=float, default=0.0, help="weight of the KL divergence from the first policy")
    learn.add_argument("--target-kl", type=float, help="end an update beyond 1.5 times this approximate KL")
    learn.add_argument(
        "--ema-decay", type=float, default=0.0, help="of an average of the weights over updates, which is then written"
    )
    learn.add_argument(
        "--checkpoint-every", type=positive_int, default=10_000, help="environment steps between checkpoints"
    )
    learn.add_argument(
        "--held-out",
        help="name or folder of another Prophet, in which the policy is evaluated, as in the one that rewards it, to "
        "see whether it begins to exploit that one's errors; shipped: prophet-libero-held-out",
    )
    learn.add_argument(
        "--held-out-every", type=positive_int, default=25_000, help="environment steps between these evaluations"
    )
    learn.add_argument("--seed", type=int, default=0, help="of actions, starts and batches")
    learn.add_argument("--device", default="auto", help="of torch, for the policy")
    learn.add_argument("--quiet", action="store_true", help="no progress bar")
    learn.set_defaults(run=train)

    mean = commands.add_parser(
        "average",
        help="average the weights of policies that were post-trained from one: of seeds, or of checkpoints, their "
        "moving averages where they have them",
    )
    mean.add_argument(
        "policies", nargs="+", help="folders written by `fagrpo train`, its checkpoints, or shipped names"
    )
    mean.add_argument("--out", type=Path, required=True, help="folder for the policy")
    mean.set_defaults(run=average)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``fagrpo`` command; user mistakes end with a message instead of a traceback."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        if getattr(arguments, "device", "").startswith("cuda") and not torch.cuda.is_available():  # SB3 takes the CPU
            raise ValueError(f"--device {arguments.device}, but this torch finds no CUDA device")
        result: int = arguments.run(arguments)
        return result
    except (ValueError, OSError, ImportError, gym.error.Error) as error:
        print(f"fagrpo {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
