"""Predictions of the cost model (`diffusers_attn/parallelize/cost.py`) beside the recorded runs.

The model predicts attention, exchanges and merges. A step has other work too, which is taken from one GPU:

    step = prediction + fixed + (step of one GPU - its attention - fixed) / ranks

`fixed` is what more ranks do not make shorter: gaps between kernels, as the profile of one GPU shows them, and products
with weights that every rank computes in full. Links and devices are those of the table in
`diffusers_attn/providers/hardware.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_attn.parallelize.cost import (
    Strategy,
    Workload,
    attention_seconds,
    gather_seconds,
    layer_seconds,
)
from diffusers_attn.parallelize.workload import attention_flops
from diffusers_attn.providers.hardware import KINDS, TYPICAL

RESULTS = Path(__file__).parent / "results"
HARDWARE, KIND = TYPICAL["nvlink"], KINDS["cuda"]
WITHIN = 0.10
"""The largest error of a step that is not reported as a miss."""


class Model(NamedTuple):
    """The attention of a recorded model, and what more ranks do not make shorter."""

    layers: tuple[tuple[int, int, int, int], ...]
    """(tokens, heads, layers, weights of products that need no keys); all heads have 128."""
    gaps_ms: float
    """Gaps between kernels on one GPU: `from_first_to_last_ms - busy_ms` of the profile in context_parallel-*.json."""
    replicated_weights: float
    """Number of weights that every rank multiplies with a vector: modulation."""


MODELS = {
    "Flux 1024²": Model(((4608, 24, 19, 3072**2), (4608, 24, 38, 5 * 3072**2)), 126.57 - 121.27, 344 * 3072**2),
    "Wan 2.1 1.3B 480p, 81 frames": Model(((32760, 12, 30, 1536**2),), 514.75 - 512.41, 0),
    "Wan 2.1 14B 480p, 81 frames, 8 of its 40 layers": Model(((32760, 40, 8, 5120**2),), (514.75 - 512.41) * 8 / 30, 0),
}
# Of runs that did not measure one GPU; from the run with the same model and compilation.
ONE_GPU_MS = {("Flux 1024²", True): 130.8, ("Flux 1024²", False): 171.2, ("Wan 2.1 1.3B 480p, 81 frames", True): 522.7}
APART = frozenset(
    f"{run}-{gpus}"
    for run, gpus in [
        ("context_parallel-eager", "h200x2"), ("context_parallel-flux-busy", "h200x2"),
        ("context_parallel-flux", "h200x2"), ("context_parallel-wan-providers", "h200x2"),
        ("context_parallel-wan-by-default-cudnn", "h200x4"), ("mechanisms-flux", "h200x4"),
    ]
)  # fmt: skip
"""Runs in which Ulysses sent query, key and value in an exchange each."""
QUOTED = {
    "gather": (136.7, Strategy(1, 4, "allgather")),
    "ring": (138.7, Strategy(1, 4, "alltoall")),
    "ulysses": (142.9, Strategy(4, 1, None)),
    "ulysses 2 x gather 2": (148.0, Strategy(2, 2, "allgather")),
}
"""Wan 1.3B on four GPUs, compiled, from docs/design.md: milliseconds of a step whose record was not kept."""
LAYERS_US = {
    ("Flux 1024²", "half of the attention"): 233,
    ("Flux 1024²", "ulysses"): 487,
    ("Flux 1024²", "gather, two calls, sent late"): 327,
    ("Wan 2.1 1.3B 480p, 81 frames", "half of the attention"): 5830,
    ("Wan 2.1 1.3B 480p, 81 frames", "ulysses"): 6470,
    ("Wan 2.1 1.3B 480p, 81 frames", "gather, two calls, sent late"): 6127,
    ("Wan 2.1 14B 480p, 81 frames, 8 of its 40 layers", "half of the attention"): 19350,
    ("Wan 2.1 14B 480p, 81 frames, 8 of its 40 layers", "ulysses"): 21440,
    ("Wan 2.1 14B 480p, 81 frames, 8 of its 40 layers", "gather, two calls, sent late"): 20428,
}
"""One layer on two GPUs in a CUDA graph, from the first table of docs/design.md, in microseconds."""


class Row(NamedTuple):
    """A measured step beside its prediction, in milliseconds."""

    run: str
    """Name of the recorded run, without folder and suffix."""
    model: str
    ranks: int
    compiled: bool
    strategy: str
    degrees: Strategy
    provider: str
    measured: float
    predicted: float
    predicted_part: float
    """Attention, exchanges and merges."""

    @property
    def error(self) -> float:
        """Error of the step."""
        return self.predicted / self.measured - 1

    @property
    def part_error(self) -> float:
        """Error of the part that the strategy changes. Its measured value is the step without the predicted rest."""
        return self.predicted_part / (self.measured - self.predicted + self.predicted_part) - 1


def works(model: str, provider: str) -> list[Workload]:
    return [
        Workload(tokens, heads, heads, 128, layers, _flops(provider, tokens), 2, beside)
        for tokens, heads, layers, beside in MODELS[model].layers
    ]


def _flops(provider: str, tokens: int) -> float:
    return attention_flops([provider], (9, 0), 128, tokens, HARDWARE)


def rows() -> Iterator[Row]:
    """All recorded steps of our strategies."""
    for path in sorted([*RESULTS.glob("context_parallel-*.json"), *RESULTS.glob("mechanisms-*.json")]):
        record = json.loads(path.read_text())
        ranks, compiled = record["environment"]["ranks"], record["environment"]["blocks_compiled"]
        single = {each["model"]: each["ms"] for each in record["results"] if each["strategy"] == "single"}
        for each in record["results"]:
            found = _variant(each, ranks, compiled, path.stem in APART)
            model, provider = each["model"], each["provider"]
            one = single.get(model) or ONE_GPU_MS.get((model, compiled))
            if found is not None and one is not None:
                yield _row(path.stem, model, ranks, compiled, each["strategy"], provider, each["ms"], one, found)
    wan = "Wan 2.1 1.3B 480p, 81 frames"
    for name, (measured, degrees) in QUOTED.items():
        found = _one_kind(degrees, apart=True)
        yield _row("design.md", wan, 4, True, name, "_native_cudnn", measured, ONE_GPU_MS[wan, True], found)


class _Variant(NamedTuple):
    degrees: Strategy
    layer: Callable[[Workload], float]
    """Predicts the seconds of one layer."""


def _one_kind(degrees: Strategy, apart: bool) -> _Variant:
    """A strategy whose layers are all of one kind, as the cost model predicts it."""
    return _Variant(degrees, lambda work: layer_seconds(work, degrees, HARDWARE, KIND, 8, apart=apart))


def _variant(each: dict[str, Any], ranks: int, compiled: bool, apart: bool) -> _Variant | None:
    """A recorded variant; None for other libraries, and variants with a mechanism switched off.

    Args:
        apart: whether Ulysses sent query, key and value in an exchange each.
    """
    name, _, _ = each["strategy"].partition("+")
    if name in ("auto", "defaults", "defaults-no-graph"):
        chosen, _, _ = each["note"].partition(" (predicted")  # behind it are other strategies
        name = "ulysses" if "Ulysses over" in chosen else "gather"
    if name in ("ring", "ulysses"):
        degrees = Strategy(1, ranks, "alltoall") if name == "ring" else Strategy(ranks, 1, None)
        return _one_kind(degrees, apart)
    calls = {
        "gather": (False, True) if compiled else (False,),
        "gather-one-call": (True,),
        "gather-two-calls": (False,),
    }.get(name.removesuffix("-late"))
    if calls is None:
        return None
    gather, overlap_pass = Strategy(1, ranks, "allgather"), compiled and not name.endswith("-late")

    def layer(work: Workload) -> float:
        variants = (
            gather_seconds(work, gather, HARDWARE, KIND, 8, at_once=one, overlap_pass=overlap_pass) for one in calls
        )
        return min(variants)

    return _Variant(gather, layer)


def _row(
    run: str, model: str, ranks: int, compiled: bool, strategy: str, provider: str, measured: float, one_gpu: float,
    found: _Variant,
) -> Row:  # fmt: skip
    part = sum(work.layers * found.layer(work) for work in works(model, provider)) * 1e3
    # One GPU was measured with cuDNN.
    alone = sum(
        work.layers * attention_seconds(work, work.tokens, work.tokens, 1, HARDWARE, KIND)
        for work in works(model, "_native_cudnn")
    )
    facts = MODELS[model]
    fixed = facts.gaps_ms + 2 * facts.replicated_weights / HARDWARE.memory_bytes_per_second * 1e3
    rest = fixed + (one_gpu - alone * 1e3 - fixed) / ranks
    return Row(run, model, ranks, compiled, strategy, found.degrees, provider, measured, rest + part, part)


def layer_rows() -> Iterator[tuple[str, str, float, float]]:
    """(model, variant, measured, predicted) of one attention layer on two GPUs, in microseconds."""
    for (model, variant), measured in LAYERS_US.items():
        work = works(model, "_native_cudnn")[0]
        if variant == "ulysses":
            seconds = layer_seconds(work, Strategy(2, 1, None), HARDWARE, KIND, 8, apart=True)
        elif variant.startswith("gather"):
            two = Strategy(1, 2, "allgather")
            seconds = gather_seconds(work, two, HARDWARE, KIND, 8, at_once=False, overlap_pass=False)
        else:
            seconds = attention_seconds(work, work.tokens / 2, work.tokens, 1, HARDWARE, KIND)
        yield model, variant, measured, seconds * 1e6
