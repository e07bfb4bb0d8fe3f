"""Writes docs/api.md from the docstrings of the public names: python docs/make_api.py > docs/api.md."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
from typing import Any

import lors_cli
from lors_cli.recipe.reference import SECTIONS

HEAD = """\
# From Python

<!-- Generated: python docs/make_api.py > docs/api.md -->

Everything here is `from lors_cli import …`. `import lors_cli` itself takes no time: torch is imported when a function
is. In a script that works in several processes put the calls below `if __name__ == "__main__":`.

```python run
from lors_cli import CalibrationConfig, PruneConfig, generate, load, prune

settings = PruneConfig(pattern="2:4", calibration=CalibrationConfig(dataset="pydoc", num_samples=4, sequence_length=64))
record = prune(settings, "model", "api/sparse")
print(record)

(answer,) = generate("api/sparse", "Once upon a time", max_new_tokens=8)
print(answer.text)

model, tokenizer = load("api/sparse")  # transformers' own objects
```

[How to call the stages](how-to.md#call-the-stages-from-python) has a whole pipeline, with progress.
"""
GROUPS = {
    "Stages": ("prune", "tune", "evaluate"),
    "Use": ("load", "generate"),
    "Progress": ("on_progress", "Task"),
    "Settings": ("PruneConfig", "QuantizeConfig", "CalibrationConfig", "TuneConfig", "TuneDataConfig", "DistillConfig",
                 "EvalConfig", "ModelConfig", "ColumnsConfig", "Recipe", "load_recipe"),
    "Results": ("StageRecord", "Generated"),
    "Errors": ("LorsError", "UsageError", "MissingError", "ResourceError", "SparsityError"),
}  # fmt: skip
"""The public names by heading."""
_PARTS = ("Args", "Returns", "Raises")


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name, getattr(lors_cli, name)) for name in names]
    return "\n".join(parts)


def _entry(name: str, found: Any) -> str:
    lines = [f"### {name}", ""]
    if inspect.isfunction(found):
        lines += ["```python", _signature(name, found), "```", "", *_docstring(found)]
    elif sections := [section or "The recipe itself" for section, kind in SECTIONS.items() if kind is found]:
        anchors = [section.lower().replace(".", "").replace(" ", "-") for section in sections]
        links = ", ".join(f"[{section}](recipe.md#{anchor})" for section, anchor in zip(sections, anchors, strict=True))
        lines += [*_docstring(found), f"Its settings, by keyword: {links}.", ""]
    elif dataclasses.is_dataclass(found):
        lines += [*_docstring(found), *_fields(found), ""]
    else:
        lines += [*_docstring(found), *_exit_code(found)]
    return "\n".join(lines)


def _signature(name: str, function: Any) -> str:
    """A function's signature, an argument a line."""
    signature = inspect.signature(function)
    lines, keywords = [], False
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not keywords:
            lines.append("*")
            keywords = True
        default = "" if each.default is each.empty else f" = {each.default!r}"
        lines.append(f"{each.name}: {each.annotation}{default}")
    inner = "".join(f"    {line},\n" for line in lines)
    return f"{name}(\n{inner}) -> {signature.return_annotation.removeprefix('records.')}"


def _docstring(found: Any) -> list[str]:
    """A docstring in Markdown: its text, then a list a part."""
    text, *rest = re.split(rf"^({'|'.join(_PARTS)}):\n", inspect.getdoc(found) or "", flags=re.MULTILINE)
    lines = [_escaped(" ".join(paragraph.split())) + "\n" for paragraph in text.strip().split("\n\n")]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        items = re.split(r"\n(?=    \S)", body.strip("\n"))
        lines += [f"{title}:", "", *(_item(item, title) for item in items), ""]
    return lines


def _item(item: str, title: str) -> str:
    """A line of Args, Returns or Raises."""
    name, colon, text = " ".join(item.split()).partition(": ")
    named = colon and re.fullmatch(r"\w+", name) and title != "Returns"
    return f"- `{name}`: {_escaped(text)}" if named else f"- {_escaped(f'{name}{colon}{text}')}"


def _fields(found: Any) -> list[str]:
    """A dataclass's fields with their types, and their docstrings where they have some."""
    body = ast.parse(textwrap.dedent(inspect.getsource(found))).body[0].body  # type: ignore[attr-defined]
    said = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    return [f"- `{entry.name}` (`{entry.type}`){': ' + _escaped(said[entry.name]) if entry.name in said else ''}"
            for entry in dataclasses.fields(found)]  # fmt: skip


def _exit_code(found: Any) -> list[str]:
    code = getattr(found, "exit_code", None)
    return [] if code is None else [f"Exit code {code} on the command line.", ""]


def _escaped(text: str) -> str:
    """A text whose code is left as it is, and of the rest what Markdown would take for markup made harmless."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<>$|])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    sys.stdout.write(markdown())
