"""The adapter's model card, and the upload of adapter and card to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.disk import write_file
from ..errors import TrainingError
from ..families import Family
from ..model.experts import adapter_folder
from ..model.lora import loads_adapters
from ..model.whole import class_of
from ..settings.choices import IN_DIFFUSERS_FORMAT, WHOLE
from ..settings.config import TrainConfig
from .validation import Sample


def write_card(config: TrainConfig, family: Family, samples: Sequence[Sample], facts: Mapping[str, Any]) -> Path:
    """Writes README.md into the output folder.

    Args:
        config: the settings.
        family: the family with its pipeline.
        samples: generated files in or below that folder.
        facts: further rows of the card's table, by name.

    Returns:
        The card's path.
    """
    text = model_card(config, family, samples, facts)
    path = config.output / "README.md"
    write_file(path, lambda unfinished: unfinished.write_text(text), "the model card")
    return path


def model_card(config: TrainConfig, family: Family, samples: Sequence[Sample], facts: Mapping[str, Any]) -> str:
    """The card's text, with the YAML metadata that the Hub reads."""
    kind = "text-to-image" if family.kind == "image" else "text-to-video"
    files = [(each.prompt, each.path.relative_to(config.output).as_posix()) for each in samples]
    widget = "".join(
        f"- text: {json.dumps(prompt)}\n  output:\n    url: {json.dumps(file)}\n" for prompt, file in files
    )
    gallery = "\n".join(f"| {prompt} | {_shown(prompt, file)} |" for prompt, file in files)
    table = {
        "data": ", ".join(Path(each.path).name for each in config.sources),
        "adapter": config.adapter_with_rank, "steps": config.steps,
        "optimizer": config.optimizer, "seed": config.seed, **facts,
    }  # fmt: skip
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    pipeline = type(family.pipeline).__name__
    load = "\n".join(_loading(config, family, component) for component in family.trained)
    if config.adapter == WHOLE:
        classes = ", ".join(dict.fromkeys(class_of(each).__name__ for each in family.trained.values()))
        load = f"from diffusers import {classes}\n\n{load}"
    elif config.adapter not in IN_DIFFUSERS_FORMAT:
        load = f"from diffusers_attn.training.model.lora import load_adapter\n\n{load}"
    base = Path(config.model).name if Path(config.model).exists() else config.model
    metadata = f"base_model: {base}\n" if not Path(config.model).exists() else ""
    return f"""\
---
library_name: diffusers
pipeline_tag: {kind}
{metadata}tags:
- {"full-fine-tuning" if config.adapter == WHOLE else config.adapter}
- diffusers
{"widget:" if widget else ""}
{widget}---
# {config.output.name}

{"A fine-tuned transformer" if config.adapter == WHOLE else "An adapter"} for `{base}`, trained with diffusers_attn.

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
{load}
```

| | |
| --- | --- |
{rows}
{f"{chr(10)}| prompt | sample |{chr(10)}| --- | --- |{chr(10)}{gallery}{chr(10)}" if gallery else ""}"""


def _loading(config: TrainConfig, family: Family, component: str) -> str:
    """The line that loads the adapter of a component of the pipeline, or the component itself."""
    if config.adapter == WHOLE:
        name, cls = config.hub_model_id or config.output.name, class_of(family.trained[component]).__name__
        return f'pipe.{component} = {cls}.from_pretrained("{name}", subfolder="{component}").to("cuda", torch.bfloat16)'
    folder = adapter_folder(component, len(family.trained) > 1)
    if config.adapter not in IN_DIFFUSERS_FORMAT:
        return f'load_adapter(pipe.{component}, "{(Path(config.output.name) / folder).as_posix()}")'
    loader = "load_lora_weights" if loads_adapters(type(family.pipeline)) else f"{component}.load_lora_adapter"
    where = "" if folder == "" else f', subfolder="{folder}", adapter_name="{folder}"'
    where += ", load_into_transformer_2=True" if component == "transformer_2" else ""
    return f'pipe.{loader}("{config.hub_model_id or config.output.name}"{where})'


def check_push(config: TrainConfig) -> None:
    """Raises TrainingError if an upload would be refused: no token, an invalid one, or an invalid repository name.

    A network failure is ignored, since the network may work at the end of the run.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = config.hub_model_id or config.output.name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise TrainingError(
            f"--push_to_hub: {name!r} is not a valid repository name. {error} Give --hub_model_id."
        ) from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise TrainingError("--push_to_hub with HF_HUB_OFFLINE=1: nothing can be uploaded. Leave one of them out.")
    if huggingface_hub.get_token() is None:
        raise TrainingError("--push_to_hub without a token: log in with `hf auth login`, or set HF_TOKEN.")
    try:
        huggingface_hub.HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise TrainingError(
                "--push_to_hub: the Hub refuses the token. Log in again with `hf auth login`, or set another HF_TOKEN."
            ) from error
    except Exception:  # network failures have many types
        return


def _shown(prompt: str, file: str) -> str:
    """Markdown or HTML that shows an image or video in a card."""
    return f'<video controls loop src="{file}"></video>' if file.endswith(".mp4") else f"![{prompt}]({file})"


def upload(config: TrainConfig) -> str:
    """Uploads the adapter, the card and the last samples to the Hub.

    Returns:
        URL of the repository.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    name = config.hub_model_id or config.output.name
    repository = api.create_repo(name, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=config.output,
        commit_message="Adapter trained with diffusers_attn",
        allow_patterns=["README.md", "*.safetensors", "adapter_config.json", "*/config.json", "samples/last/*"],
        ignore_patterns=["cache/**", "checkpoints/**", ".*", "*/.*", "*/samples.json"],
    )
    return str(repository)
