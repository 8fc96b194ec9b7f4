"""Ranks that are not alike or not in step: found when context parallelism is enabled or in the forward, by an error
that names the ranks, and never computed as a mixture."""

from __future__ import annotations

import datetime
import gc
import logging
import threading

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model_state_dict

import diffusers_attn
from diffusers_attn import (
    AttentionProviderError,
    DispatchProcessor,
    disable_context_parallel,
    enable_context_parallel,
    set_attention_provider,
)
from diffusers_attn.context_parallel.comm import process_groups, rank_progress, shared_groups, stalls
from diffusers_attn.context_parallel.comm.rank_progress import RankMissingError
from diffusers_attn.cp_plans.registry import get_cp_plan

from ...parallelize.test_enable import build, inputs, output


def lora(model, name="style", seed=0, rank=2, scale=1.0):
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)
    model.set_adapters([name], [scale])
    return model


def without_a_bias(model, odd):
    if odd:
        model.proj_out.bias = None
    return model


def message(call):
    try:
        call()
    except AttentionProviderError as error:
        return str(error)
    return "no error"


def unlike(meshes):
    """The error if rank 1 has another model when context parallelism is enabled."""
    odd = int(dist.get_rank() == 1)
    mesh = meshes.lines[2]

    def enable(model, **options):
        return message(lambda: enable_context_parallel(model, mesh=mesh, verbose=False, **options))

    found = {
        "weights of an adapter": enable(lora(build("flux"), seed=odd)),
        "scale": enable(lora(build("flux"), scale=0.5 + odd)),
        "targets": enable(lora(build("flux"), rank=2 + odd)),
        "no adapter": enable(build("flux") if odd else lora(build("flux"))),
        "shapes": enable(without_a_bias(build("flux"), odd)),
        "options": enable(build("flux"), provider="auto", **({} if odd else {"lossy": ()})),
        "weights": enable(build("flux", seed=odd), check_weights=True),
    }
    plan = dict(get_cp_plan(build("flux")))
    if odd:
        plan.pop("proj_out")
    found["plan"] = enable(build("flux"), plan=plan)
    bound = build("flux")
    set_attention_provider(bound, "_native_math" if odd else "native")
    found["bound"] = enable(bound)
    version, diffusers_attn.__version__ = diffusers_attn.__version__, f"0.{int(odd)}"
    found["version"] = enable(build("flux"))
    diffusers_attn.__version__ = version
    model = build("flux", seed=odd)  # nobody asked for the values of all weights
    assert enable(model) == "no error"
    disable_context_parallel(model)
    return found


def test_ranks_that_differ_when_it_is_enabled(pool):
    one, two = pool.run(2, unlike)
    assert one == two
    assert "adapter 'style': active in" in one["weights of an adapter"] and "weights" in one["weights of an adapter"]
    assert "scale 0.5" in one["scale"] and "scale 1.5" in one["scale"] and "on rank 1" in one["scale"]
    assert "lora_A.style.weight: [2," in one["targets"] and "[3," in one["targets"]
    assert "absent on rank 1" in one["no adapter"]
    assert "weight proj_out.bias: [" in one["shapes"] and "absent on rank 1" in one["shapes"]
    assert "provider: ProviderChoice('auto', lossy=()) on rank 0; ProviderChoice('auto') on rank 1" in one["options"]
    assert "values" in one["weights"] and "on rank 1" in one["weights"]
    assert "plan entry 'proj_out'" in one["plan"] and "absent on rank 1" in one["plan"]
    assert "native" in one["bound"] and "_native_math" in one["bound"]
    assert "version of diffusers_attn: 0.0 on rank 0; 0.1 on rank 1" in one["version"]


@torch.no_grad()
def unlike_later(meshes):
    """The error of a forward after rank 1 has changed something."""
    odd = int(dist.get_rank() == 1)
    model = lora(lora(build("flux")), "other", seed=1)
    model.set_adapters(["style", "other"], [1.0, 1.0])
    enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    given = inputs("flux")
    layer = next(each for each in model.modules() if hasattr(each, "scaling"))

    def written():
        with torch.no_grad():
            layer.lora_A["style"].weight.mul_(2.0)

    def back():
        with torch.no_grad():
            layer.lora_A["style"].weight.mul_(0.5)

    def assigned(factor):
        weight = layer.lora_A["style"].weight
        weight.data = weight.data * factor

    # Copied now, since reading them asks for the model's state, as hot-swapping does.
    own = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, adapter_name="style").items()}

    def swapped(factor):
        new = {name: tensor * factor for name, tensor in own.items()}
        model.load_lora_adapter(new, prefix=None, adapter_name="style", hotswap=True)

    both = ["style", "other"]
    changes = {
        "scale": (lambda: model.set_adapters(both, [0.5, 1.0]), lambda: model.set_adapters(both, [1.0, 1.0])),
        "one layer's": (lambda: layer.set_scale("style", 3.0), lambda: layer.set_scale("style", 1.0)),
        "active": (lambda: model.set_adapters(["other"]), lambda: model.set_adapters(both, [1.0, 1.0])),
        "off": (model.disable_lora, model.enable_lora),
        "written": (written, back),
        "assigned": (lambda: assigned(2.0), lambda: assigned(0.5)),
        "hot-swapped": (lambda: swapped(2.0), lambda: swapped(1.0)),
        "merged": (model.fuse_lora, model.unfuse_lora),
        "provider": (
            lambda: model.set_attn_processor(DispatchProcessor("_native_math")),
            lambda: model.set_attn_processor(DispatchProcessor("native")),
        ),
        "removed": (lambda: model.delete_adapters("other"), lambda: lora(model, "other", seed=1)),
    }
    found = {}
    for name, (change, restore) in changes.items():
        if odd:
            change()
        found[name] = message(lambda: output(model, given))
        if odd:
            restore()
            model.set_adapters(both, [1.0, 1.0])
        found[f"{name} again"] = message(lambda: output(model, given))
    disable_context_parallel(model)
    return found


def test_ranks_that_differ_after_it_was_enabled(pool):
    one, two = pool.run(2, unlike_later)
    assert one == two
    for name, message_of_rank in one.items():
        if name.endswith("again"):
            assert message_of_rank == "no error", name
        else:
            assert "the ranks that share a sequence have different models" in message_of_rank, (name, message_of_rank)
            assert "on rank 0" in message_of_rank and "on rank 1" in message_of_rank, (name, message_of_rank)
    assert "adapter 'style': active in" in one["scale"] and "scale 0.5" in one["scale"]
    assert "adapters merged into the model: none on rank 0" in one["merged"]


def other_exchanges(meshes):
    """The error of a forward after rank 1 has changed a property that decides the number and size of exchanges."""
    odd = int(dist.get_rank() == 1)
    model = build("flux").train()
    enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    given, blocks = inputs("flux"), model.transformer_blocks
    changes = {
        "dtype": (model.half, model.double),
        "dtype of a block": (blocks.float, blocks.double),
        "frozen": (lambda: blocks.requires_grad_(False), lambda: blocks.requires_grad_(True)),
        "checkpointing": (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing),
    }
    found = {}
    for name, (change, restore) in changes.items():
        if odd:
            change()
        found[name] = message(lambda: output(model, given))
        if odd:
            restore()
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(odd)):
        found["autocast"] = message(lambda: output(model, given))
    found["nothing"] = message(lambda: output(model, given).sum().backward())
    with torch.no_grad():
        found["nothing without gradients"] = message(lambda: output(model, given))
    disable_context_parallel(model)
    return found


def test_ranks_whose_exchanges_would_differ(pool):
    one, two = pool.run(2, other_exchanges)
    assert one == two
    assert "dtypes of weights: float64 on rank 0; float16 on rank 1" in one["dtype"]
    assert "dtypes of weights: float64 on rank 0; float32, float64" in one["dtype of a block"]
    assert "weights that are trained: " in one["frozen"] and "on rank 1" in one["frozen"]
    assert "gradient checkpointing: off on rank 0; on (by module" in one["checkpointing"]
    assert "autocast on cpu: off on rank 0; torch.bfloat16 on rank 1" in one["autocast"]
    assert one["nothing"] == one["nothing without gradients"] == "no error"


def counted(meshes):
    """The errors after rank 1 has left out a call of a model; later calls work."""
    odd = int(dist.get_rank() == 1)
    model, other = build("flux"), build("flux", seed=1)
    expected = output(model, inputs("flux")).detach()
    found = []
    for each in (model, other):
        enable_context_parallel(each, mesh=meshes.lines[2], verbose=False)
    output(model, inputs("flux"))
    if not odd:
        found.append(message(lambda: output(model, inputs("flux"))))
        found.append(message(lambda: output(model, inputs("flux"))))
    else:
        found.append(message(lambda: output(other, inputs("flux"))))
        found.append(message(lambda: output(model, inputs("flux"))))
    for each in (model, other):
        disable_context_parallel(each)
    enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    found.append(torch.allclose(output(model, inputs("flux")), expected))
    disable_context_parallel(model)
    return found


def test_a_rank_that_leaves_out_a_call(pool):
    one, two = pool.run(2, counted)
    assert one == two and one[2] is True
    name = "FluxTransformer2DModel"
    assert f"not at the same call: forward 2 of {name} on rank 0; forward 1 of {name} on rank 1" in one[0]
    assert f"forward 3 of {name} on rank 0; forward 2 of {name} on rank 1" in one[1]


def gone(meshes, how, inputs_are):
    """The error if rank 1 does not call the model; None on a rank that does not wait. Later calls work."""
    rank_progress.GRACE = 1.0
    odd = dist.get_rank() == 1
    model, given = build("flux"), inputs("flux")
    enable_context_parallel(model, ulysses_degree=2, ring_degree=2, inputs=inputs_are, verbose=False)
    output(model, given)
    dist.barrier()
    for group in [group for group_set in shared_groups._all for group in group_set.groups]:
        process_groups.set_timeout(group, datetime.timedelta(seconds=3))
    message_of_rank = None
    if how == "stays away":
        model.transformer_blocks[0].compile(backend="eager", fullgraph=True)
    if odd and how == "disables":
        disable_context_parallel(model)
    elif odd and how != "stays away":
        handle = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output(model, given)
        handle.remove()
    if not odd or how == "goes on":
        with pytest.raises(RuntimeError if how == "stays away" else RankMissingError) as failure:
            output(model, given)
            output(model, given)
        message_of_rank = "".join([str(failure.value), *getattr(failure.value, "__notes__", [])])
    model.transformer_blocks[0]._compiled_call_impl = None  # what follows needs no compiler
    dist.barrier()
    disable_context_parallel(model)
    enable_context_parallel(model, verbose=False)
    output(model, given)
    disable_context_parallel(model)
    return message_of_rank


GONE = {
    "fails": ("forward 2 of FluxTransformer2DModel (which failed there with ZeroDivisionError: division by", "trust"),
    "disables": (
        "rank 1 is missing: rank 1 was last at disable_context_parallel, after forward 1 of FluxTransformer2DModel",
        "broadcast",
    ),
    "stays away": ("rank 1 is missing: rank 1 was last at forward 1 of FluxTransformer2DModel, which is over", "trust"),
    "goes on": ("rank 1 at forward 3 of FluxTransformer2DModel", "check"),
}


@pytest.mark.parametrize("how", GONE)
def test_a_rank_that_does_not_come_is_named_with_where_it_was(pool, how):
    expected, inputs_are = GONE[how]
    for rank, message_of_rank in enumerate(pool.run(4, gone, how=how, inputs_are=inputs_are)):
        assert (message_of_rank is None) == (rank == 1 and how != "goes on")
        assert message_of_rank is None or expected in message_of_rank, message_of_rank


class Logged(logging.Handler):
    """Keeps what is logged, and has the other rank go on."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())
        process_groups.own_store().set(f"logged/{len(self.lines)}", "")


@torch.no_grad()
def hanging(meshes):
    """The log of rank 0 while rank 1 leaves out a call, and stops in one after its exchanges."""
    odd = dist.get_rank() == 1
    model, given = build("flux"), inputs("flux")
    enable_context_parallel(model, mesh=meshes.lines[2], inputs="trust", verbose=False)
    logged = Logged()
    stalls.log.addHandler(logged)
    watch = stalls.Watch([0, 1], datetime.timedelta(seconds=1))
    wait = process_groups.job_store().wait
    output(model, given)
    if odd:
        wait(["logged/1"])
    output(model, given)
    output(model, given)
    handle = model.register_forward_pre_hook(lambda *_: None)
    if odd:
        handle = model.proj_out.register_forward_hook(lambda *_: wait(["logged/2"]))
    output(model, given)
    wait(["logged/2"])
    handle.remove()
    output(model, given)
    dist.barrier(meshes.lines[2].get_group())
    watch.remove()
    stalls.log.removeHandler(logged)
    disable_context_parallel(model)
    return logged.lines


def test_a_hang_without_an_error_names_the_rank_that_is_behind(pool):
    (absent, within), of_other = pool.run(2, hanging)
    name = "FluxTransformer2DModel"
    assert f"rank 1 is missing: rank 1 was last at forward 1 of {name}, which is over. " in absent
    assert f"Rank 0 is at forward 2 of {name}. They may" in absent
    assert (
        f"rank 1 is missing: rank 1 was last at forward 4 of {name}. Rank 0 is at forward 4 of {name}, which" in within
    )
    assert not of_other


def missing_when_enabled(meshes):
    """The error if rank 1 does not enable context parallelism, with a job timeout of 3 s."""
    rank_progress.GRACE = 1.0
    job = process_groups.timeout_of(None, "cpu")
    process_groups.set_timeout(None, datetime.timedelta(seconds=3))
    message_of_rank = None
    if dist.get_rank() == 1:
        rank_progress.note("a place of its own")
    else:
        message_of_rank = message(lambda: enable_context_parallel(build("flux"), verbose=False))
    process_groups.set_timeout(None, job)
    dist.barrier()
    return message_of_rank


def test_a_rank_that_is_not_enabled_is_named(pool):
    first, second, *_ = pool.run(4, missing_when_enabled)
    assert second is None and "rank 1 is missing: rank 1 was last at a place of its own" in first


def threads(meshes):
    """The error of a second thread in between; nested forwards and later ones work."""
    models = [build("flux"), build("flux", seed=1)]
    expected = [output(each, inputs("flux")).detach() for each in models]
    for model in models:
        enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    inside, free = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert free.wait(20)

    handle = models[0].transformer_blocks[0].register_forward_pre_hook(wait)
    found = {}
    thread = threading.Thread(target=lambda: found.update(first=output(models[0], inputs("flux")).detach()), name="one")
    thread.start()
    assert inside.wait(20)
    found["refused"] = [message(lambda model=model: output(model, inputs("flux"))) for model in models]
    found["not disabled"] = message(lambda: disable_context_parallel(models[1]))
    free.set()
    thread.join()
    handle.remove()
    found["after"] = output(models[1], inputs("flux")).detach()
    nested = (
        models[0]
        .transformer_blocks[0]
        .register_forward_pre_hook(lambda *_: found.update(nested=output(models[1], inputs("flux")).detach()))
    )
    found["outer"] = output(models[0], inputs("flux")).detach()
    nested.remove()
    models[0].enable_gradient_checkpointing()
    models[0].train()
    recomputed = output(models[0], inputs("flux"))
    backward = threading.Thread(target=lambda: recomputed.sum().backward())
    backward.start()
    backward.join()
    found["gradient"] = all(p.grad is not None for p in models[0].transformer_blocks.parameters())
    for model in models:
        disable_context_parallel(model)
    of = {"first": 0, "after": 1, "nested": 1, "outer": 0}
    return (
        found["refused"],
        found["not disabled"],
        found["gradient"],
        {name: torch.allclose(found[name], expected[place]) for name, place in of.items()},
    )


def test_two_threads_are_refused(pool):
    for refused, not_disabled, gradient, right in pool.run(2, threads):
        for message_of_rank in (*refused, not_disabled):
            assert (
                "thread 'MainThread' calls a FluxTransformer2DModel" in message_of_rank
                and "while thread 'one' is within" in message_of_rank
            )
        assert gradient and all(right.values()), right


def backwards(meshes):
    """The errors of a forward beside another thread's backward, and of a backward beside another's forward; and
    whether gradients are right afterwards."""
    gc.collect()  # the message names all models that use these ranks: also those of earlier tests, as long as they live
    model, given = build("flux"), inputs("flux")

    def gradient():
        model.zero_grad()
        output(model, given).square().mean().backward()
        return model.proj_out.weight.grad.clone()

    expected = gradient()
    enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    found, names = [], ("backward", "forward")
    for name in names:
        out = output(model, given)
        inside, free = threading.Event(), threading.Event()

        def wait(value, inside=inside, free=free):
            inside.set()
            assert free.wait(60)

        block = model.transformer_blocks[0]
        if name == "backward":  # the gradient comes to the first block after exchanges of later ones
            handle = block.attn.to_q.weight.register_hook(wait)
            work = out.square().mean().backward
        else:
            handle = block.register_forward_pre_hook(lambda *_: wait(None))
            work = lambda: output(model, given)  # noqa: E731
        thread = threading.Thread(target=work, name="one")
        thread.start()
        assert inside.wait(60)
        if name == "backward":
            found += [message(lambda: output(model, given)), message(lambda: disable_context_parallel(model))]
        else:
            found.append(message(lambda out=out: out.square().mean().backward()))
        free.set()
        thread.join()
        handle.remove()
    # Threads one after the other are fine, and so is another backward beside a forward.
    threads = [threading.Thread(target=lambda: found.append(gradient())) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    errors = []
    for _ in range(2):
        grad = found.pop()
        dist.all_reduce(grad, group=meshes.lines[2].get_group())
        errors.append(((grad / 2 - expected).norm() / expected.norm()).item())
    disable_context_parallel(model)
    return found, errors


def test_a_backward_beside_another_threads_forward_is_refused(pool):
    for (forward, disabling, backward), errors in pool.run(2, backwards):
        within = "while thread 'one' is within a backward of a FluxTransformer2DModel over the same ranks"
        assert "thread 'MainThread' calls a FluxTransformer2DModel" in forward and within in forward
        assert within in disabling
        assert "thread 'MainThread' runs a backward of a model" in backward
        assert "while thread 'one' is within a forward of a FluxTransformer2DModel" in backward
        assert max(errors) < 1e-6
