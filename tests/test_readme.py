"""The snippets of README.md and docs/quickstart.md, in their order. They need no GPU and no further package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import diffusers_attn
from diffusers_attn.processors import attention_modules
from diffusers_attn.providers.catalog import SPECS

from .documents import ROOT, snippets


def test_the_readme_draws_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its snippets, but for the one for several GPUs, which tests/test_pages.py runs."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention)
    first, _, compiled, in_place = snippets("README.md", "Use")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in (first, compiled, in_place):
        exec(code, names)
    assert Image.open(tmp_path / "cat.png").size == (64, 64)
    assert names["pipe"].transformer.transformer_blocks[0]._compiled_call_impl is not None


def test_the_readme_has_one_screen_to_a_result() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110 and next(i for i, line in enumerate(lines) if line == "```python") < 45


def test_the_first_snippets_run_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    (code,) = snippets("docs/quickstart.md", "A pipeline")
    exec(code, names)
    pipe, settings = names["pipe"], names["settings"]
    assert isinstance(pipe, FluxPipeline)
    pipe.set_progress_bar_config(disable=True)
    settings["num_inference_steps"] = 1
    providers = []
    for code in snippets("docs/quickstart.md", "One GPU"):
        exec(code, names)
        providers.append({module.provider for module in attention_modules(pipe.transformer)})
    assert providers[0] == {"auto"} and providers[1] == {"scope"}
    assert capsys.readouterr().out.startswith("native")
    names |= zip(("query", "key", "value"), torch.randn(3, 1, 8, 2, 16))
    for code in snippets("docs/choosing_a_provider.md", "Why this one?"):
        exec(code, names)
    assert capsys.readouterr().out.startswith("native: the first that supports the call")


def test_the_public_names_are_in_dir() -> None:
    import diffusers_attn.training as training

    for package in (diffusers_attn, training):
        assert set(package.__all__) <= set(dir(package))
        assert dir(package) == sorted(dir(package)) and "__name__" in dir(package)


def test_versions_that_are_named_agree() -> None:
    """pyproject.toml, the tools in it, README and constraints.txt; and what diffusers itself asks for."""
    import importlib.metadata
    import tomllib

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    python = SpecifierSet(project["project"]["requires-python"])
    (floor,) = (each.version for each in python)
    needs = {each.name: each for each in map(Requirement, project["project"]["dependencies"])}
    (torch_floor,) = (each.version for each in needs["torch"].specifier)
    (diffusers_floor,) = (each.version for each in needs["diffusers"].specifier)
    wanted = SpecifierSet(importlib.metadata.metadata("diffusers")["Requires-Python"])
    assert wanted.contains(f"{floor}.0"), f"diffusers wants Python {wanted}"
    assert project["tool"]["ruff"]["target-version"] == "py" + floor.replace(".", "")
    assert project["tool"]["mypy"]["python_version"] == floor
    assert f"Programming Language :: Python :: {floor}" in project["project"]["classifiers"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"Python {floor}, PyTorch {torch_floor} and diffusers {diffusers_floor} are the oldest that work" in text
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = {each.name: each.specifier for each in map(Requirement, filter(None, lines))}
    wanted = [
        each for extra in project["project"]["optional-dependencies"].values() for each in map(Requirement, extra)
    ]
    for need in (*needs.values(), *wanted):
        if need.name != "diffusers-attn":
            assert need.name in pinned, f"constraints.txt has no {need.name}: run `make constraints`"
            (pin,) = pinned[need.name]
            assert pin.operator == "==" and need.specifier.contains(pin.version), f"{need}, and {pin} is pinned"
    named = dict(
        re.findall(r"^pip show (\S+) +# (\S+) or newer", (ROOT / "docs/installing.md").read_text(), re.MULTILINE)
    )
    oldest = {need.distribution: need.minimum for each in SPECS.values() if (need := each.requirement) is not None}
    hub = map(Requirement, project["project"]["optional-dependencies"]["hub"])
    oldest |= {each.name: str(each.specifier).removeprefix(">=") for each in hub}
    oldest["sageattention"] = SPECS["sage"].requirement.minimum
    assert len(named) == 5 and named.items() <= oldest.items()
