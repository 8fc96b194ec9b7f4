"""Plans by model class. Classes are identified by name, so that none needs to be imported."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import AttentionProviderError
from .plan import Plan, PlanOfModel
from .uncovered import UNCOVERED

# The files of this folder that hold plans.
_NAMES = """
    ace_step allegro anyflow anyflow_far aura_flow bria bria_fibo2 chroma chronoedit cogvideox cogview3plus cogview4
    consisid controlnets cosmos cosmos3 easyanimate ernie_image flux flux2 flux3 framepack glm_image helios hidream
    hunyuan_dit hunyuan_image hunyuan_video hunyuan_video15 ideogram4 joyimage kandinsky5 kandinsky6
    kandinsky6_sr krea2 latte longcat_audio longcat_image ltx ltx2 lumina2 lumina_next minimax_h3
    minimax_music3 mochi motif_video nucleus_moe omnigen ovis_image pixart prx qwenimage qwenimage21
    sana sana_video sana_wm sana_wm_refiner sd3 skyreels_v2 stable_audio stable_audio3 temporal wan wan_animate
    wan_animate2 wan_vace zimage
"""
_FAMILIES = tuple(importlib.import_module(f".{name}", __package__) for name in _NAMES.split())
_plans: dict[str, Plan | PlanOfModel] = {name: plan for family in _FAMILIES for name, plan in family.PLANS.items()}


def register_cp_plan(cls_or_name: type | str, plan: Plan | PlanOfModel) -> None:
    """Registers a plan for a model class and its subclasses. Replaces an earlier plan of this class.

    Args:
        cls_or_name: the class or its name.
        plan: the plan, or a function that returns the plan for a model.
    """
    _plans[cls_or_name if isinstance(cls_or_name, str) else cls_or_name.__name__] = plan


def get_cp_plan(model: Any) -> Plan:
    """The plan registered for a model's class, or else for its nearest base class.

    Raises:
        AttentionProviderError: there is none. The message has the reason if the class cannot be split.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _plans:
            plan = _plans[cls.__name__]
            return plan(model) if callable(plan) else plan
        if cls.__name__ in UNCOVERED:
            raise AttentionProviderError(
                f"{uncovered(model)} To use your own plan, register it with "
                f"register_cp_plan({type(model).__name__!r}, {{...}})."
            )
    raise AttentionProviderError(
        f"no context-parallel plan is registered for {type(model).__name__}; diffusers_attn.list_cp_plans() lists the "
        "classes with a plan. To write one, see docs/writing_plans.md; then pass plan=..., or register it with "
        f"register_cp_plan({type(model).__name__!r}, {{...}})."
    )


def registered_plan(name: str) -> Plan | PlanOfModel:
    """The plan registered for a class of this name, or the function that returns the plan for a model.

    Raises:
        KeyError: there is none.
    """
    return _plans[name]


def uncovered(model: Any) -> str | None:
    """The reason why a model's class has no plan, and what to do instead; None unless the class is in `UNCOVERED`."""
    for cls in type(model).__mro__:
        if cls.__name__ in _plans:
            return None
        if cls.__name__ in UNCOVERED:
            reason, instead = UNCOVERED[cls.__name__]
            return f"{type(model).__name__} has no context-parallel plan. {reason} {instead}"
    return None


def list_cp_plans() -> list[str]:
    """The names of the classes that have a plan."""
    return sorted(_plans)
