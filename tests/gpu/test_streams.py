"""CUDA graphs, side streams and threads: what runs in them is right, or refused."""

import threading

import pytest
import torch

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider, provider_status

from .. import reference
from .cases import NAMED, exact_tolerance, provider_cases, providers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("provider", "case"), provider_cases(lambda can: can.cuda_graph, [NAMED["bf16"], NAMED["padding"]])
)
def test_a_captured_call_replays(provider, case):
    inputs, mask = case.inputs(), case.make_mask()
    with attention_provider(provider), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                attention_dispatch(*inputs, mask)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention_dispatch(*inputs, mask)
    for shift in (3, 40):
        for tensor, fresh in zip(inputs, case.inputs()):
            tensor.copy_(fresh)
        if mask is not None:
            mask.copy_(mask.roll(shift, dims=-1))  # the same shape with other keys, and other lengths
            mask[0, ..., :shift] = False
        out.zero_()
        graph.replay()
        expected, _ = reference.attention(*inputs, mask)
        assert reference.relative_error(out, expected) < exact_tolerance(provider, case.dtype)


@pytest.mark.parametrize("provider", providers(lambda can: not can.cuda_graph))
def test_capture_is_refused(provider):
    inputs = NAMED["bf16"].inputs()
    with attention_provider(provider), torch.no_grad():
        attention_dispatch(*inputs)
        with pytest.raises(AttentionProviderError, match="cannot be captured in a CUDA graph"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                attention_dispatch(*inputs)
        torch.cuda.synchronize()
        out = attention_dispatch(*inputs)  # and the device is as it was
    assert reference.relative_error(out, reference.attention(*inputs)[0]) < exact_tolerance(provider, out.dtype)


@pytest.mark.parametrize(("provider", "case"), provider_cases(cases=[NAMED["long"]]))
def test_on_a_side_stream(provider, case):
    """Inputs come late on that stream, and the output is overwritten soon after: any missing order shows."""
    side = torch.cuda.Stream()
    sources = case.inputs()
    with attention_provider(provider), torch.no_grad():
        attention_dispatch(*sources)  # compiled and tuned before it is timed
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(3):
                inputs = [torch.zeros_like(tensor) for tensor in sources]
                torch.cuda._sleep(5_000_000)
                for tensor, source in zip(inputs, sources):
                    tensor.copy_(source)
                out = attention_dispatch(*inputs)
                del inputs
                kept = out.clone()
                del out
                torch.cuda._sleep(1_000_000)
    torch.cuda.synchronize()
    expected, _ = reference.attention(*sources)
    assert reference.relative_error(kept, expected) < exact_tolerance(provider, case.dtype)


def test_threads_have_their_own_providers_and_streams():
    names = ["native", "_native_flash", "flash", "flash_4", "sage"]
    names = [name for name in names if provider_status(name).available]
    inputs = NAMED["long"].inputs()
    expected, _ = reference.attention(*inputs)
    torch.cuda.synchronize()
    errors = {}

    def work(provider):
        with attention_provider(provider), torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            outs = [attention_dispatch(*inputs) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        errors[provider] = max(reference.relative_error(out, expected) for out in outs)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(errors) == set(names)
    for provider, error in errors.items():
        assert error < exact_tolerance(provider, inputs[0].dtype), provider


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("provider", "case"), provider_cases(cases=[NAMED["bf16"]]))
def test_on_a_device_that_is_not_current(provider, case):
    inputs = [tensor.to("cuda:1") for tensor in case.inputs()]
    with attention_provider(provider), torch.no_grad():
        out = attention_dispatch(*inputs)
    assert torch.cuda.current_device() == 0
    expected, _ = reference.attention(*inputs)
    assert reference.relative_error(out, expected) < exact_tolerance(provider, case.dtype)
