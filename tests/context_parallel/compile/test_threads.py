"""A compiled backward and a forward over the same ranks, in two threads, are refused as eager ones are
(`test_rank_progress.py`)."""

import gc
import threading

import pytest
import torch

from diffusers_attn import AttentionProviderError, apply_compile, apply_context_parallel, remove_context_parallel

from ...marks import thorough_but
from ..models import MESHES
from .sized import Model, inputs, plan


def message(call):
    try:
        call()
    except AttentionProviderError as error:
        return str(error)
    return "no error"


def beside(register, work, other):
    """The error that `other` raises while a thread is at the hook that `register` sets, in `work`."""
    inside, free = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert free.wait(60)

    handle = register(wait)
    thread = threading.Thread(target=work, name="one")
    thread.start()
    assert inside.wait(60)
    message_of_other = message(other)
    free.set()
    thread.join()
    handle.remove()
    return message_of_other


def backwards(meshes, mesh):
    gc.collect()  # the message names all models that use these ranks: also those of earlier tests, as long as they live
    torch.manual_seed(0)
    model, given = Model(blocks=2).double(), inputs(8, 12, masked=False)
    ring, ulysses, method = MESHES[mesh]
    # The output is not gathered: the first exchange of the backward is one of a compiled block.
    entries = {path: spec for path, spec in plan().items() if path != "out"}
    apply_context_parallel(model, meshes(ring, ulysses, rotate_method=method), entries)
    apply_compile(model, backend="aot_eager")
    loss = model(**given).square().mean()
    weight = model.blocks[0].attn.to_qkv.weight
    forward = beside(weight.register_hook, loss.backward, lambda: model(**given))
    loss = model(**given).square().mean()
    backward = beside(model.out.register_forward_pre_hook, lambda: model(**given), loss.backward)
    model(**given).square().mean().backward()  # one after the other
    remove_context_parallel(model)
    torch._dynamo.reset()
    return forward, backward


@pytest.mark.parametrize("mesh", thorough_but(["ulysses 2"], ["gather 2", "ring 2", "ulysses 2"]))
def test_a_compiled_backward_beside_another_threads_forward_is_refused(pool, mesh):
    for forward, backward in pool.run(2, backwards, mesh=mesh):
        assert "thread 'MainThread' calls a Model" in forward
        assert "while thread 'one' is within a backward of a Model over the same ranks" in forward
        assert "thread 'MainThread' runs a backward of a model" in backward
        assert "while thread 'one' is within a forward of a Model over the same ranks" in backward


def compiled_as_a_whole(meshes):
    """The error of a thread that calls a compiled model while another thread is within its forward."""
    model, given = Model(blocks=1).double(), inputs(8, 12, masked=False)
    other = Model(blocks=1).double()
    for each in (model, other):
        apply_context_parallel(each, meshes(1, 2), plan())
    model.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        model(**given)
        message_of_other = beside(other.out.register_forward_pre_hook, lambda: other(**given), lambda: model(**given))
        model(**given)  # one after the other
    for each in (model, other):
        remove_context_parallel(each)
    torch._dynamo.reset()
    return message_of_other


@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole_beside_another_is_refused(pool):
    for message_of_other in pool.run(2, compiled_as_a_whole):
        assert "thread 'MainThread' calls a compiled model" in message_of_other
        assert "while thread 'one' is within a forward of a Model over the same ranks" in message_of_other
