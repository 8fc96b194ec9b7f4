"""Tensors that are not plain ones: each kind as PyTorch has it, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider, set_attention_provider
from diffusers_attn.dispatch import attend

from .zoo import CASES, outputs

sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _like_calls_have_been_served():
    """Calls with plain tensors of the same shapes, which later ones might be taken for."""
    query, mask = torch.randn(2, 3, 9, 8), torch.ones(9, 9, dtype=torch.bool)
    for _ in range(3):
        attention_dispatch(query, query, query)
        attention_dispatch(query, query, query, mask)


def plain(length=9):
    return torch.randn(2, 3, length, 8)


@pytest.mark.parametrize("provider", ["native", "_native_math", "flex", "auto"])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize(("query_len", "key_len"), [(9, 9), (9, 12)])
def test_causal_biases(provider, make, query_len, key_len):
    query, key, value = plain(query_len), plain(key_len), plain(key_len)
    bias = make(query_len, key_len)
    expected = sdpa(query, key, value, bias)
    with attention_provider(provider):
        for _ in range(3):
            torch.testing.assert_close(attention_dispatch(query, key, value, bias), expected)
        with pytest.raises(AttentionProviderError, match="CausalBias and is_causal=True"):
            attention_dispatch(query, key, value, bias, is_causal=True)


def test_causal_biases_in_a_graph(fresh_compiler):
    query, key, bias = plain(9), plain(12), causal_lower_right(9, 12)
    compiled = torch.compile(
        lambda query, key, bias: attention_dispatch(query, key, key, bias), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(query, key, bias), sdpa(query, key, key, bias))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_pytorchs_or_refused(layout):
    parts = [torch.randn(5, 3, 8), torch.randn(7, 3, 8)]
    nested = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    if layout is torch.strided:
        nested = torch.nested.nested_tensor([each.transpose(0, 1) for each in parts])
    for found, part in zip(attention_dispatch(nested, nested, nested).unbind(), parts):
        part = part.transpose(0, 1)
        torch.testing.assert_close(found, sdpa(part, part, part))
    of_processor = torch.nested.nested_tensor(parts, layout=layout)  # [batch, seq, heads, head_dim]
    for found, part in zip(attend(of_processor, of_processor, of_processor, layout="bshd").unbind(), parts):
        part = part.transpose(0, 1)
        torch.testing.assert_close(found.transpose(0, 1), sdpa(part, part, part))
    with (
        attention_provider("flex"),
        pytest.raises(AttentionProviderError, match="query is a nested.*use provider 'nat"),
    ):
        attention_dispatch(nested, nested, nested)
    with pytest.raises(AttentionProviderError, match="attn_mask is a nested tensor"):
        attention_dispatch(plain(), plain(), plain(), nested)
    with pytest.raises((RuntimeError, ValueError)):  # PyTorch's own
        attention_dispatch(plain(), nested, nested)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("query", lambda tensor: tensor.to_sparse(), r"sparse_coo.*query\.to_dense\(\)"),
        ("attn_mask", lambda tensor: tensor[0, 0].to_sparse_csr(), r"sparse_csr.*attn_mask\.to_dense\(\)"),
        ("key", lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), r"quantised.*key\.dequantize"),
        ("value", lambda tensor: torch.masked.masked_tensor(tensor, tensor > 0), r"MaskedTensor.*value\.get_data\(\)"),
        ("query", lambda tensor: tensor.numpy(), "query is a ndarray"),
    ],
)
def test_what_nobody_computes_is_refused_by_name(argument, change, message):
    call = {name: plain() for name in ("query", "key", "value")}
    call["attn_mask"] = torch.zeros(2, 3, 9, 9)
    with pytest.raises(AttentionProviderError, match=message):
        attention_dispatch(**{**call, argument: change(call[argument])})


class Labelled(torch.Tensor):
    pass


class WithCode(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("cls", [Labelled, WithCode, torch.nn.Parameter])
def test_subclasses_come_back_as_pytorch_gives_them(cls):
    query, key, value, mask = plain(), plain(), plain(), torch.randn(9, 9)
    special = query.as_subclass(cls) if cls is not torch.nn.Parameter else cls(query, requires_grad=False)
    for call in ((special, key, value), (query, key, value, mask.as_subclass(cls))):
        expected = sdpa(*call)
        for _ in range(3):
            found = attention_dispatch(*call)
            assert type(found) is type(expected) and torch.equal(found, expected)
    with attention_provider("flex"):
        if cls is WithCode:
            with pytest.raises(AttentionProviderError, match="query is a WithCode.*'flex' takes plain tensors"):
                attention_dispatch(special, key, value)
        else:
            assert type(attention_dispatch(special, key, value)) is type(sdpa(special, key, value))


def energy(attention, key, value):
    return lambda query: attention(query, key, value).pow(2).sum()


@pytest.mark.parametrize("transform", [grad, hessian, jacrev, lambda f: lambda x: jvp(f, (x,), (x,))[1]])
def test_transforms_of_torch_func(transform):
    query, key, value = plain()[0], plain()[0], plain()[0]
    expected = transform(energy(sdpa, key, value))(query)
    for provider in ("native", "auto", "_native_math"):
        with attention_provider(provider):
            for _ in range(2):
                torch.testing.assert_close(transform(energy(attention_dispatch, key, value))(query), expected)
    with attention_provider("flex"), pytest.raises(AttentionProviderError, match="torch.func.*support it: native"):
        transform(energy(attention_dispatch, key, value))(query)


@pytest.mark.parametrize("provider", ["native", "auto", "_native_math"])
def test_forward_mode_of_four_dimensions(provider):
    """PyTorch chooses a kernel without it, and raises."""
    query, key, value = plain(7).double(), plain(12)[:, :1].double(), plain(12)[:, :1].double()
    mask = torch.rand(2, 1, 7, 12) > 0.3
    with attention_provider(provider):
        _, found = jvp(lambda each: attention_dispatch(each, key, value, mask, enable_gqa=True), (query,), (query,))
    step = 1e-6 * query
    ahead, behind = (sdpa(each, key, value, mask, enable_gqa=True) for each in (query + step, query - step))
    torch.testing.assert_close(found, (ahead - behind) / 2e-6, atol=1e-8, rtol=1e-6)


def test_vmap():
    query, masks = torch.randn(4, 2, 3, 5, 8), torch.rand(4, 5, 5) > 0.3
    torch.testing.assert_close(
        vmap(attention_dispatch)(query, query, query, masks), vmap(sdpa)(query, query, query, masks)
    )
    twice = vmap(vmap(lambda each: attention_dispatch(each, each, each)))(query)
    torch.testing.assert_close(twice, sdpa(query, query, query))
    with attention_provider("flex"), pytest.raises(AttentionProviderError, match="torch.func"):
        vmap(attention_dispatch)(query, query, query)


def test_the_layout_of_gradients_goes_through_transforms():
    """What `native` does to gradients on a GPU, where cuDNN wants theirs to lie in memory as the output does."""
    from diffusers_attn.tracing.functions import GradientLaidOutUnderTransforms

    query = plain().transpose(1, 2)

    def energy(each):
        return GradientLaidOutUnderTransforms.apply(each).pow(2).sum()

    torch.testing.assert_close(vmap(grad(energy))(query), 2 * query)
    torch.testing.assert_close(jvp(energy, (query,), (query,))[1], 2 * query.pow(2).sum())
    weight = torch.randn(query.shape, requires_grad=True)
    laid_out = GradientLaidOutUnderTransforms.apply(query.clone(memory_format=torch.preserve_format).requires_grad_())
    seen = []
    (laid_out * weight).sum().backward(inputs=[weight])
    leaf = query.clone().requires_grad_()
    leaf.register_hook(lambda grad: seen.append(grad.stride()))
    (GradientLaidOutUnderTransforms.apply(leaf) * weight).sum().backward()
    assert seen == [leaf.stride()]


@pytest.mark.parametrize("provider", ["native", "flex"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(provider, mode):
    query, key = plain(), plain(12)
    with attention_provider(provider):
        graph = make_fx(lambda query, key: attention_dispatch(query, key, key), tracing_mode=mode)(query, key)
    if mode == "symbolic":
        query, key = query[:, :, :4], key[:, :, :7]
    torch.testing.assert_close(graph(query, key), sdpa(query, key, key))


@pytest.mark.parametrize("provider", ["native", "flex"])
def test_export(provider):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return attention_dispatch(query, key, value)

    query, key, value = plain(), plain(12), plain(12)
    lengths = ({2: torch.export.Dim.DYNAMIC},) * 3
    with attention_provider(provider):
        program = torch.export.export(Attention(), (query, key, value), dynamic_shapes=lengths, strict=False)
    query = query[:, :, :4]
    torch.testing.assert_close(program.module()(query, key, value), sdpa(query, key, value))


def test_fake_tensors():
    with FakeTensorMode():
        query, mask = plain(), torch.ones(9, 9, dtype=torch.bool)
        for _ in range(3):
            assert attention_dispatch(query, query, query, mask).shape == query.shape


@pytest.mark.parametrize("provider", ["native", "flex", "_native_math", "auto"])
def test_on_meta_shapes_are_those_of_a_real_call_and_refusals_too(provider):
    query = plain().to("meta")
    mask = torch.ones(9, 9, dtype=torch.bool, device="meta")
    with attention_provider(provider):
        for _ in range(3):
            assert attention_dispatch(query, query[:, :1], query[:, :1, :, :8]).shape == query.shape
            assert attention_dispatch(query, query, query, mask, is_causal=True).device.type == "meta"
        if provider == "flex":
            with pytest.raises(AttentionProviderError, match="no dropout"):
                attention_dispatch(query, query, query, dropout_p=0.5)


@pytest.mark.parametrize("provider", ["native", "flex"])
def test_a_bound_model_on_meta(provider):
    case = CASES["flux"]
    model = case.build()
    expected = [each.shape for each in outputs(model(**case.inputs()))]
    set_attention_provider(model, provider)
    inputs = {name: each.to("meta") if torch.is_tensor(each) else each for name, each in case.inputs().items()}
    with torch.no_grad():
        assert [each.shape for each in outputs(model.to("meta")(**inputs))] == expected
