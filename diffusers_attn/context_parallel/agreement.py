"""Every rank's inputs of a model, kept the same.

Context parallelism computes one forward on several ranks, so each must be given the same inputs. The classic failure is
noise that every rank drew by itself, which gives a picture made of pieces of several. Before tensors are split:

1. Every rank makes a digest of its call: names, shapes and dtypes of tensors, and values of numbers, flags and strings.
   Digests are exchanged between hosts, through the CPU's memory: devices go on computing meanwhile and nothing waits
   for them. So shapes are known to be equal before an exchange depends on them, and no rank goes a way of its own.
2. Where digests differ, the ranks exchange what they were made of, and all raise the same error, naming arguments.
3. Otherwise the first rank's tensors go to the others, in one message ("broadcast"). Or fingerprints of their values
   were in the digests already ("check"); reading those is the one thing for which a host waits for its device.
   The first rank, and every rank in "check", goes on with the tensor objects that it was given. The others are given
   the same memory for the same input every time (`received.py`), since caches know an input by its address.

Where a model's forward is recorded as CUDA graphs, ranks also agree on what is.

A tensor that requires a gradient is never replaced, since its graph is this rank's own: it is checked in both modes.
What a plan calls a cache is left alone in all: the model writes into it, and it may be larger than all else together.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import AttentionProviderError
from . import diffusers_hooks
from .mesh import ContextParallelMesh, Group
from .nested import like, updated
from .received import Received

MODES = ("broadcast", "check", "trust")
_COLLECTIVES = torch.ops._c10d_functional

log = logging.getLogger(__name__)


class Links(NamedTuple):
    """How the ranks that share a sequence reach each other: along the ring, then along Ulysses. What the ring's first
    ranks have goes along the ring, then from the first of each Ulysses group to the others: all have rank 0's."""

    device: tuple[Group, ...]
    """groups for tensors on the model's device."""
    host: tuple[Group, ...]
    """groups for tensors in the CPU's memory."""

    @staticmethod
    def of(mesh: ContextParallelMesh) -> Links:
        """Those of `mesh`. Its own groups serve the host too where they take CPU tensors, as gloo's do; otherwise new
        ones are made, so that all ranks of the mesh must call this."""
        groups = tuple(group for group in (mesh.ring, mesh.ulysses) if group.size > 1)
        return Links(groups, tuple(map(_host_group, groups)))

    def release(self) -> None:
        """Ends the groups that `of` made."""
        for device, host in zip(self.device, self.host):
            if host != device and dist.is_initialized():
                dist.destroy_process_group(_process_group(host))


def _process_group(group: Group) -> dist.ProcessGroup:
    # What functional collectives do with a name.
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(group.name)


def _host_group(group: Group) -> Group:
    of_device = _process_group(group)
    if "cpu:" in dist.get_backend_config(of_device):
        return group
    ranks = dist.get_process_group_ranks(of_device)
    made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return group._replace(name=made.group_name)


class Agreement:
    """A forward pre-hook (with kwargs) that runs before a model's inputs are split.

    Args:
        module: the model; the signature of its forward gives names to arguments.
        links: of the ranks that share a sequence.
        mode: "broadcast": all are given the first rank's tensors; "check": an error where tensors differ.
        caches: names of arguments that are each rank's own; that they are given is all that ranks agree on.
    """

    def __init__(self, module: nn.Module, links: Links, mode: str, caches: Sequence[str] = ()) -> None:
        self.links = json.dumps(links)
        self.mode = mode
        self.caches = frozenset(caches)
        self.names = list(inspect.signature(module.forward).parameters)
        self.compared = False
        """whether tensors that are about to be replaced were compared: once, to tell the user of unseeded noise."""
        self.received = Received()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _named(self.names, args, kwargs)
        found = _Found([], [], [], [], [], [], [])
        for name, value in given:
            if name in self.caches and value is not None:
                found.said.append(f"{name}: {type(value).__name__}")
            else:
                _find(found, name, value)
        compare = False
        if not torch.compiler.is_compiling():
            # A rank that replays a recorded forward and one that runs it meet in other places.
            standing = getattr(vars(module).get("forward"), "standing", None)
            if standing is not None:
                found.said.append(f"what is recorded of the model: {standing()}")
            hooks = diffusers_hooks.standing(module)
            if hooks:
                found.said.append(f"hooks of diffusers in the model: {hooks}")
            compare, self.compared = self.mode == "broadcast" and not self.compared, True
        call = (
            found.sent, [tensor.detach() for tensor in found.watched], found.integers, found.floats,
            "\n".join(found.names), "\n".join(found.watched_names), "\n".join(found.said), self.links,
            self.mode == "check", compare,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            zero, *sent = torch.ops.diffusers_attn.agree(*call)
            # The compiler drops what nothing depends on. What is kept as it is comes after the answer, so to speak.
            watched = [tensor + zero for tensor in found.watched]
        else:
            sent, watched = self._kept(found.sent, _values(*call)), found.watched
        # The same order again: each takes the place of one that was found.
        places = iter(sent), iter(watched)
        new = {name: value if name in self.caches else _replaced(value, *places) for name, value in given}
        new_args = [new[name] for name, _ in given[: len(args)]]
        return tuple(new_args), {name: new[name] for name in kwargs}

    def _kept(self, own: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Tensors with these values: the very ones that this rank has, where the values are its own."""
        self.received.forget()
        return [mine if mine is each else self.received.keep(mine, each) for mine, each in zip(own, values)]


class _Found(NamedTuple):
    """What is in a call, with a name for everything."""

    sent: list[Tensor]
    names: list[str]
    watched: list[Tensor]
    """tensors that are compared in any mode, and kept."""
    watched_names: list[str]
    integers: list[int]
    floats: list[float]
    said: list[str]
    """names of the numbers, and names and values of all else."""


def _named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Arguments with their names; those that were given by name in an order that is every rank's."""
    placed = [(names[i] if i < len(names) else f"argument {i}", value) for i, value in enumerate(args)]
    return placed + [(name, kwargs[name]) for name in sorted(kwargs)]


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """What is in a container, in an order that is every rank's; None for what is none."""
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return [(name, value[name]) for name in sorted(value, key=str)]
    return None


def _find(found: _Found, name: str, value: Any) -> None:
    items = _items(value)
    if isinstance(value, Tensor):
        if _is_watched(value):
            found.watched.append(value)
            found.watched_names.append(name)
        else:
            found.sent.append(value)
            found.names.append(name)
    elif items is not None:
        found.said.append(f"{name}: {type(value).__name__} of {len(items)}")
        for key, each in items:
            _find(found, f"{name}[{key!r}]", each)
    elif value is None or isinstance(value, (bool, str, torch.dtype)):
        found.said.append(f"{name}: {value!r}")
    elif isinstance(value, int):  # a number is passed on as one: in a graph it may be symbolic
        found.said.append(f"{name}: an int")
        found.integers.append(value)
    elif isinstance(value, float):
        found.said.append(f"{name}: a float")
        found.floats.append(value)
    else:
        found.said.append(f"{name}: {type(value).__name__}")


def _is_watched(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _replaced(value: Any, sent: Iterator[Tensor], watched: Iterator[Tensor]) -> Any:
    """`value` with other tensors; what holds none stays the object that it is, as a model may write into it."""
    if isinstance(value, Tensor):
        return next(watched) if _is_watched(value) else next(sent)
    items = _items(value)
    if items is None:
        return value
    new = {key: _replaced(each, sent, watched) for key, each in items}
    if all(new[key] is each for key, each in items):
        return value
    return updated(value, new) if isinstance(value, Mapping) else like(value, [new[key] for key, _ in items])


def _values(
    sent: Sequence[Tensor],
    watched: Sequence[Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    names: str,
    watched_names: str,
    said: str,
    links: str,
    check: bool,
    compare: bool,
) -> list[Tensor]:
    """The first rank's `sent`. Where that is known to be this rank's, or is to be checked and is, its own tensors.

    Raises:
        AttentionProviderError: the ranks were given different inputs. On all of them.
    """
    device, host = ([Group(*group) for group in groups] for groups in json.loads(links))
    call = _described(sent, watched, integers, floats, names, watched_names, said, check)
    if _differ(call, host):
        raise _different(_everyone(call, host))
    if compare:
        _report({name: _fingerprint(tensor) for name, tensor in zip(names.split("\n"), sent)}, host)
    return list(sent) if check else _of_first_rank(sent, device, host)


# One operator, opaque to the compiler: all that depends on other ranks happens within it.
@torch.library.custom_op("diffusers_attn::agree", mutates_args=())
def _agree(
    sent: Sequence[Tensor],
    watched: Sequence[Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    names: str,
    watched_names: str,
    said: str,
    links: str,
    check: bool,
    compare: bool,
) -> list[Tensor]:
    """A zero, for others to depend on, and copies of what `_values` returns."""
    values = _values(sent, watched, integers, floats, names, watched_names, said, links, check, compare)
    return [torch.zeros(()), *(torch.empty_like(mine).copy_(each) for mine, each in zip(sent, values))]


@_agree.register_fake
def _(sent, watched, integers, floats, names, watched_names, said, links, check, compare):  # type: ignore[no-untyped-def]
    return [torch.zeros(()), *map(torch.empty_like, sent)]


def _described(
    sent: Sequence[Tensor],
    watched: Sequence[Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    names: str,
    watched_names: str,
    said: str,
    check: bool,
) -> dict[str, str]:
    """All that ranks must agree on, by argument."""
    tensors = [(name, tensor, check) for name, tensor in zip(names.split("\n"), sent)]
    tensors += [(name, tensor, True) for name, tensor in zip(watched_names.split("\n"), watched)]
    call = {
        name: f"{_shape(tensor)}, values {_fingerprint(tensor)}" if read else _shape(tensor)
        for name, tensor, read in tensors
    }
    numbers = {"an int": iter(integers), "a float": iter(floats)}
    for line in said.split("\n") if said else []:
        name, _, value = line.partition(": ")
        call[name] = repr(next(numbers[value])) if value in numbers else value
    return call


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"


def _fingerprint(tensor: Tensor) -> str:
    """Of every bit and its place. Waits for the tensor's device."""
    if tensor.numel() == 0:
        return "none"
    raw = _bytes(tensor)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)).view(torch.int64)
    place = torch.arange(1, raw.numel() + 1, device=raw.device)
    # Sums modulo 2^64, which do not depend on their order. Multipliers are odd, so that every bit counts.
    mixed = (raw ^ (raw >> 29)) * (2 * place + 1)
    return "%016x" % (int((mixed ^ (mixed >> 32)).sum()) % 2**64)


def _bytes(tensor: Tensor) -> Tensor:
    # A dimension of size one has any stride, 0 where it was expanded, and a view as bytes wants 1.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _differ(call: Mapping[str, str], groups: Sequence[Group]) -> bool:
    """Whether ranks have different ones: every rank has the same answer."""
    digest = hashlib.blake2b(json.dumps(call, sort_keys=True).encode(), digest_size=8).digest()
    digests = _gathered(torch.frombuffer(bytearray(digest), dtype=torch.int64), groups)
    return len(set(digests.tolist())) > 1


def _gathered(tensor: Tensor, groups: Sequence[Group]) -> Tensor:
    """The rows of all ranks, in the order of their shards."""
    for group in reversed(groups):
        gathered = _COLLECTIVES.all_gather_into_tensor(tensor, group.size, group.name)
        tensor = _COLLECTIVES.wait_tensor(gathered)
    return tensor


def _everyone(call: Mapping[str, str], groups: Sequence[Group]) -> list[tuple[int, dict[str, str]]]:
    """What all ranks have, each with its number."""
    raw = json.dumps([dist.get_rank(), call]).encode()
    sizes = _gathered(torch.tensor([len(raw)]), groups).tolist()
    padded = torch.frombuffer(bytearray(raw.ljust(max(sizes))), dtype=torch.uint8)
    rows = _gathered(padded[None], groups)
    return [tuple(json.loads(bytes(row.tolist()))) for row in rows]


def _differences(calls: list[tuple[int, dict[str, str]]]) -> list[str]:
    """A line for every argument that differs."""
    lines = []
    for name in dict.fromkeys(name for _, call in calls for name in call):
        ranks: dict[str, list[int]] = {}
        for rank, call in calls:
            ranks.setdefault(call.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            lines.append(f"{name}: " + "; ".join(f"{what} on {_ranks(those)}" for what, those in ranks.items()))
    return lines


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _different(calls: list[tuple[int, dict[str, str]]]) -> AttentionProviderError:
    return AttentionProviderError(
        "the ranks that share a sequence were given different inputs. "
        + ". ".join(_differences(calls))
        + ". Call the model with the same arguments on all of them: the same prompt and sizes, noise from a generator "
        "that is seeded alike, batches of the same data."
    )


def _report(fingerprints: dict[str, str], groups: Sequence[Group]) -> None:
    """Tells the first rank's user where tensors that are replaced were not the same."""
    if _differ(fingerprints, groups):
        calls = _everyone(fingerprints, groups)
        if dist.get_rank() == calls[0][0]:
            names = ", ".join(line.partition(":")[0] for line in _differences(calls))
            log.warning(
                "the ranks that share a sequence were given different values of %s: those of rank %d are used on all, "
                "and only its results are whole. Seed generators alike on all ranks.",
                names,
                calls[0][0],
            )


def _of_first_rank(tensors: Sequence[Tensor], device: Sequence[Group], host: Sequence[Group]) -> list[Tensor]:
    """The first rank's tensors, of the same shapes and dtypes, in one message for each kind of memory. On the first
    rank, and where there is nothing to send, they are `tensors` themselves."""
    first, values = all(group.rank == 0 for group in host), list(tensors)
    for on_device in (False, True):
        # A host's memory is the device of a model on CPUs.
        mine = [i for i, tensor in enumerate(tensors) if (tensor.device.type != "cpu") == on_device and tensor.numel()]
        if not mine:
            continue
        mine.sort(key=lambda i: -tensors[i].element_size())  # each then begins at a multiple of its size
        message = torch.cat([_bytes(tensors[i]) for i in mine])
        for group in device if on_device else host:
            message = _COLLECTIVES.wait_tensor(_COLLECTIVES.broadcast(message, 0, group.name))
        parts = message.split([tensors[i].numel() * tensors[i].element_size() for i in mine])
        for i, part in zip(mine, parts):
            values[i] = tensors[i] if first else part.view(tensors[i].dtype).view(tensors[i].shape)
    return values
