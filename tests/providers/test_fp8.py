"""What quantising to float8 keeps, by dequantising in float64."""

import pytest
import torch

from diffusers_attn.providers import fp8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_the_error_of_every_value_is_bounded(dtype, heads, kv_heads):
    tensor = (torch.randn(3, 50, heads, 32) * torch.logspace(-4, 2, heads).view(-1, 1)).to(dtype)
    data, factor = fp8.quantize(tensor, kv_heads)
    assert data.dtype == torch.float8_e4m3fn and data.shape == tensor.shape and data.is_contiguous()
    assert factor.dtype == torch.float32 and factor.shape == (3, kv_heads)
    # Heads that share a key head share a factor: head h uses that of key head h // (heads // kv_heads).
    factors = factor.double().repeat_interleave(heads // kv_heads, dim=1)[:, None, :, None]
    error = (data.double() * factors - tensor.double()).abs()
    assert (error <= torch.maximum(tensor.double().abs() / 16, factors / 1024) * (1 + 1e-6)).all()
    largest = tensor.double().abs().unflatten(2, (kv_heads, -1)).amax(dim=(1, 3, 4))
    assert torch.allclose(factor.double() * 448, largest, rtol=1e-6)


def test_dropped_keys_do_not_count():
    tensor = torch.randn(2, 5, 2, 16)
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool).view(2, 1, 1, 5)
    other = tensor.masked_fill(~keep.view(2, 5, 1, 1), 1e30)
    for ours, expected in zip(fp8.quantize(tensor, 2, keep), fp8.quantize(other, 2, keep)):
        assert torch.equal(ours.float(), expected.float())
    _, factor = fp8.quantize(tensor, 2, keep[:1])  # one mask for the batch
    assert torch.allclose(factor[1], tensor[1, [0, 1, 3]].abs().amax(dim=(0, 2)) / 448)


@pytest.mark.parametrize("value", [0.0, 1e-38, 6e4])
def test_extremes(value):
    tensor = torch.full((1, 3, 1, 16), value)
    data, factor = fp8.quantize(tensor, 1)
    assert torch.allclose(data.double() * factor.double(), tensor.double(), rtol=0.07, atol=0.0)


def test_what_is_not_a_number_stays_in_its_group():
    tensor = torch.randn(1, 4, 2, 16)
    tensor[0, 1, 0, 3] = torch.nan
    data, factor = fp8.quantize(tensor, 2)
    assert data[0, 1, 0, 3].float().isnan()
    assert not data[:, :, 1].float().isnan().any() and not factor[:, 1].isnan().any()
