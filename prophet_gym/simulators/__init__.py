"""The real simulators that Prophet learns from and is held against."""

import os


def prepare_opengl() -> None:
    """Let MuJoCo render without a display, unless the user chose otherwise; to be called before MuJoCo is imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ["MUJOCO_GL"] in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
