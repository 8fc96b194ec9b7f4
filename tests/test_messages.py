"""The form of error messages: commands in them are clearly delimited."""

from __future__ import annotations

import ast
import pickle
import re
import traceback
from collections.abc import Iterator

import pytest

from diffusers_attn import AttentionProviderError, attention_provider
from diffusers_attn.errors import PAGE, SECTIONS
from diffusers_attn.providers import registry
from diffusers_attn.providers.catalog import SPECS

from .documents import ROOT, slug

COMMAND = re.compile(r"(?:pip|apt-get) install|(?:accelerate launch|torchrun) -")


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string that a module makes, but for docstrings; what it puts in is `{}`, or `'{}'` by its repr."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(
                    str(part.value)
                    if isinstance(part, ast.Constant)
                    else "'{}'"
                    if isinstance(part, ast.FormattedValue) and part.conversion == ord("r")
                    else "{}"
                    for part in node.values
                ),
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
    tree = ast.parse('"doc"\ndef f(x):\n    raise ValueError(f"no {x!r}: pip install {x} " "Or `pip install y`.")')
    assert [unquoted(text) for _, text in texts(tree)] == [["pip install {} Or `pip install y`."]]


@pytest.mark.parametrize("name", SPECS)
def test_every_provider_that_is_not_here_says_how_to_install_it(name: str) -> None:
    status = registry.provider_status(name)
    message = str(registry.unavailable(status))
    commands = (status.install is not None) + ("pip install kernels" in status.shortest)
    assert not unquoted(message) and message.count("`") == 2 * commands
    if status.install:
        assert f" Install it with `{status.install}`. Providers available here: " in message


def test_the_page_of_errors_quotes_the_code() -> None:
    """Every quoted message is made somewhere in the package, and every section that an error names is there."""
    made = [text for path in (ROOT / "diffusers_attn").rglob("*.py") for _, text in texts(ast.parse(path.read_text()))]
    sections = {}
    for section in (ROOT / PAGE).read_text().split("\n## ")[1:]:
        quotes = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
        sections[slug(section.partition("\n")[0])] = "".join(quotes)
        for quote in "".join(quotes).splitlines():
            parts = [re.escape(part) for part in quote.split("…")]
            assert any(re.search(".*".join(parts), text) for text in made), quote
    for part, name in SECTIONS.items():
        assert part in sections[name], f"{part!r} is not in the section {name!r}"


def test_an_error_names_its_page_below_its_message() -> None:
    with pytest.raises(AttentionProviderError, match="Did you mean 'flash'") as caught:
        attention_provider("flahs")
    assert traceback.format_exception(caught.value)[-1].strip() == f"See {PAGE}#an-unknown-provider"
    caught.value.add_note("another")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (
        copy.__notes__ == [f"See {PAGE}#an-unknown-provider", "another"] and not AttentionProviderError("x").__notes__
    )
