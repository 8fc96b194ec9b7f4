"""Collects the findings: metadata here, imports in processes of their own, several at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from packaging.utils import canonicalize_name

from .combinations import ERROR, WARNING, Environment, EnvironmentProblem, explain_import, problems
from .installed import Package, installed
from .isolated import Outcome, run_probe
from .machine import Machine, this_machine

PROCESSES = 4
"""Number of probes that run at the same time. Each imports PyTorch, which needs some 300 MB."""
BROKEN = "its package is installed but cannot be imported: "
"""The beginning of the reason of a provider whose package does not import."""


@dataclasses.dataclass(frozen=True)
class Provider:
    """The status of a provider on this machine."""

    name: str
    available: bool
    reason: str
    """Why it is not available; empty if it is."""
    fix: str
    """The command that makes it available, the shortest first; empty if no command does."""
    version: str | None
    exact: bool
    summary: str


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings."""

    machine: Machine
    packages: Mapping[str, Package]
    torch: dict[str, Any] | None
    """The answer of the probe `pytorch`; None if PyTorch does not import."""
    diffusers: str | None
    """Version of diffusers if it imports, and this library with it; else None."""
    providers: tuple[Provider, ...]
    problems: tuple[EnvironmentProblem, ...]
    runs: dict[str, dict[str, Any]] | None = None
    """The answer of the probe `speed` for each usable provider that returned one; None if none was run."""
    copies_bytes_per_second: tuple[float, ...] | None = None
    """Speeds of copies from each GPU to the next; None if they were not measured."""
    strategies: tuple[dict[str, Any], ...] | None = None
    """The answer of `strategies.suitable`, between several GPUs; None otherwise, or if the library does not import."""

    @property
    def ok(self) -> bool:
        """Whether no problem is an error."""
        return not any(each.level == ERROR for each in self.problems)


def examine(timeout: float, run: bool = False, progress: Callable[[str], None] = lambda text: None) -> Report:
    """Examines this machine.

    Args:
        timeout: seconds that the import of one package may take, and the run of one provider.
        run: whether to run every usable provider once.
        progress: called with a short text before each step.
    """
    progress("importing each package in a process of its own")
    machine, packages = this_machine(), installed()
    found: list[EnvironmentProblem] = []
    with ThreadPoolExecutor(PROCESSES) as pool:
        asked = {name: pool.submit(run_probe, name, timeout=timeout) for name in ("pytorch", "library", "catalog")}
        torch, library, catalog = (asked[name].result() for name in ("pytorch", "library", "catalog"))
        if torch.value is None:
            found.append(_torch_problem(torch, packages))
            if "diffusers" not in packages:
                found.append(EnvironmentProblem(ERROR, "diffusers is not installed.", "pip install diffusers"))
        else:
            if library.value is None:
                found.append(_library_problem(library, packages))
            if catalog.value is None:
                found.append(EnvironmentProblem(ERROR, f"diffusers-attn itself does not import: {catalog.problem}."))
        providers: list[Provider] = []
        if torch.value is not None and catalog.value is not None:
            groups = _by_package(catalog.value, packages)
            results = [
                pool.submit(_providers, names, package, module, timeout, machine)
                for (package, module), names in groups.items()
            ]
            for result in results:
                group, problem = result.result()
                providers += group
                found += [problem] if problem else []
            order = list(catalog.value)
            providers.sort(key=lambda each: (not each.available, order.index(each.name)))
    runs: dict[str, dict[str, Any]] | None = {} if run else None
    if runs is not None:
        for names in _by_package(catalog.value or {}, packages).values():  # one at a time, since each is timed
            usable = [each.name for each in providers if each.available and each.name in names]
            for name, outcome in _runs(usable, timeout, progress).items():
                runs |= {name: outcome.value} if outcome.value else {}
                found += _run_problem(name, outcome)
        runs = {each.name: runs[each.name] for each in providers if each.name in runs}
    copies: tuple[float, ...] | None = None
    if run and torch.value is not None and len(torch.value["gpus"]) > 1:
        progress("copying between GPUs")
        outcome = run_probe("links", timeout=timeout)
        if outcome.value is None:
            found.append(EnvironmentProblem(ERROR, f"GPUs cannot copy to each other: {outcome.problem}"))
        else:
            copies = tuple(outcome.value["copies_bytes_per_second"])
    suitable: tuple[dict[str, Any], ...] | None = None
    if torch.value is not None and library.value and len(torch.value["gpus"]) > 1 and torch.value["connection"]:
        gpu = torch.value["gpus"][0]
        slowest = str(min(copies)) if copies else ""
        outcome = run_probe(
            "strategies", torch.value["connection"], gpu["name"], gpu["compute_capability"],
            str(len(torch.value["gpus"])), slowest, timeout=timeout,
        )  # fmt: skip
        suitable = tuple(outcome.value["strategies"]) if outcome.value else None
    found = [*problems(Environment(machine, packages, torch.value)), *found]
    found.sort(key=lambda each: (each.level != ERROR, each.level != WARNING))
    version = library.value["version"] if library.value else None
    return Report(machine, packages, torch.value, version, tuple(providers), tuple(found), runs, copies, suitable)


def _by_package(catalog: dict[str, Any], packages: Mapping[str, Package]) -> dict[tuple[str, str], list[str]]:
    """The providers to probe in one process: those of one installed package, and all others, which import none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, needed in catalog.items():
        package, module = needed if needed and needed[0] in packages else ("", "")
        groups.setdefault((package, module), []).append(name)
    return groups


def _providers(
    names: list[str], package: str, module: str, timeout: float, machine: Machine
) -> tuple[list[Provider], EnvironmentProblem | None]:
    """The status of the providers of one package, and what is wrong with the package."""
    outcome = run_probe("providers", *names, timeout=timeout)
    if outcome.value is None and not package and len(names) > 1 and not outcome.late:
        # One of them ends the process, such as flex where Triton is broken. The others need not suffer.
        return [_providers([name], "", "", timeout, machine)[0][0] for name in names], None
    if outcome.value is None:
        reason = BROKEN + outcome.problem if package else outcome.problem
        unknown: dict[str, Any] = {
            "install": None,
            "version": None,
            "exact": True,
            "summary": "",
            "shortest": "",
            "device": "",
        }
        statuses = {name: unknown | {"available": False, "reason": reason} for name in names}
    else:
        statuses = outcome.value
    found = [_provider(name, status, machine) for name, status in statuses.items()]
    if not package:
        return found, None
    reasons = [status["reason"] for status in statuses.values()]
    broken = next((each.removeprefix(BROKEN) for each in reasons if each.startswith(BROKEN)), "")
    if not broken and all(reasons):  # it is too old, or no device fits, so that it was not imported
        broken = run_probe("module", module, timeout=timeout).problem
    if not broken:
        return found, None
    text = f"the package {package} is installed but cannot be imported: {broken}. {explain_import(broken)}".strip()
    fix = next((status["install"] for status in statuses.values() if status["install"]), None)
    return found, EnvironmentProblem(ERROR if machine.gpus else WARNING, text, fix or f"pip uninstall {package}")


def _runs(names: list[str], timeout: float, progress: Callable[[str], None]) -> dict[str, Outcome]:
    """The runs of the providers of one package, in one process; if that ends or hangs, in a process for each."""
    if not names:
        return {}
    progress(f"running {', '.join(names)}")
    outcome = run_probe("speeds", *names, timeout=timeout)
    if outcome.value is not None:
        return {name: dataclasses.replace(outcome, value=value) for name, value in outcome.value.items()}
    if len(names) == 1:
        return {names[0]: outcome}
    return {name: found for each in names for name, found in _runs([each], timeout, progress).items()}


def _provider(name: str, status: dict[str, Any], machine: Machine) -> Provider:
    """The provider with the shortest command first: a kernel from the Hub needs no compiler."""
    # No package helps where no device runs the provider.
    reason, fix = (status["device"], "") if status["device"] else (status["reason"], status["install"] or "")
    if fix and status["shortest"]:
        fix = f"{status['shortest']}; or {fix}"
    if fix and machine.system == "Windows":
        fix = f"in WSL: {fix}"
    return Provider(name, status["available"], reason, fix, status["version"], status["exact"], status["summary"])


def _run_problem(name: str, outcome: Outcome) -> list[EnvironmentProblem]:
    """What is wrong with the run of a provider."""
    if outcome.value is None:
        return [EnvironmentProblem(ERROR, f"the provider {name} could not be run: {outcome.problem}")]
    result = outcome.value
    if result["wrong"]:
        return [
            EnvironmentProblem(
                ERROR, f"the provider {name} computes wrong results: relative error {result['error']:.1e}"
            )
        ]
    if result["problem"] and not result["refused"]:
        return [EnvironmentProblem(ERROR, f"the provider {name} fails: {result['problem']}")]
    return []


def _torch_problem(torch: Outcome, packages: Mapping[str, Package]) -> EnvironmentProblem:
    if "torch" not in packages and "No module named 'torch'" in torch.problem:
        return EnvironmentProblem(ERROR, "PyTorch is not installed.", "pip install torch")
    version = f" {packages['torch'].version}" if "torch" in packages else ""
    explained = explain_import(torch.problem)
    text = f"PyTorch{version} cannot be imported: {torch.problem}. No provider can be examined. {explained}".strip()
    hidden = "torch" in packages and packages["torch"].hidden_by is not None
    return EnvironmentProblem(ERROR, text, "" if hidden else "pip install --force-reinstall torch")


def _library_problem(library: Outcome, packages: Mapping[str, Package]) -> EnvironmentProblem:
    package = packages.get("diffusers")
    if package is None:
        return EnvironmentProblem(ERROR, f"diffusers cannot be imported: {library.problem}.", "pip install diffusers")
    text = f"diffusers {package.version} cannot be imported, or does not fit this library: {library.problem}."
    at_fault = canonicalize_name(library.package)
    if at_fault in packages and at_fault != "diffusers":
        text += f" The error is raised in {at_fault} {packages[at_fault].version}."
    else:
        at_fault = canonicalize_name("diffusers")
    text = f"{text} {explain_import(library.problem)}".strip()
    return EnvironmentProblem(ERROR, text, f"pip install --force-reinstall --no-deps {at_fault}")
