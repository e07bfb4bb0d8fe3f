"""What mkdocs is told beyond its settings: the README is the start page, formulas become MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r"\$\$(?P<shown>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the README as index.md, its links seen from docs/."""
    text = (Path(config.docs_dir).parent / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MathML for formulas, which browsers show without a script; the tests' mark `run` goes from blocks of code."""
    parts = _CODE.split(re.sub(r"^(```\w+) run$", r"\1", markdown, flags=re.MULTILINE))
    return "".join(part if place % 2 else _FORMULA.sub(_mathml, part) for place, part in enumerate(parts))


def _mathml(found: re.Match[str]) -> str:
    if found["shown"]:
        return f"\n\n<div>{convert(found['shown'], display='block')}</div>\n\n"
    return convert(found["inline"])
