"""Keeps a model's inputs equal on all ranks that share a sequence.

Context parallelism computes one forward on several ranks, so all ranks need the same inputs. The most common error is
noise that each rank draws from its own seed; the result is an image made of pieces of several images. Before tensors
are split:

1. Every rank computes a digest of its call: names, shapes and dtypes of tensors, and values of numbers, flags and
   strings. Hosts exchange the digests through CPU memory, while devices go on computing. So shapes are known to be
   equal before any exchange depends on them.
2. If digests differ, the ranks exchange the full descriptions, and all raise the same error, which names the arguments.
3. Otherwise the first rank sends its tensors to the others in one message ("broadcast"). In "check", the digests
   contain fingerprints of the values instead; only reading these makes a host wait for its device. The first rank, and
   every rank in "check", keeps its own tensor objects. Other ranks get the same memory for the same input every time
   (`received.py`), since some caches identify an input by its address.

The digest also contains the number of the forward, the adapters with their scales, and the processors
(`forward_count.py`, `model_sync.py`). So the same exchange detects a rank that skipped a call or has another LoRA. If
the forward is recorded as CUDA graphs, it contains the state of the recordings, too.

A tensor that requires a gradient is never replaced, since its autograd graph belongs to this rank. Its values are
compared in both modes. An argument that the plan declares as a cache (`CPCache`) is neither compared nor replaced,
since the model writes into it and it may be larger than all other inputs together.
"""

from __future__ import annotations

import datetime
import enum
import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..context_parallel.comm import one_thread, rank_progress, shared_groups
from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.gather_rows import first_ranks_rows
from ..context_parallel.comm.group import Group
from ..context_parallel.comm.process_groups import resolve
from ..context_parallel.comm.rank_differences import differences
from ..context_parallel.hooks import diffusers_hooks
from ..context_parallel.mesh import ContextParallelMesh
from ..errors import AttentionProviderError
from ..nested import like, updated
from .fingerprint import bytes_of as _bytes
from .fingerprint import fingerprint as _fingerprint
from .fingerprint import fingerprint_of_all
from .forward_count import CALL, Forwards, digest_of, forwards_of
from .received import ReceivedInputs

MODES = ("broadcast", "check", "trust")

log = logging.getLogger(__name__)


class Links(NamedTuple):
    """The process groups of the ranks that share a sequence."""

    device: tuple[Group, ...]
    """Groups for tensors on the model's device, the ring's first. Sending from the first rank of each ring, and then
    from the first rank of each Ulysses group, gives all ranks the tensors of rank 0."""
    host: Group
    """A group of all these ranks, in the order of their shards, for tensors in CPU memory."""
    members: tuple[int, ...]
    """The ranks' numbers in the job, in that order."""
    lease: shared_groups.Lease
    """Lease of the `host` group."""

    @staticmethod
    def of(mesh: ContextParallelMesh, timeout: datetime.timedelta | None = None) -> Links:
        """The groups of `mesh`. All its ranks must call this, as it makes the host group unless they have one already.

        Args:
            mesh: the ranks that share a sequence.
            timeout: how long hosts wait for each other; None is the timeout of the job.
        """
        device = tuple(group for group in (mesh.ring, mesh.ulysses) if group.size > 1)
        device_groups = [resolve(group.name) for group in device]

        def gather(value: Any) -> list[Any]:
            return everyone(value, device_groups)

        members = tuple(gather(dist.get_rank()))
        lease = shared_groups.control_group(members, shared_groups.as_timeout(timeout, mesh.device_type), gather)
        return Links(device, Group(lease.names[0], mesh.rank, mesh.size), members, lease)


class InputSync:
    """A forward pre-hook (with kwargs) that runs before a model's inputs are split.

    Args:
        module: the model; the signature of its forward names the arguments.
        links: process groups of the ranks that share a sequence.
        mode: "broadcast": all ranks use the first rank's tensors; "check": tensors that differ are an error.
        caches: names of arguments whose contents each rank keeps for itself. Ranks compare only whether they are given.
        name: name of the model, for messages; None is its class.
    """

    def __init__(
        self, module: nn.Module, links: Links, mode: str, caches: Sequence[str] = (), name: str | None = None
    ) -> None:
        self.forwards = Forwards(module, type(module).__name__ if name is None else name)
        self.links = json.dumps([links.device, links.host, links.members, self.forwards.token])
        self.lease = links.lease
        self.groups = (*(group.name for group in links.device), links.host.name)
        self.mode = mode
        self.caches = frozenset(caches)
        self.names = list(inspect.signature(module.forward).parameters)
        self.compared = False
        """Whether values were compared before they were replaced. This is done once, to warn of unseeded noise."""
        self.received = ReceivedInputs()
        self.paused = False
        """Whether calls keep their own inputs. `guidance` exchanges those of a whole step itself."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.paused:
            return None
        if not torch.compiler.is_compiling():
            one_thread.take(self.groups, module)
        given = _named(self.names, args, kwargs)
        found = _Found([], [], [], [], [], [], [])
        for name, value in given:
            if name in self.caches and value is not None:
                found.plain.append((name, type(value).__name__))
            else:
                _find(found, name, value)
        found.plain.append((_GRADIENTS, f"{torch.is_grad_enabled()}"))
        found.plain.extend([(f"autocast on {device}", _autocast(device)) for device in ("cpu", "cuda")])
        compare = False
        if not torch.compiler.is_compiling():
            # A rank that replays a recorded forward exchanges at other places than one that runs it.
            standing = getattr(vars(module).get("forward"), "standing", None)
            if standing is not None:
                found.plain.append(("recorded CUDA graphs", standing()))
            hooks = diffusers_hooks.fingerprint(module)
            if hooks:
                found.plain.append(("hooks of diffusers in the model", hooks))
            compare, self.compared = self.mode == "broadcast" and not self.compared, True
        call = (
            found.sent, [tensor.detach() for tensor in found.watched], found.integers, found.floats,
            _joined(found.names), _joined(found.watched_names),
            _joined([part for line in found.plain for part in line]),
            self.links,
            self.mode == "check", compare,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            zero, *sent = torch.ops.diffusers_attn.agree(*call)
            # Adding the operator's zero makes these tensors depend on it: the compiler drops unused results.
            watched = [tensor + zero for tensor in found.watched]
        else:
            sent, watched = self._kept(found.sent, _values(*call)), found.watched
        # `_replaced` visits tensors in the order of `_find`.
        tensors = iter(sent), iter(watched)
        new = {name: value if name in self.caches else _replaced(value, *tensors) for name, value in given}
        new_args = [new[name] for name, _ in given[: len(args)]]
        return tuple(new_args), {name: new[name] for name in kwargs}

    def alike(self, tensors: Sequence[Tensor], plain: str) -> bool:
        """Whether these tensors and texts are equal on all ranks, which must all call this. Waits for the values."""
        _, host, members, _ = _links(self.links)
        described = [f"{list(each.shape)} {each.dtype}" for each in tensors]
        with rank_progress.waiting_for(members):
            return not _differ(f"{plain} {described} {fingerprint_of_all(tensors)}", host)

    def _kept(self, own: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Tensors with these values: this rank's own tensor objects if the values are its own."""
        self.received.forget()
        return [mine if mine is each else self.received.keep(mine, each) for mine, each in zip(own, values)]


class _Found(NamedTuple):
    """The values in a call's arguments, with their names."""

    sent: list[Tensor]
    names: list[str]
    watched: list[Tensor]
    """Tensors that are compared in both modes and never replaced."""
    watched_names: list[str]
    integers: list[int]
    floats: list[float]
    plain: list[tuple[str, str]]
    """Names of the numbers, and names and values of everything else that is not a tensor."""


def _autocast(device: str) -> str:
    return repr(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"


_GRADIENTS = "gradients are recorded"
_BETWEEN = "\x1e"


def _joined(parts: list[str]) -> str:
    """The strings as one, since an operator cannot have a list of strings as its argument."""
    return _BETWEEN.join([part.replace(_BETWEEN, "\\x1e") for part in parts])


def _named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments with their names; keyword arguments are sorted, so that the order is equal on all ranks."""
    placed = [(names[i] if i < len(names) else f"argument {i}", value) for i, value in enumerate(args)]
    return placed + [(name, kwargs[name]) for name in sorted(kwargs)]


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """The items of a container, in an order that is equal on all ranks; None if `value` is no container."""
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
        found.plain.append((name, f"{type(value).__name__} of {len(items)}"))
        for key, each in items:
            _find(found, f"{name}[{key!r}]", each)
    elif value is None or isinstance(value, (bool, str, bytes, complex, torch.dtype, torch.device, enum.Enum)):
        found.plain.append((name, repr(value)))
    elif isinstance(value, int):  # passed on as a number, since it may be symbolic in a graph
        found.plain.append((name, _AN_INT))
        found.integers.append(value)
    elif isinstance(value, float):
        found.plain.append((name, _A_FLOAT))
        found.floats.append(value)
    elif isinstance(value, (np.generic, np.ndarray)) and value.dtype != object:
        raw = np.ascontiguousarray(value)
        digest = hashlib.blake2b(raw.tobytes(), digest_size=8).hexdigest()
        found.plain.append((name, f"{type(value).__name__} {list(value.shape)} {value.dtype}, values {digest}"))
    else:
        found.plain.append((name, type(value).__name__))


_AN_INT, _A_FLOAT = "an int", "a float"


def _is_watched(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _replaced(value: Any, sent: Iterator[Tensor], watched: Iterator[Tensor]) -> Any:
    """`value` with its tensors replaced. Containers without replaced tensors stay the same objects, since a model may
    write into them."""
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
    plain: str,
    links: str,
    check: bool,
    compare: bool,
) -> list[Tensor]:
    """The first rank's values of `sent`; this rank's own tensors on the first rank and in "check".

    Raises:
        AttentionProviderError: the ranks were given different inputs. It is raised on all ranks.
    """
    axes, host, members, token = _links(links)
    forwards = forwards_of(token)
    one_thread.take((*(group.name for group in axes), host.name), forwards.model)
    described = _described(sent, watched, integers, floats, names, watched_names, plain, check)
    state = forwards.begin(in_training=described.call[_GRADIENTS] == "True")
    with rank_progress.waiting_for(members):
        if _differ(f"{state.at} {state.digest} {described.digest}", host):
            raise _different(_everyone([{CALL: state.at, **state.adapters}, described.call], host))
        if compare:
            _report({name: _fingerprint(tensor) for name, tensor in zip(names.split(_BETWEEN), sent)}, host)
        return list(sent) if check else _of_first_rank(sent, axes, host)


@functools.lru_cache(maxsize=256)
def _links(links: str) -> tuple[list[Group], Group, list[int], int]:
    device, host, members, token = json.loads(links)
    return [Group(*group) for group in device], Group(*host), members, token


# Everything that depends on other ranks is in one operator, which is opaque to the compiler.
@torch.library.custom_op("diffusers_attn::agree", mutates_args=())
def _agree(
    sent: Sequence[Tensor],
    watched: Sequence[Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    names: str,
    watched_names: str,
    plain: str,
    links: str,
    check: bool,
    compare: bool,
) -> list[Tensor]:
    """Returns a zero, on which other tensors can depend, and copies of the results of `_values`."""
    values = _values(sent, watched, integers, floats, names, watched_names, plain, links, check, compare)
    diffusers_hooks.check_in_graph(forwards_of(_links(links)[3]).model)
    return [torch.zeros(()), *(torch.empty_like(mine).copy_(each) for mine, each in zip(sent, values))]


@_agree.register_fake
def _(sent, watched, integers, floats, names, watched_names, plain, links, check, compare):  # type: ignore[no-untyped-def]
    return [torch.zeros(()), *map(torch.empty_like, sent)]


class _Described(NamedTuple):
    """The description of a call that must be equal on all ranks."""

    call: dict[str, str]
    """Descriptions by argument."""
    digest: str


def _described(
    sent: Sequence[Tensor],
    watched: Sequence[Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    names: str,
    watched_names: str,
    plain: str,
    check: bool,
) -> _Described:
    tensors = (*sent, *watched)
    read = [check] * len(sent) + [True] * len(watched)
    return _in_words(
        tuple([(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]),
        tuple([_fingerprint(tensor) if each else None for tensor, each in zip(tensors, read)]),
        tuple(map(repr, integers)),
        tuple(map(repr, floats)),
        names if sent else None,
        watched_names if watched else None,
        plain,
    )


@functools.lru_cache(maxsize=256)  # most calls differ from the previous one only in values of tensors
def _in_words(
    layouts: tuple[tuple[torch.Size, torch.dtype, str], ...],
    values: tuple[str | None, ...],
    integers: tuple[str, ...],
    floats: tuple[str, ...],
    names: str | None,
    watched_names: str | None,
    plain: str,
) -> _Described:
    tensor_names = [name for each in (names, watched_names) if each is not None for name in each.split(_BETWEEN)]
    lines = [
        (name, _layout(*layout) if value is None else f"{_layout(*layout)}, values {value}")
        for name, layout, value in zip(tensor_names, layouts, values)
    ]
    numbers = {_AN_INT: iter(integers), _A_FLOAT: iter(floats)}
    parts = plain.split(_BETWEEN)
    lines += [
        (name, next(numbers[value]) if value in numbers else value) for name, value in zip(parts[::2], parts[1::2])
    ]
    call: dict[str, str] = {}
    for name, value in lines:
        while name in call:  # different keys of a dict can have the same repr
            name += "'"
        call[name] = value
    return _Described(call, digest_of(call))


def _layout(shape: torch.Size, dtype: torch.dtype, device: str) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"


def _differ(text: str, host: Group) -> bool:
    """Whether the ranks' texts differ. The result is equal on all ranks."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    digests = _gathered(torch.frombuffer(bytearray(digest), dtype=torch.int64), host)
    return len(set(digests.tolist())) > 1


def _gathered(tensor: Tensor, host: Group) -> Tensor:
    """The rows of all ranks, in the order of their shards."""
    rows = tensor.new_empty(host.size * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather(list(rows.chunk(host.size)), tensor, group=resolve(host.name))
    return rows


def _everyone(value: Any, host: Group) -> list[tuple[int, Any]]:
    """The value of every rank, a JSON value, with the rank's number."""
    raw = json.dumps([dist.get_rank(), value]).encode()
    sizes = _gathered(torch.tensor([len(raw)]), host).tolist()
    padded = torch.frombuffer(bytearray(raw.ljust(max(sizes))), dtype=torch.uint8)
    rows = _gathered(padded[None], host)
    return [tuple(json.loads(bytes(row.tolist()))) for row in rows]


def _different(descriptions: list[tuple[int, Any]]) -> AttentionProviderError:
    states = [(rank, state) for rank, (state, _) in descriptions]
    if len({state[CALL] for _, state in states}) > 1:
        return AttentionProviderError(
            "the ranks that share a sequence are not at the same call: "
            + differences([(rank, {CALL: state[CALL]}) for rank, state in states])[0].removeprefix(f"{CALL}: ")
            + ". A rank has skipped a call, or continued after an error that others did not have. Call models in the "
            "same order on all ranks. To start again, call disable_context_parallel and enable_context_parallel on "
            "all of them."
        )
    lines = differences(states)
    if lines:
        return AttentionProviderError(
            "the ranks that share a sequence have different models. "
            + ". ".join(lines)
            + ". Load the same adapters with the same scales on all ranks, and set the same processors."
        )
    return AttentionProviderError(
        "the ranks that share a sequence have different inputs. "
        + ". ".join(differences([(rank, call) for rank, (_, call) in descriptions]))
        + ". Call the model with the same arguments on all of them: the same prompt and sizes, noise from generators "
        "with the same seed, and the same batches of data."
    )


def _report(fingerprints: dict[str, str], host: Group) -> None:
    """Logs a warning on the first rank if the values that are about to be replaced differ between ranks."""
    if _differ(digest_of(fingerprints), host):
        calls = _everyone(fingerprints, host)
        if dist.get_rank() == calls[0][0]:
            names = ", ".join(name for name in calls[0][1] if len({call[name] for _, call in calls}) > 1)
            log.warning(
                "the ranks that share a sequence have different values of %s: those of rank %d are used on all of "
                "them. Give generators the same seed on all ranks.",
                names,
                calls[0][0],
            )


def _of_first_rank(tensors: Sequence[Tensor], device: Sequence[Group], host: Group) -> list[Tensor]:
    """The first rank's tensors, sent in one message for each kind of memory. Shapes and dtypes are equal on all ranks.

    On the first rank, and for empty tensors, the tensors in `tensors` are returned themselves.
    """
    values = list(tensors)
    for on_device in (False, True):
        # Tensors in host memory go over `host`, also those of a model on a CPU.
        mine = [i for i, tensor in enumerate(tensors) if (tensor.device.type != "cpu") == on_device and tensor.numel()]
        if not mine:
            continue
        mine.sort(key=lambda i: -tensors[i].element_size())  # so that each is aligned to its element size
        lengths = [tensors[i].nbytes for i in mine]
        groups = device if on_device else [host]
        if groups[0].rank == 0:
            message = torch.cat([_bytes(tensors[i]) for i in mine])
        else:  # replaced by the received message
            message = tensors[mine[0]].new_empty(0, dtype=torch.uint8)
        if on_device:
            for group in device:
                message = first_ranks_rows(message, sum(lengths), group)
        else:
            message = message if host.rank == 0 else message.new_empty(sum(lengths))
            dist.broadcast(message, group=resolve(host.name), group_src=0)
        if host.rank == 0:
            continue
        for i, part in zip(mine, message.split(lengths)):
            values[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return values
