"""Decides the degrees of a job whose user named none, equally on all of its ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..context_parallel.comm.everyone import everyone
from .degrees import Degrees, Topology, choose_degrees, required_degrees
from .measure_hardware import job_hardware
from .targets import Target
from .workload import workloads


def decide_degrees(job: Topology, targets: Sequence[Target], providers: Sequence[str]) -> Degrees:
    """The degrees for a job whose user named none. Every rank gets those that the first rank decides on. All ranks of
    the job must call this.

    Args:
        job: without `works` and `hardware`, which are found here.
        targets: the models to split.
        providers: names of the attention providers in use.
    """
    required = required_degrees(job)
    if required is not None:
        return required
    hardware, source = job_hardware(job.device_type)
    capability = torch.cuda.get_device_capability() if job.device_type == "cuda" else None
    works = workloads(targets, providers, capability, hardware)
    job = dataclasses.replace(job, works=works, hardware=hardware, hardware_source=source)
    return everyone(choose_degrees(job), [None])[0]
