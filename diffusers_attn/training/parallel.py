"""Data parallelism times context parallelism under Accelerate, for your own training loop.

    accelerator = Accelerator()
    parallel = TrainingParallel.of(accelerator, cp_degree=2)   # 1: two neighbouring processes share a sequence
    transformer.add_adapter(lora_config)
    parallel.enable(transformer, provider="flash_4")           # 2: after adapters were added, before prepare
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    for step, batch in enumerate(loader):
        noise = torch.randn(shape, generator=parallel.generator(seed, step))   # 3: the same for a shared sequence
        if step == 0:
            parallel.check({**batch, "noise": noise})

Nothing else in the loop changes, and no gradient needs scaling. All collectives of context parallelism have their true
adjoints. So the mean of gradients over all processes, as DDP and FSDP2 compute it, is the gradient of one process on
the global batch.

If `apply_compile` compiles the blocks, set `torch._dynamo.config.optimize_ddp = False`. DDP otherwise splits each block
where one of its gradient buckets ends. (`Trainer` sets it for its own run.)

Neighbouring ranks share a sequence. A plain `Accelerator()` wraps the model with DDP over all processes. FSDP2 shards
parameters over data and context parallelism together; for this, Accelerate's configuration needs the same degree as
`parallelism_config_cp_size`.
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..context_parallel import job as jobs
from ..context_parallel.comm import shared_groups
from ..context_parallel.config import ContextParallelConfig
from ..parallelize.decide import decide_degrees
from ..parallelize.degrees import Degrees, Topology, complete_degrees
from ..parallelize.enable import enable_context_parallel
from ..parallelize.fingerprint import fingerprint
from ..parallelize.report import ContextParallelReport
from ..parallelize.targets import find_targets, models_of, split_heads
from ..processors import attention_modules, set_attention_provider
from ..providers.catalog import SPECS
from ..providers.registry import provider_name
from .accelerate_setup import (
    autocast_instead,
    check_accelerator,
    check_degree,
    check_no_self_attn,
    degree_of,
    refuse_second_split,
)
from .errors import TrainingError
from .job_ranks import JobRanks
from .randomness import generator


class TrainingParallel:
    """The groups of processes that share sequences. Create it with `TrainingParallel.of`.

    Attributes:
        cp_degree: number of processes that share each sequence.
        cp_rank: index of this process in its group, from 0.
        dp_degree: number of groups. Each trains on data of its own.
        dp_rank: index of this process's group, from 0.
        mesh: device mesh with dimensions "dp", "ring" and "ulysses", created by `enable`; None before, and without
            context parallelism.
        ranks: all processes of the job.
    """

    def __init__(
        self,
        accelerator: Any,
        cp_degree: int,
        ulysses_degree: int | None,
        ring_degree: int | None,
        rotate_method: str | None,
    ) -> None:
        world, rank = accelerator.num_processes, accelerator.process_index
        self.ranks = JobRanks(accelerator)
        self.cp_degree, self.cp_rank = cp_degree, rank % cp_degree
        self.dp_degree, self.dp_rank = world // cp_degree, rank // cp_degree
        self.mesh: DeviceMesh | None = None
        self._accelerator = accelerator
        self._ulysses_degree, self._ring_degree = ulysses_degree, ring_degree
        self._rotate_method = rotate_method

    @staticmethod
    def of(
        accelerator: Any,
        cp_degree: int | None = None,
        *,
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
        rotate_method: str | None = None,
    ) -> TrainingParallel:
        """Divides the processes into groups that share sequences. All processes must call this.

        Afterwards, loaders prepared by this accelerator give all processes of a group the same batches.
        `accelerator.maybe_context_parallel`, which would split sequences a second time, raises.

        Args:
            accelerator: an `accelerate.Accelerator` for one process, DDP or FSDP2.
            cp_degree: number of processes that share a sequence. None: `ulysses_degree * ring_degree` if either is
                given, else the size in Accelerate's ParallelismConfig, else 1.
            ulysses_degree: see `enable_context_parallel`. None: derived from `cp_degree` and `ring_degree`, or chosen
                automatically.
            ring_degree: as `ulysses_degree`.
            rotate_method: exchange of keys and values in a ring: "allgather" or "alltoall". None: automatic.

        Returns:
            The groups.

        Raises:
            TrainingError: a degree is not a positive integer, the degrees do not fit together or do not divide the
                number of processes, or Accelerate's configuration cannot be combined with them.
            AttentionProviderError: an unknown `rotate_method`.
        """
        for name, degree in (
            ("cp_degree", cp_degree),
            ("ulysses_degree", ulysses_degree),
            ("ring_degree", ring_degree),
        ):
            if degree is not None and (not isinstance(degree, int) or isinstance(degree, bool) or degree < 1):
                raise TrainingError(f"{name}={degree!r}: a whole number from 1 is accepted; 1 turns it off.")
        if rotate_method is not None:
            ContextParallelConfig(rotate_method=rotate_method)  # raises for an unknown name
        check_accelerator(accelerator)
        cp = degree_of(accelerator, cp_degree, ulysses_degree, ring_degree)
        check_degree(accelerator, cp)
        if cp == 1 and rotate_method is not None:
            raise TrainingError(
                f"rotate_method={rotate_method!r} has no effect with cp_degree=1: no processes share a sequence. Leave "
                "it out, or set cp_degree."
            )
        parallel = TrainingParallel(accelerator, cp, ulysses_degree, ring_degree, rotate_method)
        if cp > 1:
            parallel._configure_accelerator()
        return parallel

    def _configure_accelerator(self) -> None:
        """Sets up the accelerator so that its loaders give a group's processes the same batches."""
        accelerator = self._accelerator
        accelerator.maybe_context_parallel = refuse_second_split
        # By default, rank 0 reads an IterableDataset and distributes its batches among all processes.
        accelerator.dataloader_config.dispatch_batches = False
        if accelerator.distributed_type != "FSDP":  # FSDP uses Accelerate's own mesh
            # Accelerate's loaders read this mesh to find processes with the same data. The names are Accelerate's.
            shape = (self.dp_degree, self.cp_degree)
            accelerator.state.device_mesh = _mesh(accelerator.device.type, shape, ("dp_replicate", "cp"))

    def enable(
        self,
        pipeline_or_model: Any,
        *,
        provider: str | None = None,
        inputs: Literal["broadcast", "check", "trust"] = "check",
        timeout: datetime.timedelta | float | None = None,
        check_weights: bool = False,
        **provider_options: Any,
    ) -> ContextParallelReport | None:
        """Splits every sequence of a model, or of a pipeline's transformers, over this process's group.

        All processes must call this, after adapters were added and before `accelerator.prepare`. With cp_degree=1 it
        only binds attention to `provider`. With FSDP2, mixed precision is computed by autocast, as without.

        Args:
            pipeline_or_model: as in `enable_context_parallel`; already on its device.
            provider: name of an attention kernel with a backward. None: chosen by `enable_context_parallel`; with
                cp_degree=1, "auto" if the model has attention of diffusers.
            inputs: see `enable_context_parallel`. "check" raises if inputs differ, and waits for the device in every
                forward. "trust" is for loops that call `check` themselves. ("broadcast" corrects differing noise in
                the model's input, but not in your loss.)
            timeout: seconds that a process waits for the others of its group. None: the process group's timeout.
            check_weights: whether to compare the values of all weights once, now.
            provider_options: options of the provider's kernel.

        Returns:
            A report of the chosen degrees and what they apply to; None with cp_degree=1.

        Raises:
            TrainingError: the provider has no backward, options are given without a provider or are for inference
                (`shard_weights`), or FSDP2 would drop the model's attention masks.
            AttentionProviderError: as in `enable_context_parallel`.
        """
        _check_options(provider_options)
        device = self._accelerator.device.type
        if provider is not None:
            check_trainable(provider, device, parts=self.cp_degree > 1)
        sharded = self._accelerator.distributed_type == "FSDP"
        report = None
        if self.cp_degree > 1:
            if sharded:
                check_no_self_attn(pipeline_or_model)
            degrees = self._degrees(pipeline_or_model, provider, device)
            shape = (self.dp_degree, degrees.ring_degree, degrees.ulysses_degree)
            if self.mesh is None or tuple(self.mesh.shape) != shape:
                self.mesh = _mesh(device, shape, ("dp", "ring", "ulysses"))
            report = enable_context_parallel(
                pipeline_or_model,
                provider=provider,
                rotate_method=degrees.rotate_method,
                mesh=self.mesh["ring", "ulysses"],
                inputs=inputs,
                timeout=timeout,
                check_weights=check_weights,
                cuda_graphs=False,  # a validation records nothing: it takes a few steps, between changes of weights
                verbose=False,
                **provider_options,
            )
        elif provider is None and provider_options:
            raise TrainingError(
                f"options {', '.join(map(repr, provider_options))} belong to a provider, but no provider is given. "
                "Name it, for example provider='flash'."
            )
        elif provider is not None or any(attention_modules(each) for each in models_of(pipeline_or_model)):
            # Not as diffusers calls PyTorch: its choice on Hopper, cuDNN, cannot train Flux (docs/troubleshooting.md).
            set_attention_provider(pipeline_or_model, provider or "auto", **provider_options)
        if sharded:
            autocast_instead(self._accelerator, pipeline_or_model)
        return report

    def _degrees(self, pipeline_or_model: Any, provider: str | None, device: str) -> Degrees:
        targets, _ = find_targets(pipeline_or_model, None)
        name = None if provider is None else provider_name(provider)
        job = Topology(
            ranks=self.cp_degree,
            device_type=device,
            heads=tuple(sorted({heads for target in targets for heads in split_heads(target)})),
            ranks_per_node=jobs.ranks_per_node(),
            lse=name not in SPECS or SPECS[name].capabilities.lse,
            rotate_method=self._rotate_method,
        )
        if self._ulysses_degree is None and self._ring_degree is None:
            return decide_degrees(job, targets, [name or ("auto" if device == "cuda" else "native")])
        return complete_degrees(job, self._ulysses_degree, self._ring_degree)

    def generator(self, seed: int, step: int) -> torch.Generator:
        """A generator on the CPU for everything random in a step: noise, timesteps, caption dropout, posterior samples.

        Processes that share a sequence get the same generator. Other groups and other steps get different ones.

        Args:
            seed: seed of the run.
            step: number of the optimizer step or micro-batch.
        """
        return generator(seed, "step", step, self.dp_rank)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compares the processes' batches. Call it in the first step, on all processes; it waits for the device.

        Args:
            tensors: the batch and all random tensors drawn for it, by name.

        Raises:
            TrainingError: processes that share a sequence have different tensors, or two groups have equal ones. It
                is raised on all processes, and names the tensors and ranks.
        """
        mine = {name: f"{list(tensor.shape)} {tensor.dtype} {fingerprint(tensor)}" for name, tensor in tensors.items()}
        everyone = self.ranks.everyone(mine)
        groups = [everyone[first : first + self.cp_degree] for first in range(0, len(everyone), self.cp_degree)]
        for number, group in enumerate(groups):
            differing = sorted(
                {name for each in group for name in {**group[0], **each} if each.get(name) != group[0].get(name)}
            )
            if differing:
                first = number * self.cp_degree
                raise TrainingError(
                    f"ranks {first} to {first + self.cp_degree - 1} share every sequence but have different "
                    f"{', '.join(differing)}. Draw with parallel.generator(seed, step), not from the global generator. "
                    "Give loaders the same seed on all processes (no set_seed(..., device_specific=True)), or select "
                    "each process's data by dp_rank and dp_degree."
                )
        seen: dict[str, int] = {}
        for number, group in enumerate(groups if mine else []):
            other = seen.setdefault(str(sorted(group[0].items())), number)
            if other != number:
                raise TrainingError(
                    f"ranks {other * self.cp_degree} and {number * self.cp_degree} are in different data-parallel "
                    f"groups but have the same {', '.join(sorted(mine))}, as if the batch were "
                    f"{self.dp_degree} times smaller. Select each process's data by dp_rank and dp_degree, and draw "
                    "with parallel.generator(seed, step)."
                )


def _mesh(device: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of all processes. Its process groups have the timeout of the default group."""
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():
        shared_groups.give_timeout(group, shared_groups.as_timeout(None, device), device, always=False)
    return mesh


def check_trainable(provider: str, device_type: str, parts: bool = False) -> None:
    """Raises TrainingError if a provider cannot compute gradients.

    Args:
        provider: name of a provider. ("auto" only selects providers that can.)
        device_type: device type of the model, such as "cuda".
        parts: whether attention is split over several devices, which needs a backward for partial results.
    """
    name = provider_name(provider)
    if name not in SPECS:
        return

    def trainable(name: str) -> bool:
        has = SPECS[name].capabilities
        return has.backward and device_type not in has.without_backward_on and (has.backward_of_parts or not parts)

    if not trainable(name):
        others = [each for each in SPECS if trainable(each) and device_type in SPECS[each].capabilities.devices]
        where = " over several devices" if parts and SPECS[name].capabilities.backward else ""
        raise TrainingError(
            f"attention provider '{name}' has no backward{where} on {device_type}, which training needs. Providers "
            f"with one: {', '.join(others)}."
        )


def _check_options(options: Mapping[str, Any]) -> None:
    of_inference = sorted(set(options) & set(inspect.signature(enable_context_parallel).parameters))
    if of_inference:
        raise TrainingError(
            f"{', '.join(of_inference)}: enable_context_parallel accepts this for inference, and "
            "TrainingParallel.enable does not. Give degrees to TrainingParallel.of; to shard weights, use FSDP2 in "
            "Accelerate's configuration."
        )
