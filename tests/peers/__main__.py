"""Runs other people's tests with and without this library, and writes outcomes.json.

    python -m tests.peers FOLDER [PATH ...]

FOLDER is `tests` of diffusers' repository, at the version that is installed where the repository has it:
`git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers` (the sdist on PyPI has no tests). Paths
are below it; default: a few models with all of their testers, their LoRAs and pipelines. PyTorch's samples need the
package `expecttest`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..conftest import torch  # its settings
from ..documents import ROOT
from ..launching import run

sys.path.insert(0, str(ROOT / "benchmarks"))
from versions import versions

HERE = Path(__file__).parent
FILE = HERE / "outcomes.json"
DEFAULT = [
    "models/transformers/test_models_transformer_flux.py",
    "models/transformers/test_models_transformer_wan.py",
    "models/transformers/test_models_transformer_sd3.py",
    "models/transformers/test_models_transformer_qwenimage.py",
    "models/transformers/test_models_transformer_cogvideox.py",
    "lora/test_lora_layers_flux.py",
    "lora/test_lora_layers_wan.py",
    "pipelines/flux/test_pipeline_flux.py",
    "pipelines/wan/test_wan.py",
]
PROVIDERS = ("native", "_native_math", "auto", "flex")
COPY = "diffusers_tests"
"""Name of the copy of diffusers' tests: ours are the package `tests`."""


def main() -> int:
    args = _arguments()
    found = json.loads(FILE.read_text()) if FILE.exists() else {"files": {}}
    found |= {key: value for key, value in versions("cpu").items() if key in ("python", "commit")}
    found["packages"] = {
        name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")
    }
    if not args.no_samples:
        from . import sdpa_samples

        found["sdpa"] = {provider: sdpa_samples.count(provider) for provider in PROVIDERS}
        _write(found)
    regressions = 0
    if args.folder is not None:
        found["tests"] = args.version or _version(args.folder)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(args.folder, Path(folder, COPY))
            for path in args.paths or DEFAULT:
                row = _compared(Path(folder), path, args)
                found["files"][path] = row
                regressions += len(row["regressions"])
                _write(found)
                print(f"{path}: {row}", flush=True)
    return min(regressions, 100)


def _version(folder: Path) -> str:
    """The tag or commit of a repository."""
    described = run(["git", "-C", folder, "describe", "--tags", "--always"]).stdout.strip()
    return described or "unknown"


def _compared(folder: Path, path: str, args: argparse.Namespace) -> dict[str, Any]:
    """The counts of passed tests without and with a bound provider, and the tests that pass only without."""
    without, _ = _tests(folder, path, None, args)
    bound, models = _tests(folder, path, "native", args)
    passed = {name for name, outcome in without.items() if outcome == "passed"}
    return {
        "without": len(passed),
        "with": sum(outcome == "passed" for outcome in bound.values()),
        "failed without": sum(outcome == "failed" for outcome in without.values()),
        "skipped": sum(outcome == "skipped" for outcome in without.values()),
        "models bound": sum(models.values()),
        "regressions": sorted(name for name in passed if bound.get(name) != "passed"),
    }


def _tests(
    folder: Path, path: str, provider: str | None, args: argparse.Namespace
) -> tuple[dict[str, str], dict[str, int]]:
    """The outcomes by test, and the models that were bound, by class."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DIFFUSERS_ATTN_PEERS_REPORT": str(report),
        "HF_HUB_OFFLINE": "0" if args.hub else "1",
    }
    environment |= {"DIFFUSERS_ATTN_PEERS_BIND": provider} if provider else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bound", "-p", "no:cacheprovider", f"{COPY}/{path}"]
    result = run(command, timeout=args.timeout, cwd=folder, env=environment)
    if not report.exists():
        raise RuntimeError(f"pytest ended early:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    answer = json.loads(report.read_text())
    return answer["tests"], answer["bound"]


def _write(found: dict[str, Any]) -> None:
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="without it, only PyTorch's samples run")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--version", help="tag or commit of the tests, to be recorded")
    parser.add_argument("--hub", action="store_true", help="let tests load from the Hub, which many files need")
    parser.add_argument("--no-samples", action="store_true", help="leave PyTorch's samples out")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for a file of tests")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
