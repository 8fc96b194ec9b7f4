"""Run files: the settings of a run by their names, in YAML or TOML.

    recipe: flux2-klein
    data: photos/
    output_dir: lora/
    resolution: [512, 768]
    learning_rate: 1e-4

Paths are relative to the working directory, as on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from .setting import check_value, did_you_mean, file_value, metadata_of

SUFFIXES = (".yaml", ".yml", ".toml")
RESOLVED = "settings.yaml"
"""File in the output folder with the settings of the run, defaults included."""


def read_run_file(path: Path, config: type[Any], others: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Reads and checks a run file.

    Args:
        path: the file; its suffix is one of `SUFFIXES`.
        config: dataclass of settings.
        others: names that are accepted besides the settings, and the type of their values.

    Returns:
        The settings in the file by name, with the types of `config`.

    Raises:
        TrainingError: the file cannot be read, a name is unknown or occurs twice, or a value is not accepted.
    """
    hints = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    others = others or {}
    found = {}
    for name, value in _parse(path).items():
        if name in others:
            found[name] = file_value(name, value, others[name])
            continue
        if name not in fields:
            raise TrainingError(f"{path}: {str(name)!r} is not a setting.{did_you_mean(str(name), [*fields, *others])}")
        try:
            if metadata_of(fields[name]).in_files_only:
                found[name] = value  # checked by the dataclass
                continue
            found[name] = file_value(name, value, hints[name])
            check_value(name, found[name], hints[name], metadata_of(fields[name]))
        except TrainingError as error:
            raise TrainingError(f"{path}: {error}") from error
    return found


def write_run_file(path: Path, settings: Mapping[str, Any], groups: Mapping[str, str], heading: str) -> None:
    """Writes settings as YAML. Settings that are None are left out, since their defaults depend on other settings.

    Args:
        path: the file, which is replaced atomically.
        settings: values by name, in the order in which they are written.
        groups: the first setting of each group, and a comment above it.
        heading: comment at the top of the file, of one or more lines.
    """
    import yaml

    from ..data.disk import write_file

    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    comment = None
    for name, value in settings.items():
        comment = groups.get(name, comment)
        if value is None:
            continue
        if comment:
            lines += ["", f"# {comment}"]
            comment = None
        shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1e9)
        lines.append(f"{name}: {shown.removesuffix('...' + chr(10)).rstrip()}")
    text = "\n".join(lines) + "\n"
    write_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"), "the run's settings")


def _parse(path: Path) -> dict[Any, Any]:
    if path.suffix not in SUFFIXES:
        raise TrainingError(f"--config {path}: a file that ends in {', '.join(SUFFIXES)} is accepted.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not text in UTF-8"
        raise TrainingError(f"--config {path} cannot be read: {reason}.") from error
    if path.suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(text)
        except ValueError as error:
            raise TrainingError(f"{path} is not valid TOML: {error}") from error
    found = parse_yaml(path, text)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise TrainingError(
            f"{path}: names with values are accepted, such as `rank: 16`, not a {type(found).__name__}."
        )
    return found


def parse_yaml(path: Path, text: str) -> Any:
    """The values in the text of a YAML 1.2 file, which may be JSON. Raises TrainingError, which names `path`."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise TrainingError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


@functools.cache
def _loader() -> Any:
    """A loader of YAML 1.2.

    PyYAML reads YAML 1.1, in which `mixed_precision: no` is false and `learning_rate: 1e-4` is a text. It also accepts
    a name twice, and ignores the first.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    return Loader
