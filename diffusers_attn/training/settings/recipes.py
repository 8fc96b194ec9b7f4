"""Recipes: run files that ship with the package, each with the settings for a model on a GPU."""

from __future__ import annotations

from pathlib import Path

from ..errors import TrainingError
from .setting import did_you_mean

FOLDER = Path(__file__).with_name("recipe_files")


def recipes() -> dict[str, str]:
    """The names of all recipes, each with its description, the first line of its file."""
    return {path.stem: path.read_text().splitlines()[0].lstrip("# ") for path in sorted(FOLDER.glob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """The file of a recipe.

    Raises:
        TrainingError: there is no recipe of this name.
    """
    names = list(recipes())
    if name not in names:
        raise TrainingError(f"--recipe {name}: accepted are {', '.join(names)}.{did_you_mean(name, names)}")
    return FOLDER / f"{name}.yaml"
