"""A call like an earlier one takes a short way; one that differs in anything that matters must not."""

import gc
import weakref

import pytest
import torch

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.call_cache import MOST, PreparedCall, remembered
from diffusers_attn.dispatch import attend
from diffusers_attn.scope import ProviderChoice

from . import reference


def tensors(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, 6, 8, generator=generator).to(**options) for _ in range(3))


@pytest.fixture
def choice():
    """One that no other test has used."""
    choice = ProviderChoice.__new__(ProviderChoice)
    choice.provider, choice.options, choice.cached, choice.cached_masked = "native", (), (), ()
    return choice


def expected(*args, **kwargs):
    return reference.attention(*args, **kwargs)[0].float()


def repeat(choice, *args, times=3, layout="bhsd", **kwargs):
    return [attend(*args, **kwargs, layout=layout, bound=choice) for _ in range(times)][-1]


def test_the_second_like_call_is_remembered(choice):
    repeat(choice, *tensors(), times=1)
    assert choice.cached == ()
    repeat(choice, *tensors(), times=1)
    assert len(choice.cached) == 1
    repeat(choice, *tensors(1))  # other numbers
    assert len(choice.cached) == 1 and choice.cached_masked == ()


def test_pytorchs_guard_tells_apart_what_a_decision_depends_on(choice):
    """Fails when PyTorch changes the private guard that `call_cache.py` is built on."""
    query, key, value = tensors()
    repeat(choice, query, key, value)
    (matches, *_) = choice.cached[0]
    assert matches(query, key, value) and matches(*tensors(1))
    assert not matches(query.double(), key.double(), value.double())
    assert not matches(query[:, :, :5], key, value)
    assert not matches(query, key[:, :, :5], value[:, :, :5])
    assert not matches(query, key, value[..., :4])
    assert not matches(query.transpose(1, 2).contiguous().transpose(1, 2), key, value)
    assert not matches(query.to("meta"), key.to("meta"), value.to("meta"))
    for index in range(3):
        given = [query, key, value]
        given[index] = given[index].clone().requires_grad_()
        assert not matches(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not matches(query, key, value)
    torch.func.vmap(lambda each: [pytest.fail("a batch")] if matches(each, key, value) else each)(query[None])


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.5}, {"is_causal": True}, {"enable_gqa": True}, {"dropout_p": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_is_obeyed_after_a_call_without_it(choice, change):
    query, key, value = tensors()
    repeat(choice, query, key, value)
    if "enable_gqa" in change:
        with pytest.raises(AttentionProviderError, match="enable_gqa"):
            repeat(choice, query, key[:, :2], value[:, :2])
        key, value = key[:, :2], value[:, :2]
    now = repeat(choice, query, key, value, **change)
    if "dropout_p" in change:
        assert not now.any()
    else:
        change.pop("enable_gqa", None)
        torch.testing.assert_close(now, expected(query, key, value, **change))


def test_a_layout_is_not_taken_for_the_other(choice):
    query, key, value = (tensor[:, :, :4] for tensor in tensors())  # as many heads as tokens
    bhsd = repeat(choice, query, key, value)
    bshd = repeat(choice, query, key, value, layout="bshd")
    torch.testing.assert_close(bhsd, expected(query, key, value))
    heads_first = expected(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    torch.testing.assert_close(bshd, heads_first.transpose(1, 2))


def test_masks_of_other_kinds_and_shapes(choice):
    query, key, value = tensors()
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    padding = torch.tensor([True] * 4 + [False] * 2)
    for mask in (lower, padding.expand(6, 6), padding, lower.float(), None, lower[None, None].expand(2, 4, -1, -1)):
        out = repeat(choice, query, key, value, mask)
        torch.testing.assert_close(out, expected(query, key, value, mask))
    assert len(choice.cached_masked) == MOST


def test_autocast_is_obeyed(choice):
    query, key, value = tensors()
    repeat(choice, query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert repeat(choice, query, key, value).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert repeat(choice, query, key, value).dtype == torch.float16
    assert repeat(choice, query, key, value).dtype == torch.float32


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


def test_the_grad_mode_is_noticed(choice):
    query, key, value = tensors()
    query.requires_grad_()
    with torch.no_grad():
        assert not repeat(choice, query, key, value).requires_grad
    assert repeat(choice, query, key, value).requires_grad
    with torch.no_grad():
        assert not repeat(choice, query, key, value).requires_grad
    assert choice.cached == ()
    sage = ProviderChoice.of("auto", lossy="sage")
    with torch.no_grad():
        repeat(sage, query, key, value)
    repeat(sage, query, key, value).sum().backward()
    assert query.grad is not None


def test_one_tensor_given_twice(choice):
    query, _, _ = tensors()
    torch.testing.assert_close(repeat(choice, query, query, query), expected(query, query, query))


def test_no_tensor_is_kept_alive(choice):
    given = tensors()
    mask = torch.ones(6, 6, dtype=torch.bool)
    repeat(choice, *given, mask)
    watched = [weakref.ref(tensor) for tensor in (*given, mask)]
    del given, mask
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4


def test_a_block_mask_is_not_remembered():
    prepared = PreparedCall(lambda *given: given[0], False, None)
    assert remembered((), (*tensors(), object()), (), prepared) == ()
