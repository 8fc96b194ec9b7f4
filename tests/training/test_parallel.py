"""`TrainingParallel`: which ranks share a sequence, and errors that name the setting."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ParallelismConfig

from diffusers_attn import AttentionProviderError
from diffusers_attn.processors import attention_modules
from diffusers_attn.training import TrainConfig, Trainer, TrainingError, TrainingParallel
from diffusers_attn.training.parallel import check_trainable

from ..tiny_pipelines import make
from .worlds import World, forget_accelerate


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    forget_accelerate()


# ---- One process


def test_one_process(accelerator):
    parallel = TrainingParallel.of(accelerator)
    assert (parallel.cp_degree, parallel.cp_rank, parallel.dp_degree, parallel.dp_rank) == (1, 0, 1, 0)
    model = make("cogview4").transformer
    assert parallel.enable(model) is None
    assert {module.provider for module in attention_modules(model)} == {"auto"}
    parallel.enable(model, provider="_native_math")
    assert {module.provider for module in attention_modules(model)} == {"_native_math"}
    assert parallel.enable(torch.nn.Linear(2, 2)) is None  # a model of one's own, with no attention of diffusers
    parallel.check({"noise": torch.zeros(2)})
    with pytest.raises(TrainingError, match=r"'deterministic'.*no provider is given"):
        parallel.enable(model, deterministic=True)
    with pytest.raises(TrainingError, match=r"shard_weights, split_vae: .* for inference.* FSDP2"):
        parallel.enable(model, split_vae=True, shard_weights=True)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"cp_degree": 2}, "cp_degree=2, but this job has one process"),
        ({"cp_degree": 0}, "cp_degree=0: a whole number"),
        ({"ring_degree": True}, "ring_degree=True"),
        ({"cp_degree": 4, "ulysses_degree": 3}, "ulysses_degree=3 and ring_degree=None with cp_degree=4"),
        ({"cp_degree": 4, "ulysses_degree": 2, "ring_degree": 1}, "their product must be cp_degree"),
        ({"rotate_method": "alltoall"}, "rotate_method='alltoall' .* no processes share"),
    ],
)
def test_degrees_that_do_not_fit(accelerator, degrees, message):
    with pytest.raises(TrainingError, match=message):
        TrainingParallel.of(accelerator, **degrees)


def test_an_unknown_rotate_method(accelerator):
    with pytest.raises(AttentionProviderError, match="rotate_method='sideways'"):
        TrainingParallel.of(accelerator, rotate_method="sideways")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA", "MULTI_NPU"])
def test_what_accelerate_may_not_be_set_to(accelerator, kind):
    accelerator.state.distributed_type = kind  # as Accelerate has it when these are configured, for which they must run
    with pytest.raises(TrainingError, match=f"distributed_type is {kind}.*accelerate_configs"):
        TrainingParallel.of(accelerator)


@pytest.mark.parametrize("axis", ["tp", "sp"])
def test_other_parallelism(accelerator, axis):
    accelerator.state.parallelism_config = ParallelismConfig(**{f"{axis}_size": 2})
    with pytest.raises(TrainingError, match=f"parallelism_config_{axis}_size=2"):
        TrainingParallel.of(accelerator)


@pytest.mark.parametrize("provider", ["sage", "sage_varlen", "flex"])
def test_providers_without_a_backward(provider, accelerator):
    with pytest.raises(TrainingError, match=f"'{provider}' has no backward.*native"):
        TrainingParallel.of(accelerator).enable(make("wan").transformer, provider=provider)


def test_flex_has_no_backward_of_parts():
    check_trainable("flex", "cuda")
    with pytest.raises(TrainingError, match="'flex' has no backward over several devices on cuda"):
        check_trainable("flex", "cuda", parts=True)
    check_trainable("flash", "cuda", parts=True)


# ---- The trainer's own settings, before anything is loaded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_provider": "sage"}, "'sage' has no backward on cpu"),
        ({"attn_provider": "flush"}, "no attention provider 'flush'"),
        ({"cp_degree": 2}, "this job has one process"),
        ({"optimizer": "sgd"}, "--optimizer sgd: accepted are adamw"),
        ({"rank": 0}, "--rank 0: whole numbers from 1"),
        ({"caption_dropout": 2.0}, "--caption_dropout 2.0: numbers from 0, up to 1 "),
        (
            {"adapter": "loha", "adapter_init": "gaussian"},
            "--adapter_init gaussian is accepted for --adapter lora, rslora, dora, not for --adapter loha",
        ),
        ({"resume": "7"}, "resume='7'"),
        ({"hub_model_id": "me/lora"}, "--hub_model_id me/lora has no effect without --push_to_hub"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16: accepted are no, bf16"),
        ({"data": ""}, "data is missing"),
        ({"validation_size": [64]}, "--validation_size 64: 2 whole numbers are accepted. Height and width"),
    ],
)
def test_settings_that_are_refused(settings, message, tmp_path):
    try:
        with pytest.raises((TrainingError, AttentionProviderError), match=message):
            Trainer(TrainConfig(**{"model": "m", "data": "d", "cpu": True, "output_dir": str(tmp_path), **settings}))
    finally:
        forget_accelerate()


def test_a_package_that_is_missing():
    import importlib.util

    from diffusers_attn.training.model.optim import make_optimizer

    for name, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(TrainingError, match=f"optimizer='{name}'.*pip install {package}"):
                make_optimizer(name, [torch.nn.Parameter(torch.zeros(2))])


# ---- Several processes


def _in_a_loop_of_ones_own():
    """What each of four processes sees: data, noise, errors."""
    accelerator = Accelerator(cpu=True)
    seen = {}
    for name, settings, degrees in (
        ("cp_degree=3 does not divide the 4", {}, {"cp_degree": 3}),
        ("split_batches=True", {"split_batches": True}, {"cp_degree": 2}),
        ("dispatch_batches=True", {"dispatch_batches": True}, {"cp_degree": 2}),
    ):
        accelerator.dataloader_config = DataLoaderConfiguration(**settings)
        with pytest.raises(TrainingError, match=name):
            TrainingParallel.of(accelerator, **degrees)
    accelerator.dataloader_config = DataLoaderConfiguration()
    parallel = TrainingParallel.of(accelerator, cp_degree=2)
    with pytest.raises(TrainingError, match="split already"):
        accelerator.maybe_context_parallel()
    loader = torch.utils.data.DataLoader(list(range(8)), batch_size=2)
    seen["data"] = [batch.tolist() for batch in accelerator.prepare(loader)]
    seen["stream"] = [batch.tolist() for batch in accelerator.prepare(torch.utils.data.DataLoader(_Stream(), 2))]
    seen["noise"] = torch.randn(3, generator=parallel.generator(0, 0)).tolist()
    seen["next"] = torch.randn(3, generator=parallel.generator(0, 1)).tolist()
    seen["ranks"] = (parallel.dp_rank, parallel.cp_rank)

    noise = torch.randn(3, generator=parallel.generator(0, 0))
    parallel.check({"noise": noise, "captions": torch.zeros(2)})
    rank = accelerator.process_index
    with pytest.raises(TrainingError, match="ranks 2 to 3 share every sequence.*different noise"):
        parallel.check({"noise": noise + (rank == 3), "captions": torch.zeros(2)})
    with pytest.raises(TrainingError, match="ranks 0 and 2 are in different.*the same captions, noise"):
        parallel.check({"noise": torch.zeros(3), "captions": torch.zeros(2)})
    return seen


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(8))


def test_groups_share_data_and_noise(run_worlds):
    [seen] = run_worlds(World(4, _in_a_loop_of_ones_own, {}))
    assert [each["ranks"] for each in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for what in ("data", "stream", "noise", "next"):
        first, same, other, as_other = (each[what] for each in seen)
        assert first == same and other == as_other and first != other
    assert seen[0]["noise"] != seen[0]["next"]
    assert sorted(seen[0]["data"] + seen[2]["data"]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
