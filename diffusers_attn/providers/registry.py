"""The providers that are available on this machine, and the reasons why others are not.

The check reads the metadata of installed distributions and the devices first. If both fit, it imports the kernel
package, because a package that does not import is not available.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util

import torch
from packaging.version import InvalidVersion, Version

from ..errors import AttentionProviderError, ProviderUnavailableError, command
from . import hub
from .base import Adapter, ProviderSpec, Requirement
from .catalog import DIFFUSERS_BACKENDS, SPECS, AttentionProvider

ADAPTERS: dict[tuple[str, str], type[Adapter]] = {}
"""The adapters imported so far, by provider and source of its kernel. Compiled code looks adapters up here."""


@dataclasses.dataclass(frozen=True)
class ProviderStatus:
    """The availability of a provider on this machine. Prints as one line."""

    name: str
    available: bool
    reason: str
    """Why the provider is not available; empty if it is."""
    install: str | None
    """The command that installs the missing package; None if there is none."""
    version: str | None
    """Version of the installed package, or the kernel on the Hub with its version; None without one."""
    summary: str
    shortest: str = ""
    """The shortest way to a kernel for this provider, if the package is missing and the Hub has one; else empty."""

    def __str__(self) -> str:
        version = f" ({self.version})" if self.version else ""
        shortest = f" (shortest: {self.shortest})" if self.shortest else ""
        return f"{self.name}{version}: {'available' if self.available else self.reason + shortest}"


def provider_name(name: str | AttentionProvider) -> str:
    """The name of a provider as a plain string.

    Raises:
        AttentionProviderError: there is no such provider. The message names similar names, or all names.
    """
    try:
        return AttentionProvider(name).value
    except ValueError:
        if str(name) in DIFFUSERS_BACKENDS:
            raise AttentionProviderError(
                f"{str(name)!r} is a backend of diffusers, and no provider. The provider with the same kernel: "
                f"attention_provider({as_arguments(str(name))})."
            ) from None
        known = [member.value for member in AttentionProvider]
        alike = _spelled_alike(str(name).lower().replace("-", "_"), known)
        instead = f"Did you mean {' or '.join(map(repr, alike))}?" if alike else f"There are: {', '.join(known)}."
        raise AttentionProviderError(f"there is no attention provider {name!r}. {instead}") from None


def as_arguments(backend: str) -> str:
    """The arguments that name the provider with the kernel of a backend of diffusers; "name" if there is none."""
    name = DIFFUSERS_BACKENDS.get(backend, backend)
    if name not in SPECS:
        return "name"
    return f"'{name}', source='hub'" if backend.endswith("_hub") and SPECS[name].hub else f"'{name}'"


def _spelled_alike(name: str, known: list[str]) -> list[str]:
    if name in known:
        return [name]
    parts = [each for each in known if len(name) > 2 and name.strip("_") in each]
    return parts if 0 < len(parts) < 4 else difflib.get_close_matches(name, known, n=3)


def list_providers() -> list[ProviderStatus]:
    """All providers with their status on this machine, available ones first.

    It downloads nothing: a kernel from the Hub that no call has used yet is listed as available if the package
    `kernels` is installed and a device fits.
    """
    statuses = (_status(name, hub.source_of(spec), download=False) for name, spec in SPECS.items())
    return sorted(statuses, key=lambda status: not status.available)


def provider_status(name: str | AttentionProvider, source: str | None = None) -> ProviderStatus:
    """The status of a provider on this machine: its availability, or what is missing and how to install it.

    Args:
        name: name of the provider.
        source: "package" or "hub", the source of its kernel. "hub" downloads the kernel if it is not in the cache.
            Default: what the environment variable `DIFFUSERS_ATTN_SOURCE` names, or else "package".

    Raises:
        AttentionProviderError: there is no provider of that name, or the Hub has no kernel for it.
    """
    name = provider_name(name)
    if name == "auto":
        summary = "the fastest exact provider that can serve a call"
        reason = _missing_kernels() if hub.source_of(None, source) == hub.HUB else ""
        return ProviderStatus(name, not reason, reason, hub.KERNELS.install if reason else None, None, summary)
    return _status(name, hub.source_of(SPECS[name], source), download=True)


def status_without_download(name: str, source: str) -> ProviderStatus:
    """`provider_status` without loading a kernel from the Hub: available if it may be, as far as is known here."""
    return _status(name, source, download=False)


def _status(name: str, source: str, *, download: bool) -> ProviderStatus:
    return _hub_status(name, download) if source == hub.HUB else _package_status(name)


@functools.cache
def _package_status(name: str) -> ProviderStatus:
    spec = SPECS[name]
    version, reason = _check_package(spec.requirement) if spec.requirement else (torch.__version__, "")
    missing = bool(reason)
    if not reason:
        reason = device_reason(spec)
    if not reason:
        try:
            load(name)
        except ProviderUnavailableError as error:
            reason, missing = str(error), True
    install = spec.requirement.install if spec.requirement and missing else None
    shortest = _shortest(spec) if missing and spec.hub else ""
    return ProviderStatus(name, not reason, reason, install, version, spec.summary, shortest)


def _shortest(spec: ProviderSpec) -> str:
    """The shortest way to a kernel of a provider that the Hub has a kernel for."""
    _, missing = _check_package(hub.KERNELS)
    first = f"{command(hub.KERNELS.install)}, then " if missing else ""
    return f'{first}source="hub", which downloads {spec.hub}'


def _missing_kernels() -> str:
    """Why no kernel can be loaded from the Hub; empty if the package for it is installed."""
    _, reason = _check_package(hub.KERNELS)
    return reason and f"{reason}, and source='hub' needs it"


def _hub_status(name: str, download: bool) -> ProviderStatus:
    """Not cached: a Hub that cannot be reached now may be reached later."""
    spec = SPECS[name]
    reason, install = "", None
    if (name, hub.HUB) not in ADAPTERS:
        reason = _missing_kernels()
        install = hub.KERNELS.install if reason else None
        reason = reason or device_reason(spec)
    if download and not reason:
        try:
            load(name, hub.HUB)
        except ProviderUnavailableError as error:
            reason = str(error)
    return ProviderStatus(name, not reason, reason, install, f"Hub: {spec.hub}", spec.summary)


def _check_package(requirement: Requirement) -> tuple[str | None, str]:
    """The installed version (None if unknown), and the reason why it cannot be used (empty if it can)."""
    try:
        version = importlib.metadata.version(requirement.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, f"package {requirement.distribution}>={requirement.minimum} is not installed"
    except Exception as error:  # damaged metadata raises any type
        problem = f"{type(error).__name__}: {error}"
        return None, f"the metadata of package {requirement.distribution} cannot be read ({problem})"
    try:
        too_old = Version(version) < Version(requirement.minimum)
    except (InvalidVersion, TypeError):  # TypeError: the metadata has no version
        too_old = False
    if too_old:
        return version, f"package {requirement.distribution} {version} is older than {requirement.minimum}"
    return version, ""


def device_reason(spec: ProviderSpec) -> str:
    """Why no device of this machine runs the provider; empty if one does."""
    capabilities = spec.capabilities
    if "cpu" in capabilities.devices:
        return ""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and PyTorch sees none"
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    reasons = [capability_reason(spec, capability) for capability in found]
    return "" if "" in reasons else reasons[0]


def capability_reason(spec: ProviderSpec, capability: tuple[int, int]) -> str:
    """Why a GPU of this compute capability does not run the provider; empty if it does."""
    needed = spec.capabilities
    has = "{}.{}".format(*capability)
    if needed.compute_capabilities is not None and capability not in needed.compute_capabilities:
        only = ", ".join("{}.{}".format(*each) for each in sorted(needed.compute_capabilities))
        return f"needs a GPU of compute capability {only}; this one has {has}"
    if needed.min_compute_capability is not None and capability < needed.min_compute_capability:
        return (
            "needs a GPU of compute capability {}.{} or newer; this one has ".format(*needed.min_compute_capability)
            + has
        )
    return ""


def load(name: str, source: str = hub.PACKAGE) -> type[Adapter]:
    """The adapter of a provider, importing its package, or loading its kernel from the Hub, on first use.

    Raises:
        ProviderUnavailableError: the package does not import, or the kernel cannot be loaded.
    """
    adapter = ADAPTERS.get((name, source))
    if adapter is None:
        spec = SPECS[name]
        package = hub.load(spec) if source == hub.HUB else None
        module, _, attribute = spec.adapter.partition(":")
        try:
            if package is None and spec.requirement:
                package = importlib.import_module(spec.requirement.module)
            template: type[Adapter] = getattr(importlib.import_module(f".{module}", __package__), attribute)
            adapter = template.over(package, source)
        except Exception as error:  # a broken binary may raise any type: OSError, RuntimeError, AttributeError
            problem = f"{type(error).__name__}: {error}"
            if source == hub.HUB:
                problem = f"its kernel {spec.hub} was loaded from the Hub but does not fit: {problem}"
            else:
                problem = f"its package is installed but cannot be imported: {problem}"
            raise ProviderUnavailableError(problem) from error
        ADAPTERS[name, source] = adapter
    return adapter


def unavailable(status: ProviderStatus) -> ProviderUnavailableError:
    """The error for a provider that is not available here: what is missing, the remedy, and the alternatives."""
    remedy = f" Install it with {command(status.install)}." if status.install else ""
    if status.shortest:
        remedy = f" The shortest way: {status.shortest}.{remedy}"
    usable = ", ".join(other.name for other in list_providers() if other.available)
    return ProviderUnavailableError(
        f"attention provider '{status.name}' cannot be used here: {status.reason}.{remedy} Providers available here: "
        f"{usable}."
    )
