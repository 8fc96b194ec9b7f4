"""Predicted time and memory of a forward, for each number of GPUs and each strategy.

A forward is attention with its exchanges (`parallelize/cost.py`), matrix products, and passes over the activations:
norms, rotary embeddings, activations and residuals. Ranks share all of it except matrix products whose rows are not
split, such as those of modulation. Not included are the host, the text encoders and the VAE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from ...parallelize.cost import Workload, attention_seconds
from ...parallelize.degrees import Topology, predictions
from ...parallelize.targets import split_heads
from ...parallelize.workload import workloads
from ...providers.hardware import KINDS, Hardware
from .grids import Size
from .model import ModelDescription, attention_tokens, local_attention_flops, products, rows_of_tiny

PASSES = 20
"""Number of times that a block reads or writes activations of the model's width, beside attention and matrix products,
with compiled blocks. Fits the measured steps of Flux and Wan 1.3B on one H200."""
LOCAL_ATTENTION_OF_MATRIX_FLOPS = 0.5
"""Speed of attention to a text, whose few keys give a kernel little to do, as a share of that of matrix products."""
KERNELS = 20
"""Number of kernels of a compiled block. The gaps between them do not depend on the number of tokens."""
ITEMSIZE = 2
"""Bytes of an element: bfloat16."""
KIND = KINDS["cuda"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One number of GPUs with one strategy."""

    gpus: int
    strategy: str
    """Such as "a gather of 4"; "" for one GPU."""
    seconds: float
    """Of one forward, or of both forwards of a step with guidance."""
    attention_seconds: float
    """Of these, attention with its exchanges."""
    weights_bytes: int
    """Weights of the model on each GPU."""
    sharded_weights_bytes: int
    """Of these with `shard_weights=True`: an equal part, and the complete weights of two blocks."""
    activations_bytes: int
    """Estimate of the activations on each GPU, with keys and values of other ranks."""

    @property
    def bytes(self) -> int:
        """Weights and activations on each GPU."""
        return self.weights_bytes + self.activations_bytes


def predict_step(
    described: ModelDescription,
    size: Size,
    hardware: Hardware,
    capability: tuple[int, int],
    providers: Sequence[str],
    gpus: int,
    per_host: int,
    batch: int = 1,
    guidance: bool = False,
) -> list[Prediction]:
    """Predictions of a step for a number of GPUs, the fastest strategy first. Arguments are those of `predict`.

    Args:
        guidance: whether a step has two forwards, for the branches of guidance. Then either all GPUs compute one after
            the other, or each half of them computes one.
    """

    def of(count: int) -> list[Prediction]:
        return predict(described, size, hardware, capability, providers, count, per_host, batch)

    if not guidance:
        return of(gpus)
    found = [
        dataclasses.replace(each, seconds=2 * each.seconds, attention_seconds=2 * each.attention_seconds)
        for each in of(gpus)
    ]
    if gpus % 2 == 0:
        sharded = found[0].sharded_weights_bytes  # over all GPUs
        found += [
            dataclasses.replace(
                each,
                gpus=gpus,
                strategy=f"a branch on each half{', by ' * bool(each.strategy)}{each.strategy}",
                sharded_weights_bytes=sharded,
            )
            for each in of(gpus // 2)
        ]
    return sorted(found, key=lambda each: each.seconds)


def predict(
    described: ModelDescription,
    size: Size,
    hardware: Hardware,
    capability: tuple[int, int],
    providers: Sequence[str],
    gpus: int,
    per_host: int,
    batch: int = 1,
) -> list[Prediction]:
    """Predictions for a number of GPUs, the fastest strategy first.

    Args:
        capability: compute capability of the GPUs.
        providers: names of the attention providers.
        per_host: number of GPUs of a host.
        batch: number of samples in a forward.
    """
    works = _works(described, size, hardware, capability, providers, batch)
    heads = split_heads(described.target)
    if gpus == 1:
        found = [("", sum(each.layers * _alone(each, hardware) for each in works))]
    else:
        job = Topology(
            gpus, "cuda", heads, min(per_host, gpus), works=works, hardware=hardware, hardware_source="typical"
        )
        found = [(str(strategy), seconds) for strategy, seconds in predictions(job)]
    rest = _rest_seconds(described, size, hardware, gpus, batch)
    weights = described.parameters * ITEMSIZE
    sharded = weights if gpus == 1 else min(weights, weights // gpus + 2 * _largest_block(described) * ITEMSIZE)
    return [
        Prediction(
            gpus,
            name,
            seconds + rest,
            seconds,
            weights,
            sharded,
            _activations(described, works, size, gpus, name, batch),
        )
        for name, seconds in found
    ]


def _works(
    described: ModelDescription,
    size: Size,
    hardware: Hardware,
    capability: tuple[int, int],
    providers: Sequence[str],
    batch: int,
) -> tuple[Workload, ...]:
    """The split attention, at this size. Samples of a batch count as further heads."""
    rows = rows_of_tiny(type(described.model).__name__)
    found = workloads(
        [described.target], providers, capability, hardware, lambda _, name: attention_tokens(rows, name, size)
    )
    return tuple(
        each._replace(heads=each.heads * batch, kv_heads=each.kv_heads * batch, itemsize=ITEMSIZE) for each in found
    )


def _alone(work: Workload, hardware: Hardware) -> float:
    return attention_seconds(work, work.tokens, work.tokens, 1, hardware, KIND)


def _rest_seconds(described: ModelDescription, size: Size, hardware: Hardware, gpus: int, batch: int) -> float:
    """Seconds of everything else than attention."""
    seconds = 0.0
    for weights, rows, split in products(described, size):
        own = rows * batch / gpus if split else rows * batch
        # Few rows: the time is that of reading the weights.
        seconds += max(2 * weights * own / hardware.matrix_flops, weights * ITEMSIZE / hardware.memory_bytes_per_second)
    passes = PASSES * _blocks(described) * size.tokens * batch / gpus * _width(described) * ITEMSIZE
    local = local_attention_flops(described, size) * batch / gpus
    seconds += local / (LOCAL_ATTENTION_OF_MATRIX_FLOPS * hardware.matrix_flops)
    gaps = KERNELS * _blocks(described) * KIND.launch_seconds
    return seconds + gaps + passes / hardware.memory_bytes_per_second


def _activations(
    described: ModelDescription, works: Sequence[Workload], size: Size, gpus: int, strategy: str, batch: int
) -> int:
    """Bytes of a block's activations: residual, normed input, query, key, value and output, or the residual and the
    hidden layer of the MLP; and for a gather the keys and values of all ranks, twice, since the next layer's arrive."""
    width = _width(described)
    widest = max(
        (
            each.out_features
            for each in described.model.modules()
            if isinstance(each, nn.Linear) and each.in_features >= width // 2
        ),
        default=width,
    )
    own = size.tokens * batch / gpus * ITEMSIZE * (2 * width + max(4 * width, widest))
    gathered = 0.0
    if "gather" in strategy:
        gathered = 2 * max((2 * work.tokens * work.kv_heads * work.head_dim * ITEMSIZE for work in works), default=0)
    return int(own + gathered)


def _width(described: ModelDescription) -> int:
    """The most frequent input size of the linear layers: the width of the model."""
    sizes = [each.in_features for each in described.model.modules() if isinstance(each, nn.Linear)]
    return max(set(sizes), key=sizes.count, default=1)


def _blocks(described: ModelDescription) -> int:
    """Number of blocks: the entries of the model's module lists."""
    return max(1, len(_block_list(described)))


def _largest_block(described: ModelDescription) -> int:
    """Number of parameters of the largest block."""
    return max((sum(each.numel() for each in block.parameters()) for block in _block_list(described)), default=0)


def _block_list(described: ModelDescription) -> list[nn.Module]:
    return [block for each in described.model.children() if isinstance(each, nn.ModuleList) for block in each]
