"""Known conflicts between packages, PyTorch, driver and GPUs. A pure function for each; nothing is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from .installed import Package
from .machine import Machine

ERROR, WARNING, NOTE = "error", "warning", "note"
TESTED = {"torch": "2.13", "diffusers": "0.42"}
"""The newest versions that the tests run with (constraints.txt)."""
INDEX = "https://download.pytorch.org/whl"


@dataclasses.dataclass(frozen=True)
class EnvironmentProblem:
    """One finding."""

    level: str
    """"error": something that is installed does not work; "warning": it may fail; "note": worth knowing."""
    text: str
    fix: str = ""
    """The command that mends it; empty if there is none."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """What the rules look at."""

    machine: Machine
    packages: Mapping[str, Package]
    torch: Mapping[str, Any] | None
    """The answer of the probe `pytorch`; None if PyTorch does not import."""


def problems(found: Environment) -> list[EnvironmentProblem]:
    """All known conflicts, errors first."""
    order = (ERROR, WARNING, NOTE)
    return sorted((each for rule in RULES for each in rule(found)), key=lambda each: order.index(each.level))


def requirements(found: Environment) -> Iterator[EnvironmentProblem]:
    """Versions that a package's metadata excludes. Those of this library are errors, those of others warnings."""
    for package in found.packages.values():
        for text in package.requires:
            try:
                needed = Requirement(text)
                if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                    continue
                other = found.packages.get(canonicalize_name(needed.name))
                if other is None or needed.specifier.contains(other.version, prereleases=True):
                    continue
            except (InvalidRequirement, InvalidVersion):
                continue
            own = package.name == "diffusers-attn"
            yield EnvironmentProblem(
                ERROR if own else WARNING,
                f"{package.name} {package.version} needs {needed.name}{needed.specifier}, and {other.version} is "
                "installed.",
                f'pip install "{needed.name}{needed.specifier}"' if own else f"pip install -U {package.name}",
            )


def copies(found: Environment) -> Iterator[EnvironmentProblem]:
    """A package that is installed twice: Python imports the first, pip changes one of them."""
    for package in found.packages.values():
        if len(package.copies) > 1:
            yield EnvironmentProblem(
                WARNING,
                f"{package.name} is installed {len(package.copies)} times: {', '.join(package.copies)}. Python imports "
                "the first.",
                f"pip uninstall {package.name}   # until none is left, then install it once",
            )


def hidden(found: Environment) -> Iterator[EnvironmentProblem]:
    """A file or folder with the name of a package, such as torch.py, which Python imports instead."""
    for package in found.packages.values():
        if package.hidden_by:
            yield EnvironmentProblem(
                ERROR,
                f"Python imports {package.hidden_by} instead of the installed {package.name} {package.version}. Rename "
                "this file or its folder, or take its folder off PYTHONPATH.",
            )


def xformers_without_flash_attn(found: Environment) -> Iterator[EnvironmentProblem]:
    """xformers imports `flash_attn.flash_attn_interface` if there is a package `flash_attn`. flash-attn-4 has the
    package without that module, so that xformers fails to import, and diffusers, which imports it, with it."""
    if {"xformers", "flash-attn-4"} <= found.packages.keys() and "flash-attn" not in found.packages:
        yield EnvironmentProblem(
            ERROR,
            "xformers and flash-attn-4 are installed without flash-attn. xformers then fails to import, and with it "
            "diffusers.",
            "pip uninstall xformers   # or install flash-attn, and flash-attn-4 again after it",
        )


def flash_attn_4_overwritten(found: Environment) -> Iterator[EnvironmentProblem]:
    """flash-attn 2 has an older copy of `flash_attn/cute`, which replaces that of flash-attn-4."""
    package = found.packages.get("flash-attn-4")
    if package and package.changed_files:
        yield EnvironmentProblem(
            ERROR,
            f"{len(package.changed_files)} files of flash-attn-4 were replaced by another package, such as "
            f"{package.changed_files[0]}. An older copy of them is part of flash-attn, which must be installed first.",
            "pip install --force-reinstall --no-deps --pre flash-attn-4",
        )


def xformers_for_another_cuda(found: Environment) -> Iterator[EnvironmentProblem]:
    package = found.packages.get("xformers")
    cuda = found.torch and found.torch["cuda"]
    if not package or not package.built_for_cuda or not cuda:
        return
    if package.built_for_cuda.split(".")[0] != cuda.split(".")[0]:
        yield EnvironmentProblem(
            WARNING,
            f"xformers {package.version} was compiled for CUDA {package.built_for_cuda}, and PyTorch for CUDA {cuda}.",
            f"pip install --force-reinstall --no-deps xformers --index-url {INDEX}/cu{cuda.replace('.', '')}",
        )


def old_sageattention(found: Environment) -> Iterator[EnvironmentProblem]:
    package = found.packages.get("sageattention")
    if package and _older(package.version, "2"):
        yield EnvironmentProblem(
            WARNING,
            f"sageattention {package.version} has other functions than version 2, which the providers need. The "
            "package index has only version 1.",
            "pip install git+https://github.com/thu-ml/SageAttention --no-build-isolation",
        )


def torch_without_cuda(found: Environment) -> Iterator[EnvironmentProblem]:
    """A GPU that PyTorch does not use: a build for the CPU, or a driver that is too old."""
    machine, torch = found.machine, found.torch
    if torch is None or not machine.gpus or torch["gpus"]:
        return
    newest = f" The driver ({machine.driver}) supports CUDA up to {machine.driver_cuda}." if machine.driver_cuda else ""
    if torch["cuda"] is None and torch["rocm"] is None:
        yield EnvironmentProblem(
            ERROR,
            f"this machine has {machine.gpus[0]}, but PyTorch {torch['version']} is a build without CUDA.{newest}",
            f"pip install --force-reinstall torch --index-url {INDEX}/{_build(machine.driver_cuda)}",
        )
    else:
        yield EnvironmentProblem(
            ERROR,
            f"this machine has {machine.gpus[0]}, but PyTorch (CUDA {torch['cuda']}) cannot use it: "
            f"{torch['cuda_error'] or 'it sees no device; CUDA_VISIBLE_DEVICES may hide it'}.{newest}",
            f"pip install --force-reinstall torch --index-url {INDEX}/{_build(machine.driver_cuda)}",
        )


def gpu_without_code(found: Environment) -> Iterator[EnvironmentProblem]:
    """A GPU for which this PyTorch has no code."""
    torch = found.torch or {}
    built = {name.rstrip("af").partition("_")[2] for name in torch.get("built_for", ()) if name.startswith("sm_")}
    for gpu in torch.get("gpus", ()):
        major, _, minor = gpu["compute_capability"].partition(".")
        runs = any(each[:-1] == major and each[-1:] <= minor for each in built)
        if built and not runs and not any(name.startswith("compute_") for name in torch["built_for"]):
            yield EnvironmentProblem(
                ERROR,
                f"PyTorch {torch['version']} has no code for {gpu['name']} (compute capability "
                f"{gpu['compute_capability']}); it has {', '.join(torch['built_for'])}.",
                f"pip install -U torch --index-url {INDEX}/{_build(found.machine.driver_cuda)}",
            )


def untested(found: Environment) -> Iterator[EnvironmentProblem]:
    for name, tested in TESTED.items():
        package = found.packages.get(name)
        if package and _release(package.version) > _release(tested):
            yield EnvironmentProblem(
                NOTE, f"{name} {package.version} is newer than the newest tested version, {tested}."
            )


def without_triton(found: Environment) -> Iterator[EnvironmentProblem]:
    if found.torch and found.torch["gpus"] and "triton" not in found.packages:
        yield EnvironmentProblem(
            WARNING,
            "the package triton is not installed. Compiled models, the provider flex and the merge of partial results "
            "need it on a GPU.",
            "pip install triton-windows" if found.machine.system == "Windows" else "pip install triton",
        )


def _build(driver_cuda: str | None) -> str:
    """The name of the newest PyTorch build for a driver."""
    builds = {"13.0": "cu130", "12.8": "cu128", "12.6": "cu126"}
    return next((name for cuda, name in builds.items() if driver_cuda and not _older(driver_cuda, cuda)), "cu126")


def _older(version: str, than: str) -> bool:
    return _release(version) < _release(than)


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version; of one that is not valid, numbers above all others."""
    try:
        major, minor = (*Version(version).release, 0)[:2]
    except InvalidVersion:
        return 2**31, 0
    return major, minor


RULES = (
    requirements,
    copies,
    hidden, xformers_without_flash_attn, flash_attn_4_overwritten, xformers_for_another_cuda,
    old_sageattention, torch_without_cuda, gpu_without_code, untested, without_triton,
)  # fmt: skip


def explain_import(problem: str) -> str:
    """What usually causes an import error, as a sentence; empty if it is not a known one."""
    if "undefined symbol" in problem:
        return "It was compiled for another version of PyTorch: reinstall it for this one."
    if "libcud" in problem and "cannot open shared object" in problem:
        return "It was compiled for another CUDA version than PyTorch's."
    if "GLIBC" in problem:
        return "It was compiled on a newer Linux: compile it here, or take it from the Hub."
    return ""
