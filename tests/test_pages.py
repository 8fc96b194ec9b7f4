"""CONTRIBUTING.md, CHANGELOG.md and the pages of docs/: their code runs, and their links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

import diffusers_attn
from diffusers_attn.masks import MaskKind
from diffusers_attn.providers.base import KernelFunction, Params

from . import reference
from .documents import ROOT, slug, snippets
from .test_quickstart import MODEL, example

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob(".github/*.md"),
        *ROOT.glob("integrations/*/*.md"),
    )
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        path = link.partition("#")[0]
        assert link.startswith("http") or not path or (here / path).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_anchors_are_headings(page: str) -> None:
    """Of links to pages. Headings and anchors are those of GitHub and of the site."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for link, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", text):
        target = ((ROOT / page).parent / link).read_text() if link else text
        assert anchor in {slug(heading.replace("`", "")) for heading in re.findall(r"^#+ (.+)$", target, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_code_uses_names_that_exist(page: str) -> None:
    """Every block of Python parses and imports names that exist, also one that needs a GPU or a large model. The
    language of a block that other tests do not run is `py`, if they run those beside it."""
    for code in re.findall(r"^ *```py(?:thon)?\n(.*?)```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(textwrap.dedent(code))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_attn"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, each.name) for each in node.names), ast.unparse(node)


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(diffusers_attn.__all__) <= {path.rpartition(".")[2] for path in listed}
    for path in listed:
        assert hasattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]), path


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs says so too, where it is installed."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in navigation]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    for path in re.findall(
        r"`((?:diffusers_attn|tests|docs|benchmarks|examples)/[\w./-]+)`", (ROOT / page).read_text()
    ):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_the_glossary_explains_each_word_once_and_shortly() -> None:
    entries = (ROOT / "docs/glossary.md").read_text().split("\n\n")
    words = [word for entry in entries for word in re.findall(r"^\*\*(.+?)\*\*:", entry)]
    assert len(words) >= 30 and len(set(words)) == len(words)
    assert all(entry.strip().count("\n") == 1 for entry in entries if entry.startswith("**"))


def test_the_provider_of_contributing() -> None:
    """Its adapter, from two parts of the keys, and its row of the catalog."""
    names: dict[str, Any] = {}
    for code in snippets("CONTRIBUTING.md", "Add a provider"):
        exec(code, names)
    adapter = names["Einsum"]
    params = Params(MaskKind.NONE, False, 0.2, False, 0.0, False, "cpu", ())
    query, key, value = (torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for n in (7, 9, 9))
    out, lse = KernelFunction.apply(adapter, query, key, value, None, params)
    across: list[Tensor] = [tensor.detach().transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
    expected_out, expected_lse = reference.attention(*across, None, False, scale=0.2)
    grad_out = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad_out)
    expected = torch.autograd.grad(expected_out, across, grad_out.transpose(1, 2))
    torch.testing.assert_close(out, expected_out.transpose(1, 2))
    torch.testing.assert_close(lse, expected_lse.transpose(1, 2))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other.transpose(1, 2))
    parts = [
        adapter.backward(grad_out, query, key[:, some], value[:, some], None, out, lse, params)
        for some in (slice(4), slice(4, 9))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], found[0])
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]], dim=1), found[1])


def guide(meshes: Any, codes: list[str]) -> list[Any]:
    """The image of each snippet, on this rank."""
    pipe = FluxPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 32}
    names: dict[str, Any] = {"pipe": pipe, "settings": size}
    images = []
    for code in codes:
        exec(code, names)
        diffusers_attn.disable_context_parallel(pipe)
        images.append(np.asarray(names["image"], dtype=float))
    generator = torch.Generator("cpu").manual_seed(0)
    return [*images, np.asarray(pipe("a cat", generator=generator, **size).images[0], dtype=float)]


def test_the_guide_to_context_parallelism(pool: Any) -> None:
    codes = [
        *snippets("docs/context_parallel.md", "Start"),
        *snippets("docs/quickstart.md", "Several GPUs"),
        *snippets("docs/context_parallel.md", "Recipes"),
    ]
    assert len(codes) == 8
    for *_, seeded, alone in pool.run(4, guide, codes=codes):
        assert abs(seeded - alone).max() <= 1


def test_the_plan_of_contributing_is_right() -> None:
    (code,) = snippets("CONTRIBUTING.md", "Add a plan")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["plan"] == example("writing_plans").PLAN  # which tests/context_parallel verifies


def test_the_family_of_contributing(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    from diffusers_attn.training import families

    monkeypatch.setattr(families, "registered", {})
    (code,) = snippets("CONTRIBUTING.md", "Add a training family")
    names: dict[str, Any] = {}
    exec(code, names)
    family = families.family_class(WanPipeline, "WanTransformer3DModel")
    assert family is names["WanWithFeedForward"]
    from .tiny_pipelines import make

    layers = {name for name, _ in make("wan").transformer.named_modules()}
    assert all(any(layer.endswith(f".{target}") for layer in layers) for target in family.lora_targets)
