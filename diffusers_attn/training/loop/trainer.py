"""The training loop: set-up, optimizer steps, periodic work such as checkpoints, and the final adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...atomic_files import remove_unfinished
from ..batches.noise import Noise
from ..batches.prepare import make_loader, prepare_data
from ..checkpoints.checkpoint import Checkpoints
from ..checkpoints.output import check_output, output_of_this_run
from ..checkpoints.resolved import write_resolved
from ..checkpoints.resuming import check_facts, check_steps, facts_of, read_settings, resume_settings, settings_of
from ..checkpoints.state import Training, read_initial, restore, snapshot, write
from ..data.ranks import in_step
from ..errors import TrainingError, TrainingInterrupted
from ..families import family_of
from ..model.base_precision import base_dtype, check_base_precision
from ..model.ema import AdapterAverage
from ..model.experts import Experts, adapter_folder, as_one_module, shard_each, weights_of
from ..model.lora import (
    MOVES_BASE,
    adapter_config,
    adapter_weights,
    add_adapter,
    move_base,
    save_adapter,
    trained_parameters,
)
from ..model.offload import offload_blocks
from ..model.optim import make_optimizer, make_schedule
from ..model.pipeline import drop_text_encoders, load_pipeline
from ..parallel import TrainingParallel, check_trainable
from ..randomness import derived_seed
from ..settings.config import TrainConfig
from ..settings.flag_names import option
from .accelerator import make_accelerator
from .card import push, write_card
from .checks import check_optimizing, check_settings, check_with_model
from .dry_run import reset_peak_memory, summary
from .evaluation import evaluate
from .interruption import SIGNALS, interruptible
from .progress import Progress, peak_memory
from .validation import Sample, Validation, log_samples


class Trainer:
    """One training run. All processes of the job create a `Trainer` with the same settings and call `run`.

    Args:
        config: the settings.
        on_step: called after every optimizer step on every process, with the number of the step, from 1, and a dict
            of "loss", "gradient norm" and "learning rate". The values are the same on all processes.

    Raises:
        TrainingError: settings that cannot be used, or a checkpoint that cannot be resumed. The model is not loaded
            yet.
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
        self._received_signal: Callable[[], int] = lambda: 0
        self.offloaded: tempfile.TemporaryDirectory[str] | None = None
        """Folder with the weights of blocks, with `offload="disk"`."""
        self.checked = False
        """Whether the processes have compared their first batch."""
        self.checkpoint: Path | None = None
        """Checkpoint to resume from; None for a new run."""
        self.resumed_settings: dict[str, Any] | None = None
        """Settings of the checkpoint's run; None for a new run."""
        self._check()

    def _check(self) -> None:
        """Makes all checks that need no model."""
        config = self.config
        check_optimizing(config, self.device)
        check_base_precision(config, self.device, self.accelerator.distributed_type == "FSDP")
        if config.attn_provider is not None:
            check_trainable(config.attn_provider, self.device.type, parts=self.parallel.cp_degree > 1)
        if config.adapter_dropout and self.parallel.cp_degree > 1:
            raise TrainingError(
                f"adapter_dropout={config.adapter_dropout} with cp_degree={self.parallel.cp_degree}: processes that "
                "share a sequence would apply different dropout masks to tensors that all of them have. Set "
                "adapter_dropout=0 or cp_degree=1."
            )
        in_step(self.ranks, [None] if self.main else [], lambda _: check_settings(config), "checking the settings")
        self._check_resuming()
        if config.resume is None and self.checkpoints.steps() and not config.overwrite:
            raise TrainingError(
                f"output_dir={config.output_dir!r} has checkpoints of an earlier run. Resume it with --resume latest, "
                "give another folder, or replace it with --overwrite."
            )
        own = self.checkpoint is not None and self.checkpoints.owns(self.checkpoint)
        check_output(config.output, own, config.overwrite)

    def _check_resuming(self) -> None:
        """Finds the checkpoint to resume from, merges its settings, and prints those that differ."""
        config = self.config
        self.checkpoint = checkpoint = self.checkpoints.find(config.resume)
        if checkpoint is None:
            if config.resume is not None:
                self._print(
                    f"--resume {config.resume}: {self.checkpoints.folder} has no checkpoint yet. Starting a new run."
                )
            return
        step = self.checkpoints.step_of(checkpoint)
        own = self.checkpoints.owns(checkpoint)
        check_steps(config.steps, step, self.checkpoints.steps() if own else [])
        self.resumed_settings = read_settings(checkpoint)
        self.config, differences = resume_settings(config, self.resumed_settings, self.parallel.dp_degree)
        self._print("\n  ".join([f"resuming from {checkpoint}", *differences]))

    def _print(self, message: str) -> None:
        """Prints on rank 0, before the progress bar exists."""
        if self.main:
            print(message, file=sys.stderr, flush=True)

    # ---- The run

    def run(self) -> Path:
        """Trains. All processes must call this. With `dry_run`, it prints a report instead and writes nothing.

        Returns:
            The adapter's file, of two adapters that for high noise levels; on processes other than rank 0, and after a
            dry run, the output folder.

        Raises:
            TrainingError: a setting cannot be used with this model, another run uses the output folder, or the loss,
                the gradient norm or the adapter's weights are not finite.
            TrainingDataError: the data cannot be used.
            AttentionProviderError: attention cannot be computed as requested.
            TrainingInterrupted: SIGINT or SIGTERM arrived on one of the processes. A checkpoint is saved.
        """
        # Blocks are compiled one by one. DDPOptimizer, made for one graph of the entire model, would split each block.
        unsplit_blocks = torch._dynamo.config.patch(optimize_ddp=False)
        try:
            with unsplit_blocks if self.config.compile else contextlib.nullcontext():
                if self.config.dry_run:
                    return self._dry_run()
                with output_of_this_run(self.config.output, self.ranks):
                    return self._run()
        finally:
            if self.offloaded is not None:
                self.offloaded.cleanup()

    def _run(self) -> Path:
        config = self.config
        self._load()
        self._resume()
        metrics = config.output / "metrics.jsonl" if config.metrics else None
        progress = Progress(self.accelerator, config.steps, self.step, config.log_every, metrics)
        stop = 0
        with interruptible() as self._received_signal, contextlib.closing(progress):
            with contextlib.closing(iter(self.training.loader)) as micros:  # type: ignore[type-var]
                while self.step < config.steps and not stop:
                    numbers, tokens, stop = self._train_step(micros)
                    progress.step(self.step, numbers, tokens)
                    if self.on_step is not None:
                        self.on_step(self.step, numbers)
                    with progress.paused():
                        stop = self._periodic_work(progress, stop)
        if stop:
            raise TrainingInterrupted(stop, self.checkpoints.path(self.step))
        return self._finish()

    def _dry_run(self) -> Path:
        """Trains one step on one example, and prints the report."""
        asked = self.config
        with tempfile.TemporaryDirectory() as cache:
            self.config = dataclasses.replace(asked, cache_dir=cache, incomplete_batches="fill")
            reset_peak_memory(self.device)
            self._load()
            with contextlib.closing(iter(self.training.loader)) as micros:  # type: ignore[type-var]
                numbers, _, _ = self._train_step(micros)
        memory = {"encoding": self.encoding_memory, "training": peak_memory(self.device)}
        degrees = self.parallel.dp_degree, self.parallel.cp_degree
        assert self.prepared.assigned is not None
        text = summary(
            asked, self.family, self.prepared.assigned, degrees, memory, self.training.optimizer, numbers["loss"]
        )
        if self.main:
            print(text, flush=True)
        return asked.output

    def _load(self) -> None:
        config, accelerator = self.config, self.accelerator
        pipeline = load_pipeline(
            config.model,
            revision=config.revision,
            dtype=base_dtype(config, accelerator.mixed_precision),
            transformer=config.transformer,
            base_precision=config.base_precision,
            ranks=self.ranks,
            local_main=accelerator.is_local_main_process,
            expert=config.expert,
        )
        self.family = family_of(
            pipeline,
            shift=config.shift,
            guidance=config.guidance,
            max_sequence_length=config.max_sequence_length,
            expert=config.expert,
        )
        self.sampling = config.timestep_sampling or self.family.objective.sampling
        check_with_model(config, self.family, self._adapter_config())
        facts = facts_of(config, self.family)
        self._check_equal_bases(facts.base)
        if self.resumed_settings is not None:
            check_facts(facts, self.resumed_settings)
        if not config.dry_run:
            self._start_trackers()
            self._write_settings()
        self.prepared = prepare_data(config, self.family, self.parallel, self.device)
        self.validation = Validation(config, self.family, self.prepared.bucket, self.device, self.prepared.fps)
        drop_text_encoders(pipeline)
        self.encoding_memory = peak_memory(self.device)
        reset_peak_memory(self.device)
        noise = Noise(config, self.sampling, self.family.levels, pin=self.device.type == "cuda")
        loader = make_loader(config, self.prepared, self.parallel, noise)

        trained = self.family.trained
        whole = as_one_module(trained)
        if config.offload == "none":
            whole.to(self.device)
        # The adapter is added first: PEFT replaces modules, and the plan's hooks belong on the new ones.
        initial = read_initial(self.checkpoint) if self.checkpoint is not None else None
        parameters = []
        for transformer in trained.values():
            adapter = self._adapter_config()
            if initial is not None:
                adapter.init_lora_weights = True
            parameters += add_adapter(transformer, adapter, config.seed)
        if initial is not None:
            move_base(whole, initial)
        elif config.adapter_init in MOVES_BASE:
            initial = adapter_weights(whole)
        for name, transformer in trained.items():
            if config.offload != "none":
                offload_blocks(transformer, self.device, self._offload_folder(name))
            self.report = self.parallel.enable(transformer, provider=config.attn_provider, inputs="trust")
            if config.gradient_checkpointing:
                transformer.enable_gradient_checkpointing()
            if config.compile:
                from ...runtime.compile import apply_compile

                apply_compile(transformer)
        whole.train()
        # DDP would send all weights from rank 0 to the others, which fails for quantised ones. The adapter has the same
        # seed everywhere, and the base models were compared.
        whole._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            *(name for name, each in whole.named_parameters() if not each.requires_grad),
            *(name for name, _ in whole.named_buffers()),
        ]
        if accelerator.distributed_type == "FSDP" and isinstance(whole, Experts):
            shard_each(whole, accelerator)
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
        placement = [config.offload == "none", True]
        self.model, self.optimizer = accelerator.prepare(whole, optimizer, device_placement=placement)
        self.parameters = list(trained_parameters(self.model).values())
        schedule = make_schedule(
            config.lr_schedule, self.optimizer.optimizer, warmup_steps=config.warmup_steps, steps=config.steps
        )
        average = None if config.ema_decay is None else AdapterAverage(self.model, config.ema_decay)
        settings = settings_of(config, self.parallel.dp_degree)
        self.training = Training(
            self.model, self.optimizer.optimizer, schedule, average, loader, settings, facts, initial
        )

    def _offload_folder(self, component: str) -> Path | None:
        """A new folder for this process's files of a component's blocks, which is deleted at the end of the run."""
        if self.config.offload != "disk":
            return None
        if self.offloaded is None:
            self.config.cache.mkdir(parents=True, exist_ok=True)
            self.offloaded = tempfile.TemporaryDirectory(prefix="offload-", dir=self.config.cache)
        folder = Path(self.offloaded.name) / component
        folder.mkdir()
        return folder

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
        self.ranks.barrier()  # rank 0 deletes files only after all ranks have read theirs
        if self.main:
            if checkpoint is not None and self.checkpoints.owns(checkpoint):
                self.checkpoints.discard_after(self.step)
            elif self.config.overwrite:
                self.checkpoints.discard_after(-1)
            self.checkpoints.tidy()
            remove_unfinished(self.config.output)

    def _check_equal_bases(self, base: str) -> None:
        """Raises TrainingError if processes loaded other weights. (DDP does not compare frozen weights.)"""
        bases = self.ranks.everyone(base)
        if len(set(bases)) > 1:
            other = next(rank for rank, each in enumerate(bases) if each != bases[0])
            raise TrainingError(
                f"{option('model', self.config.model)}: ranks 0 and {other} loaded other weights. Give all machines "
                "the same files."
            )

    def _write_settings(self) -> None:
        """Writes the settings with their defaults into the output folder, as a run file."""

        def write_settings(_: None) -> None:
            write_resolved(self.config, self.family, self.accelerator.mixed_precision, self.parallel, self.sampling)

        in_step(self.ranks, [None] if self.main else [], write_settings, "writing the settings")

    def _start_trackers(self) -> None:
        if self.config.trackers:
            plain = {
                name: each if isinstance(each, (int, float, bool, str)) else str(each)
                for name, each in self.config.as_dict().items()
            }
            try:
                self.accelerator.init_trackers(self.config.tracker_project, plain)
            except Exception as error:  # each tracker has its own error types
                trackers = option("trackers", self.config.trackers)
                raise TrainingError(f"{trackers} cannot be started: {error}") from error

    # ---- A step

    def _train_step(self, micros: Iterator[dict[str, Any]]) -> tuple[dict[str, float], int, int]:
        """Trains one optimizer step.

        Returns:
            "loss", "gradient norm" and "learning rate"; the number of tokens on all processes; and the signal that
            ends the run, 0 for none.
        """
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
        loss_sum, stop = self._sum_and_signal(float(total))
        numbers = {"loss": loss_sum / self.ranks.size, "gradient norm": float(norm), "learning rate": rate}
        for name in ("loss", "gradient norm"):
            if not math.isfinite(numbers[name]):
                raise self._diverged(f"the {name} is {numbers[name]}")
        return numbers, tokens, stop

    def _diverged(self, what: str) -> TrainingError:
        """An error for values of this step that are not finite. The last checkpoint was saved before they occurred."""
        smaller = option("learning_rate", float(f"{self.config.rate / 10:.1e}"))
        newest = self.checkpoints.newest()
        if newest is None:
            advice = f"There is no checkpoint: start anew with a smaller learning rate, such as {smaller}"
        else:
            advice = f"Resume from the last checkpoint with a smaller learning rate: --resume latest {smaller}"
        return TrainingError(f"{what} in step {self.step}. {advice}, or look at the data of this step.")

    def _sum_and_signal(self, number: float = 0.0) -> tuple[float, int]:
        """The sum of `number` over all processes, and the signal received on any of them, 0 for none, in one
        collective."""
        signal = self._received_signal()
        total, *counts = self.ranks.sum([number, *(float(signal == each) for each in SIGNALS)])
        return total, next((each for each, count in zip(SIGNALS, counts) if count), 0)

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a micro-batch, a scalar on the device."""
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
        model = functools.partial(self.model, batch["trained"]) if len(family.trained) > 1 else self.model
        prediction = family.predict(model, noisy, level.timestep, text)
        return family.loss(prediction, clean, noise, level).mean()

    # ---- At some steps, and at the end

    def _periodic_work(self, progress: Progress, stop: int) -> int:
        """Saves a checkpoint, evaluates and generates samples where this step is due.

        Returns:
            The signal that ends the run, 0 for none; it may arrive while samples are generated.
        """
        config, step = self.config, self.step
        last = bool(stop) or step == config.steps
        save = last or _due(step, config.checkpoint_every)
        if save:
            self._save()
        if _due(step, config.evaluation_every):
            found = evaluate(self.family, self.prepared, self.parallel, config.seed, self.device)
            progress.log(step, found)
            progress.print(f"step {step}: evaluation loss {found['evaluation/loss']:.5f}")
        if not last and _due(step, config.validation_every):
            samples = self._generate(f"step-{step:08d}", stop=lambda: self._sum_and_signal()[1] > 0)
            _, stop = self._sum_and_signal()
            if stop and not save:
                self._save()
            if samples:
                progress.print(f"step {step}: generated {', '.join(str(each.path) for each in samples)}")
        return stop

    def _save(self) -> None:
        taken = snapshot(self.training, self.step)
        if not all(bool(each.isfinite().all()) for each in taken.adapter.values()):
            raise self._diverged("weights of the adapter are not finite")

        def save(_: None) -> None:
            self.checkpoints.save(self.step, lambda folder: write(taken, folder), taken.size)

        in_step(self.ranks, [None] if self.main else [], save, "saving a checkpoint")

    def _generate(self, name: str, stop: Callable[[], bool] = lambda: False) -> list[Sample]:
        """Generates the validation samples, with the averaged adapter if there is one."""
        if not self.validation.prompts:
            return []
        average = self.training.average
        with contextlib.nullcontext() if average is None else average.in_place():
            samples = self.validation.generate(
                self.config.output / "samples" / name,
                self.parallel,
                self.device,
                on_all_ranks=self.accelerator.distributed_type == "FSDP",
                stop=stop,
            )
        if self.main:
            log_samples(self.accelerator, samples, self.step)
        return samples

    def _finish(self) -> Path:
        """Writes the adapter and the model card, and uploads them with `push_to_hub`. Returns the adapter's file."""
        config, average = self.config, self.training.average
        own = adapter_weights(self.model)
        averaged = own if average is None else average.weights()
        samples = self._generate("last")
        found: list[Path] = []

        def save(_: None) -> None:
            found.extend(self._save_adapters(averaged, config.output))
            if average is not None:
                self._save_adapters(own, config.output / "not_averaged")
            facts = {"processes": f"{self.parallel.dp_degree} x {self.parallel.cp_degree} (data x context parallel)"}
            write_card(config, self.family, samples, facts)
            if config.push_to_hub:
                push(config)

        in_step(self.ranks, [None] if self.main else [], save, "saving the adapter")
        # accelerator.end_training() would also destroy the process group, which may be the caller's.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return found[0] if found else config.output

    def _save_adapters(self, weights: dict[str, Tensor], folder: Path) -> list[Path]:
        """Saves the adapter of each trained transformer. Returns the files."""
        trained, initial, files = self.family.trained, self.training.initial, []
        several = len(trained) > 1
        for name, transformer in trained.items():
            own = weights_of(name, weights, several)
            own_initial = None if initial is None else weights_of(name, initial, several)
            where, kind = folder / adapter_folder(name, several), self.config.adapter
            files.append(save_adapter(self.family.pipeline, own, where, kind, transformer, own_initial))
        return files


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
