"""Every block of Python in README.md and docs/ runs: here, or in the test that `ELSEWHERE` names.

Models from the Hub are replaced by small ones, and a GPU by the CPU. `SUBSTITUTES` has all the words that change.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, WanPipeline, WanTransformer3DModel
from diffusers.hooks import ModelHook
from torch.distributed.tensor import DTensor

import diffusers_attn
from diffusers_attn.processors import attention_modules

from .documents import ROOT, vars_of
from .test_quickstart import MODEL
from .tiny_pipelines import make
from .vae.cases import CASES as VAES
from .zoo import CASES

Names = dict[str, Any]
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 32}
SUBSTITUTES = {
    '"black-forest-labs/FLUX.1-dev"': f'"{MODEL}"',
    'init_device_mesh("cuda", (2,)': 'init_device_mesh("cpu", (4,)',
    'set_attention_provider(pipe, "sage")': 'set_attention_provider(pipe, "_native_math")',  # sage needs a GPU
    'attention_provider("flash", deterministic=True)': 'attention_provider("native")',
    ', attention_kwargs={"window_size": (128, 128)})': ")",  # options of flash, which needs a GPU
    'provider="flash_4"': 'provider="native"',
    "model(...)": "model(**inputs)",
    "apply_compile(pipe.transformer)": 'apply_compile(pipe.transformer, backend="eager")',  # Inductor takes long
}
ELSEWHERE = {
    ("README.md", "Use"): "tests/test_readme.py, and the block for several GPUs as that of docs/quickstart.md",
    ("docs/choosing_a_provider.md", "Why this one?"): "tests/test_readme.py",
    ("docs/quickstart.md", "A pipeline"): "tests/test_readme.py",
    ("docs/quickstart.md", "One GPU"): "tests/test_readme.py",
    ("docs/quickstart.md", "Several GPUs"): "tests/test_pages.py",
    ("docs/context_parallel.md", "Start"): "tests/test_pages.py, but for the script for Accelerate, which is here",
    ("docs/context_parallel.md", "Recipes"): "tests/test_pages.py",
    ("docs/writing_plans.md", "A first attempt"): "tests/verify_plan/test_verify.py",
    ("docs/writing_plans.md", "The plan"): "tests/verify_plan/test_verify.py",
    ("docs/quickstart.md", "Faster steps"): "tests/test_readme.py, which has the same line",
    ("docs/training.md", "Models"): "tests/training/model/test_experts.py",
    ("docs/training.md", "In your own loop"): "tests/training/test_parallel.py, in a loop of its own",
    ("docs/providers.md", "Kernels from the Hub"): "tests/providers/test_hub.py, with a folder in place of the Hub",
}


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Heading and code of each block of a page."""
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        for indent, code in re.findall(r"^( *)```py(?:thon)?\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE):
            heading = "" if section.startswith(("# ", "---")) else section.partition("\n")[0]
            yield heading, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def run(page: str, heading: str, names: Names, blocks_of_it: slice = slice(None)) -> Names:
    """Runs the code below a heading, with substitutes."""
    for code in [code for found, code in blocks(page) if found == heading][blocks_of_it]:
        for word, substitute in SUBSTITUTES.items():
            code = code.replace(word, substitute)
        exec(compile(code, f"{page}, {heading!r}", "exec"), names)
    return names


def flux() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def small_calls(folder: Path) -> Iterator[None]:
    """Flux pipelines draw small pictures, whatever size they are asked for, and files are written into the folder."""
    original, before = FluxPipeline.__call__, os.getcwd()

    def call(self: Any, *args: Any, **settings: Any) -> Any:
        return original(self, *args, **settings | SMALL)

    FluxPipeline.__call__ = call
    os.chdir(folder)
    try:
        yield
    finally:
        FluxPipeline.__call__ = original
        os.chdir(before)


def providers_of(pipe: Any) -> set[str | None]:
    return {module.provider for module in attention_modules(pipe.transformer)}


# ---- One process


def test_providers_by_name() -> None:
    names = run("docs/choosing_a_provider.md", "", vars_of(diffusers_attn) | {"pipe": flux()})
    assert providers_of(names["pipe"]) == {"auto"}


def test_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = flux()
    with small_calls(tmp_path):
        run("docs/measuring.md", "The time of components", {"pipe": pipe})
        assert "transformer" in capsys.readouterr().out
        run("docs/measuring.md", "A profile", {"pipe": pipe})
        assert "attention" in capsys.readouterr().out and (tmp_path / "trace.json").exists()
        names = run("docs/measuring.md", "What a lossy choice costs", {"pipe": pipe, "torch": torch})
    assert providers_of(names["pipe"]) == {"_native_math"}
    assert capsys.readouterr().out and (tmp_path / "compare.png").exists()


def test_coming_from_finetrainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention)
    case = CASES["wan"]
    query = torch.randn(1, 2, 8, 16)
    names = {"model": case.build(), "inputs": case.inputs(), "query": query, "key": query, "value": query}
    run("docs/from_finetrainers.md", "Imports", names)
    assert torch.nn.functional.scaled_dot_product_attention is diffusers_attn.attention_dispatch
    run("docs/from_finetrainers.md", "Options of a kernel", names)
    plan = run("docs/from_finetrainers.md", "Plans", names, slice(1))["cp_plan"]
    diffusers_attn.register_cp_plan(type("Unknown", (torch.nn.Module,), {}), plan)


def test_words_of_plans() -> None:
    names = run("docs/writing_plans.md", "Advanced words", vars_of(diffusers_attn))
    names |= {"SmallTransformer": type("SmallTransformer", (torch.nn.Module,), {}), "PLAN": names["no_cache"]}
    run("docs/writing_plans.md", "Using it", names)
    run("docs/writing_plans.md", "Hooks within a split model", {"ModelHook": ModelHook})


# ---- Several processes


def on_ranks(meshes: Any, folder: Path) -> list[str]:
    """Runs pages on four ranks. Returns what differs from one process."""
    pipe, wrong = flux(), []
    settings: Names = {"output_type": "np"}
    with small_calls(folder), torch.no_grad():

        def draw(seeds: list[int]) -> Any:
            return pipe(
                ["a cat", "a dog"][: len(seeds)], generator=[_seeded(seed) for seed in seeds], **settings
            ).images

        expected = draw([1, 2])
        names = vars_of(diffusers_attn) | {"pipe": pipe, "settings": settings, "cat": _seeded(1), "dog": _seeded(2)}
        run("docs/context_parallel.md", "Several prompts or images", names)
        if abs(names["images"] - expected).max() > 1e-4:
            wrong.append("data_degree")
        diffusers_attn.disable_context_parallel(pipe)
        run("docs/compile.md", "", names)
        diffusers_attn.disable_context_parallel(pipe)
        run("docs/context_parallel.md", "Start", {}, slice(1, None))
        run("docs/index.md", "", {"torch": torch, "path": MODEL})

        vae = VAES["wan"].make().eval()
        latents = torch.randn(VAES["wan"].latents, generator=_seeded(0))
        full = vae.decode(latents).sample
        run("docs/context_parallel.md", "The VAE", names := {"vae": vae, "latents": latents})
        if (names["video"] - full).abs().max() > 1e-4:
            wrong.append("vae")

        case = CASES["wan"]
        model, inputs = case.build(), case.inputs()
        names = vars_of(diffusers_attn) | {"model": model, "inputs": inputs}
        run("docs/context_parallel.md", "Any module", names, slice(1))
        diffusers_attn.remove_context_parallel(model)
        names |= {"pipe": SimpleNamespace(transformer=model), "device": "cpu", "world_size": 4}
        run("docs/from_finetrainers.md", "Plans", names, slice(1, None))

        torch.manual_seed(0)
        names = {"WanPipeline": WanPipeline, "WanTransformer3DModel": WanTransformer3DModel, "path": folder / "wan"}
        names |= vars_of(diffusers_attn) | {"torch": torch}
        for each in (slice(1), slice(1, None)):
            run("docs/memory.md", "Weights that do not fit", names, each)
            if not any(isinstance(weight, DTensor) for weight in names["pipe"].transformer.parameters()):
                wrong.append("shards")
    return wrong


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pages_about_several_devices(pool: Any, tmp_path: Path) -> None:
    make("wan").save_pretrained(tmp_path / "wan")
    assert pool.run(4, on_ranks, folder=tmp_path) == [[]] * 4
    assert (tmp_path / "cat.png").exists()


# ---- All

# Of "Any module", verify_cp_plan runs in tests/verify_plan.

HERE = {
    ("docs/choosing_a_provider.md", ""), ("docs/compile.md", ""), ("docs/index.md", ""),
    ("docs/context_parallel.md", "Several prompts or images"), ("docs/context_parallel.md", "The VAE"),
    ("docs/context_parallel.md", "Any module"), ("docs/from_finetrainers.md", "Imports"),
    ("docs/from_finetrainers.md", "Plans"), ("docs/from_finetrainers.md", "Options of a kernel"),
    ("docs/measuring.md", "The time of components"), ("docs/measuring.md", "A profile"),
    ("docs/measuring.md", "What a lossy choice costs"), ("docs/memory.md", "Weights that do not fit"),
    ("docs/writing_plans.md", "Advanced words"), ("docs/writing_plans.md", "Using it"),
    ("docs/writing_plans.md", "Hooks within a split model"),
}  # fmt: skip


def test_every_block_runs_somewhere() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    assert {(page, heading) for page in pages for heading, _ in blocks(page)} == HERE | set(ELSEWHERE)
