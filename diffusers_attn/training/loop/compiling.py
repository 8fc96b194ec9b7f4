"""Whether a run compiles the blocks of its transformers, where the settings leave that to the trainer (`auto`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...runtime.compile import repeated_blocks
from ..job_ranks import JobRanks
from ..settings.choices import AUTO
from ..settings.config import TrainConfig
from ..settings.flag_names import option

LEAST_STEPS = 300
"""Number of steps from which compiling pays. On an H200, Flux at 1024² takes 29 to 50 s longer to start, by the speed
of the host, and 0.2 s less for each step (benchmarks/results/trainers-flux*-h200.json). So it gains from step 130 or
250 on, and models with shorter steps later."""
COMPILED_KINDS = ("lora", "rslora")
"""Types of adapters that tests compile for every family."""


class Choice(NamedTuple):
    """Whether blocks are compiled, and why."""

    compiled: bool
    reason: str

    def __str__(self) -> str:
        return f"blocks are {'' if self.compiled else 'not '}compiled: {self.reason}"


def choose(
    config: TrainConfig,
    transformers: list[Any],
    device: torch.device,
    ranks: JobRanks,
    sharded: bool = False,
    attempt: Callable[[torch.device], str] | None = None,
) -> Choice:
    """Whether to compile. All processes must call this; all get the same answer.

    It depends on the steps of the whole run and not on those that are left, so that a resumed run computes the same
    bits as one that was not interrupted.

    Args:
        config: the settings.
        transformers: the transformers that are trained.
        device: this process's device.
        ranks: the processes.
        sharded: whether FSDP2 shards weights.
        attempt: see `failure`, the default.
    """
    if config.compile != AUTO:
        return Choice(bool(config.compile), option("compile", config.compile))
    reasons = {
        "there is no CUDA GPU": device.type != "cuda",
        f"a run of fewer than {LEAST_STEPS} steps takes longer with it": config.steps < LEAST_STEPS,
        f"{option('offload', config.offload)} replaces their weights": config.offload != "none",
        f"{option('adapter', config.adapter)}": config.adapter not in COMPILED_KINDS,
        "the base model is quantised": any(getattr(each, "hf_quantizer", None) for each in transformers),
        "FSDP2 shards them": sharded,
        "the transformer has no repeated blocks": not all(map(repeated_blocks, transformers)),
    }
    for reason, holds in reasons.items():
        if holds:
            return Choice(False, f"{reason} ({option('compile', AUTO)})")
    failed = next(filter(None, ranks.everyone((attempt or failure)(device))), "")
    if failed:
        return Choice(False, f"torch.compile fails here: {failed} ({option('compile', AUTO)})")
    return Choice(True, f"the run has {LEAST_STEPS} steps or more on a GPU. {option('compile', False)} leaves it out")


def failure(device: torch.device) -> str:
    """Compiles and runs a line of code on a device. Returns the error, "" if there is none: torch.compile needs Triton
    and a C compiler."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # Inductor, Triton and the compiler have their own types
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
    return ""
