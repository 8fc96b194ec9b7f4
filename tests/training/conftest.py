"""Models, data and processes that tests of training share."""

from __future__ import annotations

import itertools

import pytest

from ..context_parallel.pool import Pool
from ..launching import TIMEOUT, as_child, forkserver
from . import worlds
from .runs import COMMON, SETTINGS, SOUNDING, VIDEOS, make_data, make_model


@pytest.fixture(scope="session")
def run_worlds(tmp_path_factory):
    """Runs jobs on up to four processes; see `worlds.py`."""
    pool = Pool(work=worlds.work, timeout=worlds.TIMEOUT)
    yield lambda *these: worlds.run(pool, tmp_path_factory.mktemp("worlds"), *these)
    pool.close()


@pytest.fixture(scope="session")
def settings_of(tmp_path_factory):
    """Settings for a run of one of the four families, with a folder of its own."""
    folder = tmp_path_factory.mktemp("training")
    made = {}
    numbers = itertools.count()

    def settings(name, **others):
        if name not in made:
            kind = "video" if name in VIDEOS else "sounding" if name in SOUNDING else "image"
            data = folder / f"data_{kind}"
            data = data if data.exists() else make_data(kind, data)
            made[name] = {"model": str(make_model(name, folder / name)), "data": str(data)}
        output = folder / f"run_{next(numbers)}"
        cache = str(folder / f"cache_{name}")
        found = {**COMMON, **SETTINGS[name], **made[name], "output_dir": str(output), "cache_dir": cache, **others}
        return {**found, "lr_warmup_steps": min(found["lr_warmup_steps"], found["steps"])}

    return settings


@pytest.fixture(scope="session")
def forked():
    """Runs a function in a process that starts with everything imported; returns its exit code."""
    context = forkserver()

    def run(job, *arguments, timeout=TIMEOUT):
        process = context.Process(target=as_child, args=(job, *arguments))
        process.start()
        try:
            process.join(timeout)
            if process.is_alive():
                raise TimeoutError(f"{job.__name__} did not end within {timeout} s")
        finally:
            process.kill()
            process.join()
        return process.exitcode

    return run


@pytest.fixture
def forked_in_background():
    """Starts a function in a process of its own, which ends with the test; returns the process."""
    started = []

    def run(job, *arguments):
        started.append(forkserver().Process(target=as_child, args=(job, *arguments)))
        started[-1].start()
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.join()
