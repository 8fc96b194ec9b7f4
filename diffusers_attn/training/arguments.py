"""The command line of a training run: one argparse argument per setting of `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .once import print_once
from .settings import default_of, is_list, metadata_of, not_none, value_type


def make_parser(
    config: type[Any], groups: Mapping[str, str], required: Sequence[str], **settings: Any
) -> argparse.ArgumentParser:
    """A parser with an argument for every setting.

    Args:
        config: dataclass of settings.
        groups: the first setting of each group, and the group's heading in --help.
        required: names of the settings that must be given.
        settings: arguments of `argparse.ArgumentParser`, and `list_settings`: the option of the program that lists all
            settings, for error messages; default "--help".
    """
    parser = _Parser(formatter_class=_Help, allow_abbrev=False, **settings)
    group: Any = parser
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        _add(group, field, hints[field.name], field.name in required)
    return parser


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, list_settings: str = "--help", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.list_settings = list_settings
        """The option of the program that lists all settings."""

    def error(self, message: str) -> NoReturn:
        """Prints the message without the long usage, on one process of the job, and exits."""
        print_once(f"{self.prog}: {message}\nAll settings: {self.prog} {self.list_settings}")
        self.exit(2)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def _add(group: Any, field: dataclasses.Field[Any], hint: Any, required: bool) -> None:
    """Adds the argument of a setting to an argparse group."""
    name, default, metadata = field.name, default_of(field), metadata_of(field)
    hint = not_none(hint)
    if hint is bool:
        text = f"{metadata.help} (default: {'on' if default else 'off'})"
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    text = f"{metadata.help} (required)" if required else metadata.help
    if default not in (None, ""):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = f"{text} (default: {shown})"
    metavar = None if metadata.choices else _metavar(name, hint)
    common: dict[str, Any] = {"type": value_type(hint), "default": default, "help": text, "metavar": metavar}
    if is_list(hint):
        group.add_argument(f"--{name}", nargs="+", **common)
    else:
        group.add_argument(f"--{name}", choices=metadata.choices, required=required, **common)


def _metavar(name: str, hint: Any) -> str:
    """ "N" for an integer, "X" for another number, else the last word of the name, such as "DIR"."""
    return {int: "N", float: "X"}.get(value_type(hint)) or name.rsplit("_", 1)[-1].upper()
