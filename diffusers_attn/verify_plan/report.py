"""The report of `verify_cp_plan`."""

from __future__ import annotations

import dataclasses

from ..errors import AttentionProviderError


@dataclasses.dataclass(frozen=True)
class Argument:
    """The shape of an input tensor of a module, in one process and on a rank."""

    name: str
    full: tuple[int, ...] | None
    """Shape in one process; None if the module had no such input there."""
    local: tuple[int, ...]
    """Shape on this rank."""

    def __str__(self) -> str:
        if self.full is None:
            return f"{self.name} {list(self.local)}"
        return f"{self.name} {list(self.local)}" + (
            ", replicated" if self.full == self.local else f" of {list(self.full)} in one process"
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first difference between a model under its plan and the same model in one process, in order of execution."""

    module: str
    """Name of the module; "" is the model itself."""
    cls: str
    call: int
    """Number of the module's call, from 0."""
    rank: int
    problem: str
    """The difference, or the error that was raised."""
    inputs: tuple[Argument, ...]
    after: str
    """Name of the last module that ended before; "" for none."""
    hint: str
    """Advice what to check first; "" if `problem` has it already."""

    def __str__(self) -> str:
        name = f"'{self.module}' ({self.cls})" if self.module else f"the model's own forward ({self.cls})"
        times = f", call {self.call + 1}" if self.call else ""
        after = f", after '{self.after}'" if self.after else ""
        given = "; ".join(map(str, self.inputs)) or "no tensors"
        hint = f"\n{self.hint}" if self.hint else ""
        return f"first difference at {name}{times}{after}, on rank {self.rank}: {self.problem}\ninputs: {given}{hint}"


@dataclasses.dataclass(frozen=True)
class StrategyReport:
    """The results of one strategy."""

    name: str
    """"ulysses", "gather" (a ring with rotate_method="allgather") or "ring" (with "alltoall")."""
    error: float | None = None
    """Relative error of the outputs against one process; None if the run ended before."""
    gradient_error: float | None = None
    """Relative error of the gradients averaged over the ranks; None if they were not compared."""
    gradient: str = ""
    """Name of the parameter whose gradient differs most."""
    difference: Difference | None = None
    failure: str = ""
    """Reason why there are no outputs: an error outside the model, or a process that ended without an error."""


@dataclasses.dataclass(frozen=True)
class CPPlanReport:
    """The result of `verify_cp_plan`. Prints as a short report."""

    model: str
    world_size: int
    tolerance: float
    strategies: tuple[StrategyReport, ...]
    unexchanged: float | None
    """Relative error of the output when attention exchanges nothing between ranks. It must exceed the tolerance, or the
    comparison proves nothing. Infinite if the model does not run that way, None if this was not tried."""

    def right(self, strategy: StrategyReport) -> bool:
        """Whether this strategy gives the results of one process, within the tolerance."""
        errors = [error for error in (strategy.error, strategy.gradient_error) if error is not None]
        return strategy.error is not None and all(error <= self.tolerance for error in errors)

    @property
    def insensitive(self) -> bool:
        """Whether the output is the same without any exchange, and so does not depend on attention."""
        return self.unexchanged is not None and self.unexchanged <= self.tolerance

    @property
    def ok(self) -> bool:
        """Whether every strategy ran and is right, and the output depends on attention."""
        return bool(self.strategies) and all(map(self.right, self.strategies)) and not self.insensitive

    @property
    def difference(self) -> Difference | None:
        """The first difference found; None if there is none."""
        return next((strategy.difference for strategy in self.strategies if strategy.difference is not None), None)

    def raise_if_wrong(self) -> None:
        """Raises AttentionProviderError with the report unless it is `ok`."""
        if not self.ok:
            raise AttentionProviderError(f"the context-parallel plan could not be verified.\n{self}")

    def __str__(self) -> str:
        verdict = "right" if self.ok else "insensitive" if all(map(self.right, self.strategies)) else "wrong"
        lines = [f"{self.model} under its plan on {self.world_size} processes: {verdict}"]
        for strategy in self.strategies:
            lines.append(f"  {strategy.name}: {self._summary(strategy)}")
            if strategy.difference is not None:
                lines += [f"    {line}" for line in str(strategy.difference).splitlines()]
        if self.unexchanged is not None:
            result = f"output {self.unexchanged:.1e}" if self.unexchanged < float("inf") else "does not run"
            lines.append(f"  without any exchange in attention: {result}, as it must be" * (not self.insensitive))
        if self.insensitive:
            lines[-1] = (
                f"  without any exchange in attention: output {self.unexchanged:.1e}. The output hardly depends on "
                "attention, so this comparison proves nothing. A cause are layers initialised to zero, such as output "
                "layers and gates: give the model random or trained weights."
            )
        return "\n".join(lines)

    def _summary(self, strategy: StrategyReport) -> str:
        text = "right" if self.right(strategy) else "wrong" if strategy.error is not None else "failed"
        if strategy.error is not None:
            text += f", output {strategy.error:.1e}"
        if strategy.gradient_error is not None:
            text += f", gradients {strategy.gradient_error:.1e}"
            if strategy.gradient_error > self.tolerance:
                text += f" (largest for '{strategy.gradient}')"
        return text + (f": {strategy.failure}" if strategy.failure else "")
