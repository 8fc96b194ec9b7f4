"""Settings of Inductor for graphs with exchanges. They are private to Inductor, and set only in this file.

On a GPU, Inductor may leave gaps between the rows of a tensor so that they begin at aligned addresses
(`comprehensive_padding`). Before PyTorch 2.13 this silently gives wrong gradients when a concatenation reads a tensor
with gaps (as in the backward of rotary embeddings) and the memory layout of the tensor follows from its inputs (as for
gradients of attention, heads first): the two assume different layouts. For these versions the gaps are turned off.

Inductor also runs `overlap_pass.start_exchanges_early`. A pass that is already set runs before it.

Both are set while a graph with an exchange is compiled, and not for other graphs of the process.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from packaging.version import Version
from torch._guards import CompileContext
from torch.fx import Graph

from . import overlap_pass
from .overlap_pass import start_exchanges_early

ORDERS_AGREE = Version("2.13")


@torch._dynamo.assume_constant_result
def prepare_for_exchanges() -> bool:
    """Called where an exchange is traced, which is before the compiler receives the graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # slow to import, and needed only for compilation

    output = InstructionTranslator.current_tx().output
    if output.compiler_fn is not None and not hasattr(output.compiler_fn, _READY):
        output.compiler_fn = _compiler(output.compiler_fn)
    return True


_READY = "_diffusers_attn_exchanges"


def _compiler(compiler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiler)
    def compile_exchanges(*args: Any, **kwargs: Any) -> Any:
        with settings():
            compiled = compiler(*args, **kwargs)
        if Version(torch.__version__) < ORDERS_AGREE:
            _backwards.expect(CompileContext.get())
        return compiled

    setattr(compile_exchanges, _READY, True)
    return compile_exchanges


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """The settings of Inductor for graphs with exchanges."""
    from torch._inductor import config

    changes: dict[str, Any] = {"pre_grad_custom_pass": _make_pass(config.pre_grad_custom_pass)}
    if Version(torch.__version__) < ORDERS_AGREE:
        changes["comprehensive_padding"] = False
    with config.patch(changes):
        yield


class _Backwards:
    """Applies the settings to a graph's backward, which is compiled at its first call."""

    def __init__(self) -> None:
        self._expected: weakref.WeakSet[CompileContext] = weakref.WeakSet()
        self._scope = contextlib.ExitStack()

    def expect(self, context: CompileContext) -> None:
        """Expects the backward of a graph, which is compiled in the same context as its forward."""
        from torch._dynamo.callback import callback_handler

        self._expected.add(context)
        if self._begin not in callback_handler.start_callbacks:  # torch.compiler.reset() removes it
            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)

    def _begin(self, _: Any) -> None:
        if CompileContext.try_get() in self._expected:
            self._scope.enter_context(settings())

    def _end(self, _: Any) -> None:
        self._scope.close()


_backwards = _Backwards()


def _make_pass(others: Any) -> Any:
    """`start_exchanges_early` as a pass of Inductor that first runs `others`: None, a pass, or several."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    passes = others if isinstance(others, (list, tuple)) else [] if others is None else [others]

    class BeginEarly(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for other in passes:
                other(graph)
            start_exchanges_early(graph)

        def uuid(self) -> Any:
            """Key of the pass in Inductor's cache. None disables caching, for example if another pass has no key."""
            known = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in passes]
            return None if None in known else (*known, get_hash_for_files((overlap_pass.__file__,)))

        def __reduce__(self) -> Any:
            """PyTorch 2.11 pickles the pass for its cache."""
            return _make_pass, (others,)

    return BeginEarly()
