"""Forwards that are recorded and replayed: the same bits as without, whatever changes between two calls."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig

from diffusers_attn import (
    AttentionProviderError,
    apply_compile,
    apply_cuda_graphs,
    attention_provider,
    cuda_graphs_status,
    disable_context_parallel,
    enable_context_parallel,
    remove_cuda_graphs,
    set_attention_provider,
)
from diffusers_attn.runtime.cuda_graphs import apply, recording
from diffusers_attn.runtime.cuda_graphs.graphs import applied

from .cases import build_lacks, providers
from .several import SIZE, STRATEGIES

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "examples" / "tiny_flux"
HEAD_DIM = 24
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(MODEL, dtype=BF16, local_files_only=True).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def model(pipe):
    """A copy, to change."""
    model = copy.deepcopy(pipe.transformer)
    yield model
    remove_cuda_graphs(model)


@pytest.fixture
def replays(monkeypatch):
    """A list that has an entry for every replay."""
    counted = []
    replay = recording.Recording.replay
    monkeypatch.setattr(recording.Recording, "replay", lambda *given: counted.append(1) or replay(*given))
    return counted


def inputs(model, seed=0, tokens=64):
    """Of one picture and its text."""
    random = torch.Generator("cuda").manual_seed(seed)
    config = model.config

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda").to(BF16)

    ids = torch.zeros(tokens, 3, device="cuda")
    ids[:, 1:] = torch.randint(16, (tokens, 2), generator=random, device="cuda")
    return {
        "hidden_states": normal(1, tokens, config.in_channels),
        "encoder_hidden_states": normal(1, 13, config.joint_attention_dim),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "timestep": torch.rand(1, generator=random, device="cuda").to(BF16),
        "img_ids": ids,
        "txt_ids": torch.zeros(13, 3, device="cuda"),
        "guidance": normal(1) if config.guidance_embeds else None,
    }


def both(model, plain, **call):
    """What the model gives, and what one without graphs does."""
    with torch.no_grad():
        return model(**call).sample, plain(**call).sample


def draw(pipe, size=64):
    generator = torch.Generator().manual_seed(0)
    shape = {"height": size, "width": size, "max_sequence_length": 32}
    return pipe(["a cat"], num_inference_steps=6, generator=generator, output_type="pt", **shape).images


@pytest.mark.parametrize("provider", providers(lambda can: can.cuda_graph))
def test_a_pipeline_draws_the_same_picture(provider, pipe, replays):
    if build_lacks(provider, HEAD_DIM):
        pytest.skip(f"{provider}: this build of flash-attn lacks head_dim {HEAD_DIM}")
    set_attention_provider(pipe, provider)
    expected = draw(pipe)
    apply_cuda_graphs(pipe.transformer)
    try:
        for _ in range(2):
            assert torch.equal(draw(pipe), expected)
        assert len(replays) == 11
    finally:
        remove_cuda_graphs(pipe.transformer)
        set_attention_provider(pipe, None)
    draw(pipe)
    assert len(replays) == 11


def test_compiled_blocks(model, pipe, replays):
    plain = copy.deepcopy(model)
    for each in (model, plain):
        apply_compile(each, dynamic=False)
    apply_cuda_graphs(model)
    for seed in range(4):
        found, expected = both(model, plain, **inputs(model, seed))
        assert torch.equal(found, expected)
    assert len(replays) == 3


CHANGES = {
    "an adapter is added": lambda model: add_adapter(model, "second"),
    "it is scaled": lambda model: model.set_adapters("first", weights=0.25),
    "it is turned off": lambda model: model.disable_adapters(),
    "another provider": lambda model: set_attention_provider(model, "_native_math"),
    "projections are fused": lambda model: model.fuse_qkv_projections(),
    "weights are changed in their place": lambda model: model.proj_out.weight.data.mul_(2),
    "a weight moves": lambda model: setattr(model.proj_out.weight, "data", model.proj_out.weight.data * 2),
}


def add_adapter(model, name):
    torch.manual_seed(len(name))
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False), name)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_the_model(change, model, replays):
    add_adapter(model, "first")
    plain = copy.deepcopy(model)
    apply_cuda_graphs(model)
    for seed in range(3):
        before, expected = both(model, plain, **inputs(model, seed))
        assert torch.equal(before, expected)
    assert len(replays) == 2
    CHANGES[change](model), CHANGES[change](plain)
    for _ in range(3):
        found, expected = both(model, plain, **inputs(model, 2))
        assert torch.equal(found, expected)
    assert len(replays) >= 4
    assert not torch.equal(found, before) or change == "projections are fused"


def test_what_changes_in_the_call(model, pipe, replays):
    plain = copy.deepcopy(model)
    add_adapter(model, "first"), add_adapter(plain, "first")
    apply_cuda_graphs(model)
    calls = [
        {},
        {"joint_attention_kwargs": {"scale": 0.5}},
        {"return_dict": False},
    ]
    for call in calls * 3:
        with torch.no_grad():
            found, expected = (each(**inputs(model), **call)[0] for each in (model, plain))
        assert torch.equal(found, expected)
    assert len(replays) == 6
    for provider in ("_native_math", "native", "_native_math"):
        for _ in range(2):
            with attention_provider(provider):
                assert torch.equal(*both(model, plain, **inputs(model, 5)))
    with torch.inference_mode():
        assert torch.equal(model(**inputs(model, 6)).sample, plain(**inputs(model, 6)).sample)


def test_results_are_the_callers_own(model):
    """As guidance needs them: two results of one graph at once."""
    plain = copy.deepcopy(model)
    apply_cuda_graphs(model)
    with torch.no_grad():
        model(**inputs(model))
        results = [model(**inputs(model, seed)).sample for seed in range(3)]
        for seed, found in enumerate(results):
            assert torch.equal(found, plain(**inputs(model, seed)).sample)


def test_inputs_of_other_layouts_and_places(model, replays):
    plain = copy.deepcopy(model)
    apply_cuda_graphs(model)
    for seed in range(3):
        call = inputs(model, seed)
        strided = call["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
        on_host = call["timestep"].cpu()
        with torch.no_grad():
            expected = plain(**call).sample
            found = model(**call | {"hidden_states": strided, "timestep": on_host if seed else call["timestep"]}).sample
        assert torch.equal(found, expected)
    assert len(replays) == 2


def test_few_graphs_are_kept(model, replays, caplog):
    plain = copy.deepcopy(model)
    apply_cuda_graphs(model, max_graphs=2)
    for tokens in (16, 36, 64):
        for seed in range(3):
            assert torch.equal(*both(model, plain, **inputs(model, seed, tokens)))
    assert len(replays) == 6
    assert "called in more than 2 ways" in caplog.text
    assert torch.equal(*both(model, plain, **inputs(model, 7, 64)))
    assert torch.equal(*both(model, plain, **inputs(model, 8, 36)))
    assert len(replays) == 8
    assert torch.equal(*both(model, plain, **inputs(model, 9, 16)))
    assert len(replays) == 8


def test_what_it_is_not_for(model):
    apply_cuda_graphs(model)
    with pytest.raises(AttentionProviderError, match="records CUDA graphs already"):
        apply_cuda_graphs(model)
    with pytest.raises(AttentionProviderError, match="is for inference, and was called with gradients enabled"):
        model(**inputs(model))
    remove_cuda_graphs(model)
    assert "forward" not in vars(model)
    model(**inputs(model)).sample.sum().backward()
    with pytest.raises(AttentionProviderError, match="compiled as a whole"):
        model.compile()
        apply_cuda_graphs(model)


def test_a_forward_that_waits_for_the_device(model):
    plain = copy.deepcopy(model)
    hook = model.proj_out.register_forward_hook(lambda _, __, output: output * output.isfinite().all().item())
    apply_cuda_graphs(model)
    with torch.no_grad():
        model(**inputs(model))
        for _ in range(2):
            with pytest.raises(AttentionProviderError, match="cannot be recorded as a CUDA graph"):
                model(**inputs(model))
        torch.cuda.synchronize()
        hook.remove()
        for seed in range(3):
            assert torch.equal(*both(model, plain, **inputs(model, seed)))


@pytest.mark.parametrize("provider", providers(lambda can: not can.cuda_graph))
def test_providers_that_cannot(provider, model):
    set_attention_provider(model, provider)
    apply_cuda_graphs(model)
    with torch.no_grad():
        model(**inputs(model))
        with pytest.raises(AttentionProviderError, match="SageAttention cannot be captured"):
            model(**inputs(model))


def test_copies_have_no_graphs(model):
    apply_cuda_graphs(model)
    with torch.no_grad():
        expected = [model(**inputs(model)).sample for _ in range(3)]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.proj_out.weight.data.mul_(2)
            assert not torch.equal(other(**inputs(model)).sample, expected[0])
            assert other not in applied
        assert torch.equal(model(**inputs(model)).sample, expected[0])


def test_memory_goes_with_the_model():
    def lasting():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = lasting()
    # Not that of a pipeline that has drawn: diffusers' hook registry refers to its model.
    model = FluxTransformer2DModel.from_pretrained(MODEL / "transformer", dtype=BF16, local_files_only=True).cuda()
    apply_cuda_graphs(model)
    with torch.no_grad():
        for _ in range(3):
            model(**inputs(model, tokens=1024))
    assert lasting() > before
    reference = weakref.ref(model)
    gc.disable()  # not by the collector: whoever deletes a model wants its memory now
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()
    assert lasting() == before


@pytest.mark.parametrize("compiled", [False, True])
def test_automatic(model, compiled):
    plain = copy.deepcopy(model)
    if compiled:
        apply_compile(plain, dynamic=False)
        apply_compile(model, dynamic=False, cuda_graphs="auto")
    else:
        apply.apply_automatically(model)
    for seed in range(5):
        assert torch.equal(*both(model, plain, **inputs(model, seed)))
    assert cuda_graphs_status(model).recorded == 1
    model(**inputs(model)).sample.sum().backward()
    assert (cuda_graphs_status(model).recorded, cuda_graphs_status(model).replays) == (1, 3)


class Waits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, hidden_states):
        return self.inner(hidden_states) * hidden_states.isfinite().all().item()


def test_automatic_where_a_forward_waits_for_the_device():
    model = Waits().cuda()
    apply.apply_automatically(model)
    hidden = torch.randn(2, 4, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(hidden), model.inner(hidden))
    (reason,) = cuda_graphs_status(model).reasons
    assert reason.startswith("its forward waits for the device (") and Path(__file__).name in reason


def test_a_recording_that_fails_leaves_nothing_behind():
    model, stream = Waits().cuda(), torch.cuda.current_stream()
    apply_cuda_graphs(model)
    hidden = torch.randn(2, 4, device="cuda")
    with torch.no_grad():
        model(hidden)
        with pytest.raises(AttentionProviderError, match="cannot be recorded as a CUDA graph"):
            model(hidden)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator is not in the state of a capture
    large = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    before = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()  # gives nothing back while a capture is underway
    assert torch.cuda.memory_reserved() < before


SCRIPT = """
import sys, torch, torch.distributed as dist
from diffusers_attn import cuda_graphs_status, enable_context_parallel
from tests.zoo import CASES
rank = int(__import__("os").environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
model = CASES["flux"].build(dtype=torch.float32, device="cuda").eval()
enable_context_parallel(model, provider="native", **{sys.argv[1]: 2})
with torch.no_grad():
    for _ in range(4):
        model(**CASES["flux"].inputs(device="cuda", dtype=torch.float32))
assert cuda_graphs_status(model).recorded == 1
if sys.argv[2] == "destroyed":
    dist.destroy_process_group()
print("done", flush=True)
"""


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("ending", ["destroyed", "left"])
@pytest.mark.parametrize("degree", ["ulysses_degree", "ring_degree"])
def test_a_job_ends_with_its_graphs_alive(tmp_path, degree, ending):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = [*launcher, str(script), degree, ending]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(launch, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done") == 2


def shared(meshes, strategy, name, compiled, inputs_mode):
    """Largest differences of replays to calls without graphs, and to one GPU, over several inputs."""
    from tests.zoo import CASES as MODELS

    torch._dynamo.reset()
    ring, ulysses, method = STRATEGIES[strategy]
    model = MODELS[name].build(dtype=torch.float32, device="cuda").eval()
    alone = copy.deepcopy(model)
    degrees = {"ring_degree": ring or SIZE, "ulysses_degree": ulysses or SIZE}
    rotate = {"rotate_method": method} if degrees["ring_degree"] > 1 else {}
    common = {**degrees, **rotate, "provider": "native", "inputs": inputs_mode, "verbose": False}
    enable_context_parallel(model, **common, cuda_graphs=False)
    if compiled:
        apply_compile(model, dynamic=False)

    def call(step):
        given = MODELS[name].inputs(device="cuda", dtype=torch.float32)
        return given | {"hidden_states": given["hidden_states"] + 0.1 * step}

    with torch.no_grad():
        plain = [model(**call(step), return_dict=False)[0] for step in range(5)]
        single = [alone(**call(step), return_dict=False)[0] for step in range(5)]
        apply_cuda_graphs(model)
        found = [model(**call(step), return_dict=False)[0] for step in range(5)]
        # Counted and not kept: NCCL does not end a group while a graph that uses it is alive.
        assert cuda_graphs_status(model).recorded == 1
        found.append(model(**call(0), return_dict=False)[0])
        remove_cuda_graphs(model)
        disable_context_parallel(model)
        enable_context_parallel(model, **common)
        found += [model(**call(step), return_dict=False)[0] for step in range(5)]
        assert cuda_graphs_status(model).recorded == 1, cuda_graphs_status(model)
        assert cuda_graphs_status(model).replays == 3
    disable_context_parallel(model)
    assert "forward" not in vars(model)
    torch._dynamo.reset()
    dist.barrier()
    plain, single = [*plain, plain[0], *plain], [*single, single[0], *single]
    return tuple(
        max((one - other).abs().max().item() for one, other in zip(found, others)) for others in (plain, single)
    )


@pytest.mark.multi_gpu
@pytest.mark.skipif(SIZE < 2, reason=f"needs two CUDA devices or more; PyTorch sees {SIZE}")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "compiled", "inputs_mode"),
    [("flux", False, "broadcast"), ("wan", False, "check"), ("flux", True, "trust"), ("wan", True, "broadcast")],
)
def test_over_several_gpus(gpus, strategy, name, compiled, inputs_mode):
    arguments = {"name": name, "compiled": compiled, "inputs_mode": inputs_mode}
    for to_plain, to_single in gpus.run(SIZE, shared, strategy=strategy, **arguments):
        assert to_plain == 0.0
        assert to_single < 1e-4
