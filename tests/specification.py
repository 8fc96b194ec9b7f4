"""The inference example of the document that this project implements, as it stands there, made to run.

`specification_example.txt` is that example, from finetrainers' documentation of its attention backends (Apache-2.0).
It may need other imports, and another plan where diffusers has moved since; the rest must do as it is. What a machine
without GPUs or network needs beside that is the caller's to add.
"""

from __future__ import annotations

from pathlib import Path

TEXT = Path(__file__).with_name("specification_example.txt").read_text()

# Each is (what stands there, what takes its place).
IMPORTS = (
    (
        """\
from finetrainers._metadata import ParamId, CPInput, CPOutput
from finetrainers.parallel.ptd import apply_context_parallel
from finetrainers.models.attention_dispatch import attention_provider, attention_dispatch
""",
        """\
from diffusers_attn import ParamId, CPInput, CPOutput
from diffusers_attn import apply_context_parallel
from diffusers_attn import attention_provider, attention_dispatch
""",
    ),
)
# Wan's rope was one complex tensor, [batch, 1, tokens, channels]; it is cos and sin, [batch, tokens, 1, channels].
PLAN = (
    (
        """\
        ParamId(index=0): CPInput(2, 4, split_output=True),
""",
        """\
        ParamId(index=0): CPInput(1, 4, split_output=True),
        ParamId(index=1): CPInput(1, 4, split_output=True),
""",
    ),
)


def script(model: Path, *changes: tuple[str, str]) -> str:
    """The example with its imports, its plan and its model changed, and with further changes."""
    text = TEXT
    for old, new in (*IMPORTS, *PLAN, ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", str(model)), *changes):
        if old not in text:
            raise ValueError(f"the example has no {old!r}")
        text = text.replace(old, new)
    return text
