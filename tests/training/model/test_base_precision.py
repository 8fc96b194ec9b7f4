"""A quantised base model trains as a plain one whose weights are the dequantised ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.data.ranks import OneRank
from diffusers_attn.training.loop.dry_run import size_of
from diffusers_attn.training.model.base_precision import (
    base_dtype,
    check_base_precision,
    is_quantised,
    load_transformer,
)
from diffusers_attn.training.model.pipeline import fingerprint, load_pipeline, text_encoders
from diffusers_attn.training.settings.choices import QUANTISED

from ...marks import thorough_but
from ..runs import TINY_FLUX, train, train_all
from ..worlds import World, forget_accelerate

MUST = {"model": "m", "data": "d", "cpu": True}


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


@pytest.fixture
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[quantization]'")


def load(precision=None, model=TINY_FLUX):
    return load_pipeline(
        str(model), revision=None, dtype=torch.float32, ranks=OneRank(), local_main=True, base_precision=precision
    )


def plain_weight(weight):
    if hasattr(weight, "quant_state"):  # bitsandbytes
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "quant_type"):  # GGUF
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(weight).as_subclass(torch.Tensor).float()
    return weight.dequantize()


def dequantised(quantised, plain):
    """Copies the weights of a quantised model, dequantised, into a plain one. Returns how many were quantised."""
    count = 0
    for name, module in quantised.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            plain.get_submodule(name).weight = nn.Parameter(plain_weight(module.weight))
            count += 1
    return count


def same_steps(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["gradient norm"] == pytest.approx(other["gradient norm"], rel=1e-5)


@pytest.fixture
def nf4_on_cpus(monkeypatch):
    """diffusers quantises to nf4 on GPUs alone, although bitsandbytes computes with it on CPUs as well."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    from diffusers_attn.training.loop import start

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *args: {"": "cpu"})
    # Its kernel for inference on CPUs packs weights anew, and not those as small as here.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(start, "check_base_precision", lambda *args: None)


@pytest.mark.parametrize("precision", thorough_but(["int8"], ["int8", "fp8", "nf4"]))
def test_losses_and_gradients_are_those_of_the_dequantised_model(
    settings_of, tmp_path, torchao, nf4_on_cpus, precision
):
    quantised, plain = load(precision), load()
    parts = ["transformer", *text_encoders(quantised)]
    for name in parts:
        assert is_quantised(getattr(quantised, name))
        assert dequantised(getattr(quantised, name), getattr(plain, name)) > 0
        assert fingerprint(getattr(quantised, name)) != fingerprint(getattr(plain, name))
    # A quarter or an eighth of float32, and a little more: biases, norms and scales.
    sizes = [sum(map(size_of, each.transformer.parameters())) for each in (quantised, plain)]
    assert sizes[0] < (0.2 if precision == "nf4" else 0.35) * sizes[1]
    plain.save_pretrained(tmp_path / "plain")
    short = {"steps": 3, "gradient_accumulation_steps": 1, "lr_warmup_steps": 0, "checkpoint_every": 2}
    settings = settings_of("flux", **short, base_precision=precision)
    first = train(settings)
    forget_accelerate()
    second = train(settings_of("flux", **short, model=str(tmp_path / "plain")))
    same_steps(first["steps"], second["steps"])
    if precision == "nf4":
        forget_accelerate()
        assert train(settings_of("flux", **short, base_precision=precision, offload="disk"))["steps"] == first["steps"]
    # Resumed exactly, and only with the same precision.
    forget_accelerate()
    latest = str(Path(settings["output_dir"], "checkpoints", "step-00000002"))
    again = settings_of("flux", **short, base_precision=precision, resume=latest)
    assert train(again)["steps"] == first["steps"][2:]
    forget_accelerate()
    with pytest.raises(TrainingError, match=f"no --base_precision: the checkpoint is .*--base_precision {precision}"):
        train(settings_of("flux", **short, resume=latest))


@pytest.mark.slow
@pytest.mark.thorough
def test_processes_that_share_sequences_train_alike(settings_of, run_worlds, torchao):
    """A ring of two, and two that train on other examples, beside one process."""
    short = {"steps": 2, "gradient_accumulation_steps": 1, "lr_warmup_steps": 0, "base_precision": "int8"}
    one = World(1, train_all, {"several": [settings_of("flux", **short, batch_size=2)]})
    two = [{"batch_size": 2, "cp_degree": 2}, {"batch_size": 1, "cp_degree": 1}]
    two = World(2, train_all, {"several": [settings_of("flux", **short, **each) for each in two]})
    [[alone]], shared = run_worlds(one, two)
    for of_rank in shared:
        for each in of_rank:
            for mine, other in zip(each["steps"], alone["steps"], strict=True):
                assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
                assert mine["gradient norm"] == pytest.approx(other["gradient norm"], rel=1e-5)


def test_a_transformer_of_its_own(settings_of, tmp_path):
    """A single file and a folder give the losses of the model that they are from."""
    short = {"steps": 1, "gradient_accumulation_steps": 1, "lr_warmup_steps": 0}
    expected = train(settings_of("flux", **short))["steps"]
    transformer = load().transformer
    save_file(transformer.state_dict(), tmp_path / "flux.safetensors")
    forget_accelerate()
    # Not the same bits: weights mapped from a file start at other addresses, and CPU kernels round differently there.
    same_steps(train(settings_of("flux", **short, transformer=str(tmp_path / "flux.safetensors")))["steps"], expected)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    forget_accelerate()
    with pytest.raises(TrainingError, match=r"--transformer .*other.safetensors"):
        train(settings_of("flux", **short, transformer=str(tmp_path / "other.safetensors")))


def test_a_quantised_folder(tmp_path, torchao):
    quantised = load("int8").transformer
    quantised.save_pretrained(tmp_path / "int8")
    arguments = {"model": str(TINY_FLUX), "part": "transformer", "revision": None, "dtype": torch.float32}
    again = load_transformer(tmp_path / "int8", type(quantised), **arguments, precision=None)
    assert is_quantised(again) and fingerprint(again) == fingerprint(quantised)
    with pytest.raises(TrainingError, match="--base_precision fp8 with --transformer .* quantised already"):
        load_transformer(tmp_path / "int8", type(quantised), **arguments, precision="fp8")


def test_a_gguf_file(settings_of, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[quantization]'")
    pipeline = load()
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, each in pipeline.transformer.state_dict().items():
        pixels = each.numpy()
        if each.ndim == 2 and each.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(pixels, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, pixels)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arguments = {"model": str(TINY_FLUX), "part": "transformer", "revision": None, "dtype": torch.float32}
    packed = load_transformer(path, type(pipeline.transformer), **arguments, precision=None)
    assert dequantised(packed, pipeline.transformer) > 0
    pipeline.transformer.save_pretrained(tmp_path / "plain")
    short = {"steps": 2, "gradient_accumulation_steps": 1, "lr_warmup_steps": 0}
    first = train(settings_of("flux", **short, transformer=str(path)))
    forget_accelerate()
    same_steps(first["steps"], train(settings_of("flux", **short, transformer=str(tmp_path / "plain")))["steps"])
    forget_accelerate()
    moved = train(settings_of("flux", **short, transformer=str(path), offload="disk"))
    assert moved["steps"] == first["steps"]
    forget_accelerate()
    with pytest.raises(TrainingError, match="--base_precision int8 with --transformer .* quantised already"):
        Trainer(TrainConfig(**MUST, transformer=str(path), base_precision="int8"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_precision": "nf4"}, "--base_precision nf4 needs a GPU.*--base_precision int8"),
        ({"transformer": "none"}, "--transformer none: there is no such file or folder"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, settings, message):
    with pytest.raises(TrainingError, match=message):
        Trainer(TrainConfig(**MUST, output_dir=str(tmp_path), **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "dora"}, "--adapter dora with --base_precision int8: .* --adapter lora or rslora"),
        ({"adapter_init": "olora"}, "--adapter_init olora with --base_precision int8"),
    ],
)
def test_adapters_that_need_plain_weights_are_refused(settings_of, torchao, settings, message):
    with pytest.raises(TrainingError, match=message):
        train(settings_of("flux", **{"adapter_init": "default", **settings}, base_precision="int8"))


def test_sharded_weights_and_missing_packages_are_refused(monkeypatch, tmp_path):
    device = torch.device("cpu")
    (tmp_path / "a.gguf").touch()
    for settings in ({"base_precision": "int8"}, {"transformer": str(tmp_path / "a.gguf")}):
        config = TrainConfig(**MUST, **settings)
        for package in ("torchao", "gguf"):
            pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[quantization]'")
        check_base_precision(config, device, sharded=False)
        with pytest.raises(TrainingError, match="with FSDP2: quantised weights cannot be sharded"):
            check_base_precision(config, device, sharded=True)
    with pytest.raises(TrainingError, match="--offload disk with FSDP2"):
        check_base_precision(TrainConfig(**MUST, offload="disk"), device, sharded=True)
    monkeypatch.setitem(QUANTISED, "int8", "no_such_package")
    with pytest.raises(TrainingError, match="--base_precision int8 needs a package .* `pip install no_such_package`"):
        check_base_precision(TrainConfig(**MUST, base_precision="int8"), device, sharded=False)


def test_bf16_is_the_dtype_of_the_base():
    assert base_dtype(TrainConfig(**MUST, base_precision="bf16"), "no") is torch.bfloat16
    assert base_dtype(TrainConfig(**MUST), "no") is torch.float32
    assert base_dtype(TrainConfig(**MUST, base_precision="int8"), "bf16") is torch.bfloat16
