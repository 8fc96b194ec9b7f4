"""Inputs that differ between ranks: made the same, reported, or refused; in eager mode and in a graph."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import AttentionProviderError
from diffusers_attn.parallelize.fingerprint import fingerprint
from diffusers_attn.parallelize.input_exchange import Links
from diffusers_attn.parallelize.input_sync import InputSync

MESHES = {"ring 3": (3, 1), "ulysses 2": (1, 2), "unified 2x2": (2, 2)}


class Recorder(nn.Module):
    """Gives back what reaches it."""

    def forward(self, x, mask=None, guidance=1.0, steps=1, nested=None, **kwargs):
        return {"x": x * 1, "mask": mask, "guidance": guidance, "steps": steps, "nested": nested, **kwargs}


def watched(mesh, mode, module=None):
    module = module or Recorder()
    links = Links.of(mesh)
    module.register_forward_pre_hook(InputSync(module, links, mode), with_kwargs=True)
    return module, links


def everything(rank):
    """Tensors of all kinds, with a rank's own values."""
    torch.manual_seed(rank)
    return {
        "x": torch.randn(2, 5, 3).transpose(0, 1),
        "mask": torch.rand(7) > 0.5,
        "nested": {
            "b": [torch.randn(3, dtype=torch.bfloat16), torch.tensor(float(rank), dtype=torch.float64)],
            "a": (torch.randint(9, (2, 2)), None, "text"),
            "empty": torch.randn(0, 4),
            "expanded": torch.tensor([rank]).expand(3),
        },
        "complex_": torch.randn(2, dtype=torch.complex64),
    }


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for each in items for tensor in flat(each)]


def broadcast(meshes, ring, ulysses):
    mesh = meshes(ring, ulysses)
    module, links = watched(mesh, "broadcast")
    given, cache = everything(mesh.rank), []
    for _ in range(2):
        out = module(given["x"], given["mask"], nested=given["nested"], complex_=given["complex_"], cache=cache)
    assert out["cache"] is cache  # a list that a model may write into
    assert type(out["nested"]["a"]) is tuple and out["nested"]["a"][1:] == (None, "text")
    # What hosts say to each other never meets a tensor of a forward that another rank is still in.
    assert links.host.name not in [group.name for group in links.device]
    expected = everything(0)
    expected = {name: expected[name] for name in ("x", "mask", "nested", "complex_")}
    found = {name: out[name] for name in expected}
    pairs = list(zip(flat(found), flat(expected)))
    return len(pairs), all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_are_given_the_first_ones_tensors(pool, mesh):
    ring, ulysses = MESHES[mesh]
    assert pool.run(ring * ulysses, broadcast, ring=ring, ulysses=ulysses) == [(8, True)] * (ring * ulysses)


class Recorded:
    """A forward as `apply_cuda_graphs` leaves it, of which it says what is recorded."""

    def __init__(self, text):
        self.standing = text

    def __call__(self, x):
        return x


def recorded(meshes, ring, ulysses):
    mesh = meshes(ring, ulysses)
    module, _ = watched(mesh, "broadcast")
    x = torch.ones(2) * mesh.rank
    module.forward = Recorded(lambda: "1 of 1 kinds of calls")
    assert module(x).tolist() == [0, 0]
    module.forward = Recorded(lambda: f"{int(mesh.rank != 1)} of 1 kinds of calls")
    with pytest.raises(AttentionProviderError) as failure:
        module(x)
    return str(failure.value)


def test_ranks_of_which_one_has_lost_what_it_recorded(pool):
    for message in pool.run(3, recorded, ring=3, ulysses=1):
        assert "recorded CUDA graphs: 1 of 1 kinds of calls on ranks 0, 2; 0 of 1 kinds" in message


class Key:
    """Keys of a dict that print alike."""

    def __repr__(self):
        return "key: 1"


def refused(meshes, mode, ring, ulysses):
    """Messages of calls in which one rank differs, and whether later calls still work after each."""
    mesh = meshes(ring, ulysses)
    module, _ = watched(mesh, mode)
    odd = mesh.rank == 1
    x = torch.zeros(2, 3)
    calls = {
        "shape": lambda: module(torch.zeros(2, 4 if odd else 3)),
        "dtype": lambda: module(x.double() if odd else x),
        "absent": lambda: module(x, **({"mask": x} if odd else {})),
        "float": lambda: module(x, guidance=4.0 if odd else 3.5),
        "int": lambda: module(x, steps=2 if odd else 1),
        "flag": lambda: module(x, nested={"return_dict": odd}),
        "length": lambda: module(x, nested=[x] * (2 if odd else 1)),
        "gradient": lambda: module((torch.ones(3) * 2 if odd else torch.ones(3)).requires_grad_()),
        "values": lambda: module(x, nested=[torch.arange(4) + (torch.arange(4) == 2) * odd]),
        "name": lambda: module(x, **{"a: b\n\x1ec": odd}),
        "number's name": lambda: module(x, **{"a: b": 2.5 + odd}),
        "keys": lambda: module(x, nested={Key(): 1.0, Key(): 1.5 + odd}),
        "numpy": lambda: module(x, nested=[np.int64(7 + odd)]),
        "array": lambda: module(x, nested=np.arange(3) * (1 + odd)),
        "bytes": lambda: module(x, nested=b"1" if odd else b"2"),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except AttentionProviderError as error:
            messages[name] = str(error)
        module(x)
    return messages


@pytest.mark.parametrize("mode", ["broadcast", "check"])
@pytest.mark.parametrize("mesh", ["ring 3", "unified 2x2"])
def test_what_cannot_be_made_the_same_is_refused_on_all_ranks(pool, mode, mesh):
    ring, ulysses = MESHES[mesh]
    answers = pool.run(ring * ulysses, refused, mode=mode, ring=ring, ulysses=ulysses)
    assert all(messages == answers[0] for messages in answers)
    others = "ranks 0, 2" + (", 3" if ring * ulysses == 4 else "")
    messages = answers[0]
    if mode == "broadcast":
        assert f"x: [2, 3] float32 on cpu on {others}; [2, 4] float32 on cpu on rank 1" in messages["shape"]
        assert f"x: [2, 3] float32 on cpu on {others}; [2, 3] float64 on cpu on rank 1" in messages["dtype"]
        assert "values" not in messages
    else:
        assert "x: [2, 3] float32 on cpu, values" in messages["shape"]
        assert "nested[0]: [4] int64 on cpu, values" in messages["values"] and "x:" not in messages["values"]
    assert f"mask: absent on {others}; [2, 3] float32" in messages["absent"]
    assert f"guidance: 3.5 on {others}; 4.0 on rank 1" in messages["float"]
    assert f"steps: 1 on {others}; 2 on rank 1" in messages["int"]
    assert f"nested['return_dict']: False on {others}; True on rank 1" in messages["flag"]
    assert f"nested: list of 1 on {others}; list of 2 on rank 1" in messages["length"]
    assert "x: [3] float32 on cpu, values" in messages["gradient"]
    assert f"a: b\n\\x1ec: False on {others}; True on rank 1" in messages["name"]
    assert f"a: b: 2.5 on {others}; 3.5 on rank 1" in messages["number's name"]
    assert f"nested[key: 1]': 1.5 on {others}; 2.5 on rank 1" in messages["keys"]
    assert "nested[0]: int64 [] int64, values" in messages["numpy"]
    assert "nested: ndarray [3] int64, values" in messages["array"]
    assert f"nested: b'2' on {others}; b'1' on rank 1" in messages["bytes"]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Recorder()

    def forward(self, x):
        return self.inner(x + 0)["x"]


def within(meshes, mode):
    """What a model gives that is a part of a graph by Inductor, which drops what it takes to be of no use."""
    torch._dynamo.reset()
    mesh = meshes(2, 1)
    module = Outer()
    watched(mesh, mode, module.inner)
    module.compile(backend="inductor", fullgraph=True)
    try:
        return module(torch.full((4,), float(mesh.rank))).tolist()
    except AttentionProviderError as error:
        return str(error)
    finally:
        torch._dynamo.reset()


def test_within_a_larger_graph(pool):
    assert pool.run(2, within, mode="broadcast") == [[0.0] * 4] * 2
    for message in pool.run(2, within, mode="check"):
        assert "x: [4] float32 on cpu, values" in message


def graphs(meshes, mode):
    """In one graph, its gradient included: what ranks have, how often it was compiled, and a refusal."""
    torch._dynamo.reset()
    mesh = meshes(2, 1)
    module, _ = watched(mesh, mode)
    counter = CompileCounterWithBackend("aot_eager")
    module.compile(backend=counter, fullgraph=True)
    weight = torch.ones(3, requires_grad=True)
    values = []
    for length in (4, 4, 5, 6):
        x = torch.full((length, 3), 1.0 + (mesh.rank if mode == "broadcast" else 0))
        out = module(x, guidance=2.5, steps=length, nested=[weight])
        grad = torch.autograd.grad((out["x"] * out["nested"][0]).sum(), weight)[0]
        values.append((out["x"].mean().item(), grad.tolist()))
    count = counter.frame_count
    try:
        module(torch.full((4, 3 + mesh.rank), 1.0), guidance=2.5, steps=4, nested=[weight])
        message = ""
    except AttentionProviderError as error:
        message = str(error)
    torch._dynamo.reset()
    return values, message, count


@pytest.mark.parametrize("mode", ["broadcast", "check"])
def test_in_one_graph(pool, mode):
    for values, message, count in pool.run(2, graphs, mode=mode):
        assert values == [(1.0, [n, n, n]) for n in (4.0, 4.0, 5.0, 6.0)]
        assert "x: [4, 3] float32" in message and "[4, 4] float32" in message
        assert count <= 4  # the hook and the forward, for the first length and then for any


def kept_by_address(meshes, mode):
    from diffusers import TextKVCacheConfig
    from diffusers.hooks import apply_text_kv_cache

    torch._dynamo.reset()
    module, _ = watched(meshes(2, 1), mode)
    apply_text_kv_cache(module, TextKVCacheConfig())
    module(torch.ones(2), encoder_hidden_states=torch.ones(3))
    module.compile(backend="eager")
    try:
        module(torch.ones(2), encoder_hidden_states=torch.ones(3))
    except AttentionProviderError as error:
        return str(error)
    finally:
        torch._dynamo.reset()


def test_in_one_graph_no_input_is_known_by_its_address(pool):
    for message in pool.run(2, kept_by_address, mode="check"):
        assert "recognises a prompt by its address" in message and "apply_compile(model)" in message


def reported(meshes):
    """Messages that were logged in two forwards with other noise on every rank."""
    mesh = meshes(2, 1)
    module, _ = watched(mesh, "broadcast")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("diffusers_attn.parallelize.input_sync")
    logger.addHandler(handler)
    for _ in range(2):
        module(torch.full((2,), float(mesh.rank)), mask=torch.ones(3))
    logger.removeHandler(handler)
    return records


def test_the_first_rank_is_told_once_of_other_values(pool):
    first, second = pool.run(2, reported)
    assert second == []
    assert len(first) == 1 and "different values of x: those of rank 0" in first[0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_a_fingerprint_sees_every_element_and_its_place(dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    found = {fingerprint(tensor)}
    for place in range(15):
        changed = tensor.clone()
        changed.view(-1)[place] = 1
        found.add(fingerprint(changed))
    assert len(found) == 16
    assert fingerprint(tensor[:0]) == "none"
    assert fingerprint(changed.t().contiguous().t()) == fingerprint(changed)  # strides are no difference
