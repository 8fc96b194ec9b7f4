"""The training loop: steps, periodic work such as checkpoints, and what comes before and after them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...atomic_files import remove_unfinished
from ..batches.noise import Noise
from ..batches.prepare import make_loader, prepare_data
from ..checkpoints.checkpoint import Checkpoints
from ..checkpoints.output import output_of_this_run
from ..checkpoints.resolved import write_resolved
from ..checkpoints.resuming import check_facts, facts_of
from ..checkpoints.state import restore, snapshot, write
from ..data.ranks import in_step
from ..errors import TrainingError, TrainingInterrupted
from ..model.pipeline import drop_text_encoders
from ..parallel import TrainingParallel
from ..settings.choices import AUTO, WHOLE
from ..settings.config import TrainConfig
from ..settings.flag_names import option
from ..transfers import Moment, ToHost
from .accelerator import make_accelerator, start_trackers
from .checks import check_split, check_with_model
from .compiling import choose
from .dry_run import reset_peak_memory, summary
from .evaluation import evaluate
from .finish import finish, save_adapters
from .interruption import Interruption
from .progress import Progress, peak_memory
from .set_up import adapter_of, add_adapters, check_equal_bases, load_family, make_training
from .start import start
from .train_step import TrainStep
from .validation import Sample, Validation, log_samples


class _Launched(NamedTuple):
    """A step whose numbers are not read yet."""

    step: int
    began: Moment
    numbers: ToHost
    """The sum of the processes' losses, the number of processes with each of `SIGNALS`, and the gradient norm."""
    learning_rate: float
    tokens: int


class Trainer:
    """One training run. All processes of the job create a `Trainer` with the same settings and call `run`.

    The numbers of a step are read while the device computes the next one, so that it is never idle.

    Args:
        config: the settings.
        on_step: called for every optimizer step on every process, as soon as its numbers are read, with the number of
            the step, from 1, and a dict of "loss", "gradient norm" and "learning rate". The values are the same on all
            processes. The weights are those of this step where a checkpoint, an evaluation or samples follow, else
            those of the next.

    Raises:
        TrainingError: settings that cannot be used, or a checkpoint that cannot be resumed. The model is not loaded
            yet.
    """

    def __init__(self, config: TrainConfig, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
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
        """The last step that was launched."""
        self.interruption = Interruption(self.ranks)
        self.offloaded: tempfile.TemporaryDirectory[str] | None = None
        """Folder with the weights of blocks, with `offload="disk"`."""
        begun = start(config, self.accelerator, self.parallel, self.checkpoints)
        self.config, self.checkpoint, self.resumed_settings = begun

    # ---- The run

    def run(self) -> Path:
        """Trains. All processes must call this. With `dry_run`, it prints a report instead and writes nothing.

        Returns:
            The adapter's file, of two adapters that for high noise levels, or the folder of a trained transformer; on
            processes other than rank 0, and after a dry run, the output folder.

        Raises:
            TrainingError: a setting cannot be used with this model, another run uses the output folder, or the loss,
                the gradient norm or the adapter's weights are not finite.
            TrainingDataError: the data cannot be used.
            AttentionProviderError: attention cannot be computed as requested.
            TrainingInterrupted: SIGINT or SIGTERM arrived on one of the processes. A checkpoint is saved.
        """
        # Blocks are compiled one by one. DDPOptimizer, made for one graph of the entire model, would split each block.
        # A block has more graphs than the usual limit of 8: with gradients, for evaluations and for samples, each for
        # the first size and for all others, and again where its input has no gradient.
        try:
            with torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=64):
                if self.config.dry_run:
                    return self._dry_run()
                with output_of_this_run(self.config.output, self.ranks):
                    return self._run()
        finally:
            if self.offloaded is not None:
                self.offloaded.cleanup()

    def _run(self) -> Path:
        config = self.config
        self._set_up()
        self._resume()
        metrics = config.output / "metrics.jsonl" if config.metrics else None
        progress = Progress(self.accelerator, config.steps, self.step, config.log_every, metrics)
        with self.interruption.awaited(), contextlib.closing(progress):
            self._samples_at_start(progress)
            with contextlib.closing(iter(self.training.loader)) as micros:  # type: ignore[type-var]
                for done, numbers in self._steps(micros):
                    seconds = done.numbers.computed.seconds_since(done.began)
                    progress.step(done.step, numbers, done.tokens, seconds)
                    if self.on_step is not None:
                        self.on_step(done.step, numbers)
                    if done.step == self.step:  # no later one is launched
                        self._periodic_work(progress)
        if self.interruption.number:
            raise TrainingInterrupted(self.interruption.number, self.checkpoints.path(self.step))
        path = finish(config, self.family, self.parallel, self.training, self._generate("last"))
        # accelerator.end_training() would also destroy the process group, which may be the caller's.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return path

    def _dry_run(self) -> Path:
        """Trains one step on one example, and prints the report."""
        asked = self.config
        with tempfile.TemporaryDirectory() as cache:
            self.config = dataclasses.replace(asked, cache_dir=cache, incomplete_batches="fill")
            reset_peak_memory(self.device)
            self._set_up()
            with contextlib.closing(iter(self.training.loader)) as micros:  # type: ignore[type-var]
                numbers = self._read(self._launch(micros, Moment(self.device)))
        memory = {"encoding": self.encoding_memory, "training": peak_memory(self.device)}
        degrees = self.parallel.dp_degree, self.parallel.cp_degree
        assert self.prepared.assigned is not None
        text = summary(
            asked,
            self.family,
            self.prepared.assigned,
            degrees,
            memory,
            self.training.optimizer,
            numbers["loss"],
            str(self.compiling),
        )
        if self.main:
            print(text, flush=True)
        return asked.output

    # ---- Before the steps

    def _set_up(self) -> None:
        """Loads the model, encodes the data, and makes all that a step needs."""
        config, accelerator, parallel = self.config, self.accelerator, self.parallel
        self.family = family = load_family(config, accelerator, parallel)
        self.sampling = config.timestep_sampling or family.objective.sampling
        check_with_model(config, family, adapter_of(config, family))
        check_split(family, parallel.cp_degree)
        facts = facts_of(config, family)
        check_equal_bases(config, parallel, facts.base)
        if self.resumed_settings is not None:
            check_facts(facts, self.resumed_settings)
        if not config.dry_run:
            start_trackers(accelerator, config)
            self._write_settings()
        self.prepared = prepare_data(config, family, parallel, self.device)
        self.validation = Validation(config, family, self.prepared.bucket, self.device, self.prepared.fps)
        drop_text_encoders(family.pipeline)
        self.encoding_memory = peak_memory(self.device)
        reset_peak_memory(self.device)
        noise = Noise(config, self.sampling, family.levels, pin=self.device.type == "cuda")
        loader = make_loader(config, self.prepared, parallel, noise)
        sharded = accelerator.distributed_type == "FSDP"
        self.compiling = choose(config, list(family.trained.values()), self.device, self.ranks, sharded)
        if self.main and config.compile == AUTO and not config.dry_run:
            print(self.compiling, file=sys.stderr, flush=True)
        # A dry run trains one step, and only reports the choice.
        compiled = self.compiling.compiled and (config.compile is True or not config.dry_run)
        adapted = add_adapters(config, family, parallel, self.device, self.checkpoint, self._offload_folder, compiled)
        self.report = adapted.report
        self.training, optimizer = make_training(config, accelerator, parallel, adapted, loader, facts)
        self.model = self.training.transformer
        self._step = TrainStep(config, accelerator, parallel, family, self.training, optimizer)
        self.parameters = self._step.parameters

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

    def _write_settings(self) -> None:
        """Writes the settings with their defaults into the output folder, as a run file."""

        def write_settings(_: None) -> None:
            write_resolved(self.config, self.family, self.accelerator.mixed_precision, self.parallel, self.sampling)

        in_step(self.ranks, [None] if self.main else [], write_settings, "writing the settings")

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

    # ---- Steps

    def _steps(self, micros: Iterator[dict[str, Any]]) -> Iterator[tuple[_Launched, dict[str, float]]]:
        """Trains until the last step, or a signal. Yields each step with its numbers: while the next one runs, or
        before it is launched if there is work between them."""
        launched: deque[_Launched] = deque()
        while True:
            if launched and self.ranks.size == 1:  # which need not wait for an exchange of signals
                self.interruption.note(self.interruption.received())
            if len(launched) > 1 or (launched and self._has_work()):
                first = launched.popleft()
                yield first, self._read(first)
            elif self._at_end():
                return
            else:
                began = launched[-1].numbers.computed if launched else Moment(self.device)
                launched.append(self._launch(micros, began))

    def _launch(self, micros: Iterator[dict[str, Any]], began: Moment) -> _Launched:
        """Launches one optimizer step, and the exchange of its loss and of signals between processes."""
        done = self._step(micros)
        self.step += 1
        signals = [torch.full_like(done.loss, each) for each in self.interruption.received()]
        sums = self.ranks.sums(torch.stack([done.loss, *signals]))
        numbers = torch.cat([sums, done.gradient_norm.to(sums.dtype)[None]])
        return _Launched(self.step, began, ToHost(numbers), done.learning_rate, done.tokens)

    def _read(self, launched: _Launched) -> dict[str, float]:
        """The loss, the gradient norm and the learning rate of a step. Takes note of a signal on any process."""
        with self.ranks.waiting():
            loss, *counts, norm = launched.numbers.read()
        self.interruption.note(counts)
        numbers = {"loss": loss / self.ranks.size, "gradient norm": norm, "learning rate": launched.learning_rate}
        for name in ("loss", "gradient norm"):
            if not math.isfinite(numbers[name]):
                raise self._diverged(f"the {name} is {numbers[name]}", launched.step)
        return numbers

    def _diverged(self, what: str, step: int) -> TrainingError:
        """An error for values of a step that are not finite. The last checkpoint was saved before they occurred."""
        smaller = option("learning_rate", float(f"{self.config.rate / 10:.1e}"))
        newest = self.checkpoints.newest()
        if newest is None:
            advice = f"There is no checkpoint: start anew with a smaller learning rate, such as {smaller}"
        else:
            advice = f"Resume from the last checkpoint with a smaller learning rate: --resume latest {smaller}"
        return TrainingError(f"{what} in step {step}. {advice}, or look at the data of this step.")

    # ---- At some steps

    def _at_end(self) -> bool:
        """Whether no step follows."""
        return self.step >= self.config.steps or bool(self.interruption.number)

    def _has_work(self) -> bool:
        """Whether `_periodic_work` has something to do after this step."""
        config, step = self.config, self.step
        every = config.checkpoint_every, config.evaluation_every, config.validation_every
        return self._at_end() or any(_due(step, each) for each in every)

    def _periodic_work(self, progress: Progress) -> None:
        """Saves a checkpoint, evaluates and generates samples where this step is due."""
        config, step = self.config, self.step
        last = self._at_end()
        save = last or _due(step, config.checkpoint_every)
        if save:
            self._save()
        if _due(step, config.evaluation_every):
            found = evaluate(self.family, self.prepared, self.parallel, config.seed, self.device)
            progress.log(step, found)
            progress.print(f"step {step}: evaluation loss {found['evaluation/loss']:.5f}")
        if not last and _due(step, config.validation_every):
            self._samples(progress)
            if self.interruption.number and not save:
                self._save()

    def _samples_at_start(self, progress: Progress) -> None:
        """Generates samples before the first step of a new run."""
        if self.step or not self.config.validation_at_start or not self.validation.previews:
            return
        self._samples(progress)
        if self.interruption.number:
            self._save()

    def _samples(self, progress: Progress) -> None:
        """Generates samples after this step, until a signal arrives."""
        samples = self._generate(f"step-{self.step:08d}", stop=lambda: self.interruption.exchange() > 0)
        self.interruption.exchange()
        if samples:
            progress.print(f"step {self.step}: generated {', '.join(str(each.path) for each in samples)}")

    def _save(self) -> None:
        taken = snapshot(self.training, self.step)
        if not all(bool(each.isfinite().all()) for each in taken.adapter.values()):
            raise self._diverged("weights of the adapter are not finite", self.step)

        weights = taken.adapter if taken.average is None else taken.average

        def files(folder: Path) -> None:
            write(taken, folder)
            if self.config.adapter != WHOLE:  # whose weights would be there twice
                save_adapters(self.config, self.family, self.training, weights, folder)

        def save(_: None) -> None:
            self.checkpoints.save(self.step, files, taken.size)

        in_step(self.ranks, [None] if self.main else [], save, "saving a checkpoint")

    def _generate(self, name: str, stop: Callable[[], bool] = lambda: False) -> list[Sample]:
        """Generates the validation samples, with the averaged adapter if there is one."""
        if not self.validation.previews:
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

        def show(_: None) -> None:
            self.validation.describe(samples, self.step)
            log_samples(self.accelerator, samples, self.step)

        in_step(self.ranks, [None] if self.main and samples else [], show, "showing samples")
        return samples


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
