"""Keeps a model's inputs equal on all ranks that share a sequence.

Context parallelism computes one forward on several ranks, so all ranks need the same inputs. The most common error is
noise that each rank draws from its own seed; the result is an image made of pieces of several images. Before tensors
are split:

1. Every rank computes a digest of its call: names, shapes and dtypes of tensors, and values of numbers, flags and
   strings. Hosts exchange the digests through the job's store, while devices go on computing. So shapes are known to be
   equal before any exchange depends on them.
2. If digests differ, the ranks exchange the full descriptions, and all raise the same error, which names the arguments.
3. Otherwise the first rank sends its tensors to the others in one message ("broadcast"). In "check", the digests
   contain fingerprints of the values instead; only reading these makes a host wait for its device. The first rank, and
   every rank in "check", keeps its own tensor objects. Other ranks get the same memory for the same input every time
   (`received.py`), since some caches identify an input by its address.

The digest also contains the number of the forward, the adapters with their scales, and the processors
(`forward_count.py`, `model_sync.py`). So the same exchange detects a rank that skipped a call or has another LoRA. If
the forward is recorded as CUDA graphs, it contains the state of the recordings, too.

On two H200, a step of Flux takes 74.2 ms with "broadcast" and 73.0 with "trust", and one of Wan the same time with both
(docs/design.md).

A tensor that requires a gradient is never replaced, since its autograd graph belongs to this rank. Its values are
compared in both modes. An argument that the plan declares as a cache (`CPCache`) is neither compared nor replaced,
since the model writes into it and it may be larger than all other inputs together.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..context_parallel.comm import one_thread, rank_progress
from ..context_parallel.comm.group import Group
from ..context_parallel.comm.rank_differences import differences
from ..context_parallel.hooks import diffusers_hooks
from ..errors import AttentionProviderError
from .call_inputs import BETWEEN, CallInputs, FlatInputs, collect, describe, named, replaced
from .fingerprint import fingerprint, fingerprint_of_all
from .forward_count import CALL, Forwards, digest_of, forwards_of
from .input_exchange import Links, differ, tensors_of_first_rank, values_of_all_ranks
from .received import ReceivedInputs

MODES = ("broadcast", "check", "trust")

log = logging.getLogger(__name__)

_GRADIENTS = "gradients are recorded"


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
            if not torch.compiler.is_compiling():
                _begins(module, is_agreed=False)
            return None
        if not torch.compiler.is_compiling():
            one_thread.take(self.groups, module)
        given = named(self.names, args, kwargs)
        found = CallInputs([], [], [], [], [], [], [])
        for name, value in given:
            if name in self.caches and value is not None:
                found.plain.append((name, type(value).__name__))
            else:
                collect(found, name, value)
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
        inputs, check = found.flat(), self.mode == "check"
        if torch.compiler.is_compiling():
            zero, *sent = torch.ops.diffusers_attn.agree(*inputs, self.links, check, compare)
            # Adding the operator's zero makes these tensors depend on it: the compiler drops unused results.
            watched = [tensor + zero for tensor in found.watched]
        else:
            sent, watched = self._kept(found.sent, _values(inputs, self.links, check, compare)), found.watched
            _begins(module, is_agreed=True)
        tensors = iter(sent), iter(watched)
        new = {name: value if name in self.caches else replaced(value, *tensors) for name, value in given}
        new_args = [new[name] for name, _ in given[: len(args)]]
        return tuple(new_args), {name: new[name] for name in kwargs}

    def alike(self, tensors: Sequence[Tensor], plain: str) -> bool:
        """Whether these tensors and texts are equal on all ranks, which must all call this. Waits for the values."""
        _, host, members, _ = _links(self.links)
        described = [f"{list(each.shape)} {each.dtype}" for each in tensors]
        with rank_progress.waiting_for(members):
            return not differ(f"{plain} {described} {fingerprint_of_all(tensors)}", host)

    def _kept(self, own: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Tensors with these values: this rank's own tensor objects if the values are its own."""
        self.received.forget()
        return self.received.keep(own, values)


def _begins(module: nn.Module, *, is_agreed: bool) -> None:
    """Tells a recorded forward that it begins; see `GraphedForward.begins`."""
    begins = getattr(vars(module).get("forward"), "begins", None)
    if begins is not None:
        begins(is_agreed)


def _autocast(device: str) -> str:
    return repr(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"


def _values(inputs: FlatInputs, links: str, check: bool, compare: bool) -> list[Tensor]:
    """The first rank's values of `inputs.sent`; this rank's own tensors on the first rank and in "check".

    Raises:
        AttentionProviderError: the ranks were given different inputs. It is raised on all ranks.
    """
    axes, host, members, token = _links(links)
    forwards = forwards_of(token)
    one_thread.take((*(group.name for group in axes), host.name), forwards.model)
    described = describe(inputs, check)
    state = forwards.begin(in_training=described.call[_GRADIENTS] == "True")
    with rank_progress.waiting_for(members):
        if differ(f"{state.at} {state.digest} {described.digest}", host):
            raise _different(values_of_all_ranks([{CALL: state.at, **state.adapters}, described.call], host))
        if compare:
            _report({name: fingerprint(tensor) for name, tensor in zip(inputs.names.split(BETWEEN), inputs.sent)}, host)
        return list(inputs.sent) if check else tensors_of_first_rank(inputs.sent, axes, host)


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
    inputs = FlatInputs(sent, watched, integers, floats, names, watched_names, plain)
    values = _values(inputs, links, check, compare)
    diffusers_hooks.check_in_graph(forwards_of(_links(links)[3]).model)
    return [torch.zeros(()), *(torch.empty_like(mine).copy_(each) for mine, each in zip(sent, values))]


@_agree.register_fake
def _(sent, watched, integers, floats, names, watched_names, plain, links, check, compare):  # type: ignore[no-untyped-def]
    return [torch.zeros(()), *map(torch.empty_like, sent)]


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
    if differ(digest_of(fingerprints), host):
        calls = values_of_all_ranks(fingerprints, host)
        if dist.get_rank() == calls[0][0]:
            names = ", ".join(name for name in calls[0][1] if len({call[name] for _, call in calls}) > 1)
            log.warning(
                "the ranks that share a sequence have different values of %s: those of rank %d are used on all of "
                "them. Give generators the same seed on all ranks.",
                names,
                calls[0][0],
            )
