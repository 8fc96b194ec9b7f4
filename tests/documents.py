"""The code in README.md and docs/, for tests that run it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import diffusers_attn

ROOT = Path(__file__).resolve().parents[1]


def snippets(document: str, heading: str) -> list[str]:
    """The Python code below a heading of a document, block by block."""
    section = (ROOT / document).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it. That of mkdocs has no double hyphens."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def plan_in(document: str, heading: str) -> dict[str, Any]:
    """The plan that is written there."""
    for code in snippets(document, heading):
        for node in ast.parse(code).body:
            if isinstance(node, ast.Assign) and "plan" in ast.unparse(node.targets[0]):
                return eval(compile(ast.Expression(node.value), document, "eval"), {**vars_of(diffusers_attn)})
    raise LookupError(f"no plan in {document}, {heading}")


def vars_of(package: Any) -> dict[str, Any]:
    return {name: getattr(package, name) for name in package.__all__}
