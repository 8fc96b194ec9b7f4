"""The active provider: that of the innermost `attention_provider` scope of this thread; without a scope, the provider
that the calling processor is bound to; otherwise `native`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from . import recompute
from .errors import AttentionProviderError
from .providers import hub, registry
from .providers.base import Option
from .providers.catalog import SPECS, AttentionProvider

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .context_parallel.mesh import ContextParallelMesh

AUTO_OPTIONS = {
    "lossy": Option((str, tuple), "names of lossy providers (sage, ...) that it may choose"),
    "source": hub.SOURCE,
}


class ProviderChoice:
    """A provider with its options. There is one object per value, so that comparing and hashing are cheap."""

    __slots__ = ("options", "provider")
    provider: str
    options: tuple[tuple[str, object], ...]

    @staticmethod
    def of(provider: str | AttentionProvider, **options: object) -> ProviderChoice:
        """The choice of `provider` (a name or an `AttentionProvider`) with `options` of its kernel.

        Raises:
            AttentionProviderError: there is no such provider or option, or the option has a wrong type.
        """
        name = registry.provider_name(provider)
        known = AUTO_OPTIONS if name == "auto" else SPECS[name].options
        for option, value in options.items():
            if option not in known:
                if option == "source":
                    hub.source_of(SPECS[name], value)  # raises with the reason, except for "package", the only source
                    continue
                has = ", ".join(f"{key} ({spec.doc})" for key, spec in known.items()) or "none"
                raise AttentionProviderError(f"provider '{name}' has no option {option!r}; its options: {has}.")
            known[option].check(name, option, value)
        if "lossy" in options:
            named: Any = options["lossy"]
            named = (named,) if isinstance(named, str) else named
            options["lossy"] = named = tuple(registry.provider_name(each) for each in named)
            exact = [each for each in named if each == "auto" or SPECS[each].capabilities.exact]
            if exact:
                raise AttentionProviderError(
                    f"lossy={', '.join(exact)} was given, which is exact; 'auto' chooses among all exact providers "
                    "anyway. Name lossy providers that it may choose too, such as 'sage'."
                )
        source = hub.source_of(SPECS.get(name), options.pop("source", None))
        if source != hub.PACKAGE:
            options["source"] = source
        return _intern_choice(name, tuple(sorted(options.items())))

    def updated(self, **options: object) -> ProviderChoice:
        """This choice with further options. Raises as `of` does."""
        return ProviderChoice.of(self.provider, **{"source": hub.PACKAGE, **dict(self.options), **options})

    def check_usable(self) -> None:
        """Raises ProviderUnavailableError if the provider, or one named in `lossy`, cannot be used on this machine."""
        lossy: Any = dict(self.options).get("lossy", ())
        for name in (self.provider, *lossy):
            status = registry.provider_status(name, hub.chosen_source(SPECS.get(name), self.options))
            if not status.available:
                raise registry.unavailable(status)

    def __reduce__(self) -> tuple[Any, ...]:
        return _intern_choice, (self.provider, self.options)

    def __copy__(self) -> ProviderChoice:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> ProviderChoice:
        return self

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options)
        return f"ProviderChoice('{self.provider}'{options})"


@functools.cache
def _intern_choice(provider: str, options: tuple[tuple[str, object], ...]) -> ProviderChoice:
    choice = ProviderChoice.__new__(ProviderChoice)
    choice.provider, choice.options = provider, options
    return choice


NATIVE = ProviderChoice.of("native")


class _Scope(threading.local):
    """The scopes of this thread. It is thread-local and no ContextVar because Dynamo can guard on it: a compiled graph
    is recompiled when the provider changes."""

    def __init__(self) -> None:  # runs once in every thread that reads it
        # No defaults in the class: Dynamo before PyTorch 2.13 would read those instead of the attributes.
        self.choice: ProviderChoice | None = None
        self.parallel: ContextParallelMesh | None = None
        self.outer: list[tuple[ProviderChoice | None, ContextParallelMesh | None]] = []


scope = _Scope()
Inside = tuple[ProviderChoice | None, "ContextParallelMesh | None"]


def _set_scope(choice: ProviderChoice | None, parallel: ContextParallelMesh | None) -> None:
    scope.choice, scope.parallel = choice, parallel
    if not torch.compiler.is_compiling():
        recompute.stash((choice, parallel))


def scope_in_backward() -> Inside:
    """The scope of the thread that runs a backward; without one, that of the thread that called the backward.

    The two threads differ on a GPU, where autograd runs the backward in its own threads.
    """
    if scope.choice is None:
        inside: Inside | None = recompute.stashed()
        return (None, None) if inside is None else inside
    return scope.choice, scope.parallel


def _scope_here() -> Inside:
    return (scope.choice, scope.parallel) if recompute.in_backward_id() == -1 else scope_in_backward()


def _keep_scope() -> recompute.Enter:
    """Captures the scope (or its absence) for the recomputation of a checkpointed forward."""
    return functools.partial(_within, *_scope_here())


@contextlib.contextmanager
def _within(choice: ProviderChoice | None, parallel: ContextParallelMesh | None) -> Iterator[None]:
    before, before_stash = (scope.choice, scope.parallel), recompute.stashed()
    _set_scope(choice, parallel)
    try:
        yield
    finally:
        scope.choice, scope.parallel = before
        recompute.stash(before_stash)


recompute.keep_for_recomputation(_keep_scope)


class attention_provider(contextlib.ContextDecorator):  # noqa: N801 (used like a function)
    """Context manager and decorator: every attention call inside the scope uses `provider`.

    Args:
        provider: a name of `AttentionProvider`.
        mesh: the `DeviceMesh` (or `ContextParallelMesh`) that was passed to `apply_context_parallel`; default None. It
            is only needed for the next two arguments. Without it, a model with a plan runs with the settings that were
            given when the plan was applied.
        convert_to_fp32: whether partial results of a ring merge in float32 (default), or else in the query's dtype.
        rotate_method: how keys and values travel in a ring: "allgather" (default), all at once, or "alltoall", from
            rank to rank.
        options: options of the provider's kernel; and `source="hub"`, which takes the kernel from the Hugging Face Hub
            in place of the installed package. Default of `source`: the environment variable `DIFFUSERS_ATTN_SOURCE`,
            or else "package".

    A scope applies to the current thread, and scopes nest. A scope overrides the provider that a processor is bound
    to. With gradient checkpointing (`torch.utils.checkpoint`) the backward recomputes in the scope of the forward,
    wherever the backward is called.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine. The message says how to install it.
        AttentionProviderError: there is no such provider or option.
    """

    def __init__(
        self,
        provider: str | AttentionProvider,
        *,
        mesh: DeviceMesh | ContextParallelMesh | None = None,
        convert_to_fp32: bool = True,
        rotate_method: str = "allgather",
        **options: object,
    ) -> None:
        self.choice = ProviderChoice.of(provider, **options)
        self.choice.check_usable()
        self.parallel: ContextParallelMesh | None = None
        if mesh is not None:
            from .context_parallel.mesh import ContextParallelMesh

            self.parallel = ContextParallelMesh.of(mesh, rotate_method=rotate_method, convert_to_fp32=convert_to_fp32)
        elif (convert_to_fp32, rotate_method) != (True, "allgather"):
            raise AttentionProviderError(
                f"convert_to_fp32={convert_to_fp32!r} and rotate_method={rotate_method!r} are settings of a mesh, and "
                "no mesh was given. Pass mesh=..., the mesh that was passed to apply_context_parallel."
            )

    def __enter__(self) -> ProviderChoice:
        if not torch.compiler.is_compiling():
            recompute.install()
        scope.outer.append((scope.choice, scope.parallel))
        _set_scope(self.choice, self.parallel)
        return self.choice

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _set_scope(*scope.outer.pop())


def active_choice(bound: ProviderChoice | None = None) -> ProviderChoice:
    """The choice for a call made here: that of this thread's scope, else `bound`, else `native`."""
    if scope.choice is None and not torch.compiler.is_compiling():
        return _scope_here()[0] or bound or NATIVE
    return scope.choice or bound or NATIVE


def active_parallel() -> ContextParallelMesh | None:
    """The mesh of the scope for a call made here; None without one."""
    if scope.choice is None and not torch.compiler.is_compiling():
        return _scope_here()[1]
    return scope.parallel
