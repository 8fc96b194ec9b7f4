"""A plan on the model, and a scope with the settings of its mesh, as a user writes them."""

import contextlib

import pytest
import torch

from diffusers_attn import AttentionProviderError, DispatchProcessor, apply_context_parallel, attention_provider
from diffusers_attn.context_parallel.attention import parallel_attention
from diffusers_attn.context_parallel.mesh import ContextParallelMesh


@contextlib.contextmanager
def noting(strategies):
    """Notes which strategy serves the ring, once for a change."""
    real = dict(parallel_attention.STRATEGIES)

    def noted(name):
        def call(*args, **kwargs):
            if strategies[-1:] != [name]:
                strategies.append(name)
            return real[name](*args, **kwargs)

        return call

    parallel_attention.STRATEGIES.update({name: noted(name) for name in real})
    try:
        yield
    finally:
        parallel_attention.STRATEGIES.update(real)


def in_scopes(meshes):
    """Largest differences from one process, which strategy ran, and what a scope with other groups says."""
    from tests.zoo import CASES, outputs

    case = CASES["flux"]
    model = case.build(dtype=torch.float64).double()
    (expected,) = outputs(model(**case.inputs(dtype=torch.float64)))
    mesh = meshes.lines[2]
    apply_context_parallel(model, mesh)
    model.set_attn_processor(DispatchProcessor("native"))
    errors, strategies = [], []
    for settings in ({}, {"rotate_method": "alltoall"}, {"convert_to_fp32": False}):
        scope = attention_provider("_native_math", mesh=mesh, **settings)
        with scope, torch.no_grad(), noting(strategies):
            (found,) = outputs(model(**case.inputs(dtype=torch.float64)))
        errors.append((found - expected).abs().max().item())
    with torch.no_grad():  # the plan alone is enough
        (found,) = outputs(model(**case.inputs(dtype=torch.float64)))
    errors.append((found - expected).abs().max().item())
    try:
        with attention_provider("native", mesh=meshes(1, 2)):
            model(**case.inputs(dtype=torch.float64))
    except AttentionProviderError as error:
        return errors, strategies, str(error)
    return errors, strategies, ""


def test_scopes(pool):
    for errors, strategies, message in pool.run(2, in_scopes):
        assert strategies == ["allgather_kv", "ring", "allgather_kv"]
        assert max(errors) < 1e-6  # the model computes some things in float32
        assert "Pass the same mesh to attention_provider and apply_context_parallel" in message


def test_settings_of_a_mesh_without_one_are_refused():
    with pytest.raises(AttentionProviderError, match="no mesh was given"):
        attention_provider("native", rotate_method="alltoall")


@pytest.mark.parametrize(("settings", "message"), [({"rotate_method": "sideways"}, "allgather.*alltoall")])
def test_settings_are_checked(settings, message):
    alone = ContextParallelMesh.from_degrees(device_type="cpu")
    with pytest.raises(AttentionProviderError, match=message):
        attention_provider("native", mesh=alone, **settings)
    with pytest.raises(AttentionProviderError, match="a torch DeviceMesh or a ContextParallelMesh"):
        attention_provider("native", mesh="cp")
