"""The settings of a run with all defaults, written into its output folder so that the run can be repeated."""

from __future__ import annotations

from pathlib import Path

from ... import __version__
from ..batches.buckets import buckets_of, rate_of
from ..families import Family
from ..parallel import TrainingParallel
from ..settings.config import GROUPS, TrainConfig
from ..settings.run_file import RESOLVED, write_run_file
from .resuming import settings_of

_PATHS = ("model", "transformer", "data", "output_dir", "cache_dir", "evaluation_data")
"""Settings that may be paths. They are written as absolute ones, since the file may be read from anywhere."""
_OMITTED = ("resume", "overwrite", "dry_run")
"""Settings that belong to the start of a run rather than to the run."""


def write_resolved(
    config: TrainConfig, family: Family, mixed_precision: str, parallel: TrainingParallel, sampling: str
) -> Path:
    """Writes `settings.yaml` into the output folder, a run file with which the run can be repeated.

    Args:
        config: the settings.
        family: the family with its pipeline.
        mixed_precision: Accelerate's, "no" or "bf16".
        parallel: the groups of processes.
        sampling: distribution of the noise levels.

    Returns:
        The file.
    """
    resolved = {
        **settings_of(config, parallel.dp_degree),
        "base_precision": config.base_precision,
        "mixed_precision": mixed_precision,
        "cp_degree": parallel.cp_degree,
        "timestep_sampling": sampling,
        "targets": list(config.targets or family.lora_targets),
        "num_frames": list(buckets_of(config, family).frames),
        "fps": (rate_of(config, family) or 0.0) if family.kind == "video" else None,
    }
    settings = {name: resolved[name] for name in config.as_dict() if name not in _OMITTED}
    for name in _PATHS:
        value = settings[name]
        if value and (name == "output_dir" or Path(value).exists()):
            settings[name] = str(Path(value).resolve())
    for entry in settings["datasets"] or []:
        if Path(entry["path"]).exists():
            entry["path"] = str(Path(entry["path"]).resolve())
    path = config.output / RESOLVED
    number = parallel.ranks.size
    heading = (
        f"Settings of the run in this folder, defaults included (diffusers_attn {__version__}, {number} "
        f"process{'es' if number > 1 else ''}).\nTo repeat it in another folder: --config {RESOLVED} --output_dir ..."
    )
    write_run_file(path, settings, GROUPS, heading)
    return path
