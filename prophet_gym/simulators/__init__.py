"""The real simulators that Prophet learns from and is held against."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def prepare_opengl() -> None:
    """Let MuJoCo render without a display, unless the user chose otherwise.

    MuJoCo reads the choice when it is imported, and that may have been before (where gymnasium-robotics is installed,
    Gymnasium itself imports it; and robosuite chooses after having imported it). So the module that read it is loaded
    again.
    """
    if sys.platform == "linux":  # elsewhere MuJoCo needs no display anyway, and knows no egl
        os.environ.setdefault("MUJOCO_GL", "egl")
    if (chosen := os.environ.get("MUJOCO_GL", "")) in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", chosen)
    for name in ("mujoco.gl_context", "mujoco.rendering.classic.gl_context"):  # until 3.16, and since
        if name in sys.modules:
            importlib.reload(sys.modules[name])


@contextmanager
def loading(simulator: str) -> Iterator[None]:
    """What imports a simulator and MuJoCo with it happens inside: without OpenGL that fails in many ways.

    Raises:
        ImportError: it failed; says what to install.
    """
    prepare_opengl()
    try:
        yield
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise ImportError(
            f"{simulator} is installed but cannot be loaded ({error}). Most often OpenGL is missing: install it "
            "(Debian, Ubuntu: apt install libegl1 libgl1-mesa-dri), or osmesa (apt install libosmesa6, set "
            "MUJOCO_GL=osmesa)."
        ) from error
