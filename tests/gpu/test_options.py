"""Options of providers: their effects, and the calls that they refuse."""

import pytest
import torch

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider, provider_status

from .. import reference
from .cases import BUILT_BY_FLASH_ATTN, BUILT_WITHOUT, NAMED, exact_tolerance

pytestmark = pytest.mark.gpu


def need(provider, option=None):
    status = provider_status(provider)
    if not status.available:
        pytest.skip(f"{provider}: {status.reason}")
    if option in BUILT_WITHOUT and provider in BUILT_BY_FLASH_ATTN:
        pytest.skip(f"{provider}: this build of flash-attn lacks {option}, says DIFFUSERS_ATTN_FLASH_LACKS")


def attend(provider, *tensors, mask=None, causal=False, **options):
    """Output, or a skip where the installed build was compiled without the option."""
    try:
        with attention_provider(provider, **options):
            return attention_dispatch(*tensors, mask, is_causal=causal)
    except AttentionProviderError as error:
        if "was compiled without" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("provider", ["flash", "flash_varlen", "flash_4"])
def test_window(provider):
    need(provider, "window")
    tensors = NAMED["bf16"].inputs()
    distance = torch.arange(333, device="cuda").view(-1, 1) - torch.arange(333, device="cuda")
    for window, seen in (((40, 20), (distance <= 40) & (distance >= -20)), ((64, -1), distance <= 64)):
        out = attend(provider, *tensors, window_size=window)
        assert reference.relative_error(out, reference.attention(*tensors, seen)[0]) < 1e-2


@pytest.mark.parametrize("provider", ["flash", "flash_varlen", "flash_4"])
def test_window_is_refused_where_positions_are_not_those_of_the_kernel(provider):
    need(provider)
    padding, cross = NAMED["padding"], NAMED["cross"]
    with pytest.raises(AttentionProviderError, match="window_size=.* counts positions"):
        attend(provider, *padding.inputs(), mask=padding.make_mask(), window_size=(8, 8))
    with pytest.raises(AttentionProviderError, match="window_size=.* counts positions"):
        attend(provider, *cross.inputs(), window_size=(8, 8))


@pytest.mark.parametrize("provider", ["flash", "flash_4"])
def test_softcap(provider):
    need(provider, "softcap")
    query, key, value = NAMED["bf16"].inputs()
    out = attend(provider, query, key, value, softcap=2.0)
    scores = query.double() @ key.double().transpose(-1, -2) * 128**-0.5
    expected = (2.0 * torch.tanh(scores / 2.0)).softmax(dim=-1) @ value.double()
    assert reference.relative_error(out, expected) < 1e-2


@pytest.mark.parametrize("provider", ["flash", "flash_varlen", "flash_4"])
def test_deterministic(provider):
    need(provider)
    query, key, value = NAMED["long"].inputs(grad=True)
    grads = []
    for _ in range(3):
        out = attend(provider, query, key, value, deterministic=True)
        grads.append(torch.autograd.grad(out.float().square().sum(), (query, key, value)))
    assert all(torch.equal(*pair) for again in grads[1:] for pair in zip(grads[0], again))


SAGE_OPTIONS = [
    ("_sage_qk_int8_pv_fp8_cuda", {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp32+fp32"}),
    ("_sage_qk_int8_pv_fp8_cuda_sm90", {"qk_quant_gran": "per_warp"}),
    ("_sage_qk_int8_pv_fp16_cuda", {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp16+fp32"}),
    ("_sage_qk_int8_pv_fp16_triton", {"smooth_k": False}),
    ("sage_varlen", {"smooth_k": False}),
]


@pytest.mark.parametrize(("provider", "options"), SAGE_OPTIONS)
def test_sage(provider, options):
    need(provider)
    tensors = NAMED["bf16"].inputs()
    plain, changed = attend(provider, *tensors), attend(provider, *tensors, **options)
    assert not torch.equal(plain, changed)
    error = reference.relative_error(changed, reference.attention(*tensors)[0])
    assert error < 2 * exact_tolerance(provider, tensors[0].dtype)


@pytest.mark.parametrize("provider", ["sage", "sage_varlen", "_sage_qk_int8_pv_fp16_triton", "sage_3", "flash_3_fp8"])
def test_sage_refuses_gradients(provider):
    need(provider)
    with pytest.raises(AttentionProviderError, match="no backward"):
        attend(provider, *NAMED["bf16"].inputs(grad=True))
