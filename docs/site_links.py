"""A hook of mkdocs: pages link to files of the repository, and the site has these files as well.

Links in the pages are relative to their place in the repository, so that they work there. In the site, docs/ is the
root: `PAGES` become pages of it, README.md is its home, and every other file that a page links to is copied below
`files/`. Folders are not part of the site; their links become text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "integrations/comfyui/README.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    linked = set()
    for page in files.documentation_pages():
        for _, _, target, _ in LINK.findall(Path(page.abs_src_path).read_text()):
            linked.add(_in_repository(page, target))
    for path in sorted(linked):
        if not path.startswith("docs/") and path not in PAGES and (ROOT / path).is_file() and path != "README.md":
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def replaced(link: re.Match[str]) -> str:
        picture, text, target, anchor = link.groups()
        path = _in_repository(page.file, target)
        if (ROOT / path).is_dir():
            return text
        if path == "README.md":
            where = "index.md"
        elif path in PAGES:
            where = path
        elif path.startswith("docs/"):
            where = path.removeprefix("docs/")
        else:
            where = f"files/{path}"
        here = posixpath.dirname(page.file.src_uri)
        return f"{picture}[{text}]({os.path.relpath(where, here or '.')}{anchor or ''})"

    fenced = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in fenced)


def _in_repository(file: File, target: str) -> str:
    """The path in the repository that a page's link means."""
    place = file.src_uri if file.src_uri in PAGES else f"docs/{file.src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
