"""The modules that are mutated, and the tests that should notice. The fastest that cover a module come first."""

from __future__ import annotations

_OVER_RANKS = [
    f"tests/context_parallel/attention/test_strategies.py::test_like_one_process[{name}]"
    for name in ("ring 2", "ring 3", "unified ring 2x2")
]
_DISPATCH = ["tests/test_dispatch.py", "tests/test_repeated_calls.py"]
_HOOKS = [
    "tests/context_parallel/hooks/test_apply.py",
    "tests/context_parallel/hooks/test_required.py",
    "tests/context_parallel/hooks/test_plan_words.py",
    "tests/context_parallel/hooks/test_too_short.py",
    "tests/context_parallel/hooks/test_invariant.py",
    "tests/context_parallel/hooks/test_outputs.py",
    "tests/context_parallel/hooks/test_attention_modules.py",
]

TARGETS = {
    "dispatch": [
        *_DISPATCH,
        "tests/test_scope.py",
        "tests/providers/test_selection.py",
        "tests/context_parallel/attention/test_entry.py",
        "tests/test_tensor_kinds.py",
    ],
    "masks": ["tests/test_masks.py", "tests/providers/test_contract.py", *_DISPATCH],
    "providers.decision": [
        "tests/providers/test_serving.py",
        *_DISPATCH,
        "tests/providers/test_selection.py",
        "tests/test_logs.py",
        "tests/test_tensor_kinds.py",
    ],
    "providers.serving": ["tests/providers/test_serving.py", *_DISPATCH, "tests/providers/test_selection.py"],
    "context_parallel.sequences.sharding": ["tests/context_parallel/sequences", *_OVER_RANKS],
    "context_parallel.attention.merge": ["tests/context_parallel/attention/test_merge.py", *_OVER_RANKS],
    "context_parallel.attention.ring": [
        "tests/context_parallel/attention/test_strategies.py::test_merging_in_float32_keeps_the_precision_of_one_process",
        *_OVER_RANKS,
    ],
    "context_parallel.hooks.apply": _HOOKS,
    "context_parallel.hooks.arguments": _HOOKS,
    "context_parallel.hooks.attention_modules": _HOOKS,
    "context_parallel.hooks.plan_words": _HOOKS,
    "context_parallel.hooks.words.split": [
        *_HOOKS,
        "tests/context_parallel/sequences/test_balanced.py::test_a_plan_that_splits_balanced_gives_each_rank_two_parts",
    ],
}
"""Tests by module of `diffusers_attn`."""
