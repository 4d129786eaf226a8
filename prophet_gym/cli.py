"""`prophet record | train | adapt | train-reward | evaluate`: thin layers over the functions of the same names."""

import argparse
import logging
import sys
from collections.abc import Sequence

PRESETS = ("tiny", "brief", "base", "cosmos-2b", "debug")
RECIPES = ("adapt", "extend", "motion", "refine", "video", "debug")


def _record(arguments: argparse.Namespace) -> None:
    from prophet_gym.data.episode import Planner, Policy
    from prophet_gym.simulators.experts import RandomMotion
    from prophet_gym.simulators.recording import looks_at_image, record

    policy: Policy | None = None
    planner: Planner | None = None
    if arguments.policy == "random":
        policy = RandomMotion()
    elif arguments.policy is not None:
        from fagrpo import FlowPolicy
        from prophet_gym.envs.models import checkpoint_path

        policy = FlowPolicy.from_safetensors(checkpoint_path(arguments.policy))
    if arguments.world_model is not None:
        from prophet_gym.envs.models import load_world_model
        from prophet_gym.world_model.imagination import RehearsedPolicy

        if policy is None:
            raise ValueError("--world-model is where a policy acts before its actions are replayed: give --policy.")
        pipeline = load_world_model(arguments.world_model, "cpu")
        if looks := looks_at_image(policy):
            pipeline.require_video()
        planner = RehearsedPolicy(pipeline, policy, looks)
    record(
        arguments.suite,
        arguments.episodes,
        arguments.out,
        seed=arguments.seed,
        workers=arguments.workers,
        policy=planner or policy,
        split=arguments.split,
        video=not arguments.no_video,
        recipe=arguments.recipe,
    )


def _train(arguments: argparse.Namespace) -> None:
    from prophet_gym.data.camera import camera_projections
    from prophet_gym.data.clips import load_arrays
    from prophet_gym.data.lerobot_format import EpisodeDataset
    from prophet_gym.world_model.training import check_preset, train

    check_preset(arguments.preset, arguments.pretrained)  # before the data are loaded
    datasets = [EpisodeDataset(path) for path in arguments.data]
    train(
        load_arrays(datasets, "train", episodes=arguments.episodes, seed=arguments.seed),
        load_arrays(datasets, "val"),
        arguments.out,
        preset=arguments.preset,
        seed=arguments.seed,
        device=arguments.device,
        cameras=camera_projections(datasets),
        pretrained=arguments.pretrained,
        action_streams=arguments.action_streams,
    )


def _adapt(arguments: argparse.Namespace) -> None:
    import copy
    from functools import partial

    from prophet_gym.data.camera import camera_projections
    from prophet_gym.data.clips import load_arrays
    from prophet_gym.data.lerobot_format import EpisodeDataset
    from prophet_gym.envs.models import load_world_model
    from prophet_gym.world_model.adaptation import adapt, check_recipe, needs_video

    check_recipe(arguments.recipe, arguments.lora_rank, arguments.members)  # before the data are loaded
    datasets = [EpisodeDataset(path) for path in arguments.data]
    pipeline = copy.deepcopy(load_world_model(arguments.checkpoint, "cpu"))
    if video := needs_video(arguments.recipe):
        pipeline.require_video()
    load = partial(load_arrays, datasets, video=video, num_arms=pipeline.num_arms)
    episodes = arguments.episodes
    if episodes is None and arguments.recipe in ("adapt", "debug"):
        episodes = 20
    adapt(
        pipeline,
        load("train", episodes=episodes, seed=arguments.seed),
        load("val"),
        arguments.out,
        recipe=arguments.recipe,
        lora_rank=arguments.lora_rank,
        num_members=arguments.members,
        seed=arguments.seed,
        device=arguments.device,
        cameras=camera_projections(datasets),
    )


def _train_reward(arguments: argparse.Namespace) -> None:
    from functools import partial
    from pathlib import Path

    from prophet_gym.data.camera import camera_projections
    from prophet_gym.data.clips import concatenate, load_arrays, without_pictures
    from prophet_gym.data.lerobot_format import EpisodeDataset
    from prophet_gym.envs.models import load_reward_model, load_world_model
    from prophet_gym.reward.training import check_episodes, train_success_classifier
    from prophet_gym.run_folder import weights_checksum
    from prophet_gym.world_model.imagination import imagine_episodes, imagine_motions

    init = None if arguments.init is None else load_reward_model(arguments.init, arguments.device)
    datasets = [EpisodeDataset(path) for path in arguments.data]
    more = [EpisodeDataset(path) for path in arguments.motion]
    pipeline = None if arguments.world_model is None else load_world_model(arguments.world_model, arguments.device)
    if pipeline is not None:
        pipeline.require_video()
    arms = max(dataset.num_arms for dataset in datasets + more) if pipeline is None else pipeline.num_arms
    load = partial(load_arrays, num_arms=arms)
    train, val = load(datasets, "train"), load(datasets, "val")
    check_episodes(train, val)  # before anything is imagined
    recorded = [train]
    if more:
        recorded.append(load(more, "train", video=False))
    motion = [without_pictures(arrays) for arrays in recorded]
    origin = {"recorded": [arrays.checksum() for arrays in (*recorded, val)], "imagined": arguments.imagined}
    if pipeline is not None:
        origin["world_model"] = weights_checksum(pipeline.vae, pipeline.transformer, pipeline.proprioception)
    finished = (Path(arguments.out) / "reward").exists()  # it is that run's, or refused: nothing to imagine
    if pipeline is not None and not finished:
        motion += [imagine_motions(pipeline, arrays) for arrays in recorded]
        imagined, val = (
            imagine_episodes(pipeline, arrays, arguments.imagined, arguments.seed) for arrays in (train, val)
        )
        del recorded  # or its frames would be there twice
        train = concatenate([train, imagined])
    train_success_classifier(
        train,
        val,
        arguments.out,
        motion_arrays=concatenate(motion),
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        device=arguments.device,
        init=init,
        cameras=camera_projections(datasets + more),
        max_false_success_rate=arguments.max_false_success_rate,
        origin=origin,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from prophet_gym.evaluation.agreement import evaluate

    evaluate(
        arguments.checkpoint,
        arguments.data,
        arguments.report,
        reward_model=arguments.reward_model,
        splits=arguments.split,
        episodes=arguments.episodes,
        seed=arguments.seed,
        device=arguments.device,
    )


def positive_int(text: str) -> int:
    """A number of something, at least one; the name is what the parser calls it."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def rate(text: str) -> float:
    """A share of something, in [0, 1)."""
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {number}")
    return number


class _DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Without the default None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the `prophet` command."""
    formatter = _DefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="prophet", description="Record, train and evaluate learned robot simulators.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    record = commands.add_parser(
        "record", help="record episodes of a real simulator as a LeRobot v3 data set", formatter_class=formatter
    )
    record.add_argument(
        "--suite",
        required=True,
        help="libero_object, libero_spatial, libero_goal, libero_10, libero_90, metaworld, fetch or two_arm_lift",
    )
    record.add_argument("--episodes", type=positive_int, default=500, help="of all tasks in turn")
    record.add_argument("--out", required=True, help="folder of the data set; the same command resumes a killed run")
    record.add_argument("--seed", type=int, default=0, help="of the whole recording")
    record.add_argument(
        "--workers", type=positive_int, default=None, help="processes, of up to 2.5 GB; without it one for each core"
    )
    record.add_argument(
        "--policy",
        default=None,
        help="who acts in place of the scripts: name of a shipped policy, folder of another, or 'random'",
    )
    record.add_argument(
        "--world-model",
        default=None,
        help="the policy acts in this Prophet, and what it did there is replayed: name of a shipped one, or a folder",
    )
    record.add_argument(
        "--recipe",
        default=None,
        help="how the scripts act in all episodes: clean, light, medium, heavy (disturbed) or play (in LIBERO: any "
        "object is put on any other); otherwise the suite's mixture",
    )
    record.add_argument(
        "--split", default=None, choices=("train", "val", "test"), help="of all episodes; otherwise 80, 10 and 10%%"
    )
    record.add_argument(
        "--no-video", action="store_true", help="render first frames alone: for the motion of Prophet and its judge"
    )
    record.set_defaults(run=_record)

    train = commands.add_parser(
        "train", help="train Prophet on data sets; the same command resumes a killed run", formatter_class=formatter
    )
    train.add_argument("data", nargs="+", help="folders written by `prophet record`")
    train.add_argument(
        "--preset",
        default="tiny",
        choices=PRESETS,
        help="tiny (embedded, CPU), brief (tiny, for as many steps as `adapt`), base (130M weights, one "
        "GPU), cosmos-2b (needs --pretrained) or debug (seconds)",
    )
    train.add_argument(
        "--episodes", type=positive_int, default=None, help="at most this many training episodes, in all"
    )
    train.add_argument("--pretrained", default=None, help="folder of Cosmos-Predict2-2B-Video2World, diffusers' format")
    train.add_argument(
        "--action-streams",
        default="both",
        choices=("both", "scalars", "frames"),
        help="how the transformer sees the actions: both, scalars (no camera is used at all) or frames",
    )
    train.add_argument("--out", required=True, help="folder for checkpoints, TensorBoard and the pipeline")
    train.add_argument("--seed", type=int, default=0, help="of weights and batches")
    train.add_argument("--device", default="cpu", help="of torch: auto, cpu, cuda ...")
    train.set_defaults(run=_train)

    adapt = commands.add_parser(
        "adapt", help="adapt Prophet to a new suite or robot; the same command resumes", formatter_class=formatter
    )
    adapt.add_argument("checkpoint", help="folder of a pipeline, or the name of a shipped one; it stays as it is")
    adapt.add_argument("data", nargs="+", help="folders written by `prophet record`")
    adapt.add_argument(
        "--episodes",
        type=positive_int,
        default=None,
        help="at most this many training episodes, in all; 20 by default with --recipe adapt or debug, else all",
    )
    adapt.add_argument(
        "--lora-rank", type=positive_int, default=None, help="train low-rank adapters of the transformer alone"
    )
    adapt.add_argument(
        "--recipe",
        default="adapt",
        choices=RECIPES,
        help="adapt; refine, the motion alone (hundreds of episodes); extend, video (a GPU), or motion, which begins "
        "anew (many episodes); debug (seconds)",
    )
    adapt.add_argument("--members", type=positive_int, default=None, help="of the proprioception, with --recipe motion")
    adapt.add_argument("--out", required=True, help="folder for checkpoints, TensorBoard and the pipeline")
    adapt.add_argument("--seed", type=int, default=0, help="of episodes and batches")
    adapt.add_argument("--device", default="cpu", help="of torch: auto, cpu, cuda ...")
    adapt.set_defaults(run=_adapt)

    reward = commands.add_parser(
        "train-reward", help="train and calibrate the success classifier", formatter_class=formatter
    )
    reward.add_argument("data", nargs="+", help="folders written by `prophet record`")
    reward.add_argument("--out", required=True, help="folder for checkpoints, TensorBoard and the judge")
    reward.add_argument("--steps", type=positive_int, default=3000, help="optimiser steps")
    reward.add_argument("--learning-rate", type=float, default=1e-3, help="peak of the schedule")
    reward.add_argument("--init", default=None, help="a classifier to begin from, folder or shipped name")
    reward.add_argument(
        "--world-model",
        default=None,
        help="train on its imagination too, and calibrate there alone: it is what an environment shows",
    )
    reward.add_argument(
        "--motion", nargs="+", default=[], help="data sets from which the motion alone learns, recorded without video"
    )
    reward.add_argument("--max-false-success-rate", type=rate, default=0.05, help="of failed validation episodes")
    reward.add_argument(
        "--imagined", type=positive_int, default=400, help="at most this many imagined episodes of each split"
    )
    reward.add_argument("--seed", type=int, default=0, help="of weights and batches")
    reward.add_argument("--device", default="cpu", help="of torch: auto, cpu, cuda ...")
    reward.set_defaults(run=_train_reward)

    evaluate = commands.add_parser(
        "evaluate", help="video metrics and agreement of imagined with real outcomes", formatter_class=formatter
    )
    evaluate.add_argument("checkpoint", help="folder of a pipeline, or the name of a shipped one")
    evaluate.add_argument("data", nargs="+", help="folders written by `prophet record`")
    evaluate.add_argument("--report", required=True, help="folder for results.json, plots and contact sheets")
    evaluate.add_argument("--reward-model", default="reward-libero", help="folder, or the name of a shipped one")
    evaluate.add_argument("--split", nargs="+", default=["val"], choices=("val", "test"), help="one, or both together")
    evaluate.add_argument("--episodes", type=positive_int, default=None, help="at most this many of each suite")
    evaluate.add_argument("--seed", type=int, default=0, help="of the episodes drawn and of the world model's noise")
    evaluate.add_argument("--device", default="auto", help="of torch: auto, cpu, cuda ...")
    evaluate.set_defaults(run=_evaluate)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `prophet` command; user mistakes end with a message instead of a traceback, and 2."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # six lines for each checkpoint
    arguments = build_parser().parse_args(argv)
    try:
        if "device" in arguments:
            from prophet_gym.envs.models import resolve_device

            arguments.device = resolve_device(arguments.device)  # before the data are loaded
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"prophet {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = " The same command resumes." if arguments.command != "evaluate" else ""
        print(f"prophet {arguments.command}: stopped.{resumes}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # torchrun --nproc_per_node 2 -m prophet_gym.cli train ...
    sys.exit(main())
