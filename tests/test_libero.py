"""The real simulator: LIBERO-v0 against the contract, against stock robosuite, and the expert in it."""

import builtins
import importlib.util
import os
import subprocess
import sys
import time
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from fagrpo import FlowPolicy
from prophet_gym import WEIGHTS
from prophet_gym.cli import main
from prophet_gym.data.episode import SPLITS
from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.envs.models import load_world_model
from prophet_gym.envs.start_states import instruction_embedding, load_start_states
from prophet_gym.simulators import libero as libero_module
from prophet_gym.simulators.libero import LiberoEnv, task_number
from prophet_gym.simulators.recording import record
from prophet_gym.world_model.imagination import RehearsedPolicy

pytestmark = pytest.mark.libero
NO_OP = np.tile(np.array([0, 0, 0, 0, 0, 0, -1], np.float32), (8, 1))


@pytest.fixture(scope="module", autouse=True)
def needs_libero():
    pytest.importorskip("libero", reason="LIBERO is not installed")


@pytest.fixture(scope="module")
def env():
    env = LiberoEnv(suite="libero_object", task=0, split="val", max_chunks=20, render_mode="rgb_array")
    yield env
    env.close()


def test_frames_without_a_display_where_mujoco_was_imported_before():
    code = (
        "import mujoco\n"
        "from prophet_gym.simulators.libero import load_simulation\n"
        "assert load_simulation('libero_object', 0, 96).render().std() > 10"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


def test_gymnasium_contract(env):
    check_env(env, skip_render_check=True, skip_close_check=True)


def test_reset_and_step_follow_the_contract(env):
    observation, info = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    assert info["instruction"] == "pick up the alphabet soup and place it in the basket"
    assert (info["suite"], info["task"], info["seed"]) == ("libero_object", 0, 3)
    assert info["init_state"] in SPLITS["val"] and "frames" not in info
    observation, reward, terminated, truncated, info = env.step(NO_OP)
    assert env.observation_space.contains(observation)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["frames"].shape == (2, 96, 96, 3) and info["frames"].dtype == np.uint8
    assert np.array_equal(info["frames"][-1], observation["image"])
    assert np.array_equal(env.render(), observation["image"])
    assert info["is_success"] is False and info["success_probability"] == 0.0


@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial"])
def test_episodes_begin_as_the_shipped_start_states_show(suite):
    """Prophet, its judge and the policy learned from such pictures; another MuJoCo may light the scene otherwise."""
    shipped = load_start_states().draw(np.random.default_rng(0), suite=suite, split="val", task=2, init_state=41)
    env = LiberoEnv(suite=suite, task=2, split="val", max_chunks=1)
    observation, _ = env.reset(options={"init_state": 41})
    env.close()
    assert np.abs(observation["image"].astype(int) - shipped.image).mean() < 3  # of 255; 35 under MuJoCo 3.3.0
    np.testing.assert_allclose(observation["proprio"], shipped.proprio, atol=1e-3)


def test_same_seed_and_actions_give_the_same_video(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 8, 7)).astype(np.float32)
    videos = []
    for _ in range(2):
        env.reset(seed=11)
        videos.append([env.step(action)[0] for action in actions])
    for first, again in zip(*videos, strict=True):
        assert np.array_equal(first["image"], again["image"])
        assert np.array_equal(first["proprio"], again["proprio"])


def test_picture_is_upright_and_the_arm_follows_the_action(env):
    """A motion to the robot's left (+y) moves the arm to the right of the agentview picture."""
    env.reset(options={"init_state": 40})
    before = env.simulation.eef_position
    action = NO_OP.copy()
    action[:, 1] = 1.0
    frames = [env.step(action)[4]["frames"][-1] for _ in range(2)]
    moved = env.simulation.eef_position - before
    assert moved[1] > 0.1 and abs(moved[0]) < 0.03
    still = env.reset(options={"init_state": 40})[0]["image"].astype(float)
    change = np.abs(frames[-1].astype(float) - still).sum(axis=2)
    gained = change[:48] > 60  # the arm is in the upper half of an upright picture
    assert gained.sum() > 30 and gained.sum() > (change[70:] > 60).sum()
    assert np.flatnonzero(gained.any(axis=0)).max() > 55


def test_camera_projects_the_hand_to_where_it_is_seen(env):
    env.reset(options={"init_state": 41})
    camera = {name: np.array(value) for name, value in env.simulation.camera().items()}
    world = np.append(env.simulation.eef_position, 1.0)
    x, y, depth = camera["intrinsics"] @ (np.linalg.inv(camera["extrinsics"]) @ world)[:3]
    assert depth > 0.3
    assert 35 < x / depth < 61  # the arm begins in the middle
    assert 5 < y / depth < 48


def test_truncation_and_the_need_to_reset():
    env = LiberoEnv(suite="libero_object", task=0, max_chunks=2)
    with pytest.raises(ResetNeeded):
        env.step(NO_OP)
    env.reset(seed=0)
    assert env.step(NO_OP)[3] is False
    assert env.step(NO_OP)[3] is True
    with pytest.raises(ResetNeeded):
        env.step(NO_OP)
    env.close()


@pytest.mark.parametrize(
    "action",
    [np.zeros((8, 6)), np.full((8, 7), 1.1), np.full((8, 7), np.nan), np.zeros(7), np.array([["a"] * 7] * 8)],
)
def test_wrong_actions_raise(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="ction"):
        env.step(action)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_objects"}, "libero_spatial"),
        ({"task": 10}, "pick_up_the_milk"),
        ({"task": "pick_up"}, "pick_up_the_milk"),
        ({"split": "training"}, "train"),
        ({"max_chunks": 0}, "max_chunks"),
        ({"render_mode": "human"}, "rgb_array"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiberoEnv(**arguments)


@pytest.mark.parametrize(
    ("options", "message"), [({"init_state": 3}, "other splits|Other"), ({"group": 2}, "Valid options")]
)
def test_wrong_options_raise(env, options, message):
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_tasks_by_name():
    assert task_number("libero_object", "pick_up_the_milk_and_place_it_in_the_basket") == 7


def test_missing_libero_names_the_extra(monkeypatch):
    real = importlib.util.find_spec
    without = {"libero": None}
    monkeypatch.setattr(libero_module.importlib.util, "find_spec", lambda name: without.get(name, name) and real(name))
    with pytest.raises(ImportError, match=r'pip install "prophet-gym\[libero\]"'):
        LiberoEnv()


def test_missing_opengl_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def broken(name, *arguments, **keywords):
        if name == "prophet_gym.simulators" and "libero_simulation" in (arguments[2] or ()):
            raise OSError("libEGL.so not found")
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "prophet_gym.simulators.libero_simulation", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match="libegl1"):
        LiberoEnv()


def test_physics_equals_stock_robosuite(env):
    """Our stepping computes the dynamics once a substep, robosuite three times; the trajectories must agree."""
    env.reset(options={"init_state": 40})
    ours = env.simulation
    rng = np.random.default_rng(0)
    actions = np.clip(np.cumsum(rng.normal(0, 0.15, (40, 7)), axis=0), -1, 1)
    actions[:, 6] = np.sign(actions[:, 6])
    ours.set_state(ours.init_states[40])
    mine = []
    for action in actions:
        ours.step(action)
        mine.append(ours.eef_position)
    stock = ours._env
    stock.reset()
    stock.set_init_state(ours.init_states[40])
    controller = stock.robots[0].controller
    controller.new_update = True  # else the first goal uses the home pose
    controller.update()
    controller.reset_goal()
    theirs = []
    for action in actions:
        stock.step(action)
        stock.sim.forward()
        theirs.append(ours.eef_position)
    assert np.abs(np.array(mine) - np.array(theirs)).max() < 1e-6  # m


def test_jitter_moves_objects_a_little_and_leaves_no_new_contact(env):
    env.reset(options={"init_state": 40})
    simulation = env.simulation
    before = {name: simulation.geometry(name).center for name in simulation.object_names}
    touching = simulation._touching()
    simulation.jitter_objects(0.03, np.random.default_rng(0))
    shifts = np.array([simulation.geometry(name).center - before[name] for name in simulation.object_names])
    assert (np.abs(shifts[:, :2]) <= 0.03 + 1e-9).all() and np.abs(shifts[:, :2]).max() > 0.01
    assert np.allclose(shifts[:, 2], 0.0)
    assert simulation._touching() <= touching


def test_clean_expert_succeeds_and_the_episode_is_recorded_whole(env):
    from prophet_gym.simulators.recording import COUNTERFACTUALS, EpisodePlan, record_episode

    env.reset(options={"init_state": 40})
    plan = EpisodePlan(index=0, task=0, split="val", init_state=40, recipe="clean", jitter=False, seed=1)
    episode = record_episode(env.simulation, plan)
    assert episode.outcome
    assert episode.frames.shape == (41, 96, 96, 3)
    assert episode.actions.shape == (40, 4, 7)
    again = record_episode(env.simulation, plan)
    assert np.array_equal(episode.actions, again.actions)
    assert np.array_equal(episode.frames, again.frames)
    blind = record_episode(env.simulation, plan, video=False)
    assert np.array_equal(blind.proprio, episode.proprio) and np.array_equal(blind.success, episode.success)
    assert (blind.frames == episode.frames[0]).all()
    for recipe in COUNTERFACTUALS:
        counterfactual = EpisodePlan(0, 0, "val", 40, recipe, False, 1)
        assert record_episode(env.simulation, counterfactual).kind == "counterfactual"


def test_a_policy_acts_in_the_place_of_the_scripts(env):
    """It is asked once per chunk, with what the environment would show it; its motion is disturbed, its grip is not."""
    from prophet_gym.simulators.recording import POLICY_NOISE, EpisodePlan, record_episode

    class Lift:
        def __init__(self):
            self.seen = []

        def predict(self, observation, *, deterministic=False):
            self.seen.append(observation)
            return np.tile(np.array([0, 0, 0.3, 0, 0, 0, 1], np.float32), (1, 8, 1)), None

    env.reset(options={"init_state": 40})
    policy = Lift()
    plan = EpisodePlan(index=0, task=0, split="val", init_state=40, recipe="policy", jitter=False, seed=1)
    episode = record_episode(env.simulation, plan, policy)
    assert episode.kind == "policy" and len(policy.seen) == 20
    for chunk, observation in enumerate(policy.seen):
        assert np.array_equal(observation["image"][0], episode.frames[2 * chunk])
        assert np.array_equal(observation["proprio"][0], episode.proprio[2 * chunk])
        assert observation["instruction"].shape == (1, 384)
    assert (episode.actions[..., 6] == 1).all()
    noise = episode.actions[..., :6] - np.array([0, 0, 0.3, 0, 0, 0], np.float32)
    assert 0 < np.abs(noise).max() < 5 * POLICY_NOISE
    assert np.array_equal(record_episode(env.simulation, plan, policy).frames, episode.frames)


def test_a_script_plays_in_a_kitchen_whose_task_it_cannot_do():
    from prophet_gym.simulators.experts import NOISE_RECIPES, PickAndPlace
    from prophet_gym.simulators.recording import plan_episodes, record_episode
    from prophet_gym.simulators.suites import SUITES

    plan = plan_episodes("libero_90", 3, seed=0, split="train")[2]
    simulation = SUITES["libero_90"].load("libero_90", plan.task, 96)
    with pytest.raises(ValueError, match="the goals are"):
        PickAndPlace(simulation, NOISE_RECIPES["clean"], np.random.default_rng(0))
    episode = record_episode(simulation, plan, video=False)
    after = {name: simulation.geometry(name).center for name in simulation.object_names}
    simulation.reset(plan.init_state)
    moved = [name for name, place in after.items() if np.abs(simulation.geometry(name).center - place).max() > 0.05]
    assert moved and episode.suite == "libero_90" and episode.kind == "noisy" and len(episode.proprio) == 41
    again = record_episode(simulation, plan, video=False)
    assert np.array_equal(again.proprio, episode.proprio) and np.array_equal(again.actions, episode.actions)
    simulation.close()


@pytest.mark.parametrize(("suite", "task"), [("libero_spatial", 2), ("libero_goal", 4), ("libero_10", 0)])
def test_an_experts_actions_earn_reward_one(suite, task):
    from prophet_gym.simulators.experts import NOISE_RECIPES, PickAndPlace
    from prophet_gym.simulators.suites import SUITES

    steps = SUITES[suite].control_steps
    env = LiberoEnv(suite=suite, task=task, split="val", max_chunks=steps // 8)
    _, info = env.reset(seed=0, options={"init_state": 40})
    assert "SCENE" not in info["instruction"]
    expert = PickAndPlace(env.simulation, NOISE_RECIPES["clean"], np.random.default_rng(0))
    actions = []
    for _ in range(steps):
        actions.append(expert.act())
        env.simulation.step(actions[-1].astype(float))
    env.reset(options={"init_state": 40})
    for chunk in np.array(actions).reshape(-1, 8, 7):
        _, reward, terminated, truncated, info = env.step(chunk)
        if terminated or truncated:
            break
    assert terminated and reward == 1.0 and info["is_success"] is True and not truncated
    env.close()


def test_success_of_the_expert_and_of_a_policy_that_does_nothing():
    from prophet_gym.evaluation.policy_success import evaluate_expert, evaluate_in_libero, starts_of

    starts = starts_of([0], [40, 41])
    expert = evaluate_expert("libero_object", starts, workers=1)
    assert expert.success.all() and expert.videos[0].shape == (41, 96, 96, 3)
    idle = evaluate_in_libero(Idle(), "libero_object", starts, workers=1)
    assert not idle.success.any() and idle.init_state.tolist() == [40, 41]


class Idle:
    def predict(self, observation, *, deterministic=False):
        return np.repeat(NO_OP[None], len(observation["image"]), axis=0), None


class FailsOnTheSecondTask:
    """A policy that stands still, and fails once it is told of the second task and the first one has an episode."""

    def __init__(self, folder):
        self.folder = folder

    def predict(self, observation, deterministic=False):
        if not np.array_equal(observation["instruction"][0], embedding_of(0)):
            while not list(self.folder.rglob("*.parquet")):
                time.sleep(0.1)
            raise RuntimeError("no idea")
        return NO_OP[None], None


def embedding_of(task):
    start = load_start_states().draw(np.random.default_rng(0), suite="libero_object", split="val", task=task)
    return instruction_embedding(start.instruction)


def test_a_recording_that_fails_in_one_task_stops_says_so_and_another_policy_does_not_resume_it(tmp_path):
    out = tmp_path / "data"
    with pytest.raises(RuntimeError, match="no idea"):
        record("libero_object", 80, out, workers=2, policy=FailsOnTheSecondTask(out), video=False)
    assert not active_children(), "what still records would write beside the run that resumes"
    assert 1 <= len(list(out.rglob("*.parquet"))) < 8, "the first task's worker goes on to its last episode"
    with pytest.raises(ValueError, match="belongs to a run with policy FailsOnTheSecondTask"):
        record("libero_object", 2, out, workers=2, video=False)


def test_what_a_policy_did_in_prophet_is_replayed(tmp_path):
    """By the command line: policy and Prophet travel to the process that records."""
    facts = ["--suite", "libero_object", "--policy", "flow-policy-libero-40", "--split", "val", "--no-video"]
    command = ["record", *facts, "--episodes", "1", "--workers", "1", "--out", str(tmp_path / "data")]
    assert main([*command, "--world-model", "prophet-libero-tiny"]) == 0
    dataset = EpisodeDataset(tmp_path / "data")
    assert [(record.kind, record.split, record.length) for record in dataset.records] == [("rehearsed", "val", 41)]
    episode = dataset[0]
    acts = RehearsedPolicy(
        load_world_model("prophet-libero-tiny", "cpu"),
        FlowPolicy.from_safetensors(WEIGHTS / "flow-policy-libero-40"),
        video=False,
    )
    torch.manual_seed(episode.seed)
    start = (episode.suite, episode.frames[0], episode.proprio[0], episode.instruction)
    planned = acts.plan(*start, 160, episode.seed)
    np.testing.assert_allclose(episode.actions.reshape(160, 7), planned, atol=1e-4)
