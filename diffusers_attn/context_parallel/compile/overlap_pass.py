"""In a compiled graph, keys and values are sent as soon as they are there, and what does not need them comes after.

A model computes query, key and value, and perhaps an MLP in parallel, before it asks for attention, which is where an
exchange begins. By the graph one sees that neither the queries nor the MLP need to be there by then:

    hidden -> query, key, value, mlp -> [send key, value] -> attention -> ...

becomes

    hidden -> key, value -> [send key, value] -> query, mlp -> attention -> ...

so that products of matrices, and not only attention to the local keys, hide the exchange. The order of a graph binds no
compiler; what the operators of `symmetric_gather` say of their arguments does. So the tensors that these products read
become arguments of `symmetric_gather_start`, which claims to change them, and their results arguments of
`symmetric_gather_finish`, which claims to read them.

This is a pass over the graph that Dynamo traced, before anything is done to it. Only what is known to leave its
arguments, the random state and the compiler's modes alone is moved, and nothing past another exchange.

Exchanges must stay in their order, which must be the same on all ranks, and what one has brought must be read before
the next begins (`symmetric_gather`). Where nothing that an exchange sends sees to that, as where two attentions of a
block do not depend on each other, what the one before has led to becomes an argument, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

HELD, MEANWHILE, TICKET_OF_START, TICKET_OF_FINISH = 0, 1, 3, 4
"""positions of arguments of `symmetric_gather_start` and `symmetric_gather_finish`."""
_LONG = frozenset("linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d scaled_dot_product_attention".split())
"""functions that take long enough to hide an exchange, and are kernels by themselves."""
_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal".split()
)
_IN_PLACE = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem delitem".split()
)
_MODULES = ("torch", "_operator", "math", "builtins")
"""of functions of which it is known what their names say."""


def begin_early(graph: Graph) -> None:
    """Moves what neither keys nor values need behind the `symmetric_gather_start` that sends them, wherever there is
    something that takes long, and ties each to what reads what the one before has brought. The graph computes the
    same."""
    finishes = {node.args[TICKET_OF_FINISH]: node for node in _calls(graph, "symmetric_gather_finish")}
    for start in _calls(graph, "symmetric_gather_start"):
        held: Any = start.args[HELD]
        sent, query = held[:2], held[2:]
        tied = [*sent, *_results_to_wait_for(start, sent)]
        start.update_arg(HELD, [*tied, *query])
        finish = finishes.get(start.args[TICKET_OF_START])
        if finish is not None:  # without fullgraph, the graph may break between them
            _begin_early(start, finish, tied)


def _calls(graph: Graph, name: str) -> list[Node]:
    return list(graph.find_nodes(op="call_function", target=getattr(torch.ops.diffusers_attn, name).default))


def _results_to_wait_for(start: Node, sent: Sequence[Node]) -> list[Node]:
    """What comes, before `start`, of reading the memory that earlier exchanges have brought, where nothing `sent`
    depends on it."""
    received = {_memory(finish) for finish in _calls(start.graph, "symmetric_gather_finish")} - {None}
    before = dict.fromkeys(itertools.takewhile(lambda node: node is not start, start.graph.nodes))
    seen_to = _ancestors(sent, set(before))
    results: list[Node] = []
    for node in before:  # views of that memory do not read it
        reads = _memory(node) not in received and any(_memory(each) in received for each in node.all_input_nodes)
        if reads and node not in seen_to:
            # Of an operator with several results, as attention with its lse, what takes one of them is a tensor.
            results += [each for each in (node, *node.users) if each in before]
    return _own_tensors(results, sent, start.graph)


def _begin_early(start: Node, finish: Node, tied: Sequence[Node]) -> None:
    """`tied`: keys, values, and what else `start` must come after."""
    before = _movable_before(start)
    needed = _ancestors([*tied, *_nodes(start.args[1:])], set(before))
    beside = [node for node in before if node not in needed]
    long, read = _long_and_what_they_read(beside)
    anchors = _own_tensors(read, tied, start.graph)
    if not anchors:
        return  # nothing would keep a compiler from computing it before
    last = start
    for node in beside:
        last.append(node)
        last = node
    start.update_arg(HELD, [*tied, *anchors])
    finish.update_arg(HELD, [*tied[:2]])
    meanwhile: Any = finish.args[MEANWHILE]
    awaited = _ancestors(meanwhile, set(beside))
    finish.update_arg(MEANWHILE, [*meanwhile, *(node for node in long if node not in awaited)])


def _movable_before(start: Node) -> list[Node]:
    """What comes before `start`, in its order, back to the first that must stay where it is."""
    found: list[Node] = []
    node = start.prev
    while node.op in ("call_function", "call_method", "get_attr") and not _must_stay(node):
        found.append(node)
        node = node.prev
    return found[::-1]


def _must_stay(node: Node) -> bool:
    """Whether it may do anything but return a value: write to an argument, send, draw numbers, switch a mode."""
    target: Any = node.target
    if node.op == "get_attr":
        return False
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if isinstance(target, OpOverload):
        random = torch.Tag.nondeterministic_seeded in target.tags
        return random or target._schema.is_mutable or "c10d" in target.namespace
    if node.op == "call_function" and not (getattr(target, "__module__", None) or "torch").startswith(_MODULES):
        return True
    name = _name(node)
    if "dropout" in name:
        return True in (*node.args[2:], *node.kwargs.values())
    writes = name.endswith("_") and not name.endswith("__")
    switches = name.startswith(("_set_", "_enter_", "_exit_"))
    return not name or writes or switches or name in _RANDOM or name.strip("_") in _IN_PLACE


def _long_and_what_they_read(beside: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """What takes long, and what the first of it depends on outside of `beside`."""
    long: list[Node] = []
    read: dict[Node, None] = {}
    outside: dict[Node, dict[Node, None]] = {}
    """for each node what it reads from outside; nothing behind one that takes long, which waits for it anyway."""
    for node in beside:
        inputs = [outside.get(each, {each: None}) for each in node.all_input_nodes]
        outside[node] = dict.fromkeys(itertools.chain(*inputs))
        if _name(node) in _LONG:
            long.append(node)
            read |= outside[node]
            outside[node] = {}
    return long, list(read)


def _own_tensors(nodes: Iterable[Node], taken: Iterable[Node], graph: Graph) -> list[Node]:
    """Those which the graph has made for itself, one of each memory: a compiler may be told that they are changed. Of
    an input it would make a copy, and then copy it back."""
    others = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    memory = {_memory(node) for node in itertools.chain(others, taken)} | {None}
    found: list[Node] = []
    for node in nodes:
        if _memory(node) not in memory:
            found.append(node)
            memory.add(_memory(node))
    return found


def _memory(node: Node) -> int | None:
    """What tells its memory from others'; None of what is no tensor."""
    example = node.meta.get("example_value")
    return example.untyped_storage()._cdata if isinstance(example, Tensor) else None


def _ancestors(nodes: Iterable[Node], within: set[Node]) -> set[Node]:
    """Those of `within` that `nodes` depend on, and that they are."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in within and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(arguments, found.append)
    return found


def _name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.split("::")[-1]
    return target if isinstance(target, str) else getattr(target, "__name__", "")
