"""Mutants of a module: its source with one change."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Div: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
_NOT_CODE = (ast.JoinedStr, ast.Raise, ast.arg)
"""Texts of errors, and types, whose parts are not changed."""
_ABOUT_LOGS = ("debugging()", "spans.is_on()", "TYPE_CHECKING", "torch.compiler.is_compiling()", "is_cuda")
"""Conditions of code that only describes what happens, or that a CPU without a compiler never runs."""


class Mutant(NamedTuple):
    module: str
    function: str
    """Qualified name of the function or method of the module that contains the change."""
    line: int
    change: str
    """In words."""
    number: int
    """Of the change, in the module."""


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse(source)
    return [
        Mutant(module, function, node.lineno, words, number)
        for number, (function, node, words, _) in enumerate(_changes(tree))
    ]


def code_of(mutant: Mutant, path: Path) -> CodeType:
    """The code of the mutant's function."""
    tree = ast.parse(path.read_text())
    for number, (_, _, _, apply) in enumerate(_changes(tree)):
        if number == mutant.number:
            apply()
            break
    found = compile(ast.fix_missing_locations(tree), str(path), "exec")
    for name in mutant.function.split("."):
        found = next(each for each in found.co_consts if isinstance(each, CodeType) and each.co_name == name)
    return found


_Change = tuple[str, Any, str, Callable[[], None]]


def _changes(tree: ast.Module) -> Iterator[_Change]:
    """The function, the changed node, the change in words, and what makes it."""

    def of_body(body: list[ast.stmt], names: tuple[str, ...]) -> Iterator[_Change]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from of_body(node.body, (*names, node.name))
            elif isinstance(node, ast.FunctionDef) and node.name not in ("__repr__", "__str__"):
                for each in _in_statements(node, "body"):
                    yield (".".join((*names, node.name)), *each)

    yield from of_body(tree.body, ())


def _in_statements(owner: Any, field: str) -> Iterator[tuple[Any, str, Callable[[], None]]]:
    statements = getattr(owner, field)
    for index, node in enumerate(statements):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.If) and any(words in ast.unparse(node.test) for words in _ABOUT_LOGS):
            continue
        text = ast.unparse(node).partition("\n")[0][:60]
        if isinstance(node, (ast.Raise, ast.Expr)):
            yield node, f"without `{text}`", _set(statements, index, ast.copy_location(ast.Pass(), node))
        if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            yield node, f"None for `{text}`", _set_field(node, "value", ast.Constant(None))
        for name, value in ast.iter_fields(node):
            if name not in ("body", "orelse", "finalbody", "handlers", "annotation", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from _in_expression(node, child)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, name, None), list):
                yield from _in_statements(node, name)


def _in_expression(owner: Any, node: Any) -> Iterator[tuple[Any, str, Callable[[], None]]]:
    if isinstance(node, _NOT_CODE) or isinstance(owner, _NOT_CODE):
        return
    text = ast.unparse(node)[:60]
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            other = _COMPARISONS[type(operator)]
            yield node, f"{other.__name__} in `{text}`", _set(node.ops, index, other())
    elif isinstance(node, ast.BoolOp):
        other_operator = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield node, f"{other_operator.__name__} in `{text}`", _set_field(node, "op", other_operator())
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        arithmetic = _OPERATORS[type(node.op)]
        yield node, f"{arithmetic.__name__} in `{text}`", _set_field(node, "op", arithmetic())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert, ast.USub)):
        yield node, f"no {type(node.op).__name__} in `{text}`", _become(node, node.operand)
    elif isinstance(node, ast.IfExp):
        swapped = copy.copy(node)
        swapped.body, swapped.orelse = node.orelse, node.body
        yield node, f"branches of `{text}` exchanged", _become(node, swapped)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, f"{not node.value}", _set_field(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield node, f"{node.value + 1} for {node.value}", _set_field(node, "value", node.value + 1)
    for child in ast.iter_child_nodes(node):
        yield from _in_expression(node, child)


def _is_none(node: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _set(values: list[Any], index: int, value: Any) -> Callable[[], None]:
    return lambda: values.__setitem__(index, value)


def _set_field(node: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def _become(node: Any, other: Any) -> Callable[[], None]:
    """Makes a node another one, wherever it is referenced from."""

    def apply() -> None:
        replacement = copy.copy(other)
        node.__class__, node.__dict__ = type(replacement), vars(replacement)

    return apply
