"""The tables of docs/models.md: every denoiser of diffusers, by introspection, the registry and the tests' tables.

What its attention calls bring is recorded from a run of the tests' tiny models, so that it cannot go stale.
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin

from diffusers_attn import AttentionProviderError, set_attention_provider
from diffusers_attn.cp_plans.registry import _FAMILIES
from diffusers_attn.cp_plans.uncovered import UNCOVERED
from diffusers_attn.masks import MaskKind, classify
from diffusers_attn.processors import attention_modules, entry_points
from diffusers_attn.providers.catalog import SPECS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.context_parallel.model_cases import COMPARED as CASES_OF_PLANS
from tests.zoo import CASES

KINDS = {
    MaskKind.NONE: "none",
    MaskKind.KEY: "key",
    MaskKind.KEY_BIAS: "key, additive",
    MaskKind.DENSE: "bool",
    MaskKind.BIAS: "additive",
    MaskKind.BLOCK: "BlockMask",
}
PLANS = {name for family in _FAMILIES for name in family.PLANS}


def classes(package: str) -> dict[str, type]:
    """The model classes of diffusers.models.`package`, by name."""
    where = importlib.import_module(f"diffusers.models.{package}")
    return {
        name: cls
        for info in pkgutil.walk_packages(where.__path__, f"{where.__name__}.")
        for name, cls in sorted(vars(importlib.import_module(info.name)).items())
        if isinstance(cls, type) and issubclass(cls, ModelMixin) and cls.__module__ == info.name
    }


@functools.cache
def pipelines() -> dict[str, list[str]]:
    """Which pipelines' constructors name a class, by the class's name. From the source: nothing is imported."""
    found: dict[str, set[str]] = {}
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef) or not node.name.endswith("Pipeline"):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    for name in _names(method):
                        found.setdefault(name, set()).add(node.name)
    return {name: sorted(each) for name, each in found.items()}


def _names(method: ast.FunctionDef) -> Iterator[str]:
    """The names in the types of a function's arguments, also where these are written as strings."""
    for argument in (*method.args.args, *method.args.kwonlyargs):
        if argument.annotation is not None:
            for node in ast.walk(argument.annotation):
                if isinstance(node, ast.Name):
                    yield node.id
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield from (part.id for part in ast.walk(ast.parse(node.value)) if isinstance(part, ast.Name))


class Attention(NamedTuple):
    """What was seen of the attention of a class's models."""

    masks: set[MaskKind]
    grouped: bool
    causal: bool
    elsewhere: set[str]
    """processors whose attention cannot be sent to a provider."""


@functools.cache
def attention_of(cls: str) -> Attention:
    """Recorded from the forward of every case of the zoo."""
    seen = Attention(set(), False, False, set())
    for case in CASES.values():
        if case.model_class == cls:
            model = case.build()
            calls: list[dict[str, Any]] = []
            seen.elsewhere.update(each.processor for each in attention_modules(model) if each.obstacle)
            try:
                set_attention_provider(model, "native")
            except AttentionProviderError:
                continue
            with torch.no_grad():
                _recorded(calls, model, case.inputs())
            masks = seen.masks | {call["kind"] for call in calls}
            grouped = seen.grouped or any(call["grouped"] for call in calls)
            seen = Attention(masks, grouped, seen.causal or any(call["causal"] for call in calls), seen.elsewhere)
    return seen


def _recorded(calls: list[dict[str, Any]], model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    attend = entry_points.attend

    def recording(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *rest, layout, **kwargs):  # type: ignore[no-untyped-def]
        heads, seq = (1, 2) if layout == "bhsd" else (2, 1)
        batch = max(query.shape[0], key.shape[0])
        kind, _ = classify(attn_mask, batch, query.shape[heads], query.shape[seq], key.shape[seq])
        calls.append({"kind": kind, "grouped": query.shape[heads] != key.shape[heads], "causal": is_causal})
        return attend(query, key, value, attn_mask, dropout_p, is_causal, *rest, layout=layout, **kwargs)

    entry_points.attend = recording
    try:
        model(**inputs)
    finally:
        entry_points.attend = attend


def compared(cls: str) -> list[str]:
    """The names under which the class's models are compared under their plan with one process."""
    return [
        name
        for family in CASES_OF_PLANS.values()
        for name in family.MODELS
        if CASES[name.partition(",")[0]].model_class == cls
    ]


def providers(masks: set[MaskKind]) -> str:
    """Those that take all of these masks. What else they lack, dispatch adds."""
    takes = [name for name, spec in SPECS.items() if masks - {MaskKind.NONE} <= spec.capabilities.masks]
    others = [name for name in SPECS if name not in takes]
    if not masks:
        return ""
    if not others:
        return "all"
    named = takes if len(takes) <= len(others) else others
    return ("" if named is takes else "all but ") + ", ".join(f"`{name}`" for name in named)


def rows(package: str) -> Iterator[tuple[str, ...]]:
    """One for each class: what is seen, and what is known."""
    for name in sorted(classes(package)):
        cases = [case for case in CASES.values() if case.model_class == name]
        seen = attention_of(name)
        masks = ", ".join(text for kind, text in KINDS.items() if kind in seen.masks)
        masks += "; grouped heads" * seen.grouped + "; causal" * seen.causal
        if seen.elsewhere:
            masks += f"{'; ' if masks else ''}not through a provider: {', '.join(sorted(seen.elsewhere))}"
        tests = compared(name)
        yield (
            f"`{name}`",
            ", ".join(each.removesuffix("Pipeline") for each in pipelines().get(name, [])),
            "; ".join(dict.fromkeys(case.notes for case in cases)),
            masks,
            providers(seen.masks),
            "yes" if name in PLANS else " ".join(UNCOVERED[name]) if name in UNCOVERED else "no",
            "Ulysses, ring, both" if name in PLANS else "",
            "over ranks" if tests else "on one device" if seen.masks else "",
            "; ".join(tests),
            ", ".join(case.name for case in cases),
        )


HEADER = (
    "class", "pipelines", "what is special", "masks that reach attention", "providers", "context parallelism",
    "strategies", "training", "compared with one process as", "processors tested as",
)  # fmt: skip
