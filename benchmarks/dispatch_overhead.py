"""Microseconds that a call adds over calling the kernel directly: ours, with all checks, and diffusers' dispatcher.

    python benchmarks/dispatch_overhead.py [--device cuda] [--output overhead.json]

The tensors are tiny, to keep the kernel's time small. Blocks of direct calls, of ours and of theirs alternate in one
process. A block's overhead is its time minus that of the neighbouring direct block; reported are medians over all
blocks. `direct` is the call that one would write by hand for tensors of that layout, including transposes. `first` is
ours without the table of calls that were decided before (`known_calls`), as for the first call of a kind.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models import attention_dispatch as theirs
from versions import versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusers_attn import attention_dispatch, known_calls, provider_status
from diffusers_attn.dispatch import attend
from diffusers_attn.processors.entry_points import dispatch_entry_point
from diffusers_attn.scope import ProviderChoice

sdpa = torch.nn.functional.scaled_dot_product_attention
AttentionCall = Callable[[], torch.Tensor]


def cases(device: str) -> dict[str, dict[str, AttentionCall]]:
    """The cases by name: functions without arguments, named "direct", "ours", "first" and "theirs"."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query, key, value = (torch.randn(1, 2, 2, 16, device=device, dtype=dtype) for _ in range(3))
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool, device=device)
    entry_point = dispatch_entry_point(ProviderChoice.of("native"))

    def direct(attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        heads_first = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return sdpa(*heads_first, attn_mask=attn_mask).transpose(1, 2)

    def first() -> torch.Tensor:
        known_calls.prepared.clear()
        return entry_point(query, key, value)

    def diffusers(attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        return theirs.dispatch_attention_fn(query, key, value, attn_mask=attn_mask, backend=None)

    found = {
        "native, [batch, seq, heads, head_dim], as a processor calls it": {
            "direct": direct,
            "ours": lambda: entry_point(query, key, value),
            "first": first,
            "theirs": diffusers,
        },
        "the same with a key mask": {
            "direct": lambda: direct(mask),
            "ours": lambda: entry_point(query, key, value, attn_mask=mask),
            "theirs": lambda: diffusers(mask),
        },
        "native, [batch, heads, seq, head_dim], in the place of F.scaled_dot_product_attention": {
            "direct": lambda: sdpa(query, key, value),
            "ours": lambda: attention_dispatch(query, key, value),
        },
    }
    if provider_status("flash").available:
        from flash_attn import flash_attn_func

        flash = functools.partial(attend, layout="bshd", bound=ProviderChoice.of("flash"))
        found["flash, [batch, seq, heads, head_dim]"] = {
            "direct": lambda: flash_attn_func(query, key, value),
            "ours": lambda: flash(query, key, value),
            "theirs": lambda: theirs.dispatch_attention_fn(
                query, key, value, backend=theirs.AttentionBackendName.FLASH
            ),
        }
    return found


def measure(calls: dict[str, AttentionCall], device: str, rounds: int, calls_per_block: int) -> dict[str, float]:
    """Microseconds of `direct`, and the additional microseconds of each of the others."""

    def block(call: AttentionCall) -> float:
        start = time.perf_counter()
        for _ in range(calls_per_block):
            call()
        elapsed = time.perf_counter() - start
        if device != "cpu":
            torch.cuda.synchronize()  # outside the clock: a call's cost is what the host does before it returns
        return elapsed / calls_per_block * 1e6

    for call in calls.values():
        block(call)
    gc.disable()
    times = [{name: block(call) for name, call in calls.items()} for _ in range(rounds)]
    gc.enable()
    result = {"direct": statistics.median(each["direct"] for each in times)}
    for name in calls:
        if name != "direct":
            result[name] = statistics.median(each[name] - each["direct"] for each in times)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="device of the tensors (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=400, help="number of blocks of calls (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=100, help="number of calls per block (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--commit", help="commit to record in the results (default: the one that git reports)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # with its checks on, theirs logs every call to flash
    results = {}
    print(f"{'microseconds a call':86s} {'direct':>8s} {'ours':>8s} {'first':>8s} {'theirs':>8s} {'checked':>8s}")
    with torch.no_grad():
        for name, calls in cases(options.device).items():
            result = measure(calls, options.device, options.rounds, options.calls)
            if "theirs" in calls:  # and with the checks that diffusers leaves off by default
                theirs._AttentionBackendRegistry._checks_enabled = True
                pair = {"direct": calls["direct"], "theirs": calls["theirs"]}
                checked = measure(pair, options.device, options.rounds // 4, options.calls)
                theirs._AttentionBackendRegistry._checks_enabled = False
                result["theirs_checked"] = checked["theirs"]
            columns = (result.get(each) for each in ("ours", "first", "theirs", "theirs_checked"))
            cells = " ".join("        " if cell is None else f"{'+' + format(cell, '.2f'):>8s}" for cell in columns)
            print(f"{name:86s} {result['direct']:8.2f} {cells}")
            results[name] = result
    if options.output:
        record = {"command": " ".join(sys.argv), **versions(options.device, options.commit), "microseconds": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
