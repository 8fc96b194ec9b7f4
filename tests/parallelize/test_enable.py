"""`enable_context_parallel` on models and pipelines: what it chooses, refuses and computes, and that it comes off."""

from __future__ import annotations

import dataclasses
import textwrap

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from diffusers_attn import (
    AttentionProviderError,
    apply_compile,
    apply_context_parallel,
    disable_context_parallel,
    enable_context_parallel,
    set_attention_provider,
)
from diffusers_attn.context_parallel import job
from diffusers_attn.cp_plans.plan import CPInput, ParamId

from .. import launching
from ..marks import thorough_but


def build(name, seed=0, **config):
    """A model of the zoo, with changes to its configuration."""
    from tests.zoo import CASES

    case = CASES[name]
    case = dataclasses.replace(case, config={**case.config, **config})
    return case.build(dtype=torch.float64, seed=seed).double()


def inputs(name, rank=0):
    """Noise of a rank's own; all else is every rank's."""
    from tests.zoo import CASES

    drawn = CASES[name].inputs(dtype=torch.float64)
    torch.manual_seed(rank)
    drawn["hidden_states"] = torch.randn_like(drawn["hidden_states"])
    return drawn


def wan_pipeline(*models):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    one, two = models
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=one,
        transformer_2=two, boundary_ratio=0.9,
    )  # fmt: skip


def output(model, given):
    from tests.zoo import outputs

    return outputs(model(**given))[0]


def train(model, given):
    """Output, and gradients of all parameters."""
    out = output(model, given)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
    return out.detach(), torch.cat([(p * 0 if g is None else g).flatten() for g, p in zip(grads, parameters)]).detach()


def mean_over_ranks(tensor, group=None):
    torch.distributed.all_reduce(tensor, group=group)
    return tensor / torch.distributed.get_world_size(group)


def error(one, other):
    return ((one - other).norm() / other.norm()).item()


def state(model):
    """Hooks, processors, bindings and attributes of all modules."""
    from diffusers_attn.processors.binding import attention_modules_of

    hooks = [
        {name: dict(value) for name, value in vars(each).items() if "hooks" in name and isinstance(value, dict)}
        for each in model.modules()
    ]
    processors = [module.processor for _, module in attention_modules_of(model)]
    return hooks, list(map(id, processors)), list(map(type, processors)), [set(vars(each)) for each in model.modules()]


CHOICES = {
    "all ranks": ({}, (4, 1, None, "ulysses")),
    "degrees": ({"ulysses_degree": 2, "ring_degree": 2}, (2, 2, "allgather", "unified")),
    "one degree": ({"ring_degree": 4, "rotate_method": "alltoall"}, (1, 4, "alltoall", "ring")),
    "a method": ({"rotate_method": "alltoall"}, (1, 4, "alltoall", "ring")),
}


def chosen(meshes):
    """What was chosen, the report's line, what differs from one process, and what is left after disabling."""
    models = [build("wan"), build("wan", seed=1)]
    pipeline = wan_pipeline(*models)
    rank = torch.distributed.get_rank()
    expected = [train(model, inputs("wan")) for model in models]
    before = [state(model) for model in models]
    answers = {}
    for name, (options, _) in CHOICES.items():
        report = enable_context_parallel(pipeline, verbose=False, **options)
        found = [train(model, inputs("wan", rank)) for model in models]
        errors = []
        for (out, grad), (expected_out, expected_grad) in zip(found, expected):
            errors += [error(out, expected_out), error(mean_over_ranks(grad), expected_grad)]
        disable_context_parallel(pipeline)
        restored = [state(model) for model in models] == before
        answers[name] = (
            (report.ulysses_degree, report.ring_degree, report.rotate_method, report.strategy), max(errors), restored,
            str(report),
        )  # fmt: skip
    again = [train(model, inputs("wan")) for model in models]
    same = all(torch.equal(a, b) for one, two in zip(again, expected) for a, b in zip(one, two))
    return answers, same


def test_a_pipeline_with_two_transformers(pool):
    for answers, same in pool.run(4, chosen):
        for name, (_, degrees) in CHOICES.items():
            found, worst, restored, line = answers[name]
            assert found == degrees, name
            assert worst < 1e-6 and restored, name  # Wan computes some things in float32
        assert same
    line = answers["degrees"][-1]
    assert line == (
        "context parallelism: transformer (WanTransformer3DModel), transformer_2 (WanTransformer3DModel) on 4 ranks, "
        "Ulysses over 2 within a ring (allgather) of 2 (as asked for); attention by native; inputs are those of rank 0"
    )


def data_parallel(meshes):
    """A part of a larger mesh: each pair computes what its own first rank was given."""
    mesh = meshes.pairs
    model = build("flux")
    rank = torch.distributed.get_rank()
    expected = output(model, inputs("flux", rank // 2 * 2)).detach()
    report = enable_context_parallel(model, mesh=mesh["cp"], verbose=False)
    found = output(model, inputs("flux", rank)).detach()
    disable_context_parallel(model)
    return error(found, expected), report.ranks, report.strategy, str(report)


def test_a_part_of_a_larger_mesh(pool):
    for rank, (wrong, ranks_, strategy, line) in enumerate(pool.run(4, data_parallel)):
        first = rank // 2 * 2
        assert wrong < 1e-10 and ranks_ == (first, first + 1) and strategy == "ring"
        assert "on 2 of 4 ranks, a ring (allgather) of 2 (given by the mesh); attention by native" in line
        assert line.endswith(f"inputs are those of rank {first}")


def refusals(meshes):
    """The messages of what is refused, and that it leaves no trace."""
    from diffusers import AutoencoderKL

    rank = torch.distributed.get_rank()
    model, other = build("wan"), build("wan")
    pair = wan_pipeline(model, other)
    bad = {"blocks.0": {ParamId("nothing"): CPInput(1)}}
    one = DeviceMesh("cpu", [rank])
    sliced = build("sd_controlnet")
    lost = wan_pipeline(build("wan"), None)
    lost.register_modules(transformer=torch.nn.Linear(2, 2))

    def enable(target, **options):
        return lambda: enable_context_parallel(target, verbose=False, **options)

    calls = {
        "world": enable(model, ulysses_degree=3),
        "product": enable(model, ulysses_degree=2, ring_degree=1),
        "degree": enable(model, ring_degree=0),
        "method": enable(model, rotate_method="zigzag"),
        "no ring": enable(model, ring_degree=1, rotate_method="alltoall"),
        "merge": enable(model, ring_degree=1, convert_to_fp32=False),
        "inputs": enable(model, inputs="sync"),
        "graphs": enable(model, cuda_graphs="yes"),
        "graphs on a CPU": enable(pair, cuda_graphs=True),
        "provider": enable(model, provider="flash"),
        "no such provider": enable(model, provider="lightning"),
        "no such option": enable(model, provider="native", deterministic=True),
        "no such argument": enable(model, ulises_degree=2),
        "no plan": enable(sliced),
        "a plan that does not fit": enable(pair, plan=bad),
        "a mesh of one": enable(model, mesh=one),
        "no mesh": enable(model, mesh=meshes(2, 2)),
        "another degree": enable(model, mesh=meshes.square, ring_degree=4),
        "nothing to split": enable(lost),
        "no pipeline": enable(AutoencoderKL),
        "one rank only": enable(model, provider="flash" if rank == 2 else "native"),
        "other ways": enable(model, ring_degree=2 if rank == 2 else 4),
    }
    before = state(model), state(other), state(sliced)
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except AttentionProviderError as error:
            messages[name] = str(error)
        assert (state(model), state(other), state(sliced)) == before, name
    for name, split in {"twice": enable(model), "applied": lambda: apply_context_parallel(model, meshes(4, 1))}.items():
        split()
        try:
            enable_context_parallel(pair, verbose=False)
        except AttentionProviderError as error:
            messages[name] = str(error)
        disable_context_parallel(pair)
        assert state(other) == before[1]
    return messages


MESSAGES = {
    "world": "ulysses_degree=3, ring_degree=None for 4 ranks: ulysses_degree * ring_degree must be 4; accepted are",
    "product": "ulysses_degree=2, ring_degree=1 for 4 ranks",
    "degree": "ring_degree=0: a whole number from 1",
    "method": "rotate_method='zigzag': accepted are 'allgather' and 'alltoall'",
    "no ring": "rotate_method='alltoall' says how keys and values travel around a ring, and there is none",
    "merge": "convert_to_fp32=False applies to a ring, but there is none",
    "inputs": "inputs='sync': accepted are 'broadcast', 'check', 'trust'",
    "graphs": "cuda_graphs='yes': accepted are 'auto', True and False",
    "graphs on a CPU": "is on cpu; CUDA graphs need all of it on one CUDA device",
    "provider": "attention provider 'flash' cannot be used here",
    "no such provider": "there is no attention provider 'lightning'",
    "no such option": "provider 'native' has no option 'deterministic'",
    "no such argument": "ulises_degree=2 is not an argument of enable_context_parallel",
    "no plan": "ControlNetModel has no context-parallel plan. Its convolutions, ",
    "a plan that does not fit": "the plan names argument 'nothing' of 'blocks.0'",
    "a mesh of one": "the mesh has one rank",
    "no mesh": "mesh is a ContextParallelMesh; a torch DeviceMesh is accepted",
    "another degree": "ring_degree=4, but the mesh has 2",
    "nothing to split": "WanPipeline has no component with a plan. Its components are",
    "no pipeline": "a model (torch.nn.Module) or a diffusers pipeline is accepted",
    "other ways": "with different choices. degrees: ulysses_degree=1, ring_degree=4, rotate_method=",
    "twice": "transformer (WanTransformer3DModel) is split between ranks already",
    "applied": "transformer (WanTransformer3DModel) is split between ranks already",
}


def test_refused_on_all_ranks_and_nothing_changed(pool):
    for rank, messages in enumerate(pool.run(4, refusals)):
        for name, message in MESSAGES.items():
            assert message in messages.get(name, "nothing"), name
        own = "'flash' cannot be used here" if rank == 2 else "cannot be enabled on rank 2: ProviderUnavailableError"
        assert own in messages["one rank only"]


def without_lse(meshes):
    """A provider without log-sum-exp, as the catalog has it: refused in a ring, and what is chosen for it otherwise."""
    from diffusers_attn.providers.catalog import SPECS

    model, kept = build("wan"), SPECS["_native_math"]
    SPECS["_native_math"] = dataclasses.replace(kept, capabilities=dataclasses.replace(kept.capabilities, lse=False))
    try:
        with pytest.raises(AttentionProviderError) as refused:
            enable_context_parallel(model, provider="_native_math", ring_degree=4, verbose=False)
        set_attention_provider(model, "_native_math")
        with pytest.raises(AttentionProviderError, match="'_native_math' returns no log-sum-exp"):
            enable_context_parallel(model, rotate_method="alltoall", verbose=False)
        report = enable_context_parallel(model, verbose=False)
        disable_context_parallel(model)
    finally:
        SPECS["_native_math"] = kept
    return str(refused.value), report.strategy, report.provider, report.reason


def test_a_ring_needs_the_log_sum_exp(pool):
    for message, strategy, provider, reason in pool.run(4, without_lse):
        assert "'_native_math' returns no log-sum-exp" in message
        assert "Set ulysses_degree=4, ring_degree=1, which works with any provider, or use one of: native" in message
        assert (strategy, provider) == ("ulysses", "_native_math") and "only Ulysses does without" in reason


def bindings(meshes):
    """Providers while it is enabled, and whether all is as before afterwards, for models bound in advance."""
    from diffusers_attn import DispatchProcessor
    from diffusers_attn.processors import attention_modules

    answers = []
    for bound, asked in (("_native_math", None), ("_native_math", "native"), (None, "_native_math"), ("scope", None)):
        model = build("flux")
        if bound:
            model.set_attn_processor(DispatchProcessor(None if bound == "scope" else bound))
        before = state(model)
        report = enable_context_parallel(model, mesh=meshes.lines[2], provider=asked, verbose=False)
        during = {module.provider for module in attention_modules(model)}
        model.fuse_qkv_projections()
        model.unfuse_qkv_projections()
        fused = {module.provider for module in attention_modules(model)}
        disable_context_parallel(model)
        disable_context_parallel(model)
        after = state(model)
        answers.append((report.provider, during, fused, after[2] == before[2] and after[0] == before[0]))
    return answers


def test_processors_stay_bound_as_they_were(pool):
    for answers in pool.run(2, bindings):
        names = ["_native_math", "native", "_native_math", "scope"]
        assert answers == [(name, {name}, {name}, True) for name in names]


def lora(meshes):
    """Errors after LoRA is added to, and unloaded from, a model that is split already."""
    import peft

    adapter = peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0", "proj_out"], init_lora_weights=False)
    models = [build("flux"), build("flux")]
    mesh = meshes.lines[2]
    enable_context_parallel(models[1], mesh=mesh, verbose=False)
    errors = []
    for change in ("add", "unload"):
        results = []
        for model in models:
            torch.manual_seed(1)
            model.add_adapter(adapter) if change == "add" else model.unload_lora()
            model.requires_grad_()
            results.append(train(model, inputs("flux")))
        (expected, expected_grad), (found, grad) = results
        errors += [error(found, expected), error(mean_over_ranks(grad, mesh.get_group()), expected_grad)]
    disable_context_parallel(models[1])
    return errors


def test_lora_added_and_unloaded_after(pool):
    for errors in pool.run(2, lora):
        assert max(errors) < 1e-10


def wrapped(meshes):
    """Errors of a model that is given within a PEFT model."""
    import peft

    model = build("flux")
    peft_model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    expected = output(peft_model, inputs("flux")).detach()
    report = enable_context_parallel(peft_model, mesh=meshes.lines[2], inputs="check", verbose=False)
    found = output(peft_model, inputs("flux")).detach()
    disable_context_parallel(peft_model)
    return error(found, expected), report.models, torch.equal(output(peft_model, inputs("flux")), expected)


def test_a_model_within_a_peft_model(pool):
    for wrong, models, restored in pool.run(2, wrapped):
        assert wrong < 1e-10 and models == ("FluxTransformer2DModel",) and restored


SHALLOW = {"wan": {"num_layers": 1}, "flux": {"num_layers": 1, "num_single_layers": 1}}
"""Every block more is compiled, too, and shows no more."""


def compiled(meshes, name, scope, first, checkpointing):
    """Errors of output and gradients: enabled before or after compilation, called in between, and after disabling."""
    torch._dynamo.reset()
    model = build(name, **SHALLOW[name])
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    mesh = meshes.lines[2]
    rank = mesh.get_local_rank()
    expected = train(model, inputs(name))
    options = {"backend": "aot_eager", "dynamic": False}
    if first == "compile":
        apply_compile(model, scope, **options)
        train(model, inputs(name))
    enable_context_parallel(model, mesh=mesh, verbose=False)
    if first == "enable":
        apply_compile(model, scope, **options)
    found, grad = train(model, inputs(name, rank))
    errors = [error(found, expected[0]), error(mean_over_ranks(grad, mesh.get_group()), expected[1])]
    disable_context_parallel(model)
    errors += [error(*pair) for pair in zip(train(model, inputs(name)), expected)]
    torch._dynamo.reset()
    return errors


COMPILED = [
    ("wan", "regional", "enable", True),
    ("wan", "regional", "compile", False),
    ("wan", "full", "enable", False),
    ("flux", "full", "compile", False),
]


# Both scopes, with and without checkpointing. Models are compiled first in `reused`, and in test_sizes.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scope", "first", "checkpointing"), thorough_but([COMPILED[0], COMPILED[2]], COMPILED)
)
def test_compiled(pool, name, scope, first, checkpointing):
    answers = pool.run(2, compiled, name=name, scope=scope, first=first, checkpointing=checkpointing)
    for errors in answers:
        assert max(errors) < 1e-6, errors


def reused(meshes):
    """Error of a model whose blocks were compiled, before it was enabled, for what is now this rank's length."""

    def tokens(image, text):
        given = inputs("flux")
        for name, count in {"hidden_states": image, "encoder_hidden_states": text}.items():
            given[name] = given[name][:, :count]
        return given | {"img_ids": given["img_ids"][:image], "txt_ids": given["txt_ids"][:text]}

    torch._dynamo.reset()
    model = build("flux", **SHALLOW["flux"])
    set_attention_provider(model, "native")  # as it then stays, nothing but hooks tells the two apart
    expected = output(model, tokens(32, 12)).detach()
    apply_compile(model, backend="eager", dynamic=False)
    output(model, tokens(16, 6))
    enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    found = output(model, tokens(32, 12)).detach()
    disable_context_parallel(model)
    torch._dynamo.reset()
    return error(found, expected)


@pytest.mark.slow
def test_what_was_compiled_before_is_not_used_again(pool):
    assert max(pool.run(2, reused)) < 1e-6


SCRIPT = """
    import os, sys
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch, torch.distributed as dist
    from diffusers_attn import enable_context_parallel
    from diffusers_attn.context_parallel import job
    from tests.zoo import CASES, outputs

    checked = []
    job.check_gpu = checked.append
    model = CASES["wan"].build()
    with torch.no_grad():
        expected = outputs(model(**CASES["wan"].inputs()))[0]
        report = enable_context_parallel(model, inputs="check")
        found = outputs(model(**CASES["wan"].inputs()))[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert dist.get_backend() == "gloo" and checked == [torch.device("cpu")]
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)
"""


def test_a_script_under_torchrun_needs_no_process_group(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = launching.run_ranks(2, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("context parallelism: ") == 1  # rank 0 says what was done
    assert "on 2 ranks, Ulysses over 2 (predicted at 32,760 tokens: " in done.stdout


def test_a_job_of_one_is_told_how_to_launch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(
        AttentionProviderError, match="this job has one. Start the script with `accelerate launch"
    ) as error:
        enable_context_parallel(build("wan"))
    assert "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 script.py`" in str(error.value)


def test_accelerate_that_knows_of_one_rank_only(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    accelerate.PartialState._reset_state()
    accelerate.PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(AttentionProviderError, match="Accelerate was set up in each of them as a job of one"):
            job.join("cpu")
    finally:
        accelerate.PartialState._reset_state()


@pytest.mark.parametrize(("device", "own"), [("cuda:1", 1), ("cuda", 1), ("cpu", 1), ("cuda:0", 0)])
def test_a_model_on_the_gpu_of_its_rank(device, own, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: own)
    job.check_gpu(torch.device(device))


def test_a_model_on_the_gpu_of_another_rank(monkeypatch):
    """As after `pipe.to("cuda")` in a script that torchrun started."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(AttentionProviderError, match="the model is on cuda:0, but the GPU of this rank is cuda:1"):
        job.check_gpu(torch.device("cuda", 0))
