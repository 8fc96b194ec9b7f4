"""verify_cp_plan on the processes of the pool, instead of on some that it starts."""

from __future__ import annotations

import pathlib

from diffusers_attn.verify_plan.rank import STRATEGIES, Job, work
from diffusers_attn.verify_plan.verify import _report

from ..zoo import CASES


def job_of(meshes, folder, job_of_rank, name, model, inputs):
    """What a process of verify_cp_plan does, on a process of the pool."""
    built = CASES[name].build() if model is None else model
    rank = meshes(2, 1).rank
    work(
        job_of_rank,
        built,
        inputs,
        rank,
        pathlib.Path(folder),
        lambda ring, ulysses, **how: meshes(ring, ulysses, **how),
    )


def verify_on_pool(
    pool, folder, name, plan, model, inputs, strategies=tuple(STRATEGIES), gradients=False, replace_sdpa=False
):
    """The report on a model, or on the zoo's model of that name where `model` is None."""
    for path in folder.iterdir():  # of an earlier call
        path.unlink()
    job = Job(plan, 2, strategies, "native", replace_sdpa, gradients, 1e-4, 60.0, None)
    pool.run(2, job_of, folder=str(folder), job_of_rank=job, name=name, model=model, inputs=inputs)
    return _report(folder, job, name, [0, 0])
