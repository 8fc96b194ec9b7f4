"""Caches filled by the ranks of a job on gloo, and what the package costs to import."""

import json
import os
import sys

import torch

from ... import launching
from .media import album, encode, encode_text

LAZY = ("PIL", "av", "datasets", "pandas", "diffusers", "transformers", "safetensors", "accelerate")


def _on_rank(rank, folder, results):
    import torch.distributed as dist

    from diffusers_attn.training.data import Buckets, GroupRanks, LatentCache, OtherRankError, TextCache, read_folder

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = GroupRanks()
    counts = [0, 0]

    def counting(pixels):
        counts[0] += len(pixels)
        return encode(pixels)

    def counting_text(captions):
        counts[1] += len(captions)
        return encode_text(captions)

    def failing(pixels):
        if rank == 1:
            raise ValueError("on purpose")
        return encode(pixels)

    examples = read_folder(folder / "data", main_process=rank == 0)
    captions = [example.caption for example in examples]
    latents = LatentCache(folder / "cache", {}, Buckets.of(32 * 32)).fill(examples, counting, ranks=ranks)
    text = TextCache(folder / "cache", {}).fill(captions, counting_text, ranks=ranks)
    error = ""
    try:
        LatentCache(folder / "other", {}, Buckets.of(32 * 32)).fill(examples, failing, ranks=ranks)
    except (OtherRankError, ValueError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    results.put((rank, counts, [each.path.name for each in latents], {k: v.name for k, v in text.items()}, error))
    results.close()
    results.join_thread()
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that tears down beside another


def test_two_ranks_on_gloo(tmp_path):
    album(tmp_path / "data", 5)
    context = launching.forkserver()
    results = context.Queue()
    arguments = [(_on_rank, rank, tmp_path, results) for rank in range(2)]
    processes = [context.Process(target=launching.as_child, args=each, daemon=True) for each in arguments]
    try:
        for process in processes:
            process.start()
        first, second = sorted(results.get(timeout=launching.TIMEOUT) for _ in processes)
        for process in processes:
            process.join(launching.TIMEOUT)
    finally:
        for process in processes:
            process.kill()
    assert (first[1], second[1]) == ([3, 3], [2, 3])  # five pictures; five captions and the empty one
    assert first[2:4] == second[2:4] and len(set(first[2])) == 5 and len(first[3]) == 6
    assert first[4].startswith("OtherRankError: encoding images and videos failed on another process")
    assert second[4] == "ValueError: on purpose"
    assert [process.exitcode for process in processes] == [0, 0]


def test_importing_it_imports_nothing_else():
    script = (
        "import torch, sys, json; before = set(sys.modules); import diffusers_attn.training.data;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = launching.run([sys.executable, "-c", script], check=True)
    assert not {name.split(".")[0] for name in json.loads(result.stdout)} & set(LAZY)
