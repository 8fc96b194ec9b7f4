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
from .base import Adapter, ProviderSpec, Requirement
from .catalog import SPECS, AttentionProvider

ADAPTERS: dict[str, type[Adapter]] = {}
"""The adapters imported so far, by provider name. Compiled code looks adapters up here."""


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
    """Version of the installed package; None without one."""
    summary: str

    def __str__(self) -> str:
        version = f" ({self.version})" if self.version else ""
        return f"{self.name}{version}: {'available' if self.available else self.reason}"


def provider_name(name: str | AttentionProvider) -> str:
    """The name of a provider as a plain string.

    Raises:
        AttentionProviderError: there is no such provider. The message names similar names, or all names.
    """
    try:
        return AttentionProvider(name).value
    except ValueError:
        known = [member.value for member in AttentionProvider]
        alike = _spelled_alike(str(name).lower().replace("-", "_"), known)
        instead = f"Did you mean {' or '.join(map(repr, alike))}?" if alike else f"There are: {', '.join(known)}."
        raise AttentionProviderError(f"there is no attention provider {name!r}. {instead}") from None


def _spelled_alike(name: str, known: list[str]) -> list[str]:
    if name in known:
        return [name]
    parts = [each for each in known if len(name) > 2 and name.strip("_") in each]
    return parts if 0 < len(parts) < 4 else difflib.get_close_matches(name, known, n=3)


def list_providers() -> list[ProviderStatus]:
    """All providers with their status on this machine, available ones first."""
    return sorted((provider_status(name) for name in SPECS), key=lambda status: not status.available)


def provider_status(name: str | AttentionProvider) -> ProviderStatus:
    """The status of a provider on this machine: its availability, or what is missing and the command to install it.

    Raises:
        AttentionProviderError: there is no provider of that name.
    """
    name = provider_name(name)
    if name == "auto":
        return ProviderStatus(name, True, "", None, None, "the fastest exact provider that can serve a call")
    return _status(name)


@functools.cache
def _status(name: str) -> ProviderStatus:
    spec = SPECS[name]
    version, reason = _check_package(spec.requirement) if spec.requirement else (torch.__version__, "")
    install = spec.requirement.install if spec.requirement and reason else None
    if not reason:
        reason = _check_devices(spec)
    if not reason:
        try:
            load(name)
        except ProviderUnavailableError as error:
            reason, install = str(error), spec.requirement.install if spec.requirement else None
    return ProviderStatus(name, not reason, reason, install, version, spec.summary)


def _check_package(requirement: Requirement) -> tuple[str | None, str]:
    """The installed version (None if unknown), and the reason why it cannot be used (empty if it can)."""
    try:
        version = importlib.metadata.version(requirement.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, f"package {requirement.distribution}>={requirement.minimum} is not installed"
    try:
        too_old = Version(version) < Version(requirement.minimum)
    except InvalidVersion:
        too_old = False
    if too_old:
        return version, f"package {requirement.distribution} {version} is older than {requirement.minimum}"
    return version, ""


def _check_devices(spec: ProviderSpec) -> str:
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


def load(name: str) -> type[Adapter]:
    """The adapter of a provider, importing its package on first use.

    Raises:
        ProviderUnavailableError: the package does not import.
    """
    adapter = ADAPTERS.get(name)
    if adapter is None:
        spec = SPECS[name]
        module, _, attribute = spec.adapter.partition(":")
        try:
            if spec.requirement:
                importlib.import_module(spec.requirement.module)
            adapter = getattr(importlib.import_module(f".{module}", __package__), attribute)
        except Exception as error:  # a broken binary may raise any type: OSError, RuntimeError, AttributeError
            raise ProviderUnavailableError(
                f"its package is installed but cannot be imported: {type(error).__name__}: {error}"
            ) from error
        ADAPTERS[name] = adapter
    return adapter


def unavailable(status: ProviderStatus) -> ProviderUnavailableError:
    """The error for a provider that is not available here: what is missing, the remedy, and the alternatives."""
    remedy = f" Install it with {command(status.install)}." if status.install else ""
    usable = ", ".join(other.name for other in list_providers() if other.available)
    return ProviderUnavailableError(
        f"attention provider '{status.name}' cannot be used here: {status.reason}.{remedy} Providers available here: "
        f"{usable}."
    )
