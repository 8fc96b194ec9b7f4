"""The command line of a training run: one argparse argument per setting of `TrainConfig`, a run file and a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..once import print_once
from .choices import AUTO, LOW_VRAM
from .flag_names import option
from .recipes import recipe_file, recipes
from .run_file import SUFFIXES, read_run_file
from .setting import default_of, did_you_mean, is_list, is_switch, metadata_of, not_none, value_type


def make_parser(
    config: type[Any], groups: Mapping[str, str], required: Sequence[str], **settings: Any
) -> argparse.ArgumentParser:
    """A parser with an argument for every setting, and --config and --recipe. Options that are not given have no value.

    Args:
        config: dataclass of settings.
        groups: the first setting of each group, and the group's heading in --help.
        required: names of the settings that must be given, on the command line or in a run file.
        settings: arguments of `argparse.ArgumentParser`, and `list_settings`: the option of the program that lists all
            settings, for error messages; default "--help".
    """
    usage = " ".join(f"--{name} {_metavar(name, str)}" for name in required)
    parser = _Parser(
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage=f"%(prog)s [--recipe NAME] [--config FILE] {usage} [settings]",
        **settings,
    )
    group: Any = parser.add_argument_group("recipes and run files")
    group.add_argument(
        "--recipe", metavar="NAME", help=f"Settings for a model on a GPU: {', '.join(recipes())} (default: none)"
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help=f"Run file ({', '.join(SUFFIXES)}) with settings by name, such as `rank: 16`; it overrides a recipe, and "
        "the command line overrides both (default: none)",
    )
    group.add_argument(
        "--low_vram",
        action="store_true",
        help="Short for " + " ".join(option(name, value) for name, value in LOW_VRAM.items()) + "; settings that are "
        "given besides have precedence, those of a recipe have not",
    )
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        if not metadata_of(field).in_files_only:
            _add(group, field, hints[field.name], field.name in required)
    return parser


def given_settings(
    parser: argparse.ArgumentParser, config: type[Any], arguments: Sequence[str] | None
) -> dict[str, Any]:
    """The settings that a command line, its run file and its recipe give, by name.

    Args:
        parser: from `make_parser`.
        config: dataclass of settings.
        arguments: the command line; None for that of this process.

    Raises:
        TrainingError: the run file or the recipe is not accepted.
    """
    given = vars(parser.parse_args(arguments))
    file = given.pop("config", None)
    found = {} if file is None else read_run_file(Path(file), config, others={"recipe": str, "low_vram": bool})
    found |= given
    if found.pop("low_vram", False):
        found = LOW_VRAM | found
    recipe = found.pop("recipe", None)
    return found if recipe is None else read_run_file(recipe_file(recipe), config) | found


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, list_settings: str = "--help", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.list_settings = list_settings
        """The option of the program that lists all settings."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, with the nearest option in the error for an unknown one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((each for each in unknown if each.startswith("--")), "").partition("=")[0]
            near = did_you_mean(name, [each for each in self._option_string_actions if each.startswith("--")])
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{near}")
        return found

    def error(self, message: str) -> NoReturn:
        """Prints the message without the long usage, on one process of the job, and exits."""
        print_once(f"{self.prog}: {message}\nAll settings: {self.prog} {self.list_settings}")
        self.exit(2)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def _add(group: Any, field: dataclasses.Field[Any], hint: Any, required: bool) -> None:
    """Adds the argument of a setting to an argparse group."""
    name, default, metadata = field.name, default_of(field), metadata_of(field)
    hint = not_none(hint)
    if hint is bool:
        text = f"{metadata.help} (default: {'on' if default else 'off'})"
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    if is_switch(hint):
        text = f"{metadata.help} (default: {str(default).lower()})"
        choices = "{" + ",".join(_SWITCH) + "}"
        group.add_argument(f"--{name}", nargs="?", const=True, type=_switch, metavar=choices, help=text)
        group.add_argument(f"--no-{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        return
    text = f"{metadata.help} (required)" if required else metadata.help
    if default not in (None, ""):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = f"{text} (default: {shown})"
    metavar = None if metadata.choices else _metavar(name, hint)
    common: dict[str, Any] = {"type": value_type(hint), "help": text, "metavar": metavar}
    if is_list(hint):
        group.add_argument(f"--{name}", nargs="+", choices=metadata.choices, **common)
    else:
        group.add_argument(f"--{name}", choices=metadata.choices, **common)


_SWITCH = {AUTO: AUTO, "true": True, "false": False}


def _switch(text: str) -> Any:
    """The value of a switch. Without one, as in `--compile`, it is true."""
    if text.lower() not in _SWITCH:
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(_SWITCH)})")
    return _SWITCH[text.lower()]


def _metavar(name: str, hint: Any) -> str:
    """ "N" for an integer, "X" for another number, else the last word of the name, such as "DIR"."""
    return {int: "N", float: "X"}.get(value_type(hint)) or name.rsplit("_", 1)[-1].upper()
