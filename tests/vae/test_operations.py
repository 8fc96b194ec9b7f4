"""Single operations on tensors that are split by rows over three ranks, against the full tensor, in float64."""

from __future__ import annotations

import collections
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.context_parallel.comm.group import Group
from diffusers_attn.vae import parts  # noqa: F401  (registers all rules)
from diffusers_attn.vae.row_split import RowSplit
from diffusers_attn.vae.rows import Rows
from diffusers_attn.vae.team import Team

BOUNDS = (0, 4, 7, 12)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(x):
    """`[batch, rows * width, channels]`."""
    return x.flatten(2).transpose(1, 2)


def attention(x, **options):
    return F.scaled_dot_product_attention(*(tokens(each) for each in (x, x + 1, x.flip(1))), **options)


def dispatched(x):
    """Through a provider and a processor's layout, with a mask of keys."""
    x = tokens(x).unflatten(2, (2, 2))
    mask = torch.arange(x.shape[1]) < 60
    return _native_math(x, x + 1, x * 2, mask[None, None, None])


def _native_math(query, key, value, mask):
    with attention_provider("_native_math"):
        return attention_dispatch(*(each.transpose(1, 2) for each in (query, key, value)), attn_mask=mask)


def frames(x):
    """Frames before rows in the sequence, as HunyuanVideo attends."""
    x = torch.stack([x, x + 1], 2)
    x = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(5)
    return F.scaled_dot_product_attention(x, x, x, mask).unflatten(1, (2, 12, 6))


def in_place(x):
    y = x.clone()
    y[:, 1] = x[:, 0] * 2
    return y.add_(1).clamp_(-1, 1)


def scores(x):
    query, key = tokens(x), tokens(x + 1)
    return (query @ key.transpose(1, 2)).softmax(-1) @ tokens(x.flip(1))


def columns(x):
    """As SanaMultiscaleLinearAttention: channels before tokens."""
    query, key, value = x.flatten(2).abs(), x.flatten(2).exp(), x.flip(1).flatten(2)
    both = key.transpose(1, 2) @ query
    linear = (F.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(1, 2)) @ query
    return value @ (both / both.sum(1, keepdim=True)), linear[:, :-1] / linear[:, -1:]


def unshuffled(x):
    batch, channels, height, width = x.shape
    return x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def pieces(x):
    x = x.flatten(2)
    return torch.cat([x[:, :, start : start + 10] * start for start in range(0, 72, 10)], 2)


OPERATIONS = {
    "conv": lambda x: F.conv2d(x, draw(5, 4, 3, 3), draw(5), padding=1),
    "conv of 7 rows": lambda x: F.conv2d(x, draw(4, 1, 7, 7), padding=3, groups=4),
    "conv of 1": lambda x: F.conv2d(x, draw(4, 4, 1, 1)),
    "dilated conv": lambda x: F.conv2d(x, draw(4, 4, 3, 3), padding=2, dilation=2),
    "conv without padding": lambda x: F.conv2d(x, draw(4, 4, 3, 3)),
    "even kernel": lambda x: F.conv2d(x, draw(4, 4, 4, 4), padding="same"),
    "stride": lambda x: F.conv2d(x, draw(4, 4, 3, 3), stride=2, padding=1),
    "padded stride": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), draw(4, 4, 3, 3), stride=2),
    "stride of 3": lambda x: F.conv2d(x, draw(4, 4, 3, 3), stride=3),
    "replicated": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), draw(4, 4, 3, 3)),
    "reflected": lambda x: F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), draw(4, 4, 5, 5)),
    "circular": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), draw(4, 4, 3, 3)),
    "far reflected": lambda x: F.pad(x, (1, 1, 5, 6), mode="reflect"),
    "ones around": lambda x: F.pad(x, (1, 2, 2, 1), value=1.0).sin(),
    "cropped beside the rows": lambda x: F.pad(x, (-1, 2, 1, 1)),
    "padding, then a conv of 1": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)) + 1, draw(4, 4, 1, 1)),
    "padding, then a plain sum": lambda x: F.pad(x, (0, 0, 1, 1)) + draw(14, 6),
    "conv over time": lambda x: F.conv1d(x.permute(0, 2, 3, 1).flatten(0, 2)[:, None], draw(1, 1, 3), padding=1),
    "transposed": lambda x: F.conv_transpose2d(x, draw(4, 4, 2, 2), stride=2),
    "group norm": lambda x: F.group_norm(x, 2, draw(4), draw(4)),
    "group norm of tokens": lambda x: F.group_norm(x.flatten(2), 4),
    "instance norm": lambda x: F.instance_norm(x),
    "batch norm": lambda x: F.batch_norm(x, draw(4), draw(4).abs(), draw(4)),
    "layer norm": lambda x: F.layer_norm(x.movedim(1, -1), (4,), draw(4)),
    "rms norm": lambda x: F.rms_norm(x.movedim(1, -1), (4,), draw(4)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"),
    "nearest to a size": lambda x: F.interpolate(x[:, :, None], size=(3, 24, 9)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pool": lambda x: F.avg_pool2d(x[..., :6], (1, 2)),
    "pool of padded rows": lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2),
    "pool over time": lambda x: F.avg_pool1d(x.permute(0, 2, 3, 1).flatten(0, 2), 2),
    "attention": attention,
    "causal attention": lambda x: attention(x, is_causal=True),
    "attention of frames": frames,
    "attention over time": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 2, 3, 1).reshape(-1, 2, 2)] * 3),
    "attention by a provider": dispatched,
    "attention by products": scores,
    "products of channels": columns,
    "linear": lambda x: F.linear(tokens(x), draw(5, 4), draw(5)),
    "sums": lambda x: (x.mean((2, 3)), x.sum(2), x.mean(1), x.amax((-2, -1), keepdim=True), x.sum()),
    "in place": in_place,
    "broadcasting": lambda x: x * draw(12, 1) + draw(4, 1, 1) - draw(1, 1, 12, 6),
    "slices of tokens": pieces,
    "parts": lambda x: (*x.chunk(2, 1), *x.unbind(1), *x.split([4, 3, 5], 2), x[:, 1:3, :, ::2]),
    "repeated": lambda x: (x.repeat(1, 2, 1, 1), x.repeat_interleave(2, dim=2), x.repeat_interleave(2, dim=1)),
    "squeezed": lambda x: x[:1, :1].squeeze().unsqueeze(0).expand(3, -1, -1),
    "padding that is cut": lambda x: torch.cat(
        [F.pad(x, (0, 0, 1, 1)), F.pad(x + 1, (0, 0, 1, 1))[:, :2], draw(2, 1, 14, 6)], 1
    ),
    "other padding": lambda x: F.pad(x, (0, 0, 1, 1)) + F.pad(x, (0, 0, 1, 1)).repeat(1, 1, 1, 1),
    "gated": lambda x: (F.glu(x, 1), x.index_select(1, torch.tensor([3, 0])), F.prelu(x, draw(4)), x.gt(0).sum()),
    "stacked": lambda x: torch.stack([x, x * 2], 2).flatten(1, 2),
    "cast": lambda x: x.float().double().to(memory_format=torch.channels_last).contiguous(),
}


def split(meshes, x, bounds=BOUNDS):
    mesh = meshes.lines[3]
    team = Team((Group(mesh.get_group().group_name, mesh.get_local_rank(), 3),), len(bounds) - 1)
    rows = Rows(2, bounds)
    return RowSplit(x.narrow(2, bounds[team.shard], rows.count(team.shard)).clone(), rows, team)


def run(meshes, name, mode="no_grad"):
    x = draw(2, 4, 12, 6)
    operation = OPERATIONS[name]
    with getattr(torch, mode)():
        expected, found = operation(x), operation(split(meshes, x))
        if not isinstance(expected, tuple):
            expected, found = (expected,), (found,)
        assert any(isinstance(each, RowSplit) for each in found)
        for one, other in zip(expected, found, strict=True):
            assert one.shape == other.shape
            other = other.full() if isinstance(other, RowSplit) else other
            assert (one - other).abs().max() <= 1e-12
        return True


@pytest.mark.parametrize("name", OPERATIONS)
def test_as_of_the_full_tensor(pool, name):
    assert pool.run(3, run, name=name) == [True] * 3


class Operators(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def operators_of_padding(meshes):
    x = split(meshes, draw(2, 4, 12, 6))
    with torch.no_grad(), Operators() as operators:
        F.pad(x, (1, 1, 1, 1))
    return operators.found


def test_padding_takes_few_operators(pool):
    """The edges are joined, and gathered while the local part is padded. The received rows are written into that. A
    frame of Wan has 36 such exchanges, and its GPU waits for the host to launch them."""
    for rank, found in enumerate(pool.run(3, operators_of_padding)):
        assert not any(name.startswith("_c10d_functional") for name in found)
        kernels = {name: count for name, count in found.items() if name.startswith("aten::") and "empty" not in name}
        assert kernels == {"aten::cat": 1, "aten::constant_pad_nd": 1, "aten::copy_": 2 if rank == 1 else 1}


@pytest.mark.parametrize("name", ["conv", "linear", "normalize", "attention of frames", "slices of tokens"])
def test_in_inference_mode(pool, name):
    assert pool.run(3, run, name=name, mode="inference_mode") == [True] * 3


def run_autocast(meshes):
    x = draw(2, 4, 12, 6).float()
    weight = draw(4, 4, 3, 3).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            expected = F.group_norm(F.conv2d(given, weight, padding=1), 2, weight[:, 0, 0, 0])
            found: Any = F.group_norm(F.conv2d(split(meshes, given), weight, padding=1), 2, weight[:, 0, 0, 0])
            assert found.dtype == expected.dtype
            assert (found.full() - expected).abs().max() < 0.05
    return True


def test_under_autocast(pool):
    assert pool.run(3, run_autocast) == [True] * 3


def run_even(meshes, names):
    x = draw(2, 4, 12, 6)
    for name in names:
        found = {"unshuffled": unshuffled, "pixel unshuffle": functools.partial(F.pixel_unshuffle, downscale_factor=2)}[
            name
        ](split(meshes, x, (0, 4, 6, 12)))
        expected = {"unshuffled": unshuffled, "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2)}[name](x)
        assert torch.equal(found.full(), expected)
    return True


def test_rows_are_moved_to_channels(pool):
    assert pool.run(3, run_even, names=["unshuffled", "pixel unshuffle"]) == [True] * 3


REFUSED = {
    "aten.roll.default": lambda x: x.roll(1, 2),
    "a reshape": lambda x: unshuffled(x),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "by 1.5": lambda x: F.interpolate(x, scale_factor=1.5),
    "row 3 is selected": lambda x: x[:, :, 3],
    "reduces the split dimension": lambda x: x.softmax(2),
    "a tensor of shape (11, 6) meets": lambda x: x + torch.ones(11, 6),
    "not split": lambda x: torch.zeros(2, 4, 12, 6, dtype=torch.float64).copy_(x),
    "split differently": lambda x: x[:, :, :, :1] + x[:, :1].transpose(2, 3)[:, :, :1].transpose(1, 3)[:, :, :, :1],
    "without a row": lambda x: F.conv2d(x, torch.ones(4, 4, 6, 6, dtype=torch.float64), stride=6),
    "so that a rank has none": lambda x: F.conv2d(x[:, :, :5], draw(4, 4, 3, 3), padding=1),
    "a group norm of rows": lambda x: F.group_norm(x[:, :, :5], 2),
    "aten.amax.default of rows": lambda x: x[:, :, 9:].amax(2),
    "aten.flip.default of rows": lambda x: x.flip(2),
    "aten.randn_like": lambda x: torch.randn_like(x),
}


def refusals(meshes):
    x = draw(2, 4, 12, 6)
    return {words: refusal(operation, split(meshes, x)) for words, operation in REFUSED.items()}


def refusal(operation, x):
    try:
        return f"no error: {operation(x)}"
    except AttentionProviderError as error:
        return str(error)


def test_what_mixes_rows_is_an_error_on_all_ranks(pool):
    for found in pool.run(3, refusals):
        for words, error in found.items():
            assert words in error and "cannot be split by rows" in error
