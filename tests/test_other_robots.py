"""Meta-World's Sawyer and Fetch in their real simulators: starts, actions, cameras, scripts and whole recordings."""

import numpy as np
import pytest

from prophet_gym.data.lerobot_format import EpisodeDataset
from prophet_gym.simulators import fetch, metaworld
from prophet_gym.simulators.recording import record
from prophet_gym.simulators.suites import SUITES

PACKAGES = {"metaworld": "metaworld", "fetch": "gymnasium_robotics"}
ONE_TASK_EACH = [
    pytest.param(("metaworld", list(metaworld.TASKS).index("pick-place-v3")), marks=pytest.mark.metaworld),
    pytest.param(("fetch", list(fetch.TASKS).index("FetchPickAndPlace-v4")), marks=pytest.mark.fetch),
]
FINGER_BODIES = {
    "metaworld": ("rightclaw", "leftclaw", "rightpad", "leftpad"),
    "fetch": ("robot0:r_gripper_finger_link", "robot0:l_gripper_finger_link"),
}
NO_OP = np.array([0.0, 0, 0, 0, 0, 0, -1])


@pytest.fixture(scope="module")
def simulation(request):
    suite, task = request.param
    pytest.importorskip(PACKAGES[suite], reason=f'pip install "prophet-gym[{suite}]"')
    simulation = SUITES[suite].load(suite, task, 96)
    yield simulation
    simulation.close()


robots = pytest.mark.parametrize("simulation", ONE_TASK_EACH, indirect=True)


@robots
def test_a_seed_gives_the_same_start_and_the_same_actions_the_same_episode(simulation):
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 7))
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


@robots
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_motion_follows_the_action_at_the_stated_speed(simulation, axis):
    moved = []
    for sign in (1.0, -1.0):
        simulation.reset(0)
        before = simulation.eef_position
        action = NO_OP.copy()
        action[axis] = sign
        for _ in range(10):
            simulation.step(action)
        moved.append(simulation.eef_position - before)
    travel = (moved[0] - moved[1]) / 2  # what the start itself still moves is the same for both signs
    speed = {"metaworld": 0.32, "fetch": 0.18}[simulation.suite]  # m/s
    assert 0.5 < travel[axis] / (10 * 0.05 * speed) < 1.1
    assert np.abs(np.delete(travel, axis)).max() < 0.015
    assert np.allclose(simulation.proprio()[:3], simulation.eef_position)


@robots
def test_fingers_open_and_close_and_point_down(simulation):
    simulation.reset(0)
    opened, closed = [], []
    for grip, poses in ((-1.0, opened), (1.0, closed)):
        for _ in range(20):
            simulation.step(np.append(np.zeros(6), grip))
        poses.append(simulation.proprio())
    (opened,), (closed,) = opened, closed
    assert opened[6] - opened[7] > 0.075 and closed[6] - closed[7] < 0.03
    assert opened[6] > 0 > opened[7]
    for pose in (opened, closed):
        assert np.allclose(np.abs(pose[3:6]), [0.0, np.pi, 0.0], atol=0.05)


@robots
def test_rotations_are_ignored(simulation):
    poses = []
    for turn in (0.0, 1.0):
        simulation.reset(1)
        for _ in range(10):
            simulation.step(np.array([0.5, -0.5, 0.2, turn, -turn, turn, 1.0]))
        poses.append(simulation.proprio())
    assert np.array_equal(*poses)


@robots
def test_the_hand_projects_to_where_it_is_seen(simulation):
    """Against the pixels that the renderer says are the fingers', in many places of the workspace."""
    from mujoco import mjtObj

    camera = {name: np.array(value) for name, value in simulation.camera().items()}
    projection = camera["intrinsics"] @ np.linalg.inv(camera["extrinsics"])[:3]
    renderer, model = simulation._renderer, simulation._model
    bodies = [model.body(name).id for name in FINGER_BODIES[simulation.suite]]
    rng = np.random.default_rng(0)
    offsets = []
    renderer._renderer.enable_segmentation_rendering()
    for init_state in range(8):
        simulation.reset(init_state)
        for action in np.repeat(rng.uniform(-1, 1, (2, 7)), 10, axis=0):
            simulation.step(action)
        ids, kinds = np.moveaxis(simulation.render(), -1, 0)
        fingers = (kinds == mjtObj.mjOBJ_GEOM) & np.isin(model.geom_bodyid[ids], bodies)
        rows, columns = np.nonzero(fingers)
        x, y, depth = projection @ np.append(simulation.eef_position, 1.0)
        assert depth > 0.3 and 0 < x / depth < 96 and 0 < y / depth < 96
        if len(rows) > 5:  # else something stands before them
            low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
            point = np.array([x, y]) / depth
            offsets.append(np.maximum(low - point, point - high).max())  # outside the box that is seen, pixels
    renderer._renderer.disable_segmentation_rendering()
    assert len(offsets) >= 6
    assert max(offsets) < 2.0


@robots
def test_the_script_succeeds_and_stands_successful_at_the_end(simulation):
    outcomes = []
    for init_state in (9000, 9001):
        simulation.reset(init_state)
        assert not simulation.is_success()
        script = simulation.script()
        for _ in range(SUITES[simulation.suite].control_steps):
            simulation.step(script.act().astype(float))
        outcomes.append(simulation.is_success())
    assert all(outcomes)


@pytest.mark.metaworld
def test_all_tasks_of_metaworld_share_one_camera():
    pytest.importorskip("metaworld", reason='pip install "prophet-gym[metaworld]"')
    cameras = []
    for task in (0, len(metaworld.TASKS) - 1):
        simulation = metaworld.MetaWorldSimulation("metaworld", task)
        cameras.append(simulation.camera())
        simulation.close()
    assert cameras[0] == cameras[1]


@pytest.mark.fetch
def test_a_recording_says_what_it_is(tmp_path):
    pytest.importorskip("gymnasium_robotics", reason='pip install "prophet-gym[fetch]"')
    dataset = EpisodeDataset(record("fetch", 3, tmp_path / "fetch", workers=1))
    assert len(dataset) == 3 and (dataset.fps, dataset.frame_stride) == (5, 4)
    assert dataset.info["robot_type"] == "fetch" and dataset.info["prophet"]["control_hz"] == 20
    assert dataset.action_mask.tolist() == [True, True, True, False, False, False, True]
    assert [record.instruction for record in dataset.records] == list(fetch.TASKS.values())
    assert {episode.frames.shape for episode in dataset} == {(41, 96, 96, 3)}
    assert all(not episode.actions[..., 3:6].any() for episode in dataset)
