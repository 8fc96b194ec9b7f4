"""Calls that differ from earlier ones in one property: the decision for the earlier call is not used."""

import gc
import weakref

import pytest
import torch

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.dispatch import attend
from diffusers_attn.scope import ProviderChoice

from . import reference


def tensors(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, 6, 8, generator=generator).to(**options) for _ in range(3))


def expected(*args, **kwargs):
    return reference.attention(*args, **kwargs)[0].float()


def repeat(*args, times=3, layout="bhsd", **kwargs):
    return [attend(*args, **kwargs, layout=layout) for _ in range(times)][-1]


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.5}, {"is_causal": True}, {"enable_gqa": True}, {"dropout_p": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_is_obeyed_after_a_call_without_it(change):
    query, key, value = tensors()
    repeat(query, key, value)
    if "enable_gqa" in change:
        with pytest.raises(AttentionProviderError, match="enable_gqa"):
            repeat(query, key[:, :2], value[:, :2])
        key, value = key[:, :2], value[:, :2]
    now = repeat(query, key, value, **change)
    if "dropout_p" in change:
        assert not now.any()
    else:
        change = {name: each for name, each in change.items() if name != "enable_gqa"}
        torch.testing.assert_close(now, expected(query, key, value, **change))


@pytest.mark.parametrize("name", ["is_causal", "enable_gqa"])
def test_a_number_is_no_flag_even_after_a_call_with_an_equal_flag(name):
    repeat(*tensors(), **{name: True})
    with pytest.raises(AttentionProviderError, match=f"{name}=1 was given; True or False"):
        attend(*tensors(), layout="bhsd", **{name: 1})


CHANGES = {
    "dtype of the value": lambda query, key, value: (query, key, value.double()),
    "device of the key": lambda query, key, value: (query, key.to("meta"), value),
    "head_dim of the key": lambda query, key, value: (query, key[..., :4], value),
    "length of the value": lambda query, key, value: (query, key, value[:, :, :5]),
    "sparse query": lambda query, key, value: (query.to_sparse(), key, value),
    "sparse value": lambda query, key, value: (query, key, value.to_sparse()),
    "no tensor": lambda query, key, value: (query.tolist(), key, value),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused_after_calls_that_did(change):
    repeat(*tensors())
    with pytest.raises(AttentionProviderError):
        attend(*CHANGES[change](*tensors()), layout="bhsd")


MASKS = {
    "dtype": lambda mask: mask.half(),
    "integers": lambda mask: mask.long(),
    "device": lambda mask: mask.to("meta"),
    "sparse": lambda mask: mask.to_sparse(),
    "shape": lambda mask: mask[:, :5],
}


@pytest.mark.parametrize("change", MASKS)
def test_a_mask_that_does_not_fit_is_refused_after_one_that_did(change):
    mask = torch.ones(6, 6)
    repeat(*tensors(), mask)
    with pytest.raises(AttentionProviderError):
        attend(*tensors(), MASKS[change](mask), layout="bhsd")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_after_plain_ones():
    query, key, value = tensors()
    repeat(query, key, value)
    nested = [torch.nested.nested_tensor(list(tensor.unbind())) for tensor in (query, key, value)]
    found = torch.stack(attend(*nested, layout="bhsd").unbind())
    torch.testing.assert_close(found, expected(query, key, value))
    with pytest.raises(AttentionProviderError, match="attn_mask is a nested tensor"):
        attend(query, key, value, torch.nested.nested_tensor([torch.ones(4, 6, 6)] * 2), layout="bhsd")


def test_other_lengths_and_other_tensors():
    query, key, value = tensors()
    repeat(query, key, value)
    torch.testing.assert_close(repeat(*tensors(1)), expected(*tensors(1)))
    for cut in ((query[:, :, :5], key, value), (query, key[:, :, :5], value[:, :, :5]), (query, key, value[..., :4])):
        torch.testing.assert_close(repeat(*cut), expected(*cut))
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(repeat(strided, key, value), expected(query, key, value))
    assert repeat(*(tensor.to("meta") for tensor in (query, key, value))).is_meta
    assert repeat(query.double(), key.double(), value.double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_torch_func_transform_is_noticed():
    query, key, value = tensors()
    repeat(query, key, value)
    found = torch.func.vmap(lambda each: attend(each, key, value, layout="bhsd"))(query[None])
    torch.testing.assert_close(found[0], expected(query, key, value))
    with attention_provider("flex"):
        repeat(query, key, value)
        with pytest.raises(AttentionProviderError, match="torch.func"):
            torch.func.jvp(lambda each: attend(query, key, each, layout="bhsd"), (value,), (value,))


def test_a_layout_is_not_taken_for_the_other():
    query, key, value = (tensor[:, :, :4] for tensor in tensors())  # as many heads as tokens
    bhsd = repeat(query, key, value)
    bshd = repeat(query, key, value, layout="bshd")
    torch.testing.assert_close(bhsd, expected(query, key, value))
    heads_first = expected(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    torch.testing.assert_close(bshd, heads_first.transpose(1, 2))


@pytest.mark.parametrize("provider", ["native", "_native_math"])
def test_masks_of_other_kinds_and_shapes(provider):
    query, key, value = tensors()
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    padding = torch.tensor([True] * 4 + [False] * 2)
    masks = (lower, padding.expand(6, 6), padding, lower.float(), None, lower[None, None].expand(2, 4, -1, -1))
    for mask in (*masks, *masks[::-1], padding.repeat(6, 1)):
        out = repeat(query, key, value, mask, bound=ProviderChoice.of(provider))
        torch.testing.assert_close(out, expected(query, key, value, mask))


def test_a_bias_that_begins_to_require_a_gradient():
    query, key, value = tensors()
    bias = torch.zeros(2, 1, 1, 6).expand(2, 4, 6, 6)
    repeat(query, key, value, bias)
    repeat(query, key, value, bias.clone().requires_grad_()).sum().backward()
    with pytest.raises(AttentionProviderError, match="gradient of attn_mask"), attention_provider("flex"):
        attend(query, key, value, bias.clone().requires_grad_(), layout="bhsd")


def test_autocast_is_obeyed():
    query, key, value = tensors()
    repeat(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert repeat(query, key, value).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert repeat(query, key, value).dtype == torch.float16
    assert repeat(query, key, value).dtype == torch.float32


def test_a_scope_and_a_gradient_are_noticed():
    query, key, value = tensors()
    for _ in range(3):
        attention_dispatch(query, key, value)
    wants = query.clone().requires_grad_()
    assert attention_dispatch(wants, key, value).requires_grad
    native = attention_dispatch(wants, key, value).grad_fn.name()
    with attention_provider("_native_math"):
        assert attention_dispatch(wants, key, value).grad_fn.name() != native
    assert attention_dispatch(wants, key, value).grad_fn.name() == native
    assert not attention_dispatch(query, key, value).requires_grad


def test_the_grad_mode_is_noticed():
    query, key, value = tensors()
    query.requires_grad_()
    with torch.no_grad():
        assert not repeat(query, key, value).requires_grad
    assert repeat(query, key, value).requires_grad
    with torch.no_grad():
        assert not repeat(query, key, value).requires_grad
    sage = ProviderChoice.of("auto", lossy="sage")
    with torch.no_grad():
        repeat(query, key, value, bound=sage)
    repeat(query, key, value, bound=sage).sum().backward()
    assert query.grad is not None


def test_one_tensor_given_twice():
    query, _, _ = tensors()
    torch.testing.assert_close(repeat(query, query, query), expected(query, query, query))


def test_no_tensor_is_kept_alive():
    given = tensors()
    mask = torch.ones(6, 6, dtype=torch.bool)
    repeat(*given, mask)
    watched = [weakref.ref(tensor) for tensor in (*given, mask)]
    del given, mask
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4


@pytest.mark.parametrize("autocast", [False, True])
def test_a_kind_of_call_is_decided_once(monkeypatch, autocast):
    """And served from the table afterwards, also under autocast, whose calls are cast first."""
    from diffusers_attn import dispatch

    decided, prepare = [], dispatch.prepare
    monkeypatch.setattr(dispatch, "prepare", lambda call: decided.append(call.query.dtype) or prepare(call))
    monkeypatch.setattr(dispatch, "_prepared", known := {})
    monkeypatch.setattr(dispatch.known_calls, "prepared", known)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        repeat(*tensors())
        repeat(*tensors(seed=1))
    assert decided == [torch.bfloat16 if autocast else torch.float32]
    repeat(*(each[:, :, :4] for each in tensors()))
    assert len(decided) == 2
