"""docs/command.md shows what the commands print, and no page names an option that a command does not have."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from diffusers_attn.cli import main
from diffusers_attn.training.settings.arguments import make_parser
from diffusers_attn.training.settings.config import TrainConfig

from ..documents import ROOT
from ..test_pages import PAGES

COMMANDS = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["advise wan-14b --gpus 4 --gpu rtx-4090", "models WanTransformer3DModel"])
def test_the_page_shows_what_a_command_prints(command: str) -> None:
    text = (ROOT / "docs" / "command.md").read_text()
    (shown,) = re.findall(rf"^\$ diffusers-attn {re.escape(command)}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    result = CliRunner().invoke(main.app, command.split())
    assert result.output.rstrip() == shown.rstrip()


def test_options_on_pages_exist() -> None:
    trainer = make_parser(TrainConfig, {}, [])._option_string_actions
    found = 0
    for page in PAGES:
        for line in re.sub(r"\\\n", " ", (ROOT / page).read_text()).splitlines():
            for name, arguments in re.findall(r"diffusers-attn (\w+)([^`#]*)", line):
                if name in COMMANDS:
                    known = {option for each in COMMANDS[name].params for option in each.opts} | {"--help"}
                    known |= set(trainer) if name == "train" else set()
                    for option in re.findall(r"(?<!\S)--[\w-]+", arguments):
                        assert option in known, f"{page}: {line}"
                        found += 1
    assert found > 20
