"""The loop: what is done at the start, at every step, at some of them, and at the end."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_files import remove_unfinished
from ..context_parallel.comm.process_groups import set_timeout
from .card import push, write_card
from .checkpoint import Checkpoints
from .checks import check_optimizing, check_settings, check_trackers, check_with_model
from .config import TrainConfig
from .data.ranks import in_step
from .ema import AdapterAverage
from .errors import TrainingError, TrainingInterrupted
from .evaluation import evaluate
from .families import family_of
from .flag_names import option
from .interruption import SIGNALS, interruptible
from .lora import (
    MOVES_BASE,
    adapter_config,
    adapter_weights,
    add_adapter,
    move_base,
    save_adapter,
    trained_parameters,
)
from .models import drop_text_encoders, load_pipeline
from .noise import Noise
from .optim import make_optimizer, make_schedule
from .output import check_output, output_of_this_run
from .parallel import TrainingParallel, check_trainable
from .prepare import make_loader, prepare_data
from .progress import Progress
from .randomness import derived_seed
from .resuming import check_facts, check_steps, facts_of, read_settings, resume_settings, settings_of
from .state import Training, read_initial, restore, snapshot, write
from .validation import Sample, Validation, log_samples


class Trainer:
    """One run. All processes of the job make one, with the same settings, and call `run`.

    Args:
        config: the settings.
        on_step: is told of every step, on every process: its number from 1, and "loss", "gradient norm" and
            "learning rate", which are the same on all.
    """

    def __init__(self, config: TrainConfig, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
        self.config = config
        self.on_step = on_step
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        self.parallel = TrainingParallel.of(
            self.accelerator,
            config.cp_degree,
            ulysses_degree=config.ulysses_degree,
            ring_degree=config.ring_degree,
            rotate_method=config.rotate_method,
        )
        self.ranks = self.parallel.ranks
        self.main = self.ranks.rank == 0
        self.checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoints_kept or None)
        self.step = 0
        self._asked: Callable[[], int] = lambda: 0
        self.checked = False
        """whether processes have compared what they train on."""
        self.checkpoint: Path | None = None
        """to resume from; None begins anew"""
        self.before: dict[str, Any] | None = None
        """the settings of the run that is resumed"""
        self._check()

    def _check(self) -> None:
        """All that can be refused before a model is loaded."""
        config = self.config
        check_optimizing(config, self.device)
        if config.attn_provider is not None:
            check_trainable(config.attn_provider, self.device.type, parts=self.parallel.cp_degree > 1)
        if config.adapter_dropout and self.parallel.cp_degree > 1:
            raise TrainingError(
                f"adapter_dropout={config.adapter_dropout} with cp_degree={self.parallel.cp_degree}: processes that "
                "share a sequence would drop different parts of what all of them hold. Set one of them to 0 or 1."
            )
        in_step(self.ranks, [None] if self.main else [], lambda _: check_settings(config), "checking the settings")
        self._check_resuming()
        if config.resume is None and self.checkpoints.steps() and not config.overwrite:
            raise TrainingError(
                f"output_dir={config.output_dir!r} has checkpoints of an earlier run. Go on with it, --resume latest, "
                "take another folder, or start anew in it, --overwrite."
            )
        own = self.checkpoint is not None and self.checkpoints.owns(self.checkpoint)
        check_output(config.output, own, config.overwrite)

    def _check_resuming(self) -> None:
        """Settles what to go on from, and with which settings, and says what differs."""
        config = self.config
        self.checkpoint = checkpoint = self.checkpoints.find(config.resume)
        if checkpoint is None:
            if config.resume is not None:
                self._say(
                    f"--resume {config.resume}: {self.checkpoints.folder} has no checkpoint yet. A new run begins."
                )
            return
        step = self.checkpoints.step_of(checkpoint)
        own = self.checkpoints.owns(checkpoint)
        check_steps(config.steps, step, self.checkpoints.steps() if own else [])
        self.before = read_settings(checkpoint)
        self.config, differences = resume_settings(config, self.before, self.parallel.dp_degree)
        self._say("\n  ".join([f"going on from {checkpoint}", *differences]))

    def _say(self, message: str) -> None:
        """On one process, before there is a bar."""
        if self.main:
            print(message, file=sys.stderr, flush=True)

    # ---- The run

    def run(self) -> Path:
        """Trains. Returns the adapter's file.

        Raises:
            TrainingError, TrainingDataError, AttentionProviderError: what cannot be served as asked.
            TrainingInterrupted: SIGINT or SIGTERM came on one of the processes. A checkpoint is saved.
        """
        # Blocks are compiled one by one. DDP's way to overlap the backward of one large graph with its exchanges would
        # only cut each of them in two.
        whole_blocks = torch._dynamo.config.patch(optimize_ddp=False)
        with whole_blocks if self.config.compile else contextlib.nullcontext():
            with output_of_this_run(self.config.output, self.ranks):
                return self._run()

    def _run(self) -> Path:
        config = self.config
        self._load()
        self._resume()
        metrics = config.output / "metrics.jsonl" if config.metrics else None
        progress = Progress(self.accelerator, config.steps, self.step, config.log_every, metrics)
        stop = 0
        with interruptible() as self._asked, contextlib.closing(progress):
            with contextlib.closing(iter(self.training.loader)) as micros:  # type: ignore[type-var]
                while self.step < config.steps and not stop:
                    numbers, tokens, stop = self._train_step(micros)
                    progress.step(self.step, numbers, tokens)
                    if self.on_step is not None:
                        self.on_step(self.step, numbers)
                    with progress.paused():
                        stop = self._now_and_then(progress, stop)
        if stop:
            raise TrainingInterrupted(stop, self.checkpoints.path(self.step))
        return self._finish()

    def _load(self) -> None:
        config, accelerator = self.config, self.accelerator
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        pipeline = load_pipeline(
            config.model,
            revision=config.revision,
            dtype=dtype,
            ranks=self.ranks,
            local_main=accelerator.is_local_main_process,
        )
        self.family = family_of(
            pipeline, shift=config.shift, guidance=config.guidance, max_sequence_length=config.max_sequence_length
        )
        self.sampling = config.timestep_sampling or self.family.objective.sampling
        check_with_model(config, self.family, self._adapter_config())
        facts = facts_of(config, self.family)
        if self.before is not None:
            check_facts(facts, self.before)
        self._start_trackers()
        self.prepared = prepare_data(config, self.family, self.parallel, self.device)
        self.validation = Validation(config, self.family, self.prepared.bucket, self.device, self.prepared.fps)
        drop_text_encoders(pipeline)
        draws = Noise(config, self.sampling, pin=self.device.type == "cuda")
        loader = make_loader(config, self.prepared, self.parallel, draws)

        transformer = pipeline.transformer.to(self.device)
        # Adapters first: they put modules in the place of others, to which the plan's hooks then go.
        initial = read_initial(self.checkpoint) if self.checkpoint is not None else None
        adapter = self._adapter_config()
        if initial is not None:
            adapter.init_lora_weights = True
        parameters = add_adapter(transformer, adapter, config.seed)
        if initial is not None:
            move_base(transformer, initial)
        elif config.adapter_init in MOVES_BASE:
            initial = adapter_weights(transformer)
        self.report = self.parallel.enable(transformer, provider=config.attn_provider, inputs="trust")
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if config.compile:
            from ..runtime.compile import apply_compile

            apply_compile(transformer)
        transformer.train()
        fused = self.device.type == "cuda" and accelerator.distributed_type != "FSDP"
        optimizer: Any = make_optimizer(
            config.optimizer,
            parameters,
            learning_rate=config.learning_rate,
            betas=(config.adam_betas[0], config.adam_betas[1]),
            weight_decay=config.weight_decay,
            eps=config.adam_eps,
            fused=fused,
        )
        self.model, self.optimizer = accelerator.prepare(transformer, optimizer)
        self.parameters = list(trained_parameters(self.model).values())
        schedule = make_schedule(
            config.lr_schedule, self.optimizer.optimizer, warmup_steps=config.warmup_steps, steps=config.steps
        )
        average = None if config.ema_decay is None else AdapterAverage(self.model, config.ema_decay)
        settings = settings_of(config, self.parallel.dp_degree)
        self.training = Training(
            self.model, self.optimizer.optimizer, schedule, average, loader, settings, facts, initial
        )

    def _adapter_config(self) -> Any:
        config = self.config
        targets = config.targets or self.family.lora_targets
        return adapter_config(
            config.adapter, config.rank, config.alpha, targets, config.adapter_init, config.adapter_dropout
        )

    def _resume(self) -> None:
        checkpoint = self.checkpoint
        if checkpoint is not None:
            self.step = restore(self.training, checkpoint)
        self.ranks.barrier()  # all have read before one changes anything
        if self.main:
            if checkpoint is not None and self.checkpoints.owns(checkpoint):
                self.checkpoints.discard_after(self.step)
            elif self.config.overwrite:
                self.checkpoints.discard_after(-1)
            self.checkpoints.tidy()
            remove_unfinished(self.config.output)

    def _start_trackers(self) -> None:
        if self.config.trackers:
            plain = {
                name: each if isinstance(each, (int, float, bool, str)) else str(each)
                for name, each in self.config.as_dict().items()
            }
            try:
                self.accelerator.init_trackers(self.config.tracker_project, plain)
            except Exception as error:  # of their own kinds
                trackers = option("trackers", self.config.trackers)
                raise TrainingError(f"{trackers} cannot be started: {error}") from error

    # ---- A step

    def _train_step(self, micros: Iterator[dict[str, Any]]) -> tuple[dict[str, float], int, int]:
        """One step of the optimizer. Returns its numbers, how many tokens it had, and the signal by which to stop, 0
        for none."""
        accelerator, config = self.accelerator, self.config
        total = torch.zeros((), device=self.device)
        tokens = 0
        for _ in range(config.gradient_accumulation_steps):
            batch = next(micros)
            with accelerator.accumulate(self.model):
                parts = self.family.parts(batch)
                for part in parts:
                    last = part is parts[-1]
                    with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                        loss = self._loss(part) / len(parts)
                        accelerator.backward(loss)
                    total += loss.detach() / config.gradient_accumulation_steps
                tokens += self.family.tokens(batch["latents_mean"].shape) * config.batch_size * self.parallel.dp_degree
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm or float("inf"))
                self.optimizer.step()
                self.optimizer.zero_grad()
        rate = self.training.schedule.get_last_lr()[0]
        self.training.schedule.step()
        if self.training.average is not None:
            self.training.average.step()
        self.step += 1
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # One exchange for all that processes have to agree on.
        loss_sum, stop = self._agreed(float(total))
        numbers = {"loss": loss_sum / self.ranks.size, "gradient norm": float(norm), "learning rate": rate}
        for name in ("loss", "gradient norm"):
            if not math.isfinite(numbers[name]):
                raise self._diverged(f"the {name} is {numbers[name]}")
        return numbers, tokens, stop

    def _diverged(self, what: str) -> TrainingError:
        """Numbers that are not finite, in this step. No checkpoint has them, so that one can go on from the last."""
        smaller = option("learning_rate", float(f"{self.config.rate / 10:.1e}"))
        newest = self.checkpoints.newest()
        if newest is None:
            advice = f"There is no checkpoint: begin anew with a smaller learning rate, such as {smaller}"
        else:
            advice = f"Go on from the last checkpoint with a smaller learning rate, such as --resume latest {smaller}"
        return TrainingError(f"{what} in step {self.step}. {advice}, or look at the data of this step.")

    def _agreed(self, number: float = 0.0) -> tuple[float, int]:
        """The sum of a number over all processes, and the signal that came on any of them, 0 for none."""
        asked = self._asked()
        total, *came = self.ranks.sum([number, *(float(asked == each) for each in SIGNALS)])
        return total, next((each for each, count in zip(SIGNALS, came) if count), 0)

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a micro-batch."""
        config, family, objective = self.config, self.family, self.family.objective
        on_device, drawn = (
            {name: each.to(self.device, non_blocking=True) for name, each in these.items() if isinstance(each, Tensor)}
            for these in (batch, batch["drawn"])
        )
        if not self.checked:
            self.checked = True
            self.parallel.check({**on_device, **drawn})
        if config.adapter_dropout:
            torch.manual_seed(derived_seed(config.seed, "dropout", batch["step"], batch["positions"][0]))
        clean, noise = family.clean(on_device, drawn["posterior"]), drawn["noise"]
        level = objective.level(drawn["u"], family.tokens(clean.shape))
        noisy = objective.noisy(clean, noise, level)
        text = {name: each for name, each in on_device.items() if not name.startswith("latents_")}
        prediction = family.predict(self.model, noisy, level.timestep, text)
        return objective.loss(prediction, clean, noise, level).mean()

    # ---- At some steps, and at the end

    def _now_and_then(self, progress: Progress, stop: int) -> int:
        """Returns by which signal to stop, 0 for none: drawing takes long enough for one to come."""
        config, step = self.config, self.step
        last = bool(stop) or step == config.steps
        save = last or _due(step, config.checkpoint_every)
        if save:
            self._save()
        if _due(step, config.evaluation_every):
            found = evaluate(self.family, self.prepared, self.parallel, config.seed, self.device)
            progress.log(step, found)
            progress.say(f"step {step}: evaluation loss {found['evaluation/loss']:.5f}")
        if not last and _due(step, config.validation_every):
            samples = self._draw(f"step-{step:08d}", stop=lambda: self._agreed()[1] > 0)
            _, stop = self._agreed()
            if stop and not save:
                self._save()
            if samples:
                progress.say(f"step {step}: drew {', '.join(str(each.path) for each in samples)}")

        return stop

    def _save(self) -> None:
        taken = snapshot(self.training, self.step)
        if not all(bool(each.isfinite().all()) for each in taken.adapter.values()):
            raise self._diverged("weights of the adapter are not finite")

        def save(_: None) -> None:
            self.checkpoints.save(self.step, lambda folder: write(taken, folder), taken.size)

        in_step(self.ranks, [None] if self.main else [], save, "saving a checkpoint")

    def _draw(self, name: str, stop: Callable[[], bool] = lambda: False) -> list[Sample]:
        if not self.validation.prompts:
            return []
        average = self.training.average
        with contextlib.nullcontext() if average is None else average.in_place():
            samples = self.validation.draw(
                self.config.output / "samples" / name,
                self.parallel,
                self.device,
                together=self.accelerator.distributed_type == "FSDP",
                stop=stop,
            )
        if self.main:
            log_samples(self.accelerator, samples, self.step)
        return samples

    def _finish(self) -> Path:
        """Writes adapter and card, and uploads them if asked to."""
        config, average = self.config, self.training.average
        own = adapter_weights(self.model)
        averaged = own if average is None else average.weights()
        samples = self._draw("last")
        found: list[Path] = []

        def save(_: None) -> None:
            kind, initial = config.adapter, self.training.initial
            found.append(save_adapter(self.family.pipeline, averaged, config.output, kind, initial))
            if average is not None:
                save_adapter(self.family.pipeline, own, config.output / "not_averaged", kind, initial)
            facts = {"processes": f"{self.parallel.dp_degree} x {self.parallel.cp_degree} (data x context parallel)"}
            write_card(config, self.family, samples, facts)
            if config.push_to_hub:
                push(config)

        in_step(self.ranks, [None] if self.main else [], save, "saving the adapter")
        for tracker in self.accelerator.trackers:
            tracker.finish()  # and not accelerator.end_training(), which leaves the process group, the caller's own
        return found[0] if found else config.output


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


DEFAULT_TIMEOUT = 3600.0
"""seconds: encoding a video or drawing one may keep other processes waiting."""


def make_accelerator(config: TrainConfig) -> Any:
    """This process's `accelerate.Accelerator`, connected with the others.

    Raises:
        TrainingError: several processes were started and each found itself alone; or fp16.
    """
    check_trackers(config.trackers)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=config.cpu or not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.trackers,
        project_dir=config.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters),
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.timeout or DEFAULT_TIMEOUT)),
        ],
    )
    if config.timeout is not None and torch.distributed.is_initialized():  # by the caller, with a timeout of its own
        set_timeout(torch.distributed.group.WORLD, datetime.timedelta(seconds=config.timeout))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise TrainingError(
            f"{launched} processes were started, and each found itself alone. On CPUs start them with torchrun, or "
            "with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu`."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise TrainingError(f"mixed_precision={accelerator.mixed_precision!r}: accepted are 'no' and 'bf16'.")
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise TrainingError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}, and accelerate launch says "
            f"{accelerator.gradient_accumulation_steps}. Give the same number."
        )
    return accelerator
