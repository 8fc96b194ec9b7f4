"""Attention kernels by name under diffusers models, and context parallelism over several ranks.

The folders follow the way of an attention call. `processors` redirects the call of a diffusers model to `dispatch`,
which finds the provider (`scope`) and describes the call (`call`). `context_parallel` serves it if the model's tokens
are split between ranks, and `providers` computes it on one device.

`cp_plans` states where the tensors of each model class are split, and `verify_plan` verifies such a plan. `parallelize`
enables context parallelism for a pipeline; `guidance` divides the branches of guidance among ranks, and `vae` the rows
of an image. `runtime` compiles models and records CUDA graphs, and `training` trains LoRAs. `quality` compares images
and videos. `cli` is the command `diffusers-attn`. `tiny_models` has a small model of each class, for tests.

Files beside the folders are about one attention call (`masks`, `shapes`, `tensor_kinds`, `known_calls`,
`prepared_call`, `other_tensors`), or serve all folders (`errors`, `logs`, `spans`, `tracing`, `recompute`, `nested`,
`atomic_files`, `json_files`, `safetensors_only`, `parent_process`). Folders import only from those below them
(`tests/test_layers.py`).

Importing the package imports nothing else, not even PyTorch: a name is imported when it is first read. The command
starts quickly that way, and can examine an environment in which PyTorch does not import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dispatch import attention_dispatch
    from .errors import AttentionProviderError, ProviderUnavailableError
    from .providers.catalog import AttentionProvider
    from .providers.registry import ProviderStatus, list_providers, provider_status
    from .scope import attention_provider

    __version__: str

__all__ = [
    "AttentionProvider",
    "AttentionProviderError",
    "CPAttention",
    "CPInput",
    "CPOutput",
    "CPPlanReport",
    "ContextParallelReport",
    "DispatchProcessor",
    "ParamId",
    "ProviderStatus",
    "ProviderUnavailableError",
    "apply_compile",
    "apply_context_parallel",
    "apply_cuda_graphs",
    "attention_dispatch",
    "attention_provider",
    "compare_outputs",
    "component_times",
    "cuda_graphs_status",
    "disable_context_parallel",
    "enable_context_parallel",
    "get_cp_plan",
    "list_cp_plans",
    "list_providers",
    "profile",
    "provider_status",
    "register_cp_plan",
    "remove_context_parallel",
    "remove_cuda_graphs",
    "set_attention_provider",
    "split_vae",
    "unsplit_vae",
    "verify_cp_plan",
]

_MODULES = {
    "attention_dispatch": "dispatch",
    "compare_outputs": "quality.compare",
    "attention_provider": "scope",
    "AttentionProvider": "providers.catalog",
    "AttentionProviderError": "errors",
    "ProviderStatus": "providers.registry",
    "ProviderUnavailableError": "errors",
    "list_providers": "providers.registry",
    "provider_status": "providers.registry",
    "DispatchProcessor": "processors",
    "set_attention_provider": "processors",
    "apply_compile": "runtime.compile",
    "apply_cuda_graphs": "runtime.cuda_graphs.apply",
    "component_times": "runtime.component_times",
    "cuda_graphs_status": "runtime.cuda_graphs.apply",
    "profile": "runtime.profiling.profile",
    "remove_cuda_graphs": "runtime.cuda_graphs.apply",
    "apply_context_parallel": "context_parallel.hooks.apply",
    "remove_context_parallel": "context_parallel.hooks.apply",
    "ContextParallelReport": "parallelize.report",
    "disable_context_parallel": "parallelize.enable",
    "enable_context_parallel": "parallelize.enable",
    "ParamId": "cp_plans.plan",
    "CPAttention": "cp_plans.plan",
    "CPInput": "cp_plans.plan",
    "CPOutput": "cp_plans.plan",
    "get_cp_plan": "cp_plans.registry",
    "list_cp_plans": "cp_plans.registry",
    "register_cp_plan": "cp_plans.registry",
    "split_vae": "vae.split",
    "unsplit_vae": "vae.split",
    "CPPlanReport": "verify_plan.report",
    "verify_cp_plan": "verify_plan.verify",
}
"""The modules of the public names."""
_OF_EVERY_CALL = ("attention_dispatch", "attention_provider")
"""Names that a program may read for each attention call. They are kept once read."""
_SUBMODULES = ("call", "context_parallel", "cp_plans", "dispatch", "errors", "masks", "providers", "scope")
"""Modules that are attributes of the package without an import of their own: `diffusers_attn.dispatch.explain(...)`."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        if name in _OF_EVERY_CALL:
            globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))


def _version() -> str:
    """The installed version, which comes from git tags (pyproject.toml)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("diffusers-attn")
    except PackageNotFoundError:  # the folder is on sys.path, and was never installed
        return "0+unknown"
