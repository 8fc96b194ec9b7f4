"""Records a model's forward as CUDA graphs, and stops doing so.

A GPU idles between two kernels when a kernel takes less time than its launch by the host. Context parallelism makes
kernels shorter and launches no fewer, and ranks that exchange data in every layer wait for the slowest host. A graph
launches a complete step at once.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ...context_parallel.hooks.apply import applied_gather, applied_tracker
from ...context_parallel.hooks.within import not_called
from ...errors import AttentionProviderError
from .arguments import GraphCall
from .recording import Recording
from .snapshot import Snapshot, surroundings

logger = logging.getLogger(__name__)


def apply_cuda_graphs(model: nn.Module, *, max_graphs: int = 8) -> nn.Module:
    """Records the forward of `model` as CUDA graphs and replays them when the same kind of call comes again.

    A kind of call is given by shapes, dtypes, arguments that are not tensors, and the provider in scope. The first call
    of a kind runs normally, the second is recorded, and later ones are replayed with the values of their tensors.
    Tensors are moved to the device and made contiguous first, in every call. Outputs equal those of the forward bit for
    bit, and belong to the caller. Changes in the model between two calls (adapters, processors, moved weights, context
    parallelism) are detected, and the forward is recorded again. Ranks that share a sequence must make the same
    changes; unless inputs="trust", a difference is an error.

    May be combined with `apply_compile(model, "regional")` and `enable_context_parallel`, in any order. The model's own
    hooks run in every call, and so does the comparison of the ranks' inputs. Hooks on its submodules and Python code in
    its forward do not run in a replay.

    Args:
        model: a diffusers model on a CUDA device, for inference. In a pipeline, the model that runs at every step.
        max_graphs: number of kinds of calls to keep; the least recently used is dropped first. All graphs share one
            memory pool, as large as the largest graph needs, in addition to the model's own memory.

    Returns:
        `model`.

    Raises:
        AttentionProviderError: `model` is not a module, is not on a CUDA device, is compiled as one graph, has a
            forward replaced by another tool (offloading), or records graphs already. In a later call: gradients are
            enabled, an argument is not a tensor, plain value, list or dict, or the forward cannot be recorded.
    """
    if not isinstance(model, nn.Module):
        raise AttentionProviderError(
            f"apply_cuda_graphs was given a {type(model).__name__}; a model (torch.nn.Module) is accepted. Of a "
            "pipeline give the model that runs at every step: apply_cuda_graphs(pipe.transformer)."
        )
    if type(max_graphs) is not int or max_graphs < 1:
        raise AttentionProviderError(f"max_graphs={max_graphs!r}: a whole number from 1 on is accepted.")
    name = type(model).__name__
    if model in _applied:
        raise AttentionProviderError(
            f"this {name} records CUDA graphs already. Call remove_cuda_graphs(model) first, to change max_graphs."
        )
    if "forward" in vars(model):
        raise AttentionProviderError(
            f"the forward of this {name} was replaced, as offloading and diffusers' hooks do (its own context "
            "parallelism, caching, layerwise casting). A CUDA graph would have what these did in one call, and weights "
            "where they were then. Take that off first (pipe.remove_all_hooks())."
        )
    if model._compiled_call_impl is not None:
        raise AttentionProviderError(
            f"this {name} is compiled as a whole, and its forward is no longer called by itself. Use "
            'apply_compile(model, "regional"), or let the compiler record it: apply_compile(model, "full", '
            'mode="reduce-overhead").'
        )
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if {device.type for device in devices} != {"cuda"} or len(devices) > 1:
        raise AttentionProviderError(
            f"this {name} is on {', '.join(sorted(map(str, devices))) or 'no device'}; CUDA graphs need all of it on "
            "one CUDA device. Move it there before: pipe.to('cuda')."
        )
    _applied[model] = _Graphs(devices.pop(), max_graphs)
    model.forward = GraphedForward(model)
    return model


def remove_cuda_graphs(model: nn.Module) -> None:
    """Undoes `apply_cuda_graphs` and frees the memory of the graphs. Does nothing if it was not applied."""
    if _applied.pop(model, None) is not None:
        if isinstance(vars(model).get("forward"), GraphedForward):
            del model.forward
        # What another tool put around it since calls it still, and it calls the forward.
        torch.cuda.empty_cache()


class _Graphs:
    """The recordings of one model. Holds no reference to the model, which would keep it alive."""

    def __init__(self, device: torch.device, max_graphs: int) -> None:
        self.device = device
        self.max_graphs = max_graphs
        self.pool: Any = None
        self.snapshot: Snapshot | None = None
        self.recordings: OrderedDict[object, Recording | None] = OrderedDict()
        """Recordings by kind of call, most recently used last; None for a kind that has run only once."""

    def check(self) -> None:
        """Drops all graphs if the model has changed since they were recorded."""
        if self.snapshot is not None and not self.snapshot.holds():
            self.recordings.clear()
            self.snapshot = None

    def make_room(self, model: str) -> None:
        while len(self.recordings) > self.max_graphs:
            self.recordings.popitem(last=False)
            logger.warning(
                "%s was called in more than %d ways (shapes, or arguments that are no tensors), and the CUDA graph of "
                "one of them was dropped. If it comes again it is recorded again, which takes longer than a step: give "
                "numbers that change in every step as tensors, or apply_cuda_graphs(model, max_graphs=...) more.",
                model,
                self.max_graphs,
            )


_applied: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()


class GraphedForward:
    """A model's forward, replayed where it was recorded. Copies of the model, and what is unpickled, have no graphs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.__doc__ = type(model).forward.__doc__
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError("the model whose forward this is does not exist any more")
        forward = type(model).forward.__get__(model)
        graphs = _applied.get(model)
        # Within somebody else's recording it becomes a part of that.
        if graphs is None or torch.cuda.is_current_stream_capturing():
            return forward(*args, **kwargs)
        name = type(model).__name__
        _check_mode(name)
        with torch.cuda.device(graphs.device):
            return _run(model, name, forward, graphs, GraphCall(args, kwargs))

    def standing(self) -> str:
        """The state that must be equal on all ranks that share a sequence, so that all of them run, record or replay a
        call: the valid recordings, and the settings of the thread."""
        model = self._model()
        graphs = None if model is None else _applied.get(model)
        if graphs is None:
            return "nothing"
        graphs.check()
        recorded = sum(each is not None for each in graphs.recordings.values())
        choice, _, *rest = surroundings()
        return f"{recorded} of {len(graphs.recordings)} kinds of calls; now called in {choice!r}, {rest}"

    def forget(self) -> None:
        """Drops all recordings. Calls are recorded again as they come."""
        graphs = _applied.get(self._model())  # type: ignore[arg-type]
        if graphs is not None:
            graphs.recordings.clear()
            graphs.snapshot = None

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        return self._of(memo.get(id(self._model())))

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedForward._of, (self._model(),)

    @staticmethod
    def _of(model: nn.Module | None) -> GraphedForward:
        if model is None:
            raise RuntimeError("a recorded forward is copied only with its model")
        return GraphedForward(model)


def _check_mode(name: str) -> None:
    if torch.compiler.is_compiling():
        raise AttentionProviderError(
            f"{name} records CUDA graphs and is compiled as a whole, of which only one is possible. Use "
            'apply_compile(model, "regional"), or remove_cuda_graphs(model).'
        )
    if torch.is_grad_enabled():
        raise AttentionProviderError(
            f"{name} records CUDA graphs, which is for inference, and was called with gradients enabled. Call it under "
            "torch.no_grad() or torch.inference_mode(), or call remove_cuda_graphs(model) to train it."
        )


def _run(model: nn.Module, name: str, forward: Any, graphs: _Graphs, call: GraphCall) -> Any:
    said, tensors = call.taken_apart(name)
    if not all(tensor.device == graphs.device and tensor.is_contiguous() for tensor in tensors):
        # In every call, also one that is not recorded: device and memory layout of an input can change rounding.
        tensors = [tensor.to(graphs.device, non_blocking=True).contiguous() for tensor in tensors]
        call = call.with_tensors(tensors)
        said, tensors = call.taken_apart(name)
    tracker = applied_tracker(model)
    if tracker is not None and not tracker.is_running:
        raise not_called(tracker, "its forward")
    # Two lengths of a sequence can give a rank shards of the same shape, and all ranks must record in the same call.
    lengths = () if tracker is None else tuple(sorted(tracker.lengths.items()))
    kind = said, lengths, surroundings()
    graphs.check()
    if kind not in graphs.recordings:
        output = forward(*call.args, **call.kwargs)
        graphs.recordings[kind] = None
        graphs.make_room(name)
        graphs.snapshot = Snapshot(model)  # after the forward, which may store something in the model
        return output
    graphs.recordings.move_to_end(kind)
    recording = graphs.recordings[kind]
    if recording is None:
        if graphs.pool is None:
            graphs.pool = torch.cuda.graph_pool_handle()
        gather = applied_gather(model)
        during = contextlib.nullcontext() if gather is None else gather.in_one_graph()
        try:
            recording = Recording(forward, call, tensors, graphs.pool, tracker, during, name)
        except AttentionProviderError:
            graphs.pool = None  # a failed recording leaves the pool in an undefined state
            raise
        graphs.recordings[kind] = recording
        graphs.snapshot = Snapshot(model)
    return recording.replay(tensors, tracker)
