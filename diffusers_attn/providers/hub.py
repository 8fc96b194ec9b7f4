"""Kernels from the Hugging Face Hub, compiled by others, in place of packages that have to be compiled.

The package `kernels` downloads a build for this PyTorch, CUDA and GPU, and imports it. It is imported only when a
kernel is loaded. Kernels are taken from the Hub only where that was asked for: by the option `source="hub"`, or by the
environment variable for every provider that the Hub has a kernel for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from types import ModuleType

from ..errors import AttentionProviderError, ProviderUnavailableError, command
from .base import HubKernel, Option, ProviderSpec, Requirement

ENVIRONMENT = "DIFFUSERS_ATTN_SOURCE"
"""Environment variable with the source of kernels where no option `source` is given."""
PACKAGE, HUB = "package", "hub"
SOURCE = Option(
    str,
    f'source of the kernel, the installed package or the Hugging Face Hub; default ${ENVIRONMENT}, or else "package"',
    (PACKAGE, HUB),
)
KERNELS = Requirement("kernels", "0.15.1", "kernels", "pip install kernels")

_TRUST = "DIFFUSERS_TRUST_REMOTE_KERNELS"  # diffusers' variable, with its meaning
_TRUE = ("1", "ON", "YES", "TRUE")


def source_of(spec: ProviderSpec | None, given: object = None) -> str:
    """The source of a provider's kernel: `given`, or else that of the environment.

    The environment only applies to providers that the Hub has a kernel for, and to "auto" (`spec` is None), which
    chooses between them.

    Raises:
        AttentionProviderError: there is no such source, or the Hub has no kernel for the provider.
    """
    if given is None:
        return environment() if spec is None or spec.hub else PACKAGE
    SOURCE.check(spec.name if spec else "auto", "source", given)
    if given == HUB and spec is not None and spec.hub is None:
        reason = spec.without_hub if spec.requirement else "PyTorch brings its kernel"
        raise AttentionProviderError(
            f"option source='hub' of provider '{spec.name}': {reason}. Leave source out"
            + (f", and install it with {command(spec.requirement.install)}." if spec.requirement else ".")
        )
    return str(given)


def chosen_source(spec: ProviderSpec | None, options: Iterable[tuple[str, object]]) -> str:
    """The source of a provider's kernel in a call with these options, in which `ProviderChoice` has put it. `spec` is
    None for "auto"."""
    return str(dict(options).get("source", PACKAGE)) if spec is None or spec.hub else PACKAGE


def environment() -> str:
    """The source that the environment variable names; "package" without it.

    Raises:
        AttentionProviderError: it names no source.
    """
    source = os.environ.get(ENVIRONMENT, "") or PACKAGE
    if source not in (PACKAGE, HUB):
        raise AttentionProviderError(f"the environment has {ENVIRONMENT}={source}; accepted are {PACKAGE} and {HUB}.")
    return source


def load(spec: ProviderSpec) -> ModuleType:
    """The module with a provider's functions, from the Hub. Downloads the kernel if it is not in the cache.

    Raises:
        ProviderUnavailableError: the kernel cannot be loaded. The message names the provider, the repository, the
            version, the reason and the remedies.
    """
    kernel = spec.hub
    assert kernel is not None
    try:
        from kernels import get_kernel

        module = get_kernel(kernel.repo, version=kernel.version, trust_remote_code=_trusts_everyone())
    except Exception as error:  # no network, no build for this machine, no trust, a broken build: each has its own type
        raise ProviderUnavailableError(_not_loaded(spec, kernel, error)) from error
    try:
        return functools.reduce(getattr, filter(None, kernel.module.split(".")), module)
    except AttributeError as error:
        raise ProviderUnavailableError(f"its kernel {kernel} has another content than expected: {error}") from error


def _trusts_everyone() -> bool:
    """Whether the user allows kernels of publishers that the Hub does not list as trusted."""
    allowed = os.environ.get(_TRUST, "").upper() in _TRUE
    return allowed and os.environ.get("DIFFUSERS_DISABLE_REMOTE_CODE", "").upper() not in _TRUE


def _not_loaded(spec: ProviderSpec, kernel: HubKernel, error: Exception) -> str:
    """The reason and the remedies, as a clause."""
    untrusted = "trusted publisher" in str(error)
    if "publisher trust status" in str(error) and isinstance(error.__context__, Exception):
        error = error.__context__  # the publisher could not be looked up, usually because the Hub was not reached
    remedies = []
    if untrusted:
        remedies.append(f"To run code of this publisher all the same, set {_TRUST}=true in the environment")
    elif _not_reached(error):
        remedies.append(
            "Check that https://huggingface.co can be reached; without it, copy the kernel's repository here and set "
            f"LOCAL_KERNELS={kernel.repo}=/path/to/the/copy in the environment"
        )
    if spec.requirement:
        remedies.append(
            f"{'Or use' if remedies else 'Use'} source='package', after {command(spec.requirement.install)}"
        )
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return f"its kernel {kernel} could not be loaded from the Hub: {reason}. {'. '.join(remedies)}"


def _not_reached(error: Exception) -> bool:
    """Whether `error` is about the connection, and not about the kernel. Libraries have types of their own for that."""
    of_library = type(error).__module__ != "builtins"
    return of_library or isinstance(error, (ConnectionError, TimeoutError)) or "offline mode" in str(error)
