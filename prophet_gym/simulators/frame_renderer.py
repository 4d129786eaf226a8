"""Cheap camera frames of a MuJoCo scene: only what a small picture can show is drawn.

LIBERO's scenes hold 300,000 and more triangles, far finer than a 96-pixel picture, and software rendering pays for each
of them. The renderer works on its own copy of the model, whose meshes are simplified by vertex clustering; shadows,
reflections and multisampling are off, hidden collision geoms and sites are not drawn. The physics is not touched.
Imported only by the simulations, which call :func:`prophet_gym.simulators.prepare_opengl` first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

_FINE_CELL = 0.0035  # m: dishes and baskets, whose thin rims matter
_OBJECT_CELL = 0.005  # m
_ROBOT_CELL = 0.008  # m
_FINE_NAMES = ("bowl", "plate", "basket", "ramekin", "gripper0", "gripper1")
_ROBOT_NAMES = ("robot0", "robot1", "mount0", "mount1")


class FrameRenderer:
    """Renders square RGB frames, upright, from one camera.

    Args:
        model: ``mujoco.MjModel`` of the scene; copied, not changed.
        camera: name of the camera.
        image_size: height and width in pixels.
        geom_groups: the groups of geoms that are drawn, of 0-4; the others are for collisions alone.
        sites: names of the sites that are drawn.
    """

    def __init__(
        self,
        model: Any,
        camera: str,
        image_size: int,
        geom_groups: Sequence[int] = (1,),
        sites: Sequence[str] = (),
    ) -> None:
        model = copy.deepcopy(model)
        model.vis.quality.offsamples = 0
        for mesh in range(model.nmesh):
            simplify_mesh(model, mesh, _cell_size(model.mesh(mesh).name))
        # The bodies by which a simulated hand is led are no part of the scene, although some have a visible cross.
        model.geom_group[model.body_mocapid[model.geom_bodyid] >= 0] = 5
        self._camera = camera
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = [group in geom_groups for group in range(6)]
        shown = [model.site(site).id for site in sites]
        model.site_group[:] = 1
        model.site_group[shown] = 0
        self._options.sitegroup[:] = (1, 0, 0, 0, 0, 0)
        self._renderer = mujoco.Renderer(model, height=image_size, width=image_size)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def render(self, data: Any) -> NDArray[np.uint8]:
        """The scene in the state ``data``: uint8 (image_size, image_size, 3), row 0 at the top."""
        self._renderer.update_scene(data, camera=self._camera, scene_option=self._options)
        return self._renderer.render()

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()


def aim_camera(
    model: Any, camera: str, position: Sequence[float], target: Sequence[float], vertical_angle: float
) -> None:
    """Put a fixed camera of the model somewhere else; in place.

    Args:
        model: ``mujoco.MjModel``; data computed from it before are stale.
        camera: name of a fixed camera; whatever it was mounted on, it will stand in the world.
        position, target: where it stands and what it looks at (3,), m, world; the picture is upright.
        vertical_angle: field of view, degrees.
    """
    index = model.camera(camera).id
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    model.cam_bodyid[index] = 0
    model.cam_pos[index] = position
    mujoco.mju_mat2Quat(model.cam_quat[index], axes.ravel())
    model.cam_fovy[index] = vertical_angle


def camera_parameters(model: Any, data: Any, camera: str, image_size: int) -> dict[str, list[list[float]]]:
    """Pinhole camera in OpenCV's convention (x right, y down, z forward).

    Returns:
        ``intrinsics`` (3, 3) in pixels for upright ``image_size`` x ``image_size`` frames (pixel centres at
        half-integers), and ``extrinsics`` (4, 4), camera to world, metres.
    """
    index = model.camera(camera).id
    focal = image_size / (2.0 * np.tan(np.deg2rad(model.cam_fovy[index]) / 2.0))
    intrinsics = np.array([[focal, 0.0, image_size / 2], [0.0, focal, image_size / 2], [0.0, 0.0, 1.0]])
    extrinsics = np.eye(4)
    extrinsics[:3, :3] = data.cam_xmat[index].reshape(3, 3) @ np.diag([1.0, -1.0, -1.0])  # MuJoCo: y up, looks along -z
    extrinsics[:3, 3] = data.cam_xpos[index]
    return {"intrinsics": intrinsics.tolist(), "extrinsics": extrinsics.tolist()}


def simplify_mesh(model: Any, mesh: int, cell: float) -> None:
    """Merge the vertices of one mesh that share a cube of side ``cell`` (m), drop the faces that vanish; in place."""
    first_vertex, vertices = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    first_face, faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    points = model.mesh_vert[first_vertex : first_vertex + vertices]
    cubes = np.floor(points / cell).astype(np.int64)
    cubes -= cubes.min(axis=0)
    extent = cubes.max(axis=0) + 1
    keys = (cubes[:, 0] * extent[1] + cubes[:, 1]) * extent[2] + cubes[:, 2]
    _, cluster, counts = np.unique(keys, return_inverse=True, return_counts=True)
    for axis in range(3):
        points[:, axis] = (np.bincount(cluster, weights=points[:, axis]) / counts)[cluster]

    corners = np.sort(cluster[model.mesh_face[first_face : first_face + faces]], axis=1)
    proper = np.flatnonzero((corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]))
    _, unique = np.unique(corners[proper], axis=0, return_index=True)
    kept = proper[np.sort(unique)]
    if len(kept) == 0:
        kept = np.array([0])  # MuJoCo needs at least one face
    for table in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
        table[first_face : first_face + len(kept)] = table[first_face + kept]
    model.mesh_facenum[mesh] = len(kept)


def _cell_size(mesh_name: str) -> float:
    if any(name in mesh_name for name in _FINE_NAMES):
        return _FINE_CELL
    return _ROBOT_CELL if mesh_name.startswith(_ROBOT_NAMES) else _OBJECT_CELL
