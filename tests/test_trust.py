"""What the library reads and whom it calls: no pickle, no code from files, no network, unless somebody asks for it."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_attn.context_parallel.comm import plain_values
from diffusers_attn.json_files import read_json
from diffusers_attn.parallelize.degrees import Degrees

from . import launching

ROOT = Path(__file__).parents[1]

UNSAFE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "marshal.loads",
    "marshal.load", "shelve.open", "joblib.load", "dill.load", "dill.loads", "yaml.load", "yaml.unsafe_load", "eval",
    "exec", "torch.load", "torch.hub.load", "np.load", "numpy.load",
}  # fmt: skip
ALLOWED = {
    # Answers of its own processes, and the user's model for them, in a temporary folder that only the user reads.
    "verify_plan/verify.py": {"pickle.loads"},
    "verify_plan/rank.py": {"pickle.loads", "torch.load"},
    # Only with source="hub", and only of publishers that the Hub trusts, unless the environment says more.
    "providers/hub.py": {"trust_remote_code"},
    # Its Loader is a yaml.SafeLoader.
    "training/settings/run_file.py": {"yaml.load"},
}


def calls(path: Path) -> set[str]:
    """Names of unsafe calls in a file, and "trust_remote_code" where that is passed."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name} & UNSAFE
            found |= {each.arg for each in node.keywords if each.arg == "trust_remote_code"}
    return found


def test_no_file_of_the_package_reads_pickles_or_runs_what_it_reads() -> None:
    package = ROOT / "diffusers_attn"
    found = {path.relative_to(package).as_posix(): calls(path) for path in package.rglob("*.py")}
    assert {name: each for name, each in found.items() if each} == ALLOWED


# In a fresh process. Nobody can get around an audit hook.
SCRIPT = """
import os, sys
if __name__ == "__main__":
    folder = sys.argv[1]
    seen = []

    def audit(event, args):
        if event == "socket.connect" and isinstance(args[1], tuple) or event == "socket.getaddrinfo":
            seen.append((event, str(args[1:])))
            raise OSError("this test has no network")
        if event == "pickle.find_class":
            seen.append((event, str(args)))

    # Imports of other packages are theirs: bitsandbytes, which diffusers imports, looks for a kernel on the Hub.
    import torch, peft, diffusers.models.modeling_utils
    sys.addaudithook(audit)
    torch.set_num_threads(1)
    import diffusers_attn
    from diffusers_attn import (
        apply_compile, attention_provider, compare_outputs, list_providers, set_attention_provider, verify_cp_plan
    )
    from diffusers_attn.cli.main import main
    from tests.training.runs import COMMON, SETTINGS, TINY_FLUX, make_data, train
    from diffusers import FluxPipeline

    list_providers()
    pipe = FluxPipeline.from_pretrained(TINY_FLUX)
    set_attention_provider(pipe, "auto")
    apply_compile(pipe.transformer, backend="eager")
    with torch.no_grad():
        pipe("a picture", height=32, width=32, num_inference_steps=1, output_type="pt")
    data = make_data("image", __import__("pathlib").Path(folder, "data"), 2)
    settings = {
        **COMMON, **SETTINGS["flux"], "model": str(TINY_FLUX), "data": str(data), "output_dir": folder + "/run",
        "cache_dir": folder + "/cache", "steps": 2, "checkpoint_every": 1, "gradient_accumulation_steps": 1,
    }
    train({**settings, "steps": 1, "lr_warmup_steps": 1})
    train({**settings, "resume": "latest", "lr_warmup_steps": 1})
    pipe.load_lora_weights(folder + "/run")
    print("SEEN", seen)
"""


@pytest.mark.slow
def test_loading_drawing_training_and_resuming_call_no_one_and_unpickle_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = launching.run(
        [sys.executable, script, tmp_path], check=True, env=online | {"PYTHONPATH": f"{ROOT}{os.pathsep}."}
    )
    assert done.stdout.splitlines()[-1] == "SEEN []", done.stdout


VALUES = [
    None,
    True,
    3,
    2.5,
    float("inf"),
    "a",
    torch.bfloat16,
    ["a", (1, 2), ()],
    {"a": 1, 2: (None,)},
    Degrees(2, 1, None, "why"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_keep_their_types(value: Any) -> None:
    found = plain_values.from_bytes(plain_values.to_bytes(value))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", [torch.ones(1), object(), {1, 2}, b"", ast.AST()], ids=lambda value: type(value).__name__
)
def test_other_values_are_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="is no plain value that ranks can exchange"):
        plain_values.to_bytes([value])


@pytest.mark.parametrize(
    "sent",
    [
        {"class": ["os", "system"], "fields": ["true"]},
        {"class": ["subprocess", "Popen"], "fields": [["true"]]},
        {"class": ["diffusers_attn.cli.launch", "launch"], "fields": ["a", [], 1]},
        {"class": ["diffusers_attn.cli.launch", "subprocess.Popen"], "fields": [["true"]]},
        {"other": 1},
        {"dtype": "load"},
    ],
)
def test_what_another_rank_sends_runs_nothing(sent: Any) -> None:
    with pytest.raises(ValueError, match="no plain value"):
        plain_values.from_bytes(json.dumps(sent).encode())


def test_a_json_file_that_is_too_long_or_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    path.write_text("1" * 100)
    with pytest.raises(ValueError, match="more than 99 bytes"):
        read_json(path, most=99)
