"""Pipelines and models with pickled weights alone are refused by all that loads them, and the advice converts them."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines import pipeline_loading_utils
from diffusers.utils import hub_utils
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffusers_attn import AttentionProviderError
from diffusers_attn.cli import main
from diffusers_attn.cli.run import worker
from diffusers_attn.cli.run.settings import Settings
from diffusers_attn.parallelize.weights.loading import load
from diffusers_attn.safetensors_only import _NOT_ON_THE_HUB, from_safetensors
from diffusers_attn.training import TrainingError
from diffusers_attn.training.model.init_adapter import read_adapter
from diffusers_attn.training.model.pipeline import load_pipeline

from .documents import ROOT

FLUX = ROOT / "examples/tiny_flux"
PICKLED = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "model", "vae": "diffusion_pytorch_model"}
"""Components with pickled weights, of diffusers and of transformers, and the names of their files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of which some components have pickled weights alone."""
    path = tmp_path_factory.mktemp("pickled") / "flux"
    shutil.copytree(FLUX, path)
    for component, name in PICKLED.items():
        weights = path / component / f"{name}.safetensors"
        pickled = weights.with_name(name.replace("model", "pytorch_model") if name == "model" else name)
        torch.save(load_file(weights), pickled.with_suffix(".bin"))
        weights.unlink()
    return path


def load_for_training(model: str, **options: Any) -> Any:
    one = SimpleNamespace(any=bool)
    return load_pipeline(model, revision=None, dtype=torch.float32, ranks=one, local_main=True, **options)


PARTS = r"pickled weights \(text_encoder_2/pytorch_model\.bin, transformer/diffusion_pytorch_model\.bin, vae/"


def test_run(folder: Path, tmp_path: Path) -> None:
    """What the command runs in a process of its own."""
    settings = Settings(
        model=str(folder), call={}, output=str(tmp_path / "cat.png"), fps=1, seed=0, device="cpu", processes=1,
        dtype="float32", provider=None, compile=False, shard_weights=False,
    )  # fmt: skip
    with pytest.raises(AttentionProviderError, match=PARTS):
        worker.run(settings)


def test_verify(folder: Path) -> None:
    result = CliRunner().invoke(main.app, ["verify", str(folder)])
    assert result.exit_code == 2 and re.search(PARTS, " ".join(result.output.split()))


def test_training(folder: Path) -> None:
    with pytest.raises(TrainingError, match=rf"--model \S+ cannot be loaded: .*{PARTS}"):
        load_for_training(str(folder))
    pickled = r"pickled weights \(diffusion_pytorch_model\.bin\).*`FluxTransformer2DModel\.from_pretrained"
    with pytest.raises(TrainingError, match=pickled):
        load_for_training(str(FLUX), transformer=str(folder / "transformer"))


def test_an_adapter_to_go_on_from(tmp_path: Path) -> None:
    file = tmp_path / "adapter.bin"
    torch.save({"transformer.x_embedder.lora_A.weight": torch.ones(1, 1)}, file)
    with pytest.raises(TrainingError, match=r"adapter\.bin cannot be read as a LoRA"):
        read_adapter(diffusers.FluxPipeline.from_pretrained(FLUX), file)


def test_weights_of_a_model_on_the_meta_device(folder: Path) -> None:
    """`shard_weights` reads them from the folder that the pipeline names."""
    config = diffusers.FluxTransformer2DModel.load_config(folder / "transformer")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(config)
    pipeline = SimpleNamespace(config={"_name_or_path": str(folder)})
    with pytest.raises(AttentionProviderError, match=r"flux/transformer has pickled weights"):
        load(model, "transformer", pipeline)


def test_the_advice(folder: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    with pytest.raises(AttentionProviderError) as refused:
        from_safetensors(diffusers.DiffusionPipeline, folder)
    advice = str(refused.value).split("`")[1].replace("FOLDER", repr(str(converted)))
    eval(advice, {"DiffusionPipeline": diffusers.DiffusionPipeline})
    expected = from_safetensors(diffusers.DiffusionPipeline, FLUX).transformer.state_dict()
    found = from_safetensors(diffusers.DiffusionPipeline, converted).transformer.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_weights_that_are_not_there_are_no_pickled_ones(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "transformer/config.json", tmp_path)
    with pytest.raises(OSError, match="no file named"):
        from_safetensors(diffusers.FluxTransformer2DModel, tmp_path)


@pytest.mark.parametrize("said", _NOT_ON_THE_HUB)
def test_a_repository_of_the_hub(said: str) -> None:
    """Tests read no repository, so this one has diffusers' words, which are in its code."""

    class Model:
        @staticmethod
        def from_pretrained(source: str, use_safetensors: bool) -> None:
            raise OSError(f"{said} x.safetensors")

    with pytest.raises(AttentionProviderError, match=r"owner/name has no .*`Model\.from_pretrained\('owner/name'\)"):
        from_safetensors(Model, "owner/name")
    assert said in inspect.getsource(pipeline_loading_utils) + inspect.getsource(hub_utils)
