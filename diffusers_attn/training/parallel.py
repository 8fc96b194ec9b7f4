"""Data parallelism times context parallelism under Accelerate, for a training loop of one's own.

    accelerator = Accelerator()
    parallel = TrainingParallel.of(accelerator, cp_degree=2)   # 1: which processes share a sequence
    transformer.add_adapter(lora_config)
    parallel.enable(transformer, provider="flash_4")           # 2: after adapters were added, before prepare
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    for step, batch in enumerate(loader):
        noise = torch.randn(shape, generator=parallel.generator(seed, step))   # 3: alike where a sequence is shared
        if step == 0:
            parallel.check({**batch, "noise": noise})

Nothing else in the loop changes, and nothing is to be scaled: all collectives of context parallelism have their true
adjoints, so that the mean of gradients over all processes, which DDP and FSDP2 take, is the gradient of one process on
the global batch.

Where `apply_compile` compiles the blocks, set `torch._dynamo.config.optimize_ddp = False`: DDP otherwise cuts each of
them in two where its buckets of gradients end. (`Trainer` does so for its own run.)

Processes that are neighbours share a sequence. A plain `Accelerator()` wraps the model with DDP over all processes.
With FSDP2, parameters are sharded over data and context parallelism together, which Accelerate must be told as well
(`parallelism_config_cp_size` of its configuration, the same number).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..context_parallel import job as jobs
from ..context_parallel.comm import shared_groups
from ..context_parallel.config import ContextParallelConfig
from ..parallelize.degrees import Degrees, Topology, complete_degrees
from ..parallelize.enable import enable_context_parallel
from ..parallelize.fingerprint import fingerprint
from ..parallelize.report import ContextParallelReport
from ..parallelize.targets import find_targets, models_of, split_heads
from ..processors import set_attention_provider
from ..providers.catalog import SPECS
from ..providers.registry import provider_name
from .errors import TrainingError
from .job_ranks import JobRanks
from .randomness import generator

SUPPORTED = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
"""names of Accelerate's distributed types under which gradients are known to be right."""


class TrainingParallel:
    """Who shares a sequence with whom. Make one with `of`.

    Attributes:
        cp_degree, cp_rank: how many processes share each sequence, and which of them this is.
        dp_degree, dp_rank: how many groups of them there are, each with data of its own, and which this is.
        mesh: dimensions "dp", "ring" and "ulysses", once `enable` made it; None without context parallelism.
        ranks: all processes.
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
        """Settles who shares a sequence. To be called on all processes.

        From then on loaders that this accelerator prepares give the processes of a group the same batches, and
        `accelerator.maybe_context_parallel`, which would split sequences a second time, raises.

        Args:
            accelerator: an `accelerate.Accelerator`: of one process, with DDP, or with FSDP2.
            cp_degree: processes that share a sequence; None is the product of the next two, or else what Accelerate's
                ParallelismConfig says, or else 1.
            ulysses_degree, ring_degree: see `enable_context_parallel`. What is None follows, or is chosen.
            rotate_method: of a ring: "allgather" or "alltoall".

        Raises:
            TrainingError: settings of Accelerate's that this does not go with, or degrees that do not fit; names them.
            AttentionProviderError: a value that is no degree.
        """
        for name, degree in (
            ("cp_degree", cp_degree),
            ("ulysses_degree", ulysses_degree),
            ("ring_degree", ring_degree),
        ):
            if degree is not None and (not isinstance(degree, int) or isinstance(degree, bool) or degree < 1):
                raise TrainingError(f"{name}={degree!r}: a whole number from 1 is accepted, where 1 switches it off.")
        if rotate_method is not None:
            ContextParallelConfig(rotate_method=rotate_method)  # raises where it is none
        _check_accelerator(accelerator)
        cp = _degree(accelerator, cp_degree, ulysses_degree, ring_degree)
        _check_degree(accelerator, cp)
        if cp == 1 and rotate_method is not None:
            raise TrainingError(
                f"rotate_method={rotate_method!r} says how keys and values travel between processes that share a "
                "sequence, and none do (cp_degree=1). Leave it out, or set cp_degree."
            )
        parallel = TrainingParallel(accelerator, cp, ulysses_degree, ring_degree, rotate_method)
        if cp > 1:
            parallel._tell_accelerator()
        return parallel

    def _tell_accelerator(self) -> None:
        accelerator = self._accelerator
        accelerator.maybe_context_parallel = _refuse_second_split
        # A loader of an IterableDataset is otherwise read by the first process, which deals out its batches to all.
        accelerator.dataloader_config.dispatch_batches = False
        if accelerator.distributed_type != "FSDP":  # there the mesh is Accelerate's own
            # Accelerate's loaders look here for who has the same data, and know no other names.
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
        """Splits every sequence of a model, or of a pipeline's transformers, within this process's group.

        To be called on all processes, after adapters were added and before `accelerator.prepare`. With cp_degree=1 it
        only binds attention to `provider`, if one is named. With FSDP2, mixed precision becomes autocast, as without.

        Args:
            pipeline_or_model: as in `enable_context_parallel`; on its device already.
            provider: the attention kernel, by name; it needs a backward. None leaves the choice to
                `enable_context_parallel`, or without context parallelism attention as it is.
            inputs: see `enable_context_parallel`. "check" makes differing inputs an error and waits for the device in
                every forward; "trust" is for loops that call `check` themselves. ("broadcast" would hide differing
                noise from the model, and not from the loss.)
            timeout: how long a process waits for the others in its group, in seconds; None is the job's own.
            check_weights: whether values of all weights are compared once, now.
            provider_options: options of the provider's kernel.

        Returns:
            What was done; None without context parallelism.

        Raises:
            TrainingError: the provider has no backward, or FSDP2 would hook the model's attention.
            AttentionProviderError: as `enable_context_parallel` does.
        """
        device = self._accelerator.device.type
        if provider is not None:
            check_trainable(provider, device, parts=self.cp_degree > 1)
        sharded = self._accelerator.distributed_type == "FSDP"
        report = None
        if self.cp_degree > 1:
            if sharded:
                _check_no_self_attn(pipeline_or_model)
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
                verbose=False,
                **provider_options,
            )
        elif provider is not None:
            set_attention_provider(pipeline_or_model, provider, **provider_options)
        elif provider_options:
            raise TrainingError(
                f"{', '.join(map(repr, provider_options))} are options of a provider, and none is named. Name "
                "the one whose options they are: provider='flash'."
            )
        if sharded:
            _autocast_instead(self._accelerator, pipeline_or_model)
        return report

    def _degrees(self, pipeline_or_model: Any, provider: str | None, device: str) -> Degrees:
        targets, _ = find_targets(pipeline_or_model, None)
        name = None if provider is None else provider_name(provider)
        topology = Topology(
            ranks=self.cp_degree,
            device_type=device,
            heads=tuple(sorted({heads for target in targets for heads in split_heads(target)})),
            ranks_per_node=jobs.ranks_per_node(),
            peer_access=jobs.peer_access(device),
            lse=name not in SPECS or SPECS[name].capabilities.lse,
            rotate_method=self._rotate_method,
        )
        return complete_degrees(topology, self._ulysses_degree, self._ring_degree)

    def generator(self, seed: int, step: int) -> torch.Generator:
        """On the CPU, for all that is random in a step: noise, timesteps, dropout of captions, samples of a posterior.
        The same on the processes that share a sequence, another one in every other group and step."""
        return generator(seed, "step", step, self.dp_rank)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compares what the processes are about to train on. Waits for the device: for a first step. To be called on
        all processes.

        Args:
            tensors: by name, the batch and all that was drawn for it.

        Raises:
            TrainingError: processes that share a sequence have different ones, or two groups have the same ones of
                all. On all processes; names the tensors and ranks.
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
                    f"ranks {first} to {first + self.cp_degree - 1} share every sequence and were given different "
                    f"{', '.join(differing)}. Draw with parallel.generator(seed, step), not from the global generator; "
                    "give loaders the same seed on all processes (no set_seed(..., device_specific=True)); or let "
                    "dp_rank and dp_degree say who reads what."
                )
        seen: dict[str, int] = {}
        for number, group in enumerate(groups if mine else []):
            other = seen.setdefault(str(sorted(group[0].items())), number)
            if other != number:
                raise TrainingError(
                    f"ranks {other * self.cp_degree} and {number * self.cp_degree} are in different data-parallel "
                    f"groups and were given the same {', '.join(sorted(mine))}, as if the batch were "
                    f"{self.dp_degree} times smaller. Let dp_rank and dp_degree say who reads what, and draw with "
                    "parallel.generator(seed, step)."
                )


def _mesh(device: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A new mesh of all processes, whose groups wait as long as those of the job do."""
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():
        shared_groups.give_timeout(group, shared_groups.as_timeout(None, device), device, always=False)
    return mesh


def check_trainable(provider: str, device_type: str, parts: bool = False) -> None:
    """Raises TrainingError where a provider cannot compute gradients.

    Args:
        provider: a name of `AttentionProvider`. ("auto" takes only providers that can.)
        device_type: where the model is.
        parts: whether attention goes over several devices, for which a backward of parts is needed.
    """
    name = provider_name(provider)
    if name not in SPECS:
        return

    def able(name: str) -> bool:
        has = SPECS[name].capabilities
        return has.backward and device_type not in has.without_backward_on and (has.backward_of_parts or not parts)

    if not able(name):
        others = ", ".join(other for other in SPECS if able(other) and device_type in SPECS[other].capabilities.devices)
        where = " over several devices" if parts and SPECS[name].capabilities.backward else ""
        raise TrainingError(
            f"attention provider '{name}' has no backward{where} on {device_type}, which training needs. Those that "
            f"have one: {others}."
        )


def _check_accelerator(accelerator: Any) -> None:
    """Raises TrainingError for what gradients would be wrong under, with or without context parallelism."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in SUPPORTED:
        raise TrainingError(
            f"Accelerate's distributed_type is {kind}; accepted are one process, DDP (MULTI_GPU, MULTI_CPU) and FSDP2. "
            "Choose one of these with `accelerate config`, or take a file of examples/accelerate_configs."
        )
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise TrainingError(
            f"fsdp_version={accelerator.state.fsdp_plugin.fsdp_version}: only FSDP2 is accepted. Set fsdp_version: 2 "
            "in Accelerate's fsdp_config, or pass --fsdp_version 2 to accelerate launch."
        )
    config = accelerator.parallelism_config
    for axis in ("tp", "sp"):
        size = getattr(config, f"{axis}_size", 1) or 1
        if size > 1:
            raise TrainingError(
                f"parallelism_config_{axis}_size={size}: only data and context parallelism are accepted. Set it to 1."
            )


def _autocast_instead(accelerator: Any, pipeline_or_model: Any) -> None:
    """Gives models under FSDP2 the mixed precision that Accelerate gives them without it, unless the user set a policy.

    Accelerate leaves it to a policy of FSDP2's, which rounds all that blocks and the model are given, such as timesteps
    and rotary frequencies, weights that diffusers keeps in float32 for a reason, and gradients before they are reduced:
    losses are off by percents. Autocast does what is needed, and FSDP2 then only shards.
    """
    from accelerate.utils import convert_outputs_to_fp32
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    own = MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)
    if dtype is None or plugin.mixed_precision_policy not in own:
        return
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    model: Any
    for model in models_of(pipeline_or_model):
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))


def _degree(accelerator: Any, cp_degree: int | None, ulysses_degree: int | None, ring_degree: int | None) -> int:
    named = (ulysses_degree or 1) * (ring_degree or 1)
    configured = getattr(accelerator.parallelism_config, "cp_size", 1) or 1
    both = ulysses_degree is not None and ring_degree is not None
    if cp_degree is None:
        return named if ulysses_degree or ring_degree else configured
    if cp_degree % named or (both and named != cp_degree):
        raise TrainingError(
            f"ulysses_degree={ulysses_degree} and ring_degree={ring_degree} for cp_degree={cp_degree}: their product "
            "must be cp_degree. Leave one or two of the three out, and they follow."
        )
    return cp_degree


def _check_degree(accelerator: Any, cp: int) -> None:
    world = accelerator.num_processes
    configured = getattr(accelerator.parallelism_config, "cp_size", 1) or 1
    if configured not in (1, cp):
        raise TrainingError(
            f"cp_degree={cp}, and Accelerate's configuration has parallelism_config_cp_size={configured}. Give both "
            "the same number."
        )
    if cp == 1:
        return
    if world == 1:
        raise TrainingError(f"cp_degree={cp}, and this job has one process. {jobs.HOW_TO_LAUNCH}.")
    if world % cp:
        raise TrainingError(
            f"cp_degree={cp} does not divide the {world} processes (--num_processes). Accepted are "
            f"{[degree for degree in range(1, world + 1) if world % degree == 0]}."
        )
    if accelerator.distributed_type == "FSDP" and configured != cp:
        raise TrainingError(
            f"cp_degree={cp} with FSDP2: parameters must be sharded over the processes that share a sequence too. "
            f"Set parallelism_config_cp_size: {cp} in Accelerate's parallelism_config (or pass "
            f"--use_parallelism_config --parallelism_config_cp_size {cp} to accelerate launch)."
        )
    loaders = accelerator.dataloader_config
    if loaders.split_batches:
        raise TrainingError(
            f"split_batches=True with cp_degree={cp}: batches would be split among processes that need the same one. "
            "Leave it out of Accelerate's DataLoaderConfiguration."
        )
    if loaders.dispatch_batches:
        raise TrainingError(
            f"dispatch_batches=True with cp_degree={cp}: the first process would deal out parts of a batch to "
            "processes that need the same one. Set dispatch_batches=False in Accelerate's DataLoaderConfiguration."
        )


def _check_no_self_attn(pipeline_or_model: Any) -> None:
    # Accelerate hooks modules of this name when it prepares a model with FSDP2 and a cp_size: it drops their masks.
    for model in models_of(pipeline_or_model):
        for name, _ in model.named_modules():
            if name.split(".")[-1].endswith("self_attn") and type(model).__module__.startswith("diffusers"):
                raise TrainingError(
                    f"{type(model).__name__} has '{name}', whose masks Accelerate drops where FSDP2 has a "
                    "parallelism_config_cp_size. Train this model with DDP."
                )


def _refuse_second_split(*args: Any, **kwargs: Any) -> Any:
    raise TrainingError(
        "accelerator.maybe_context_parallel() would split sequences a second time, which diffusers_attn split already. "
        "Leave it out: nothing takes its place."
    )
