"""`cuda_graphs="auto"`: which calls are recorded, and that all others run as usual.

CUDA graphs need a GPU (tests/gpu/test_cuda_graphs.py). Here a recording runs the forward again, so that the decisions
around it are tested on any machine.
"""

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_attn import AttentionProviderError, apply_compile, cuda_graphs_status
from diffusers_attn.runtime.cuda_graphs import apply, graphed, obstacles, waiting


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, hidden_states, scale=1.0, extra=None, return_dict=True):
        counted.append(1)
        out = self.inner(hidden_states) * scale
        return {"sample": out} if return_dict else (out,)


counted: list[int] = []


class Replayed:
    """In place of `Recording`."""

    made = 0

    def __init__(self, forward, call, tensors, pool, tracker, during, name):
        Replayed.made += 1
        self.forward, self.call = forward, call

    def replay(self, tensors, tracker):
        call = self.call.with_tensors(tensors)
        return self.forward(*call.args, **call.kwargs)


class NoMemory:
    nbytes = 0


@pytest.fixture
def model(monkeypatch):
    Replayed.made = 0
    counted.clear()
    monkeypatch.setattr(graphed, "Recording", Replayed)
    monkeypatch.setattr(graphed, "Pool", NoMemory)
    monkeypatch.setattr(graphed, "watched", lambda function: (function(), None))
    monkeypatch.setattr(obstacles, "of_memory", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    real = obstacles.of_model
    monkeypatch.setattr(obstacles, "of_model", lambda model: _but_for_the_device(real(model)))
    model = Model().eval().requires_grad_(False)
    apply.apply_automatically(model)
    with torch.no_grad():
        yield model


def _but_for_the_device(reason):
    return None if reason == "it is on cpu, not on one CUDA device" else reason


X = torch.arange(8.0).view(2, 4)


def call(model, times=4, **arguments):
    for step in range(times):
        plain = type(model).forward(copy.deepcopy(model), X + step, **arguments)
        found = model(X + step, **arguments)
        key = "sample" if isinstance(found, dict) else 0
        assert torch.equal(found[key], plain[key])


def test_the_second_call_of_a_kind_is_recorded(model):
    call(model)
    status = cuda_graphs_status(model)
    assert (status.recorded, status.replays, status.reasons) == (1, 2, ())  # the comparison counts as no replay
    call(model, scale=2.0)
    assert cuda_graphs_status(model).recorded == 2 and Replayed.made == 2


WHILE: dict[str, Callable[[torch.nn.Module], contextlib.AbstractContextManager[object]]] = {
    "gradients": lambda model: torch.enable_grad(),
    "a mode": lambda model: Watch(),
}


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", WHILE)
def test_what_no_replay_serves_runs_as_usual(model, what):
    call(model)
    before = cuda_graphs_status(model).replays
    with WHILE[what](model):
        call(model)
    assert cuda_graphs_status(model).replays == before
    call(model, 1)
    assert cuda_graphs_status(model).replays == before + 1


def test_arguments_that_a_graph_cannot_take(model):
    call(model, extra=object())
    assert cuda_graphs_status(model) == apply.CudaGraphsStatus(0, 0, 0, ())


def wrapped(model):
    """As accelerate's offloading does it."""
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))


LASTING = {
    "a hook in it": (lambda model: model.inner.register_forward_hook(lambda *_: None), "has a hook of another tool"),
    "a replaced forward in it": (lambda model: setattr(model.inner, "forward", model.inner.forward), "was replaced"),
}


@pytest.mark.parametrize("what", LASTING)
def test_what_a_replay_would_leave_out(model, what, caplog):
    change, reason = LASTING[what]
    change(model)
    call(model)
    assert Replayed.made == 0
    assert reason in cuda_graphs_status(model).reasons[0]
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "more than one warning"


def test_a_forward_that_is_wrapped_later(model):
    call(model)
    wrapped(model)
    before = cuda_graphs_status(model).replays
    call(model)
    assert cuda_graphs_status(model).replays == before


def test_a_forward_that_waits_for_the_device(model, monkeypatch):
    monkeypatch.setattr(graphed, "watched", lambda function: (function(), "model.py:3"))
    call(model)
    assert cuda_graphs_status(model).reasons == ("its forward waits for the device (model.py:3)",)


def test_a_forward_that_changes_the_model(model, monkeypatch):
    def forward(self, hidden_states):
        self.calls += 1
        return {"sample": self.inner(hidden_states) * self.calls}

    monkeypatch.setattr(Model, "forward", forward)
    for step in range(1, 30):
        assert torch.equal(model(X)["sample"], model.inner(X) * step)
    assert Replayed.made == 0 and cuda_graphs_status(model).reasons == ("it changes between its calls",)


def test_a_model_that_changes_after_every_recording(model):
    for step in range(40):
        model.scale = step // 2
        call(model, 1)
    assert Replayed.made < 10 and cuda_graphs_status(model).reasons == ("it changes between its calls",)


def test_a_replay_with_other_bits_is_not_kept(model, monkeypatch):
    monkeypatch.setattr(Replayed, "replay", lambda self, tensors, tracker: {"sample": tensors[0] * 0})
    call(model)
    assert cuda_graphs_status(model).reasons == ("a replay does not give the same bits as its forward",)


def test_a_recording_that_fails(model, monkeypatch):
    def fails(*_):
        raise AttentionProviderError("cannot be recorded\nmore")

    monkeypatch.setattr(Replayed, "__init__", fails)
    call(model)
    assert cuda_graphs_status(model).reasons == ("cannot be recorded",)


def test_memory(model, monkeypatch):
    monkeypatch.setattr(obstacles, "of_memory", lambda device: "it would need up to 900 MiB")
    call(model)
    assert cuda_graphs_status(model).reasons == ("it would need up to 900 MiB",)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ranks_record_together_or_not_at_all(model, monkeypatch, at):
    """Another rank cannot record, has failed to, or has got other bits: this one neither replays alone nor keeps it."""
    asked, replays = [], []

    def agree(reason):
        asked.append(reason)
        return [reason, "rank 1 cannot" if len(asked) == at else None]

    replay = Replayed.replay
    monkeypatch.setattr(Replayed, "replay", lambda *given: replays.append(1) or replay(*given))
    apply.apply_on_ranks(model, agree)
    call(model)
    assert asked == [None] * at
    assert (Replayed.made, len(replays)) == (int(at > 1), int(at > 2))
    assert cuda_graphs_status(model).reasons == ("rank 1 cannot",)
    apply.leave_ranks(model)  # it was recorded before
    call(model)
    assert cuda_graphs_status(model).recorded == 1


def test_changes_are_noticed(model):
    call(model)
    model.inner.weight.data = model.inner.weight.data * 2
    call(model)
    assert Replayed.made == 2


@pytest.mark.parametrize("how", ["in place", "wrapped", "called"])
def test_a_model_that_the_user_compiles_whole(model, how, fresh_compiler):
    options = {"backend": "eager", "fullgraph": True}
    if how == "in place":
        model.compile(**options)
    function = {
        "in place": lambda: model,
        "wrapped": lambda: torch.compile(model, **options),
        "called": lambda: torch.compile(lambda hidden_states: model(hidden_states), **options),
    }[how]()
    for _ in range(3):
        assert torch.equal(function(X)["sample"], model.inner(X))
    assert Replayed.made == 0


def test_the_settings_of_functions():
    model = Model()
    with pytest.raises(AttentionProviderError, match="cuda_graphs=1: accepted are 'auto', True and False"):
        apply_compile(model, cuda_graphs=1)
    with pytest.raises(AttentionProviderError, match="add mode='reduce-overhead'"):
        apply_compile(model, "full", cuda_graphs="auto")


def test_where_a_forward_waits(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def forward(sync):
        warnings.warn("something else", stacklevel=1)
        if sync:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        return 3

    with pytest.warns(UserWarning, match="something else"):
        assert waiting.watched(lambda: forward(False)) == (3, None)
    with pytest.warns(UserWarning, match="something else"):
        result, place = waiting.watched(lambda: forward(True))
    assert result == 3 and place.startswith(__file__)
    assert modes == [1, 0, 1, 0]


def checks(model, is_agreed, monkeypatch):
    """The number of times that a call over ranks compares the model with its state when it was recorded."""
    counts = []
    real = graphed.Snapshot.holds
    with monkeypatch.context() as patch:
        patch.setattr(graphed.Snapshot, "holds", lambda snapshot: counts.append(1) or real(snapshot))
        model.forward.standing()
        model.forward.begins(is_agreed=is_agreed)
        call(model, 1)
    return len(counts)


def test_a_call_over_ranks_checks_the_model_once(model, monkeypatch):
    """The check takes a millisecond for Flux, and ranks agree on its result before the call."""
    call(model)
    assert checks(model, True, monkeypatch) == 1
    assert checks(model, False, monkeypatch) == 2
    assert cuda_graphs_status(model).recorded == 1


@pytest.mark.parametrize("next_call", ["compared with other ranks", "not compared"])
def test_a_check_holds_for_the_call_that_follows(model, next_call):
    call(model)
    model.forward.standing()
    model.forward.begins(is_agreed=True)  # and an error keeps the call from coming
    model.inner.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    if next_call == "not compared":
        model.forward.begins(is_agreed=False)
    else:
        model.forward.standing()
    call(model, 1)
    assert cuda_graphs_status(model).recorded == 0


def test_a_hook_that_may_change_the_model_has_it_checked_again(model, monkeypatch):
    def changes(module, args):
        module.scale_of_hook = 2.0

    call(model)
    changes.__module__ = "elsewhere"
    model.register_forward_pre_hook(changes)
    call(model)
    assert cuda_graphs_status(model).recorded == 1
    assert checks(model, True, monkeypatch) == 2


def test_a_forward_that_another_tool_has_put_there_stays():
    model = Model()
    model.forward = moved = lambda *args, **kwargs: Model.forward(model, *args, **kwargs)  # as offloading does
    apply.apply_automatically(model)
    assert model.forward is moved and cuda_graphs_status(model) is None
