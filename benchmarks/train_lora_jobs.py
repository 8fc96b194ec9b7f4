"""Jobs of `accelerate launch examples/train_lora.py`: their commands, running and killing them, and their adapters."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import wan_folder
import yaml
from choices import Choice
from safetensors.torch import load_file

from diffusers_attn.parent_process import ended_with_parent

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_lora.py"
CONFIGS = ROOT / "examples" / "accelerate_configs"
RESUME = "+resume"
LAST_LINES = 20


class Way(NamedTuple):
    """A way to launch a job."""

    config: str
    """Configuration file for `accelerate launch`."""
    options: str = ""
    """Arguments of the script; {} stands for the number of processes."""
    alone: bool = False
    """Whether the job has one process, whatever --processes is."""
    shared: bool = True
    """Whether all processes share each sequence."""


WAYS = {
    "one": Way("one_gpu.yaml", alone=True),
    "gather": Way("two_gpus.yaml", "--cp_degree {} --ring_degree {} --rotate_method allgather"),
    "ring": Way("two_gpus.yaml", "--cp_degree {} --ring_degree {} --rotate_method alltoall"),
    "ulysses": Way("two_gpus.yaml", "--cp_degree {} --ulysses_degree {}"),
    "fsdp2": Way("fsdp2_cp2.yaml", "--ring_degree {} --rotate_method allgather"),
    "dp": Way("two_gpus.yaml", shared=False),
}
NAMES = [*WAYS, *(name + RESUME for name in WAYS)]
DEFAULT = ("one", "gather", "gather+resume", "fsdp2", "dp", "ulysses")


class JobError(Exception):
    """A job failed. The message has the reason and the end of its log."""


class Bench:
    """The folders and the command that all variants share."""

    rank = 0

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.size, self.device = args.processes, torch.device(args.device)
        self.model_size = wan_folder.TINY if args.tiny else wan_folder.REAL
        self.logs = args.logs or scratch / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._pipeline: Any = None

    def prepare(self) -> None:
        """Writes the model and the data."""
        kind = "tiny" if self.args.tiny else "real"
        self.model = wan_folder.make_pipeline(self.model_size, self.scratch / f"wan-{kind}", self.device)
        self.data = wan_folder.make_videos(self.model_size, self.scratch / f"videos-{kind}", self.args.videos)
        self.cache = self.scratch / f"cache-{kind}"
        if self.device.type == "cuda":  # the jobs need it
            torch.cuda.empty_cache()

    def command(self, choice: Choice, output: Path, *more: str) -> list[str]:
        """The command of a job, without its launcher."""
        args, way = self.args, WAYS[choice.strategy.removesuffix(RESUME)]
        processes = 1 if way.alone else self.size
        groups = 1 if way.alone or way.shared else processes
        settings = {
            "model": self.model, "data": self.data, "output_dir": output, "cache_dir": self.cache,
            "attn_provider": choice.provider, "mixed_precision": args.mixed_precision, "rank": args.rank,
            "steps": args.steps, "lr_warmup_steps": 2, "checkpoint_every": 0, "seed": 0,
            "gradient_accumulation_steps": args.batch // groups,
        }  # fmt: skip
        return [
            *("--config_file", str(self._config(way, processes)), str(SCRIPT)),
            *(part for name, value in settings.items() for part in (f"--{name}", str(value))),
            *self.model_size.settings,
            *way.options.format(processes, processes).split(),
            *("--compile", "true" if choice.compiled else "false"),
            *(["--cpu"] if self.device.type == "cpu" else []),
            *more,
        ]

    def _config(self, way: Way, processes: int) -> Path:
        """The Accelerate configuration of the examples, for this number of processes."""
        config = yaml.safe_load((CONFIGS / way.config).read_text())
        config |= {"num_processes": processes, "mixed_precision": self.args.mixed_precision, "main_process_port": 0}
        if "parallelism_config" in config:
            sizes = {"dp_shard_size": 1, "cp_size": processes}
            config["parallelism_config"] |= {f"parallelism_config_{name}": size for name, size in sizes.items()}
        path = self.scratch / f"{processes}-{way.config}"
        path.write_text(yaml.safe_dump(config))
        return path

    def run(self, command: list[str], log: Path, kill_when: Callable[[], bool] | None = None) -> None:
        """Runs a job to its end, or kills it when it is due.

        Raises:
            JobError: the job failed, took too long, or ended before it was killed.
        """
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        if self.device.type == "cpu":  # with --cpu, `accelerate launch` would start one process
            environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        late = time.monotonic() + self.args.timeout
        with log.open("w") as output:
            launcher = [sys.executable, "-m", "accelerate.commands.launch"]
            job = subprocess.Popen(
                ended_with_parent([*launcher, *command]),
                stdin=subprocess.PIPE,
                env=environment,
                stdout=output,
                stderr=output,
            )
            try:
                while job.poll() is None:
                    if kill_when is not None and kill_when():
                        return
                    if time.monotonic() > late:
                        raise JobError(f"it was not done after {self.args.timeout:g} s\n{last_lines(log)}")
                    time.sleep(0.02)
            finally:
                end(job)
        if job.returncode:
            raise JobError(f"it ended with {job.returncode}\n{last_lines(log)}")
        if kill_when is not None:
            raise JobError("it was done before it could be killed")

    def shorter(self, text: str) -> str:
        """The command without this machine's paths."""
        return text.replace(str(self.scratch), "SCRATCH").replace(f"{ROOT}/", "")

    def encoded(self) -> set[tuple[str, int]]:
        """The files of the cache with their modification times."""
        return {(path.name, path.stat().st_mtime_ns) for path in self.cache.rglob("*.safetensors")}

    def check_loads(self, folder: Path) -> int:
        """Loads the saved adapter as users do. Returns its number of tensors.

        Raises:
            JobError: the loaded weights differ from the file.
        """
        if self._pipeline is None:
            left_out = {"vae": None, "text_encoder": None, "tokenizer": None}
            self._pipeline = diffusers.WanPipeline.from_pretrained(self.model, dtype=torch.bfloat16, **left_out)
        saved = load_file(adapter(folder))
        self._pipeline.load_lora_weights(str(folder))
        try:
            loaded = {
                "transformer." + re.sub(r"(\.lora_[AB])\.[^.]+\.", r"\1.", name): each
                for name, each in self._pipeline.transformer.named_parameters()
                if ".lora_" in name
            }
            if loaded.keys() != saved.keys():
                raise JobError(
                    f"of {len(saved)} tensors of the adapter, {len(loaded.keys() & saved.keys())} were loaded"
                )
            wrong = [name for name in saved if not loaded[name].equal(saved[name].to(loaded[name].dtype))]
            zero = [name for name in saved if not saved[name].any()]
            if wrong or zero:
                raise JobError(f"{len(wrong)} tensors were loaded as others, and {len(zero)} were not trained")
        finally:
            self._pipeline.unload_lora_weights()
        return len(saved)


def adapter(folder: Path) -> Path:
    """The file that the trainer wrote."""
    return folder / "pytorch_lora_weights.safetensors"


def last_lines(log: Path) -> str:
    """The end of a job's output, without progress bars and without launchers' messages about a failed process."""
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
    for number, line in enumerate(lines):
        started = line.startswith("Traceback") and "accelerate/commands/launch.py" in "".join(
            lines[number : number + 5]
        )
        if number and (started or re.match(r"[EW]\d{4} .*torch/distributed/elastic", line)):
            lines = lines[:number]
            break
    return "\n".join(line[:300] for line in lines[-LAST_LINES:])


def end(job: subprocess.Popen[bytes]) -> None:
    """Ends a launcher and all processes that it started; see `ended_with_parent`."""
    assert job.stdin is not None
    job.stdin.close()
    job.wait()
