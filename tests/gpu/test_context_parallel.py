"""Context parallelism over NCCL: every provider under every strategy against the definition of attention, and models.

What strategies do with shapes and masks is held to 1e-10 on CPUs (`tests/context_parallel`). Here are the kernels, in
the precisions that they have, the exchange between GPUs, and what Inductor makes of both.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist

from diffusers_attn import apply_context_parallel, remove_context_parallel, set_attention_provider
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask, RowMask
from diffusers_attn.context_parallel.sequences.sharding import Shards, split
from diffusers_attn.masks import MaskKind
from diffusers_attn.providers.catalog import SPECS

from .. import reference
from .cases import BF16, FP16, GRAD_TOLERANCE, SLOW_TO_COMPILE, build_lacks, exact_tolerance, providers
from .several import SEVERAL_GPUS, SIZE, STRATEGIES

pytestmark = SEVERAL_GPUS

HEAD_DIM = 64
# Lengths of sequences, each split on its own. Those marked few are all that a slowly compiled kernel is asked.
DEFAULTS = {"queries": (333,), "keys": None, "heads": 4, "kv_heads": 4, "mask": None, "causal": False, "few": False}
CASES = {
    "even": {"queries": (256,), "few": True},
    "uneven": {"few": True},
    "two sequences": {"queries": (77, 250)},
    "ranks without tokens": {"queries": (1,), "keys": (6,)},
    "ranks without keys": {"queries": (9,), "keys": (1,)},
    "cross": {"queries": (130,), "keys": (77,)},
    "odd heads": {"heads": 3, "kv_heads": 3},
    "grouped heads": {"heads": 6, "kv_heads": 3},
    "key mask": {"mask": MaskKind.KEY, "few": True},
    "rows": {"mask": MaskKind.DENSE, "queries": (77, 130)},
    "causal": {"causal": True, "few": True},
    "causal with padding": {"causal": True, "mask": MaskKind.KEY},
}


def served(provider):
    """Names and dtypes of the cases that the catalog promises."""
    can = SPECS[provider].capabilities
    for name, changes in CASES.items():
        case = DEFAULTS | changes
        kind = MaskKind.NONE if case["mask"] is None else case["mask"]
        if case["causal"] and kind != MaskKind.NONE:
            kind = MaskKind.DENSE
        if kind not in can.masks or (case["causal"] and can.causal == "none"):
            continue
        if provider in SLOW_TO_COMPILE and not case["few"]:
            continue
        for dtype in (BF16, FP16) if name in ("uneven", "two sequences") else (BF16,):
            if dtype in can.dtypes:
                yield name, dtype


def attention(meshes, strategy, provider, cases, train):
    """Relative errors on this rank, for each case: of the output, and of the gradients of query, key and value."""
    mesh = meshes(strategy)
    errors = {}
    for name, dtype in cases:
        try:
            errors[name, dtype] = _attention(mesh, provider, DEFAULTS | CASES[name], dtype, train)
        except Exception as error:
            raise AssertionError(f"case '{name}', {dtype}") from error
    return errors


def _attention(mesh, provider, case, dtype, train):
    queries, keys = (
        Shards.joint(*((Shards.zigzag if case["causal"] else Shards.contiguous)(length, mesh.size) for length in each))
        for each in (case["queries"], case["keys"] or case["queries"])
    )
    random = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda").to(dtype)

    query, grad_out = (normal(2, queries.total, case["heads"], HEAD_DIM) for _ in range(2))
    key = normal(2, keys.total, case["kv_heads"], HEAD_DIM) + 0.5  # the mean that keys of trained models have
    value = normal(2, keys.total, case["kv_heads"], HEAD_DIM)
    full, mask = None, None
    if case["mask"] == MaskKind.KEY:
        valid = torch.arange(keys.total, device="cuda") < torch.tensor([[0.6], [1.0]], device="cuda") * keys.total
        full, mask = valid[:, None, None], KeyMask(split(valid, keys, 1, mesh.rank))
    elif case["mask"] == MaskKind.DENSE:
        full = torch.rand(1, 1, queries.total, keys.total, generator=random, device="cuda") < 0.5
        mask = RowMask(split(full, queries, 2, mesh.rank))

    shards = (queries, keys, keys)
    local = [split(tensor, each, 1, mesh.rank).clone() for tensor, each in zip((query, key, value), shards)]
    local = [tensor.requires_grad_(train) for tensor in local]
    options = {"mesh": mesh, "query_shards": queries, "key_shards": keys, "is_causal": case["causal"]}
    out = parallel_attention(*local, mask, provider=provider, **options)
    assert out.dtype == dtype
    found, wanted = [out.detach()], [queries]
    complete = [tensor.transpose(1, 2).double().requires_grad_(train) for tensor in (query, key, value)]
    expected_out, _ = reference.attention(*complete, full, is_causal=case["causal"])
    expected = [expected_out]
    if train:
        found += torch.autograd.grad(out, local, split(grad_out, queries, 1, mesh.rank))
        expected += torch.autograd.grad(expected_out, complete, grad_out.transpose(1, 2).double())
        wanted += shards
    errors = []
    for ours, true, each in zip(found, expected, wanted):
        # Relative to the full tensor's norm: softmax may leave no gradient in the few tokens of a rank.
        share = each.sizes[mesh.rank] / each.total
        difference = ours.double() - split(true.detach().transpose(1, 2), each, 1, mesh.rank)
        errors.append((difference.norm() / (true.norm() * share**0.5).clamp(min=1e-1)).item())
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("provider", providers())
def test_attention(gpus, provider, strategy, record):
    can, alone = SPECS[provider].capabilities, STRATEGIES[strategy][0] == 1
    if not can.lse and not alone:
        pytest.skip(f"{provider} gives no log-sum-exp, and a ring needs it")
    if build_lacks(provider, HEAD_DIM):
        pytest.skip(f"{provider}: this build of flash-attn lacks head_dim {HEAD_DIM}")
    train = can.backward and (can.backward_of_parts or alone)
    cases = list(served(provider))
    assert cases
    for errors in gpus.run(SIZE, attention, strategy=strategy, provider=provider, cases=cases, train=train):
        for (name, dtype), (out, *grads) in errors.items():
            # A rounding more than one call has: that of the parts, which merge in float32.
            limits = [1.5 * exact_tolerance(provider, dtype)] + [1.5 * GRAD_TOLERANCE[dtype]] * len(grads)
            for what, error, limit in zip(("output", "dq", "dk", "dv"), (out, *grads), limits):
                assert error <= limit, f"{provider}, {strategy}, {name}, {dtype}: {what} is off by {error:.3g}"
                record(f"{provider}, {strategy}", f"{what} {str(dtype).removeprefix('torch.')}", error, limit)


def model_errors(meshes, strategy, name, provider, dtype, scope, checkpointing):
    """Relative errors of output and averaged gradients, of one process and of all; and whether removal restores."""
    from tests.zoo import CASES as MODELS  # which imports all of diffusers' models

    torch._dynamo.reset()
    model = MODELS[name].build(dtype=dtype, device="cuda")
    inputs = functools.partial(MODELS[name].inputs, device="cuda", dtype=dtype)
    exact = copy.deepcopy(model).float()
    expected = _run(exact, {key: _float(value) for key, value in inputs().items()})
    set_attention_provider(model, provider)
    alone = _run(model, inputs())
    mesh = meshes(strategy)
    apply_context_parallel(model, mesh)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    if scope == "regional":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    elif scope == "full":
        model.compile(fullgraph=True, dynamic=False)
    results = [_run(model, inputs()) for _ in range(2)]
    with torch.no_grad():
        inference = model(**inputs(), return_dict=False)[0]
    for result in results:
        dist.all_reduce(result[1], op=dist.ReduceOp.AVG)
    remove_context_parallel(model)
    torch._dynamo.reset()

    def errors(result):
        return [reference.relative_error(one, other) for one, other in zip(result, expected)]

    return errors(alone), *map(errors, results), [reference.relative_error(inference, expected[0])]


def _float(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _run(model, inputs):
    """Output, and the gradients of a loss that every element of it takes part in, in one row."""
    out = model(**inputs, return_dict=False)[0]
    parameters = list(model.parameters())
    grads = torch.autograd.grad(out.float().square().mean(), parameters, allow_unused=True)
    flat = [(parameter * 0 if grad is None else grad).float().flatten() for grad, parameter in zip(grads, parameters)]
    return out.detach(), torch.cat(flat)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize(("provider", "dtype"), [("native", torch.float32), ("_native_cudnn", BF16)])
@pytest.mark.parametrize(
    ("scope", "checkpointing"), [("none", False), ("regional", False), ("regional", True)], ids=str
)
def test_model(gpus, strategy, name, provider, dtype, scope, checkpointing, record):
    """Uneven lengths, as all of the zoo's: in eager mode, and in one graph for each block as Inductor compiles it."""
    arguments = {"name": name, "provider": provider, "dtype": dtype, "scope": scope, "checkpointing": checkpointing}
    for alone, *found in gpus.run(SIZE, model_errors, strategy=strategy, **arguments):
        for errors in found:
            for what, error, usual in zip(("output", "gradients"), errors, alone):
                record(f"{name}, {strategy}, {scope}", f"{what}, {dtype}", error, max(1e-4, 2 * usual))


def test_a_model_compiled_whole(gpus, record):
    arguments = {"name": "wan", "provider": "native", "dtype": torch.float32, "scope": "full", "checkpointing": False}
    for _, *found in gpus.run(SIZE, model_errors, strategy="gather", **arguments):
        for errors in found:
            record("wan, gather, full", "output and gradients", max(errors), 1e-4)
