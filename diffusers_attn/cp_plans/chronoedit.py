"""ChronoEdit: Wan's blocks with a rotary embedding of its own, for two frames far apart. Split as Wan is."""

from . import wan
from .plan import Plan

PLANS: dict[str, Plan] = {"ChronoEditTransformer3DModel": wan.PLANS["WanTransformer3DModel"]}
