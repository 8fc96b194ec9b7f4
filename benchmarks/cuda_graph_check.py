"""Milliseconds of the check for changes before a CUDA graph of Flux is replayed (`runtime/cuda_graphs/snapshot.py`).

python benchmarks/cuda_graph_check.py
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusers_attn import set_attention_provider
from diffusers_attn.runtime.cuda_graphs.snapshot import Snapshot


def main() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    set_attention_provider(model, "native")
    snapshot = Snapshot(model)
    times = []
    for _ in range(100):
        began = time.perf_counter()
        assert snapshot.holds()
        times.append((time.perf_counter() - began) * 1e3)
    print(f"{len(list(model.modules()))} modules: median {statistics.median(times):.2f} ms, least {min(times):.2f} ms")


if __name__ == "__main__":
    main()
