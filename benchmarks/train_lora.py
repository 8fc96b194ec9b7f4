"""Time of `accelerate launch examples/train_lora.py`, the script that users start, on one GPU and on several.

    python benchmarks/train_lora.py --compile --output results.json
    python benchmarks/train_lora.py --tiny --device cpu                # tries the script out
    python benchmarks/train_lora.py --markdown results.json more.json  # prints the tables of runs

The pipeline is a folder with Wan 2.1 1.3B, with the real transformer and VAE and random weights; the data is a folder
of videos of 832x480 and 81 frames (see `wan_folder.py`). Each variant is a separate job, started with a file of
`examples/accelerate_configs` in which only the number of processes is changed. All jobs have the same seed, videos and
global batch, and so the same noise for the same examples. Blocks are checkpointed, and the first job encodes the data
for all. In `NAME+resume`, all processes of NAME are killed (SIGKILL) in the step after a checkpoint, and the job is
resumed with `--resume latest`.

Measurements come from the trainer's `metrics.jsonl`: the median seconds per step without the first ones, including all
waiting; tokens per second of all processes; and the peak memory of rank 0 during training. Losses and gradient norms
are compared with those of one process; those of a resumed job with those of the uninterrupted job, if it ran. They must
agree within --tolerance in every step. Each adapter is loaded with `load_lora_weights`, and the loaded weights are
compared with the file.

A job that fails or takes longer than --timeout is recorded with the end of its output, and the others continue.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from choices import Choice, blocks, extra_choices
from measuring import Report
from options import add_results, heading
from train_lora_jobs import DEFAULT, NAMES, RESUME, WAYS, Bench, JobError, adapter
from versions import installed

PACKAGES = ("accelerate", "peft", "transformers", "av")


class Variant:
    """A job and its measurements."""

    def __init__(self, choice: Choice, bench: Bench) -> None:
        self.choice, self.bench = choice, bench
        name = "-".join([choice.strategy, choice.provider, "compiled" if choice.compiled else "eager"])
        self.output, self.log = bench.scratch / "runs" / name, bench.logs / f"{name}.log"
        self.resumes = choice.strategy.endswith(RESUME)
        alone = WAYS[choice.strategy.removesuffix(RESUME)].alone
        self.result: dict[str, Any] = {**choice._asdict(), "processes": 1 if alone else bench.size}

    def run(self) -> None:
        """Runs the job to its end."""
        bench, steps = self.bench, self.bench.args.steps
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir(parents=True)
        command = bench.command(self.choice, self.output)
        self.result["command"] = bench.shorter(shlex.join(["accelerate", "launch", *command]))
        before, began = bench.encoded(), time.monotonic()
        resumed = 0
        if self.resumes:
            resumed = self._kill(steps // 2)
            command = bench.command(self.choice, self.output, "--resume", "latest")
        bench.run(command, self.log)
        self.result["wall_seconds"] = round(time.monotonic() - began, 1)
        self.result["encoded"] = len(bench.encoded() - before)
        self._read(steps, resumed)
        self.result["tensors"] = bench.check_loads(self.output)

    def _kill(self, step: int) -> int:
        """Starts the job and kills it in the step after a checkpoint. Returns the checkpoint's step."""
        metrics = self.output / "metrics.jsonl"

        def lost_work() -> bool:
            return metrics.is_file() and metrics.read_bytes().count(b"\n") > step

        command = self.bench.command(self.choice, self.output, "--checkpoint_every", str(step))
        self.bench.run(command, self.log.with_suffix(".killed.log"), kill_when=lost_work)
        self.result["killed_behind"] = metrics.read_bytes().count(b"\n")
        return step

    def _read(self, steps: int, resumed: int) -> None:
        entries = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        if [each["step"] for each in entries] != [*range(1, steps + 1)]:
            raise JobError(f"expected {steps} steps, but the log has {[each['step'] for each in entries]}")
        seconds = [each["seconds per step"] for each in entries]
        tokens = entries[-1]["tokens per second"] * seconds[-1]
        counted = seconds[resumed:][self.bench.args.warm_up :]
        self.result |= {
            "resumed_from": resumed or None,
            "seconds": round(statistics.median(counted), 4),
            "steps": [round(each, 4) for each in seconds],
            "tokens_per_second": round(tokens / statistics.median(counted)),
            "peak_gb": round(max(each["memory GB"] for each in entries[resumed:]), 2),
            "loss": [each["loss"] for each in entries],
            "gradient_norm": [each["gradient norm"] for each in entries],
        }


def adapter_error(folder: Path, expected: Path) -> float:
    """Relative difference of two adapters; 0.0 only if all bits are equal."""
    mine, other = load_file(adapter(folder)), load_file(adapter(expected))
    square = sum(float(each.double().square().sum()) for each in other.values())
    wrong = sum(float((mine[name].double() - each.double()).square().sum()) for name, each in other.items())
    return (wrong / square) ** 0.5


def compare(variant: Variant, done: list[Variant], tolerance: list[float]) -> None:
    """Adds the errors of losses and gradient norms to a result; for a resumed job, also the adapter's."""
    result = variant.result
    expected = reference(result, [each.result for each in done])
    if expected is None:
        return
    off = {
        name: max(abs(mine / other - 1) for mine, other in zip(result[name], expected[name]))
        for name in ("loss", "gradient_norm")
    }
    result |= {f"{name}_error": error for name, error in off.items()}
    result["agrees"] = all(error <= most for error, most in zip(off.values(), tolerance))
    if variant.resumes:
        [other] = [each for each in done if each.result is expected]
        result |= {"compared_with": expected["strategy"], "adapter_error": adapter_error(variant.output, other.output)}


def reference(result: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The result to compare with. For a killed job: the same job without the kill, if it ran. Otherwise: one process,
    preferably with the same provider and compilation."""

    def choice(of: dict[str, Any], **other: Any) -> Choice:
        return Choice(**{name: (of | other)[name] for name in Choice._fields})

    name, ones = result["strategy"], [each for each in measured if each["strategy"] == "one"]
    wanted = [choice(result, strategy=name.removesuffix(RESUME))] if name.endswith(RESUME) else []
    wanted.append(choice(result, strategy="one"))
    alike = [each for one in wanted for each in measured if choice(each) == one]
    return next(iter(alike or ones), None)


def choose(args: argparse.Namespace) -> list[Choice]:
    """All strategies with each provider, and the extra variants."""
    choices = [Choice(name, each, args.compile) for each in args.providers for name in args.strategies]
    return list(dict.fromkeys(choices + extra_choices(args.extra, NAMES, args.compile)))


def bench_all(bench: Bench, report: Report, began: float) -> None:
    args = bench.args
    report.variants = [Variant(choice, bench) for choice in choose(args)]
    done: list[Variant] = []
    for variant in report.variants:
        result = variant.result
        try:
            if args.seconds and time.monotonic() - began > args.seconds:
                raise JobError(f"not started: --seconds {args.seconds:g} were over")
            variant.run()
            done.append(variant)
            compare(variant, done, args.tolerance)
        except Exception as failure:  # whatever it is, the others are still measured
            kind = "" if isinstance(failure, JobError) else f"{type(failure).__name__}: "
            result["error"] = bench.shorter(f"{kind}{failure}")
        report.write()
        print(_line(result), file=sys.stderr, flush=True)


def _line(result: dict[str, Any]) -> str:
    found = result.get("error") or (
        f"{result['seconds']:.3f} s, {result['peak_gb']:.1f} GB, loss {result['loss'][0]:.5f} to "
        f"{result['loss'][-1]:.5f}, {_equality(result)}, {result['wall_seconds']} s in all"
    )
    return f"{result['strategy']}, {result['provider']}, {blocks(result)}: {found}"


def _equality(result: dict[str, Any]) -> str:
    if "agrees" not in result:
        return "nothing to compare with"
    return "agrees" if result["agrees"] else f"off by {result['loss_error']:.1e}, {result['gradient_norm_error']:.1e}"


def markdown(report: dict[str, Any]) -> str:
    """The table of a run, and its failures."""
    where, results = report["environment"], report["results"]
    loss, norm = where["tolerance"]
    task = f"**{where['task']}**; what agrees is within {loss:g} of the loss and {norm:g} of the gradient norm"
    lines = [
        heading(where),
        "",
        task,
        "",
        "| strategy | provider | blocks | processes | s per step | of one process | tokens per second | peak GB "
        "| first loss | last loss | loss off by | gradient norm off by | agrees | job, s |",
        "|" + "---|" * 14,
    ]
    measured = [each for each in results if "error" not in each]
    for each in measured:
        alone = reference({**each, "strategy": "one"}, measured)
        compared = "agrees" in each
        cells = [
            each["strategy"],
            f"`{each['provider']}`",
            blocks(each),
            str(each["processes"]),
            f"{each['seconds']:.3f}",
            f"{alone['seconds'] / each['seconds']:.2f}x" if alone else "-",
            str(each["tokens_per_second"]),
            f"{each['peak_gb']:.2f}",
            f"{each['loss'][0]:.5f}",
            f"{each['loss'][-1]:.5f}",
            f"{each['loss_error']:.1e}" if compared else "-",
            f"{each['gradient_norm_error']:.1e}" if compared else "-",
            ("yes" if each["agrees"] else "no") if compared else "-",
            f"{each['wall_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {note}" for each in measured if (note := _resumption(each))]
    failed = [f"- {_line(each).replace(chr(10), chr(10) + '      ')}" for each in results if "error" in each]
    return (
        "\n".join([*lines, *(["", *notes] if notes else []), *(["", "Failed:", "", *failed] if failed else [])]) + "\n"
    )


def _resumption(result: dict[str, Any]) -> str:
    if not result["resumed_from"]:
        return ""
    error, other = result.get("adapter_error"), result.get("compared_with")
    text = (
        f"{result['strategy']}, `{result['provider']}`, {blocks(result)}: killed behind step "
        f"{result['killed_behind']}, went on behind step {result['resumed_from']}"
    )
    if error is None:
        return text
    return f"{text}; its adapter {f'is {error:.1e} off that' if error else 'has the bits of that'} of {other}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=NAMES,
        help=f"strategies to run (default: {' '.join(DEFAULT)}; on a CPU without fsdp2)",
    )
    parser.add_argument(
        "--providers", nargs="+", help="attention providers to run (default: _native_cudnn; on a CPU native)"
    )
    parser.add_argument(
        "--extra",
        nargs="+",
        default=[],
        metavar="STRATEGY:PROVIDER[:eager]",
        help="further variants to run, such as gather:flash_4 (default: none)",
    )
    parser.add_argument("--compile", action="store_true", help="compile each block (default: off)")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="number of processes of each job, except that of one process (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, help="number of videos per step, over all processes (default: the number of processes)"
    )
    parser.add_argument("--videos", type=int, default=3, help="number of videos in the data set (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA adapter (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=8, help="number of optimizer steps of each job (default: %(default)s)"
    )
    parser.add_argument(
        "--warm_up", type=int, default=2, help="number of first steps whose time is not counted (default: %(default)s)"
    )
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), help="mixed precision of the trainer (default: bf16; on a CPU no)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        nargs=2,
        metavar=("LOSS", "NORM"),
        help="largest relative differences of losses and of gradient norms (default: bf16 2e-3 1e-2; no 1e-5 1e-4)",
    )
    parser.add_argument(
        "--seconds", type=float, help="seconds after which no further job is started (default: no limit)"
    )
    parser.add_argument(
        "--timeout", type=float, default=240.0, help="seconds after which a job is ended (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to try this script out (default: off)")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for model, videos, latents and runs, which is kept (default: a temporary one)",
    )
    parser.add_argument(
        "--logs", type=Path, help="folder for the logs of the jobs (default: inside the scratch folder)"
    )
    add_results(parser)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.strategies = args.strategies or [name for name in DEFAULT if not (on_cpu and name.startswith("fsdp2"))]
    args.providers = args.providers or ["native" if on_cpu else "_native_cudnn"]
    args.mixed_precision = args.mixed_precision or ("no" if on_cpu else "bf16")
    args.tolerance = args.tolerance or ([1e-5, 1e-4] if args.mixed_precision == "no" else [2e-3, 1e-2])
    args.batch = args.batch or args.processes
    if args.batch % args.processes:
        parser.error(f"--batch {args.batch} cannot be divided among {args.processes} processes")
    if args.warm_up >= args.steps - args.steps // 2:
        parser.error(f"--steps {args.steps} with --warm_up {args.warm_up}: more than twice as many are needed")
    if args.markdown is None and not on_cpu and torch.cuda.device_count() < args.processes:
        parser.error(
            f"{args.processes} processes, and PyTorch sees {torch.cuda.device_count()} CUDA devices. Set --processes, "
            "or try the script out with --device cpu --tiny."
        )
    return args


def main() -> None:
    args = parse_arguments()
    if args.markdown:
        print("\n".join(markdown(json.loads(path.read_text())) for path in args.markdown), end="")
        return
    began = time.monotonic()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="train_lora-") as temporary:
        bench = Bench(args, (args.scratch or Path(temporary)).resolve())
        report = Report(args.output, bench, args)
        bench.prepare()
        report.environment["packages"] |= installed(PACKAGES)
        report.environment |= {
            "task": f"{bench.model_size.transformer.title}, LoRA of rank {args.rank}, {args.batch} videos a step, "
            f"mixed precision: {args.mixed_precision}",
            "tolerance": args.tolerance,
            "prepare_seconds": round(time.monotonic() - began, 1),
        }
        print(f"model and videos: {report.environment['prepare_seconds']} s", file=sys.stderr, flush=True)
        bench_all(bench, report, began)
    results = [variant.result for variant in report.variants]
    print(markdown({"environment": report.environment, "results": results}), flush=True)


if __name__ == "__main__":
    main()
