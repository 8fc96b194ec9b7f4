"""`profile`, a context around calls of a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from ... import known_calls, spans
from ...errors import AttentionProviderError
from ..components import components_of, watched
from ..cuda_graphs.graphs import paused
from .report import ProfileReport


@contextlib.contextmanager
def profile(pipeline_or_model: Any, *, cuda_graphs: bool = True) -> Iterator[ProfileReport]:
    """Measures where the time of a pipeline's calls within this context goes, with torch.profiler.

    Call the pipeline once before, so that nothing is compiled or recorded within the context, and use few steps: a
    profile holds every operator in memory, and slows down a host that is busy launching kernels.

    Each moment belongs to one part: to a component, and within it to attention (by provider and strategy), to an
    exchange between ranks, or to everything else. On a GPU, moments without any kernel wait for the host. On CPUs, an
    exchange contains the waiting for other ranks. A profile is that of this rank; with several ranks, all of them must
    make the same calls.

    Nothing is compiled again. Attention calls have the names of their provider and strategy, except in compiled graphs,
    where operators are recognised, and in CUDA graphs, where kernels are.

    Args:
        pipeline_or_model: a diffusers pipeline on its device; or one model, which is then the only component.
        cuda_graphs: whether recorded CUDA graphs are replayed. False: models run without them, which takes the host
            longer, and names all calls. It must be equal on all ranks.

    Yields:
        The report. `print(report)` after the context prints a table, and `report.save_trace("trace.json")` keeps the
        trace.

    Raises:
        AttentionProviderError: it is neither a pipeline nor a model, a component is compiled as a whole, or another
            profile runs.
    """
    if isinstance(pipeline_or_model, nn.Module):
        models = {type(pipeline_or_model).__name__: pipeline_or_model}
        device = next((each.device for each in pipeline_or_model.parameters()), torch.device("cpu"))
    else:
        models = components_of(pipeline_or_model, "profile")
        device = torch.device(getattr(pipeline_or_model, "_execution_device", "cpu"))
    if spans.is_on():
        raise AttentionProviderError("profile runs already; its contexts cannot be nested. End the first one before.")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    report, notes = ProfileReport(), []
    with contextlib.ExitStack() as stack:
        if not cuda_graphs:
            stack.enter_context(paused("profile(cuda_graphs=False)"))
            if device.type == "cuda":
                notes.append("Models ran without CUDA graphs.")
        stack.enter_context(watched(models, _named))
        stack.enter_context(_names())
        profiler = stack.enter_context(torch.profiler.profile(activities=activities))
        with spans.span(spans.ALL):
            yield report
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    report._finish(profiler, notes)


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    return spans.within(call, spans.COMPONENT, name)


@contextlib.contextmanager
def _names() -> Iterator[None]:
    """Names attention calls and exchanges. How calls are served is decided anew, with and without names."""
    spans.switch(True)
    known_calls.prepared.clear()
    try:
        yield
    finally:
        spans.switch(False)
        known_calls.prepared.clear()
