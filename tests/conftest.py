"""What all tests share: they run on the CPU, begin with the same random numbers, whatever ran before them, and take as
long as a busy machine needs."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # "auto" would choose a GPU, and train in another precision

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random weights are the same in whatever order tests run."""
    torch.manual_seed(0)
    np.random.seed(0)
