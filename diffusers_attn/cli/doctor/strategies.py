"""Which strategy suits the GPUs of this machine: predictions of the cost model for two sizes."""

from __future__ import annotations

from typing import Any

from ...parallelize.cost import Workload, attention_seconds
from ...parallelize.degrees import Topology, predictions
from ...parallelize.workload import attention_flops
from ...providers.hardware import KINDS, TYPICAL, Hardware
from ..advise.gpus import GPUS

SIZES = {
    "Flux, 1024 x 1024": (4_608, 24, 57),
    "Wan 2.1 1.3B, 480 x 832, 81 frames": (32_760, 12, 30),
}
"""Number of tokens, heads of 128, and layers."""
PAYS = 1.2
"""The least speed-up of attention at which several GPUs are said to pay."""
_WHY = (
    ("Ulysses over", "It sends the fewest bytes, and heads divide among the GPUs."),
    ("a gather", "Keys and values travel while a GPU computes, in few large calls of the kernel."),
    ("a ring", "Keys and values travel while a GPU computes, and only those of two GPUs take memory."),
)


def suitable(
    connection: str, gpu: str, capability: tuple[int, int], gpus: int, copies: float | None
) -> list[dict[str, Any]]:
    """The fastest strategy for each size in `SIZES`, in bfloat16.

    Args:
        connection: "nvlink", "pcie" or "host memory".
        gpu: name of the GPUs.
        capability: their compute capability.
        gpus: number of GPUs.
        copies: measured bytes per second of the slowest copy between two of them; None if it was not measured.
    """
    hardware = _hardware(connection, gpu, copies)
    kind = KINDS["cuda"]
    found = []
    for name, (tokens, heads, layers) in SIZES.items():
        flops = attention_flops(["auto"], capability, 128, tokens, hardware)
        work = Workload(tokens, heads, heads, 128, layers, flops)
        job = Topology(gpus, "cuda", (heads,), works=(work,), hardware=hardware)
        (best, seconds), *others = predictions(job)
        alone = layers * attention_seconds(work, tokens, tokens, 1, hardware, kind)
        words = str(best)
        found.append(
            {
                "size": name,
                "tokens": tokens,
                "strategy": words,
                "seconds": seconds,
                "one_gpu_seconds": alone,
                "pays": alone / seconds >= PAYS,
                "why": next(why for start, why in _WHY if words.startswith(start)),
                "others": [{"strategy": str(each), "seconds": longer} for each, longer in others],
            }
        )
    return found


def _hardware(connection: str, gpu: str, copies: float | None) -> Hardware:
    """Speeds of these GPUs, with links as fast as the measured copies."""
    typical = TYPICAL[connection]
    known = next((each for key, each in GPUS.items() if key.replace("-", " ") in gpu.lower()), None)
    if known is not None and (connection != "nvlink" or known.nvlink):
        typical = known.hardware(connection, 1)
    if copies is None:
        return typical
    if typical.copies is None:
        return typical._replace(within=typical.within._replace(bytes_per_second=copies))
    share = copies / typical.copies.bytes_per_second
    return typical._replace(
        within=typical.within._replace(bytes_per_second=typical.within.bytes_per_second * share),
        copies=typical.copies._replace(bytes_per_second=copies),
    )
