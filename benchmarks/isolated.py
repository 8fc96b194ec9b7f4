"""Runs a variant of a benchmark in processes of its own, one for each rank.

Some libraries replace methods of diffusers' classes and keep global state. Here no variant changes another one, and a
variant that fails or hangs is killed without the others. Tensors that are sent are shared, also those on a GPU, so that
all variants use one copy of the weights.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch.multiprocessing  # noqa: F401 (lets connections send tensors as shared memory)
from ranks import VariantError

from diffusers_attn.parent_process import end_with_parent

LAUNCHER = "TORCHELASTIC_"
"""Prefix of torchrun's variables. With them, a process group would be made through the store of the launcher."""

SECONDS_TO_FAIL = 5
"""Seconds that other ranks are waited for after one has failed."""


class Group(Protocol):
    """What is needed of `ranks.Ranks`."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]: ...


class Isolated:
    """The process of one variant on this rank. All ranks make the same calls.

    Args:
        ranks: the ranks of the benchmark.
        make: function without arguments that returns the object to call, in the new process.
        context: how processes start; the default is `multiprocessing`'s "spawn".
    """

    def __init__(self, ranks: Group, make: Callable[[], Any], context: Any = None) -> None:
        self.ranks = ranks
        port = ranks.gather(_free_port() if ranks.rank == 0 else None)[0]
        context = context or multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.process = context.Process(target=_serve, args=(theirs, make, environment))
        self.process.start()
        theirs.close()

    def ask(self, seconds: float, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of the object on all ranks, and returns the result of each rank.

        Raises:
            VariantError: a rank failed, ended, or gave no answer within `seconds`. The processes of all ranks have been
                killed, since the others may wait for that rank forever.
        """
        mine, left = self._send(method, arguments), math.ceil(seconds)
        while True:
            mine = mine or self._answer(1.0)
            every = self.ranks.gather(mine)
            failed = {rank: answer[1] for rank, answer in enumerate(every) if answer and answer[1]}
            if all(every) and not failed:
                return [result for result, _ in every]
            # Most failures are those of all ranks, only not at the same moment.
            left = min(left - 1, SECONDS_TO_FAIL) if failed else left - 1
            if all(every) or left <= 0:
                break
        self.kill()
        if len(failed) == self.ranks.size:
            raise VariantError(failed[0])
        if failed:
            raise VariantError(", ".join(f"rank {rank} alone: {error}" for rank, error in failed.items()))
        late = [rank for rank, answer in enumerate(every) if answer is None]
        raise VariantError(f"no answer to {method!r} from ranks {late} in {seconds:.0f} s")

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.join()

    def close(self, seconds: float = 10.0) -> None:
        """Ends the process, so that it gives back the memory that it shares."""
        with contextlib.suppress(OSError):
            self.connection.close()
        self.process.join(seconds)
        self.kill()

    def _send(self, method: str, arguments: tuple[Any, ...]) -> tuple[Any, str] | None:
        try:
            self.connection.send((method, arguments))
        except (OSError, RuntimeError) as failure:
            return None, one_line(failure)
        return None

    def _answer(self, seconds: float) -> tuple[Any, str] | None:
        """The result and the error of the call, or None if there is no answer after `seconds`."""
        try:
            return self.connection.recv() if self.connection.poll(seconds) else None
        except (EOFError, OSError):
            self.process.join(seconds)
            return None, f"its process ended with exit code {self.process.exitcode}"


def one_line(failure: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"


def _serve(connection: Any, make: Callable[[], Any], environment: Mapping[str, str]) -> None:
    """Calls the methods that are asked for, until the other side closes the connection."""
    end_with_parent()
    for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
        del os.environ[name]
    os.environ.update(environment)
    served = None
    while True:
        try:
            method, arguments = connection.recv()
            served = served or make()
            answer = getattr(served, method)(*arguments), ""
        except EOFError:
            # Without the end of Python, which would wait for threads of process groups.
            del served
            os._exit(0)
        except Exception as failure:  # whatever it is, the other variants are still measured
            answer = None, one_line(failure)
        connection.send(answer)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
