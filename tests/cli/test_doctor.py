"""`doctor` examines environments in which packages are broken, and survives all of them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from diffusers_attn.cli.doctor import combinations, examine, isolated, probe
from diffusers_attn.cli.doctor.combinations import Environment
from diffusers_attn.cli.doctor.command import as_json, show
from diffusers_attn.cli.doctor.installed import Package, installed
from diffusers_attn.cli.doctor.machine import Machine
from diffusers_attn.cli.doctor.strategies import suitable

from ..documents import ROOT
from .programs import command, doctor, package

CPU = Machine("Linux", "3.11.7", "/usr/bin/python3", None, None, (), None)
GPU = dataclasses.replace(CPU, driver="570.1", driver_cuda="12.8", gpus=("NVIDIA H200",))
TORCH: dict[str, Any] = {
    "version": "2.13.0", "cuda": "13.0", "rocm": None, "cuda_error": "", "built_for": ["sm_90", "sm_100"],
    "gpus": [{"name": "NVIDIA H200", "compute_capability": "9.0"}],
}  # fmt: skip


def found(*packages: Package, torch: dict[str, Any] | None = TORCH, machine: Machine = GPU) -> list[str]:
    """The problems of an environment that has triton, as text: level, text and fix."""
    listed = {each.name: each for each in (Package("triton", "3.6.0"), *packages)}
    return [
        f"{each.level}: {each.text} {each.fix}" for each in combinations.problems(Environment(machine, listed, torch))
    ]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "compiled for another CUDA version"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import os; os._exit(7)", "exit code 7"),
        ("import sys; sys.exit('not on this machine')", "SystemExit: not on this machine"),
        ("import time; time.sleep(600)", "did not end within 3 s"),
    ],
)
def test_a_broken_pytorch_is_reported_and_does_no_harm(tmp_path: Path, code: str, expected: str) -> None:
    package(tmp_path, "torch", code, version="2.13.0")
    rc, report = doctor(tmp_path, "--timeout", "3")
    (problem,) = [each for each in report["problems"] if "PyTorch" in each["text"]]
    assert rc == 1 and report["ok"] is False and report["torch"] is None
    assert expected in problem["text"] and problem["fix"] == "pip install --force-reinstall torch"
    assert report["schema"] == "diffusers-attn/doctor/1"


def test_without_pytorch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    done = command("doctor", first=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No module named 'torch'" in done.stdout and "fix: pip install" in done.stdout


def test_each_broken_package_costs_only_its_own_providers(tmp_path: Path) -> None:
    """One run with four broken packages in the way: one raises, one crashes, one's metadata is damaged, and diffusers
    does not import."""
    package(tmp_path, "sageattention", "raise ImportError('x.so: undefined symbol: _ZN3c10')", version="2.2.0")
    package(tmp_path, "xformers", "import os; print('{'); os.abort()", version="0.0.35")
    package(tmp_path, "diffusers", "raise RuntimeError('broken')", version="0.42.1")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    rc, report = doctor(tmp_path)
    providers = {each["name"]: each for each in report["providers"]}
    texts = [each["text"] for each in report["problems"]]
    assert rc == 1 and report["torch"]["version"] and report["diffusers"] is None
    assert len(providers) == 19 and providers["native"]["available"]
    assert any("diffusers 0.42.1 cannot be imported" in text and "broken" in text for text in texts)
    assert any(
        "sageattention is installed but cannot be imported" in text and "compiled for another" in text for text in texts
    )
    assert any("xformers is installed but cannot be imported" in text and "SIGABRT" in text for text in texts)
    assert not providers["sage"]["available"] and not providers["xformers"]["available"]


def test_a_probe_ends_with_the_processes_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survived = tmp_path / "alive"
    package(
        tmp_path,
        "starts_another",
        f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2); open({str(survived)!r}, 'w')"])
        time.sleep(600)
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    outcome = isolated.run_probe("module", "starts_another", timeout=1)
    assert outcome.value is None and "did not end within 1 s" in outcome.problem
    import time

    time.sleep(2)
    assert not survived.exists()


def test_flash_attn_4_without_flash_attn_breaks_xformers() -> None:
    both = Package("xformers", "0.0.35"), Package("flash-attn-4", "4.0.0b36")
    (text,) = found(*both)
    assert text.startswith("error: xformers and flash-attn-4 are installed without flash-attn")
    assert found(*both, Package("flash-attn", "2.8.3")) == []


def test_files_of_flash_attn_4_that_another_package_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path, "flash_attn.cute", "new = True", name="flash-attn-4", version="4.0.0b36")
    digest = hashlib.sha256((folder / "__init__.py").read_bytes()).digest()
    text = f"flash_attn/cute/__init__.py,sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},10\n"
    (tmp_path / "flash_attn_4-4.0.0b36.dist-info" / "RECORD").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert installed()["flash-attn-4"].changed_files == ()
    (folder / "__init__.py").write_text("old = True")
    (problem,) = found(installed()["flash-attn-4"])
    assert problem.startswith("error: 1 files of flash-attn-4 were replaced") and "--force-reinstall" in problem


def test_xformers_for_another_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path, "xformers", version="0.0.35")
    (folder / "cpp_lib.json").write_text('{"version": {"cuda": 1208, "torch": "2.10.0+cu128"}}')
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = found(installed()["xformers"])
    assert "was compiled for CUDA 12.8, and PyTorch for CUDA 13.0" in problem and "whl/cu130" in problem
    assert found(installed()["xformers"], torch={**TORCH, "cuda": "12.6"}) == []
    (folder / "cpp_lib.json").write_text("{")
    assert installed()["xformers"].built_for_cuda is None


def test_versions_that_metadata_excludes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "torch", version="2.9.0")
    package(tmp_path, "torchvision", name="torchvision", version="0.25", requires="torch==2.10.0")
    package(tmp_path, "da", name="diffusers-attn", version="0.1.0", requires="torch>=2.11")
    monkeypatch.syspath_prepend(tmp_path)
    listed = [installed()[name] for name in ("torch", "torchvision", "diffusers-attn")]
    texts = found(*listed)
    assert texts[0].startswith("error: diffusers-attn 0.1.0 needs torch>=2.11, and 2.9.0 is installed.")
    assert texts[1].startswith("warning:")
    assert any(text.startswith("warning: torchvision 0.25 needs torch==2.10.0") for text in texts)


def test_a_file_with_the_name_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(each.hidden_by is None for each in installed().values())
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    package = installed()["torch"]
    assert package.hidden_by == str(tmp_path / "torch.py") and package.version.startswith("2.")
    assert any(
        f"error: Python imports {tmp_path / 'torch.py'} instead of the installed torch" in text
        for text in found(package)
    )


def test_the_package_that_breaks_diffusers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "transformers", "def fails():\n    raise RuntimeError('bad')\nfails()", version="5.0")
    package(tmp_path, "imports_it", "import importlib\nimportlib.import_module('transformers')")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = isolated.run_probe("module", "imports_it", timeout=60)
    assert outcome.problem == "RuntimeError: bad" and outcome.package == "transformers"
    packages = {"diffusers": Package("diffusers", "0.42.1"), "transformers": Package("transformers", "5.0")}
    problem = examine._library_problem(outcome, packages)
    assert "The error is raised in transformers 5.0." in problem.text and problem.fix.endswith("--no-deps transformers")
    problem = examine._library_problem(isolated.Outcome(None, "its process was ended by SIGSEGV"), packages)
    assert problem.fix.endswith("--no-deps diffusers")


def test_a_provider_that_ends_the_process_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the providers that are probed together, since they need no package."""
    asked: list[tuple[str, ...]] = []
    status = {
        "available": True, "reason": "", "install": None, "shortest": "", "version": None, "exact": True,
        "summary": "", "device": "",
    }  # fmt: skip

    def probe(name: str, *names: str, timeout: float) -> isolated.Outcome:
        asked.append(names)
        if "flex" in names:
            return isolated.Outcome(None, "its process was ended by SIGSEGV")
        return isolated.Outcome({each: status for each in names})

    monkeypatch.setattr(examine, "run_probe", probe)
    providers, problem = examine._providers(["native", "flex"], "", "", 1.0, CPU)
    assert [each.available for each in providers] == [True, False] and problem is None
    assert "SIGSEGV" in providers[1].reason and asked == [("native", "flex"), ("native",), ("flex",)]


def test_a_run_that_ends_the_process_costs_only_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of one package run in one process, and in one for each if that ends."""
    asked: list[tuple[str, ...]] = []

    def probe(name: str, *names: str, timeout: float) -> isolated.Outcome:
        asked.append(names)
        if "flex" in names:
            return isolated.Outcome(None, "its process was ended by SIGSEGV")
        return isolated.Outcome({each: {"ms": 1.0} for each in names})

    monkeypatch.setattr(examine, "run_probe", probe)
    runs = examine._runs(["native", "flex"], 1.0, lambda text: None)
    assert runs["native"].value == {"ms": 1.0} and "SIGSEGV" in runs["flex"].problem
    examine._runs(["native", "_native_math"], 1.0, lambda text: None)
    assert asked == [("native", "flex"), ("native",), ("flex",), ("native", "_native_math")]


def test_a_package_that_is_installed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "one", "xformers", version="0.0.35")
    package(tmp_path / "two", "xformers", version="0.0.34")
    monkeypatch.syspath_prepend(tmp_path / "one")
    monkeypatch.syspath_prepend(tmp_path / "two")
    (problem,) = found(installed()["xformers"])
    assert "xformers is installed 2 times" in problem and installed()["xformers"].version == "0.0.34"


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ({"cuda": None, "gpus": []}, "is a build without CUDA"),
        ({"gpus": [], "cuda_error": "RuntimeError: the driver is too old"}, "cannot use it: RuntimeError: the driver"),
        ({"built_for": ["sm_100", "sm_120"]}, "has no code for NVIDIA H200"),
    ],
)
def test_gpus_that_pytorch_cannot_use(torch: dict[str, Any], expected: str) -> None:
    (problem,) = found(torch=TORCH | torch)
    assert problem.startswith("error") and expected in problem and "whl/cu128" in problem
    assert found(torch=TORCH) == []
    assert found(torch=TORCH | {"cuda": None, "gpus": [], "built_for": []}, machine=CPU) == []


def test_old_and_untested_versions() -> None:
    (problem,) = found(Package("sageattention", "1.0.6"))
    assert "has only version 1" in problem and "git+https" in problem
    assert found(Package("sageattention", "2.2.0"), Package("torch", "2.13.1")) == []
    (problem,) = found(Package("torch", "2.14.0"))
    assert problem.startswith("note: torch 2.14.0 is newer than the newest tested version, 2.13")


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for name, version in combinations.TESTED.items():
        assert any(line.startswith(f"{name}=={version}.") for line in lines)


def test_a_provider_without_a_device_gets_no_command() -> None:
    status = {
        "available": False, "reason": "package flash-attn is not installed", "install": "pip install flash-attn",
        "shortest": 'source="hub"', "version": None, "exact": True, "summary": "", "device": "needs a CUDA device",
    }  # fmt: skip
    assert (examine._provider("flash", status, CPU).reason, examine._provider("flash", status, CPU).fix) == (
        "needs a CUDA device", ""
    )  # fmt: skip
    fix = examine._provider("flash", status | {"device": ""}, GPU).fix
    assert fix == 'source="hub"; or pip install flash-attn'
    windows = dataclasses.replace(GPU, system="Windows")
    assert examine._provider("flash", status | {"device": ""}, windows).fix.startswith("in WSL: ")


def test_a_run_compares_a_provider_with_float64() -> None:
    found = probe.speeds("native")["native"]
    assert found["error"] < 1e-5 and found["ms"] > 0 and (found["device"], found["dtype"]) == ("cpu", "float32")
    assert examine._run_problem("native", isolated.Outcome(found)) == []
    (problem,) = examine._run_problem("native", isolated.Outcome(found | {"wrong": True, "error": 0.5}))
    assert problem.level == "error" and "relative error 5.0e-01" in problem.text
    (problem,) = examine._run_problem("native", isolated.Outcome(None, "its process was ended by SIGSEGV"))
    assert "could not be run: its process was ended by SIGSEGV" in problem.text


def test_strategies_follow_from_links() -> None:
    def chosen(*machine) -> list[tuple[str, bool]]:
        return [(each["strategy"], each["pays"]) for each in suitable(*machine)]

    assert chosen("nvlink", "NVIDIA H100 80GB HBM3", (9, 0), 2, None) == [("a gather of 2", True)] * 2
    image, video = chosen("pcie", "NVIDIA L40S", (8, 9), 4, None)
    assert image == ("Ulysses over 4", False) and video == ("a ring of 4", True)
    slow = suitable("host memory", "NVIDIA GeForce RTX 4090", (8, 9), 2, 1e9)
    assert not any(each["pays"] for each in slow)
    fast = suitable("host memory", "NVIDIA GeForce RTX 4090", (8, 9), 2, 10e9)
    assert all(one["seconds"] > other["seconds"] for one, other in zip(slow, fast))
    answer = probe.strategies("host memory", "NVIDIA GeForce RTX 4090", "8.9", "2", "1e9")
    assert answer == {"strategies": slow}


def test_the_report_of_a_machine_with_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"name": "NVIDIA H200", "compute_capability": "9.0", "memory_bytes": 150 * 2**30, "free_bytes": 140 * 2**30}
    torch = TORCH | {"cudnn": "9.19.0", "nccl": "2.28.9", "connection": "nvlink", "gpus": [gpu, gpu]}
    flash = examine.Provider("flash", False, "package flash-attn is not installed", "pip install x", None, True, "")
    sage = examine.Provider("sage", True, "", "", "2.2.0", False, "")
    run = {"device": "cuda", "dtype": "bfloat16", "ms": 0.5, "tflops": 600.0, "error": 1.2e-2, "problem": ""}
    problems = (
        combinations.EnvironmentProblem("error", "it is broken.", "mend it"),
        combinations.EnvironmentProblem("note", "it is new."),
    )
    packages = {"torch": Package("torch", "2.13.0")}
    report = examine.Report(
        GPU, packages, torch, "0.42.1", (sage, flash), problems, {"sage": run}, (320e9, 319e9),
        tuple(suitable("nvlink", "NVIDIA H200", (9, 0), 2, 319e9)),
    )  # fmt: skip
    show(report)
    lines = capsys.readouterr().out.splitlines()
    for expected in (
        "NVIDIA driver 570.1, CUDA up to 12.8; no nvcc",
        "PyTorch 2.13.0, CUDA 13.0, cuDNN 9.19.0, NCCL 2.28.9",
        "GPU 1: NVIDIA H200, compute capability 9.0, 150 GiB (140 free)",
        "The GPUs are connected by NVLink. `diffusers-attn advise MODEL` predicts a model's steps.",
        "Strategies on 2 GPUs, predicted from measured speeds of links",
        "Copies to the next GPU, GB/s: GPU 0: 320, GPU 1: 319",
        "error: it is broken.",
        "  fix: mend it",
        "note: it is new.",
        "1 error.",
    ):
        assert expected in lines
    assert any(line.split() == ["sage", "(lossy)", "yes", "2.2.0"] for line in lines)
    assert any(line.split() == ["sage", "cuda,", "bfloat16", "0.500", "600", "1.2e-02"] for line in lines)
    (flux,) = [line for line in lines if line.startswith("Flux, 1024 x 1024, 4,608 tokens: a gather of 2. ")]
    assert " by Ulysses over 2. Keys and values travel while a GPU computes" in flux
    found = as_json(report)
    assert found["ok"] is False and found["copies_bytes_per_second"] == (320e9, 319e9)
