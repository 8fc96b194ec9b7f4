"""The settings of a training run with their help texts, and the checks that need no model."""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...context_parallel.config import ROTATE_METHODS
from ..errors import TrainingError
from .arguments import given_settings, make_parser
from .bounds import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Bounds
from .choices import (
    BASE_PRECISIONS,
    CLIPS,
    EXPERTS,
    IN_DIFFUSERS_FORMAT,
    INITIALISATIONS,
    KINDS,
    MASKS,
    OFFLOADS,
    OPTIMIZERS,
    SAMPLINGS,
    SCHEDULES,
    WITHOUT_WARMUP,
)
from .datasets import DataSet, datasets_of
from .flag_names import option
from .setting import check_value, default_of, metadata_of, setting

WARMUP_STEPS = 50
"""Default of `lr_warmup_steps`; a run of fewer than ten times as many steps warms up for a tenth of its steps."""

GROUPS = {
    "model": "model, data and output",
    "cp_degree": "processes and attention",
    "resolution": "data preparation",
    "adapter": "adapter",
    "steps": "optimization",
    "timestep_sampling": "noise",
    "checkpoint_every": "checkpoints",
    "log_every": "logging, validation and evaluation",
    "push_to_hub": "publishing",
}
"""The first setting of each group, and the group's heading in --help."""

REQUIRED = ("model", "data")


@dataclasses.dataclass
class TrainConfig:
    """The settings of a run. Each is an argument of `examples/train_lora.py` of the same name, described by its help.

    Raises:
        TrainingError: a value is not accepted, two values contradict each other, or a value has no effect because of
            another one; the message names the settings.
    """

    model: str = setting(
        "",
        "Pipeline to train: a folder or a name on the Hugging Face Hub (Flux, Qwen-Image, Wan and the other "
        "families in docs/training.md)",
    )
    data: str = setting("", "Training data: a folder of images or videos with captions, or a Hugging Face dataset")
    datasets: list[dict[str, Any]] | None = setting(
        None,
        "Further training data, only in run files: a list, each entry with path and settings of its own, such as "
        "repeats, weight and caption_prefix (default: none)",
        in_files_only=True,
    )
    references: str | None = setting(
        None,
        "Folder with the reference images of an editing model: for a.png in --data, a.* or, if several, a_1.*, a_2.*",
    )
    output_dir: str = setting("outputs/lora", "Folder for the adapter, checkpoints, samples and the model card")
    overwrite: bool = setting(False, "Replace the files of an earlier run in output_dir")
    dry_run: bool = setting(
        False,
        "Check the settings and the data, train one step on one example, print the expected memory, the steps per "
        "epoch and the buckets, and stop without writing anything",
    )
    revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub (default: main)")
    expert: str | None = setting(
        None,
        "Transformer to train of a model that has one for high and one for low noise levels, such as Wan2.2-A14B; both "
        "trains one of them in each step, by a noise level that is drawn",
        EXPERTS,
    )

    transformer: str | None = setting(
        None,
        "Weights of the transformer in place of those in --model: a folder in diffusers' format, quantised or not, or "
        "a file that ends in .gguf or .safetensors (default: those in --model)",
    )
    base_precision: str | None = setting(
        None,
        "Weights of the frozen base model, and of text encoders while captions are encoded: bf16, or quantised to "
        "int8, fp8 (torchao) or nf4 (bitsandbytes, on GPUs); the adapter stays in float32 (default: as "
        "--mixed_precision says)",
        BASE_PRECISIONS,
    )

    offload: str = setting(
        "none",
        "Place of the frozen weights of the transformer's blocks while these do not run: blocks is host memory, disk "
        "is files in a temporary folder of the cache",
        OFFLOADS,
    )

    cp_degree: int | None = setting(
        None,
        "Number of processes that share each sequence, the context-parallel degree (default: from Accelerate's "
        "configuration, else 1)",
        bounds=COUNT,
    )
    ulysses_degree: int | None = setting(
        None,
        "Number of those processes that exchange attention heads, as in Ulysses (default: automatic)",
        bounds=COUNT,
    )
    ring_degree: int | None = setting(
        None,
        "Number of those processes that exchange keys and values, as in ring attention (default: automatic)",
        bounds=COUNT,
    )
    rotate_method: str | None = setting(
        None,
        "How the ring's processes exchange keys and values: allgather collects them at once, alltoall passes them on "
        "from rank to rank (default: automatic)",
        ROTATE_METHODS,
    )
    attn_provider: str | None = setting(
        None, "Attention kernel by name, such as flash_4 or _native_cudnn (default: automatic)"
    )
    cpu: bool = setting(False, "Train on CPUs even if GPUs are available")
    timeout: float | None = setting(
        None,
        "Seconds to wait for a process that does not respond (default: 3600, or the running process group's own)",
        bounds=POSITIVE,
    )
    mixed_precision: str | None = setting(
        None,
        "bf16 keeps the base model in bfloat16 and the adapter in float32; no keeps both in float32 (default: from "
        "accelerate launch, else no)",
        ("no", "bf16"),
    )
    compile: bool = setting(False, "Compile the transformer's blocks with torch.compile")
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass to save memory")
    find_unused_parameters: bool = setting(
        False, "DDP's find_unused_parameters, needed if some --targets do not contribute to the loss"
    )

    resolution: list[int] = setting(
        [512],
        "Side in pixels of a square with the same area as each bucket; several values make several sets of buckets",
        bounds=Bounds(1, 2**14),
    )
    aspects: list[float] | None = setting(
        None,
        "Aspect ratios of the buckets, width / height (default: 11 common ratios from 1:2 to 2:1)",
        bounds=Bounds(1 / 32, 32),
    )
    num_frames: list[int] | None = setting(
        None,
        "Number of frames per bucket; several values make several sets of buckets (default: 1 for images; for videos "
        "49, or the nearest number below that the model accepts)",
        bounds=COUNT,
    )
    fps: float | None = setting(
        None,
        "Frames per second to which videos are resampled by the times of their frames; 0 keeps each video's own rate "
        "(default: the model's rate)",
        bounds=NOT_NEGATIVE,
    )
    clips: str = setting(
        "middle",
        "Clips taken from each video: one from its head or middle, N evenly spaced ones, or all, one after the other; "
        f"given as {', '.join(CLIPS)}",
        forms=CLIPS,
    )
    frame_pick: str = setting(
        "consecutive",
        "Frames taken from a video: consecutive ones, or ones spread over its whole length",
        ("consecutive", "spread"),
    )
    max_upscale: float = setting(
        1.25, "Largest factor by which an example may be enlarged to fill its bucket", bounds=POSITIVE
    )
    crop: str = setting("centre", "Part of an example that is kept if it exceeds its bucket", ("centre", "random"))
    repeats: int = setting(1, "Number of times each example is used per epoch", bounds=COUNT)
    incomplete_batches: str = setting(
        "fill", "Fill a bucket's last, incomplete batch with repeated examples, or drop it", ("fill", "drop")
    )
    caption_column: str | None = setting(
        None, "Column of the metadata or dataset that holds the captions (default: caption, text or prompt)"
    )
    caption_lines: bool = setting(
        False, "Each line of a .txt file is a caption of its own, of which one is drawn at each use"
    )
    trigger_word: str | None = setting(
        None, "Word that replaces [trigger] in captions, or is put before those that lack it (default: none)"
    )
    shuffle_tags: int | None = setting(
        None,
        "Number of orders of each caption's comma-separated tags that are encoded, of which one is drawn at each use "
        "(default: only the given order)",
        bounds=COUNT,
    )
    keep_tags: int = setting(
        0,
        "Number of tags at the beginning of a caption that keep their place",
        bounds=NOT_NEGATIVE,
        needs=("shuffle_tags",),
    )
    caption_dropout: float = setting(
        0.1,
        "Probability with which a caption is replaced by the empty one, for classifier-free guidance",
        bounds=PROBABILITY,
    )
    max_sequence_length: int | None = setting(
        None, "Maximum number of text tokens per caption (default: the pipeline's)", bounds=COUNT
    )
    loss_mask: str = setting(
        "none",
        "Masks of the loss, white or opaque where it counts: files are a_mask.png for a.png or a.mp4 in --data, alpha "
        "is the transparency of images",
        MASKS,
    )
    on_bad_data: str = setting(
        "refuse", "Stop before training if an example cannot be read, or skip it with a warning", ("refuse", "skip")
    )
    cache_dir: str | None = setting(
        None, "Folder for cached latents and text embeddings (default: the folder cache in output_dir)"
    )
    cache_batch_size: int = setting(
        1, "Number of examples that the VAE encodes at once; captions are encoded one by one", bounds=COUNT
    )

    adapter: str = setting("lora", "Type of adapter to train", KINDS)
    rank: int = setting(16, "Rank of the adapter", bounds=COUNT)
    alpha: float | None = setting(
        None, "Numerator of the adapter's scale, which is alpha / rank (default: the rank)", bounds=POSITIVE
    )
    targets: list[str] | None = setting(
        None,
        "Names, or ends of names, of the layers that get an adapter, or one regular expression (default: the "
        "attention's projections)",
    )
    adapter_init: str = setting(
        "default",
        "Initialization of the adapter's weights; an olora adapter is saved with twice the rank",
        INITIALISATIONS,
    )
    adapter_dropout: float = setting(0.0, "Dropout probability of the adapter's input", bounds=BELOW_ONE)

    steps: int = setting(1000, "Number of optimizer steps of the whole run", bounds=COUNT)
    batch_size: int = setting(
        1,
        "Number of examples per forward pass on each process, or on each group of processes that share sequences",
        bounds=COUNT,
    )
    gradient_accumulation_steps: int = setting(1, "Number of forward passes per optimizer step", bounds=COUNT)
    optimizer: str = setting("adamw", "Optimizer", tuple(OPTIMIZERS))
    learning_rate: float | None = setting(
        None, "Peak learning rate (default: 1e-4; 1.0 for prodigy)", bounds=Bounds(0, 100, low_is_in=False)
    )
    adam_betas: list[float] = setting(
        [0.9, 0.999], "Optimizer's two decay rates of the moment estimates", bounds=BELOW_ONE, length=2
    )
    weight_decay: float = setting(0.01, "Optimizer's decoupled weight decay", bounds=NOT_NEGATIVE)
    adam_eps: float = setting(
        1e-8, "Number that the optimizer adds to its denominator", bounds=Bounds(0, 1, low_is_in=False)
    )
    lr_schedule: str = setting("constant_with_warmup", "Learning-rate schedule", SCHEDULES)
    lr_warmup_steps: int | None = setting(
        None,
        "Number of optimizer steps in which the learning rate rises to its peak "
        f"(default: {WARMUP_STEPS}, or a tenth of --steps if that is fewer)",
        bounds=NOT_NEGATIVE,
    )
    max_grad_norm: float = setting(
        1.0, "Norm to which gradients are clipped; 0 turns clipping off", bounds=NOT_NEGATIVE
    )
    ema_decay: float | None = setting(
        None,
        "Decay per step of an exponential moving average of the adapter, such as 0.999, which is saved in its place "
        "(default: no average)",
        bounds=Bounds(0, 1, low_is_in=False, high_is_in=False),
    )
    seed: int = setting(0, "Seed of all random numbers", bounds=Bounds(0, 2**63 - 1))

    timestep_sampling: str | None = setting(
        None,
        "Distribution of the noise levels (default: logit_normal; uniform for models that predict v)",
        SAMPLINGS,
    )
    logit_mean: float = setting(
        0.0,
        "Mean of the normal distribution of logit_normal, in logits",
        bounds=Bounds(-10, 10),
        needs=("timestep_sampling", "logit_normal"),
    )
    logit_std: float = setting(
        1.0,
        "Standard deviation of the normal distribution of logit_normal, in logits",
        bounds=Bounds(0, 10, low_is_in=False),
        needs=("timestep_sampling", "logit_normal"),
    )
    mode_scale: float = setting(
        1.29,
        "Scale of the mode distribution; 0 is uniform, more prefers the middle noise levels",
        bounds=Bounds(-1, 1.75),
        needs=("timestep_sampling", "mode"),
    )
    shift: float | None = setting(
        None,
        "Timestep shift; above 1 moves noise levels towards pure noise (default: that of the pipeline's scheduler)",
        bounds=POSITIVE,
    )
    guidance: float | None = setting(
        None, "Guidance scale that a guidance-distilled model gets as its input (default: 1)", bounds=NOT_NEGATIVE
    )

    checkpoint_every: int = setting(
        250, "Number of steps between checkpoints; 0 saves one at the end only", bounds=NOT_NEGATIVE
    )
    checkpoints_kept: int = setting(2, "Number of newest checkpoints to keep; 0 keeps all", bounds=NOT_NEGATIVE)
    resume: str | None = setting(
        None, "Checkpoint to resume from: latest, the number of its step, or its folder (default: start a new run)"
    )

    log_every: int = setting(1, "Number of steps between log entries", bounds=COUNT)
    metrics: bool = setting(True, "Write log entries to metrics.jsonl in output_dir, one JSON object per line")
    trackers: list[str] | None = setting(
        None, "Accelerate's experiment trackers to log to, such as tensorboard or wandb (default: none)"
    )
    tracker_project: str = setting("diffusers_attn", "Project name at the trackers", needs=("trackers",))
    validation_prompts: list[str] | None = setting(
        None, "Prompts from which samples are generated during training and for the model card (default: none)"
    )
    validation_images: list[str] | None = setting(
        None,
        "Files of the images that samples begin with, one for each of validation_prompts, for models that need one",
        needs=("validation_prompts",),
    )
    validation_every: int = setting(
        250,
        "Number of steps between samples; 0 generates them at the end only",
        bounds=NOT_NEGATIVE,
        needs=("validation_prompts",),
    )
    validation_steps: int = setting(
        28, "Number of denoising steps per sample", bounds=Bounds(1, 1000), needs=("validation_prompts",)
    )
    validation_guidance: float | None = setting(
        None,
        "Guidance scale of the samples (default: the pipeline's)",
        bounds=NOT_NEGATIVE,
        needs=("validation_prompts",),
    )
    validation_size: list[int] | None = setting(
        None,
        "Height and width of the samples in pixels (default: those of the first example's bucket)",
        bounds=COUNT,
        length=2,
        needs=("validation_prompts",),
    )
    validation_frames: int | None = setting(
        None,
        "Number of frames of video samples (default: that of the first example's bucket)",
        bounds=COUNT,
        needs=("validation_prompts",),
    )
    evaluation_every: int = setting(
        0, "Number of steps between evaluations of the loss at fixed noise levels; 0 is never", bounds=NOT_NEGATIVE
    )
    evaluation_data: str | None = setting(
        None,
        "Data for evaluations, in the form of --data (default: the first examples of --data)",
        needs=("evaluation_every",),
    )
    evaluation_examples: int = setting(
        4, "Number of examples per evaluation", bounds=COUNT, needs=("evaluation_every",)
    )

    push_to_hub: bool = setting(False, "Upload the adapter and its model card to the Hugging Face Hub at the end")
    hub_model_id: str | None = setting(
        None, "Name of the repository on the Hub (default: the name of output_dir)", needs=("push_to_hub",)
    )

    def __post_init__(self) -> None:
        sources = self.sources
        for name in REQUIRED:
            if not getattr(self, name) and not (name == "data" and sources):
                raise TrainingError(f"--{name} is missing. {metadata_of(_fields()[name]).help}.")
        hints = typing.get_type_hints(TrainConfig)
        for name, field in _fields().items():
            check_value(name, getattr(self, name), hints[name], metadata_of(field))
        if self.offload != "none" and not self.gradient_checkpointing:
            raise TrainingError(
                f"{option('offload', self.offload)} with --no-gradient_checkpointing: the backward pass would keep the "
                "weights of all blocks on the device. Leave one of them out."
            )
        if self.offload != "none" and self.compile:
            raise TrainingError(
                f"{option('offload', self.offload)} with --compile: compiled blocks keep their weights. Leave one of "
                "them out."
            )
        if self.transformer is not None and self.expert == "both":
            raise TrainingError(
                f"{option('transformer', self.transformer)} with --expert both: these are the weights of one "
                "transformer. Train each expert in a run of its own, or put both into the folder of --model."
            )
        if self.references is not None and self.datasets:
            raise TrainingError(
                f"{option('references', self.references)} is accepted with --data only, not with further datasets, "
                "whose files may have the same names. Put all images into one folder."
            )
        if sources and all(each.regularisation for each in sources):
            raise TrainingError(
                "datasets: all sets are for regularisation, which balances another set. Give one without it."
            )
        if self.clips != "middle" and self.frame_pick == "spread":
            raise TrainingError(
                f"{option('clips', self.clips)} with {option('frame_pick', 'spread')}, which spreads the frames of one "
                "clip over the entire video. Leave one of them out."
            )
        if self.lr_warmup_steps is not None and self.lr_warmup_steps > self.steps:
            raise TrainingError(
                f"{option('lr_warmup_steps', self.lr_warmup_steps)} with {option('steps', self.steps)}: the learning "
                "rate would never reach its peak. Give fewer warm-up steps, or leave --lr_warmup_steps out."
            )
        if self.lr_warmup_steps and self.lr_schedule in WITHOUT_WARMUP:
            raise TrainingError(
                f"{option('lr_warmup_steps', self.lr_warmup_steps)} with {option('lr_schedule', self.lr_schedule)}, "
                f"which has no warm-up. Leave it out, or give {option('lr_schedule', 'constant_with_warmup')}."
            )
        if self.rate * self.weight_decay >= 1:
            raise TrainingError(
                f"{option('weight_decay', self.weight_decay)} with a learning rate of {self.rate:g}: weights would "
                "change their sign in each step. The product of the two must be below 1."
            )
        if self.adapter not in IN_DIFFUSERS_FORMAT and self.adapter_init != "default":
            raise TrainingError(
                f"{option('adapter_init', self.adapter_init)} is accepted for --adapter "
                f"{', '.join(IN_DIFFUSERS_FORMAT)}, not for {option('adapter', self.adapter)}. Leave it out."
            )
        if self.adapter_init == "orthogonal" and self.rank % 2:
            raise TrainingError(
                f"{option('adapter_init', 'orthogonal')} with {option('rank', self.rank)}: it needs an even rank."
            )
        self.check_effect()

    def check_effect(self, **resolved: Any) -> None:
        """Raises TrainingError for a setting that was changed although another setting leaves it without effect.

        Args:
            resolved: values of settings that are None until the model is loaded, such as `timestep_sampling`.
        """
        for name, field in _fields().items():
            value, needs = getattr(self, name), metadata_of(field).needs
            if not needs or value == default_of(field):
                continue
            other, *values = needs
            found = resolved.get(other) or getattr(self, other)
            if values and found is None:  # depends on the model
                continue
            if found not in values if values else not found:
                with_other = f"with {option(other, found)}" if found else f"without --{other}"
                needed = " or ".join(option(other, each) for each in values) or f"--{other}"
                raise TrainingError(
                    f"{option(name, value)} has no effect {with_other}. Leave it out, or give {needed}."
                )

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return OPTIMIZERS[self.optimizer].learning_rate if self.learning_rate is None else self.learning_rate

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


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(TrainConfig)}
