"""`TrainConfig`: all settings of a training run, checked, from a command line or from Python."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from .arguments import given_settings, make_parser
from .choices import OPTIMIZERS, WARMUP_STEPS, WHOLE, WHOLE_RATE, WITHOUT_RANK, WITHOUT_WARMUP
from .contradictions import check_effect, check_together, fields_of
from .datasets import DataSet, datasets_of
from .groups.adapter import AdapterSettings
from .groups.checkpoints import CheckpointSettings
from .groups.model import ModelSettings
from .groups.noise import NoiseSettings
from .groups.optimization import OptimizationSettings
from .groups.preparation import PreparationSettings
from .groups.processes import ProcessSettings
from .groups.publishing import PublishingSettings
from .groups.validation import ValidationSettings
from .previews import Preview, previews_of
from .setting import check_value, metadata_of

REQUIRED = ("model", "data")


@dataclasses.dataclass
class TrainConfig(
    # A dataclass has the fields of its last base first.
    PublishingSettings,
    ValidationSettings,
    CheckpointSettings,
    NoiseSettings,
    OptimizationSettings,
    AdapterSettings,
    PreparationSettings,
    ProcessSettings,
    ModelSettings,
):
    """The settings of a run. Each is an argument of `examples/train_lora.py` of the same name, described by its help.

    Raises:
        TrainingError: a value is not accepted, two values contradict each other, or a value has no effect because of
            another one; the message names the settings.
    """

    def __post_init__(self) -> None:
        sources, _ = self.sources, self.previews
        for name in REQUIRED:
            if not getattr(self, name) and not (name == "data" and sources):
                raise TrainingError(f"--{name} is missing. {metadata_of(fields_of(self)[name]).help}.")
        hints = typing.get_type_hints(TrainConfig)
        for name, field in fields_of(self).items():
            check_value(name, getattr(self, name), hints[name], metadata_of(field))
        check_together(self)
        check_effect(self)

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        default = OPTIMIZERS[self.optimizer].learning_rate
        return min(default, WHOLE_RATE) if self.adapter == WHOLE and default < 1 else default

    @property
    def adapter_with_rank(self) -> str:
        """The type of adapter, such as "lora of rank 16"."""
        if self.adapter == WHOLE:
            return "none, all weights"
        return self.adapter if self.adapter in WITHOUT_RANK else f"{self.adapter} of rank {self.rank}"

    @property
    def warmup_steps(self) -> int:
        """Number of steps in which the learning rate rises; 0 for a schedule without warm-up."""
        if self.lr_schedule in WITHOUT_WARMUP:
            return 0
        return min(WARMUP_STEPS, self.steps // 10) if self.lr_warmup_steps is None else self.lr_warmup_steps

    @property
    def sources(self) -> list[DataSet]:
        """The sets of training data: `data`, and those of `datasets`."""
        own = [DataSet(self.data)] if self.data else []
        return own + datasets_of(self.datasets or [])

    @property
    def previews(self) -> list[Preview]:
        """The samples that the run draws."""
        return previews_of(self.validation_prompts or [], self.validation_images or [])

    @property
    def output(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    @property
    def cache(self) -> Path:
        """The folder of cached latents and text embeddings."""
        return Path(self.cache_dir) if self.cache_dir else self.output / "cache"

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, with values that JSON can store."""
        return dataclasses.asdict(self)

    @staticmethod
    def parser(**settings: Any) -> argparse.ArgumentParser:
        """A command line with an argument for every setting. `settings` go to `argparse.ArgumentParser`."""
        return make_parser(TrainConfig, GROUPS, REQUIRED, **settings)

    @staticmethod
    def from_arguments(arguments: Sequence[str] | None = None, **settings: Any) -> TrainConfig:
        """Parses a command line (None: that of this process), with the run file and the recipe that it names.

        Exits with a message if a value is not accepted.
        """
        parser = TrainConfig.parser(**settings)
        try:
            return TrainConfig(**given_settings(parser, TrainConfig, arguments))
        except TrainingError as error:
            parser.error(str(error))


_groups: tuple[Any, ...] = TrainConfig.__bases__
GROUPS = {dataclasses.fields(group)[0].name: group.HEADING for group in reversed(_groups)}
"""The first setting of each group, and the group's heading in --help."""
