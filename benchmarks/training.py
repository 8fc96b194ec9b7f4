"""Seconds and memory of one LoRA training step on several GPUs: one GPU, diffusers' context parallelism, and ours.

    torchrun --nproc_per_node 2 benchmarks/training.py --compile --output results.json
    torchrun --nproc_per_node 2 benchmarks/training.py --device cpu --size tiny      # tries the script out
    python benchmarks/training.py --markdown results.json more.json                  # prints the tables of runs

The model is Wan 2.1 1.3B at 480p and 81 frames, with random weights. The adapter has rank 32 on the trainer's default
layers, in float32 over a bfloat16 base. A batch is one video; blocks are checkpointed. The loop is one that a user
would write with `diffusers_attn.training`. With diffusers' context parallelism, the loop is the same except for the
loss: the backward of diffusers' gather takes a slice, while the true adjoint is a sum, so DDP's mean of gradients is
too small by the number of ranks. The loss is multiplied by that number before the backward.

"single" is one GPU without DDP, on every rank separately. All variants exist at once: they share the base model's
weights, and each has its own adapter, optimizer, hooks and compiled blocks. They take turns in rounds, in alternating
order, so that a hot GPU affects all of them. A turn is one untimed step and several timed ones, queued without waiting
in between. The time of a step is that of its slowest rank.

In the first step, each variant has the noise and the adapter of an unmodified, uncompiled model on one GPU. Its loss
and gradients, after all communication, are compared with that model's. Activation memory is the allocator's peak in a
step beyond weights, adapter, gradients (kept for this one step) and the optimizer's state. Outside the allocator are
symmetric memory and NCCL's buffers, which count for the first variant that uses a group.

If a variant fails on all ranks, the failure is recorded and the others continue. If it fails on some ranks, the rest
wait in an exchange that cannot end, so all ranks are ended. Earlier results are in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from choices import Choice, blocks, extra_choices
from measuring import MIB, Report, diffusers_on_cpu, dynamo_counts, memory_taken, step_milliseconds
from options import add_options, heading, parse
from ranks import Ranks, RanksDifferError, VariantError
from real_shapes import REAL, TINY, RealModel
from strategies import STRATEGIES

import diffusers_attn
from diffusers_attn.runtime.compile import apply_compile
from diffusers_attn.training import TrainingParallel
from diffusers_attn.training.families.wan import Wan
from diffusers_attn.training.loss import RectifiedFlow, sample_u
from diffusers_attn.training.model.lora import adapter_config, add_adapter, trained_parameters
from diffusers_attn.training.model.optim import make_optimizer
from diffusers_attn.training.randomness import generator

NAMES = ("single", "diffusers-ulysses", "diffusers-ring", "gather", "ulysses", "ring")
SEED = 0
SHIFT = 3.0
"""of Wan at 480p."""


class Task:
    """The task of all variants: the base model, one example, the loss, and the expected result of the first step."""

    def __init__(self, real: RealModel, device: torch.device, rank: int) -> None:
        self.device, self.rank = device, rank
        self.base = real.make(device)
        self.weights = sum(each.numel() * each.element_size() for each in self.base.parameters())
        inputs = real.inputs(device)
        self.clean, self.text = inputs["hidden_states"].float(), inputs["encoder_hidden_states"]
        self.dtype = self.text.dtype
        frames, height, width = self.clean.shape[-3:]
        self.tokens = frames * (height // 2) * (width // 2)
        self.objective = RectifiedFlow(lambda tokens: SHIFT)
        self.loss, self.gradients = self._reference()

    def trainee(self) -> tuple[Any, list[torch.nn.Parameter]]:
        """A model that shares the base's weights, and the parameters of its adapter. None of the matrices is zero, as
        half of them usually are at the start, so that every gradient counts."""
        weights = {id(tensor): tensor for tensor in [*self.base.parameters(), *self.base.buffers()]}
        model = copy.deepcopy(self.base, memo=weights)
        parameters = add_adapter(model, adapter_config("lora", self.rank, None, Wan.lora_targets), SEED)
        drawn = generator(SEED, "adapter")
        for parameter in parameters:
            if not parameter.any():
                parameter.data.copy_(torch.randn(parameter.shape, generator=drawn) * 0.02)
        model.enable_gradient_checkpointing()
        return model.train(), parameters

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """The noise and its level on the device, equal on all ranks, since all have the same example."""
        drawn = generator(SEED, "step", step)
        u = sample_u("logit_normal", [drawn])
        noise = torch.randn(self.clean.shape, generator=drawn)
        if self.device.type == "cuda":  # so that nothing waits
            u, noise = u.pin_memory(), noise.pin_memory()
        return noise.to(self.device, non_blocking=True), u.to(self.device, non_blocking=True)

    def loss_of(self, model: Any, noise: Tensor, u: Tensor) -> Tensor:
        """The loss of one forward."""
        level = self.objective.level(u, self.tokens)
        noisy = self.objective.noisy(self.clean, noise, level)
        prediction = model(
            hidden_states=noisy.to(self.dtype),
            timestep=level.timestep,
            encoder_hidden_states=self.text,
            return_dict=False,
        )[0]
        return self.objective.loss(prediction, self.clean, noise, level).mean()

    def _reference(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the first step, without this library and with another kernel than the variants'."""
        model, _ = self.trainee()
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        mixed = self.dtype != torch.float32
        with sdpa_kernel(kernels), torch.autocast(self.device.type, self.dtype, enabled=mixed):
            loss = self.loss_of(model, *self.draw(0))
        with sdpa_kernel(kernels):
            loss.backward()
        return loss.item(), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of the adapter, by name. Each of its parameters has one."""
    return {name: cast(Tensor, each.grad) for name, each in trained_parameters(model).items()}


class Variant:
    """A way to train, with its measurements."""

    def __init__(self, choice: Choice, task: Task, ranks: Ranks) -> None:
        self.choice, self.task, self.ranks = choice, task, ranks
        self.strategy = STRATEGIES[choice.strategy]
        self.result: dict[str, Any] = {**choice._asdict(), "ranks": 1 if self.alone else ranks.size}
        self.milliseconds: list[float] = []
        self.model: Any
        self.optimizer: Any
        self.number = 0
        """of the next step."""

    @property
    def alone(self) -> bool:
        return self.strategy.side == "single"

    def prepare(self, warm_up: int) -> None:
        """Makes the model, applies the strategy, and runs the first steps."""
        self.began, self.before, self.graphs = time.perf_counter(), memory_taken(self.ranks.device), dynamo_counts()
        on_cpu = self.ranks.device.type == "cpu"
        mixed = "no" if self.task.dtype == torch.float32 else "bf16"
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed)
        model, self.parameters = self.task.trainee()
        self.result["note"] = self._apply(model)
        if self.choice.compiled:
            self._compile(model)
        optimizer = make_optimizer("adamw", self.parameters, fused=not on_cpu)
        if self.alone:  # all that prepare does but DDP
            self.model, self.optimizer = self.accelerator.prepare_model(model, evaluation_mode=True), optimizer
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step(look=self._compare)
        for _ in range(warm_up):
            self.step()
        self.ranks.synchronize()
        self.result["prepare_seconds"] = round(time.perf_counter() - self.began, 1)

    def _apply(self, model: Any) -> str:
        strategy, ranks, provider = self.strategy, self.ranks, self.choice.provider
        self.scale = 1
        if strategy.side == "diffusers":
            self.scale = ranks.size
            mesh = ranks.mesh(strategy)
            config = diffusers.ContextParallelConfig(ring_degree=mesh.size(0), ulysses_degree=mesh.size(1), mesh=mesh)
            model.set_attention_backend(provider)
            with diffusers_on_cpu() if ranks.device.type == "cpu" else contextlib.nullcontext():
                model.enable_parallelism(config=config)
            return ""
        if self.alone:
            TrainingParallel.of(self.accelerator, 1).enable(model, provider=provider)
            return ""
        parallel = TrainingParallel.of(
            self.accelerator,
            ranks.size,
            ring_degree=strategy.ring or None,
            ulysses_degree=strategy.ulysses or None,
            rotate_method=None if strategy.ring == 1 else strategy.rotate_method,
        )
        report = parallel.enable(model, provider=provider, inputs="trust")
        noise, u = self.task.draw(0)
        parallel.check({"clean": self.task.clean, "text": self.task.text, "noise": noise, "u": u})
        return str(report)

    def _compile(self, model: Any) -> None:
        if self.strategy.side == "diffusers":
            model.compile_repeated_blocks(dynamic=False)  # with its graph breaks, if it has any
        else:
            apply_compile(model, dynamic=False)

    def step(self, look: Callable[[float], None] | None = None, keep_gradients: bool = False) -> None:
        """Runs one optimizer step. `look` is called with the loss after the backward."""
        loss = self.task.loss_of(self.model, *self.task.draw(self.number))
        self.accelerator.backward(loss * self.scale)
        if look is not None:
            look(loss.item())
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        self.number += 1

    def _compare(self, loss: float) -> None:
        """Stores the errors of the first step's loss and gradients."""
        square = wrong = torch.zeros((), device=self.ranks.device, dtype=torch.float64)
        for name, gradient in gradients(self.model).items():
            square = square + gradient.double().square().sum()
            wrong = wrong + (gradient - self.task.gradients[name]).double().square().sum()
        expected = sum(each.double().square().sum() for each in self.task.gradients.values())
        self.first = {
            "loss": loss,
            "gradient_norm": square.sqrt().item(),
            "gradient_error": (wrong / expected).sqrt().item(),
        }

    def measure(self) -> dict[str, Any]:
        """Measures this rank's first step and memory, after `prepare`."""
        own: dict[str, Any] = dict(self.first)
        if self.ranks.device.type == "cuda":
            self.step(keep_gradients=True)
            static, outside = memory_taken(self.ranks.device)
            torch.cuda.reset_peak_memory_stats()
            self.step()
            self.ranks.synchronize()
            own["activation_mib"] = round((torch.cuda.max_memory_allocated() - static) / MIB, 1)
            own["static_mib"] = round((static - self.before[0] + self.task.weights) / MIB, 1)
            own["outside_allocator_mib"] = round((outside - self.before[1]) / MIB)
        return own | {name: count - self.graphs[name] for name, count in dynamo_counts().items()}

    def turn(self, steps: int) -> None:
        """Times several steps, after an untimed one."""
        self.ranks.gather(None)  # they start together
        own = self.ranks.attempt(lambda: step_milliseconds(self.step, steps, self.ranks.device))
        self.milliseconds += [max(times) for times in zip(*own)]
        self.result |= {
            "seconds": round(statistics.median(self.milliseconds) / 1e3, 4),
            "fastest": round(min(self.milliseconds) / 1e3, 4),
            "steps": [round(ms / 1e3, 4) for ms in self.milliseconds],
        }

    def close(self) -> None:
        """Removes hooks and frees memory."""
        if self.strategy.side == "ours" and hasattr(self, "model"):
            diffusers_attn.disable_context_parallel(self.accelerator.unwrap_model(self.model))
        self.model = self.optimizer = self.accelerator = None
        self.parameters = []


def choose(args: argparse.Namespace, ranks: int) -> list[Choice]:
    """All combinations of strategies and providers that this number of ranks supports, and the extras."""
    choices = []
    for name in args.strategies:
        side = STRATEGIES[name].side
        providers = args.diffusers_backends if side == "diffusers" else args.providers
        choices += [Choice(name, each, args.compile) for each in providers if side == "single" or ranks > 1]
    return list(dict.fromkeys(choices + extra_choices(args.extra, NAMES, args.compile)))


def bench(task: Task, args: argparse.Namespace, ranks: Ranks, report: Report, began: float) -> None:
    def late() -> bool:
        """Whether the time is up on rank 0, for all ranks."""
        return bool(args.seconds and ranks.gather(time.monotonic() - began)[0] > args.seconds)

    report.variants = [Variant(choice, task, ranks) for choice in choose(args, ranks.size)]
    ready: list[Variant] = []
    for variant in report.variants:
        try:
            if late():
                variant.result["error"] = f"not started: --seconds {args.seconds:g} were over"
                continue
            ranks.attempt(lambda: variant.prepare(args.warm_up))  # noqa: B023 (called at once)
            own = ranks.attempt(variant.measure)
            variant.result |= {key: [each[key] for each in own] for key in own[0]}
            variant.turn(args.steps)
            ready.append(variant)
        except VariantError as failure:
            variant.result["error"] = str(failure)
            with contextlib.suppress(Exception):  # it may have failed at any point
                variant.close()
        except RanksDifferError as failure:
            variant.result["error"] = str(failure)
            raise
        finally:
            report.write()
            if ranks.rank == 0:
                print(_line(variant.result), file=sys.stderr, flush=True)
    for turn in range(1, args.rounds):
        if late():
            break
        for variant in list(ready)[:: 1 if turn % 2 == 0 else -1]:
            try:
                variant.turn(args.steps)
            except VariantError as failure:
                variant.result["error"] = str(failure)
                ready.remove(variant)
        report.write()
    for variant in ready:
        variant.close()


def _line(result: dict[str, Any]) -> str:
    found = result.get("error") or (
        f"{result['seconds']:.3f} s, gradient off by {max(result['gradient_error']):.1e}, prepared in "
        f"{result['prepare_seconds']} s"
    )
    return f"{result['strategy']}, {result['provider']}, {blocks(result)}: {found}"


def markdown(report: dict[str, Any]) -> str:
    """The table of a run, and its failures."""
    where, results = report["environment"], report["results"]
    task = f"**{where['task']}**: loss {where['loss']:.5f}, gradient norm {where['gradient_norm']:.5f}"
    lines = [
        heading(where),
        "",
        task,
        "",
        "| strategy | provider | blocks | s per step | of one GPU | efficiency | of diffusers' best | activation MiB "
        "| times ranks, of one GPU's | static MiB | outside MiB | loss | gradient norm | gradient error |",
        "|" + "---|" * 14,
    ]
    measured = [each for each in results if "error" not in each]
    theirs = min((each["seconds"] for each in measured if each["strategy"].startswith("diffusers")), default=None)
    for each in measured:
        alone = _alone(each, measured)
        ratio = alone["seconds"] / each["seconds"] if alone else None
        memory = max(each.get("activation_mib", [0]))
        spread = memory * each["ranks"] / max(alone["activation_mib"]) if alone and memory else None
        cells = [
            each["strategy"],
            f"`{each['provider']}`",
            blocks(each),
            f"{each['seconds']:.4f}",
            f"{ratio:.2f}x" if ratio else "-",
            f"{ratio / each['ranks']:.1%}" if ratio else "-",
            f"{theirs / each['seconds']:.2f}x" if theirs else "-",
            f"{memory:.0f}" if memory else "-",
            f"{spread:.2f}" if spread else "-",
            f"{max(each['static_mib']):.0f}" if memory else "-",
            f"{max(each['outside_allocator_mib'])}" if memory else "-",
            f"{each['loss'][0]:.5f}",
            f"{each['gradient_norm'][0]:.5f}",
            f"{max(each['gradient_error']):.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = dict.fromkeys(
        f"- {each['strategy']}, `{each['provider']}`: {each['note']}" for each in measured if each["note"]
    )
    failed = [f"- {_line(each)}" for each in results if "error" in each]
    return "\n".join([*lines, "", *notes, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def _alone(result: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The result on one GPU with the same provider and compilation, or else with any provider."""
    singles = [each for each in measured if each["strategy"] == "single" and each["compiled"] == result["compiled"]]
    same = [each for each in singles if each["provider"] == result["provider"]]
    return next(iter(same or singles), None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategies", nargs="+", choices=NAMES, default=list(NAMES), help="strategies to run (default: all)"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        help="providers of this library's strategies and of one GPU (default: _native_cudnn flash_4; on a CPU native)",
    )
    parser.add_argument(
        "--diffusers_backends",
        nargs="+",
        help="backends of diffusers' strategies (default: _native_cudnn; on a CPU native)",
    )
    parser.add_argument(
        "--extra",
        nargs="+",
        default=[],
        metavar="STRATEGY:PROVIDER[:eager]",
        help="further variants to run, such as ring:flash:compiled (default: none)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile each block, also under diffusers (default: off)"
    )
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA adapter (default: %(default)s)")
    parser.add_argument(
        "--warm_up", type=int, default=2, help="number of untimed steps after the first (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, help="seconds after which no further variant or round is started (default: no limit)"
    )
    parser.add_argument(
        "--size",
        choices=("full", "tiny"),
        default="full",
        help="size of the model; tiny is for trying this script out (default: %(default)s)",
    )
    add_options(parser, rounds=3, steps=2, tiny=False)
    args = parse(parser, markdown, least=1)
    args.providers = args.providers or (["native"] if args.device == "cpu" else ["_native_cudnn", "flash_4"])
    args.diffusers_backends = args.diffusers_backends or ["native" if args.device == "cpu" else "_native_cudnn"]
    return args


def main() -> None:
    args = parse_arguments()
    began = time.monotonic()
    diffusers.utils.logging.set_verbosity_error()  # that its context parallelism is experimental, for each variant
    # All variants compile the same functions: what one may recompile is not what all may together.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    # Blocks are compiled one by one. DDP's way to overlap one graph's backward would only cut each of them in two.
    torch._dynamo.config.optimize_ddp = False
    ranks = Ranks(args.device, args.timeout)
    report = Report(args.output, ranks, args)

    def measure() -> None:
        real = (TINY if args.size == "tiny" else REAL)["wan"]
        task = Task(real, ranks.device, args.rank)
        norm = torch.stack([each.double().square().sum() for each in task.gradients.values()]).sum().sqrt().item()
        report.environment |= {
            "task": f"{real.title}, LoRA of rank {args.rank}",
            "loss": task.loss,
            "gradient_norm": norm,
        }
        bench(task, args, ranks, report, began)

    ranks.run(measure, report, markdown)


if __name__ == "__main__":
    main()
