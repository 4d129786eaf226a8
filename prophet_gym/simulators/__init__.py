"""The real simulators that Prophet learns from and is held against."""

import importlib
import os
import sys


def prepare_opengl() -> None:
    """Let MuJoCo render without a display, unless the user chose otherwise.

    MuJoCo reads the choice when it is imported, and that may have been before: where gymnasium-robotics is installed,
    Gymnasium itself imports both. Then the module that read it is loaded again.
    """
    chosen = "MUJOCO_GL" in os.environ
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ["MUJOCO_GL"] in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    if not chosen and "mujoco.gl_context" in sys.modules:
        importlib.reload(sys.modules["mujoco.gl_context"])
