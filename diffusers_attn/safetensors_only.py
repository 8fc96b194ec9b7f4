"""Loads pipelines and models from safetensors alone: reading pickled weights (.bin, .pt) can run code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import AttentionProviderError, command

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NOT_ON_THE_HUB = ("Could not find the necessary `safetensors`", "does not appear to have a file named")
"""What diffusers says of a repository without safetensors, when it loads a pipeline and a model."""


def from_safetensors(cls: Any, source: str | Path, **options: Any) -> Any:
    """`cls.from_pretrained(source, **options)` without pickled weights.

    Args:
        cls: a class of diffusers, such as `DiffusionPipeline`.
        source: a folder, or a repository on the Hugging Face Hub.
        options: further arguments of `from_pretrained`.

    Raises:
        AttentionProviderError: the source has weights that are pickled and not in safetensors.
        OSError: it has no weights, or cannot be reached.
    """
    try:
        return cls.from_pretrained(source, use_safetensors=True, **options)
    except OSError as error:
        folder = Path(source, options.get("subfolder", ""))
        pickled = _pickled_in(folder)
        if not pickled and (folder.is_dir() or not any(each in str(error) for each in _NOT_ON_THE_HUB)):
            raise
        kept = f"pickled weights ({', '.join(pickled)})" if pickled else f"no weights in safetensors ({error})"
        given = str(folder if pickled else source)
        convert = command(f"{cls.__name__}.from_pretrained({given!r}).save_pretrained(FOLDER)")
        raise AttentionProviderError(
            f"{folder} has {kept}. Only safetensors are read here, as reading pickled weights can run code in them. "
            f"If you trust the files, convert them with {convert}, and give that folder."
        ) from error


def _pickled_in(folder: Path) -> list[str]:
    """Pickled weights in a folder and its subfolders without safetensors beside them, by their paths in it."""
    return sorted(
        each.relative_to(folder).as_posix()
        for each in (*folder.glob("*"), *folder.glob("*/*"))
        if each.suffix in _PICKLED and not any(each.parent.glob("*.safetensors"))
    )
