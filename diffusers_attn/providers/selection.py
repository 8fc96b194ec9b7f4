"""The choice of the provider `auto`, and its reason."""

from __future__ import annotations

import dataclasses

import torch

from ..errors import AttentionProviderError
from . import registry, speeds
from .catalog import SPECS
from .serving import CallProperties, Serving, plan, refusal


@dataclasses.dataclass(frozen=True)
class Selection:
    """The plan for a call, with the reason for its provider. Prints as a short report."""

    plan: Serving
    reason: str
    passed_over: tuple[tuple[str, str], ...]
    """(provider, reason) for each provider that ranks before the chosen one, in that order."""

    def __str__(self) -> str:
        lines = [f"{self.plan.provider}: {self.reason}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.passed_over])


def select(call: CallProperties) -> Selection:
    """The fastest provider that serves `call` exactly. A lossy provider needs its name in the option `lossy`.

    Raises:
        AttentionProviderError: no usable provider serves the call.
    """
    allowed = dict(call.options).get("lossy", ())
    call = call._replace(options=())
    passed_over = []
    for name, evidence in candidates(call):
        spec = SPECS[name]
        if not spec.capabilities.exact and name not in allowed:  # type: ignore[operator]
            passed_over.append((name, "lossy, and not named in lossy=..."))
            continue
        status = registry.provider_status(name)
        why_not = status.reason if not status.available else refusal(spec, call)
        if not why_not:
            return Selection(plan(spec, call), evidence, tuple(passed_over))
        passed_over.append((name, why_not))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise AttentionProviderError(f"no attention provider usable here serves this call: {call}. {reasons}.")


def candidates(call: CallProperties) -> list[tuple[str, str]]:
    """(provider, evidence), the one expected to be fastest first."""
    table: dict[str, tuple[float, float]] = {}
    where = f"on {call.device.type}"
    if call.device.type == "cuda":
        capability = torch.cuda.get_device_capability(call.device)
        where = "on sm_{}{}".format(*capability)
        sizes = [size for chip, size in speeds.MEASURED if chip == capability and call.head_dim <= size]
        if sizes and call.dtype in (torch.bfloat16, torch.float16):  # as measured
            table = speeds.MEASURED[capability, min(sizes)]
            where += f" with head_dim {min(sizes)} and {'long' if call.long else 'short'} sequences"
    ranked = sorted(table, key=lambda name: -table[name][call.long])
    measured = [
        (name, f"the fastest that supports the call, {table[name][call.long]:.0f} TFLOP/s measured {where}")
        for name in ranked
    ]
    order = ("native", *speeds.UNMEASURED) if call.device.type != "cuda" else speeds.UNMEASURED
    rest = [
        (name, f"the first that supports the call in the fixed order for calls not measured {where}") for name in order
    ]
    return measured + [(name, why) for name, why in dict(rest).items() if name not in table]
