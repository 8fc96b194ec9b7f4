"""`verify` finds models and inputs by class, in a pipeline's folder and in a Python file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffusers_attn import AttentionProviderError, get_cp_plan
from diffusers_attn.cli import main
from diffusers_attn.cli.verify.cases import cases_of
from diffusers_attn.verify_plan import verify as library

from ..documents import ROOT
from ..verify_plan.on_pool import verify_on_pool

FILE = """
from diffusers_attn.tiny_models import CASES

def case():
    return CASES["wan"].build(), CASES["wan"].inputs(), {"proj_out": None}

def other():
    return CASES["wan"].build(), CASES["wan"].inputs()

def wrong():
    return 1
"""


@pytest.fixture
def on_pool(pool, tmp_path, monkeypatch):
    """The processes of `verify_cp_plan` are those of the pool. Returns the plans of the calls."""
    plans = []

    def verify_cp_plan(model, inputs, plan, world_size, *, strategies, gradients, **_):
        plans.append(plan)
        plan = get_cp_plan(model) if plan is None else plan
        return verify_on_pool(pool, tmp_path, "flux", plan, model, inputs, strategies, gradients)

    monkeypatch.setattr(library, "verify_cp_plan", verify_cp_plan)
    return plans


def test_the_tiny_models_of_a_class(on_pool) -> None:
    result = CliRunner().invoke(main.app, ["verify", "FluxTransformer2DModel", "--strategy", "ulysses"])
    assert result.exit_code == 0 and "ulysses: right" in result.output and "as it must be" in result.output
    assert on_pool == [None]


def test_a_wrong_plan_is_exit_code_1_and_names_the_module(on_pool, tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("wrong") / "wrong_plan.py"
    file.write_text(
        "from diffusers_attn import get_cp_plan\n"
        "from diffusers_attn.tiny_models import CASES\n"
        "def case():\n"
        "    model = CASES['flux'].build()\n"
        "    plan = {name: spec for name, spec in get_cp_plan(model).items() if name != 'proj_out'}\n"
        "    return model, CASES['flux'].inputs(), plan\n"
    )
    result = CliRunner().invoke(main.app, ["verify", str(file), "--strategy", "gather", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["ok"] is False and found["schema"] == "diffusers-attn/verify/1"
    (report,) = found["reports"]
    (strategy,) = report["strategies"]
    assert strategy["name"] == "gather" and strategy["right"] is False
    assert strategy["difference"]["module"] is not None and report["ranks"] == 2


def test_the_transformer_of_a_pipeline_with_the_inputs_of_its_first_step() -> None:
    (case,) = cases_of(str(ROOT / "examples/tiny_flux"), {"height": 64, "width": 32})
    assert case.name == "transformer (FluxTransformer2DModel) of tiny_flux" and case.plan is None
    assert case.inputs["hidden_states"].shape[:2] == (1, 32 * 16)  # two pixels a token in each direction
    with torch.no_grad():
        case.model(**case.inputs)


def test_functions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "some_cases.py"
    file.write_text(FILE)
    (case,) = cases_of(str(file), {})
    assert case.plan == {"proj_out": None} and case.name == "WanTransformer3DModel of some_cases.py"
    (case,) = cases_of(f"{file}:other", {})
    assert case.plan is None and "hidden_states" in case.inputs


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("{folder}/some_cases.py:missing", "has no function missing()"),
        ("{folder}/some_cases.py:wrong", "returned int"),
        ("{folder}/no_such.py", "there is no file"),
        ("{folder}", "no model_index.json"),
        ("{folder}/nothing", "is no folder and no Python file"),
        ("UNet2DConditionModel", "has no context-parallel plan"),
        ("Flux", "stands for several model classes"),
        ("NoSuchModel", "there is no model class"),
    ],
)
def test_targets_that_are_not_accepted(tmp_path: Path, target: str, expected: str) -> None:
    (tmp_path / "some_cases.py").write_text(FILE)
    with pytest.raises(AttentionProviderError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        list(cases_of(target.format(folder=tmp_path), {}))


def test_arguments_that_a_pipeline_does_not_take() -> None:
    with pytest.raises(AttentionProviderError, match="FluxPipeline takes no num_frames"):
        list(cases_of(str(ROOT / "examples/tiny_flux"), {"num_frames": 5}))
    with pytest.raises(AttentionProviderError, match="could not be called with"):
        list(cases_of(str(ROOT / "examples/tiny_flux"), {"prompt": 5}))
