"""The command `advise`."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from .. import exit_codes

VERSION = 1
"""Version of the JSON schema."""
PAYS = 1.2
"""The least speed-up from twice as many GPUs at which they are recommended."""
ACCURACY = (
    "Predictions for H200 are within 9 % of the measured steps of Flux and Wan 2.1 1.3B with compiled blocks. Those "
    "for other GPUs follow from specifications; links other than NVLink were not measured."
)


def advise(
    model: Annotated[
        str,
        typer.Argument(
            help="flux, qwen-image, wan-1.3b, wan-14b, ltx2, hunyuan-video, hunyuan-video15 or cogvideox-5b; a model "
            "class, with its default configuration; a folder with a pipeline or a model; or a repository on the "
            "Hugging Face Hub, of which only configurations are read.",
        ),
    ],
    gpus: Annotated[int, typer.Option(help="Largest number of GPUs, on all nodes together.", min=1)] = 8,
    nodes: Annotated[int, typer.Option(help="Number of nodes that the GPUs are on.", min=1)] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Type of the GPUs: h200, h100, b200, a100, l40s, rtx-4090 or rtx-5090. Default: the one of this "
            "machine if it is one of these, or else h200.",
        ),
    ] = None,
    links: Annotated[
        str | None,
        typer.Option(
            help="What connects the GPUs of a node: nvlink, pcie, or 'host memory'. Default: what usually connects "
            "GPUs of this type."
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels. Default: that of the model's pipeline.", min=1)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width in pixels. Default: that of the model's pipeline.", min=1)
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames. Default: that of the model's pipeline.", min=1)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Number of tokens, in place of height, width and frames.", min=2)
    ] = None,
    guidance: Annotated[
        bool,
        typer.Option(
            "--guidance",
            help="A step has two forwards, for classifier-free guidance; each half of the GPUs may compute one.",
        ),
    ] = False,
    batch: Annotated[
        int, typer.Option(help="Number of samples in a forward; 2 for guidance in one forward.", min=1)
    ] = 1,
    provider: Annotated[
        str, typer.Option(help="Attention provider. Default: auto, with the speed of PyTorch's fastest exact kernel.")
    ] = "auto",
    vram: Annotated[
        float | None, typer.Option(help="Memory of a GPU in GB (1e9 bytes). Default: that of the GPU.", min=0)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Predict time and memory of a model on several GPUs, and recommend a number of GPUs.

    Nothing runs, and only configurations are downloaded. The strategies are those between which
    enable_context_parallel chooses, by the same predictions. The exit code is 1 if the model does not fit into the
    memory, also with sharded weights.
    """
    import dataclasses

    from ...providers.registry import provider_name
    from ..output import write_json
    from .gpus import GPUS
    from .grids import size_of
    from .measured import compared
    from .model import described
    from .predict import predict_step

    device = GPUS[_gpu(gpu)]
    name = provider_name(provider)
    counts = _counts(gpus, nodes)
    per_node = gpus // nodes
    hardware = device.hardware(links, nodes)
    found = described(model)
    size = size_of(type(found.model), height, width, frames, tokens)
    limit = vram * 1e9 if vram is not None else device.memory
    all_predictions = {
        count: predict_step(found, size, hardware, device.capability, [name], count, per_node, batch, guidance)
        for count in counts
    }
    best = {count: each[0] for count, each in all_predictions.items()}
    one = best[1].seconds
    advice = _advice(best, limit, found.other_bytes)
    measured, steps = compared(found)
    content = {
        "model": found.target.name,
        "parameters": found.parameters,
        "gpu": device.name,
        "nodes": nodes,
        "provider": name,
        "tokens": size.tokens,
        "size": size.words,
        "batch": batch,
        "guidance": guidance,
        "memory_bytes": int(limit),
        "other_weights_bytes": found.other_bytes,
        "predictions": [
            {
                "gpus": each.gpus,
                "strategy": each.strategy or None,
                "seconds": each.seconds,
                "attention_seconds": each.attention_seconds,
                "speed_up": one / each.seconds,
                "weights_bytes": each.weights_bytes,
                "sharded_weights_bytes": each.sharded_weights_bytes,
                "activations_bytes": each.activations_bytes,
                "fits": each.bytes <= limit,
            }
            for predicted in all_predictions.values()
            for each in predicted
        ],
        "measured": {
            "what": measured,
            "steps": [{**dataclasses.asdict(each), "error": each.error} for each in steps],
        },
        "recommended_gpus": advice[0],
        "advice": advice[1],
    }
    if json:
        write_json("advise", VERSION, content)
    else:
        _show(content)
    if not any(_sharded_bytes(each) <= limit for each in best.values()):
        raise typer.Exit(exit_codes.FOUND)


def _gpu(name: str | None) -> str:
    """The key in `GPUS` for the name that was given, or for the GPU of this machine."""
    import torch

    from ...errors import AttentionProviderError
    from .gpus import GPUS

    if name is None:
        here = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
        return next((key for key in GPUS if key.replace("-", " ") in here.lower()), "h200")
    if name.lower() not in GPUS:
        raise AttentionProviderError(f"--gpu {name}: accepted are {', '.join(GPUS)}.")
    return name.lower()


def _counts(gpus: int, nodes: int) -> list[int]:
    """The numbers of GPUs to predict: powers of two and the largest, within a node or on complete nodes."""
    from ...errors import AttentionProviderError

    if gpus % nodes:
        raise AttentionProviderError(f"--gpus {gpus} --nodes {nodes}: every node must have the same number of GPUs.")
    per_node = gpus // nodes
    powers = (2**n for n in range(gpus.bit_length()))
    candidates = sorted({*powers, per_node, gpus})
    return [count for count in candidates if count <= gpus and (count <= per_node or count % per_node == 0)]


def _advice(best: dict[int, Any], limit: float, other_bytes: int | None) -> tuple[int, list[str]]:
    """The recommended number of GPUs, and sentences."""
    from ..output import digits

    recommended, found = 1, []
    for count, each in best.items():
        before = best[recommended].seconds / each.seconds
        if count > 1 and before >= PAYS ** math.log2(count / recommended):
            recommended = count
        elif count > 1:
            than = f"{recommended} GPU{'s' * (recommended > 1)}"
            found.append(
                f"{count} GPUs do not pay: {digits(each.seconds * 1e3)} ms, {before:.2f} times as fast as {than}."
            )
    if recommended > 1:
        each = best[recommended]
        times = best[1].seconds / each.seconds
        found.insert(0, f"{recommended} GPUs: {each.strategy}, {times:.1f} times as fast as one GPU.")
    if not any(each.bytes <= limit for each in best.values()):
        sharded = [count for count, each in best.items() if _sharded_bytes(each) <= limit]
        remedy = (
            f"With enable_context_parallel(pipe, shard_weights=True) it fits on {min(sharded)} GPUs, "
            f"{_sharded_bytes(best[min(sharded)]) / 1e9:.1f} GB on each."
            if sharded
            else "Quantise or offload them."
        )
        found.append(
            f"The model does not fit into {limit / 1e9:.0f} GB: its weights take {best[1].weights_bytes / 1e9:.1f} GB "
            f"on every GPU. {remedy}"
        )
    elif best[1].bytes > limit:
        first = min(count for count, each in best.items() if each.bytes <= limit)
        found.append(f"It takes {first} GPUs to fit activations into {limit / 1e9:.0f} GB.")
    elif other_bytes and best[1].bytes + other_bytes > limit:
        found.append(
            f"The pipeline's other models ({other_bytes / 1e9:.1f} GB) do not fit beside it: use "
            "pipe.enable_model_cpu_offload()."
        )
    return recommended, found


def _sharded_bytes(each: Any) -> int:
    """Bytes on a GPU with sharded weights."""
    return int(each.sharded_weights_bytes + each.activations_bytes)


def _show(content: dict[str, Any]) -> None:
    from ..output import digits, heading, say, table

    name = content["model"]
    millions = digits(content["parameters"] / 1e6)
    say(f"{name}, {millions} million parameters; {content['size']}; batch {content['batch']}")
    say(f"{content['gpu']}, {content['memory_bytes'] / 1e9:.0f} GB; attention by {content['provider']}; bfloat16")
    predictions = content["predictions"]
    firsts = {each["gpus"]: each for each in reversed(predictions)}
    heading("One step with guidance: two forwards" if content["guidance"] else "One forward")
    header = ("GPUs", "strategy", "ms", "attention, ms", "times as fast", "weights, GB", "activations, GB", "fits")
    table(header, [_row(each) for _, each in sorted(firsts.items())], numbers=[*header[:1], *header[2:-1]])
    most = max(firsts)
    others = [each for each in predictions if each["gpus"] == most]
    if len(others) > 1:
        heading(f"Strategies on {most} GPUs")
        table(header, [_row(each) for each in others], numbers=[*header[:1], *header[2:-1]])
    if content["measured"]["steps"]:
        heading(f"Measured on NVIDIA H200 with NVLink: {content['measured']['what']}")
        columns = ("GPUs", "strategy", "measured, ms", "predicted, ms", "error")
        rows = [
            (
                str(each["gpus"]),
                each["strategy"],
                digits(each["measured_seconds"] * 1e3),
                digits(each["predicted_seconds"] * 1e3),
                f"{each['error']:+.1%}",
            )
            for each in content["measured"]["steps"]
        ]
        table(columns, rows, numbers=(columns[0], *columns[2:]))
    say()
    for text in content["advice"]:
        say(text)
    say(ACCURACY)


def _row(each: dict[str, Any]) -> tuple[str, ...]:
    from ..output import digits

    return (
        str(each["gpus"]),
        each["strategy"] or "",
        digits(each["seconds"] * 1e3),
        digits(each["attention_seconds"] * 1e3),
        f"{each['speed_up']:.2f}",
        f"{each['weights_bytes'] / 1e9:.1f}",
        f"{each['activations_bytes'] / 1e9:.1f}",
        "yes" if each["fits"] else "no",
    )
