"""Every transformer class of diffusers has a plan or is listed as uncovered, also those of a new release."""

from __future__ import annotations

import importlib
import pkgutil

import diffusers
import pytest
from diffusers.models.modeling_utils import ModelMixin

from diffusers_attn import AttentionProviderError, get_cp_plan, list_cp_plans
from diffusers_attn.cp_plans.registry import _FAMILIES
from diffusers_attn.cp_plans.uncovered import UNCOVERED

from ..context_parallel.model_cases import COMPARED
from ..zoo import CASES

PACKAGES = ("transformers", "unets", "controlnets")
PLANS = {name for family in _FAMILIES for name in family.PLANS}

# Models that no case of the zoo builds, with the reason.
WITHOUT_A_CASE = {
    "ControlNetXSAdapter": "has no forward; UNetControlNetXSModel takes its weights over",
    "CosmosControlNetModel": "resizes its mask with torchvision; its attention is that of CosmosTransformer3DModel",
    "MotionAdapter": "has no forward; UNetMotionModel takes its weights over",
    "UNet1DModel": "has no attention module with a processor",
    "ZImageControlNetModel": "runs on modules of a ZImageTransformer2DModel; see tests/processors/test_routing.py",
}


def denoisers() -> dict[str, type]:
    """The classes of all models in diffusers that a pipeline runs at every step, by name."""
    found: dict[str, type] = {}
    for package in PACKAGES:
        where = importlib.import_module(f"diffusers.models.{package}")
        for info in pkgutil.walk_packages(where.__path__, f"{where.__name__}."):
            for name, cls in vars(importlib.import_module(info.name)).items():
                if isinstance(cls, type) and issubclass(cls, ModelMixin) and cls.__module__ == info.name:
                    found[name] = cls
    return found


def test_every_class_has_a_plan_or_a_reason() -> None:
    classes = set(denoisers())
    assert len(classes) > 100
    new = classes - PLANS - set(UNCOVERED)
    assert not sorted(new), (
        "diffusers has classes with neither a plan in cp_plans/ nor a reason in cp_plans/uncovered.py"
    )


def test_every_plan_is_compared_with_one_process() -> None:
    compared = {CASES[name.partition(",")[0]].model_class for family in COMPARED.values() for name in family.MODELS}
    assert not sorted(PLANS - compared), "plans that no model of tests/context_parallel/model_cases runs under"


def test_every_name_is_one_of_diffusers() -> None:
    classes = set(denoisers())
    assert not PLANS - classes, "plans are registered for classes that diffusers does not have"
    assert not set(UNCOVERED) - classes, "reasons are given for classes that diffusers does not have"
    assert not set(UNCOVERED) & PLANS, "classes with a plan are listed as uncovered"


def test_every_class_has_a_case_in_the_zoo_or_a_reason() -> None:
    classes = denoisers()
    built = {case.model_class for case in CASES.values()}
    # A container of ControlNets has nothing of its own.
    several = {name for name in classes if "Multi" in name}
    assert not sorted(set(classes) - built - several - set(WITHOUT_A_CASE)), "no tiny model is one of these"
    assert set(WITHOUT_A_CASE) <= set(classes) - built
    assert built <= set(classes)


@pytest.mark.parametrize("name", ["PriorTransformer", "UNet2DConditionModel", "SD3MultiControlNetModel"])
def test_who_asks_for_an_uncovered_class_is_told_why(name: str) -> None:
    cls = getattr(diffusers, name)
    reason, instead = UNCOVERED[name]
    for asked in (cls, type("Mine", (cls,), {})):
        model = asked.__new__(asked)
        with pytest.raises(AttentionProviderError) as error:
            get_cp_plan(model)
        for part in (asked.__name__, reason, instead, f"register_cp_plan('{asked.__name__}'"):
            assert part in str(error.value)


def test_a_plan_of_ones_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_attn.cp_plans import registry

    monkeypatch.setattr(registry, "_plans", dict(registry._plans))
    model = diffusers.PriorTransformer.__new__(diffusers.PriorTransformer)
    registry.register_cp_plan("PriorTransformer", {})
    assert get_cp_plan(model) == {} and "PriorTransformer" in list_cp_plans()


def test_a_reason_is_a_whole_sentence() -> None:
    for name, uncovered in UNCOVERED.items():
        assert all(text[0].isupper() and text.endswith(".") for text in uncovered), name
