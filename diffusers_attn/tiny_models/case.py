"""What a zoo case is, and the seeded source that its inputs are drawn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch

from ..nested import all_tensors_in
from .weights import cast, randomize

BATCH = 2

# No number of tokens divides by 2 or 3, so that an even split over ranks, or a kernel's block size, never fits by
# accident; height and width differ, so that swapping them shows.
GRID = (5, 7)
FRAMES = 5
IMAGE_TOKENS = GRID[0] * GRID[1]
VIDEO_TOKENS = FRAMES * IMAGE_TOKENS
TEXT = 13
TEXT_LENGTHS = (11, 5)  # valid tokens of each sample, the rest is padding

Config = dict[str, Any]
Inputs = dict[str, Any]


class Draw:
    """A sequence of random tensors that depends only on its seed.

    Everything is drawn on the CPU in float32 and moved afterwards, so that a case is the same on every device and, up
    to rounding, in every dtype.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def floats(self, *values: float) -> torch.Tensor:
        return torch.tensor(values).to(self.device, self.dtype)

    def rows(self, *values: float) -> torch.Tensor:
        """The same values for each sample, [batch, values]."""
        return self.floats(*values).repeat(BATCH, 1)

    def steps(self) -> torch.Tensor:
        """Timesteps out of 1000, one per sample.

        Models feed them into sines of high frequency, where rounding would drown any difference that a test of a
        lower precision looks for: bfloat16 represents these exactly.
        """
        return self.floats(250.0, 700.0)

    def times(self) -> torch.Tensor:
        """Flow-matching times in [0, 1], one per sample; exact in bfloat16, also after multiplication by 1000."""
        return self.floats(0.25, 0.5)

    def guidance(self) -> torch.Tensor:
        """Guidance scales, one per sample; exact in bfloat16, also after multiplication by 1000."""
        return self.floats(4.0, 2.0)

    def mask(self, lengths: tuple[int, int] = TEXT_LENGTHS, total: int = TEXT) -> torch.Tensor:
        """Boolean [batch, total], True for the leading `lengths` tokens: right padding, different in each sample."""
        return (torch.arange(total) < torch.tensor(lengths)[:, None]).to(self.device)

    def grid(self, *sizes: int) -> torch.Tensor:
        """Integer coordinates of all points of a grid, [points, axes], the last axis fastest."""
        axes = [torch.arange(size) for size in sizes]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes)).to(self.device)

    def rotation(self, tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of random rotary angles, [tokens, head_dim]; a pair of neighbouring channels shares its angle."""
        angles = self.normal(tokens, head_dim // 2).float().repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model of diffusers together with inputs for it."""

    name: str
    model_class: str
    config: Mapping[str, object]
    make_inputs: Callable[[torch.device | str, torch.dtype], Inputs]
    notes: str = ""
    # Attention modules (fnmatch patterns) with calls that cannot reach the output, and the reason.
    silent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Why the model cannot run in a lower precision, if it cannot.
    only_float32: str = ""

    def build(
        self, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.nn.Module:
        """Build the model in eval mode, with weights that let every attention call reach the output.

        Some models draw random buffers while they are built: the fork keeps those reproducible without touching the
        global generator of the test that asks for the model.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, self.model_class)(**self.config)
        randomize(model, torch.Generator().manual_seed(seed))
        return cast(model, dtype).to(device).eval()

    def inputs(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Inputs:
        """Keyword arguments of the model's forward."""
        return self.make_inputs(device, dtype)


CASES: dict[str, Case] = {}


def case(
    name: str,
    model_class: str,
    *,
    notes: str = "",
    silent: Mapping[str, str] | None = None,
    only_float32: str = "",
    **config: object,
) -> Callable[[Callable[[Draw], Inputs]], Callable[[Draw], Inputs]]:
    """Register the decorated function as the inputs of a new case.

    The function is returned as it is, so that decorators can be stacked: several configurations, one set of inputs.
    """

    def register(draw_inputs: Callable[[Draw], Inputs]) -> Callable[[Draw], Inputs]:
        if name in CASES:
            raise ValueError(f"the zoo already has a case {name!r}")
        CASES[name] = Case(
            name=name,
            model_class=model_class,
            config=config,
            make_inputs=lambda device, dtype: draw_inputs(Draw(device, dtype)),
            notes=notes,
            silent=silent or {},
            only_float32=only_float32,
        )
        return draw_inputs

    return register


outputs = all_tensors_in
"""The tensors in what a forward returned, in order, however they are nested."""
