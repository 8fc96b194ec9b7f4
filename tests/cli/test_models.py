"""`models` lists the classes, and draws a plan with the shapes of a tiny model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusers_attn import list_cp_plans
from diffusers_attn.cli import main
from diffusers_attn.cli.models.plan_in_words import TEXTS, lines_of
from diffusers_attn.cp_plans import advanced, plan
from diffusers_attn.cp_plans.plan import CPAttention, CPInput, CPOutput, ParamId, entries
from diffusers_attn.cp_plans.registry import registered_plan
from diffusers_attn.cp_plans.uncovered import UNCOVERED


def models(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, ["models", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_all_classes_are_listed() -> None:
    rows = json.loads(models("--json"))["models"]
    assert [row["class"] for row in rows] == [*list_cp_plans(), *UNCOVERED]
    (wan,) = [row for row in rows if row["class"] == "WanTransformer3DModel"]
    assert wan == {"class": "WanTransformer3DModel", "plan": True, "sequences": ["video"], "typical_tokens": 32760}
    lines = models().splitlines()
    assert lines[0].split() == ["class", "split", "sequences", "typical", "tokens"]
    assert any(line.split() == ["FluxTransformer2DModel", "image,", "text", "4,608"] for line in lines)


def test_a_part_of_a_name_lists_the_classes_that_have_it() -> None:
    text = models("ltx")
    assert "LTXVideoTransformer3DModel" in text and "LTX2VideoTransformer3DModel" in text and "Flux" not in text


def test_a_class_without_a_plan_has_its_reason() -> None:
    assert "Its sequences have 81 tokens" in models("PriorTransformer")
    (row,) = json.loads(models("PriorTransformer", "--json"))["models"]
    assert row["plan"] is False and row["instead"].startswith("Run it unsplit")


def test_an_unknown_class_is_an_error_that_names_similar_ones() -> None:
    result = CliRunner().invoke(main.app, ["models", "FluxTransfomer2DModel"])
    assert result.exit_code == 2 and "Did you mean FluxTransformer2DModel" in result.stderr


def test_a_plan_is_drawn_with_the_shapes_of_a_forward() -> None:
    lines = models("WanTransformer3DModel").splitlines()
    assert lines[0] == "WanTransformer3DModel: split sequences: video; typically 32,760 tokens"
    assert "│   ├── output 0 [1, 175, 1, 16]: split along dimension 1 (video)" in lines
    assert "│   │   └── hidden_states [2, 175, 64]: split along dimension 1 (video)" in lines
    assert "    └── output 0 [2, 175, 16]: gathered along dimension 1 (video)" in lines
    assert "│       ├── attn1 (WanAttention), 2 times" in lines


def test_a_plan_that_depends_on_the_configuration_is_that_of_the_tiny_model() -> None:
    (drawn,) = json.loads(models("NucleusMoEImageTransformer2DModel", "--json"))["models"]
    assert callable(registered_plan(drawn["class"])) and drawn["sequences"] and drawn["entries"]
    assert all(
        set(line) == {"place", "name", "word", "text", "shape"} for each in drawn["entries"] for line in each["lines"]
    )


def test_every_plan_word_has_a_text() -> None:
    words = {
        each for each in vars(advanced).values() if isinstance(each, type) and each.__module__ == advanced.__name__
    }
    assert set(TEXTS) == words | {CPInput, CPOutput, CPAttention}
    for name in list_cp_plans():
        registered = registered_plan(name)
        for _, spec in [] if callable(registered) else entries(registered):
            assert all(line.text for line in lines_of(spec))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({ParamId("x"): [None, CPInput(-2, sequence="a")]}, [("argument", "x[1]", "split along dimension -2 (a)")]),
        ({ParamId(index=1): CPInput(1, split_output=True)}, [("output", "1", "split along dimension 1")]),
        ({"kwargs": {"mask": CPInput(2)}}, [("argument", "kwargs.mask", "split along dimension 2")]),
        ([None, CPOutput(1, sequence=("a", "b"))], [("output", "1", "gathered along dimension 1 (a + b)")]),
        (CPAttention(("a",), key=("b",)), [("module", "", "attention of a to b, across ranks")]),
        (CPAttention((), key=()), [("module", "", "attention on complete tokens, the same on every rank")]),
    ],
)
def test_entries_in_words(spec: Any, expected: list[tuple[str, str, str]]) -> None:
    assert [(line.place, line.name, line.text) for line in lines_of(spec)] == expected
    assert plan.entries({"": spec})
