"""What all errors share: where a command in one ends is plain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from diffusers_attn.providers import registry
from diffusers_attn.providers.catalog import SPECS

from .test_quickstart import ROOT

COMMAND = re.compile(r"(?:pip|apt-get) install|(?:accelerate launch|torchrun) -")


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string that a module makes, but for docstrings; what it puts in is `{}`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        else:
            yield from texts(node)


def unquoted(text: str) -> list[str]:
    """The commands in `text` that are not within backticks. One that is all of the text is data, and not a message."""
    found = [match for match in COMMAND.finditer(text) if match.start() > 0]
    return [text[match.start() :] for match in found if text[: match.start()].count("`") % 2 == 0]


@pytest.mark.parametrize("folder", ["diffusers_attn", "examples"])
def test_commands_in_messages_are_quoted(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {command}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in texts(ast.parse(path.read_text()))
        for command in unquoted(text)
    ]
    assert not found, "put these within backticks:\n" + "\n".join(found)


def test_what_looks_for_them_finds_them() -> None:
    tree = ast.parse('"doc"\ndef f(x):\n    raise ValueError(f"no {x}: pip install {x} " "Or `pip install y`.")')
    assert [unquoted(text) for _, text in texts(tree)] == [["pip install {} Or `pip install y`."]]


@pytest.mark.parametrize("name", SPECS)
def test_every_provider_that_is_not_here_says_how_to_install_it(name: str) -> None:
    status = registry.provider_status(name)
    message = str(registry.unavailable(status))
    commands = (status.install is not None) + ("pip install kernels" in status.shortest)
    assert not unquoted(message) and message.count("`") == 2 * commands
    if status.install:
        assert f" Install it with `{status.install}`. Providers available here: " in message
