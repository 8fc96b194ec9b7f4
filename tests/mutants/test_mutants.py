"""Mutants are what they say, and a trial notices them."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from diffusers_attn import masks

from ..launching import run
from . import trial
from .__main__ import FILE
from .mutate import Mutant, code_of, mutants
from .targets import TARGETS

SOURCE = textwrap.dedent('''\
    class Box:
        @classmethod
        def fits(cls, size, limit=3):
            """A docstring with 3 numbers."""
            if size is None or size < 0:
                raise ValueError(f"{size} of {limit + 1}")
            return size + 1 <= limit
''')


def test_what_is_changed():
    found = [(each.line, each.function, each.change) for each in mutants("box", SOURCE)]
    assert found == [
        (5, "Box.fits", "And in `size is None or size < 0`"),
        (5, "Box.fits", "IsNot in `size is None`"),
        (5, "Box.fits", "LtE in `size < 0`"),
        (5, "Box.fits", "1 for 0"),
        (6, "Box.fits", 'without `raise ValueError(f\'{size} of {limit + 1}\')`'),
        (7, "Box.fits", "None for `return size + 1 <= limit`"),
        (7, "Box.fits", "Lt in `size + 1 <= limit`"),
        (7, "Box.fits", "Sub in `size + 1`"),
        (7, "Box.fits", "2 for 1"),
    ]  # fmt: skip


def test_each_change_is_made_alone(tmp_path: Path):
    path = tmp_path / "box.py"
    path.write_text(SOURCE)
    space: dict[str, object] = {}
    exec(SOURCE, space)
    function = vars(space["Box"])["fits"].__func__
    plain = function.__code__
    answers = []
    for mutant in mutants("box", SOURCE):
        function.__code__ = code_of(mutant, path)
        try:
            answers.append([function(None, size) for size in (0, 2, 3)])
        except ValueError:
            answers.append("raises")
    assert answers == [
        [True, True, False], "raises", "raises", "raises", [True, True, False],
        [None, None, None], [True, False, False], [True, True, True], [True, False, False],
    ]  # fmt: skip
    function.__code__ = plain
    assert function(None, 2)


def test_the_modules_exist_and_have_tests():
    for module, tests in TARGETS.items():
        assert mutants(module, trial.path_of(module).read_text())
        assert all(Path(each.partition("::")[0]).exists() for each in tests)


def test_functions_below_decorators():
    for module in TARGETS:
        for mutant in mutants(module, trial.path_of(module).read_text()):
            assert trial.function_of(mutant).__code__.co_name == mutant.function.rpartition(".")[2]
    assert trial.function_of(Mutant("masks", "causal", 0, "", 0)) is masks.causal


def test_recorded_scores():
    rows = json.loads(FILE.read_text())["modules"].values()
    assert all(row["killed"] + len(row["survivors"]) == row["sample"] for row in rows)
    assert sum(row["killed"] for row in rows) >= 0.85 * sum(row["sample"] for row in rows)


@pytest.mark.slow
def test_a_trial():
    """In a process of its own, since it forks: the code as it is passes, a mutant of a mask does not."""
    program = """
from tests.mutants import trial
from tests.mutants.mutate import mutants
tests = ["tests/test_masks.py"]
trial.collect(tests)
print(trial.run(tests, 300.0)[0])
found = mutants("masks", trial.path_of("masks").read_text())
print(trial.run(tests, 300.0, next(each for each in found if each.function == "dead_rows"))[0])
print(trial.run(tests, 0.0)[0])
"""
    result = run([sys.executable, "-c", program])
    assert result.stdout.split() == [trial.SURVIVED, trial.KILLED, trial.LATE], result.stderr
