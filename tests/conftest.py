"""Settings that all tests share."""

import os

# Threads that wait should sleep: spinning ones slow down a machine that runs other tests, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Side by side with other processes on few cores, more threads only make tests slower.
torch.set_num_threads(int(os.environ.get("DIFFUSERS_ATTN_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """A compiler that has seen nothing, so that graphs can be counted."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
