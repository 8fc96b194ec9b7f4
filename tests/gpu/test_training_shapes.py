"""Training at the size of a real model: memory that small tensors do not reach, and gradients laid out as blocks do."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from .. import launching
from ..documents import ROOT
from .cases import GRAD_TOLERANCE, build_lacks, providers
from .flux_attention import HEAD_DIM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("provider", ["auto", *providers(lambda can: can.backward and torch.bfloat16 in can.dtypes)])
def test_attention_of_flux(provider, record):
    if build_lacks(provider, HEAD_DIM):
        pytest.skip(f"{provider}: this flash-attn was built without head_dim {HEAD_DIM} (DIFFUSERS_ATTN_FLASH_LACKS)")
    done = launching.run(
        [sys.executable, "-m", "tests.gpu.flux_attention", provider],
        cwd=ROOT,
        env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"},
    )
    assert done.returncode == 0, f"{provider}: {done.stderr[-2000:]}"
    for name, error in json.loads(done.stdout.splitlines()[-1]).items():
        record(provider, f"{name.split()[-1]} of Flux", error, GRAD_TOLERANCE[torch.bfloat16])
