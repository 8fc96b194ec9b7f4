"""Measures the devices of a job and the links between them, once, and keeps the result in a file.

All ranks measure together, and the slowest counts. The first rank reads and writes the file, and tells the others. The
environment variable `DIFFUSERS_ATTN_LINKS` of the first rank changes this:

- not set, or "measured": the file is in the user's cache folder, `~/.cache/diffusers_attn`
  (`$XDG_CACHE_HOME/diffusers_attn`). On GPUs the measurement makes an NCCL communicator and destroys it, which takes
  0.8 s on two H200 and drops recorded CUDA graphs; once for each set of hosts and devices.
- a path: the file is in this folder. A file can be deleted at any time.
- "uncached": nothing is read or written; every process measures.
- "typical": nothing is measured; the table in `providers/hardware.py` serves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..atomic_files import write_atomically
from ..context_parallel import job
from ..context_parallel.comm.everyone import everyone
from ..json_files import read_json
from ..providers.hardware import NETWORK, TYPICAL, Hardware, Link
from .hardware_bench import SIZES, Bench, copies_between, exchange

SETTING = "DIFFUSERS_ATTN_LINKS"
MEASURED, UNCACHED, TYPICAL_ONLY = "measured", "uncached", "typical"
_log = logging.getLogger(__name__)
_measured: dict[str, Hardware] = {}
"""Results of this process, by the job's devices."""


class _Rank(NamedTuple):
    """What a rank tells the others about itself."""

    setting: str
    host: str
    device: str
    nvlink: bool
    peer_access: bool


def job_hardware(device_type: str) -> tuple[Hardware, str]:
    """The hardware of all ranks of the job, and where the figures come from. Equal on every rank; all ranks of the job
    must call this.

    Args:
        device_type: device type of the ranks. On GPUs, the current device is this rank's.
    """
    mine = _Rank(
        os.environ.get(SETTING, ""), socket.gethostname(), _device(device_type), job.nvlink(device_type),
        job.peer_access(device_type),
    )  # fmt: skip
    ranks: list[_Rank] = everyone(mine, [None])
    setting = ranks[0].setting or MEASURED
    per_node = _ranks_per_node(len(ranks))
    if setting == TYPICAL_ONLY or device_type not in SIZES:
        return _typical(device_type, ranks, per_node), "speeds are typical ones"
    devices = json.dumps([device_type, torch.__version__, per_node, [(each.host, each.device) for each in ranks]])
    file = None if setting == UNCACHED else _folder(setting) / f"links-{_digest(devices)}.json"
    known = _known(devices, file) if dist.get_rank() == 0 else None
    found: Hardware | None = everyone(known, [None])[0]
    if found is None:
        found, problem = _measure(device_type, ranks, per_node)
        if problem is not None:
            return found, f"speeds are typical ones, since they could not be measured ({problem})"
        if dist.get_rank() == 0 and file is not None:
            _write(file, devices, found)
    _measured[devices] = found
    return found, f"links: {_in_words(found)}"


def _device(device_type: str) -> str:
    if device_type != "cuda":
        return f"{os.cpu_count()} CPUs"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} {properties.uuid}"


def _ranks_per_node(world: int) -> int:
    per_node = job.ranks_per_node() or world
    return per_node if world % per_node == 0 else world


def _in_words(found: Hardware) -> str:
    named = {"collectives": found.within, "copies": found.copies, "between hosts": found.between}
    return ", ".join(
        f"{name} {link.bytes_per_second / 1e9:.3g} GB/s and {link.seconds * 1e6:.3g} µs"
        for name, link in named.items()
        if link is not None
    )


# The file


def _folder(setting: str) -> Path:
    if setting != MEASURED:
        return Path(setting).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers_attn"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _known(devices: str, file: Path | None) -> Hardware | None:
    """What this process has measured, or what the file says for these devices; None if there is neither."""
    if devices in _measured or file is None:
        return _measured.get(devices)
    try:
        kept = read_json(file)
        return _from_json(kept["hardware"]) if kept["devices"] == json.loads(devices) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # damaged, or not readable
        _log.warning("the speeds of the links are measured again: %s cannot be used (%s)", file, error)
        return None


def _write(file: Path, devices: str, found: Hardware) -> None:
    kept = json.dumps({"devices": json.loads(devices), "hardware": _as_json(found)}, indent=1)
    try:
        write_atomically(file, lambda path: path.write_text(kept))
    except OSError as error:
        _log.warning(
            "the measured speeds of the links are not kept: %s (%s). Set %s to a folder that can be written to, or to "
            '"%s".', error, file, SETTING, UNCACHED
        )  # fmt: skip


def _as_json(found: Hardware) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Link) else value for name, value in found._asdict().items()}


def _from_json(kept: dict[str, Any]) -> Hardware:
    """The inverse of `_as_json`. Raises an exception if it is no such object, or a value is not positive."""
    values: dict[str, Any] = {name: Link(**each) if isinstance(each, dict) else each for name, each in kept.items()}
    found = Hardware(**values)
    links = [link for link in (found.within, found.between, found.copies) if link is not None]
    numbers = [*found[:3], *(value for link in links for value in link)]
    if not all(math.isfinite(value) and value > 0 for value in numbers):
        raise ValueError(f"speeds are positive numbers, but it has {kept}")
    return found


# The measurement


def _typical(device_type: str, ranks: list[_Rank], per_node: int) -> Hardware:
    if device_type != "cuda":
        found = TYPICAL["cpu"]
    elif not all(each.peer_access for each in ranks):
        found = TYPICAL["host memory"]
    else:
        found = TYPICAL["nvlink" if all(each.nvlink for each in ranks) else "pcie"]
    return found._replace(between=NETWORK if per_node < len(ranks) else None)


def _measure(device_type: str, ranks: list[_Rank], per_node: int) -> tuple[Hardware, str | None]:
    """The measured hardware; or the typical one, and the reason why nothing was measured. Equal on every rank."""
    typical = _typical(device_type, ranks, per_node)
    sizes = SIZES[device_type]
    bench: Bench | None = None
    problem = None
    try:  # before ranks depend on each other
        bench = Bench(sizes, device_type)
        speeds = bench.matrix_flops(), bench.memory_bytes_per_second()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
    problems = [each for each in everyone(problem, [None]) if each is not None]
    if problems or bench is None:
        return typical, problems[0]
    own_group = device_type == "cuda"  # NCCL's buffers are freed with the group
    group = dist.new_group() if own_group else dist.group.WORLD
    try:
        within = bench.link(exchange(bench, group, per_node, between=False)) if per_node > 1 else None
        between = bench.link(exchange(bench, group, per_node, between=True)) if per_node < len(ranks) else None
        copies = None
        if typical.copies is not None:
            copies = copies_between(bench, group, len(ranks)) if per_node == len(ranks) else within
    finally:
        if own_group:
            dist.destroy_process_group(group)
    everyones = everyone((*speeds, within, between, copies), [None])
    flops, memory = min(each[0] for each in everyones), min(each[1] for each in everyones)
    within, between, copies = (_slowest([each[place] for each in everyones]) for place in (2, 3, 4))
    processors = bench.multiprocessors
    one = within or between
    assert one is not None  # a job has two ranks
    return Hardware(flops, memory, processors, one, between, copies), None


def _slowest(links: list[Link | None]) -> Link | None:
    given = [link for link in links if link is not None]
    if len(given) < len(links):
        return None
    return Link(max(link.seconds for link in given), min(link.bytes_per_second for link in given))
