"""What mkdocs is told beyond its settings: the two READMEs are pages too, formulas become MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r"\$\$(?P<shown>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the README as index.md and docs/README.md as contents.md, their links seen from docs/."""
    docs = Path(config.docs_dir)
    start = (docs.parent / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=start.replace("](docs/", "](")))
    contents = (docs / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "contents.md", content=contents.replace("](../README.md", "](index.md")))
    return files


def _to_contents(markdown: str) -> str:
    """docs/README.md has another name among the site's pages."""
    return markdown.replace("](README.md", "](contents.md")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MathML for formulas, which browsers show without a script; the tests' mark `run` goes from blocks of code."""
    parts = _CODE.split(re.sub(r"^(```\w+) run$", r"\1", _to_contents(markdown), flags=re.MULTILINE))
    return "".join(part if place % 2 else _FORMULA.sub(_mathml, part) for place, part in enumerate(parts))


def _mathml(found: re.Match[str]) -> str:
    if found["shown"]:
        return f"\n\n<div>{convert(found['shown'], display='block')}</div>\n\n"
    return convert(found["inline"])
