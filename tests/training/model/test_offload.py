"""Training with the blocks of the base model in host memory or in files is exactly training without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from safetensors.torch import load_file

from diffusers_attn.training import TrainConfig, TrainingError
from diffusers_attn.training.model.offload import offload_blocks

from ...marks import thorough_but
from ...tiny_pipelines import make
from ..runs import train, train_all
from ..worlds import World, forget_accelerate

SHORT = {"steps": 2, "gradient_accumulation_steps": 2, "lr_warmup_steps": 0, "adapter_init": "gaussian"}


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


@pytest.mark.parametrize(
    ("family", "offload", "precision"),
    thorough_but(
        [("cogview4", "disk", None)],
        [
            ("cogview4", "disk", None),
            ("cogview4", "blocks", None),
            ("flux", "disk", "int8"),
            ("flux", "blocks", "int8"),
            ("wan", "disk", None),
            ("z_image", "disk", None),
            ("wan_a14b", "disk", "int8"),
        ],
    ),
)
def test_steps_are_those_without(settings_of, family, offload, precision):
    """With files, weights that are not on the device have no values at all, so a wrong use cannot go unseen."""
    if precision is not None:
        pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[quantization]'")
    more = {"validation_prompts": ["a cat"], "validation_steps": 1, "evaluation_every": 1, "base_precision": precision}
    first = train(settings_of(family, **SHORT, **more))
    forget_accelerate()
    settings = settings_of(family, **SHORT, **more, offload=offload)
    second = train(settings)
    # A CPU's matrix products may differ in the last bit if their weights begin at another address.
    for mine, other in zip(second["steps"], first["steps"], strict=True):
        assert mine == pytest.approx(other, rel=1e-6)
    torch.testing.assert_close(load_file(second["path"]), load_file(first["path"]), rtol=1e-4, atol=1e-6)
    assert not list(Path(settings["cache_dir"]).glob("offload-*"))


@pytest.mark.slow
@pytest.mark.thorough
def test_processes_that_share_sequences_train_alike(settings_of, run_worlds):
    settings = {**SHORT, "gradient_accumulation_steps": 1}
    one = World(1, train_all, {"several": [settings_of("cogview4", **settings, batch_size=2)]})
    two = [{"batch_size": 2, "cp_degree": 2}, {"batch_size": 1}]
    several = [settings_of("cogview4", **settings, **each, offload="disk") for each in two]
    [[alone]], shared = run_worlds(one, World(2, train_all, {"several": several}))
    for of_rank in shared:
        for each in of_rank:
            for mine, other in zip(each["steps"], alone["steps"], strict=True):
                assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
                assert mine["gradient norm"] == pytest.approx(other["gradient norm"], rel=1e-5)


def test_blocks_are_read_once_in_each_pass_in_the_order_in_which_they_run(tmp_path, monkeypatch):
    """The last two of a pass are there when the next pass begins. No block keeps parameters with values, although
    checkpointing ends each recomputation with an exception."""
    import peft

    transformer = make("cogview4").transformer.requires_grad_(False)
    blocks = transformer.transformer_blocks
    blocks.extend([type(blocks[0])(**make_arguments(transformer)) for _ in range(4)]).requires_grad_(False)
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    offload = offload_blocks(transformer, torch.device("cpu"), tmp_path)
    frozen = [[each for each in block.parameters() if not each.requires_grad] for block in blocks]
    assert all(each.device.type == "meta" for those in frozen for each in those)
    reads = []
    for number, block in enumerate(offload._blocks):
        monkeypatch.setattr(block, "read", lambda number=number, read=block.read: (reads.append(number), read())[1])
    sizes = torch.tensor([[48, 48]])
    output = transformer(
        torch.randn(1, transformer.config.in_channels, 6, 6), torch.randn(1, 5, transformer.config.text_embed_dim),
        torch.tensor([1.0]), sizes, sizes, torch.zeros(1, 2),
    )[0]  # fmt: skip
    output.sum().backward()
    count = len(blocks)
    assert reads == [*range(count), *range(count - 3, -1, -1)]
    assert not any(each.device.type != "meta" for b in blocks for each in b.parameters() if not each.requires_grad)
    assert any(float(each.grad.abs().sum()) > 0 for each in transformer.parameters() if each.requires_grad)


class KeepsItsWeight(torch.autograd.Function):
    """x @ weight.T with a weight that the graph refers to without autograd's knowledge, as bitsandbytes does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, None


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.keeps = torch.nn.Linear(width, width), torch.nn.Linear(width, width, bias=False)
        self.requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x + KeepsItsWeight.apply(torch.tanh(self.linear(x) * self.scale), self.keeps.weight)


class Blocks(torch.nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, count, width):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(width) for _ in range(count)])

    def forward(self, x):
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_device_has_memory_for_two_blocks(count, on_disk, tmp_path):
    torch.manual_seed(0)
    model, x = Blocks(count, 8).double(), torch.randn(3, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [block.scale.grad.clone() for block in model.blocks]
    model.zero_grad()
    offload = offload_blocks(model, torch.device("cpu"), tmp_path if on_disk else None)
    memory = {each.untyped_storage().data_ptr() for each in offload._memory if each.numel()}
    assert len(memory) == min(count, 2)
    used = set()

    def record(module, *_):
        used.update(each.untyped_storage().data_ptr() for each in module.parameters() if not each.requires_grad)

    for block in model.blocks:
        block.register_forward_pre_hook(record)
    for _ in range(2):
        model(x).square().sum().backward()
        for block, grad in zip(model.blocks, expected, strict=True):
            torch.testing.assert_close(block.scale.grad, grad, rtol=1e-12, atol=1e-12)
        model.zero_grad()
    assert used == memory


def make_arguments(transformer):
    config = transformer.config
    inner = config.num_attention_heads * config.attention_head_dim
    return {
        "dim": inner, "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim, "time_embed_dim": config.time_embed_dim,
    }  # fmt: skip


@pytest.mark.parametrize("other", [{"gradient_checkpointing": False}, {"compile": True}])
def test_what_would_keep_all_weights_is_refused(other):
    with pytest.raises(TrainingError, match="--offload blocks with --"):
        TrainConfig(model="m", data="d", offload="blocks", **other)


def test_low_vram_is_a_preset(tmp_path):
    for arguments in (["--low_vram"], ["--config", str(tmp_path / "run.yaml")]):
        (tmp_path / "run.yaml").write_text("low_vram: true\n")
        config = TrainConfig.from_arguments(["--model", "m", "--data", "d", *arguments, "--optimizer", "adamw"])
        assert (config.base_precision, config.offload, config.optimizer) == ("nf4", "blocks", "adamw")
