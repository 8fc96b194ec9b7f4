"""The samples by which PyTorch tests `F.scaled_dot_product_attention`, through `attention_dispatch`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.providers.catalog import SPECS

from .. import reference
from ..numeric import tolerances
from ..numeric.cell import reason_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _operator() -> Any:
    """PyTorch's description of the function. A private module, which PyTorch's own tests import too."""
    from torch.testing._internal.common_methods_invocations import op_db

    return next(each for each in op_db if each.name == "nn.functional.scaled_dot_product_attention")


def samples(dtype: torch.dtype, requires_grad: bool = True) -> list[Any]:
    return list(_operator().sample_inputs("cpu", dtype, requires_grad=requires_grad))


def outcome(provider: str, sample: Any) -> str:
    """ "passed" if the output and all gradients are PyTorch's, but for the rounding of both; "refused: ..."; or
    "failed: ..."."""
    tensors = [each for each in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(each, Tensor)]
    tensors = [each for each in tensors if each.requires_grad]
    try:
        found = _computed(attention_dispatch, sample, tensors, provider)
        wanted = _computed(F.scaled_dot_product_attention, sample, tensors, provider)
        dtype = sample.input.dtype
        limits = [tolerances.output(provider, dtype, "cpu"), *[tolerances.gradient(dtype, "cpu")] * len(tensors)]
        for one, other, limit in zip(found, wanted, limits, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            error = reference.relative_error(one, other)
            assert error < 2 * limit, f"off by {error:.1e}"
    except AttentionProviderError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return "passed"


def _computed(attention: Any, sample: Any, tensors: list[Tensor], provider: str) -> list[Tensor]:
    torch.manual_seed(0)  # of dropout
    with attention_provider(provider):
        out = attention(sample.input, *sample.args, **sample.kwargs)
    torch.manual_seed(1)
    return [out, *(torch.autograd.grad(out, tensors, torch.randn_like(out)) if tensors else ())]


def count(provider: str) -> dict[str, Any]:
    """The number of samples with each outcome, and the first of those that are not passed, by their messages."""
    counts: Counter[str] = Counter()
    others: dict[str, int] = {}
    without = SPECS[provider].capabilities.without_backward_on if provider in SPECS else ()
    for dtype in DTYPES:
        for sample in samples(dtype, "cpu" not in without):
            found = outcome(provider, sample)
            counts[found.partition(":")[0]] += 1
            if found != "passed":
                kind, _, message = found.partition(": ")
                found = f"{kind}: {reason_of(message)}"
                others[found] = others.get(found, 0) + 1
    return {"counts": dict(counts), "others": others}
