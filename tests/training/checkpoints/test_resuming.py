"""Each setting when a run is resumed: kept, taken from the command line, or refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.checkpoints.resuming import SETTINGS, Resumed, read_settings, resume_settings, settings_of
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.model.optim import (
    OPTIMIZERS,
    SCHEDULES,
    load_optimizer_state,
    make_optimizer,
    make_schedule,
    optimizer_state,
    resume_schedule,
)
from diffusers_attn.training.settings.setting import metadata_of

from ...tiny_pipelines import make
from ..runs import make_data, train
from ..worlds import forget_accelerate

MUST = {"model": "m", "data": "d"}
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
OTHERS = {
    "datasets": [{"path": "other"}],
    "revision": "other", "rotate_method": "alltoall", "attn_provider": "native", "mixed_precision": "bf16",
    "aspects": [2.0], "num_frames": [5], "fps": 8.0, "caption_column": "other", "max_sequence_length": 8,
    "cache_dir": "other", "alpha": 2.0, "targets": ["other"], "ema_decay": 0.5, "lr_warmup_steps": 7,
    "learning_rate": 0.5, "timestep_sampling": "uniform", "shift": 2.0, "guidance": 2.0, "resume": "latest",
    "trackers": ["tensorboard"], "validation_prompts": ["other"], "validation_guidance": 2.0,
    "validation_size": [64, 64], "validation_frames": 5, "cp_degree": 2, "ulysses_degree": 2, "ring_degree": 2,
    "adam_betas": [0.5, 0.5], "resolution": [64], "caption_dropout": 0.5, "adapter_dropout": 0.5, "adam_eps": 1e-6,
    "compile": True, "weight_decay": 0.5, "mode_scale": 0.5, "min_snr_gamma": 5.0, "timeout": 60.0,
    "format": ["diffusers", "comfyui"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def other_value(name):
    """A value that a run may have, and that is not the default."""
    field = FIELDS[name]
    if name in OTHERS:
        return OTHERS[name]
    if metadata_of(field).choices:
        return metadata_of(field).choices[-1]
    if metadata_of(field).forms:
        return next(each for each in metadata_of(field).forms if each != field.default)
    bounds = metadata_of(field).bounds
    if bounds is not None:
        return (max(bounds.low, 0) if field.default is None else field.default) + 1
    return not field.default if isinstance(field.default, bool) else "other"


def test_every_setting_is_in_the_table():
    assert set(SETTINGS) == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_each_is_what_the_table_says(name):
    settings = dict(MUST)
    if metadata_of(FIELDS[name]).needs:  # a setting that it has no effect without
        other, *values = metadata_of(FIELDS[name]).needs
        settings[other] = values[0] if values else other_value(other)
    config = TrainConfig(**settings)
    now = TrainConfig(**{**settings, name: other_value(name)})
    before = json.loads(json.dumps(settings_of(config, 1)))
    assert resume_settings(config, before, 1) == (config, [])
    assert getattr(now, name) != getattr(config, name)
    policy = SETTINGS[name]
    if name in ("batch_size", "gradient_accumulation_steps"):  # of which the product counts
        with pytest.raises(TrainingError, match="are 2 examples per step, but the checkpoint is from a run with 1"):
            resume_settings(now, before, 1)
    elif name == "ema_decay" or (policy is Resumed.REFUSED and name not in ("targets", "num_frames")):
        with pytest.raises(TrainingError, match=f"--{name} .*: the checkpoint is from .*--{name}.*--output_dir"):
            resume_settings(now, before, 1)
    elif policy is Resumed.KEPT:
        kept, [line] = resume_settings(now, before, 1)
        assert getattr(kept, name) == getattr(config, name) and line.startswith(f"--{name} ")
    else:  # what of the model is needed for is compared with it
        given, lines = resume_settings(now, before, 1)
        assert given == now
        assert name in ("resume", "overwrite", "dry_run", "targets", "num_frames") or any(
            line.split()[0].rstrip(",") in (f"--{name}", f"--no-{name}") for line in lines
        )


def test_a_message_names_all_that_must_be_the_same():
    before = settings_of(TrainConfig(**MUST), 1)
    with pytest.raises(TrainingError) as refused:
        resume_settings(TrainConfig(**MUST, rank=8, optimizer="prodigy"), before, 1)
    assert str(refused.value) == (
        "--rank 8, --alpha 8.0, --optimizer prodigy: the checkpoint is from a run with --rank 16, --alpha 16.0, "
        "--optimizer adamw, and can only be resumed with that. Give --rank 16 --alpha 16.0 --optimizer adamw, or start "
        "anew with another --output_dir."
    )


def test_another_number_of_processes():
    before = settings_of(TrainConfig(**MUST, batch_size=2, gradient_accumulation_steps=4), 1)
    same = TrainConfig(**MUST, batch_size=1, gradient_accumulation_steps=2)
    assert resume_settings(same, before, 4)[0] == same
    with pytest.raises(TrainingError, match="are 16 examples .* with 8. Give --batch_size 1 --gradient_acc.* 2, or"):
        resume_settings(TrainConfig(**MUST, batch_size=1, gradient_accumulation_steps=4), before, 4)
    with pytest.raises(TrainingError, match="Start a number of processes that divides 8, or"):
        resume_settings(same, before, 3)
    with pytest.raises(TrainingError, match="Give --batch_size 2 --gradient_accumulation_steps 4, or"):
        resume_settings(TrainConfig(**MUST, batch_size=3), before, 1)


# ---- Runs


@pytest.fixture(scope="module")
def run(settings_of):
    """A run with checkpoints of all of its steps: its settings and its log."""
    settings = settings_of("cogview4", steps=4, checkpoint_every=1, checkpoints_kept=0, adapter_init="default")
    result = train(settings)
    forget_accelerate()
    return settings, result


@pytest.fixture
def again(run, tmp_path):
    """Settings with which a copy of it is resumed."""
    settings, _ = run
    shutil.copytree(settings["output_dir"], tmp_path / "again")
    return {**settings, "output_dir": str(tmp_path / "again"), "resume": "latest"}


def test_the_command_line_counts_for_learning_rate_betas_and_weight_decay(again, capfd):
    given = {"learning_rate": 7e-5, "adam_betas": [0.5, 0.9], "weight_decay": 0.25, "adam_eps": 1e-6}
    logged = []
    trainer = Trainer(TrainConfig(**{**again, **given, "steps": 6}), on_step=lambda *step: logged.append(step))
    trainer.run()
    assert [(step, numbers["learning rate"]) for step, numbers in logged] == [(5, 7e-5), (6, 7e-5)]
    [group] = trainer.training.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (7e-5, (0.5, 0.9), 0.25, 1e-6)
    log = capfd.readouterr().err
    for line in (
        f"resuming from {again['output_dir']}/checkpoints/step-00000004\n",
        "  --learning_rate 7e-05, until now 0.001\n",
        "  --adam_betas 0.5 0.9, until now 0.9 0.999\n",
        "  --weight_decay 0.25, until now 0.01\n",
        "  --steps 6, until now 4\n",
    ):
        assert log.count(line) == 1, log
    assert read_settings(Path(again["output_dir"], "checkpoints", "step-00000006"))["learning_rate"] == 7e-5


def test_what_is_the_same_goes_on_as_if_it_had_never_ended(run, again):
    result = train({**again, "resume": "2"})
    assert result["steps"] == run[1]["steps"][2:]


def test_the_beginning_of_an_adapter_is_the_checkpoints(again, capfd):
    trainer = Trainer(TrainConfig(**{**again, "adapter_init": "gaussian"}))
    assert trainer.config.adapter_init == "default"
    assert "--adapter_init default from the checkpoint, instead of gaussian" in capfd.readouterr().err


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_an_adapter_that_moved_the_base_goes_on_and_loads(settings_of, mixed_precision):
    from diffusers import DiffusionPipeline

    settings = settings_of(
        "cogview4", steps=4, adapter_init="olora", checkpoint_every=2, ema_decay=0.5, mixed_precision=mixed_precision
    )
    settings["cache_dir"] = f"{settings['output_dir']}/cache"
    uninterrupted = train(settings)
    forget_accelerate()
    weights = load_file(uninterrupted["path"])
    # Without the initialisation in the command line: it is the checkpoint's.
    resumed = train({**settings, "resume": "2", "adapter_init": "default"})
    assert resumed["steps"] == uninterrupted["steps"][2:]
    again = load_file(resumed["path"])
    assert all(again[name].equal(each) for name, each in weights.items())
    pipeline = DiffusionPipeline.from_pretrained(settings["model"])
    pipeline.load_lora_weights(settings["output_dir"])
    assert {each.shape[0] for name, each in weights.items() if "lora_A" in name} == {8}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"optimizer": "prodigy"}, "--optimizer prodigy: the checkpoint is from a run with --optimizer adamw"),
        ({"alpha": 1.0}, r"--alpha 1\.0: the checkpoint is from a run with --alpha 4\.0"),
        ({"targets": ["to_q"]}, "--targets to_q: the checkpoint is from a run with --targets to_k to_out.0 to_q to_v"),
        ({"steps": 3}, r"--steps 3: the checkpoint has 4 steps already.*--resume 3\."),
    ],
)
def test_refused(again, others, message):
    with pytest.raises(TrainingError, match=message):
        train({**again, **others})
    assert len(list(Path(again["output_dir"], "checkpoints").iterdir())) == 4


def test_advice_on_fewer_steps_works(again):
    assert train({**again, "steps": 3, "resume": "3"})["steps"] == []
    assert Path(again["output_dir"], "pytorch_lora_weights.safetensors").is_file()


def test_another_base_model_and_other_data(again, tmp_path):
    pipeline = make("cogview4")
    pipeline.transformer.proj_out.weight.data += 1
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="base model has other weights.*--model"):
        train({**again, "model": str(tmp_path / "other")})
    forget_accelerate()
    data = make_data("image", tmp_path / "data", number=6)
    with pytest.raises(TrainingDataError, match="data"):
        train({**again, "data": str(data)})


def test_the_advice_on_divergence_works(again):
    """No checkpoint has weights that are not finite, so that the last one and a smaller learning rate lead on."""

    def diverge(step, _):
        if step == 6:
            trainer.parameters[0].data.fill_(float("inf"))

    wild = {**again, "steps": 8, "learning_rate": 0.1}
    trainer = Trainer(TrainConfig(**wild), on_step=diverge)
    with pytest.raises(
        TrainingError, match="weights .* not finite in step 6. .*--resume latest --learning_rate 0.01, or"
    ):
        trainer.run()
    forget_accelerate()
    calm = train({**wild, "learning_rate": 0.01})
    assert [step["step"] for step in calm["steps"]] == [6, 7, 8]


@pytest.mark.parametrize("name", ["loss", "gradient norm"])
def test_what_is_not_finite_ends_the_run(settings_of, name):
    settings = settings_of("cogview4", steps=4, gradient_accumulation_steps=1, checkpoint_every=1)

    def poison(step, _):
        if step == 2:
            parameter = trainer.parameters[0]
            if name == "loss":
                trainer.model.proj_out.weight.data.fill_(float("nan"))
            else:
                parameter.register_hook(lambda gradient: gradient * float("inf"))

    trainer = Trainer(TrainConfig(**settings), on_step=poison)
    with pytest.raises(TrainingError, match=f"the {name} is (nan|inf) in step 3. .*--resume latest"):
        trainer.run()
    assert trainer.checkpoints.steps() == [1, 2]


def test_nothing_to_resume_is_said(settings_of, capfd):
    settings = settings_of("cogview4", steps=1, resume="latest")
    assert len(train(settings)["steps"]) == 1
    folder = f"{settings['output_dir']}/checkpoints"
    assert f"--resume latest: {folder} has no checkpoint yet. Starting a new run." in capfd.readouterr().err


# ---- The optimizer and its schedule


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(64, 80, generator=generator)) for _ in range(2)]


def make_steps(optimizer, trained, first, count):
    for step in range(first, first + count):
        for number, each in enumerate(trained):
            each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(100 * step + number))
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_kept_and_settings_are_new(name):
    """Beside an optimizer that was never saved, whose settings were changed where they are."""
    old = {"learning_rate": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.01, "eps": 1e-8}
    new = {"learning_rate": 0.003, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-6}
    trained = parameters()
    optimizer = make_optimizer(name, trained, **old)
    make_steps(optimizer, trained, 0, 3)
    kept = optimizer_state(optimizer)
    resumed = [torch.nn.Parameter(each.detach().clone()) for each in trained]
    other = make_optimizer(name, resumed, **new)
    load_optimizer_state(other, kept, name)
    for group in optimizer.param_groups:
        group |= {"lr": new["learning_rate"], **{key: new[key] for key in ("betas", "weight_decay", "eps")}}
    make_steps(optimizer, trained, 3, 3)
    make_steps(other, resumed, 3, 3)
    assert all(one.equal(two) for one, two in zip(trained, resumed))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_known_entries_of_groups_move(name):
    trained = parameters()
    optimizer = make_optimizer(name, trained)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    for _ in range(60):
        for each in trained:
            each.grad = torch.ones_like(each)
        optimizer.step()
    moved = {key for key, value in before.items() if optimizer.param_groups[0][key] != value}
    assert moved == set(OPTIMIZERS[name].state_entries)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_schedule_goes_on_with_its_own_peak(name, step):
    def schedule(rate):
        optimizer = make_optimizer("adamw", parameters(), learning_rate=rate)
        made = make_schedule(name, optimizer, warmup_steps=2, steps=9)
        optimizer.step()
        return optimizer, made

    _, expected = schedule(0.5)
    for _ in range(step):
        expected.step()
    optimizer, resumed = schedule(0.5)
    resume_schedule(resumed, step)
    for _ in range(2):
        assert resumed.get_last_lr() == expected.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        resumed.step()
        expected.step()
