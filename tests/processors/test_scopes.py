"""Models that follow the scope, and scopes over models that are bound."""

from __future__ import annotations

import threading
import time

import torch

from diffusers_attn import DispatchProcessor, attention_provider
from diffusers_attn.processors import attention_modules, bound, entry_points

from ..zoo import CASES, relative_change


@torch.no_grad()
def test_without_a_name_the_scope_decides(routed):
    case = CASES["sdxl"]
    model = case.build()
    expected = model(**case.inputs())
    model.set_attn_processor(DispatchProcessor())
    assert {module.provider for module in attention_modules(model)} == {"scope"}
    for provider in ("native", "_native_math", "auto"):
        routed.clear()
        with attention_provider(provider):
            assert relative_change(model(**case.inputs()), expected) < 1e-5
        assert set(routed) == {provider}
    routed.clear()
    model(**case.inputs())
    assert set(routed) == {"native"}


@torch.no_grad()
def test_a_scope_overrides_the_binding(routed):
    case = CASES["flux"]
    model = case.build()
    model.set_attn_processor(DispatchProcessor("native"))
    with attention_provider("_native_math"):
        model(**case.inputs())
    assert set(routed) == {"_native_math"}
    routed.clear()
    model(**case.inputs())
    assert set(routed) == {"native"}


def test_threads_with_their_own_scopes_on_one_model(monkeypatch):
    case = CASES["flux"]
    model = case.build()
    with torch.no_grad():
        expected = model(**case.inputs())
    model.set_attn_processor(DispatchProcessor("native"))
    scopes = ["native", "_native_math", "auto", None]
    seen: dict[int, set[str]] = {}
    errors: list[float] = []
    attend, barrier = entry_points.attend, threading.Barrier(len(scopes))

    def recording(*args, bound=None, **kwargs):
        seen.setdefault(threading.get_ident(), set()).add(entry_points.active_choice(bound).provider)
        return attend(*args, bound=bound, **kwargs)

    monkeypatch.setattr(entry_points, "attend", recording)
    idents: dict[str | None, int] = {}

    @torch.no_grad()
    def work(scope):
        idents[scope] = threading.get_ident()
        barrier.wait()
        for _ in range(5):
            if scope is None:
                result = model(**case.inputs())
            else:
                with attention_provider(scope):
                    result = model(**case.inputs())
            errors.append(relative_change(result, expected))

    threads = [threading.Thread(target=work, args=(scope,)) for scope in scopes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {scope: seen[ident] for scope, ident in idents.items()} == {scope: {scope or "native"} for scope in scopes}
    assert len(errors) == 20 and max(errors) < 1e-5


def test_threads_that_bind_models_at_once(monkeypatch):
    """The first thread that binds a class makes an overlay and a bound class; others at the same time get the same."""

    class SlowOverlay(bound.Overlay):
        def __init__(self, *entry_points):
            time.sleep(0.1)
            super().__init__(*entry_points)

    monkeypatch.setattr(bound, "Overlay", SlowOverlay)
    models = [CASES["flux"].build() for _ in range(4)]
    request = DispatchProcessor("auto", lossy=())  # a choice that no other test has bound
    threads = [threading.Thread(target=model.set_attn_processor, args=(request,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({type(processor) for model in models for processor in model.attn_processors.values()}) == 1
