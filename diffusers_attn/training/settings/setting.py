"""How a setting is declared, as a dataclass field with metadata, and the checks of a single value."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import TrainingError
from .bounds import Bounds
from .choices import AUTO
from .flag_names import option

SWITCH = f"{AUTO}, true and false"
"""Values of settings for which `is_switch` holds, in words."""


class Metadata(typing.NamedTuple):
    """What a setting's field carries besides its type and default."""

    help: str
    """Text of --help: a phrase with its unit, and with the default only if that is None."""
    choices: Sequence[str] | None = None
    """Accepted values of a text."""
    bounds: Bounds | None = None
    """Accepted values of the number, or of each number of a list. Every numeric setting has them."""
    length: int | None = None
    """Number of values of a list, if fixed."""
    needs: tuple[str, ...] = ()
    """Name of another setting without which this one has no effect, then the values of it that give this one an
    effect. Without values: every value except None, 0 and False does."""
    in_files_only: bool = False
    """Whether the setting is for run files, and not for the command line."""
    forms: Mapping[str, str] | None = None
    """Accepted forms of a text that has more values than can be listed, each with its regular expression."""


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    bounds: Bounds | None = None,
    length: int | None = None,
    needs: tuple[str, ...] = (),
    in_files_only: bool = False,
    forms: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field for a setting. All arguments but `default` are explained in `Metadata`."""
    metadata = {"setting": Metadata(help, choices, bounds, length, needs, in_files_only, forms)}
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def metadata_of(field: dataclasses.Field[Any]) -> Metadata:
    """The metadata that `setting` attached to a field."""
    metadata: Metadata = field.metadata["setting"]
    return metadata


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value of a setting; a new list for a list."""
    factory: Any = field.default_factory
    return factory() if field.default is dataclasses.MISSING else field.default


def not_none(hint: Any) -> Any:
    """The type of a setting without `| None`."""
    if isinstance(hint, types.UnionType) and not is_switch(hint):
        return next(each for each in typing.get_args(hint) if each is not type(None))
    return hint


def is_switch(hint: Any) -> bool:
    """Whether a setting of this type is true, false, or left to the trainer."""
    return AUTO in (value for each in typing.get_args(hint) for value in typing.get_args(each))


def is_list(hint: Any) -> bool:
    """Whether a setting of this type has several values."""
    return typing.get_origin(not_none(hint)) is list


def value_type(hint: Any) -> Any:
    """The type of a setting's value, or of each value of a list."""
    hint = not_none(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


def check_value(name: str, value: Any, hint: Any, metadata: Metadata) -> None:
    """Checks one setting against its choices, type, bounds and length.

    Args:
        name: name of the setting.
        value: its value.
        hint: its type, such as `list[int] | None`.
        metadata: from `metadata_of`.

    Raises:
        TrainingError: the value is not accepted.
    """
    bounds, length, choices = metadata.bounds, metadata.length, metadata.choices
    given = value if isinstance(value, (list, tuple)) else [value]
    if is_switch(hint) and not isinstance(value, bool) and value != AUTO:
        raise TrainingError(f"{option(name, value)}: accepted are {SWITCH}.")
    if choices is not None and value is not None and not set(given) <= set(choices):
        raise TrainingError(f"{option(name, value)}: accepted are {', '.join(choices)}.")
    if metadata.forms is not None and value is not None:
        if not any(re.fullmatch(form, value) for form in metadata.forms.values()):
            raise TrainingError(f"{option(name, value)}: accepted are {', '.join(metadata.forms)}.")
    if bounds is None or (value is None and type(None) in typing.get_args(hint)):
        return
    several, integers = is_list(hint), value_type(hint) is int
    kind = "whole numbers" if integers else "numbers"
    if several and (not isinstance(value, (list, tuple)) or len(value) != (length or len(value) or 1)):
        count = f"{length} {kind}" if length else f"one or more {kind}"
        raise TrainingError(f"{option(name, value)}: {count} are accepted. {metadata.help}.")
    for each in value if several else [value]:
        if each not in bounds or (integers and not isinstance(each, int)):
            raise TrainingError(f"{option(name, value)}: {kind} {bounds} are accepted.")


def did_you_mean(name: str, names: Collection[str]) -> str:
    """A sentence with the nearest of `names`, with a space before it; "" if none is near."""
    near = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def file_value(name: str, value: Any, hint: Any) -> Any:
    """Converts a value of a run file to the type of its setting, as the command line would.

    Text that is a number is accepted for a number, a number for text, and a single value for a list.

    Args:
        name: name of the setting.
        value: the value as YAML or TOML has it.
        hint: type of the setting, such as `list[int] | None`.

    Raises:
        TrainingError: the value has another type.
    """
    if value is None and type(None) in typing.get_args(hint):
        return None
    kind, several = value_type(hint), is_list(hint)
    if several:
        return [_converted(name, each, kind) for each in (value if isinstance(value, list) else [value])]
    return _converted(name, value, kind)


_EXPECTED = {bool: "true and false", int: "whole numbers", float: "numbers", str: "text"}


def _converted(name: str, value: Any, kind: Any) -> Any:
    if is_switch(kind):
        if isinstance(value, bool) or value == AUTO:
            return value
        raise TrainingError(f"{name}: {value!r}: accepted are {SWITCH}.")
    is_bool, number = isinstance(value, bool), isinstance(value, (int, float))
    if kind is bool and is_bool:
        return value
    if kind is str and not is_bool and (number or isinstance(value, str)):
        return str(value)
    if kind in (int, float) and not is_bool and (number or isinstance(value, str)):
        try:
            # A number with a fraction stays one, and is refused for a whole number with the range that is accepted.
            return value if kind is int and isinstance(value, float) else kind(value)
        except ValueError:
            pass
    raise TrainingError(f"{name}: {value!r}: accepted are {_EXPECTED[kind]}.")
