"""The choice of the provider `auto`, and its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..errors import AttentionProviderError, ProviderUnavailableError
from . import registry, speeds
from .catalog import SPECS
from .hub import PACKAGE
from .serving import CallProperties, Serving, refusal, serving_of


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a call is served, with the reason for its provider. Prints as a short report."""

    serving: Serving
    reason: str
    passed_over: tuple[tuple[str, str], ...]
    """(provider, reason) for each provider that ranks before the chosen one, in that order."""

    def __str__(self) -> str:
        source = "" if self.serving.source == PACKAGE else f" from the {self.serving.source}"
        lines = [f"{self.serving.provider}{source}: {self.reason}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.passed_over])


def select(call: CallProperties) -> Selection:
    """The fastest provider that serves `call` exactly. A lossy provider needs its name in the option `lossy`.

    With the option `source="hub"`, kernels that the Hub has are downloaded when they are the first that can serve.

    Raises:
        AttentionProviderError: no usable provider serves the call.
        ProviderUnavailableError: the kernel cannot be loaded from the Hub.
    """
    options: dict[str, Any] = dict(call.options)
    allowed, source = options.get("lossy", ()), options.get("source", PACKAGE)
    passed_over = []
    for name, evidence in candidates(call, allowed):
        spec = SPECS[name]
        if not spec.capabilities.exact and name not in allowed:
            passed_over.append((name, "lossy, and not named in lossy=..."))
            continue
        from_here = source if spec.hub else PACKAGE
        own = call._replace(options=(("source", from_here),))
        status = registry.status_without_download(name, from_here)
        try:
            why_not = status.reason if not status.available else refusal(spec, own)
            if not why_not:
                return Selection(serving_of(spec, own), evidence, tuple(passed_over))
        except ProviderUnavailableError as error:  # only from the Hub; another provider would be a silent fallback
            raise registry.unavailable(dataclasses.replace(status, available=False, reason=str(error))) from error
        passed_over.append((name, why_not))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise AttentionProviderError(f"no attention provider usable here serves this call: {call}. {reasons}.")


def candidates(call: CallProperties, lossy: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(provider, evidence), the one expected to be fastest first.

    Lossy providers that were named, but not measured on this device, come first: they are named for their speed.
    """
    table: dict[str, tuple[float, float]] = {}
    where = f"on {call.device.type}"
    if call.device.type == "cuda":
        capability = torch.cuda.get_device_capability(call.device)
        where = "on sm_{}{}".format(*capability)
        size, found = speeds.measured(capability, call.head_dim)
        if found and call.dtype in (torch.bfloat16, torch.float16):  # as measured
            table = found
            where += f" with head_dim {size} and {'long' if call.long else 'short'} sequences"
    ranked = sorted(table, key=lambda name: -table[name][call.long])
    measured = [
        (name, f"the fastest that supports the call, {table[name][call.long]:.0f} TFLOP/s measured {where}")
        for name in ranked
    ]
    order = ("native", *speeds.UNMEASURED) if call.device.type != "cuda" else speeds.UNMEASURED
    rest = [
        (name, f"the first that supports the call in the fixed order for calls not measured {where}") for name in order
    ]
    named = [(name, f"named in lossy=..., and not measured {where}") for name in lossy if name not in table]
    return named + measured + [(name, why) for name, why in dict(rest).items() if name not in table]
