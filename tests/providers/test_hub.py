"""Kernels from the Hub. Here they come from local folders with builds for the CPU, which the package `kernels` loads as
it loads those of the Hub, so that results can be compared with the definition of attention."""

from __future__ import annotations

import dataclasses
import http.server
import importlib.util
import json
import threading

import pytest
import torch

from diffusers_attn import (
    AttentionProviderError,
    DispatchProcessor,
    ProviderUnavailableError,
    attention_dispatch,
    attention_provider,
    list_providers,
    provider_status,
)
from diffusers_attn.masks import MaskKind
from diffusers_attn.providers import decision, hub, registry, selection
from diffusers_attn.providers.base import Params
from diffusers_attn.providers.catalog import CPU_AND_CUDA, DIFFUSERS_BACKENDS, HALF_AND_FLOAT, SPECS
from diffusers_attn.providers.serving import CallProperties
from diffusers_attn.scope import ProviderChoice

from .. import reference
from . import hub_kernels

MISSING = importlib.util.find_spec("kernels") is None
needs_kernels = pytest.mark.skipif(
    MISSING, reason="the package kernels is not installed (pip install -e '.[test]' brings it)"
)
CALL = CallProperties(
    torch.device("cpu"), torch.float32, 64, 64, 4, 2, "equal", False, MaskKind.NONE, False, False, False, False, ()
)  # fmt: skip
B, HEADS, KV_HEADS, LENGTH, D = 2, 4, 2, 6, 64
KEY_MASK = torch.arange(LENGTH) < torch.tensor([4, LENGTH]).view(B, 1, 1, 1)
NO_KEY = torch.arange(LENGTH) < torch.tensor([0, LENGTH]).view(B, 1, 1, 1)


@pytest.fixture(scope="module")
def local_kernels(tmp_path_factory):
    return hub_kernels.build(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def on_cpu(monkeypatch):
    """The catalog of a machine on which the providers with kernels on the Hub run on the CPU, in float32 too."""
    for name, spec in SPECS.items():
        if spec.hub:
            dtypes = spec.capabilities.dtypes | HALF_AND_FLOAT
            can = dataclasses.replace(spec.capabilities, devices=CPU_AND_CUDA, dtypes=dtypes)
            monkeypatch.setitem(SPECS, name, dataclasses.replace(spec, capabilities=can))
    decision._decided.cache_clear()
    yield
    decision._decided.cache_clear()


@pytest.fixture
def local(local_kernels, on_cpu, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels)


def make():
    shapes = ((B, HEADS, LENGTH, D), (B, KV_HEADS, LENGTH, D), (B, KV_HEADS, LENGTH, D))
    return [torch.randn(shape) for shape in shapes]


@needs_kernels
@pytest.mark.parametrize("provider", ["flash", "flash_varlen", "flash_3"])
@pytest.mark.parametrize("mask", [None, KEY_MASK, NO_KEY, "causal"], ids=["none", "key", "no key", "causal"])
def test_exact_kernels(provider, mask, local):
    inputs = [tensor.requires_grad_() for tensor in make()]
    causal, mask = isinstance(mask, str), mask if torch.is_tensor(mask) else None
    with attention_provider(provider, source="hub"):
        out = attention_dispatch(*inputs, mask, is_causal=causal, scale=0.2, enable_gqa=True)
    expected, expected_lse = reference.attention(*inputs, mask, causal, scale=0.2)
    assert reference.relative_error(out, expected) < 1e-5
    if mask is None:  # as a ring calls it
        params = Params(MaskKind.NONE, causal, 0.2, False, 0.0, True, "cpu", ())
        tensors = [tensor.detach().transpose(1, 2) for tensor in inputs]
        _, lse = registry.load(provider, "hub").forward(*tensors, None, params)
        assert torch.allclose(lse.double(), expected_lse.transpose(1, 2), atol=1e-5)
    grad = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad.double()))
    assert all(reference.relative_error(ours, true) < 1e-5 for ours, true in pairs)


@needs_kernels
@pytest.mark.parametrize(("provider", "tolerance"), [("sage", 1e-5), ("sage_3", 1e-5), ("flash_3_fp8", 6e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_lossy_kernels(provider, tolerance, causal, local):
    """The kernels of these folders do not quantise, except for float8, which is quantised by the provider."""
    inputs = make()
    copies = [tensor.clone() for tensor in inputs]
    with attention_provider(provider, source="hub"):
        out = attention_dispatch(*inputs, is_causal=causal, scale=0.2, enable_gqa=True)
    expected, _ = reference.attention(*copies, None, causal, scale=0.2)
    assert out.dtype == torch.float32
    assert reference.relative_error(out, expected) < tolerance
    assert all(map(torch.equal, inputs, copies))


@needs_kernels
@pytest.mark.parametrize("provider", ["flash", "flash_3", "flash_3_fp8", "sage", "sage_3"])
def test_one_graph(provider, local):
    """The back end of the compiler is left out: operators, fakes and autograd are the same."""
    inputs = make()
    train = SPECS[provider].capabilities.backward
    if train:
        inputs = [tensor.requires_grad_() for tensor in inputs]

    def attention(query, key, value):
        return attention_dispatch(query, key, value, enable_gqa=True)

    with attention_provider(provider, source="hub"):
        torch._dynamo.reset()
        out = torch.compile(attention, fullgraph=True, backend="aot_eager")(*inputs)
        eager = attention(*inputs)
    assert torch.equal(out, eager)
    if train:
        for ours, theirs in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(eager.sum(), inputs)):
            assert torch.equal(ours, theirs)


@needs_kernels
def test_under_a_model(local):
    from diffusers import FluxTransformer2DModel

    from diffusers_attn import set_attention_provider

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8), "encoder_hidden_states": torch.randn(1, 3, 8),
        "pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5]), "guidance": None,
        "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    with torch.no_grad():
        expected = model(**inputs).sample
        set_attention_provider(model, "flash", source="hub")
        assert torch.allclose(model(**inputs).sample, expected, atol=1e-5)


@needs_kernels
def test_the_installed_package_and_the_kernel_of_the_hub_are_kept_apart(local, monkeypatch):
    """Placeholders stand for the installed package."""
    from . import packages

    installed = packages.install("flash-attn 2.8.3", "Flash2", monkeypatch).kernel
    calls = []

    def recorded(query, *_):
        calls.append(query)
        return query, query[..., 0].transpose(1, 2)

    monkeypatch.setattr(installed, "run", recorded)
    monkeypatch.setattr(registry, "_check_package", lambda requirement: ("2.8.3", ""))
    monkeypatch.setattr(registry, "ADAPTERS", {**registry.ADAPTERS, ("flash", "package"): installed})
    registry._package_status.cache_clear()
    with torch.no_grad(), attention_provider("flash", source="hub"):
        attention_dispatch(*make(), enable_gqa=True)
        assert not calls
        with attention_provider("flash"):
            attention_dispatch(*make(), enable_gqa=True)
    assert calls
    registry._package_status.cache_clear()


@needs_kernels
def test_auto_takes_kernels_from_the_hub_where_it_was_asked_to(local, monkeypatch):
    without = dataclasses.replace(SPECS["native"].capabilities, dtypes=frozenset({torch.float64}))
    monkeypatch.setitem(SPECS, "native", dataclasses.replace(SPECS["native"], capabilities=without))
    inputs = make()
    with attention_provider("auto", source="hub") as choice:
        assert choice.options == (("source", "hub"),)
        out = attention_dispatch(*inputs, enable_gqa=True)
    assert reference.relative_error(out, reference.attention(*inputs)[0]) < 1e-5
    call = CALL._replace(options=(("source", "hub"),))
    assert str(selection.select(call)).startswith("flash_3 from the hub: the first that supports the call")
    assert selection.select(CALL).serving.provider == "flex"
    monkeypatch.delenv("LOCAL_KERNELS")
    monkeypatch.setattr(registry, "ADAPTERS", {})
    # Another provider would be a silent fallback.
    with pytest.raises(ProviderUnavailableError, match=r"'flash_3' cannot be .*flash-attn3 \(version 1\) could not be"):
        selection.select(call)


def test_the_environment_names_the_source(monkeypatch):
    assert ProviderChoice.of("flash").options == ()
    monkeypatch.setenv("DIFFUSERS_ATTN_SOURCE", "hub")
    assert ProviderChoice.of("flash").options == (("source", "hub"),)
    assert ProviderChoice.of("flash", source="package").options == ()
    assert ProviderChoice.of("flash", source="package").updated(softcap=1.0).options == (("softcap", 1.0),)
    assert ProviderChoice.of("auto").options == (("source", "hub"),)
    assert ProviderChoice.of("native").options == ProviderChoice.of("flash_4").options == ()
    assert provider_status("native").available
    with pytest.raises(AttentionProviderError, match="option source='web' of provider 'auto'"):
        provider_status("auto", source="web")
    monkeypatch.setenv("DIFFUSERS_ATTN_SOURCE", "Hub")
    with pytest.raises(AttentionProviderError, match="DIFFUSERS_ATTN_SOURCE=Hub; accepted are package and hub"):
        ProviderChoice.of("flash")
    monkeypatch.setenv("DIFFUSERS_ATTN_SOURCE", "")
    assert ProviderChoice.of("flash").options == ()


@pytest.mark.parametrize("provider", sorted(name for name, spec in SPECS.items() if not spec.hub))
def test_providers_without_a_kernel_on_the_hub_say_why(provider):
    for ask in (attention_provider, DispatchProcessor, provider_status):
        with pytest.raises(AttentionProviderError, match=f"source='hub' of provider '{provider}': .*Leave source out"):
            ask(provider, source="hub")
    assert ProviderChoice.of(provider, source="package") is ProviderChoice.of(provider)
    with pytest.raises(AttentionProviderError, match="accepted is"):
        ProviderChoice.of(provider, source="web")


def test_listing_downloads_nothing(on_cpu, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_SOURCE", "hub")
    monkeypatch.setattr(hub, "load", lambda spec: pytest.fail("it loads a kernel"))
    monkeypatch.setattr(registry, "_check_package", lambda requirement: ("1", ""))
    monkeypatch.setattr(registry, "ADAPTERS", {})
    found = {status.name: status for status in list_providers()}
    assert found["flash"].available and found["flash"].version == "Hub: kernels-community/flash-attn2 (version 3)"
    with pytest.raises(AttentionProviderError, match=r"it has no dropout.*Providers available here that support it: n"):
        decision.decide("flex", CALL._replace(dropout=True))


def test_kernels_that_are_not_installed(on_cpu, monkeypatch):
    monkeypatch.setattr(registry, "_check_package", lambda requirement: (None, "package kernels>=0.15.1 is missing"))
    monkeypatch.setattr(registry, "ADAPTERS", {})
    with pytest.raises(
        ProviderUnavailableError, match=r"is missing, and source='hub' needs it. Install it with `pip in"
    ):
        attention_provider("flash", source="hub")
    with pytest.raises(
        ProviderUnavailableError, match=r"'auto' cannot.*is missing, and source='hub' needs it. Install it with `pip in"
    ):
        DispatchProcessor("auto", source="hub")


def test_the_hub_is_named_as_the_shortest_way():
    status = provider_status("flash", source="package")
    if status.available:
        pytest.skip("flash-attn is installed here, so nothing has to be installed")
    assert 'source="hub", which downloads kernels-community/flash-attn2 (version 3)' in str(status)
    assert ("`pip install kernels`" in str(status)) == MISSING
    with pytest.raises(
        ProviderUnavailableError, match=r'The shortest way: .*source="hub".*Install it with `pip install f'
    ):
        attention_provider("flash", source="package")


def test_kernels_are_those_of_diffusers():
    from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY

    theirs = {backend.value: config for backend, config in _HUB_KERNELS_REGISTRY.items()}
    ours = {backend: name for backend, name in DIFFUSERS_BACKENDS.items() if backend.endswith("_hub")}
    assert set(theirs) - set(ours) == {"aiter_fa2_hub"}  # for AMD
    for backend, name in ours.items():
        kernel = SPECS[name].hub
        if kernel is not None:
            assert (kernel.repo, kernel.version) == (theirs[backend].repo_id, theirs[backend].version)
        else:
            assert name == "flash_4"
        arguments = f"attention_provider('{name}'" + (", source='hub')" if kernel else ")")
        with pytest.raises(AttentionProviderError, match=f"'{backend}' is a backend of diffusers") as error:
            attention_provider(backend)
        assert arguments in str(error.value)


@pytest.fixture
def online(on_cpu, monkeypatch):
    """Sets the address of the Hub. No kernel is loaded yet."""
    from huggingface_hub import constants

    def at(endpoint):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)

    monkeypatch.setattr(registry, "ADAPTERS", {})
    return at


def refused():
    with pytest.raises(ProviderUnavailableError) as error:
        attention_provider("flash", source="hub")
    return str(error.value)


@needs_kernels
def test_a_hub_that_cannot_be_reached_and_the_advice_for_it(online, local_kernels, monkeypatch):
    """The advice in the error is followed."""
    online("http://127.0.0.1:9")
    message = refused()
    assert (
        "attention provider 'flash' cannot be used here: its kernel kernels-community/flash-attn2 (version 3)"
        in message
    )
    assert "could not be loaded from the Hub: ConnectError" in message
    assert "LOCAL_KERNELS=kernels-community/flash-attn2=/path/to/the/copy" in message
    assert (
        "Or use source='package', after `pip install flash-attn --no-build-isolation`. Providers available" in message
    )
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels)
    attention_provider("flash", source="hub")


@needs_kernels
def test_a_kernel_without_a_build_for_this_machine(online, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", hub_kernels.build(tmp_path, "rocm"))
    message = refused()
    if (
        "metadata.json" not in message
    ):  # which `kernels` before 0.17 looks for in a local folder without a fitting build
        assert "FileNotFoundError: Cannot find a build variant for this system" in message and "torch-rocm" in message
    assert "could not be loaded from the Hub" in message
    assert "Use source='package', after `pip" in message and "huggingface.co" not in message


@needs_kernels
def test_a_kernel_without_the_functions(online, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", hub_kernels.build(tmp_path))
    (interface,) = tmp_path.glob("flash-attn2/build/*/flash_attn_interface.py")
    interface.write_text("")
    message = refused()
    assert "(version 3) was loaded from the Hub but does not fit: AttributeError" in message
    assert "_flash_attn_forward" in message


class Untrusting(http.server.BaseHTTPRequestHandler):
    """A Hub on which no publisher is trusted."""

    def do_GET(self):
        publisher = {"name": "kernels-community", "fullname": "Kernels", "trustedKernelPublisher": False}
        body = json.dumps(publisher).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@needs_kernels
def test_a_publisher_that_is_not_trusted(online, monkeypatch):
    """With diffusers' variable for it, the kernel itself is looked up; this Hub has none."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Untrusting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        message = refused()
        assert "is not from a trusted publisher" in message and "set DIFFUSERS_TRUST_REMOTE_KERNELS=true" in message
        monkeypatch.setenv("DIFFUSERS_TRUST_REMOTE_KERNELS", "true")
        message = refused()
        assert "could not be loaded from the Hub" in message and "trusted publisher" not in message
        monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
        assert "is not from a trusted publisher" in refused()
        server.shutdown()
