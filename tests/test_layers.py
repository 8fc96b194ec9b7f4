"""The folders of the package are layers: each imports only from those below it, and no modules import in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffusers_attn

ROOT = Path(diffusers_attn.__file__).parent
# From the bottom to the top. Folders and modules on one line do not import from each other.
LAYERS = (
    ("errors", "nested", "parent_process", "atomic_files", "json_files"),
    ("logs", "spans", "quality", "safetensors_only"),
    ("masks", "recompute", "shapes", "tensor_kinds", "tracing", "cp_plans", "tiny_models"),
    ("call",),
    ("providers",),
    ("context_parallel.nvlink",),
    ("context_parallel.config", "context_parallel.job", "context_parallel.compile"),
    ("context_parallel.comm",),
    ("context_parallel.mesh",),
    ("scope", "prepared_call", "other_tensors", "context_parallel.sequences"),
    ("context_parallel.attention", "known_calls"),
    ("context_parallel.hooks", "dispatch"),
    ("processors", "runtime", "vae"),
    ("guidance",),
    ("parallelize",),
    ("verify_plan", "training.errors", "training.once", "training.job_ranks", "training.data"),
    ("training.settings", "training.randomness", "training.transfers"),
    ("training.accelerate_setup",),
    ("training.parallel", "training.loss"),
    ("training.families",),
    ("training.model",),
    ("training.batches",),
    ("training.checkpoints",),
    ("training.loop",),
    ("training.commandline",),
    ("training.program",),
    ("cli",),
    ("__main__",),
)
RANK = {layer_name: rank for rank, layer in enumerate(LAYERS) for layer_name in layer}
# These packages have a file per idea that `__init__` collects: it may be imported by what it imports.
PACKAGES = {".".join(file.parent.relative_to(ROOT.parent).parts): file for file in ROOT.rglob("__init__.py")}
MODULES = {
    ".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file
    for file in sorted(ROOT.rglob("*.py"))
    if file.name != "__init__.py"
} | PACKAGES

WITHOUT_LAYER = ("context_parallel", "training")
"""Folders whose `__init__` only collects public names; the folders in them have layers."""


def layer_of(module: str) -> str | None:
    """The layer's name for a module; None for the package itself, whose `__init__` collects the public names."""
    name = module.partition(".")[2]
    return next((layer_name for layer_name in RANK if name == layer_name or name.startswith(layer_name + ".")), None)


def imports_of(module: str, types_too: bool) -> Iterator[str]:
    """The modules of this package that `module` imports, in functions as well as at its top."""
    tree = ast.parse(MODULES[module].read_text())
    for_types = [
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in node.body
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or (node in for_types and not types_too):
            continue
        package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def test_every_module_has_a_layer():
    without = {module for module in MODULES if layer_of(module) is None}
    assert without == {"diffusers_attn", *(f"diffusers_attn.{each}" for each in WITHOUT_LAYER)}


@pytest.mark.parametrize("layer_name", RANK)
def test_a_layer_imports_from_those_below(layer_name):
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if layer_of(module) == layer_name
        for other in imports_of(module, types_too=True)
        if layer_of(other) not in (layer_name, None) and RANK[layer_of(other)] >= RANK[layer_name]
    ]
    assert not wrong


ONE_FILE_PER_MODEL = {"diffusers_attn.cp_plans", "diffusers_attn.tiny_models", "diffusers_attn.training.families"}


@pytest.mark.parametrize("package", sorted(set(PACKAGES) - ONE_FILE_PER_MODEL))
def test_the_docstring_of_a_folder_names_its_files(package):
    """So that a reader finds what is in it."""
    text = ast.get_docstring(ast.parse(PACKAGES[package].read_text())) or ""
    files = {each.rpartition(".")[2] for each in MODULES if each.rpartition(".")[0] == package} - {"__main__"}
    missing = {each for each in files if f"`{each}`" not in text and f"`{each}." not in text}
    assert not missing, f"name {missing} in the docstring of {PACKAGES[package].relative_to(ROOT.parent)}"


def test_no_modules_import_in_a_circle():
    edges = {module: {other for other in imports_of(module, types_too=False)} for module in MODULES}
    for module in PACKAGES:  # an __init__ collects names of its own folder
        edges[module] = {other for other in edges[module] if not other.startswith(module + ".")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())
