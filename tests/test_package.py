"""The package: its version, the files that it ships, and the wheel as a user installs it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import diffusers_attn

from . import launching
from .documents import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = ROOT / "diffusers_attn"


def test_the_version_being_prepared_is_the_same_everywhere() -> None:
    """setuptools-scm reads git tags; the fallback, the changelog and the citation are written by hand."""
    fallback = Version(PROJECT["tool"]["setuptools_scm"]["fallback_version"])
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ["))
    assert newest.startswith(f"## [{fallback.base_version}]")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == fallback.base_version


def test_a_folder_that_was_never_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert diffusers_attn.__version__ == str(Version("0+unknown"))


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without __init__.py can be imported in a checkout, and is missing from the wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


def test_every_other_file_is_named_as_package_data() -> None:
    others = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    named = PROJECT["tool"]["setuptools"]["package-data"]["diffusers_attn"]
    found = {path for pattern in named for path in PACKAGE.glob(pattern)}
    assert not [str(path.relative_to(ROOT)) for path in others if path not in found]


def test_links_of_the_readme_are_relative_while_the_project_has_no_address() -> None:
    """README.md is the page of the package index as well: with an address, its links need that in front."""
    assert "urls" not in PROJECT["project"] and "repository-code" not in (ROOT / "CITATION.cff").read_text()


@pytest.mark.thorough
def test_the_wheel_is_complete_and_its_command_starts(tmp_path: Path) -> None:
    """Builds it from an sdist, as pip does, and installs it into an empty folder, without its dependencies."""
    python = sys.executable
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    launching.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("diffusers_attn-*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    files = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.suffix != ".pyc" and path.is_file()}
    assert shipped == files
    launching.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "there"), str(wheel)], check=True)
    code = "import diffusers_attn; print(diffusers_attn.__file__, diffusers_attn.__version__)"
    there = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "there")}}
    place, version = launching.run([python, "-c", code], check=True, **there).stdout.split()
    assert Path(place).is_relative_to(tmp_path) and version == wheel.name.split("-")[1]
    command = tmp_path / "there" / "bin" / "diffusers-attn"
    assert "doctor" in launching.run([python, command, "--help"], check=True, **there).stdout
