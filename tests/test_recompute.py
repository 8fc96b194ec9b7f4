"""A checkpointed forward is recomputed in its own scope, whichever thread or scope calls the backward."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading

import pytest
import torch
from torch.distributed._composable import checkpoint as checkpoint_module
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from diffusers_attn import DispatchProcessor, attention_provider, recompute
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh
from diffusers_attn.dispatch import attend
from diffusers_attn.providers.aten_kernels import Math
from diffusers_attn.providers.native import Native
from diffusers_attn.scope import ProviderChoice, active_choice, active_parallel, scope

from .zoo import CASES

BOUND = ProviderChoice.of("_native_math")


def query(head_dim: int = 8) -> torch.Tensor:
    return torch.randn(1, 3, 2, head_dim, requires_grad=True)


def within(provider: str | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if provider is None else attention_provider(provider)


def test_what_is_stashed_keeps_its_references():
    """PyTorch 2.11 takes none itself, and gives one back."""
    value = object()
    before = sys.getrefcount(value)
    for _ in range(3):
        recompute.stash(value)
        recompute.stash(None)
    assert sys.getrefcount(value) == before


class Seen(torch.nn.Module):
    """Attention that notes which provider is active whenever it runs."""

    def __init__(self, bound: ProviderChoice | None = None) -> None:
        super().__init__()
        self.bound = bound
        self.providers: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.providers.append(active_choice(self.bound).provider)
        return attend(x, x, x, layout="bshd", bound=self.bound)


def in_thread(work) -> None:
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


KINDS = {
    "reentrant": lambda module, x: checkpoint(module, x, use_reentrant=True),
    "not reentrant": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "whole": lambda module, x: checkpoint(module, x, use_reentrant=False, early_stop=False),
    "selective": lambda module, x: checkpoint(
        module,
        x,
        use_reentrant=False,
        context_fn=lambda: torch_checkpoint.create_selective_checkpoint_contexts([torch.ops.aten.mm.default]),
    ),
    "nested": lambda module, x: checkpoint(
        lambda x: checkpoint(module, x * 1, use_reentrant=False), x, use_reentrant=False
    ),
    "nested reentrant": lambda module, x: checkpoint(
        lambda x: checkpoint(module, x * 1, use_reentrant=True), x, use_reentrant=True
    ),
    "sequential": lambda module, x: checkpoint_sequential(
        torch.nn.Sequential(module, torch.nn.Identity()), 2, x, use_reentrant=False
    ),
    "wrapper": lambda module, x: checkpoint_wrapper(module)(x),
    "composable": lambda module, x: checkpoint_module(module)(x),
}


@pytest.mark.parametrize("place", ["this thread", "another thread"])
@pytest.mark.parametrize("forward, backward", [("auto", None), (None, "auto"), ("auto", "native")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scope_of_the_forward_and_not_of_the_backward(kind, forward, backward, place):
    module, x = Seen(BOUND), query()
    with within(forward):
        out = KINDS[kind](module, x)

    def call_backward():
        with within(backward):
            out.sum().backward()
            assert scope.choice is (None if backward is None else ProviderChoice.of(backward))
        assert scope.choice is None

    (in_thread if place == "another thread" else lambda work: work())(call_backward)
    assert set(module.providers) == {forward or "_native_math"} and len(module.providers) > 1
    assert scope.choice is None


def test_the_kernel_that_recomputes_is_the_one_of_the_forward(monkeypatch):
    calls = []
    for provider in (Math, Native):
        attention = inspect.getattr_static(provider, "attention").__func__
        monkeypatch.setattr(
            provider,
            "attention",
            classmethod(lambda cls, *given, _of=attention, **rest: calls.append(cls) or _of(cls, *given, **rest)),
        )
    with attention_provider("_native_math"):
        out = checkpoint(Seen(), query(head_dim=24), use_reentrant=False)  # of a size that nothing else has prepared
    with attention_provider("native"):
        out.sum().backward()
    assert calls == [Math, Math]


def test_a_backward_beside_the_scope_of_another_thread():
    module, x = Seen(BOUND), query()
    entered, done = threading.Event(), threading.Event()

    def other():
        with attention_provider("auto"):
            entered.set()
            done.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        entered.wait(30)
        checkpoint(module, x, use_reentrant=False).sum().backward()
    finally:
        done.set()
        thread.join()
    assert module.providers == ["_native_math"] * 2


def test_two_threads_that_train_in_scopes_of_their_own():
    barrier = threading.Barrier(2)
    seen = {}

    def train(provider):
        module = seen[provider] = Seen(BOUND)
        with attention_provider(provider):
            outs = [checkpoint(module, query(), use_reentrant=reentrant) for reentrant in (False, True) * 3]
            barrier.wait(30)
            for out in outs:
                out.sum().backward()

    threads = [threading.Thread(target=train, args=(provider,)) for provider in ("auto", "native")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {provider: module.providers for provider, module in seen.items()} == {
        provider: [provider] * 12 for provider in ("auto", "native")
    }


def test_the_mesh_that_a_scope_names_goes_with_it():
    seen = []

    def noting(x):
        seen.append(active_parallel())
        return x * x

    mesh = ContextParallelMesh(ContextParallelConfig(), ALONE, ALONE)
    with attention_provider("native", mesh=mesh):
        out = checkpoint(noting, query(), use_reentrant=False)
    in_thread(out.sum().backward)
    assert seen[0] is not None and seen[1] is seen[0] and active_parallel() is None


def test_an_error_in_the_recomputation_leaves_no_scope_behind():
    def fails_in_backward(x):
        if torch._C._current_graph_task_id() != -1:
            raise KeyError
        return module(x)

    module = Seen()
    with attention_provider("auto"):
        out = checkpoint(fails_in_backward, query(), use_reentrant=False)
    with pytest.raises(KeyError):
        out.sum().backward()
    assert active_choice().provider == "native"


class _Deep(torch.autograd.Function):
    """Computes attention in its backward, as a checkpoint that somebody wrote by hand does. So many backwards within
    each other go on in threads of autograd's own, as every backward of a GPU does."""

    @staticmethod
    def forward(ctx, x, module, depth):
        ctx.rest = module, depth
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        module, depth = ctx.rest
        with torch.enable_grad():
            if depth:
                _Deep.apply(torch.ones(1, requires_grad=True), module, depth - 1).sum().backward()
            else:
                module(query())
        return grad, None, None


@pytest.mark.parametrize("provider", ["auto", None])
def test_attention_in_any_other_backward_is_in_the_scope_that_called_the_backward(provider):
    module, threads = Seen(BOUND), []
    module.register_forward_hook(lambda *_: threads.append(threading.get_ident()))
    out = _Deep.apply(torch.ones(1, requires_grad=True), module, 70)
    with within(provider):
        out.sum().backward()
    assert threads != [threading.get_ident()]
    assert module.providers == [provider or "_native_math"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_is_recomputed_in_a_thread_of_autograd(reentrant):
    """Deep within other backwards, and outside of any scope."""
    module, x = Seen(BOUND), query()
    with attention_provider("auto"):
        out = checkpoint(module, x, use_reentrant=reentrant)

    threads = []

    def call_backward(_):
        threads.append(threading.get_ident())
        out.sum().backward()

    _Deep.apply(torch.ones(1, requires_grad=True), call_backward, 70).sum().backward()
    assert threads != [threading.get_ident()]
    assert module.providers == ["auto", "auto"]


def test_a_checkpointing_model_of_diffusers(routed_providers):
    case = CASES["flux"]
    model = case.build().train()
    model.set_attn_processor(DispatchProcessor("native"))
    model.enable_gradient_checkpointing()
    with attention_provider("_native_math"):
        out = model(**case.inputs())[0]
    forward = len(routed_providers)
    with attention_provider("auto"):
        out.sum().backward()
    assert set(routed_providers) == {"_native_math"} and len(routed_providers) > forward


@pytest.fixture
def routed_providers(monkeypatch) -> list[str]:
    from diffusers_attn.processors import entry_points

    providers: list[str] = []
    attend = entry_points.attend

    def recording(*args, bound=None, **kwargs):
        providers.append(active_choice(bound).provider)
        return attend(*args, bound=bound, **kwargs)

    monkeypatch.setattr(entry_points, "attend", recording)
    return providers


def test_the_names_of_torch_that_the_scope_relies_on():
    """Fails where a new PyTorch makes its checkpoints in another way."""
    for made in (torch_checkpoint._CheckpointFrame.__init__, torch_checkpoint.CheckpointFunction.forward):
        assert made.__wrapped__.__module__ == "torch.utils.checkpoint"
