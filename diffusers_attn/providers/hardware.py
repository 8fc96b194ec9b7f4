"""Speeds of devices and of the links between them: the figures that costs of context parallelism are computed from.

`Hardware` is measured on the machine (`parallelize/measure_hardware.py`). The table `TYPICAL` serves where nothing can
be measured, and for predictions of recorded runs.
"""

from __future__ import annotations

from typing import NamedTuple


class Link(NamedTuple):
    """A connection over which every rank sends at the same time."""

    seconds: float
    """Latency of a message."""
    bytes_per_second: float
    """Bytes per second out of each rank."""

    def time(self, nbytes: float, messages: int = 1) -> float:
        """Seconds for `nbytes` in all, sent as this number of messages."""
        return messages * self.seconds + nbytes / self.bytes_per_second


class Hardware(NamedTuple):
    """The devices of a job and their links. Of different devices, the slowest counts."""

    matrix_flops: float
    """Floating-point operations per second of large matrix products, in half precision on a GPU."""
    memory_bytes_per_second: float
    """Bytes per second of a device's memory, read and written."""
    multiprocessors: int
    """Number of a GPU's multiprocessors; 1 for a CPU."""
    within: Link
    """Collectives between ranks of one host."""
    between: Link | None = None
    """Collectives between hosts; None for one host."""
    copies: Link | None = None
    """Copies into another GPU's memory by copy engines; None if GPUs do not reach each other's memory."""


class DeviceKind(NamedTuple):
    """What the implementation does on one type of device."""

    overlaps: bool
    """Whether data travels while the device computes."""
    merge_passes: float
    """Bytes that merging two results reads and writes, in units of the bytes of one result."""
    pack_passes: float
    """Bytes that Ulysses reads and writes to pack all of its exchanges, in units of the bytes of the query."""
    launch_seconds: float
    """Overhead of a kernel: its launch in a CUDA graph, and a partly empty beginning and end."""
    query_tile: int
    """Number of queries that one multiprocessor attends with at a time."""


KINDS: dict[str, DeviceKind] = {
    # merge: 73 us for 50.3 MB (Wan 1.3B, context_parallel-wan-h200x2.json) at 3.5 TB/s. pack: exchange kernels minus
    # the same kernels of the gather, about 24 us for 14.2 MB (context_parallel-flux-h200x2.json). launch: attention in
    # two calls takes 8 us more than in one there. tile: 128 queries in all kernels for sm_90 (arXiv 2407.08608).
    "cuda": DeviceKind(True, 5, 6, 4e-6, 128),
    # merge: seven PyTorch operators, some of them in float32 (attention/merge.py). pack: every exchanged tensor is
    # read and written once.
    "cpu": DeviceKind(False, 23, 8, 20e-6, 1),
}
"""By device type. Other types are treated as "cuda"."""

REFERENCE_COPIES = Link(1e-6, 320e9)
"""Copies between two H200 over NVLink: 16 MiB in 52 us."""
TYPICAL: dict[str, Hardware] = {
    # H200: products with the rows of a shard 650 TFLOP/s; memory 3.5 of 4.8 TB/s. NCCL: 128 MiB at 296
    # GB/s between four GPUs; its latency in a CUDA graph from the difference of Ulysses and the gather, in
    # context_parallel-flux-h200x2.json, -wan-providers-h200x2.json and mechanisms-flux-h200x4.json.
    "nvlink": Hardware(650e12, 3.5e12, 132, Link(12e-6, 300e9), None, REFERENCE_COPIES),
    # Not measured here: PCIe 4.0 x16, 32 GB/s by its specification, of which about 60 % arrive.
    "pcie": Hardware(200e12, 1e12, 108, Link(20e-6, 20e9), None, Link(5e-6, 20e9)),
    # Not measured here: two copies, through the host's memory.
    "host memory": Hardware(200e12, 1e12, 108, Link(30e-6, 10e9)),
    # Gloo between processes of one host.
    "cpu": Hardware(100e9, 10e9, 1, Link(200e-6, 1e9)),
}
"""By what connects the devices. `between` is None; `NETWORK` is typical."""
REFERENCE = TYPICAL["nvlink"]
"""The device for which graphs are compiled with attention in one call or in two."""
SECONDS_OF_A_SECOND_CALL = 60e-6
"""Additional time of attention in two calls in a compiled graph of the reference device: a partly empty last wave in
each, and the merge, which fuses worse with what follows (mechanisms-flux-h200x2.json and -h200x4.json)."""
NETWORK = Link(30e-6, 25e9)
"""Between hosts, not measured here: InfiniBand NDR, 50 GB/s for each GPU by its specification, of which half arrive."""
ATTENTION_OF_MATRIX_FLOPS = 0.7
"""Speed of attention as a share of that of matrix products, for providers without a measured speed: cuDNN's on an
H200."""
TILES_OF_MEASURED = (864, 3072)
"""Tiles of queries of the calls in `speeds.py`: 24 heads of 4,608 queries; 12 heads of 32,760."""
