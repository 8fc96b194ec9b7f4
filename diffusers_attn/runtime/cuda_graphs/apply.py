"""CUDA graphs under a model's forward, put on and taken off.

Between two kernels a GPU waits for the host whenever its work is smaller than what the host needs to launch it. With
the sequence shared between GPUs, work gets smaller and launches do not get fewer; and ranks that meet in every layer
each wait for the slowest host. A graph launches a whole step at once.
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
    """Has `model` record its forward as a CUDA graph and replay it, wherever the same call comes again.

    Of each kind of call (shapes, dtypes, arguments that are no tensors, provider in scope), the first runs as before,
    the second is recorded, and from then on it is replayed with the values of the tensors that are given. Results are
    those of the forward, bit for bit, and the caller's own. (In every call, tensors are first brought to the device,
    and into the order of their dimensions.) What changes in the model between two calls is noticed (adapters,
    processors, weights that moved, context parallelism), and the forward recorded anew. Ranks that share a sequence
    must make such changes alike; unless their inputs are trusted, it is an error if not.

    Beside `apply_compile(model, "regional")` and `enable_context_parallel`, in any order. The model's own hooks, and
    with them the comparison of ranks' inputs, run in every call; hooks on modules within it, and Python in its forward,
    do not run in a replay.

    Args:
        model: a diffusers model on a CUDA device, in inference. Of a pipeline, the one that runs at every step.
        max_graphs: how many kinds of calls are kept; the one that was used longest ago makes room. All compute in the
            same memory, which is as large as the largest needs, beside what the model needs without.

    Returns:
        `model`.

    Raises:
        AttentionProviderError: not a module, not on a CUDA device, compiled as a whole, its forward replaced by
            another tool (offloading), or applied already. And from then on in a call: gradients are enabled, an
            argument that is no tensor, plain value, list or dict, or a forward that cannot be recorded.
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
    """Takes off what `apply_cuda_graphs` put on, and frees the graphs' memory. Without effect where it is not on."""
    if _applied.pop(model, None) is not None:
        if isinstance(vars(model).get("forward"), GraphedForward):
            del model.forward
        # What another tool put around it since calls it still, and it calls the forward.
        torch.cuda.empty_cache()


class _Graphs:
    """What is recorded of one model. Nothing in it refers to the model itself, which is so freed when it is not used
    any more."""

    def __init__(self, device: torch.device, max_graphs: int) -> None:
        self.device = device
        self.max_graphs = max_graphs
        self.pool: Any = None
        self.snapshot: Snapshot | None = None
        self.recordings: OrderedDict[object, Recording | None] = OrderedDict()
        """by kind of call, the latest used last; None for one that has run once."""

    def check(self) -> None:
        """Forgets all graphs if anything in the model is not as it was when they were recorded."""
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
        """What ranks that share a sequence must have alike, so that all record, replay or run a call: what of all that
        was recorded still holds, and what a thread adds to a call."""
        model = self._model()
        graphs = None if model is None else _applied.get(model)
        if graphs is None:
            return "nothing"
        graphs.check()
        recorded = sum(each is not None for each in graphs.recordings.values())
        choice, _, *rest = surroundings()
        return f"{recorded} of {len(graphs.recordings)} kinds of calls; now called in {choice!r}, {rest}"

    def forget(self) -> None:
        """Drops all that was recorded: it is recorded anew when it comes again."""
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
        # In every call, so that all compute alike: where a tensor is, and in which order it lies there, decides how
        # what is computed from it is rounded.
        tensors = [tensor.to(graphs.device, non_blocking=True).contiguous() for tensor in tensors]
        call = call.with_tensors(tensors)
        said, tensors = call.taken_apart(name)
    tracker = applied_tracker(model)
    if tracker is not None and not tracker.is_running:
        raise not_called(tracker, "its forward")
    # Of a sequence that was split before the forward, ranks may have a shard of the same shape at another length: and
    # all ranks must record in the same call.
    lengths = () if tracker is None else tuple(sorted(tracker.lengths.items()))
    kind = said, lengths, surroundings()
    graphs.check()
    if kind not in graphs.recordings:
        output = forward(*call.args, **call.kwargs)
        graphs.recordings[kind] = None
        graphs.make_room(name)
        graphs.snapshot = Snapshot(model)  # after it, since a forward may keep something in the model
        return output
    graphs.recordings.move_to_end(kind)
    recording = graphs.recordings[kind]
    if recording is None:
        if graphs.pool is None:
            graphs.pool = torch.cuda.graph_pool_handle()
        gather = applied_gather(model)
        meanwhile = contextlib.nullcontext() if gather is None else gather.in_one_graph()
        try:
            recording = Recording(forward, call, tensors, graphs.pool, tracker, meanwhile, name)
        except AttentionProviderError:
            graphs.pool = None  # it is left as it was in the middle of the recording
            raise
        graphs.recordings[kind] = recording
        graphs.snapshot = Snapshot(model)
    return recording.replay(tensors, tracker)
