"""The ComfyUI node: its attention is called with the signature of ComfyUI's hook. ComfyUI itself does not run here."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from diffusers_attn import AttentionProviderError, ProviderUnavailableError, provider_status

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "comfyui"
HEADS, HEAD_DIM = 3, 8


@pytest.fixture(scope="module")
def nodes():
    """The node package, loaded as ComfyUI loads a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location("comfyui_diffusers_attn", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith(spec.name)]:
        del sys.modules[name]


class Model:
    """What the node uses of ComfyUI's ModelPatcher."""

    def __init__(self, options=()):
        self.model_options = {"transformer_options": dict(options)}

    def clone(self):
        return Model(self.model_options["transformer_options"])


def hooked(attention):
    """ComfyUI's attention, which calls the override of the transformer options."""

    @functools.wraps(attention)
    def entry(*args, **kwargs):
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if override is None or "_inside_attn_wrapper" in kwargs:
            return attention(*args, **kwargs)
        return override(attention, *args, **kwargs, _inside_attn_wrapper=True)

    return entry


@hooked
def comfyui_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **more):
    return torch.full((), 7.0)


def patch(nodes, provider="native", source="package", refused_calls="error", model=None):
    node = nodes.NODE_CLASS_MAPPINGS["DiffusersAttnProvider"]
    assert node.RETURN_TYPES == ("MODEL",)
    (patched,) = getattr(node(), node.FUNCTION)(model or Model(), provider, source, refused_calls)
    return patched.model_options


def drawn(query_len=5, key_len=7):
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return [draw(2, HEADS, length, HEAD_DIM) for length in (query_len, key_len, key_len)]


def flat(tensor):
    return tensor.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("mask_shape", [None, (5, 7), (2, 5, 7), (2, 1, 5, 7)])
def test_every_layout_and_mask(nodes, mask_shape, skip_reshape, skip_output_reshape):
    query, key, value = drawn()
    mask = None if mask_shape is None else torch.randn(mask_shape, dtype=torch.float64)
    expanded = mask if mask is None or mask.ndim == 4 else (mask[:, None] if mask.ndim == 3 else mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=expanded, scale=0.3)
    given = (query, key, value) if skip_reshape else (flat(query), flat(key), flat(value))
    found = comfyui_attention(
        *given, HEADS, mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, scale=0.3,
        **patch(nodes),
    )  # fmt: skip
    torch.testing.assert_close(found, expected if skip_output_reshape else flat(expected), atol=1e-12, rtol=0)


def test_the_model_that_was_given_stays_as_it_was(nodes):
    model = Model()
    assert "optimized_attention_override" in patch(nodes, model=model)["transformer_options"]
    assert model.model_options == {"transformer_options": {}}


def test_the_later_of_two_nodes_counts(nodes):
    first = Model(patch(nodes, "_native_math")["transformer_options"])
    override = patch(nodes, "native", model=first)["transformer_options"]["optimized_attention_override"]
    assert (override.provider, override.earlier) == ("native", None)


def test_an_earlier_override_keeps_working(nodes):
    query, key, value = map(flat, drawn())

    def doubled(attention, *args, **kwargs):
        return 2 * attention(*args, **kwargs)

    options = patch(nodes, model=Model({"optimized_attention_override": doubled}))
    once = comfyui_attention(query, key, value, HEADS, **patch(nodes))
    torch.testing.assert_close(comfyui_attention(query, key, value, HEADS, **options), 2 * once)


def test_a_call_that_the_provider_cannot_compute(nodes):
    query, key, value = map(flat, drawn())
    value = value.float()  # of another dtype
    with pytest.raises(AttentionProviderError, match='refused_calls of the node to "comfyui"'):
        comfyui_attention(query, key, value, HEADS, **patch(nodes))
    found = comfyui_attention(query, key, value, HEADS, **patch(nodes, refused_calls="comfyui"))
    assert found.item() == 7.0


def test_a_lossy_provider_leaves_exact_calls_to_comfyui(nodes):
    from comfyui_diffusers_attn.attention import AttentionOverride

    query, key, value = map(flat, drawn())
    options = {"transformer_options": {"optimized_attention_override": AttentionOverride("sage")}}
    for asked in ({"attn_precision": torch.float32}, {"low_precision_attention": False}):
        assert comfyui_attention(query, key, value, HEADS, **asked, **options).item() == 7.0


def test_a_provider_that_cannot_be_used_is_an_error_of_the_node(nodes):
    if provider_status("sage").available:
        pytest.skip("sage can be used here")
    with pytest.raises(ProviderUnavailableError, match="Install it with"):
        patch(nodes, "sage")
