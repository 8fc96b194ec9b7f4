"""Every call that an adapter makes fits the package's own signature, and what comes back is read as it is meant.

Runs on placeholders for the packages (`packages.py`), whose signatures are recorded (`signatures.py`) and compared here
with the packages that can be downloaded.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
import zipfile
from typing import Any

import pytest
import torch

from diffusers_attn.masks import MaskKind, classify
from diffusers_attn.providers.base import Params

from .. import reference
from . import packages
from .signatures import PARAMETERS, signature

B, HEADS, LQ, LK, D = 2, 4, 5, 7, 64
SAGE = ["Sage", "Fp8Cuda", "Fp8CudaSm90", "Fp16Cuda", "Fp16Triton"]
EXACT = [
    ("flash-attn 2.6.3", "Flash2"),
    ("flash-attn 2.7.0", "Flash2"),
    ("flash-attn 2.8.3", "Flash2"),
    ("flash-attn 2.8.3", "Flash2Varlen"),
    ("flash-attn-3 3.0.0", "Flash3"),
    ("flash-attn-4 4.0.0b36", "Flash4"),
    ("xformers 0.0.35", "Xformers"),
]
MASKS = {
    "none": None,
    "key": (torch.arange(LK) % 3 != 1) & (torch.arange(LK) < torch.tensor([5, 7]).view(B, 1, 1, 1)),
    "no key": torch.arange(LK) < torch.tensor([0, 4]).view(B, 1, 1, 1),
    "dense": (torch.arange(LQ) < 4).view(LQ, 1) & (torch.arange(LK) < 5),
    "bias": torch.linspace(-1, 1, HEADS * LQ * LK, dtype=torch.float64).view(HEADS, LQ, LK),
}
TAKES = {"Flash4": {"none", "key", "no key", "dense"}, "Xformers": set(MASKS)}
OPTIONS = {"Xformers": ()}


def make(kv_heads=HEADS):
    """As `[B, S, H, D]` that is not contiguous."""
    sizes = ((HEADS, LQ), (kv_heads, LK), (kv_heads, LK))
    return [torch.randn(B, heads, length, D, dtype=torch.float64).transpose(1, 2) for heads, length in sizes]


def heads_first(*tensors):
    return [tensor.transpose(1, 2) for tensor in tensors]


@pytest.mark.parametrize(
    ("package", "adapter", "mask"),
    [(*each, mask) for each in EXACT for mask in MASKS if mask in TAKES.get(each[1], {"none", "key", "no key"})],
)
def test_forward_and_backward(package, adapter, mask, monkeypatch):
    kernel = packages.install(package, adapter, monkeypatch).kernel
    kv_heads = HEADS if adapter == "Xformers" else 2
    tensors = make(kv_heads)
    kind, view = classify(MASKS[mask], B, HEADS, LQ, LK)
    options = OPTIONS.get(adapter, (("deterministic", True),))
    params = Params(kind, False, 0.11, False, 0.0, kv_heads != HEADS, "cuda", options)
    out, lse = kernel.forward(*tensors, view, params)
    inputs = [tensor.clone().requires_grad_() for tensor in heads_first(*tensors)]
    expected, expected_lse = reference.attention(*inputs, MASKS[mask], scale=0.11)
    assert torch.allclose(*heads_first(out), expected)
    assert torch.allclose(lse, expected_lse.transpose(1, 2))
    grad = torch.randn_like(out)
    grads = kernel.backward(grad, *tensors, view, out, lse, params)
    for ours, true in zip(heads_first(*grads), torch.autograd.grad(expected, inputs, *heads_first(grad))):
        assert torch.allclose(ours, true)


@pytest.mark.parametrize(("package", "adapter"), EXACT)
def test_causal(package, adapter, monkeypatch):
    kernel = packages.install(package, adapter, monkeypatch).kernel
    query, key, value = make()
    key, value = key[:, :LQ], value[:, :LQ]
    params = Params(
        MaskKind.NONE, True, 0.11, False, 0.0, False, "cuda", OPTIONS.get(adapter, (("deterministic", True),))
    )
    out, lse = kernel.forward(query, key, value, None, params)
    inputs = [tensor.clone().requires_grad_() for tensor in heads_first(query, key, value)]
    expected, expected_lse = reference.attention(*inputs, is_causal=True, scale=0.11)
    assert torch.allclose(*heads_first(out), expected)
    assert torch.allclose(lse, expected_lse.transpose(1, 2))
    grads = kernel.backward(out, query, key, value, None, out, lse, params)
    for ours, true in zip(heads_first(*grads), torch.autograd.grad(expected, inputs, *heads_first(out))):
        assert torch.allclose(ours, true)


SAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "Sage": {},
    "Fp8Cuda": {"smooth_k": True, "qk_quant_gran": "per_warp", "pv_accum_dtype": "fp32"},
    "Fp8CudaSm90": {"smooth_k": False, "qk_quant_gran": "per_warp"},
    "Fp16Cuda": {"smooth_k": False, "pv_accum_dtype": "fp16"},
    "Fp16Triton": {"smooth_k": False},
    "SageVarlen": {"smooth_k": False},
}


@pytest.mark.parametrize(
    ("adapter", "mask"),
    [(adapter, "none") for adapter in SAGE_OPTIONS]
    + [("SageVarlen", "key"), ("Fp16Triton", "key"), ("Fp16Triton", "no key"), ("Fp16Triton", "dense")],
)
def test_sage(adapter, mask, monkeypatch):
    kernel = packages.install("sageattention 2.2.0", adapter, monkeypatch).kernel
    tensors = make(kv_heads=2)
    kind, view = classify(MASKS[mask], B, HEADS, LQ, LK)
    options = tuple(sorted(SAGE_OPTIONS[adapter].items()))
    params = Params(kind, False, 0.11, False, 0.0, True, "cuda", options)
    out, lse = kernel.forward(*tensors, view, params)
    expected, expected_lse = reference.attention(*heads_first(*tensors), MASKS[mask], scale=0.11)
    assert torch.allclose(*heads_first(out), expected)
    assert torch.allclose(kernel.attention(*tensors, view, params=params), out)
    if adapter != "SageVarlen":
        assert torch.allclose(lse, expected_lse.transpose(1, 2))


@pytest.mark.parametrize("mask", ["none", "key", "no key", "causal"])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_float8(mask, kv_heads, monkeypatch):
    """The operator is called with its factors, and its output and lse are those of the quantised tensors."""
    from diffusers_attn.providers import fp8

    kernel = packages.install("flash-attn-3 3.0.0", "Flash3Fp8", monkeypatch).kernel
    causal, mask = mask == "causal", MASKS.get(mask)
    query, key, value = make(kv_heads)
    query, key, value = (query if not causal else query.repeat(1, 2, 1, 1)[:, :LK]).half(), key.half(), value.half()
    if mask is not None:
        key[0, 6], value[0, 6] = 1e4, math.nan  # dropped keys change nothing
        value[1, 1] = 3e4
    kind, view = classify(mask, B, HEADS, query.shape[1], LK)
    options = () if causal else (("softcap", 0.0), ("window_size", (-1, -1)))
    out, lse = kernel.forward(query, key, value, view, Params(kind, causal, 0.11, False, 0.0, True, "cuda", options))
    keep = torch.ones(B, LK, 1, 1, dtype=torch.bool) if mask is None else mask.view(B, LK, 1, 1)
    quantised = []
    for tensor in (query, *(each.masked_fill(~keep, 0.0) for each in (key, value))):
        data, factor = fp8.quantize(tensor, kv_heads)
        quantised.append(
            data.double() * factor.double().repeat_interleave(data.shape[2] // kv_heads, 1)[:, None, :, None]
        )
    expected, expected_lse = reference.attention(*heads_first(*quantised), mask, causal, scale=0.11)
    assert out.dtype == torch.float16
    assert torch.allclose(*heads_first(out), expected.half(), atol=2e-3, rtol=2e-3)
    assert torch.allclose(lse.double(), expected_lse.transpose(1, 2), atol=1e-6)
    true, true_lse = reference.attention(
        *heads_first(query, key.masked_fill(~keep, 0.0), value.masked_fill(~keep, 0.0)), mask, causal, scale=0.11
    )
    assert reference.relative_error(out, true.transpose(1, 2)) < 6e-2
    live = true_lse > -math.inf
    assert torch.allclose(lse.transpose(1, 2).double()[live], true_lse[live], atol=0.15)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("default_scale", [False, True])
def test_sage_3(is_causal, default_scale, monkeypatch):
    """The function has no scale, takes heads first, and changes its key."""
    kernel = packages.install("sageattn3 1.0.0", "Sage3", monkeypatch).kernel
    query, key, value = (tensor.transpose(1, 2)[:, :1] for tensor in make())  # one head: already contiguous
    key, value = (key[:, :, :LQ], value[:, :, :LQ]) if is_causal else (key, value)
    key = key.contiguous()
    before = key.clone()
    scale = D**-0.5 if default_scale else 0.11
    params = Params(MaskKind.NONE, is_causal, scale, default_scale, 0.0, False, "cuda", ())
    out, lse = kernel.forward(query, key, value, None, params)
    expected, _ = reference.attention(query, before, value, None, is_causal, scale=scale)
    assert torch.allclose(out, expected)
    assert torch.equal(key, before)
    assert lse.numel() == 0 and kernel.layout == "bhsd"


@pytest.mark.parametrize("is_causal", [False, True])
def test_sage_is_given_keys_for_a_whole_tile(is_causal, monkeypatch):
    """Of fewer, the fp16 CUDA kernel reads what another kernel left behind."""
    lengths = []

    def recorded(query, key, value, **rest):
        lengths.append(key.shape[1])
        return packages.placeholder("sageattention 2.2.0", "sageattn_qk_int8_pv_fp16_cuda")(query, key, value, **rest)

    made = packages.install("sageattention 2.2.0", "Fp16Cuda", monkeypatch)
    monkeypatch.setitem(made.module.sage_calls.FUNCTIONS, made.kernel.kernel, recorded)
    query, key, value = make()
    query = key.flip(1) if is_causal else query
    params = Params(MaskKind.NONE, is_causal, 0.11, False, 0.0, False, "cuda", ())
    out, lse = made.kernel.forward(query, key, value, None, params)
    expected, expected_lse = reference.attention(*heads_first(query, key, value), None, is_causal, scale=0.11)
    assert torch.allclose(*heads_first(out), expected)
    assert torch.allclose(lse, expected_lse.transpose(1, 2))
    assert min(lengths) >= made.module.TILE


def test_sage_clears_rows_without_keys(monkeypatch):
    made = packages.install("sageattention 2.2.0", "Fp16Triton", monkeypatch)
    mask = MASKS["no key"]
    params = Params(MaskKind.KEY, False, 0.11, False, 0.0, False, "cuda", ())
    monkeypatch.setitem(
        made.module.sage_calls.FUNCTIONS, made.kernel.kernel, lambda q, *_, **__: (q, q[..., 0].transpose(1, 2))
    )
    out, lse = made.kernel.forward(*make(), mask, params)
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()
    assert out[1].all()


def test_a_build_without_an_option_says_so(monkeypatch):
    from diffusers_attn import AttentionProviderError

    def refuse(*args):
        raise RuntimeError("This flash attention build does not support softcap.\nException raised from ...")

    made = packages.install("flash-attn 2.8.3", "Flash2", monkeypatch)
    made.package._flash_attn_forward = refuse
    kernel = made.module.Flash2.over(made.package, "package")
    params = Params(MaskKind.NONE, False, 0.11, False, 0.0, False, "cuda", (("softcap", 2.0),))
    with pytest.raises(AttentionProviderError, match="does not support softcap. The installed flash-attn was compiled"):
        kernel.forward(*make(), None, params)


@pytest.mark.parametrize("window", [(1, 2, 3), (1.5, 2), (None, 1)])
def test_a_window_is_two_whole_numbers(window, monkeypatch):
    from diffusers_attn import AttentionProviderError

    kernel = packages.install("flash-attn 2.8.3", "Flash2", monkeypatch).kernel
    params = Params(MaskKind.NONE, False, 0.11, False, 0.0, False, "cuda", (("window_size", window),))
    with pytest.raises(AttentionProviderError, match="two whole numbers"):
        kernel.forward(*make(), None, params)


DOWNLOADS = {
    "flash-attn-4 4.0.0b36": "flash_attn/cute/interface.py",
    "xformers 0.0.35": "xformers/ops/fmha/__init__.py",
}


@pytest.mark.parametrize("package", DOWNLOADS)
def test_recorded_signatures_are_those_of_the_package(package, request, tmp_path):
    """From the wheel's source: neither package imports without a GPU. Skips where it cannot be downloaded."""
    cache = getattr(request.config, "cache", None)  # `pytest -p no:cacheprovider` has none
    source = ast.parse(download(package, cache.mkdir("wheels") if cache else tmp_path))
    functions = {node.name: node.args for node in source.body if isinstance(node, ast.FunctionDef)}
    for name in PARAMETERS[package]:
        given = functions[name]
        recorded = signature(package, name).parameters
        positional = [each.name for each in recorded.values() if each.kind == each.POSITIONAL_OR_KEYWORD]
        optional = [each.name for each in recorded.values() if each.default is not each.empty]
        assert [argument.arg for argument in given.args] == positional, name
        assert [argument.arg for argument in given.kwonlyargs] == [each for each in recorded if each not in positional]
        needed = len(given.args) - len(given.defaults)
        assert [argument.arg for argument in given.args[needed:]] == [each for each in optional if each in positional]


def download(package, cache):
    name, version = package.split()
    found = list(cache.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not found:
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 34)]
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--python-version=3.12", *platforms, f"--dest={cache}", f"{name}=={version}",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{package} could not be downloaded within a minute")
        if done.returncode:
            pytest.skip(f"{package} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        found = list(cache.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        return wheel.read(DOWNLOADS[package]).decode()
