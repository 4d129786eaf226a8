"""Scripted experts, noise and the recording plan, without a simulator."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from prophet_gym.data.episode import SEED_SPLITS, SPLITS
from prophet_gym.data.instructions import TABLE
from prophet_gym.data.lerobot_format import EpisodeRecord
from prophet_gym.simulators import fetch, loading, metaworld, prepare_opengl, two_arm
from prophet_gym.simulators.experts import EXPERT_TASKS, NOISE_RECIPES, NOISE_SHARES, NoiseRecipe, PickAndPlace
from prophet_gym.simulators.experts.fetch_scripts import PickAndPlaceCube, PushCube, Reach
from prophet_gym.simulators.experts.grasp_planning import bottom, highest_under, plan_grasp, top
from prophet_gym.simulators.experts.noise import ActionNoise, RandomMotion, point_in_disc
from prophet_gym.simulators.experts.rehearsal import Rehearsal, Rehearsed, disturbed
from prophet_gym.simulators.hand_pose import DOWNWARD_X, multiply, proprioception
from prophet_gym.simulators.recording import EpisodePlan, check_resumed, plan_episodes, record, record_episode
from prophet_gym.simulators.suites import SUITES

DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
NOTHING = (np.zeros((0, 3)), np.zeros((0, 3, 3)), np.zeros((0, 3)))


@dataclass
class Box:
    center: np.ndarray
    size: np.ndarray
    rotation: np.ndarray = field(default_factory=lambda: np.eye(3))


@dataclass
class KinematicScene:
    """A hand that moves a third of the way to each goal, and a box that it carries while closed around it."""

    objects: dict[str, Box]
    goals: list[tuple[str, ...]] = field(default_factory=lambda: [("in", "can_1", "basket_1_contain_region")])
    eef_position: np.ndarray = field(default_factory=lambda: np.array([-0.15, 0.0, 0.25]))
    eef_rotation: np.ndarray = field(default_factory=lambda: DOWN.copy())
    held: str | None = None
    surfaces: dict[str, Box] = field(default_factory=dict)

    @property
    def object_names(self):
        return list(self.objects)

    @property
    def surface_names(self):
        return list(self.surfaces)

    def geometry(self, name):
        return (self.objects | self.surfaces)[name]

    def obstacles(self, exclude):
        others = [box for name, box in self.objects.items() if name != exclude]
        return (
            np.array([box.center for box in others]),
            np.array([box.rotation for box in others]),
            np.array([box.size / 2 for box in others]),
        )

    def step(self, action):
        motion = 0.3 * 0.05 * action[:3].astype(float)
        self.eef_position = self.eef_position + motion
        if action[6] > 0 and self.held is None:
            near = [n for n, box in self.objects.items() if np.abs(self.eef_position - box.center).max() < 0.04]
            self.held = near[0] if near else None
        if action[6] < 0 and self.held is not None:
            box = self.objects[self.held]
            box.center = np.array([*box.center[:2], box.size[2] / 2])
            self.held = None
        if self.held is not None:
            self.objects[self.held].center = self.objects[self.held].center + motion


def make_scene():
    return KinematicScene(
        {
            "can_1": Box(np.array([-0.1, -0.2, 0.04]), np.array([0.06, 0.06, 0.08])),
            "milk_1": Box(np.array([0.1, -0.2, 0.065]), np.array([0.05, 0.05, 0.13])),
            "basket_1": Box(np.array([0.0, 0.25, 0.07]), np.array([0.15, 0.15, 0.14])),
        }
    )


def run(scene, recipe, seed=0, steps=160):
    expert = PickAndPlace(scene, recipe, np.random.default_rng(seed))
    actions = []
    for _ in range(steps):
        actions.append(expert.act())
        scene.step(actions[-1])
    return np.array(actions), expert


def test_clean_expert_puts_the_object_in_the_basket():
    scene = make_scene()
    actions, expert = run(scene, NOISE_RECIPES["clean"])
    assert expert.finished
    assert np.abs(scene.objects["can_1"].center[:2] - scene.objects["basket_1"].center[:2]).max() < 0.03
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1.0
    assert set(np.unique(actions[:, 6])) == {-1.0, 1.0}


def test_a_surface_is_a_place_too():
    scene = make_scene()
    scene.surfaces["cabinet_1_top_side"] = Box(np.array([0.05, 0.15, 0.2]), np.array([0.2, 0.2, 0.004]))
    scene.goals = [("on", "can_1", "cabinet_1_top_side")]
    run(scene, NOISE_RECIPES["clean"])
    assert np.abs(scene.objects["can_1"].center[:2] - [0.05, 0.15]).max() < 0.03


def test_two_goals_are_met_one_after_the_other():
    scene = make_scene()
    scene.goals = [("in", "can_1", "basket_1_contain_region"), ("in", "milk_1", "basket_1_contain_region")]
    actions, expert = run(scene, NOISE_RECIPES["clean"], steps=320)
    assert expert.finished and (np.diff(actions[:, 6]) > 0).sum() == 2
    for name in ("can_1", "milk_1"):
        assert np.abs(scene.objects[name].center[:2] - scene.objects["basket_1"].center[:2]).max() < 0.03


def test_actions_do_not_depend_on_whether_the_object_was_grasped():
    """The leak: a failed grasp must not show in what the script does next."""
    scene, empty = make_scene(), make_scene()
    empty.step = (
        lambda action: setattr(  # type: ignore[method-assign]
            empty, "eef_position", empty.eef_position + 0.3 * 0.05 * action[:3].astype(float)
        )
    )
    with_grasp, _ = run(scene, NOISE_RECIPES["light"], seed=3)
    without, _ = run(empty, NOISE_RECIPES["light"], seed=3)
    assert np.array_equal(with_grasp, without)
    assert not np.allclose(scene.objects["can_1"].center, empty.objects["can_1"].center)


@pytest.mark.parametrize("name", NOISE_RECIPES)
def test_equal_seeds_give_equal_episodes(name):
    first, _ = run(make_scene(), NOISE_RECIPES[name], seed=5)
    again, _ = run(make_scene(), NOISE_RECIPES[name], seed=5)
    other, _ = run(make_scene(), NOISE_RECIPES[name], seed=6)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_wrong_object_is_the_one_moved():
    scene = make_scene()
    run(scene, NoiseRecipe(wrong_object=1.0))
    assert np.allclose(scene.objects["can_1"].center, [-0.1, -0.2, 0.04])
    assert scene.objects["milk_1"].center[1] > 0.2


def test_early_release_opens_the_fingers_on_the_way():
    actions, _ = run(make_scene(), NoiseRecipe(early_release=1.0))
    clean, _ = run(make_scene(), NoiseRecipe())
    assert (actions[:, 6] > 0).sum() < (clean[:, 6] > 0).sum()


def test_a_goal_that_is_no_pick_and_place_is_refused():
    scene = make_scene()
    scene.goals = [("in", "can_1", "basket_1_contain_region"), ("open", "cabinet_1_top_region")]
    with pytest.raises(ValueError, match="objects in or on others"):
        PickAndPlace(scene, NoiseRecipe(), np.random.default_rng(0))


@given(st.floats(-np.pi, np.pi), st.floats(0.03, 0.06), st.floats(0.09, 0.15))  # the long side does not fit the hand
@settings(max_examples=30)
def test_a_box_is_grasped_across_its_narrow_side(yaw, narrow, long):
    rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    box = Box(np.array([0.1, 0.2, 0.01]), np.array([narrow, long, 0.02]), rotation)
    grasp = plan_grasp(box, False, NOTHING, hand_angle=np.pi / 2)
    off = (grasp.angle - yaw + np.pi / 2) % np.pi - np.pi / 2
    assert abs(off) < np.deg2rad(16)
    assert np.allclose(grasp.position[:2], box.center[:2])
    assert grasp.position[2] >= 0.012


def test_a_bowl_is_grasped_at_its_rim_away_from_a_neighbour():
    bowl = Box(np.array([0.0, 0.0, 0.025]), np.array([0.1, 0.1, 0.05]))
    free = plan_grasp(bowl, True, NOTHING, hand_angle=np.pi / 2)
    assert np.isclose(np.linalg.norm(free.position[:2]), 0.046)
    wall = free.position[:2] / np.linalg.norm(free.position[:2]) * 0.075
    neighbour = (np.array([[*wall, 0.1]]), np.eye(3)[None], np.array([[0.02, 0.02, 0.1]]))
    moved = plan_grasp(bowl, True, neighbour, hand_angle=np.pi / 2)
    assert np.linalg.norm(moved.position[:2] - wall) > np.linalg.norm(free.position[:2] - wall)


def test_heights_of_a_tilted_box():
    quarter = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    box = Box(np.array([0.0, 0.0, 0.5]), np.array([0.1, 0.2, 0.4]), quarter)
    assert np.isclose(top(box), 0.6) and np.isclose(bottom(box), 0.4)


def test_play_ignores_the_task_and_moves_two_objects():
    moved, places = set(), set()
    for seed in range(12):
        scene = make_scene()
        scene.goals = [("open", "drawer_1")]  # no script could do that
        with pytest.raises(ValueError, match="puts objects in or on others"):
            PickAndPlace(scene, NOISE_RECIPES["light"], np.random.default_rng(seed))
        before = {name: box.center.copy() for name, box in scene.objects.items()}
        actions, _ = run(scene, NoiseRecipe(play=True), seed, steps=300)
        changed = {name for name, box in scene.objects.items() if np.abs(box.center - before[name]).max() > 0.05}
        assert len(changed) <= 2 and np.abs(actions).max() <= 1.0
        closings = np.flatnonzero(np.diff(actions[:, 6]) > 0)
        assert len(closings) == 2
        moved |= changed
        places.add(tuple(np.round(scene.objects["can_1"].center[:2], 1)))
    assert moved >= {"can_1", "milk_1"} and len(places) > 2


def test_an_early_release_is_of_the_first_object_alone():
    for seed in range(20):
        held = []
        for probability in (0.0, 1.0):
            actions, expert = run(make_scene(), NoiseRecipe(early_release=probability, play=True), seed, steps=300)
            closings, openings = (np.flatnonzero(np.diff(actions[:, 6]) * sign > 0) for sign in (1, -1))
            assert expert.finished and len(closings) == len(openings) == 2
            held.append(openings - closings)
        assert held[1][0] < 9 + 30 and abs(held[1][1] - held[0][1]) <= 2


def test_highest_under_a_path():
    obstacles = (np.array([[0.0, 0.0, 0.1]]), np.eye(3)[None], np.array([[0.05, 0.05, 0.1]]))
    assert np.isclose(highest_under(np.array([[0.04, 0.0]]), obstacles), 0.2)
    assert highest_under(np.array([[0.06, 0.0]]), obstacles) == -np.inf


def test_action_noise_is_stationary_with_the_given_deviation():
    noise = ActionNoise(0.2, np.random.default_rng(0))
    samples = np.array([noise() for _ in range(20_000)])
    assert np.allclose(samples.std(axis=0), 0.2, rtol=0.1)
    assert np.corrcoef(samples[:-1, 0], samples[1:, 0])[0, 1] == pytest.approx(0.8, abs=0.05)


@given(st.floats(0.0, 0.1), st.integers(0, 1000))
def test_point_in_disc_stays_inside(radius, seed):
    assert np.linalg.norm(point_in_disc(radius, np.random.default_rng(seed))) <= radius + 1e-12


def test_plan_keeps_the_splits_apart_and_does_not_depend_on_its_length():
    plans = plan_episodes("libero_object", 1000, seed=0)
    assert plans[:100] == plan_episodes("libero_object", 100, seed=0)
    assert plans != plan_episodes("libero_object", 1000, seed=1)
    assert Counter(plan.split for plan in plans) == {"train": 800, "val": 100, "test": 100}
    assert all(plan.init_state in SPLITS[plan.split] for plan in plans)
    assert not any(plan.jitter for plan in plans if plan.split != "train")
    assert Counter(plan.task for plan in plans) == dict.fromkeys(range(10), 100)
    assert {plan.kind for plan in plans if plan.split == "val"} == {"clean", "noisy", "counterfactual"}
    assert len({plan.seed for plan in plans}) == 1000
    tests = plan_episodes("libero_object", 50, seed=0, split="test")
    assert {plan.split for plan in tests} == {"test"} and {plan.init_state for plan in tests} <= set(SPLITS["test"])
    goal = plan_episodes("libero_goal", 120, seed=0)
    assert Counter(plan.task for plan in goal) == dict.fromkeys(EXPERT_TASKS["libero_goal"], 20)
    assert Counter(plan.split for plan in goal) == {"train": 96, "val": 12, "test": 12}
    kitchens = plan_episodes("libero_90", 200, seed=0)
    assert {plan.recipe for plan in kitchens} == {"play"} and {plan.kind for plan in kitchens} == {"noisy"}
    assert Counter(plan.task for plan in kitchens) == dict.fromkeys(EXPERT_TASKS["libero_90"], 20)


def test_a_recipe_of_all_episodes(tmp_path: Path) -> None:
    plans = plan_episodes("libero_object", 50, seed=0, fixed_recipe="heavy")
    assert {plan.recipe for plan in plans} == {"heavy"} and {plan.kind for plan in plans} == {"noisy"}
    usual = plan_episodes("libero_object", 50, seed=0)
    assert [plan.seed for plan in plans] == [plan.seed for plan in usual]  # the same episodes, disturbed otherwise
    for arguments in ({"recipe": "wild"}, {"recipe": "play", "policy": RandomMotion()}):
        with pytest.raises(ValueError, match=r"one of \['clean', 'light', 'medium', 'heavy', 'play'\]"):
            record("libero_object", 1, tmp_path / "out", **arguments)
    for suite, recipe in (("metaworld", "play"), ("libero_90", "clean")):
        with pytest.raises(ValueError, match=f"The recipe of '{suite}'"):
            record(suite, 1, tmp_path / "out", recipe=recipe)
    assert not (tmp_path / "out").exists()


@dataclass
class Kills:
    """A policy whose pickle ends the process that opens it, as a system without memory does."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (1,)

    def predict(self, *_: object, **__: object) -> None: ...


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"killed, most often for lack of memory .* use fewer workers"):
        record("fetch", 3, tmp_path / "out", workers=1, policy=Kills())  # type: ignore[arg-type]


@pytest.mark.parametrize(("platform", "chosen"), [("linux", "egl"), ("darwin", None), ("win32", None)])
def test_opengl_without_a_display_is_for_linux(monkeypatch: pytest.MonkeyPatch, platform: str, chosen: str) -> None:
    for name in ("mujoco.gl_context", "mujoco.rendering.classic.gl_context"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")  # so that what is set in here is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", platform)
    prepare_opengl()
    assert os.environ.get("MUJOCO_GL") == os.environ.get("PYOPENGL_PLATFORM") == chosen


def test_a_recording_resumes_its_own_episodes_alone(tmp_path: Path) -> None:
    plan = plan_episodes("libero_object", 1, seed=3)[0]
    facts = {name: getattr(plan, name) for name in ("task", "seed", "split", "kind", "init_state")}
    names = {"suite": "libero_object", "instruction": "x", "robot": "panda"}
    earlier = EpisodeRecord(episode_index=0, length=41, success=True, **facts, **names)
    check_resumed(tmp_path, earlier, "libero_object", plan)
    for change in ({"seed": 4}, {"split": "test"}, {"kind": "policy"}, {"suite": "libero_spatial"}):
        with pytest.raises(ValueError, match="resume with the same suite, seed, split and policy, or choose another"):
            check_resumed(tmp_path, dataclasses.replace(earlier, **change), "libero_object", plan)


def test_plans_of_the_recordings_that_were_trained_on_stay_as_they_are():
    """The commands in weights/README.md must go on giving the same data sets."""
    digests = {
        "libero_object": "8ebc7af2b1267861",
        "libero_spatial": "b2656f92198ccc59",
        "libero_goal": "b9790275c6ff5c37",
    }
    for suite, digest in digests.items():
        plans = [tuple(dataclasses.asdict(plan).values()) for plan in plan_episodes(suite, 200, seed=1)]
        assert hashlib.sha256(repr(plans).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("suite", ["metaworld", "fetch", "two_arm_lift"])
def test_plans_for_other_robots_split_by_seed(suite):
    tasks = len(SUITES[suite].tasks)
    plans = plan_episodes(suite, 40 * tasks, seed=0)
    assert Counter(plan.split for plan in plans) == {"train": 32 * tasks, "val": 4 * tasks, "test": 4 * tasks}
    assert Counter(plan.task for plan in plans) == dict.fromkeys(SUITES[suite].tasks, 40)
    assert all(plan.init_state in SEED_SPLITS[plan.split] for plan in plans)
    assert not any(plan.jitter for plan in plans)
    assert {plan.kind for plan in plans} == {"clean", "noisy", "counterfactual"}
    assert "shifted" not in {plan.recipe for plan in plans}


def test_seed_splits_do_not_overlap():
    assert sorted(seed for seeds in SEED_SPLITS.values() for seed in seeds) == list(range(10_000))


def test_a_policys_plan_has_the_same_starts():
    scripted, policy = (plan_episodes("libero_spatial", 200, seed=0, policy=acts) for acts in (False, True))
    assert {plan.kind for plan in policy} == {"policy"}
    assert [(plan.task, plan.split, plan.seed) for plan in policy] == [
        (plan.task, plan.split, plan.seed) for plan in scripted
    ]
    assert any(plan.jitter for plan in policy)


def test_shares_sum_to_one():
    for shares in NOISE_SHARES.values():
        assert set(shares) in (set(NOISE_RECIPES) - {"play"}, {"play"})
        assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("libero_gaol", 10), r"'libero_object'.*'metaworld', 'fetch'"),
        (("libero_object", 0), "episodes must be at least 1"),
    ],
)
def test_record_refuses_nonsense(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        record(*arguments, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Other robots, in a kinematic world: a hand, a cube that it pushes or carries, and a goal


@dataclass
class CubeWorld:
    """A hand that moves 1 cm at most per step; it carries the cube while closed around it, or pushes it aside."""

    init_state: int = 0
    slippery: bool = False  # the cube cannot be held
    script_class: type = PickAndPlaceCube
    suite: str = "fetch"
    task: int = 0
    instruction: str = "push the black cube to the red ball"

    def __post_init__(self):
        self.reset(self.init_state)

    def reset(self, init_state):
        rng = np.random.default_rng(init_state)
        self.init_state = init_state
        self.eef_position = np.array([1.34, 0.75, 0.5])
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.15)
        self.cube_position = np.array([1.34 + distance * np.cos(angle), 0.75 + distance * np.sin(angle), 0.425])
        self.goal = np.array([*rng.uniform([1.19, 0.6], [1.49, 0.9]), 0.425])
        self.held = False
        self.steps = 0

    def script(self):
        return self.script_class(self)

    def step(self, action):
        motion = 0.01 * np.asarray(action[:3], float)
        self.eef_position = self.eef_position + motion
        self.steps += 1
        offset = self.cube_position - self.eef_position
        self.held = action[6] > 0 and not self.slippery and (self.held or float(np.abs(offset).max()) < 0.015)
        if self.held:
            self.cube_position = self.cube_position + motion
        elif self.script_class is PushCube and abs(offset[2]) < 0.03:
            distance = np.linalg.norm(offset[:2])
            if 0 < distance < 0.04:
                self.cube_position[:2] += (0.04 / distance - 1) * offset[:2]

    def render(self):
        return np.full((96, 96, 3), self.steps, np.uint8)

    def proprio(self):
        return proprioception(self.eef_position, np.array([0.0, 0.0, 1.0, 0.0]), np.zeros(2))

    def is_success(self):
        return float(np.linalg.norm(self.cube_position - self.goal)) < 0.05

    def camera(self):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError


@given(st.integers(0, 1000), st.sampled_from([Reach, PickAndPlaceCube, PushCube]))
@settings(max_examples=30)
def test_fetch_scripts_reach_the_goal_from_any_start(seed, script_class):
    world = CubeWorld(seed, script_class=script_class)
    script = world.script()
    for _ in range(160):
        action = script.act()
        assert action.dtype == np.float32 and action.shape == (7,) and np.abs(action).max() <= 1.0
        assert not action[3:6].any()
        world.step(action)
    moved = world.eef_position if script_class is Reach else world.cube_position
    assert np.linalg.norm(moved - world.goal) < 0.03
    assert np.abs(script.act()[:3]).max() < 0.1, "it rests"


def acted(world, recipe, seed):
    expert = disturbed(world, recipe, np.random.default_rng(seed), steps=160)
    actions, path = [], []
    for _ in range(160):
        path.append(world.eef_position)
        actions.append(expert.act())
        world.step(actions[-1])
    return np.array(actions), np.array(path)


def test_a_rehearsal_cannot_play():
    with pytest.raises(ValueError, match="'play' is for the suites of LIBERO"):
        acted(CubeWorld(2), NOISE_RECIPES["play"], 0)


@pytest.mark.parametrize("name", ["light", "medium", "heavy"])
def test_a_rehearsed_experts_actions_do_not_depend_on_the_object(name):
    """The leak: once the rehearsal is over, a cube that slips away must not show in the actions."""
    world, slippery = CubeWorld(2), CubeWorld(2)
    reset = CubeWorld.reset

    def reset_to_slippery(init_state):
        reset(slippery, init_state)
        slippery.slippery = True

    slippery.reset = reset_to_slippery
    with_cube, _ = acted(world, NOISE_RECIPES[name], seed=1)
    without, _ = acted(slippery, NOISE_RECIPES[name], seed=1)
    assert np.array_equal(with_cube, without)
    assert not slippery.is_success()


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_a_rehearsal_without_noise_is_the_scripts_own_episode(seed):
    clean, clean_path = acted(CubeWorld(seed), NoiseRecipe(), 0)
    again, path = acted(CubeWorld(seed), NoiseRecipe(wrong_object=0.5), 0)  # which has no meaning here
    assert np.allclose(clean, again, atol=1e-6) and np.allclose(clean_path, path, atol=1e-6)


@given(st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=10)
def test_a_grasp_error_shifts_the_path_and_no_more(start, seed):
    _, clean = acted(CubeWorld(start), NoiseRecipe(), 0)
    _, path = acted(CubeWorld(start), NoiseRecipe(grasp_offset=0.03), seed)
    shift = point_in_disc(0.03, np.random.default_rng(seed))
    assert np.allclose((path - clean)[-1], [*shift, 0.0], atol=2e-3)


def test_a_rehearsed_expert_releases_early():
    actions, _ = acted(CubeWorld(0), NoiseRecipe(early_release=1.0), 0)
    grip = actions[:, 6]
    assert (grip > 0).any() and grip[-1] == -1.0 and (np.diff(grip) != 0).sum() == 2


@dataclass
class Hands:
    """Two hands that move 1 cm per unit of action: where they are (6,), m."""

    eef_position: np.ndarray = field(default_factory=lambda: np.zeros(6))

    def step(self, action):
        self.eef_position = self.eef_position + 0.01 * np.concatenate([action[:3], action[7:10]])


def two_handed(recipe, seed):
    """What an expert does that rehearsed 80 steps: both hands rise 5 mm a step and close, one in step 20, the other in
    step 30."""
    actions = np.zeros((80, 14))
    actions[:, [2, 9]], actions[:, [6, 13]] = 0.5, -1.0
    actions[20:, 6] = actions[30:, 13] = 1.0
    positions = np.cumsum(np.tile([0.0, 0.0, 0.005], (80, 2)), axis=0) - np.tile([0.0, 0.0, 0.005], 2)
    hands = Hands()
    expert = Rehearsed(hands, Rehearsal(actions, positions), recipe, np.random.default_rng(seed))
    done, path = [], []
    for _ in range(80):
        path.append(hands.eef_position)
        done.append(expert.act())
        hands.step(done[-1])
    return actions, np.array(done), np.array(path) - positions


def test_two_arms_rehearse_together_without_noise():
    rehearsed, done, error = two_handed(NoiseRecipe(), 0)
    assert done.dtype == np.float32 and np.allclose(done, rehearsed, atol=1e-6) and np.abs(error).max() < 1e-6


def test_each_of_two_arms_has_errors_of_its_own():
    _, done, error = two_handed(NoiseRecipe(grasp_offset=0.03, place_offset=0.05), 1)
    before, after = error[19].reshape(2, 3), error[-1].reshape(2, 3)
    assert not np.allclose(before[0], before[1], atol=1e-3)
    assert (np.linalg.norm(before, axis=1) < 0.031).all() and (np.linalg.norm(after - before, axis=1) < 0.051).all()
    late = error[36].reshape(2, 3)
    assert not np.allclose(late[0], before[0], atol=1e-3), "the first one has closed its hand"
    assert np.allclose(late[1], before[1], atol=1e-3), "the second one has not"
    assert np.array_equal(done[:, [6, 13]] > 0, np.arange(80)[:, None] >= [20, 30])
    noise = two_handed(NoiseRecipe(action_sigma=0.1), 2)[1] - done
    assert np.abs(np.corrcoef(noise[40:, 0], noise[40:, 7])[0, 1]) < 0.6


def test_one_arm_may_let_go_without_the_other():
    released = [tuple(two_handed(NoiseRecipe(early_release=0.5), seed)[1][-1, [6, 13]]) for seed in range(40)]
    assert set(released) == {(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)}


def test_random_motion_moves_as_many_arms_as_are_observed():
    for arms in (1, 2):
        chunk, _ = RandomMotion().predict({"proprio": np.zeros((3, 8 * arms), np.float32)})
        assert chunk.shape == (3, 8, 7 * arms) and chunk.dtype == np.float32
        assert set(np.unique(chunk[..., 6::7])) <= {-1.0, 1.0} and np.ptp(chunk, axis=1).max() == 0.0


@pytest.mark.parametrize("recipe", ["clean", "light", "medium", "heavy", "elsewhere", "policy"])
def test_an_episode_of_another_robot_is_recorded_whole_and_moves_only_what_the_robot_has(recipe):
    plan = EpisodePlan(index=0, task=0, split="val", init_state=8123, recipe=recipe, jitter=False, seed=1)
    episode = record_episode(CubeWorld(8123), plan, RandomMotion() if recipe == "policy" else None)
    assert episode.frames.shape == (41, 96, 96, 3) and episode.actions.shape == (40, 4, 7)
    assert episode.frames[:, 0, 0, 0].tolist() == list(range(0, 161, 4)), "a rehearsal is not part of the episode"
    assert (episode.robot, episode.kind, episode.init_state) == ("fetch", plan.kind, 8123)
    assert not episode.actions[..., 3:6].any() and episode.actions[..., :3].any()
    if recipe == "clean":
        assert episode.outcome


def test_a_policy_keeps_its_own_arrays():
    """The noise of a recording is not added to what the policy may hand out again."""

    class Still:
        chunk = np.zeros((1, 8, 7), np.float32)

        def predict(self, observation, deterministic=False):
            return self.chunk, None

    plan = EpisodePlan(index=0, task=0, split="val", init_state=8123, recipe="policy", jitter=False, seed=1)
    policy = Still()
    first, second = (record_episode(CubeWorld(8123), plan, policy) for _ in range(2))
    assert first.actions.any() and np.array_equal(first.actions, second.actions) and not policy.chunk.any()


class Watcher:
    """A policy that stands still, and keeps the pictures that it is shown."""

    def __init__(self, **attributes):
        self.seen = []
        vars(self).update(attributes)

    def predict(self, observation, deterministic=False):
        self.seen.append(int(observation["image"][0, 0, 0, 0]))
        return np.zeros((1, 8, 7), np.float32), None


@pytest.mark.parametrize("video", [True, False])
def test_a_policy_sees_the_present_whatever_is_kept(video):
    plan = EpisodePlan(index=0, task=0, split="val", init_state=8123, recipe="policy", jitter=False, seed=1)
    space = spaces.Dict({"image": spaces.Box(0, 255, (96, 96, 3), np.uint8)})
    for policy in (Watcher(), Watcher(used_space=space), Watcher(policy=Watcher(used_space=space))):
        episode = record_episode(CubeWorld(8123), plan, policy, video)
        assert policy.seen == list(range(0, 160, 8))
        assert np.ptp(episode.frames) == (160 if video else 0)
    blind = Watcher(used_space=spaces.Dict({"proprio": spaces.Box(-1, 1, (8,))}))
    record_episode(CubeWorld(8123), plan, blind, video=False)
    assert set(blind.seen) == {0}, "nothing is rendered for one that does not look"


def test_a_policy_does_not_act_in_a_counterfactual():
    plan = EpisodePlan(index=0, task=0, split="val", init_state=8123, recipe="elsewhere", jitter=False, seed=1)
    policy = Watcher()
    assert record_episode(CubeWorld(8123), plan, policy).actions.any() and not policy.seen


class Plan:
    """A planner that pushes to the side, and keeps what it was told."""

    def plan(self, *start):
        self.start = start
        return np.full((start[4], 7), 0.5, np.float32)

    def checksum(self):
        return "plan"


def test_a_plan_is_made_from_the_start_and_carried_out_whatever_happens():
    plan = EpisodePlan(index=0, task=0, split="val", init_state=8123, recipe="rehearsed", jitter=False, seed=1)
    planner = Plan()
    episode = record_episode(CubeWorld(8123), plan, planner)
    suite, image, proprio, instruction, control_steps, seed = planner.start
    assert (suite, instruction, control_steps, seed) == (episode.suite, episode.instruction, 160, 1)
    assert np.array_equal(image, episode.frames[0]) and np.array_equal(proprio, episode.proprio[0])
    assert episode.kind == "rehearsed"
    assert (episode.actions[..., [0, 1, 2, 6]] == 0.5).all() and not episode.actions[..., 3:6].any()
    for nobody in (None, RandomMotion()):
        with pytest.raises(ValueError, match="'rehearsed': pass the policy that acts, or the planner"):
            record_episode(CubeWorld(8123), plan, nobody)
    with pytest.raises(ValueError, match="'policy': pass the policy that acts"):
        record_episode(CubeWorld(8123), dataclasses.replace(plan, recipe="policy"), planner)


def test_a_turned_hand_has_an_orientation_without_jumps():
    """Sawyer's and Fetch's hands look down: x along the world's -z. Small tilts of it must be small changes."""
    down = np.array([np.sqrt(0.5), 0.0, np.sqrt(0.5), 0.0])
    poses = []
    for tilt in np.linspace(-0.1, 0.1, 21):
        turned = multiply(np.array([np.cos(tilt / 2), 0.0, np.sin(tilt / 2), 0.0]), down)
        poses.append(proprioception(np.zeros(3), multiply(turned, DOWNWARD_X), np.array([0.04, -0.04])))
    rotation = np.array(poses)[:, 3:6]
    assert np.allclose(rotation[10], [0.0, np.pi, 0.0], atol=1e-5)
    assert np.allclose(np.diff(rotation, axis=0), [0.0, 0.01, 0.0], atol=1e-5)


def test_the_instructions_of_other_robots_are_in_the_shipped_table():
    """So that nobody who trains on them needs the sentence encoder."""
    with safe_open(TABLE, framework="numpy") as file:
        shipped = json.loads(file.metadata()["sentences"])
    tasks = [*metaworld.TASKS.values(), *fetch.TASKS.values(), *two_arm.TASKS]
    assert set(tasks) <= set(shipped)
    assert len(set(tasks)) == len(tasks), "two tasks with one instruction cannot be told apart"


@pytest.mark.parametrize(
    ("simulation", "package", "extra"),
    [
        (metaworld.MetaWorldSimulation, "metaworld", "metaworld"),
        (fetch.FetchSimulation, "gymnasium_robotics", "fetch"),
        (two_arm.TwoArmSimulation, "robosuite", "libero"),
    ],
)
def test_a_missing_simulator_names_its_extra(monkeypatch, simulation, package, extra):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ImportError, match=rf'pip install "prophet-gym\[{extra}\]"'):
        simulation(extra, 0)


@pytest.mark.parametrize(
    ("simulation", "suite", "package"),
    [
        pytest.param(metaworld.MetaWorldSimulation, "metaworld", "metaworld", marks=pytest.mark.metaworld),
        pytest.param(fetch.FetchSimulation, "fetch", "gymnasium_robotics", marks=pytest.mark.fetch),
        pytest.param(two_arm.TwoArmSimulation, "two_arm_lift", "robosuite", marks=pytest.mark.libero),
    ],
)
def test_missing_opengl_says_what_to_install(monkeypatch, simulation, suite, package):
    pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, "prophet_gym.simulators.frame_renderer", None)  # cannot be imported
    with pytest.raises(ImportError, match=r"installed but cannot be loaded .*libegl1"):
        simulation(suite, 0)


@pytest.mark.parametrize("error", [AttributeError, OSError, RuntimeError])
def test_whatever_fails_without_opengl_is_explained(error):
    explained = pytest.raises(ImportError, match=r"A simulator is installed but cannot be loaded \(no EGL\)")
    with explained, loading("A simulator"):
        raise error("no EGL")
