"""The model that is trained, the data, and the folder of the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..choices import BASE_PRECISIONS, EXPERTS, OFFLOADS
from ..setting import setting


@dataclass
class ModelSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "model, data and output"

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
        "Folder with the reference images of an editing model: for a.png in --data, a.* or, if several, a_1.*, a_2.* "
        "(default: those in a column references of the data)",
    )
    control: str | None = setting(
        None,
        "Folder with the control pictures or videos (edges, depth and so on) of a model that takes one: for a.png in "
        "--data, a.* (default: those in a column control of the data)",
    )
    control_mask: str | None = setting(
        None,
        "Folder with masks of the controls, of a model that takes them (Wan VACE): black keeps the control as it is, "
        "white is drawn anew (default: those in a column control_mask of the data)",
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
