"""Links are measured by all ranks together, kept in a file, and equal on every rank; so are the chosen degrees."""

from __future__ import annotations

import json
import logging
import os
import time

import pytest
import torch
import torch.distributed as dist

from diffusers_attn import disable_context_parallel, enable_context_parallel
from diffusers_attn.context_parallel.comm.group import Group
from diffusers_attn.parallelize import measure_hardware as measuring
from diffusers_attn.parallelize.hardware_bench import SIZES, Bench, measure_copies
from diffusers_attn.parallelize.measure_hardware import SETTING, job_hardware
from diffusers_attn.providers.hardware import NETWORK, TYPICAL, Hardware, Link

from ..context_parallel.shared_memory import FileMemory
from .test_enable import build


class Settings:
    """Sets the environment of this rank for one measurement, in a process that has measured nothing yet."""

    def __init__(self, setting, **environment):
        self.wanted = {SETTING: setting, **environment}

    def __enter__(self):
        self.before = {name: os.environ.get(name) for name in self.wanted}
        for name, value in self.wanted.items():
            self._set(name, value)
        measuring._measured.clear()

    def __exit__(self, *error):
        for name, value in self.before.items():
            self._set(name, value)
        measuring._measured.clear()

    def _set(self, name, value):
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def measured(meshes, folder):
    """Two measurements that keep a file, one in a "new" process that reads it, and what was logged."""
    with Settings(folder if dist.get_rank() == 0 else "typical"):  # the first rank's setting counts
        first = job_hardware("cpu")
        begin = time.perf_counter()
        again = job_hardware("cpu")
        seconds = time.perf_counter() - begin
        in_process = dict(measuring._measured)
        measuring._measured.clear()
        read = job_hardware("cpu")
    return first, again, read, list(in_process.values()), seconds


def test_ranks_measure_once_and_keep_the_result(pool, tmp_path):
    answers = pool.run(4, measured, folder=str(tmp_path / "new"))
    hardware, source = answers[0][0]
    for first, again, read, in_process, _ in answers:
        assert first == again == read == (hardware, source) and in_process == [hardware]
    assert isinstance(hardware, Hardware) and hardware.between is None and hardware.copies is None
    assert 1e6 < hardware.within.bytes_per_second < 1e12 and 0 < hardware.within.seconds < 10
    assert hardware.matrix_flops > 1e8 and hardware.memory_bytes_per_second > 1e7
    assert source.startswith("links: collectives ") and "GB/s" in source
    (file,) = (tmp_path / "new").iterdir()
    kept = json.loads(file.read_text())
    assert kept["hardware"]["within"] == hardware.within._asdict() and len(kept["devices"][-1]) == 4


def between_nodes(meshes):
    """As if the four ranks were on two hosts."""
    with Settings("uncached", LOCAL_WORLD_SIZE="2"):
        found, _ = job_hardware("cpu")
    with Settings("uncached", LOCAL_WORLD_SIZE="1"):
        alone, _ = job_hardware("cpu")
    with Settings("typical", LOCAL_WORLD_SIZE="2"):
        typical, source = job_hardware("cpu")
    return found, alone, typical, source


def test_links_between_nodes_are_measured_by_themselves(pool):
    answers = pool.run(4, between_nodes)
    found, alone, typical, source = answers[0]
    assert all(each == answers[0] for each in answers)
    assert found.between is not None and found.between != found.within
    assert alone.between == alone.within  # no two ranks are on one host
    assert typical == TYPICAL["cpu"]._replace(between=NETWORK) and source == "speeds are typical ones"


def with_file(meshes, folder, content, logged=False):
    """What is used, and how often it was measured, if the file has this content."""
    count, kept = [], measuring._measure

    def counted(*arguments):
        count.append(1)
        return kept(*arguments)

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Keep()
    measuring._log.addHandler(handler)
    measuring._measure = counted
    try:
        with Settings(folder):
            if content is not None and dist.get_rank() == 0:
                job = json.dumps(content).encode() if not isinstance(content, bytes) else content
                for file in os.listdir(folder):
                    with open(os.path.join(folder, file), "wb") as opened:
                        opened.write(job)
            dist.barrier()
            found, _ = job_hardware("cpu")
    finally:
        measuring._measure = kept
        measuring._log.removeHandler(handler)
    return found, len(count), messages


def test_a_file_that_is_damaged_or_of_another_host_is_measured_again(pool, tmp_path):
    folder = str(tmp_path)
    first = pool.run(4, with_file, folder=folder, content=None)
    (file,) = tmp_path.iterdir()
    good = json.loads(file.read_text())
    assert [times for _, times, _ in first] == [1] * 4
    slow = good | {"hardware": good["hardware"] | {"within": {"seconds": 0.5, "bytes_per_second": 7.0}}}
    for found, times, _ in pool.run(4, with_file, folder=folder, content=slow):  # what is in the file is used
        assert times == 0 and found.within == Link(0.5, 7.0)
    other = good | {"devices": [*good["devices"][:-1], [["elsewhere", "8 CPUs"]] * 4]}
    negative = good | {"hardware": good["hardware"] | {"matrix_flops": -1}}
    nothing = good | {"hardware": {}}
    for content in (file.read_bytes()[:50], b"", b"\xff\xfe", other, negative, nothing, [1]):
        for _, times, _ in pool.run(4, with_file, folder=folder, content=content):
            assert times == 1, content
        assert json.loads(file.read_text())["devices"] == good["devices"]  # and written again
    (_, _, messages), *others = pool.run(4, with_file, folder=folder, content=b"{")
    assert len(messages) == 1 and str(file) in messages[0] and "measured again" in messages[0]
    assert not any(each for _, _, each in others)  # only the first rank reads


def test_a_folder_that_cannot_be_written_to_is_no_error(pool, tmp_path):
    (tmp_path / "file").write_text("")
    (found, times, messages), *others = pool.run(4, with_file, folder=str(tmp_path / "file" / "folder"), content=None)
    assert times == 1 and all(each[0] == found for each in others)
    assert len(messages) == 1 and "are not kept" in messages[0] and SETTING in messages[0]


def failing(meshes):
    """As if one rank had no memory left for the measurement."""
    kept = Bench.matrix_flops

    def fails(self):
        raise torch.cuda.OutOfMemoryError("no memory left\nmore")

    if dist.get_rank() == 2:
        Bench.matrix_flops = fails
    try:
        with Settings("uncached"):
            return job_hardware("cpu")
    finally:
        Bench.matrix_flops = kept


def test_a_rank_that_cannot_measure_has_all_ranks_take_typical_speeds(pool):
    for found, source in pool.run(4, failing):
        assert found == TYPICAL["cpu"]
        assert source == (
            "speeds are typical ones, since they could not be measured (OutOfMemoryError: no memory left)"
        )


def copied(meshes):
    mesh = meshes(2, 1).ring
    bench = Bench(SIZES["cpu"], "cpu")
    memory = FileMemory(Group(mesh.name, mesh.rank, mesh.size), SIZES["cpu"].large)
    bench.bytes.fill_(1 + mesh.rank)
    found = measure_copies(bench, memory, mesh.rank, mesh.size)
    return found, memory.buffers[mesh.rank].unique().tolist()


def test_copies_are_written_into_the_next_ranks_memory(pool):
    for rank, (link, written) in enumerate(pool.run(2, copied)):
        assert written == [2 - rank] and link.bytes_per_second > 1e6 and link.seconds > 0


def chosen(meshes, folder):
    """Reports of two models, enabled with links that were measured."""
    with Settings(folder):
        reports = []
        for name in ("wan", "flux"):
            model = build(name)
            reports.append(enable_context_parallel(model, verbose=False))
            disable_context_parallel(model)
    return [(each.ulysses_degree, each.ring_degree, each.rotate_method, each.reason) for each in reports]


def test_ranks_choose_the_same_and_the_report_says_what_was_predicted(pool, tmp_path):
    answers = pool.run(4, chosen, folder=str(tmp_path))
    assert all(each == answers[0] for each in answers)
    for (*_, reason), tokens in zip(answers[0], ("32,760", "4,608")):
        assert reason.startswith(f"predicted at {tokens} tokens: ") and "; links: collectives " in reason


def apart(meshes):
    """Ranks whose models would have them choose differently: the first decides."""
    from diffusers_attn.parallelize.decide import decide_degrees
    from diffusers_attn.parallelize.degrees import Topology

    heads = (4,) if dist.get_rank() == 0 else (2,)
    with Settings("typical"):
        return decide_degrees(Topology(4, "cpu", heads), [], ["native"])[:3]


def test_the_first_rank_decides(pool):
    assert set(pool.run(4, apart)) == {(4, 1, None)}


@pytest.mark.parametrize("setting", ["measured", "~/elsewhere"])
def test_the_folder(setting, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    expected = tmp_path / "elsewhere" if setting != "measured" else tmp_path / ".cache" / "diffusers_attn"
    assert measuring._folder(setting) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert measuring._folder("measured") == tmp_path / "xdg" / "diffusers_attn"


def test_speeds_in_words():
    hardware = TYPICAL["pcie"]._replace(within=Link(1.004e-4, 1.84e9), copies=None, between=None)
    assert measuring._in_words(hardware) == "collectives 1.84 GB/s and 100 µs"
