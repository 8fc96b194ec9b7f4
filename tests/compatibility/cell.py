"""Runs a cell of the matrix and names its outcome."""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from diffusers_attn import AttentionProviderError, disable_context_parallel, unsplit_vae

from .feature import ORDERS, Feature
from .features import FEATURES
from .ways import GPU_WAYS, WAYS, Effect, Put, count_samples

ALL_WAYS = WAYS | GPU_WAYS

EXACT = "exact"
"""The results are those of the same pipeline without this library."""
OFF = "off"
"""So they are, but the way has no effect."""
WITHOUT = "without"
"""The results are those without the feature: it has no effect."""
WITH = "exact with "
"""It is refused, and exact with what the error advises: "exact with fullgraph=False"."""
REFUSED = "refused"
"""AttentionProviderError before the first step ends: "refused: ...", with the message."""


def is_sound(outcome: str) -> bool:
    """Whether an outcome is none of a fault."""
    return outcome in (EXACT, OFF, WITHOUT) or outcome.startswith((WITH, f"{REFUSED}: "))


class Expected(NamedTuple):
    """What one process without this library computes."""

    results: list[Tensor]
    without: list[Tensor] | None
    """The results without the feature, if it changes them."""
    samples: int
    """Number of samples in all calls of the transformer."""


def outcomes(meshes: Any, feature: str, way: str) -> dict[str, str]:
    """The outcome of a cell on this rank, for each order of putting feature and way on."""
    found, its = {}, ALL_WAYS[way]
    for order in ORDERS:
        if order in FEATURES[feature].orders and order in its.orders:
            found[order] = outcome = _outcome(meshes, feature, its.put, order, its.device)
            for words, put in its.remedies.items():
                if outcome.startswith(REFUSED) and words in outcome:
                    again = _outcome(meshes, feature, put, order, its.device)
                    found[order] = again if again != EXACT else f"{WITH}{words}"
    return found


@functools.cache
def expected(name: str, device: str) -> Expected:
    """Raises AssertionError if the feature has no effect on the results, although it should."""
    feature = FEATURES[name]
    pipe = _built(feature, device)
    pipe = feature.put(pipe) or pipe
    samples = count_samples(pipe.transformer)
    results = feature.draw(pipe)
    without = None if feature.plain is None else feature.plain(_built(feature, device))
    if without is not None:
        assert _error(results, without) > feature.tolerance, f"{name} does not change the results"
    return Expected(results, without, samples.number)


def _built(feature: Feature, device: str) -> Any:
    pipe = feature.build()
    return pipe if device == "cpu" else pipe.to(device)


def _outcome(meshes: Any, name: str, put: Put, order: str, device: str) -> str:
    pipes, steps = [_built(FEATURES[name], device)], []
    try:
        wanted = expected(name, device)
        with _counted_steps(type(pipes[0].scheduler), steps):
            in_effect, results = _computed(pipes, meshes, name, put, order)
        wrong = _error(results, wanted.results)
        if not wrong <= FEATURES[name].tolerance:
            if wanted.without is not None and _error(results, wanted.without) <= FEATURES[name].tolerance:
                return WITHOUT
            return f"differs by {wrong:.1e}"
        return EXACT if in_effect(pipes[-1], wanted.samples) else OFF
    except AttentionProviderError as error:
        words = re.sub(r"\s+", " ", str(error).partition("\n\nfrom user code")[0])  # where a compiler traced
        return f"refused after {len(steps)} steps: {words}" if steps and _in_call(error) else f"{REFUSED}: {words}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for pipe in pipes:
            disable_context_parallel(pipe)
            if getattr(pipe, "vae", None) is not None:
                unsplit_vae(pipe.vae)


def _computed(pipes: list[Any], meshes: Any, name: str, put: Put, order: str) -> tuple[Effect, list[Tensor]]:
    """Whether the way has an effect, and the results. Adds to `pipes` a pipeline that takes the place of the first."""
    feature = FEATURES[name]
    if order == "after":
        in_effect = put(pipes[-1], meshes)
    pipes.append(feature.put(pipes[-1]) or pipes[-1])
    if order == "before":
        in_effect = put(pipes[-1], meshes)
    return in_effect, feature.draw(pipes[-1])


def _in_call(error: BaseException) -> bool:
    """Whether an error comes from within a call of a pipeline, and not from a method that was called between them."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code.co_name == "__call__" and "pipelines/" in frame.f_code.co_filename for frame in frames)


@contextlib.contextmanager
def _counted_steps(scheduler: Any, steps: list[int]) -> Iterator[None]:
    """Adds to `steps` for every step of schedulers of this class in the last call of a pipeline."""
    step, begin = scheduler.step, scheduler.set_timesteps

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return step(*args, **kwargs)

    @functools.wraps(begin)
    def begun(*args: Any, **kwargs: Any) -> Any:
        steps.clear()
        return begin(*args, **kwargs)

    with mock.patch.object(scheduler, "step", counted), mock.patch.object(scheduler, "set_timesteps", begun):
        yield


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    if [each.shape for each in found] != [each.shape for each in wanted]:
        return float("inf")
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in zip(found, wanted, strict=True))


def on_all_ranks(pool: Any, feature: str, way: str) -> dict[str, str]:
    """The outcomes of a cell. What ranks do differently is a fault, and is named."""
    ranks = ALL_WAYS[way].ranks
    if ranks == 1:
        with torch.random.fork_rng():
            return outcomes(None, feature, way)
    found = pool.run(ranks, outcomes, feature=feature, way=way)
    return {
        order: each if all(other[order] == each for other in found) else f"ranks differ: {[f[order] for f in found]}"
        for order, each in found[0].items()
    }
