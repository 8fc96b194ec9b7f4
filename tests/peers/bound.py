"""A plugin of pytest that binds a provider to every model of diffusers, and counts the tests' outcomes.

DIFFUSERS_ATTN_PEERS_BIND names the provider; without it nothing is bound. DIFFUSERS_ATTN_PEERS_REPORT is the file for
the outcomes, by test. pytest loads this file alone (`-p bound`, with this folder on the path), since diffusers' tests
are a package of the name `tests` too.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROVIDER = os.environ.get("DIFFUSERS_ATTN_PEERS_BIND")
_outcomes: dict[str, str] = {}
_bound: dict[str, int] = {}
_building = threading.local()
"""`depth`: the number of constructors that run, since a model's may call that of its base class or of another model."""


def _binding(construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _building.depth = getattr(_building, "depth", 0) + 1
        try:
            construct(self, *args, **kwargs)
        finally:
            _building.depth -= 1
        if _building.depth == 0:
            _bind(self)

    return init


def _bind(model: Any) -> None:
    from diffusers_attn import AttentionProviderError, set_attention_provider

    try:
        set_attention_provider(model, PROVIDER)
    except AttentionProviderError:
        return  # a model without attention that can be bound, such as an autoencoder
    name = type(model).__name__
    _bound[name] = _bound.get(name, 0) + 1


def pytest_configure(config: Any) -> None:
    if PROVIDER is None:
        return
    from diffusers import ModelMixin

    def wrap(cls: Any) -> None:
        if "__init__" in vars(cls):
            cls.__init__ = _binding(cls.__init__)

    def subclass(cls: Any, **kwargs: Any) -> None:
        super(ModelMixin, cls).__init_subclass__(**kwargs)
        wrap(cls)

    ModelMixin.__init_subclass__ = classmethod(subclass)
    pending = list(ModelMixin.__subclasses__())
    while pending:
        cls = pending.pop()
        wrap(cls)
        pending += cls.__subclasses__()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        name = report.nodeid.partition("/")[2]
        if _outcomes.get(name) != "failed":
            _outcomes[name] = report.outcome


def pytest_sessionfinish() -> None:
    path = os.environ.get("DIFFUSERS_ATTN_PEERS_REPORT")
    if path:
        Path(path).write_text(json.dumps({"tests": _outcomes, "bound": _bound}))
