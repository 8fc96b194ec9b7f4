"""Speeds of GPUs for predictions. Those of the H200 are measured; others follow from specifications."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import AttentionProviderError
from ...providers.hardware import NETWORK, REFERENCE, REFERENCE_COPIES, TYPICAL, Hardware, Link

_H200 = (989e12, 4.8e12, 450e9)
"""Specification of the H200: dense bfloat16 FLOP/s, bytes per second of the memory, and of NVLink in one direction.
Other GPUs are assumed to reach the same shares of theirs."""


class GPU(NamedTuple):
    """The specification of a GPU."""

    name: str
    capability: tuple[int, int]
    flops: float
    """Dense bfloat16 operations per second, with float32 sums."""
    bytes_per_second: float
    """Bytes per second of its memory."""
    multiprocessors: int
    memory: float
    """Bytes of its memory."""
    nvlink: float = 0.0
    """Bytes per second of NVLink in one direction; 0 without it."""
    links: str = "nvlink"
    """What usually connects GPUs of this type. The drivers of GeForce GPUs copy through the host's memory."""

    def hardware(self, links: str | None, hosts: int) -> Hardware:
        """Speeds for the cost model.

        Args:
            links: "nvlink", "pcie" or "host memory"; None for what usually connects these.
            hosts: number of hosts that share a sequence.

        Raises:
            AttentionProviderError: the GPU has no NVLink.
        """
        kind = links or self.links
        if kind not in LINKS:
            raise AttentionProviderError(f"--links {kind}: accepted are {', '.join(LINKS)}.")
        if kind == "nvlink" and not self.nvlink:
            raise AttentionProviderError(f"{self.name} has no NVLink: give --links pcie or --links 'host memory'.")
        typical = TYPICAL[kind]
        within, copies = typical.within, typical.copies
        if kind == "nvlink":
            share = self.nvlink / _H200[2]
            within = Link(within.seconds, within.bytes_per_second * share)
            copies = Link(REFERENCE_COPIES.seconds, REFERENCE_COPIES.bytes_per_second * share)
        return Hardware(
            REFERENCE.matrix_flops * self.flops / _H200[0],
            REFERENCE.memory_bytes_per_second * self.bytes_per_second / _H200[1],
            self.multiprocessors,
            within,
            NETWORK if hosts > 1 else None,
            copies,
        )


LINKS = ("nvlink", "pcie", "host memory")
GPUS = {
    "h200": GPU("NVIDIA H200", (9, 0), *_H200[:2], 132, 141e9, _H200[2]),
    "h100": GPU("NVIDIA H100 SXM", (9, 0), 989e12, 3.35e12, 132, 80e9, 450e9),
    "b200": GPU("NVIDIA B200", (10, 0), 2250e12, 8.0e12, 148, 180e9, 900e9),
    "a100": GPU("NVIDIA A100 SXM, 80 GB", (8, 0), 312e12, 2.04e12, 108, 80e9, 300e9),
    "l40s": GPU("NVIDIA L40S", (8, 9), 362e12, 0.864e12, 142, 48e9, links="pcie"),
    "rtx-4090": GPU("NVIDIA GeForce RTX 4090", (8, 9), 165e12, 1.01e12, 128, 24e9, links="host memory"),
    "rtx-5090": GPU("NVIDIA GeForce RTX 5090", (12, 0), 210e12, 1.79e12, 170, 32e9, links="host memory"),
}
"""By name, as on the command line."""
