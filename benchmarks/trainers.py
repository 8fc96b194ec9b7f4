"""Seconds and memory of a step of LoRA training, by this trainer and by others: Flux 1024², Wan 480p of 81 frames.

    python benchmarks/trainers.py --diffusers_script train_dreambooth_lora_flux.py --output flux.json
    python benchmarks/trainers.py --model wan --musubi musubi-tuner --output wan.json
    python benchmarks/trainers.py --tiny --device cpu --variants ours          # tries the script out
    python benchmarks/trainers.py --markdown results.json                      # prints the table of a run

`trainers_flux.py` and `trainers_wan.py` say which other trainers there are, and what is equal. All run as they are,
each job in a process of its own, on files of the same content (real transformer and VAE, random weights).
`benchmarks/step_timer.py` times the steps of every job in the same way.

Each trainer is told to train --steps, as many as a user would, since some decide by it, and ended after --measured.
Jobs take turns in alternating order. A job's time is the median of its steps without the first --warm_up ones. A job
that fails is recorded with the end of its output, and the others continue.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import heading
from trainer_jobs import ROOT, Comparison
from trainers_flux import FLUX
from trainers_wan import WAN
from versions import host, installed, versions

from diffusers_attn.atomic_files import write_atomically

PACKAGES = ("accelerate", "peft", "transformers")
COMPARISONS: dict[str, Comparison] = {"flux": FLUX, "wan": WAN}
LAST_LINES = 15


def run(variant: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs a job. Returns its measurements, or its error."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        result = Path(output) / "result.json"
        timer = [sys.executable, str(ROOT / "benchmarks" / "step_timer.py"), str(result), str(args.measured)]
        compared, of_others = COMPARISONS[args.model], {}
        if not variant.startswith("ours"):
            of_others = {**compared.environment(args), **compared.variants[variant].environment}
        path = os.pathsep.join(filter(None, [str(ROOT), of_others.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH")]))
        command = compared.command(variant, args, folder, Path(output) / "run")
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [*timer, *command, *compared.variants[variant].arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=args.timeout,
                env={**os.environ, **of_others, "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired:
            return {"error": f"it took longer than {args.timeout:g} s"}
        if done.returncode or not result.exists():
            last = "\n".join(done.stdout.strip().splitlines()[-LAST_LINES:])
            return {"error": f"it ended with {done.returncode}\n{last}"}
        found: dict[str, Any] = json.loads(result.read_text())
    return {"job_seconds": round(time.perf_counter() - began, 1), **found}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Makes the files, runs all turns, and writes the report after each job."""
    COMPARISONS[args.model].make(args, folder)
    if args.device == "cuda":  # the jobs need it
        torch.cuda.empty_cache()
    report: dict[str, Any] = {
        "environment": {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": ("tiny " if args.tiny else "") + COMPARISONS[args.model].title,
            "ranks": 1,
            "host": host(),
            **versions(args.device, args.commit),
            "training_packages": installed(PACKAGES),
            "diffusers_script_sha256": hashlib.sha256(args.diffusers_script.read_bytes()).hexdigest()
            if args.diffusers_script
            else None,
            "musubi_tuner": tomllib.loads((args.musubi / "pyproject.toml").read_text())["project"]["version"]
            if args.musubi
            else None,
        },
        "settings": {name: getattr(args, name) for name in ("rank", "steps", "measured", "warm_up")},
        "turns": [],
    }
    began = time.monotonic()
    for turn in range(args.rounds):
        for variant in args.variants if turn % 2 == 0 else args.variants[::-1]:
            if args.seconds is not None and turn and time.monotonic() - began > args.seconds:
                return report
            found = {"turn": turn, "variant": variant, **run(variant, args, folder)}
            report["turns"].append(found)
            print(json.dumps(found)[:1500], file=sys.stderr, flush=True)
            if args.output is not None:
                text = json.dumps(report, indent=1) + "\n"
                write_atomically(args.output, partial(Path.write_text, data=text))
    return report


def markdown(report: dict[str, Any]) -> str:
    """The table of a run."""
    lines = [heading(report["environment"]), ""]
    lines += ["| trainer | s/step (range over turns) | peak, GiB | reserved, GiB | mean loss | whole job, s |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    warm_up = report["settings"]["warm_up"]
    for variant in dict.fromkeys(each["variant"] for each in report["turns"]):
        turns = [each for each in report["turns"] if each["variant"] == variant]
        good = [each for each in turns if "error" not in each]
        if not good:
            lines.append(f"| {variant} | {turns[0]['error'].splitlines()[-1][:80]} | | | | |")
            continue
        times = [statistics.median(each["seconds"][warm_up:]) for each in good]
        memory = [max(each.get(name, 0) for each in good) / 1024 for name in ("peak_mib", "reserved_mib")]
        losses = [loss for each in good for loss in each["losses"]]
        loss = statistics.mean(losses) if losses else float("nan")
        lines.append(
            f"| {variant} | {statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f}) | {memory[0]:.1f} | "
            f"{memory[1]:.1f} | {loss:.3f} | {statistics.median(each['job_seconds'] for each in good):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=COMPARISONS, default="flux", help="model to train (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", help="names of trainers (default: all for the model)")
    parser.add_argument("--diffusers_script", type=Path, help="diffusers' train_dreambooth_lora_flux.py")
    parser.add_argument("--musubi", type=Path, help="folder of a clone of musubi-tuner")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps that trainers are told (default: %(default)s)")
    parser.add_argument("--measured", type=int, default=24, help="steps after which a job ends (default: %(default)s)")
    parser.add_argument("--warm_up", type=int, default=8, help="steps that are not counted (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=400, help="seconds after which a job is ended")
    parser.add_argument("--seconds", type=float, help="no job is started later than this, after the first turn")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model for CPUs")
    parser.add_argument("--scratch", type=Path, help="folder for the model, kept (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--commit", help="commit for the results, where there is no git")
    parser.add_argument("--markdown", type=Path, help="print the table of this file, and stop")
    args = parser.parse_args()
    if args.markdown is not None:
        print(markdown(json.loads(args.markdown.read_text())))
        return
    if args.measured < args.warm_up + 2:
        parser.error(f"--measured {args.measured}: at least {args.warm_up + 2}, two more than --warm_up")
    variants = COMPARISONS[args.model].variants
    args.variants = args.variants or list(variants)
    for each in args.variants:
        if each not in variants:
            parser.error(f"--variants: {each!r} is none of {', '.join(map(repr, variants))}")
        needs = variants[each].needs
        if needs is not None and getattr(args, needs) is None:
            parser.error(f"--{needs}: needed for the variant {each!r}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.scratch or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(markdown(measure(args, folder)))


if __name__ == "__main__":
    main()
