"""The model and the plans of docs/writing_plans.md: a small transformer without a plan, and the steps to one.

python examples/writing_plans.py         # verifies the first attempt, and the plan
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusers_attn import CPAttention, CPInput, CPOutput, ParamId, attention_dispatch, verify_cp_plan

HEADS, CHANNELS = 4, 32


class Attention(nn.Module):
    """Self-attention; with a text, cross-attention to it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))

    def forward(self, hidden_states: Tensor, text: Tensor | None = None, angles: Tensor | None = None) -> Tensor:
        seen = hidden_states if text is None else text
        query, key, value = (
            project(tensor).unflatten(2, (HEADS, -1))
            for project, tensor in ((self.to_q, hidden_states), (self.to_k, seen), (self.to_v, seen))
        )
        if angles is not None:
            query, key = rotated(query, angles), rotated(key, angles)
        out = attention_dispatch(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.to_out(out.transpose(1, 2).flatten(2))


def rotated(tensor: Tensor, angles: Tensor) -> Tensor:
    """Rotates `[batch, tokens, heads, channels]` by angles `[tokens, channels / 2]`."""
    turned = (
        torch.view_as_complex(tensor.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross_attn = Attention(), Attention()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)

    def forward(self, hidden_states: Tensor, text: Tensor, angles: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), angles=angles)
        return hidden_states + self.cross_attn(self.norm2(hidden_states), text=text)


class Rotary(nn.Module):
    def forward(self, length: int) -> Tensor:
        frequencies = 10.0 ** -torch.arange(CHANNELS // HEADS // 2)
        return torch.arange(length)[:, None] * frequencies


class SmallTransformer(nn.Module):
    """An image whose tokens attend to each other and to a text."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.rope = nn.Linear(8, CHANNELS), Rotary()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.proj_out = nn.Linear(CHANNELS, 8)

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        angles = self.rope(hidden_states.shape[1])
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, text, angles)
        return self.proj_out(hidden_states)


FIRST_ATTEMPT = {
    "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="image")},
    "blocks.*.attn": CPAttention(("image",)),
    "blocks.*.cross_attn": CPAttention(("image",), key=()),
    "proj_out": CPOutput(1, 3, sequence="image"),
}
PLAN = {**FIRST_ATTEMPT, "rope": {ParamId(index=0): CPInput(0, 2, split_output=True, sequence="image")}}


def inputs() -> dict[str, Tensor]:
    """Two samples of 35 tokens, a number that neither 2 nor 3 divides."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 35, 8, generator=generator),
        "text": torch.randn(2, 13, CHANNELS, generator=generator),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    model = SmallTransformer()
    print(verify_cp_plan(model, inputs(), FIRST_ATTEMPT))
    print(verify_cp_plan(model, inputs(), PLAN, gradients=True))
