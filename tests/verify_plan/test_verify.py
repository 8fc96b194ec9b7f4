"""verify_cp_plan: right plans are right, and of wrong ones it names the module where the model parts from one process.

Most of it runs on the pool's processes; that it starts its own, and ends them, is tested with a few.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn

from diffusers_attn import AttentionProviderError, get_cp_plan, list_cp_plans, verify_cp_plan
from diffusers_attn.cp_plans.plan import CPAttention, CPInput, CPOutput, ParamId
from diffusers_attn.tiny_models.weights import randomize
from diffusers_attn.verify_plan.rank import attention_names
from diffusers_attn.verify_plan.verify import _check_plan
from examples import writing_plans
from tests.zoo import CASES

from .. import launching
from .on_pool import verify_on_pool

LENGTH, WIDTH = 13, 32


class Attention(nn.Module):
    """Of a model without diffusers, in which attention is a call of F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.processor = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(query, key, value).transpose(1, 2).flatten(2)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


class SpelledOut(Attention):
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1) @ value


class OverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states.mT).mT


class Small(nn.Module):
    def __init__(self, *blocks: type[nn.Module], end: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for block in blocks)
        self.proj_out = nn.Linear(WIDTH, WIDTH)
        randomize(self, torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.proj_out.weight.mul_(end)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return self.proj_out(hidden_states)


PLAN = {"": {ParamId("hidden_states"): CPInput(1, 3)}, "proj_out": CPOutput(1, 3)}


def small_inputs() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def verify(pool, tmp_path):
    def verify(name, plan, model=None, inputs=None, **options):
        if model is None:
            inputs = CASES[name].inputs()
        elif inputs is None:
            inputs = small_inputs()
        return verify_on_pool(pool, tmp_path, name, plan, model, inputs, **options)

    return verify


def plan_of(name):
    return dict(get_cp_plan(CASES[name].build()))


@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage", "ltx2_masked", "helios_amplified", "cogview4"])
def test_right_plans_are_right(name, verify):
    report = verify(name, plan_of(name), gradients=True)
    assert report.ok, str(report)
    report.raise_if_wrong()
    assert [strategy.name for strategy in report.strategies] == ["ulysses", "gather", "ring"]
    assert all(strategy.error < 1e-5 and strategy.gradient_error < 1e-4 for strategy in report.strategies)
    assert report.unexchanged > 1e-2 and report.difference is None
    assert "right" in str(report) and "hint" not in str(report)


@pytest.mark.parametrize("name", ["sana", "sana_video"])
def test_linear_attention(name, verify):
    """What is exchanged are its keys and values, by gathers within it."""
    report = verify(name, plan_of(name), strategies=("gather",))
    assert report.ok and report.unexchanged > 1e-3, str(report)


def test_a_recurrence_by_heads(verify):
    """In float64: in float32 this model's softmax layers attend in bfloat16."""
    model, inputs = CASES["sana_wm"].build().double(), CASES["sana_wm"].inputs()
    inputs = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    report = verify("sana_wm", plan_of("sana_wm"), model=model, inputs=inputs, gradients=True)
    assert report.ok and report.unexchanged > 1e-2, str(report)
    plan = without("sana_wm", ("blocks.*.attn.conv_k?", None))
    report = verify("sana_wm", plan, model=model, inputs=inputs, strategies=("gather",))
    assert not report.ok and report.difference.module == "blocks.0.attn.conv_k"


def without(name, *keys):
    plan = plan_of(name)
    for path, argument in keys:
        if argument is None:
            del plan[path]
        else:
            plan[path] = {param: spec for param, spec in plan[path].items() if param.name != argument}
    return plan


BROKEN = {
    # name of the case, plan, module, words of the report
    "rope is not split": ("wan", without("wan", ("rope", None)), "blocks.0.attn1", ["rotary_emb", "replicated"]),
    "output is not gathered": (
        "flux",
        without("flux", ("proj_out", None)),
        "",
        ["not gathered", "after 'proj_out', the last"],
    ),
    "text is replicated": (
        "flux",
        without("flux", ("", "encoder_hidden_states"), ("", "txt_ids")),
        "transformer_blocks.0.attn",
        ["hint: encoder_hidden_states is replicated, but hidden_states"],
    ),
    "wrong dimension": (
        "wan",
        plan_of("wan") | {"blocks.0": {ParamId("hidden_states"): CPInput(2)}},
        "blocks.0.norm1",
        ["split_dim", "of [2, 175, 64] in one process"],
    ),
    "mask is not split": (
        "qwenimage",
        without("qwenimage", ("transformer_blocks.*", "encoder_hidden_states_mask")),
        "transformer_blocks.0.attn",
        ["encoder_hidden_states_mask", "Split the mask"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_of_a_wrong_plan_the_module_is_named(name, verify):
    case, plan, module, words = BROKEN[name]
    report = verify(case, plan)
    assert not report.ok
    assert report.difference is not None and report.difference.module == module, str(report)
    for word in words:
        assert word in str(report), str(report)
    with pytest.raises(AttentionProviderError, match="could not be verified"):
        report.raise_if_wrong()


def test_attention_outside_of_any_provider(verify):
    report = verify("small", PLAN, Small(Attention, SpelledOut), replace_sdpa=True)
    assert report.difference.module == "blocks.1" and "none of its attention went through a provider" in str(report)
    assert all(strategy.error > 1e-3 for strategy in report.strategies)
    without_sdpa = verify("small", PLAN, Small(Attention))
    assert without_sdpa.difference.module == "blocks.0" and not without_sdpa.ok
    assert verify("small", PLAN, Small(Attention, Attention), replace_sdpa=True, gradients=True).ok


class Projected(nn.Module):
    """Attention that is spelled out, of a class that has no processor, with a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_out((query @ key.mT * WIDTH**-0.5).softmax(dim=-1) @ value)


class Centred(Small):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return self.proj_out(hidden_states - hidden_states.mean(dim=1, keepdim=True))


class Chained(Small):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.proj_out(hidden_states)


def test_the_code_around_a_layer_is_blamed_and_not_the_layer(verify):
    """What a layer is given is wrong already."""
    report = verify("small", PLAN, Small(Projected), strategies=("ulysses",))
    assert report.difference.module == "blocks.0" and "it gives 'blocks.0.to_out'" in str(report), str(report)
    report = verify("centred", PLAN, Centred(Attention), replace_sdpa=True, strategies=("ulysses",))
    assert report.difference.module == "" and "it gives 'proj_out'" in str(report), str(report)
    assert '"blocks.0": CPOutput' in report.difference.hint


def test_an_error_that_says_what_to_do_has_no_hint_beside_it(verify):
    plan = {**PLAN, "": {ParamId("hidden_states"): CPInput(1, 4)}}
    report = str(verify("small", plan, Small(Attention), replace_sdpa=True))
    assert "has 3 dimensions" in report and "Correct expected_dims" in report and "hint" not in report
    twice = {"blocks.*": {ParamId("hidden_states"): CPInput(1, 3)}, "proj_out": CPOutput(1, 3)}
    report = str(verify("chained", twice, Chained(Attention, Attention), replace_sdpa=True))
    assert "was split before in this forward" in report and "not 'blocks.*'" in report and "hint" not in report


def test_a_statistic_over_tokens(verify):
    report = verify("small", PLAN, Small(Attention, OverTokens), replace_sdpa=True)
    assert report.difference.module == "blocks.1.norm" and "a statistic, a convolution" in str(report)


def test_a_comparison_that_notices_nothing_is_no_proof(verify):
    report = verify("small", PLAN, Small(Attention, end=0.0), replace_sdpa=True)
    assert all(map(report.right, report.strategies)) and report.insensitive and not report.ok
    assert "insensitive" in str(report) and "proves nothing" in str(report)


def test_gradients_are_looked_at(verify):
    """A replicated sequence counts once for each rank."""
    plan = {"proj_out": CPAttention(())}
    report = verify("small", plan, Small(Attention), replace_sdpa=True, gradients=True)
    assert report.strategies[0].gradient_error < 1e-4 and report.insensitive


def test_the_page_about_plans_says_what_is_printed(verify):
    """docs/writing_plans.md, up to the rounding of the numbers."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "writing_plans.md").read_text()
    blocks = re.findall(r"^```\n(SmallTransformer.*?)^```", page, re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    model = writing_plans.SmallTransformer()
    for plan, shown in zip((writing_plans.FIRST_ATTEMPT, writing_plans.PLAN), blocks, strict=True):
        report = verify("SmallTransformer", plan, model, gradients=True, inputs=writing_plans.inputs())
        numbers = r"[0-9.]+e[-+]\d+"
        assert re.sub(numbers, "", str(report)) == re.sub(numbers, "", shown).rstrip()
    assert report.ok


@pytest.fixture
def folder_is_importable(monkeypatch):
    """As the directory that pytest was started in."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2]))


class Dies(nn.Module):
    """On one rank, as where memory ends. In one process, that is in the first call, it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2 and torch.distributed.get_rank() == 1:
            os._exit(7)
        return hidden_states


@pytest.mark.slow
def test_a_rank_that_dies_does_not_hang_the_others(folder_is_importable):
    start, limit = time.monotonic(), launching.TIMEOUT
    report = verify_cp_plan(Small(Dies, Attention), small_inputs(), PLAN, replace_sdpa=True, timeout=limit)
    assert not report.ok and "ended with" in str(report) and "7" in str(report)
    assert time.monotonic() - start < limit


SCRIPT = """
import torch
from torch import nn
from diffusers_attn import CPInput, CPOutput, ParamId, verify_cp_plan

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.attn = Inner()
    def forward(self, x):
        return self.proj(self.attn(x))

class Inner(nn.Module):
    processor = None
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]

if __name__ == "__main__":
    plan = {"": {ParamId("x"): CPInput(1)}, "proj": CPOutput(1)}
    model, inputs = Mine().to(torch.bfloat16), [torch.randn(2, 5, 8, dtype=torch.bfloat16)]
    print(verify_cp_plan(model, inputs, plan, world_size=3, replace_sdpa=True, gradients=True))
"""


@pytest.mark.slow
def test_a_class_of_the_script(tmp_path):
    """It is found in no module, and runs in processes that the call starts."""
    (tmp_path / "script.py").write_text(SCRIPT)
    where = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    run = launching.run([sys.executable, "script.py"], cwd=tmp_path, env=where)
    assert "Mine under its plan on 3 processes: right" in run.stdout, run.stdout + run.stderr


WRONG_PLANS = {
    "a module that is not there": ({**PLAN, "proj": CPOutput(1)}, "has no 'proj'"),
    "an argument that is not there": ({"": {ParamId("hidden_state"): CPInput(1)}}, "names argument 'hidden_state'"),
    "a sequence that nothing splits": (
        {"": {ParamId("hidden_states"): CPInput(1, sequence="image")}, "blocks.0": CPAttention(("imgae",))},
        "Did you mean 'image'",
    ),
    "diffusers' words": (
        {"": {"hidden_states": ContextParallelInput(split_dim=1)}, "proj_out": ContextParallelOutput(gather_dim=1)},
        "ContextParallelInput is CPInput",
    ),
    "no dict": ([PLAN], "plan is a list"),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_a_plan_that_does_not_fit_the_model_is_found_before_any_process_starts(name, monkeypatch):
    plan, message = WRONG_PLANS[name]
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(AttentionProviderError, match=message):
        verify_cp_plan(Small(Attention), small_inputs(), plan)


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.model_class in list_cp_plans()))
def test_plans_that_ship_pass_that_check(name):
    model = CASES[name].build()
    _check_plan(model, get_cp_plan(model))


def test_what_is_refused(pool):
    model = Small(Attention)
    with pytest.raises(AttentionProviderError, match="no context-parallel plan.*docs/writing_plans.md"):
        verify_cp_plan(model, small_inputs())
    with pytest.raises(AttentionProviderError, match="'ulyses'.*'ulysses', 'gather', 'ring'"):
        verify_cp_plan(model, small_inputs(), PLAN, strategies=["ulyses"])
    with pytest.raises(AttentionProviderError, match="at least two processes"):
        verify_cp_plan(model, small_inputs(), PLAN, world_size=1)
    with pytest.raises(AttentionProviderError, match="no attention provider 'nativ'"):
        verify_cp_plan(model, small_inputs(), PLAN, provider="nativ")


def test_attention_is_known_from_an_entry_that_says_several_things():
    model = nn.ModuleDict({"mixer": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    role = CPAttention(("tokens",))
    assert attention_names(model, {"mixer": role}) == {"mixer"}
    assert attention_names(model, {"mixer": [{ParamId("input"): CPInput(1)}, role]}) == {"mixer"}
