"""Success rate of a flow policy, in Prophet and in the real LIBERO, from the same starts.

python examples/evaluate_policy.py --simulator libero --split val --repeats 2
python examples/evaluate_policy.py --policy expert

A policy in another Prophet than the one that rewarded it (a check, and no substitute for the real simulator):

python examples/evaluate_policy.py --policy runs/rl --world-model prophet-libero-held-out --no-video --deterministic
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from fagrpo import FlowPolicy
from prophet_gym.data.episode import SPLITS
from prophet_gym.envs.models import checkpoint_path
from prophet_gym.envs.start_states import load_start_states
from prophet_gym.evaluation.policy_success import (
    evaluate_expert,
    evaluate_in_libero,
    evaluate_in_prophet,
    starts_of,
)
from prophet_gym.simulators.experts import EXPERT_TASKS
from prophet_gym.simulators.suites import SUITES

SIMULATORS = {"prophet": evaluate_in_prophet, "libero": evaluate_in_libero}


def main() -> None:
    """Evaluate, print, and write a JSON line if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policy",
        default="flow-policy-libero",
        help="name of a shipped policy, folder of another, or 'expert' for the script in the real simulator",
    )
    parser.add_argument("--simulator", choices=SIMULATORS, default="prophet")
    parser.add_argument("--world-model", help="of Prophet: name or folder")
    parser.add_argument("--reward-model", help="of Prophet: name or folder")
    parser.add_argument("--start-states", help="table of starts of your own; the real simulator begins there too")
    parser.add_argument("--no-video", action="store_true", help="Prophet's motion alone, for policies without an image")
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument(
        "--repeats", type=int, help="episodes per start, whose noise differs; 2 by default, and 1 with --deterministic"
    )
    parser.add_argument("--deterministic", action="store_true", help="no noise in the actions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="append the outcome of every episode to this file")
    arguments = parser.parse_args()
    names = ("world_model", "reward_model")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.no_video:
        options["video"] = False
    if options and (arguments.simulator != "prophet" or arguments.policy == "expert"):
        parser.error("--world-model, --reward-model and --no-video belong to Prophet: leave them out here.")

    torch.manual_seed(arguments.seed)
    if arguments.repeats is None:  # a deterministic policy does the same again
        arguments.repeats = 1 if arguments.deterministic else 2
    expert, tasks = arguments.policy == "expert", range(10)
    if expert:
        scripted = [suite for suite in EXPERT_TASKS if "clean" in SUITES[suite].recipes]  # in libero_90 they only play
        if arguments.suite not in scripted:
            parser.error(f"no script solves tasks of {arguments.suite!r}: choose one of {', '.join(scripted)}")
        arguments.simulator, tasks = "libero", EXPERT_TASKS[arguments.suite]
    starts = starts_of(tasks, SPLITS[arguments.split], arguments.repeats)
    if arguments.start_states:
        table = load_start_states(arguments.start_states)
        starts = np.repeat(table.pairs(arguments.suite, arguments.split), arguments.repeats, axis=0)
        if arguments.simulator == "prophet":
            options["start_states"] = arguments.start_states
    if expert:
        result = evaluate_expert(arguments.suite, starts, split=arguments.split, seed=arguments.seed)
    else:
        result = SIMULATORS[arguments.simulator](
            FlowPolicy.from_safetensors(checkpoint_path(arguments.policy)),
            arguments.suite,
            starts,
            split=arguments.split,
            seed=arguments.seed,
            deterministic=arguments.deterministic,
            **options,
        )
    print(f"{arguments.policy} in {arguments.simulator}, {arguments.suite} {arguments.split}: {result}")
    if arguments.out:
        record = vars(arguments) | {"success": result.success.tolist(), "task": result.task.tolist()}
        if result.probability is not None:
            record["probability"] = result.probability.tolist()
        with arguments.out.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")


if __name__ == "__main__":
    main()
