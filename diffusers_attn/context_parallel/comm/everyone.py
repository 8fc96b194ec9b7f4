"""Gathers a small object of every rank on all ranks, through the job's store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from . import meetings, plain_values, process_groups


def everyone(value: Any, groups: Sequence[dist.ProcessGroup | None]) -> list[Any]:
    """The objects of all ranks of these groups, in the order of the ranks.

    Args:
        value: this rank's object: a plain value, see `plain_values`.
        groups: the groups whose ranks take part. With two groups, objects are gathered along the last one first. None
            is all ranks of the job.

    Raises:
        RankMissingError: a rank has not called this within the timeout of its group.
    """
    answers = [value]
    for group in reversed(groups):
        members = list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)
        device = dist.get_backend_config(group).partition(":")[0]
        parts = meetings.gather_bytes(members, plain_values.to_bytes(answers), process_groups.timeout_of(group, device))
        answers = [each for part in parts for each in plain_values.from_bytes(part)]
    return answers
