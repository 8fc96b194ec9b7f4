"""What SECURITY.md states: who may unpickle, load code or connect, and the oldest versions without advisories."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from .documents import ROOT

PACKAGE = ROOT / "diffusers_attn"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "SECURITY.md").read_text()

MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "socket", "urllib", "http", "requests", "httpx", "runpy"}
CALLS = {"eval", "exec", "os.system", "torch.load", "torch.jit.script", "torch.jit.trace", "torch.hub.load"}
CALLS |= {"torch.export.load", "torch._inductor.aoti_load_package", "torch.compiler.load_cache_artifacts"}
OF_ACCELERATE = {"load_checkpoint_in_model", "load_checkpoint_and_dispatch"}
KEYWORDS = {"trust_remote_code", "weights_only", "shell"}

ALLOWED = {
    ("verify_plan/rank.py", "pickle"),  # its own job, in a folder that only its processes get
    ("verify_plan/verify.py", "pickle"),
    ("verify_plan/rank.py", "torch.load"),
    ("verify_plan/rank.py", "weights_only=False"),
    ("cli/verify/cases.py", "exec_module"),  # a file that the user names
    ("providers/hub.py", "trust_remote_code=_trusts_everyone()"),  # the user's environment variable
    ("atomic_files.py", "socket"),  # the host's name
    ("training/data/lock.py", "socket"),  # the host's name
    ("context_parallel/comm/transport.py", "socket"),  # the host's name
    ("parallelize/measure_hardware.py", "socket"),  # the host's name
}


def notable(tree: ast.AST) -> Iterator[str]:
    """Imports and calls that run or read what others may have written, or that connect."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (name for name in [node.module or ""] if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.rpartition(".")[2] in OF_ACCELERATE:
                yield name
            if name.endswith(".exec_module"):
                yield "exec_module"
            yield from (ast.unparse(each) for each in node.keywords if each.arg in KEYWORDS)


def test_who_may_unpickle_load_code_or_connect() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), each)
        for path in PACKAGE.rglob("*.py")
        for each in notable(ast.parse(path.read_text()))
    }
    assert found == ALLOWED


def test_one_file_loads_models() -> None:
    """`tests/test_safetensors_only.py` tests it, and all that call it."""
    calls = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    }
    of_peft = "training/model/lora.py"  # a configuration, which is JSON
    assert calls == {"safetensors_only.py", of_peft}


def test_versions_with_advisories_are_not_accepted() -> None:
    """The table of the page, the ranges of pyproject.toml and the tested versions agree."""
    extras = PROJECT["optional-dependencies"].values()
    accepted: dict[str, Version] = {}
    for line in [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]:
        requirement = Requirement(line)
        for each in requirement.specifier:
            if each.operator == ">=":
                accepted[canonicalize_name(requirement.name)] = Version(each.version)
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert len(rows) == 9
    for name, oldest in rows:
        assert accepted[name] >= Version(oldest), name
        assert Version(tested[name]) >= Version(oldest), name


def test_the_audit_leaves_out_what_the_page_explains() -> None:
    (left_out,) = re.findall(r"^NOT_OURS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    second = PAGE.partition("| package | advisory |")[2].partition("### Audit")[0]
    assert sorted(left_out.split()) == sorted(re.findall(r"CVE-[\d-]+", second))
