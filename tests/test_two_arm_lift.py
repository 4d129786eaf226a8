"""Two Pandas in robosuite's TwoArmLift: starts, actions, camera, script, disturbances and a recording."""

import numpy as np
import pytest

from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.simulators.experts import NOISE_RECIPES
from prophet_gym.simulators.recording import plan_episodes, record
from prophet_gym.simulators.suites import SUITES

pytestmark = pytest.mark.libero
SUITE = SUITES["two_arm_lift"]
NO_OP = np.tile([0.0, 0, 0, 0, 0, 0, -1], 2)


@pytest.fixture(scope="module")
def simulation():
    pytest.importorskip("libero", reason='pip install "prophet-gym[libero]"')
    simulation = SUITE.load("two_arm_lift", 0, 96)
    yield simulation
    simulation.close()


def test_a_seed_gives_the_same_start_and_the_same_actions_the_same_episode(simulation):
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 14))
    global_state = np.random.get_state()[1].copy()
    ends = []
    for init_state in (5, 6, 5):
        simulation.reset(init_state)
        start = simulation.render()
        for action in actions:
            simulation.step(action)
        ends.append((start, simulation.render(), simulation.proprio()))
    for first, again in zip(ends[0], ends[2], strict=True):
        assert np.array_equal(first, again)
    assert not np.array_equal(ends[0][0], ends[1][0])
    assert np.array_equal(np.random.get_state()[1], global_state), "robosuite's draws are nobody else's business"


def test_frames_and_proprioception_have_their_shapes(simulation):
    simulation.reset(0)
    frame, proprio = simulation.render(), simulation.proprio()
    assert frame.shape == (96, 96, 3) and frame.dtype == np.uint8
    assert proprio.shape == (16,) and proprio.dtype == np.float32
    arms = proprio.reshape(2, 8)
    assert np.allclose(arms[:, :3].ravel(), simulation.eef_position)
    assert arms[0, 1] < 0 < arms[1, 1], "they stand on either side"
    assert (arms[:, 6] > 0).all() and (arms[:, 7] < 0).all()


@pytest.mark.parametrize("arm", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_arm_follows_its_own_actions_in_the_axes_of_the_world(simulation, arm, axis):
    moved = []
    for sign in (0.5, -0.5):
        simulation.reset(0)
        before = simulation.eef_position
        action = NO_OP.copy()
        action[7 * arm + axis] = sign
        action[7 * arm + 6] = 1.0
        for _ in range(6):
            simulation.step(action)
        moved.append(simulation.eef_position - before)
    travel = (moved[0] - moved[1]) / 2  # what a start itself still moves is the same for both signs
    own = 3 * arm + axis
    assert 0.02 < travel[own] < 0.06
    assert np.abs(np.delete(travel, own)).max() < 0.01
    fingers = simulation.proprio().reshape(2, 8)[:, 6:]
    opened = fingers[:, 0] - fingers[:, 1]
    assert opened[arm] < opened[1 - arm], "the other one opens its hand"


def test_both_hands_project_to_where_they_are_seen(simulation):
    """Against the pixels that the renderer says are the fingers', in many places of the workspace."""
    from mujoco import mjtObj

    camera = {name: np.array(value) for name, value in simulation.camera().items()}
    projection = camera["intrinsics"] @ np.linalg.inv(camera["extrinsics"])[:3]
    renderer, model = simulation._renderer, simulation._model
    bodies = [[model.body(f"gripper{arm}_{finger}").id for finger in ("leftfinger", "rightfinger")] for arm in (0, 1)]
    rng = np.random.default_rng(0)
    offsets = []
    renderer._renderer.enable_segmentation_rendering()
    for init_state in range(8):
        simulation.reset(init_state)
        for action in np.repeat(rng.uniform(-0.6, 0.6, (2, 14)), 6, axis=0):
            simulation.step(action)
        ids, kinds = np.moveaxis(simulation.render(), -1, 0)
        for own, position in zip(bodies, simulation.eef_position.reshape(2, 3), strict=True):
            x, y, depth = projection @ np.append(position, 1.0)
            assert depth > 0.3 and 0 < x / depth < 96 and 0 < y / depth < 96
            rows, columns = np.nonzero((kinds == mjtObj.mjOBJ_GEOM) & np.isin(model.geom_bodyid[ids], own))
            if len(rows) > 5:  # else something stands before them
                low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
                point = np.array([x, y]) / depth
                offsets.append(np.maximum(low - point, point - high).max())  # outside the box that is seen, pixels
    renderer._renderer.disable_segmentation_rendering()
    assert len(offsets) >= 12
    assert max(offsets) < 2.0


def test_the_script_lifts_the_pot_and_holds_it_until_the_end(simulation):
    for init_state in (9000, 9001, 9002):
        simulation.reset(init_state)
        assert not simulation.is_success()
        script, success = simulation.script(), []
        for _ in range(SUITE.control_steps):
            action = script.act()
            assert action.dtype == np.float32 and action.shape == (14,) and np.abs(action).max() <= 1.0
            simulation.step(action.astype(float))
            success.append(simulation.is_success())
        first = success.index(True)
        assert first < SUITE.control_steps - 20 and all(success[first:])
        assert np.abs(script.act().reshape(2, 7)[:, :6]).max() < 0.5, "it rests"


def test_a_disturbed_expert_starts_where_it_rehearsed_and_is_the_same_again(simulation):
    actions = []
    for _ in range(2):
        simulation.reset(9000)
        start = simulation.eef_position
        expert = SUITE.expert(simulation, NOISE_RECIPES["medium"], np.random.default_rng(0))
        assert np.array_equal(simulation.eef_position, start)
        actions.append(expert.act())
    assert actions[0].shape == (14,) and np.array_equal(*actions)


def test_a_recording_says_what_it_is(tmp_path):
    pytest.importorskip("libero", reason='pip install "prophet-gym[libero]"')
    # two processes for its one task
    dataset = EpisodeDataset(record("two_arm_lift", 2, tmp_path / "two", workers=2))
    plans = plan_episodes("two_arm_lift", 2, seed=0)
    assert [episode.seed for episode in dataset] == [plan.seed for plan in plans]
    assert len(dataset) == 2 and (dataset.fps, dataset.frame_stride) == (5, 4)
    assert dataset.info["robot_type"] == "two_pandas"
    assert dataset.action_mask.tolist() == [True] * 14
    for episode in dataset:
        assert episode.frames.shape == (31, 96, 96, 3) and episode.instruction == "lift the pot with both hands"
        assert episode.actions.shape == (30, 4, 14) and episode.proprio.shape == (31, 16)
