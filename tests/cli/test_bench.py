"""`bench` measures providers on this CPU, and finds wrong ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from diffusers_attn import AttentionProviderError
from diffusers_attn.cli import main
from diffusers_attn.cli.bench import measure, plot, save, strategies, timing, workloads
from diffusers_attn.cli.bench.reference import reference

from .. import reference as exact


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "matmul_tflops", lambda device, dtype: 0.5)


def bench(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(main.app, ["bench", "--seconds", "0", "--json", *arguments])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("mask", workloads.MASKS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_mask_is_exact(mask: str, backward: bool) -> None:
    found = bench(
        "--shape", "2,3,200,16", "--provider", "native", "--provider", "_native_math", "--mask", mask,
        "--dtype", "float64", *(["--backward"] if backward else []),
    )  # fmt: skip
    (run,) = found["runs"]
    assert found["schema"] == "diffusers-attn/bench/1" and found["matmul_tflops"] == 0.5
    assert run["shape"] == {"batch": 2, "heads": 3, "length": 200, "head_dim": 16} and run["mask"] == mask
    for result in run["results"]:
        assert result["error"] < 1e-12 and result["wrong"] is False and result["ms"] > 0
        assert (result["gradient_error"] is not None) == backward
        assert not backward or result["gradient_error"] < 1e-12
        operations = result["tflops"] * result["ms"] * 1e9
        assert operations == pytest.approx((14 if backward else 4) * 2 * 3 * 200**2 * 16 * workloads.MASKS[mask][1])
        assert result["share_of_matmul"] == pytest.approx(result["tflops"] / 0.5)


def test_the_reference_is_attention_with_its_gradients() -> None:
    query, key, value = (torch.randn(2, 2, 150, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(1, 1, 150, 150) < 0.5
    found = reference(query, key, value, mask, True, True)
    out, _ = exact.attention(query, key, value, mask, True, scale=8**-0.5)
    assert len(found.rows) == 128 and found.error(out) < 1e-12
    assert found.gradient_error(torch.autograd.grad(out, (query, key, value), found.grad_out)) < 1e-12


def test_a_wrong_provider_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure.attention_dispatch
    monkeypatch.setattr(measure, "attention_dispatch", lambda *args, **how: right(*args, **how) * 1.001)
    found = bench("--shape", "1,2,64,16", "--provider", "native", code=1)
    (result,) = found["runs"][0]["results"]
    assert result["wrong"] and result["error"] == pytest.approx(1e-3, rel=0.1)


def test_a_provider_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure.attention_dispatch

    def fails_first(*args: Any, **how: Any) -> Any:
        from diffusers_attn.scope import active_choice

        if active_choice().provider == "_native_math":
            raise RuntimeError("no kernel image\nsecond line")
        return right(*args, **how)

    monkeypatch.setattr(measure, "attention_dispatch", fails_first)
    found = bench("--shape", "1,2,64,16", "--provider", "_native_math", "--provider", "native", code=1)
    broken, native = found["runs"][0]["results"]
    assert broken["problem"] == "RuntimeError: no kernel image" and broken["ms"] is None and native["ms"] > 0


def test_a_refused_call_is_no_fault() -> None:
    found = bench("--shape", "1,2,64,16", "--provider", "flex", "--dtype", "float64", "--provider", "auto")
    flex, auto = found["runs"][0]["results"]
    assert flex["refused"] and "accepts bfloat16, float16, float32" in flex["problem"] and auto["error"] < 1e-12


def test_scores_that_do_not_fit_are_not_formed() -> None:
    setting = measure.Setting(
        workloads.Shape(1, 4000, 200_000, 8), "none", torch.float32, torch.device("cpu"), False, 0.0
    )
    assert "forms every score" in measure._too_large("_native_math", setting)
    assert measure._too_large("native", setting) == ""


def test_the_table() -> None:
    result = CliRunner().invoke(
        main.app, ["bench", "--seconds", "0", "--shape", "1,2,64,16", "--provider", "native", "--backward"]
    )
    lines = [line for line in result.output.splitlines() if line]
    assert lines[0].startswith("1,2,64,16: batch 1, 2 heads, 64 tokens, head_dim 16, float32, mask: none, forward and")
    assert lines[2].split()[:3] == ["provider", "ms", "TFLOP/s"] and lines[3].split()[0] == "native"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["flux"], "there is no workload 'flux'"),
        (["--shape", "1,2,3"], "four positive numbers"),
        (["--shape", "1,0,3,4"], "four positive numbers"),
        (["--mask", "some"], "accepted are none, causal, key, dense, bias"),
        (["--dtype", "int8"], "accepted are bfloat16"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "nothing"], "--device nothing"),
        (["--provider", "flash9"], "no attention provider 'flash9'"),
        (["--provider", "xformers"], "cannot be used here"),
    ],
)
def test_arguments_that_are_not_accepted(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(main.app, ["bench", *arguments])
    assert result.exit_code == 2 and expected in result.stderr and result.stdout == ""


def test_slow_calls_are_measured_once() -> None:
    calls = {"slow": 0, "quick": 0}

    def slow() -> None:
        calls["slow"] += 1
        timing.time.sleep(0.03)

    def quick() -> None:
        calls["quick"] += 1

    found = timing.milliseconds({"slow": slow, "quick": quick}, torch.device("cpu"), 0.02)
    assert calls["slow"] == 1 and calls["quick"] > 10 and found["slow"] >= 30 > found["quick"]


def test_speeds_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def setting(length: int) -> measure.Setting:
        shape = workloads.Shape(1, 2, length, 64)
        return measure.Setting(shape, "none", torch.bfloat16, torch.device("cuda"), False, 0.0)

    short = [measure.Result("flash", True, tflops=10.0), measure.Result("flex", True, tflops=99.0, wrong=True)]
    long = [measure.Result("flash", True, tflops=20.0), measure.Result("sage", False, tflops=30.0)]
    found = save.speeds_of([(setting(512), short), (setting(10_000), long), (setting(20_000), long[:1])])
    assert found == {((9, 0), 64): {"flash": (10.0, 20.0), "sage": (30.0, 30.0)}}
    save.check_savable(setting(512))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "reads speeds of CUDA GPUs"), ({"device": torch.device("cuda"), "mask": "key"}, "without a mask")],
)
def test_speeds_that_auto_cannot_use_are_not_saved(changes: dict[str, Any], expected: str) -> None:
    given = measure.Setting(workloads.Shape(1, 2, 64, 64), "none", torch.bfloat16, torch.device("cpu"), False, 0.0)
    with pytest.raises(AttentionProviderError, match=expected):
        save.check_savable(dataclasses.replace(given, **changes))


def test_without_matplotlib_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    for name, expected in (("speeds.png", "pip install matplotlib"), ("speeds.txt", "accepted are files that end in")):
        result = CliRunner().invoke(main.app, ["bench", "--plot", str(tmp_path / name)])
        assert result.exit_code == 2 and expected in result.stderr and result.stdout == ""


def test_the_plot_has_a_bar_for_each_provider_and_shape(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib, which is not among the test packages")
    exact, lossy = measure.Result("_native_math", True, tflops=10.0), measure.Result("sage", False, tflops=20.0)
    plot.draw(tmp_path / "speeds.svg", [("flux", [exact, lossy]), ("wan", [exact])], "On a test", 30.0)
    text = (tmp_path / "speeds.svg").read_text()
    assert "<!--  _native_math -->" in text and "<!--  sage (lossy) -->" in text
    assert text.startswith("<?xml") and [each.name for each in tmp_path.iterdir()] == ["speeds.svg"]


def test_a_lossy_provider_may_quantise_but_not_invent() -> None:
    setting = measure.Setting(workloads.Shape(1, 1, 8, 8), "none", torch.float32, torch.device("cpu"), False, 0.0)
    inputs, _ = measure.make(setting)
    exact_result = reference(*inputs, None, False, False)
    for scale, wrong in ((1.05, False), (3.0, True), (float("nan"), True)):
        result = measure.Result("sage", False)
        out = torch.nn.functional.scaled_dot_product_attention(*inputs) * scale
        measure.compare(lambda out=out: out, exact_result, result, setting)
        assert result.wrong == wrong


def test_shapes_that_do_not_fit_are_no_fault() -> None:
    found = bench("--shape", "1,1000000,1000000,100", "--shape", "1,2,64,16", "--provider", "native")
    large, small = (run["results"][0] for run in found["runs"])
    assert large["refused"] and "not enough memory" in large["problem"] and small["ms"] > 0


def strategies_on_ranks(meshes, mask: str, backward: bool) -> list[Any]:
    setting = measure.Setting(workloads.Shape(1, 4, 37, 16), mask, torch.float64, torch.device("cpu"), backward, 0.0)
    found = strategies.all_strategies(4, "cpu", 4, None)
    return strategies.measure_strategies(found, ["native"], setting)


@pytest.mark.parametrize(("mask", "backward"), [("causal", True), ("key", False), ("bias", False)])
def test_strategies_are_exact(pool, mask: str, backward: bool) -> None:
    by_rank = pool.run(4, strategies_on_ranks, mask=mask, backward=backward)
    names = ["one rank", "ulysses4", "ulysses2-gather2", "gather4", "ring4"]
    for results in by_rank:
        assert [each.strategy for each in results] == names and not any(each.wrong for each in results)
        assert all(0 < each.error < 1e-12 for each in results)
        assert not backward or all(0 < each.gradient_error < 1e-12 for each in results)
        assert [each.ms for each in results] == [each.ms for each in by_rank[0]]  # of the slowest rank
        assert {each.transport for each in results} == {"", "collective"}


def test_names_of_strategies() -> None:
    names = {
        ("gather", 4): "gather4", ("ring", 2): "ring2", ("ulysses", 8): "ulysses8",
        ("ulysses2-ring", 8): "ulysses2-ring4",
        ("ulysses-gather2", 8): "ulysses4-gather2", ("ulysses2-ring4", 8): "ulysses2-ring4",
    }  # fmt: skip
    found = {given: strategies.name_of(strategies.strategy_of(*given)) for given in names}
    assert found == names
    for wrong in ("x", "", "-gather", "ulysses3", "ulysses-gather", "ring2"):
        with pytest.raises(AttentionProviderError, match="accepted are gather, ring, ulysses, and with degrees"):
            strategies.strategy_of(wrong, 4)
    result = CliRunner().invoke(main.app, ["bench", "tiny", "--strategies", "ring"])
    assert result.exit_code == 2 and "needs several ranks" in result.stderr
