"""The upload at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..setting import setting


@dataclass
class PublishingSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "publishing"

    push_to_hub: bool = setting(False, "Upload the adapter and its model card to the Hugging Face Hub at the end")
    hub_model_id: str | None = setting(
        None, "Name of the repository on the Hub (default: the name of output_dir)", needs=("push_to_hub",)
    )
