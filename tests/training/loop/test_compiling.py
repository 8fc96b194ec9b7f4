"""When blocks are compiled, and that the number of their graphs is bounded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogView4Transformer2DModel

from diffusers_attn.runtime import compile as compiling
from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.job_ranks import JobRanks
from diffusers_attn.training.loop.compiling import LEAST_STEPS, choose, failure
from diffusers_attn.training.model.base_precision import load_transformer

from ...marks import thorough_but
from ...tiny_pipelines import make
from ..data.media import picture, sounding_video, video
from ..runs import FROM_IMAGE, SETTINGS, SOUNDING, VIDEOS, WITH_REFERENCES, make_references
from ..worlds import forget_accelerate

MUST = {"model": "m", "data": "d"}
ALONE = JobRanks(SimpleNamespace(process_index=0, num_processes=1))


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def decided(device="cuda", failed="", sharded=False, transformer=None, **settings):
    settings = {**MUST, "steps": 2000, **settings}
    transformer = transformer or Blocks()
    return choose(TrainConfig(**settings), [transformer], torch.device(device), ALONE, sharded, lambda device: failed)


class Blocks(torch.nn.Module):
    """A model that names its blocks, as diffusers' do."""

    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.first = Block()


class Block(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("given", "compiled", "reason"),
    [
        ({}, True, f"{LEAST_STEPS} steps or more"),
        ({"steps": LEAST_STEPS}, True, "--no-compile leaves it out"),
        ({"adapter": "rslora", "cp_degree": 2}, True, "steps or more"),
        ({"steps": LEAST_STEPS - 1}, False, f"fewer than {LEAST_STEPS} steps"),
        ({"device": "cpu"}, False, "there is no CUDA GPU"),
        ({"device": "mps"}, False, "there is no CUDA GPU"),
        ({"dry_run": True}, True, "steps or more"),  # what the run itself will do
        ({"offload": "blocks"}, False, "--offload blocks"),
        ({"adapter": "dora"}, False, "--adapter dora"),
        ({"adapter": "none"}, False, "--adapter none"),
        ({"sharded": True}, False, "FSDP2"),
        ({"transformer": torch.nn.Linear(1, 1)}, False, "no repeated blocks"),
        ({"failed": "RuntimeError: no C compiler"}, False, "RuntimeError: no C compiler"),
        # What is asked for is done, or refused before.
        ({"compile": True, "steps": 1, "device": "cpu", "adapter": "dora", "sharded": True}, True, "--compile"),
        ({"compile": False}, False, "--no-compile"),
    ],
)
def test_the_choice(given, compiled, reason):
    found = decided(**given)
    assert found.compiled is compiled and reason in str(found)
    assert ("--compile auto" in found.reason) is (not compiled and "compile" not in given)


def test_a_quantised_base_is_not_compiled(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    make("cogview4").transformer.save_pretrained(tmp_path)
    given = {"model": "m", "part": "transformer", "revision": None, "dtype": torch.bfloat16}
    for precision, compiled in (("bf16", True), ("int8", False)):
        found = decided(
            transformer=load_transformer(tmp_path, CogView4Transformer2DModel, **given, precision=precision)
        )
        assert found.compiled is compiled and ("quantised" in found.reason) is not compiled


def test_values():
    parse = TrainConfig.from_arguments
    given = ["--model", "m", "--data", "d"]
    for arguments, value in (
        ([], "auto"),
        (["--compile"], True),
        (["--compile", "--rank", "4"], True),
        (["--compile", "true"], True),
        (["--compile", "false"], False),
        (["--no-compile"], False),
        (["--compile", "auto"], "auto"),
    ):
        assert parse([*given, *arguments]).compile == value
    with pytest.raises(SystemExit):
        parse([*given, "--compile", "sometimes"])
    with pytest.raises(TrainingError, match="--compile sometimes: accepted are auto, true and false"):
        TrainConfig(**MUST, compile="sometimes")
    with pytest.raises(TrainingError, match="--offload blocks with --compile"):
        TrainConfig(**MUST, offload="blocks", compile=True)
    assert "--compile [{auto,true,false}]" in TrainConfig.parser().format_help()


@pytest.mark.thorough
def test_a_machine_that_can_compile():
    torch._dynamo.reset()
    assert failure(torch.device("cpu")) == ""


@pytest.mark.slow
def test_a_machine_that_cannot_compile_says_so():
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        assert "compiler" in failure(torch.device("cpu"))


SIZES = [(48, 48), (48, 96), (96, 48), (96, 96)]
SAME = ("sdxl_v", "flux_control", "qwen_image_edit", "qwen_image_edit_plus", "wan_a14b", "wan_vace")
"""Families that train a transformer, or blocks, of another one."""
MOST_GRAPHS = 2 * 3 * 2 + 4
"""For two classes of blocks: with gradients where the first block's input has none, with gradients elsewhere, and
without gradients; each for the first size and for all others. And some for samples, which give other arguments."""


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but(("qwen_image",), [each for each in SETTINGS if each not in SAME]))
def test_graphs_are_few(settings_of, tmp_path, monkeypatch, name):
    """Over buckets, lengths of captions, evaluations and samples."""
    count = 0

    def counting(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        nonlocal count
        count += 1
        return aot_eager(graph, inputs)  # as many graphs as with Inductor, sooner

    data = tmp_path / "data"
    data.mkdir()
    for i, (width, height) in enumerate(SIZES):
        if name in VIDEOS:
            video(data / f"{i}.mp4", frames=9 + i, width=width, height=height)
        elif name in SOUNDING:
            sounding_video(data / f"{i}.mkv", frames=9 + i, width=width, height=height, pitch=200.0 * (i + 1))
        else:
            picture(data / f"{i}.png", width=width, height=height, seed=i)
        (data / f"{i}.txt").write_text(f"number {i}" + " and more of it" * i)
    settings = settings_of(name, data=str(data), cache_dir=str(tmp_path / "cache"), compile=True, steps=9)
    settings |= {"aspects": [1.0, 0.5, 2.0], "batch_size": 1, "gradient_accumulation_steps": 1, "lr_warmup_steps": 0}
    settings |= {"evaluation_every": 4, "mixed_precision": "bf16"}
    if name not in FROM_IMAGE:
        settings |= {"validation_prompts": ["a cat"], "validation_steps": 2, "validation_every": 4}
    if name in WITH_REFERENCES:
        settings["references"] = str(make_references(tmp_path / "references", WITH_REFERENCES[name], len(SIZES)))
    apply = compiling.apply_compile
    monkeypatch.setattr(compiling, "apply_compile", lambda model: apply(model, backend=counting))
    torch._dynamo.reset()
    counts = []
    Trainer(TrainConfig(**settings), on_step=lambda *_: counts.append(count)).run()
    assert 2 <= counts[-1] <= MOST_GRAPHS
    assert counts[-1] == counts[-2], counts  # none is added by more of the same
