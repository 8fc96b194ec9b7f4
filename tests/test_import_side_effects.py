"""Importing the package changes nothing of diffusers or torch; each patch comes with the first use that needs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# A fresh process, in which nothing is patched yet. Each key of `seen` is what one of the tests below compares.
SCRIPT = """
import importlib, json, os, pkgutil
import torch
import torch.utils.checkpoint as checkpoint
from diffusers.models import attention, attention_dispatch, attention_processor, modeling_utils

OWNERS = (
    attention.AttentionMixin, attention.AttentionModuleMixin, attention_processor.Attention,
    attention_processor.MochiAttention, modeling_utils.ModelMixin, attention_dispatch._AttentionBackendRegistry,
    attention_dispatch, torch.nn.functional, checkpoint, checkpoint._CheckpointFrame, checkpoint.CheckpointFunction,
)

def snapshot():
    return [dict(vars(owner)) for owner in OWNERS]

def changed(before):
    return sorted(
        f"{owner.__name__}.{name}"
        for owner, old, new in zip(OWNERS, before, snapshot())
        for name in old.keys() | new.keys()
        if name not in ("__builtins__", "_abc_impl") and old.get(name) is not new.get(name)
    )

class Seen:
    def __init__(self):
        self.providers = []
    def __call__(self, x):
        from diffusers_attn.scope import active_choice
        self.providers.append(active_choice().provider)
        return x.sin() * 2

seen, before = {}, snapshot()
import diffusers_attn
for module in pkgutil.walk_packages(diffusers_attn.__path__, "diffusers_attn."):
    try:
        importlib.import_module(module.name)
    except ImportError:  # of what is not installed, such as a kernel's package
        pass
for name in diffusers_attn.__all__:
    if name != "DispatchProcessor":
        getattr(diffusers_attn, name)
seen["imported"] = changed(before)

forwards, x = [Seen(), Seen()], torch.ones(2, requires_grad=True)
outs = [
    checkpoint.checkpoint(each, x, use_reentrant=reentrant) for each, reentrant in zip(forwards, (False, True))
]
with diffusers_attn.attention_provider("_native_math"):
    sum(outs).sum().backward()
seen["scope"] = changed(before)
seen["recomputed"] = [each.providers for each in forwards]

# In a fork, since what follows is to find everything as it was before this. A class that has no `set_attn_processor`.
from diffusers.models.transformers.transformer_allegro import AllegroTransformer3DModel as Model
result, answer = os.pipe()
if os.fork() == 0:
    had = hasattr(Model, "set_attn_processor")
    diffusers_attn.DispatchProcessor
    os.write(answer, json.dumps([had, hasattr(Model, "set_attn_processor")]).encode())
    os._exit(0)
os.close(answer)
seen["read"] = json.loads(os.read(result, 100))

from diffusers_attn.processors import backend_scope, bound
before = snapshot()
with attention_dispatch.attention_backend("_native_math"):
    with attention_dispatch.attention_backend("native"):
        bound.bind(attention_processor.AttnProcessor2_0(), None)
        seen["open"] = list(backend_scope.backends)
    seen["outer"] = list(backend_scope.backends)
seen["closed"] = list(backend_scope.backends)
seen["bound"] = changed(before)
before = snapshot()
bound.bind(attention_processor.AttnProcessor(), None)
diffusers_attn.DispatchProcessor
seen["again"] = changed(before)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_and_reading_public_names_patches_nothing(seen):
    assert seen["imported"] == []


def test_the_first_scope_patches_checkpointing_alone(seen):
    assert seen["scope"] == ["CheckpointFunction.forward", "_CheckpointFrame.__init__"]


def test_a_forward_before_the_first_scope_is_recomputed_outside_of_it(seen):
    assert seen["recomputed"] == [["native", "native"]] * 2


def test_the_first_binding_patches_diffusers_once(seen):
    assert {"Attention.set_processor", "AttentionMixin.set_attn_processor", "ModelMixin.set_attn_processor"} <= set(
        seen["bound"]
    )
    assert seen["again"] == []


def test_scopes_of_diffusers_that_were_open_before_the_patch_are_noted(seen):
    assert seen["open"] == ["_native_math", "native"]
    assert seen["outer"] == ["_native_math"] and seen["closed"] == []


def test_reading_dispatch_processor_patches_diffusers(seen):
    """`model.set_attn_processor` is looked up before `DispatchProcessor(...)` is made, and this class has none."""
    assert seen["read"] == [False, True]
