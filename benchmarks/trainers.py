"""Seconds and memory of a step of LoRA training for Flux 1024², by this trainer and by diffusers' example script.

    python benchmarks/trainers.py --diffusers_script train_dreambooth_lora_flux.py --output results.json
    python benchmarks/trainers.py --tiny --device cpu --diffusers_script ...   # tries the script out
    python benchmarks/trainers.py --markdown results.json                      # prints the table of a run

diffusers' script is `examples/dreambooth/train_dreambooth_lora_flux.py` of its repository, which is not part of the
package. Both run as they are, each job in a process of its own, on the same pipeline folder (real transformer and VAE,
random weights) and the same image. Settings that both have are equal: rank 16 on the attention's projections, batch 1,
bfloat16, gradient checkpointing, cached latents, AdamW, 512 text tokens, noise levels and clipping. All else is each
one's default; "ours, compiled" is what this trainer does by default in runs of 300 steps or more.
`benchmarks/step_timer.py` times the steps of every job in the same way.

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
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from flux_folder import CAPTION, make_images, make_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import heading
from versions import host, installed, versions

from diffusers_attn.atomic_files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "examples" / "train_lora.py"
PACKAGES = ("accelerate", "peft", "transformers")
LAYERS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "ours": (["--compile", "false"], {}),
    "ours, compiled": (["--compile"], {}),
    "diffusers": ([], {}),
    "diffusers, _native_flash": ([], {"DIFFUSERS_ATTN_BACKEND": "_native_flash"}),
    "diffusers, flash": ([], {"DIFFUSERS_ATTN_BACKEND": "flash"}),
}
"""Each trainer's arguments beyond the common settings, and its environment. diffusers' default does not train Flux on
Hopper with PyTorch 2.11 (docs/troubleshooting.md), so its other backends are here, too."""
LAST_LINES = 15


def command(variant: str, args: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """The script of a variant and its arguments, for files in `folder`."""
    side, precision = (64, "no") if args.tiny else (1024, "bf16")
    settings: dict[str, Any]
    if variant.startswith("diffusers"):
        settings = {
            "pretrained_model_name_or_path": folder / "pipeline", "instance_data_dir": folder / "images",
            "instance_prompt": CAPTION, "output_dir": output, "resolution": side, "train_batch_size": 1,
            "rank": args.rank, "lora_alpha": args.rank, "lora_layers": ",".join(f"attn.{each}" for each in LAYERS),
            "mixed_precision": precision, "max_train_steps": args.steps, "learning_rate": 1e-4,
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "weighting_scheme": "logit_normal", "logit_mean": 0.0,
            "logit_std": 1.0, "guidance_scale": 1.0, "max_sequence_length": args.text_tokens, "optimizer": "adamw",
            "adam_weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 0,
        }  # fmt: skip
        script, flags = args.diffusers_script, ["--gradient_checkpointing", "--cache_latents"]
    else:
        settings = {
            "model": folder / "pipeline", "data": folder / "captioned", "output_dir": output,
            "cache_dir": folder / "cache", "resolution": side, "aspects": 1, "batch_size": 1, "rank": args.rank,
            "mixed_precision": precision, "steps": args.steps, "learning_rate": 1e-4, "lr_schedule": "constant",
            "lr_warmup_steps": 0, "timestep_sampling": "logit_normal", "guidance": 1.0,
            "max_sequence_length": args.text_tokens, "optimizer": "adamw", "weight_decay": 0.01, "max_grad_norm": 1.0,
            "seed": 0, "caption_dropout": 0.0, "checkpoint_every": 0,
        }  # fmt: skip
        script, flags = OURS, ["--cpu"] if args.device == "cpu" else []
    named = (part for name, value in settings.items() for part in (f"--{name}", str(value)))
    return [str(script), *named, *flags, *VARIANTS[variant][0]]


def run(variant: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs a job. Returns its measurements, or its error."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        result = Path(output) / "result.json"
        timer = [sys.executable, str(ROOT / "benchmarks" / "step_timer.py"), str(result)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [*timer, *command(variant, args, folder, Path(output) / "run")],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=args.timeout,
                env={**os.environ, "PYTHONPATH": path, **VARIANTS[variant][1]},
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
    side = 64 if args.tiny else 1024
    make_pipeline(args.tiny, folder / "pipeline", torch.device(args.device))
    make_images(side, folder / "images", 1, captions=False)
    make_images(side, folder / "captioned", 1, captions=True)
    if args.device == "cuda":  # the jobs need it
        torch.cuda.empty_cache()
    report: dict[str, Any] = {
        "environment": {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": "tiny Flux" if args.tiny else "Flux 1024²",
            "ranks": 1,
            "host": host(),
            **versions(args.device, args.commit),
            "training_packages": installed(PACKAGES),
            "diffusers_script_sha256": hashlib.sha256(args.diffusers_script.read_bytes()).hexdigest()
            if args.diffusers_script
            else None,
        },
        "settings": {"rank": args.rank, "steps": args.steps, "warm_up": args.warm_up, "text_tokens": args.text_tokens},
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
        loss = statistics.mean(loss for each in good for loss in each["losses"])
        lines.append(
            f"| {variant} | {statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f}) | {memory[0]:.1f} | "
            f"{memory[1]:.1f} | {loss:.3f} | {statistics.median(each['job_seconds'] for each in good):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--diffusers_script", type=Path, help="diffusers' train_dreambooth_lora_flux.py")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="steps of a job (default: %(default)s)")
    parser.add_argument("--warm_up", type=int, default=8, help="steps that are not counted (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--text_tokens", type=int, help="text tokens (default: 512, and 32 with --tiny)")
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
    if any(each.startswith("diffusers") for each in args.variants) and args.diffusers_script is None:
        parser.error("--diffusers_script: needed for the variant diffusers. The script is in diffusers' repository.")
    args.text_tokens = args.text_tokens or (32 if args.tiny else 512)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.scratch or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(markdown(measure(args, folder)))


if __name__ == "__main__":
    main()
