"""A forward that is recorded as CUDA graphs and replayed.

Calls of one kind (`arguments.py`) share a graph. The first call of a kind runs, the second is recorded, later ones are
replayed. There are two policies:

"always" (`apply_cuda_graphs`)
    A call that cannot be recorded is an error.
"auto" (`enable_context_parallel`, `apply_compile`)
    A call that cannot be recorded runs as usual. The second call of a kind runs as well as being recorded: a graph is
    kept only if the forward does not wait for the device and does not change the model, if enough memory stays free,
    and if the replay gives the same bits. Ranks that share a sequence keep a graph only if all of them do.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...context_parallel.hooks.apply import applied_gather, applied_tracker
from ...context_parallel.hooks.within import not_called
from ...context_parallel.sequences.layout import LayoutState
from ...context_parallel.sequences.tracker import SequenceTracker
from ...errors import AttentionProviderError
from ...nested import tensors_in
from . import obstacles
from .arguments import GraphCall
from .graphs import CallKind, Graphs, NotRecorded, applied, reasons_to_pause
from .recording import Pool, Recording
from .snapshot import Snapshot, surroundings
from .waiting import watched

logger = logging.getLogger(__name__)


class GraphedForward:
    """A model's forward, replayed where it was recorded. Copied and unpickled models have no graphs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.__doc__ = type(model).forward.__doc__
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError("the model whose forward this is does not exist any more")
        forward = type(model).forward.__get__(model)
        if torch.compiler.is_compiling():
            _check_compiling(model)
            return forward(*args, **kwargs)
        graphs = applied.get(model)
        # Within somebody else's recording it becomes a part of that.
        if graphs is None or reasons_to_pause or torch.cuda.is_current_stream_capturing():
            return forward(*args, **kwargs)
        with _device(graphs.device), graphs.lock:
            run = _run_automatically if graphs.is_automatic else _run_always
            return run(_Call(model, forward, graphs, GraphCall(args, kwargs), self))

    __code__ = __call__.__code__  # torch.export names a graph by the code of a module's forward

    def standing(self) -> str:
        """The state that must be equal on all ranks that share a sequence, so that all of them run, record or replay a
        call: the valid recordings, and the settings of the thread."""
        model = self._model()
        graphs = None if model is None else applied.get(model)
        if model is None or graphs is None:
            return "nothing"
        if reasons_to_pause:
            return f"nothing during {reasons_to_pause[0]}"
        graphs.is_checked = False
        graphs.check()
        if graphs.off is not None:
            return f"nothing, because {graphs.off}"
        choice, _, *rest = surroundings()
        replaced = "" if vars(model).get("forward") is self else " through a replaced forward"
        mode = " under a TorchDispatchMode" if obstacles.is_watched() else ""
        # Groups of ranks that divide a step's guidance record calls of their own, over another mesh.
        tracker = applied_tracker(model)
        shared = [each for kind, each in graphs.recordings.items() if kind[0] == (tracker and tracker.mesh)]
        kinds = f"{sum(isinstance(each, Recording) for each in shared)} of {len(shared)} kinds of calls"
        return f"{kinds}; now called{replaced}{mode} in {choice!r}, {rest}"

    def begins(self, is_agreed: bool) -> None:
        """Called right before a forward over ranks.

        Args:
            is_agreed: whether all ranks have the same `standing` for it. The forward then checks the model no second
                time, which takes a millisecond for Flux, unless a hook of another tool may change it in between.
        """
        model = self._model()
        graphs = None if model is None else applied.get(model)
        if model is not None and graphs is not None:
            graphs.is_checked = is_agreed and obstacles.foreign_hook(model, before_forward=True) is None

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        return self._of(memo.get(id(self._model())))

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedForward._of, (self._model(),)

    @staticmethod
    def _of(model: nn.Module | None) -> GraphedForward:
        if model is None:
            raise RuntimeError("a recorded forward is copied only with its model")
        return GraphedForward(model)


class _Call(NamedTuple):
    """One call of a model whose forward is a `GraphedForward`."""

    model: nn.Module
    forward: Callable[..., Any]
    graphs: Graphs
    given: GraphCall
    own_forward: GraphedForward

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def run(self) -> Any:
        return self.forward(*self.given.args, **self.given.kwargs)

    def kind(self, constants: object, tracker: SequenceTracker | None) -> CallKind:
        # Two lengths of a sequence can give a rank shards of one shape, and all ranks must record in the same call.
        lengths = () if tracker is None else tuple(sorted(tracker.lengths.items()))
        return None if tracker is None else tracker.mesh, constants, lengths, surroundings()

    def record(self, tensors: list[Tensor], tracker: SequenceTracker | None) -> Recording:
        graphs = self.graphs
        if graphs.pool is None:
            graphs.pool = Pool()
        gather = applied_gather(self.model)
        during = contextlib.nullcontext() if gather is None else gather.in_one_graph()
        try:
            return Recording(self.forward, self.given, tensors, graphs.pool, tracker, during, self.name)
        except AttentionProviderError:
            graphs.pool = None  # a failed recording leaves the pool in an undefined state
            raise

    def replay(self, recording: Recording, tensors: list[Tensor], tracker: SequenceTracker | None) -> Any:
        self.graphs.replays, self.graphs.changes = self.graphs.replays + 1, 0
        return recording.replay(tensors, tracker)


def _run_always(call: _Call) -> Any:
    model, graphs = call.model, call.graphs
    if torch.is_grad_enabled():
        raise AttentionProviderError(
            f"{call.name} records CUDA graphs, which is for inference, and was called with gradients enabled. Call it "
            "under torch.no_grad() or torch.inference_mode(), or call remove_cuda_graphs(model) to train it."
        )
    constants, tensors = call.given.taken_apart(call.name)
    if not all(tensor.device == graphs.device and tensor.is_contiguous() for tensor in tensors):
        # In every call, also one that is not recorded: device and memory layout of an input can change rounding.
        tensors = [tensor.to(graphs.device, non_blocking=True).contiguous() for tensor in tensors]
        call = call._replace(given=call.given.with_tensors(tensors))
        constants, tensors = call.given.taken_apart(call.name)
    tracker = _tracker(model)
    kind = call.kind(constants, tracker)
    graphs.check()
    if kind not in graphs.recordings:
        return _first_run(call, kind)
    graphs.recordings.move_to_end(kind)
    recording = graphs.recordings[kind]
    if not isinstance(recording, Recording):
        recording = graphs.recordings[kind] = call.record(tensors, tracker)
        graphs.snapshot = Snapshot(model)
    return call.replay(recording, tensors, tracker)


def _run_automatically(call: _Call) -> Any:
    model, graphs = call.model, call.graphs
    if graphs.off is not None:
        return call.run()
    constants, tensors, reason = _described(call)
    if reason is not None:
        logger.debug("this call of %s is not recorded: %s", call.name, reason)
        return call.run()
    tracker = _tracker(model)
    kind = call.kind(constants, tracker)
    graphs.check()
    if graphs.off is not None:
        logger.warning("%s runs without CUDA graphs: %s", call.name, graphs.off)
        return call.run()
    if kind not in graphs.recordings:
        return _first_run(call, kind)
    graphs.recordings.move_to_end(kind)
    recording = graphs.recordings[kind]
    if isinstance(recording, Recording):
        return call.replay(recording, tensors, tracker)
    if isinstance(recording, NotRecorded):
        return call.run()
    return _run_and_record(call, kind, tensors, tracker)


def _described(call: _Call) -> tuple[object, list[Tensor], str | None]:
    """A description of the call, its tensors, and why the call is not recorded (None: it may be)."""
    reason = obstacles.of_mode(vars(call.model).get("forward") is call.own_forward)
    if reason is not None:
        return (), [], reason
    try:
        constants, tensors = call.given.taken_apart(call.name)
    except AttentionProviderError as error:
        return (), [], str(error).partition(". ")[0]
    return constants, tensors, obstacles.of_tensors(tensors, call.graphs.device)


def _first_run(call: _Call, kind: CallKind) -> Any:
    graphs = call.graphs
    output = call.run()
    graphs.recordings[kind] = None
    graphs.make_room(call.name, kind[0])
    graphs.snapshot = Snapshot(call.model)  # after the forward, which may store something in the model
    return output


def _run_and_record(call: _Call, kind: CallKind, tensors: list[Tensor], tracker: SequenceTracker | None) -> Any:
    """The output of the forward. Records it on the way, if all ranks can and the replay gives the same bits."""
    graphs = call.graphs
    assert graphs.agree is not None
    before = None if tracker is None else tracker.state()
    output, place = watched(call.run)
    after = None if tracker is None else tracker.state()
    assert graphs.snapshot is not None
    reason = f"its forward waits for the device ({place})" if place is not None else None
    if reason is None and not graphs.snapshot.holds():
        reason = "its forward changes the model"
    reason = reason or obstacles.of_model(call.model) or obstacles.of_memory(graphs.device)
    problem = _first(graphs.agree(reason))
    if problem is None:
        _restore(tracker, before)
        found: Recording | None = None
        try:
            found = call.record(tensors, tracker)
        except (AttentionProviderError, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0]
        # Before the replay: it exchanges data with the other ranks, which must all have a recording.
        problem = _first(graphs.agree(reason))
        if problem is None and found is not None:
            if not _equal(found.replay(tensors, tracker), output):
                reason = "a replay does not give the same bits as its forward"
            problem = _first(graphs.agree(reason))
        _restore(tracker, after)
        if problem is None and found is not None:
            graphs.recordings[kind] = found
            graphs.snapshot = Snapshot(call.model)
            logger.info("%s replays its steps as a CUDA graph from here on (%d MiB)", call.name, graphs.pool_mib)
            return output
        graphs.pool = None
    graphs.recordings[kind] = NotRecorded(str(problem))
    graphs.snapshot = Snapshot(call.model)
    logger.warning("%s runs without a CUDA graph: %s", call.name, problem)
    return output


def _restore(tracker: SequenceTracker | None, state: LayoutState | None) -> None:
    """Sets a model's sequences to an earlier state of the running forward."""
    if tracker is not None and state is not None:
        tracker.clear()
        tracker.restore(state)


def _first(reasons: Sequence[str | None]) -> str | None:
    """The first reason that a rank gives."""
    return next((reason for reason in reasons if reason is not None), None)


def _equal(one: Any, other: Any) -> bool:
    """Whether all tensors in both are equal bit for bit. NaN equals NaN."""
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
    return all(
        first.shape == second.shape
        and first.stride() == second.stride()
        and bool(((first == second) | ((first != first) & (second != second))).all())
        for first, second in pairs
    )


def _tracker(model: nn.Module) -> SequenceTracker | None:
    tracker = applied_tracker(model)
    if tracker is not None and not tracker.is_running:
        raise not_called(tracker, "its forward")
    return tracker


def _check_compiling(model: nn.Module) -> None:
    graphs = applied.get(model)
    if graphs is not None and not graphs.is_automatic and not torch.compiler.is_exporting():
        raise AttentionProviderError(
            f"{type(model).__name__} records CUDA graphs and is compiled as a whole; only one is possible. Use "
            'apply_compile(model, "regional"), or remove_cuda_graphs(model).'
        )


def _device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
