"""torch.compile for a model, whole or block by block."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..errors import AttentionProviderError
from .cuda_graphs.apply import CudaGraphs, apply_automatically, apply_cuda_graphs, check_mode
from .one_graph import OneGraph

SCOPES = ("regional", "full")


def apply_compile(
    model: nn.Module,
    compile_scope: Literal["regional", "full"] = "regional",
    *,
    cuda_graphs: CudaGraphs = False,
    **compile_kwargs: Any,
) -> nn.Module:
    """Compiles `model` in place; compilation runs at the next call. Context parallelism may be enabled before or after.

    Args:
        model: a diffusers model or any other module, also inside a PEFT model.
        compile_scope: "regional" compiles each repeated block; all blocks share the graph of the first, so compilation
            takes seconds. "full" compiles the model as one graph.
        cuda_graphs: whether steps are recorded as CUDA graphs, with compile_scope="regional". "auto": where that is
            possible and gives the same bits; other calls run as usual, see `cuda_graphs_status`. True: as
            `apply_cuda_graphs`. False: no. `enable_context_parallel` has an argument of its own, which decides for
            split models.
        compile_kwargs: arguments of `torch.compile`. `fullgraph` defaults to True: a part that cannot be compiled is an
            AttentionProviderError at the next call, and does not run uncompiled. Caches of diffusers need
            fullgraph=False, which compiles the parts between their decisions.

    Returns:
        `model`.

    Raises:
        AttentionProviderError: `model` is not a module, an argument is unknown, the model has no repeated blocks, or
            its steps cannot be recorded (cuda_graphs=True).
    """
    if not isinstance(model, nn.Module):
        raise AttentionProviderError(
            f"apply_compile was given a {type(model).__name__}; a model (torch.nn.Module) is accepted. Of a pipeline "
            "give the model that runs at every step: apply_compile(pipe.transformer)."
        )
    if compile_scope not in SCOPES:
        raise AttentionProviderError(
            f"compile_scope={compile_scope!r}: accepted are 'regional' (each repeated block) and 'full' (the model as "
            "one graph)."
        )
    check_mode(cuda_graphs)
    if cuda_graphs and compile_scope == "full":
        raise AttentionProviderError(
            f"cuda_graphs={cuda_graphs!r} records a model that is compiled block by block. With compile_scope='full' "
            "the compiler records it: leave cuda_graphs out and add mode='reduce-overhead'."
        )
    modules = [model] if compile_scope == "full" else repeated_blocks(model)
    if not modules:
        raise AttentionProviderError(
            f"{type(model).__name__} has no repeated blocks: it names none (_repeated_blocks), and no nn.ModuleList in "
            "it holds modules with attention. Use compile_scope='full'."
        )
    options = {"fullgraph": True, **compile_kwargs}
    for module in modules:
        module.compile(**options)
        if options["fullgraph"]:
            module._compiled_call_impl = OneGraph(module, module._compiled_call_impl)  # type: ignore[arg-type]
    if cuda_graphs is True:
        apply_cuda_graphs(model)
    elif cuda_graphs == "auto":
        apply_automatically(model)
    return model


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of `model`: modules of the classes in its `_repeated_blocks` (a diffusers attribute), or, if
    it has none, the entries with attention in its outermost `nn.ModuleList`s."""
    for module in model.modules():  # within a wrapper, such as PEFT's
        names = getattr(type(module), "_repeated_blocks", None)
        if names:
            return [each for each in module.modules() if type(each).__name__ in names]
    return _listed_blocks(model)


def _listed_blocks(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [block for block in child if any(hasattr(each, "processor") for each in block.modules())]
        else:
            found += _listed_blocks(child)
    return found
