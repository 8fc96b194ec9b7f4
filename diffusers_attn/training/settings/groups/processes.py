"""How processes share the work, and how attention is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....context_parallel.config import ROTATE_METHODS
from ..bounds import COUNT, POSITIVE
from ..choices import AUTO
from ..setting import setting


@dataclass
class ProcessSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "processes and attention"

    cp_degree: int | None = setting(
        None,
        "Number of processes that share each sequence, the context-parallel degree (default: from Accelerate's "
        "configuration, else 1)",
        bounds=COUNT,
    )
    ulysses_degree: int | None = setting(
        None,
        "Number of those processes that exchange attention heads, as in Ulysses (default: automatic)",
        bounds=COUNT,
    )
    ring_degree: int | None = setting(
        None,
        "Number of those processes that exchange keys and values, as in ring attention (default: automatic)",
        bounds=COUNT,
    )
    rotate_method: str | None = setting(
        None,
        "How the ring's processes exchange keys and values: allgather collects them at once, alltoall passes them on "
        "from rank to rank (default: automatic)",
        ROTATE_METHODS,
    )
    attn_provider: str | None = setting(
        None, "Attention kernel by name, such as flash_4 or _native_cudnn (default: automatic)"
    )
    cpu: bool = setting(False, "Train on CPUs even if GPUs are available")
    timeout: float | None = setting(
        None,
        "Seconds to wait for a process that does not respond (default: 3600, or the running process group's own)",
        bounds=POSITIVE,
    )
    mixed_precision: str | None = setting(
        None,
        "bf16 keeps the base model in bfloat16 and the adapter in float32; no keeps both in float32 (default: from "
        "accelerate launch, else no)",
        ("no", "bf16"),
    )
    compile: bool | Literal["auto"] = setting(
        AUTO,
        "Compile the transformer's blocks with torch.compile: always, never, or on GPUs in runs of 300 steps or more; "
        "without a value, always",
    )
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass to save memory")
    find_unused_parameters: bool = setting(
        False, "DDP's find_unused_parameters, needed if some --targets do not contribute to the loss"
    )
