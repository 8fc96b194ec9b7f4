"""Settings that all tests share."""

import os
from pathlib import Path

# Threads that wait should sleep: spinning ones slow down a machine that runs other tests, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test reads the Hub. Packages do when they are imported: bitsandbytes looks for a kernel if `kernels` is installed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Degrees that tests expect must not depend on how busy the machine is. tests/parallelize/test_measure_hardware.py
# measures.
os.environ.setdefault("DIFFUSERS_ATTN_LINKS", "typical")

import pytest
import torch

from diffusers_attn.parent_process import end_with_parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker of pytest-xdist would otherwise end its test first, where pytest was killed.
    end_with_parent()

# Side by side with other processes on few cores, more threads only make tests slower.
torch.set_num_threads(int(os.environ.get("DIFFUSERS_ATTN_TEST_THREADS", "1")))


def pytest_xdist_auto_num_workers() -> int:
    """The workers of `-n auto`: the cores that this process may use, up to eight, since each takes a gigabyte."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


# Files that take longest begin first. Otherwise one of them may run alone at the end, while other workers have no work.
LONGEST = (
    "parallelize/test_enable.py",
    "verify_plan/test_verify.py",
    "test_inference_cp.py",
    "context_parallel/compile/test_one_graph.py",
    "context_parallel/comm/test_symmetric_gather.py",
    "test_benchmark_training.py",
    "training/loop/test_trainer.py",
    "context_parallel/compile/test_sizes.py",
    "cp_plans/test_models.py",
    "parallelize/test_shard_weights.py",
    "training/test_parallel_runs.py",
    "cp_plans/test_nabla.py",
    "test_dispatch.py",
    "cli/test_run.py",
    "cp_plans/test_wan_animate2.py",
    "context_parallel/attention/test_allgather_kv_one_call.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    # `make test-all` has run these before, with coverage.
    # Taken out of the environment: a pytest that a test starts runs all that it is given.
    done = [folder.parent / name for name in os.environ.pop("TESTS_WITH_COVERAGE", "").split()]
    again = {each for each in items if any(map(each.path.is_relative_to, done)) and not each.get_closest_marker("slow")}
    config.hook.pytest_deselected(items=list(again))
    items[:] = [each for each in items if each not in again]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """A compiler that has seen nothing, so that graphs can be counted."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def pool():
    """Runs jobs on up to four processes; see `context_parallel/pool.py`."""
    from .context_parallel.pool import Pool

    workers = Pool()
    yield workers
    workers.close()
