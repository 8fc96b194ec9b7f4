"""What all commands share: help without PyTorch, exit codes, plain text in pipes."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from diffusers_attn import __version__
from diffusers_attn.cli import main, output
from diffusers_attn.errors import AttentionProviderError

from .. import launching
from .programs import command

COMMANDS = sorted(each.name or each.callback.__name__ for each in main.app.registered_commands)
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from diffusers_attn.cli import main
results = [CliRunner().invoke(main.app, arguments) for arguments in json.loads(sys.argv[1])]
codes = [[each.exit_code, each.output] for each in results]
print(json.dumps([codes, sorted({each.partition(".")[0] for each in sys.modules})]))
"""


def test_help_imports_no_large_package() -> None:
    arguments = json.dumps([["--help"], *([name, "--help"] for name in COMMANDS)])
    done = launching.run([sys.executable, "-c", SCRIPT, arguments], check=True)
    results, modules = json.loads(done.stdout)
    assert len(results) == len(COMMANDS) + 1 and all(code == 0 and "Usage" in text for code, text in results)
    assert not {"torch", "diffusers", "numpy", "transformers", "matplotlib"} & set(modules)


def test_every_option_is_explained() -> None:
    for name in COMMANDS:
        text = CliRunner().invoke(main.app, [name, "--help"], env={"COLUMNS": "200"}).output
        options = [line.split() for line in text.splitlines() if line.startswith("  --")]
        assert options and all(len(words) > 2 for words in options), text


def test_the_version() -> None:
    assert CliRunner().invoke(main.app, ["--version"]).output == f"diffusers-attn {__version__}\n"


def test_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Exception] = []

    def fails() -> None:
        raise raised[-1]

    monkeypatch.setattr(main.app, "registered_commands", list(main.app.registered_commands))
    main.app.command("fails")(fails)
    for error, code in (
        (AttentionProviderError("there is no attention provider 'x'."), 2),
        (ImportError("no torch"), 3),
        (RuntimeError("unexpected"), 3),
    ):
        raised.append(error)
        result = CliRunner().invoke(main.app, ["fails"])
        assert result.exit_code == code and str(error) in result.stderr and result.stdout == ""
        assert ("docs/troubleshooting.md#an-unknown-provider" in result.stderr) == (code == 2)
    assert CliRunner().invoke(main.app, ["no-such-command"]).exit_code == 2


def test_completion_of_shells() -> None:
    done = command("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr


def test_tables_are_plain_in_a_pipe_and_narrow_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("native", "1.5", "the kernel of PyTorch, which runs everywhere " * 4), ("flash", "10.25", "")]
    monkeypatch.setenv("COLUMNS", "40")
    output.table(("provider", "ms", "summary"), rows, numbers=("ms",))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split() == ["provider", "ms", "summary"] and "\x1b" not in "".join(lines)
    assert lines[1].startswith("native      1.5  the kernel")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    output.table(("provider", "ms", "summary"), rows, numbers=("ms",))
    text = capsys.readouterr().out
    assert "\x1b[" in text
    monkeypatch.setenv("NO_COLOR", "1")
    output.table(("provider", "ms", "summary"), rows, numbers=("ms",))
    drawn = capsys.readouterr().out
    assert "\x1b[3" not in drawn and all(len(line) <= 40 for line in drawn.splitlines() if "\x1b" not in line)


def test_json_has_no_infinite_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_json("test", 1, {"error": float("inf"), "rows": [(float("nan"), 1)]})
    assert json.loads(capsys.readouterr().out) == {
        "schema": "diffusers-attn/test/1", "error": None, "rows": [[None, 1]]
    }  # fmt: skip


def test_numbers_have_three_digits() -> None:
    numbers = (0.012345, 4.5678, 12.34, 1250.4, 0.0)
    assert [output.digits(each) for each in numbers] == ["0.0123", "4.57", "12.3", "1,250", "0.0"]
