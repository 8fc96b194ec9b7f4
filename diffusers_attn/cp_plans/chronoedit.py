"""ChronoEdit: Wan's blocks with another rotary embedding, for two frames far apart. Split like Wan."""

from . import wan
from .plan import Plan

PLANS: dict[str, Plan] = {"ChronoEditTransformer3DModel": wan.PLANS["WanTransformer3DModel"]}
