"""Copies of a split model are not split, and have the processors from before the split."""

import copy
import io
import pickle

import pytest
import torch

from diffusers_attn import (
    AttentionProviderError,
    DispatchProcessor,
    disable_context_parallel,
    enable_context_parallel,
)
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.processors.binding import attention_modules_of
from diffusers_attn.scope import ProviderChoice
from tests.zoo import CASES

from ...parallelize.test_enable import build, error, inputs, output

LOCAL = ContextParallelMesh(ContextParallelConfig(3), Group("none", 1, 3), ALONE)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_a_file}


def traces(model):
    """Hooks, attributes and bindings of all modules."""
    hooks = [
        {name: list(value) for name, value in vars(each).items() if "hooks" in name and isinstance(value, dict)}
        for each in model.modules()
    ]
    bound = [getattr(module.processor, "choice", None) for _, module in attention_modules_of(model)]
    return hooks, bound, [sorted(vars(each)) for each in model.modules()]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_no_hooks_of_a_plan(way):
    model = CASES["flux"].build()
    own = []
    model.proj_out.register_forward_hook(lambda *_: own.append(1)) if way == "deepcopy" else None
    before, expected = traces(model), output(model, CASES["flux"].inputs())
    apply_context_parallel(model, LOCAL)
    copied = WAYS[way](model)
    assert traces(copied) == before
    own.clear()
    assert torch.equal(output(copied, CASES["flux"].inputs()), expected)
    assert len(own) == (way == "deepcopy")  # hooks of others travel
    block = WAYS[way](model.transformer_blocks)  # a part
    assert not any(each._forward_pre_hooks for each in block.modules())
    remove_context_parallel(copied)  # without effect
    apply_context_parallel(copied, LOCAL)
    remove_context_parallel(copied)
    remove_context_parallel(model)
    assert traces(copied) == traces(model) == before


def test_a_shallow_copy_refuses_to_run():
    model = CASES["flux"].build()
    apply_context_parallel(model, LOCAL)
    shallow = copy.copy(model)
    message = "shallow copy of one that is split.*copy.deepcopy"
    with pytest.raises(AttentionProviderError, match=message):
        shallow(**CASES["flux"].inputs())
    with pytest.raises(AttentionProviderError, match=message):
        disable_context_parallel(shallow)
    with pytest.raises(AttentionProviderError, match=r"cannot be split.*copy.deepcopy"):
        apply_context_parallel(shallow, LOCAL)
    deep = copy.deepcopy(shallow)
    assert traces(deep)[0] == traces(CASES["flux"].build())[0]
    remove_context_parallel(model)
    assert torch.equal(output(shallow, CASES["flux"].inputs()), output(model, CASES["flux"].inputs()))


def test_a_part_of_a_model_that_is_split_is_not_split_again():
    model = CASES["flux"].build()
    apply_context_parallel(model, LOCAL)
    with pytest.raises(AttentionProviderError, match="its '1.transformer_blocks.0' belongs to a model"):
        apply_context_parallel(torch.nn.Sequential(torch.nn.Identity(), torch.nn.ModuleDict({
            "transformer_blocks": model.transformer_blocks
        })), LOCAL, {})  # fmt: skip


def test_an_adapter_that_copies_a_layer():
    """PEFT keeps a copy of a module that it trains (`modules_to_save`): it must not gather twice."""
    from peft import LoraConfig

    model = CASES["flux"].build()
    apply_context_parallel(model, LOCAL)
    model.add_adapter(LoraConfig(target_modules=["to_q"], modules_to_save=["proj_out"]))
    assert not model.proj_out.modules_to_save["default"]._forward_hooks


def copied_over_ranks(meshes):
    """Errors of a model and of its copies, what is left of hooks and bindings, and a pickle."""
    given = inputs("flux")
    model = build("flux")
    model.set_attn_processor(DispatchProcessor("_native_math"))
    before, expected = traces(model), output(model, given)
    mesh = meshes.lines[2]
    enable_context_parallel(model, mesh=mesh, provider="native", verbose=False)
    output(model, given)
    copies = [way(model) for way in WAYS.values()]
    same = [traces(each) == before for each in copies]
    errors = [error(output(each, given), expected) for each in (*copies, model)]
    one = copies[0]
    disable_context_parallel(one)
    errors.append(error(output(model, given), expected))
    enable_context_parallel(one, mesh=mesh, verbose=False)
    errors += [error(output(each, given), expected) for each in (one, model)]
    disable_context_parallel(one)
    pickled = pickle.dumps(model)
    disable_context_parallel(model)
    return errors, same, traces(model) == before, pickled


def test_copies_over_ranks(pool, tmp_path):
    expected = output(build("flux"), inputs("flux"))
    for errors, same, restored, pickled in pool.run(2, copied_over_ranks):
        assert max(errors) < 1e-6 and all(same) and restored
        assert not torch.distributed.is_initialized()
        model = pickle.loads(pickled)  # where there is no process group
        assert {each.processor.choice for _, each in attention_modules_of(model)} == {ProviderChoice.of("_native_math")}
        assert error(output(model, inputs("flux")), expected) < 1e-6
    model.save_pretrained(tmp_path)
