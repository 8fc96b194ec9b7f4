"""Plans by class of model. Classes are known by name, so that none needs importing."""

from __future__ import annotations

from typing import Any

from ..errors import AttentionProviderError
from . import chronoedit, cogvideox, cogview4, flux, flux2, helios, ltx, ltx2, minimax_h3, qwenimage, wan
from .plan import Plan

_FAMILIES = (chronoedit, cogvideox, cogview4, flux, flux2, helios, ltx, ltx2, minimax_h3, qwenimage, wan)
_plans: dict[str, Plan] = {name: plan for family in _FAMILIES for name, plan in family.PLANS.items()}


def register_cp_plan(cls_or_name: type | str, plan: Plan) -> None:
    """Makes `plan` the one that models of this class (or of a class of this name), and of its subclasses, are given.
    An earlier one is replaced."""
    _plans[cls_or_name if isinstance(cls_or_name, str) else cls_or_name.__name__] = plan


def get_cp_plan(model: Any) -> Plan:
    """The plan for a model: that of its class, else of the nearest class that it derives from.

    Raises:
        AttentionProviderError: there is none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _plans:
            return _plans[cls.__name__]
    raise AttentionProviderError(
        f"no context-parallel plan is registered for {type(model).__name__}. There are plans for "
        f"{', '.join(list_cp_plans())}. Pass one (plan=...), or register it: "
        f"register_cp_plan({type(model).__name__!r}, {{...}}); the docstring of "
        "diffusers_attn.cp_plans.plan shows how one is written."
    )


def list_cp_plans() -> list[str]:
    """The names of the classes that have a plan."""
    return sorted(_plans)
