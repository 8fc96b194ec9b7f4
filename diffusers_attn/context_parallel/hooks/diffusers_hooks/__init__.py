"""diffusers' own hooks within a model that is split: which are exact, which are made exact, and which are refused.

diffusers' caches, guiders and offloading put hooks around the forward of blocks and layers (`HookRegistry`). Such a
hook runs within the hooks of a plan, in whichever order the two were set, and receives this rank's tokens. That is
exact if it computes each token separately. It is not if the hook averages over tokens, treats them as a picture, or
decides by them whether to compute at all.

`rules` has a line for every hook class of diffusers. A class without one is refused (`refusal`), when context
parallelism is enabled and when the hook is registered later (`watch`). `first_block_cache`, `mag_cache`, `sea_cache`
and `smoothed_energy_guidance` make one class exact each, with `over_ranks` and `replacing`; `branches` has the states
that a cache keeps for each branch of guidance. Only this folder touches diffusers' hooks (`registry`).
"""

from .branches import branch_of, state_of_run
from .watch import cache_by_branch, check, check_in_graph, fingerprint, keeps_state, unwatch, watch

__all__ = [
    "branch_of",
    "cache_by_branch",
    "check",
    "check_in_graph",
    "fingerprint",
    "keeps_state",
    "state_of_run",
    "unwatch",
    "watch",
]
