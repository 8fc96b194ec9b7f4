"""Ways to run a step of a model on several GPUs with this library and with others, as each of them documents it.

Each library is used through its public interface, with the settings that its documentation recommends. `needs` says
what had to be done beside that, so that it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
import torch.distributed as dist
from measuring import diffusers_on_cpu
from real_shapes import Inputs, RealModel
from torch import Tensor

import diffusers_attn

Step = Callable[[], Any]


class Setting(NamedTuple):
    """What a library runs. `dist` is not initialized."""

    name: str
    """Name of the model in `real_shapes.REAL`."""
    real: RealModel
    weights: dict[str, Tensor] | None
    """The model's weights, or None to make them."""
    inputs: Inputs
    device: torch.device
    compiled: bool

    def model(self, model_class: Any = None) -> Any:
        """The model, made of the weights."""
        return self.real.make(self.device, self.weights, model_class)

    def start(self) -> int:
        """Initializes `dist`, and returns the number of ranks."""
        if self.device.type == "cuda":
            dist.init_process_group("nccl", device_id=self.device)
        else:
            dist.init_process_group("gloo")
        return dist.get_world_size()

    def kernel(self, name: str) -> str:
        """The library's name of cuDNN's attention, `name`, or of PyTorch's on a CPU."""
        return name if self.device.type == "cuda" else "native"

    def accelerator(self) -> contextlib.AbstractContextManager[None]:
        """The context for libraries that ask for the accelerator, which a CPU is not."""
        return diffusers_on_cpu() if self.device.type == "cpu" else contextlib.nullcontext()


def one_gpu(setting: Setting) -> tuple[Any, str]:
    model = setting.model()
    model.set_attention_backend(setting.kernel("_native_cudnn"))
    if setting.compiled:
        model.compile_repeated_blocks()
    return model, ""


def ours(setting: Setting) -> tuple[Any, str]:
    setting.start()
    model = setting.model()
    report = diffusers_attn.enable_context_parallel(model, verbose=False)
    if setting.compiled:
        diffusers_attn.apply_compile(model)
    return model, str(report)


def _diffusers(setting: Setting, degree: str) -> tuple[Any, str]:
    size = setting.start()
    model = setting.model()
    model.set_attention_backend(setting.kernel("_native_cudnn"))
    degrees: dict[str, Any] = {degree: size}
    config = diffusers.ContextParallelConfig(**degrees)
    with setting.accelerator():
        model.enable_parallelism(config=config)
    if setting.compiled:
        model.compile_repeated_blocks()
    return model, ""


def diffusers_ulysses(setting: Setting) -> tuple[Any, str]:
    return _diffusers(setting, "ulysses_degree")


def diffusers_ring(setting: Setting) -> tuple[Any, str]:
    return _diffusers(setting, "ring_degree")


def _cache_dit(setting: Setting, **options: bool) -> tuple[Any, str]:
    import cache_dit

    size = setting.start()
    model = setting.model()
    if options.get("ulysses_async"):
        from cache_dit.distributed.async_ulysses import AsyncUlyssesRegistry

        AsyncUlyssesRegistry.get_planner(model)  # raises for models where the option would have no effect
    backend = setting.kernel("_sdpa_cudnn")
    with setting.accelerator():
        config = cache_dit.ParallelismConfig(ulysses_size=size, attention_backend=backend, **options)
        cache_dit.enable_cache(model, parallelism_config=config)
    if setting.compiled:
        cache_dit.set_compile_configs()
        model.compile_repeated_blocks()
    return model, ""


def cache_dit_ulysses(setting: Setting) -> tuple[Any, str]:
    return _cache_dit(setting)


def cache_dit_async(setting: Setting) -> tuple[Any, str]:
    return _cache_dit(setting, ulysses_async=True)


def cache_dit_float8(setting: Setting) -> tuple[Any, str]:
    return _cache_dit(setting, ulysses_float8=True)


XDIT_MODELS = {
    "flux": ("transformer_flux", "xFuserFlux1Transformer2DWrapper", "FluxPipeline", "reduce-overhead"),
    "wan": ("transformer_wan", "xFuserWanTransformer3DWrapper", "WanPipeline", "default"),
}
"""Module and class of xDiT's transformer, pipeline of diffusers, and the mode in which xDiT's runner compiles it."""

XDIT_PASSES = ("reorder_compute_for_overlap", "sink_waits", "raise_comms")
"""Passes of Inductor that xDiT's runners set before they compile."""


def _xdit(setting: Setting, attention_backend: str | None) -> tuple[Any, str]:
    """Steps of xDiT's runners (`runner_models`) up to the first call, for a transformer without its pipeline."""
    os.environ.setdefault("XDIT_LOGGING_LEVEL", "ERROR")
    from xfuser import xFuserArgs
    from xfuser.core.distributed import get_runtime_state, init_distributed_environment, initialize_runtime_state

    module, wrapper, pipeline, mode = XDIT_MODELS[setting.name]
    package = f"xfuser.model_executor.models.transformers.{module}"
    init_distributed_environment()
    size = dist.get_world_size()
    arguments = xFuserArgs(ulysses_degree=size, attention_backend=attention_backend, use_torch_compile=setting.compiled)
    engine, _ = arguments.create_config()
    model = setting.model(getattr(importlib.import_module(package), wrapper))
    # The pipeline's other components are not used.
    parameters = inspect.signature(getattr(diffusers, pipeline).__init__).parameters.values()
    parts = {each.name: None for each in parameters if each.default is each.empty and each.name != "self"}
    initialize_runtime_state(getattr(diffusers, pipeline)(**parts | {"transformer": model}), engine)
    state = get_runtime_state()
    if setting.name == "flux":
        tokens = setting.inputs["encoder_hidden_states"].shape[1]
        state.set_input_parameters(batch_size=1, num_inference_steps=1, max_condition_sequence_length=tokens)
    if setting.compiled:
        torch._inductor.config.reorder_for_compute_comm_overlap = True
        torch._inductor.config.reorder_for_compute_comm_overlap_passes = list(XDIT_PASSES)
    return model, f"attention by {state.attention_backend.name}" + ("" if attention_backend else f", mode {mode!r}")


def xdit_ulysses(setting: Setting) -> tuple[Any, str]:
    model, note = _xdit(setting, setting.kernel("cudnn") if setting.device.type == "cuda" else "sdpa")
    if setting.compiled:
        model.compile_repeated_blocks()
    return model, note


def xdit_default(setting: Setting) -> tuple[Any, str]:
    model, note = _xdit(setting, None)
    return torch.compile(model, mode=XDIT_MODELS[setting.name][3]), note


class Library(NamedTuple):
    """A row of the table."""

    distribution: str
    """Name of the package that is run."""
    lines: str
    """What a user writes."""
    prepare: Callable[[Setting], tuple[Any, str]]
    """Returns the model to call, and a note for the report."""
    packages: tuple[str, ...] = ()
    """Packages that it needs beside its own required ones."""
    needs: str = ""
    """What had to be done so that it runs."""
    compiled: bool = True
    eager: bool = True
    """Whether it is also measured without compilation, as "NAME-eager"."""


_CACHE_DIT = "its own name of cuDNN's attention, `_sdpa_cudnn`: a model with diffusers' backend is refused"
_XDIT = (
    "its own subclass of the transformer, in a pipeline of diffusers, and for Flux the number of text tokens "
    "(`get_runtime_state().set_input_parameters`)"
)
LIBRARIES = {
    "one-gpu": Library("diffusers", "`compile_repeated_blocks()` on one GPU", one_gpu),
    "ours": Library("diffusers_attn", "`enable_context_parallel(pipe)`, `apply_compile(pipe.transformer)`", ours),
    "diffusers-ulysses": Library(
        "diffusers", "`ContextParallelConfig(ulysses_degree=...)`, `compile_repeated_blocks()`", diffusers_ulysses
    ),
    "diffusers-ring": Library(
        "diffusers", "`ContextParallelConfig(ring_degree=...)`, `compile_repeated_blocks()`", diffusers_ring
    ),
    "cache-dit-ulysses": Library(
        "cache-dit", "`ParallelismConfig(ulysses_size=...)`, `set_compile_configs()`, `compile_repeated_blocks()`",
        cache_dit_ulysses, ("einops",), _CACHE_DIT,
    ),
    "cache-dit-async": Library(
        "cache-dit", "the same with `ulysses_async=True`", cache_dit_async, ("einops",), _CACHE_DIT
    ),
    "cache-dit-float8": Library(
        "cache-dit", "the same with `ulysses_float8=True`", cache_dit_float8, ("einops",), _CACHE_DIT
    ),
    "xdit-ulysses": Library(
        "xfuser", "`xFuserArgs(ulysses_degree=...)`, cuDNN, `compile_repeated_blocks()`", xdit_ulysses, (), _XDIT
    ),
    "xdit-default": Library(
        "xfuser", "`xFuserArgs(ulysses_degree=..., use_torch_compile=True)`: the whole model is compiled",
        xdit_default, (), _XDIT, eager=False,
    ),
}  # fmt: skip
LIBRARIES |= {
    f"{name}-eager": each._replace(
        lines=each.lines.split(", `apply_compile")[0].split(", `set_compile")[0].split(", `compile")[0],
        compiled=False,
    )
    for name, each in LIBRARIES.items()
    if each.eager
}
LIBRARIES["one-gpu-eager"] = LIBRARIES["one-gpu-eager"]._replace(lines="one GPU")


def version_of(library: Library) -> str:
    """The version of a library's package.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    if library.distribution == diffusers_attn.__name__:
        return str(diffusers_attn.__version__)  # also where it runs from a clone that is not installed
    for name in (*library.packages, library.distribution):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ModuleNotFoundError(f"{name} is not installed") from None
    return version
