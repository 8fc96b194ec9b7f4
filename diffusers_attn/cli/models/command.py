"""The command `models`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

VERSION = 1
"""Version of the JSON schema."""


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="CLASS",
            help="A model class, such as WanTransformer3DModel, or a part of its name. Default: all classes.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """List the model classes that can be split between ranks, or draw the plan of one of them.

    The plan is drawn module by module. Shapes are those of a tiny model of the class, which runs once.
    """
    from ...cp_plans.registry import list_cp_plans
    from ...cp_plans.uncovered import UNCOVERED
    from ..names import classes_like
    from ..output import write_json

    known = [*list_cp_plans(), *UNCOVERED]
    found = known if name is None else classes_like(name, known)
    if len(found) > 1:
        rows = [_listed(each) for each in found]
        write_json("models", VERSION, {"models": rows}) if json else _show_list(rows)
    elif found[0] in UNCOVERED:
        row = _listed(found[0])
        write_json("models", VERSION, {"models": [row]}) if json else _show_list([row])
    else:
        drawn = draw(found[0])
        write_json("models", VERSION, {"models": [drawn]}) if json else _show_plan(drawn)


def _listed(name: str) -> dict[str, Any]:
    """A class without its plan, and without importing it."""
    from ...cp_plans.registry import registered_plan
    from ...cp_plans.uncovered import UNCOVERED
    from ...parallelize.typical_tokens import typical_tokens
    from .plan_in_words import sequences_of

    if name in UNCOVERED:
        return {"class": name, "plan": False, "reason": UNCOVERED[name].reason, "instead": UNCOVERED[name].instead}
    plan = registered_plan(name)
    return {
        "class": name,
        "plan": True,
        "sequences": None if callable(plan) else sequences_of(plan),
        "typical_tokens": typical_tokens(type(name, (), {})),
    }


def _show_list(rows: list[dict[str, Any]]) -> None:
    from ..output import heading, say, table

    with_plan = [row for row in rows if row["plan"]]
    if with_plan:
        cells = [
            (
                row["class"],
                "by its configuration" if row["sequences"] is None else ", ".join(row["sequences"]) or "one",
                f"{row['typical_tokens']:,}",
            )
            for row in with_plan
        ]
        table(("class", "split sequences", "typical tokens"), cells, numbers=("typical tokens",))
    without = [row for row in rows if not row["plan"]]
    if without and with_plan:
        heading("Without a plan")
    if len(without) == 1:
        say(f"{without[0]['class']} has no plan. {without[0]['reason']} {without[0]['instead']}")
    elif without:
        table(("class", "reason"), [(row["class"], row["reason"]) for row in without])
    if with_plan:
        say()
        say("`diffusers-attn models CLASS` draws the plan of one class.")


def draw(name: str) -> dict[str, Any]:
    """The plan of a class with the shapes of a tiny model, as the documented JSON object."""
    import dataclasses

    from ...cp_plans.plan import entries
    from ...cp_plans.registry import get_cp_plan
    from ...parallelize.typical_tokens import typical_tokens
    from ...tiny_models import CASES
    from .plan_in_words import lines_of, sequences_of
    from .shapes import Places

    case = next(case for case in CASES.values() if case.model_class == name)
    model = case.build()
    plan = get_cp_plan(model)
    places = Places(model, plan)
    places.run(model, case.inputs())
    drawn: dict[str, dict[str, Any]] = {}
    for path, spec in entries(plan):
        modules = places.modules[path]
        entry = drawn.setdefault(
            path,
            {
                "module": path,
                "class": type(modules[0]).__name__ if modules else None,
                "count": len(modules),
                "lines": [],
            },
        )
        for line in lines_of(spec):
            shape = places.shape(path, line.place, line.name)
            entry["lines"].append({**dataclasses.asdict(line), "shape": shape})
    return {
        "class": name,
        "plan": True,
        "sequences": sequences_of(plan),
        "typical_tokens": typical_tokens(type(model)),
        "tiny_model": case.name,
        "entries": list(drawn.values()),
    }


def _show_plan(drawn: Mapping[str, Any]) -> None:
    from ..output import say

    sequences = ", ".join(drawn["sequences"]) or "one, without a name"
    say(f"{drawn['class']}: split sequences: {sequences}; typically {drawn['typical_tokens']:,} tokens")
    root: dict[str, Any] = {}
    for entry in drawn["entries"]:
        node = root
        for part in filter(None, entry["module"].split(".")):
            node = node.setdefault(part, {})
        node.setdefault("", []).append(entry)
    _show_tree(root, "")
    say()
    say(f"Shapes are those of the tiny model '{drawn['tiny_model']}', with all tokens.")


def _show_tree(node: dict[str, Any], indent: str) -> None:
    """Prints what is below a node: first the lines of its own module, then its submodules."""
    from ..output import say

    below: list[tuple[str, dict[str, Any]]] = []
    for entry in node.get("", []):
        below += [(_text(line), {}) for line in entry["lines"]]
    for part, child in node.items():
        if part:
            own = child.get("", [])
            cls = f" ({own[0]['class']})" if own and own[0]["class"] else ""
            count = f", {own[0]['count']} times" if own and own[0]["count"] > 1 else ""
            below.append((f"{'each block' if part == '*' else part}{cls}{count}", child))
    for i, (text, child) in enumerate(below):
        last = i == len(below) - 1
        say(f"{indent}{'└── ' if last else '├── '}{text}")
        _show_tree(child, indent + ("    " if last else "│   "))


def _text(line: Mapping[str, Any]) -> str:
    shape = f" {list(line['shape'])}" if line["shape"] is not None else ""
    name = {"argument": line["name"], "output": f"output {line['name']}", "module": ""}[line["place"]]
    return f"{name}{shape}: {line['text']}" if name else line["text"]
