"""Links and speeds, measured on two GPUs or more: plausible, equal on all ranks, and without a lasting communicator."""

from __future__ import annotations

import json
import os
import time

import torch

from diffusers_attn.parallelize import measure_hardware as measuring
from diffusers_attn.parallelize.measure_hardware import SETTING, job_hardware

from .several import SEVERAL_GPUS, SIZE

pytestmark = SEVERAL_GPUS


def measured(meshes, folder):
    """Two measurements of processes that have measured nothing, and MiB of the device that they leave in use."""
    os.environ[SETTING] = folder
    device = torch.cuda.current_device()
    answers = []
    for _ in range(2):
        measuring._measured.clear()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        begin = time.perf_counter()
        found, source = job_hardware("cuda")
        seconds = time.perf_counter() - begin
        torch.cuda.empty_cache()
        answers.append((found, source, (free - torch.cuda.mem_get_info(device)[0]) / 2**20, seconds))
    return answers


def test_links_of_gpus(gpus, tmp_path):
    first, second = (gpus.run(SIZE, measured, folder=setting)[0] for setting in ("uncached", str(tmp_path)))
    print(json.dumps(first, default=str), json.dumps(second, default=str))  # for docs/cost_model.md; see pytest -s
    for found, source, _, _ in [*first, *second]:
        assert source.startswith("links: "), source
        assert 1e13 < found.matrix_flops < 1e16 and 1e11 < found.memory_bytes_per_second < 1e14
        assert 1e9 < found.within.bytes_per_second < 2e12 and 1e-7 < found.within.seconds < 1e-3
        if found.copies is not None:
            assert 1e9 < found.copies.bytes_per_second < 2e12 and 1e-7 < found.copies.seconds < 1e-3
    (one, *_), (other, *_) = first  # measured twice
    assert 0.5 < one.within.bytes_per_second / other.within.bytes_per_second < 2
    assert second[0][0] == second[1][0]  # the second time, read from the file
    assert first[1][2] < 200  # NCCL's communicator has ended; its first use loads modules that stay


def test_all_ranks_have_the_same(gpus):
    answers = gpus.run(SIZE, measured, folder="uncached")
    assert all([each[0] for each in answer] == [each[0] for each in answers[0]] for answer in answers)
