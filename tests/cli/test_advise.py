"""`advise` predicts measured steps, counts tokens and memory, and says which numbers of GPUs pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from typer.testing import CliRunner

from diffusers_attn import AttentionProviderError
from diffusers_attn.cli import main
from diffusers_attn.cli.advise import command, gpus, measured, model, predict
from diffusers_attn.cli.advise.grids import GRIDS, Size, size_of
from diffusers_attn.parallelize.typical_tokens import TYPICAL_TOKENS, typical_tokens
from diffusers_attn.tiny_models.case import IMAGE_TOKENS

from ..documents import ROOT

# Milliseconds of a step on H200 with compiled blocks and cuDNN, by number of GPUs, from benchmarks/results/
# (context_parallel-flux-h200x2, -wan-h200x2, mechanisms-flux-h200x4) and, for four with Wan, from docs/design.md.
MEASURED = {"flux": {1: 130.8, 2: 75.7, 4: 41.0}, "wan-1.3b": {1: 522.7, 2: 272.7, 4: 136.7}}


def advise(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(main.app, ["advise", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_near_measured_steps(name: str) -> None:
    found = advise(name, "--gpus", "4", "--gpu", "h200", "--provider", "_native_cudnn")
    firsts = {each["gpus"]: each for each in reversed(found["predictions"])}
    for count, ms in MEASURED[name].items():
        assert firsts[count]["seconds"] * 1e3 == pytest.approx(ms, rel=0.06)
    assert found["recommended_gpus"] == 4 and firsts[4]["strategy"] == "a gather of 4"
    errors = [abs(each["error"]) for each in found["measured"]["steps"]]
    assert len(errors) >= 4 and max(errors) < 0.09 and "within 9 %" in command.ACCURACY


def test_measured_steps_are_those_of_the_recorded_runs() -> None:
    for each in measured.MEASURED:
        for step in each.steps:
            run = json.loads((ROOT / "benchmarks" / "results" / f"{step.run}.json").read_text())
            assert run["environment"]["ranks"] == max(2, step.gpus) and run["environment"]["blocks_compiled"]
            (ms,) = {
                row["ms"]
                for row in run["results"]
                if (row["model"], row["strategy"], row["provider"]) == (each.run_words, step.variant, "_native_cudnn")
            }
            assert step.ms == round(ms, 1)


def test_guidance_on_two_gpus_is_near_measured_steps() -> None:
    """docs/design.md: a step of WanPipeline takes 1,036 ms on one GPU, and 527 with a branch on each of two."""
    found = advise("wan-1.3b", "--gpus", "2", "--gpu", "h200", "--guidance", "--provider", "_native_cudnn")
    firsts = {each["gpus"]: each for each in reversed(found["predictions"])}
    assert firsts[1]["seconds"] == pytest.approx(1.036, rel=0.06)
    assert firsts[2]["seconds"] == pytest.approx(0.527, rel=0.06)
    assert firsts[2]["strategy"] == "a branch on each half"
    assert {each["strategy"] for each in found["predictions"] if each["gpus"] == 2} > {"a gather of 2"}
    found = advise("wan-1.3b", "--gpus", "4", "--gpu", "h200", "--guidance")
    assert any(each["strategy"] == "a branch on each half, by a gather of 2" for each in found["predictions"])


def test_default_sizes_give_the_typical_tokens() -> None:
    for name in GRIDS:
        cls = type(name, (), {})
        assert size_of(cls, None, None, None, None).tokens == typical_tokens(cls)
    known = {name for name in TYPICAL_TOKENS if "JoyImage" not in name and "Latte" not in name}
    assert known <= set(GRIDS)


def test_tokens_of_a_size() -> None:
    assert size_of(WanTransformer3DModel, 720, 1280, 81, None).tokens == 21 * 45 * 80
    flux = type("FluxTransformer2DModel", (), {})
    assert size_of(flux, 512, 512, None, None).tokens == 32 * 32 + 512
    assert size_of(flux, None, None, None, 2000).tokens == 2000
    for arguments, expected in (
        ((512, None, None, 9), "--tokens replaces --height"),
        ((None, None, 5, None), "makes images: leave --frames out"),
        ((8, 8, None, None), "gives no token"),
    ):
        with pytest.raises(AttentionProviderError, match=expected):
            size_of(flux, *arguments)
    with pytest.raises(AttentionProviderError, match="Give --tokens"):
        size_of(type("AceStepTransformer1DModel", (), {}), 512, None, None, None)


def test_rows_of_products_are_those_of_a_forward() -> None:
    """The operations of all products, against PyTorch's count for a model that runs."""
    from torch.utils.flop_counter import FlopCounterMode

    from diffusers_attn.tiny_models import CASES

    case = CASES["flux"]
    tiny = case.build()
    described = model.ModelDescription(model.Target("", tiny, {}), None)
    tokens = IMAGE_TOKENS + model.TEXT
    size = Size(tokens, model.TEXT, "")
    expected = sum(2 * weights * rows * model.BATCH for weights, rows, _ in model.products(described, size))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny(**case.inputs())
    counted = sum(flops for kind, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(kind))
    assert expected == pytest.approx(counted, rel=0.01)


def test_attention_to_a_shorter_sequence_counts_its_own_tokens() -> None:
    rows = model.rows_of_tiny("LTX2VideoTransformer3DModel")
    size = size_of(type("LTX2VideoTransformer3DModel", (), {}), None, None, None, None)
    video, audio, across = (
        model.attention_tokens(rows, f"transformer_blocks.0.{name}", size)
        for name in ("attn1", "audio_attn1", "audio_to_video_attn")
    )
    assert video == 6144 and audio == pytest.approx(6144 * 23 / 175, abs=1)
    assert across == pytest.approx((video * audio) ** 0.5, abs=1)


@pytest.mark.parametrize(
    ("name", "attention", "expected"),
    [
        ("QwenImageTransformer2DModel", "transformer_blocks.0.attn", 48),  # joins image and text of two projections
        ("Krea2Transformer2DModel", "transformer_blocks.0.attn", 48),  # other layers have more rows
        ("WanAnimateTransformer3DModel", "blocks.0.attn1", 175),
        ("SanaTransformer2DModel", "", 35),  # no attention is split
    ],
)
def test_tokens_that_attention_joins(name: str, attention: str, expected: int) -> None:
    rows = model.rows_of_tiny(name)
    assert rows.attention == expected and (not attention or rows.of_queries(attention) == expected)


def test_small_models_do_not_pay() -> None:
    found = advise(str(ROOT / "examples/tiny_flux"), "--gpus", "2", "--gpu", "h200")
    assert found["recommended_gpus"] == 1 and found["advice"][0].startswith("2 GPUs do not pay: ")
    assert found["other_weights_bytes"] > 0 and found["model"] == "FluxTransformer2DModel"


def test_memory_that_does_not_suffice() -> None:
    found = advise("wan-14b", "--gpus", "4", "--gpu", "rtx-4090")
    (text,) = [each for each in found["advice"] if "does not fit into 24 GB" in each]
    assert "shard_weights=True) it fits on 2 GPUs" in text
    assert all(not each["fits"] for each in found["predictions"])
    found = advise("wan-14b", "--gpus", "1", "--vram", "20", code=1)
    assert any("Quantise or offload" in each for each in found["advice"])


def test_weights_are_those_of_the_configuration() -> None:
    assert model.described("flux").parameters == pytest.approx(11.90e9, rel=0.01)
    assert model.described("wan-1.3b").parameters == pytest.approx(1.42e9, rel=0.01)
    assert model.described(str(ROOT / "examples/tiny_flux/transformer")).parameters == pytest.approx(
        model.described(str(ROOT / "examples/tiny_flux")).parameters
    )
    assert all(each.is_meta for each in model.described("flux").model.parameters())


def test_numbers_of_gpus_fill_nodes() -> None:
    assert command._counts(8, 1) == [1, 2, 4, 8]
    assert command._counts(16, 2) == [1, 2, 4, 8, 16]
    assert command._counts(12, 2) == [1, 2, 4, 6, 12]
    assert command._counts(1, 1) == [1]


def test_speeds_follow_the_specification() -> None:
    h200, a100 = (gpus.GPUS[name].hardware(None, 1) for name in ("h200", "a100"))
    assert h200 == gpus.REFERENCE
    assert a100.matrix_flops / h200.matrix_flops == pytest.approx(312 / 989)
    assert gpus.GPUS["l40s"].hardware(None, 1).within == gpus.TYPICAL["pcie"].within
    assert gpus.GPUS["rtx-4090"].hardware(None, 1).within == gpus.TYPICAL["host memory"].within
    assert gpus.GPUS["h100"].hardware("host memory", 2).copies is None
    with pytest.raises(AttentionProviderError, match="has no NVLink"):
        gpus.GPUS["l40s"].hardware("nvlink", 1)
    assert predict.ITEMSIZE == 2


def test_the_text() -> None:
    result = CliRunner().invoke(main.app, ["advise", "flux", "--gpus", "2", "--gpu", "h200"])
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert (
        lines[0]
        == "FluxTransformer2DModel, 11,901 million parameters; 1024 x 1024: 4,608 tokens, with 512 of text; batch 1"
    )
    assert any(line.split()[:4] == ["2", "a", "gather", "of"] for line in lines)
    assert "2 GPUs: a gather of 2, 1.8 times as fast as one GPU." in lines


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], "there is no model class 'nothing'"),
        (["UNet2DConditionModel"], "has no context-parallel plan"),
        (["flux", "--gpu", "h900"], "accepted are h200"),
        (["flux", "--links", "wire"], "accepted are nvlink, pcie, host memory"),
        (["flux", "--gpus", "3", "--nodes", "2"], "the same number of GPUs"),
        (["HiDreamImageTransformer2DModel"], "cannot be made from this configuration"),
        (["flux", "--provider", "flash9"], "no attention provider"),
    ],
)
def test_arguments_that_are_not_accepted(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(main.app, ["advise", *arguments])
    assert result.exit_code == 2 and expected in result.stderr and result.stdout == ""


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    result = CliRunner().invoke(main.app, ["advise", str(tmp_path)])
    assert result.exit_code == 2 and "has no configuration that can be read" in result.stderr
