"""Importing the package imports no attention package and costs next to nothing."""

import json
import sys

from . import launching

SCRIPT = """
import importlib, json, sys, time
import torch, diffusers
before = set(sys.modules)
start = time.perf_counter()
import diffusers_attn
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - before)}))
"""
KERNELS = (
    "flash_attn",
    "flash_attn_interface",
    "sageattention",
    "xformers",
    "triton",
    "cutlass",
    "kernels",
    "sageattn3",
)


def test_no_kernel_package_and_no_diffusers_model_code():
    result = launching.run([sys.executable, "-c", SCRIPT], check=True)
    new = json.loads(result.stdout)["new"]
    assert not [module for module in new if module.split(".")[0] in KERNELS]
    assert not [module for module in new if module.startswith("diffusers.")]
    assert not [module for module in new if module.startswith(("torch._inductor", "torch.nn.attention.flex"))]


def test_every_public_name_is_there():
    import diffusers_attn

    for name in diffusers_attn.__all__:
        assert getattr(diffusers_attn, name) is not None


def test_the_package_alone_imports_no_pytorch():
    """So that the command starts quickly, and can examine an environment in which PyTorch does not import."""
    code = "import sys; before = set(sys.modules); import diffusers_attn; print(*(set(sys.modules) - before))"
    new = launching.run([sys.executable, "-c", code], check=True).stdout.split()
    assert [each for each in new if each.partition(".")[0] not in sys.stdlib_module_names] == ["diffusers_attn"]


def test_modules_are_attributes_of_the_package():
    code = "import diffusers_attn; print(diffusers_attn.dispatch.explain, diffusers_attn.errors.AttentionProviderError)"
    assert "explain" in launching.run([sys.executable, "-c", code], check=True).stdout
