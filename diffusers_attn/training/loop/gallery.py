"""The page `samples/index.html`: samples of a run in a table, with a row for each prompt and a column for each step.

Each folder of samples has a file `samples.json` that says what it holds; the page is made from all of them, so it has
the samples of earlier parts of a resumed run as well.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.disk import write_file

ABOUT = "samples.json"
"""File in a folder of samples that says what it holds."""
PAGE = "index.html"

_STYLE = """\
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff; }
table { border-collapse: separate; border-spacing: 0; }
th { position: sticky; background: #fff; text-align: left; font-weight: 500; padding: .5rem; z-index: 1; }
thead th { top: 0; border-bottom: 1px solid #ccc; z-index: 2; }
tbody th { left: 0; width: 16rem; min-width: 16rem; vertical-align: top; }
td { padding: .25rem; vertical-align: top; }
img, video { display: block; height: 16rem; max-width: 32rem; object-fit: contain; background: #eee; }
small { color: #777; display: block; font-weight: 400; }
@media (prefers-color-scheme: dark) {
  body, th { color: #ddd; background: #1b1b1b; } img, video { background: #333; } thead th { border-color: #555; }
}"""
_SCRIPT = """\
document.addEventListener("click", event => {
  const shown = event.target.closest("td img, td video");
  if (shown) window.open(shown.src);
});"""


def describe(folder: Path, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Writes `samples.json` into a folder of samples.

    Args:
        folder: the folder.
        step: step of the samples.
        samples: JSON values by name for each sample: at least "number" (of its prompt), "prompt" and "file".
    """
    text = json.dumps({"step": step, "samples": list(samples)}, indent=1, ensure_ascii=False)
    write_file(folder / ABOUT, lambda path: path.write_text(text, encoding="utf-8"), "a description of samples")


def write_gallery(folder: Path, title: str) -> Path:
    """Writes the page of all samples in the subfolders of `folder`.

    Returns:
        The page.
    """
    found = sorted(
        (about["step"], path.parent.name, about["samples"])
        for path in folder.glob(f"*/{ABOUT}")
        for about in [json.loads(path.read_text(encoding="utf-8"))]
    )
    rows: dict[tuple[int, str], dict[int, Mapping[str, Any]]] = {}
    for column, (_, name, samples) in enumerate(found):
        for each in samples:
            shown = {**each, "file": f"{name}/{each['file']}"}
            rows.setdefault((each["number"], each["prompt"]), {})[column] = shown
    page = folder / PAGE
    text = _page(title, [f"step {step}" for step, _, _ in found], rows)
    write_file(page, lambda path: path.write_text(text, encoding="utf-8"), "the page of samples")
    return page


def _page(title: str, columns: Sequence[str], rows: Mapping[tuple[int, str], Mapping[int, Mapping[str, Any]]]) -> str:
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>\n{_STYLE}\n</style></head>',
        "<body>",
        f"<h1>{html.escape(title)}</h1>",
        "<table>",
        f"<thead><tr><th>prompt</th>{''.join(f'<th>{each}</th>' for each in columns)}</tr></thead>",
        "<tbody>",
    ]
    for (_, prompt), samples in sorted(rows.items()):
        cells = [_cell(samples[i]) if i in samples else "<td></td>" for i in range(len(columns))]
        notes = _notes(list(samples.values())[-1])
        lines.append(f"<tr><th>{html.escape(prompt)}<small>{html.escape(notes)}</small></th>{''.join(cells)}</tr>")
    lines += ["</tbody>", "</table>", f"<script>\n{_SCRIPT}\n</script>", "</body>", "</html>"]
    return "\n".join(lines) + "\n"


def _cell(sample: Mapping[str, Any]) -> str:
    file, alt = html.escape(sample["file"], quote=True), html.escape(sample["prompt"], quote=True)
    if sample["file"].endswith(".mp4"):
        return f'<td><video src="{file}" title="{alt}" autoplay loop muted playsinline controls></video></td>'
    return f'<td><img src="{file}" alt="{alt}" loading="lazy"></td>'


def _notes(sample: Mapping[str, Any]) -> str:
    """What a sample has besides its prompt, such as "seed 3, negative prompt: blurry"."""
    names = ("seed", "negative prompt", "image", "control", "control mask")
    shown = {name: sample[name] for name in names if sample.get(name) is not None}
    return ", ".join(f"{name} {value}" if name == "seed" else f"{name}: {value}" for name, value in shown.items())
