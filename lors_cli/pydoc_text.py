"""Text that every machine has: the documentation of the running Python's own standard library.

The `.py` files of the standard library are parsed, never imported, so the result depends on their content alone:
no machine paths, no side effects, the same order everywhere. Whole top-level modules (and topics of the language
reference) are held out by a hash of their name, and a docstring or paragraph that the training split also has is
left out of the validation split, so that held-out text is unseen text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lors_cli.errors import MissingError, UsageError

Split = Literal["train", "validation"]

SOURCE_VERSION = 1
"""Raised when the same Python would give another text."""

_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip",
    "encodings", "pydoc_data", "antigravity", "this", "config",
}  # fmt: skip
_HELD_OUT_PERCENT = 15
_OUTPUT_CHARS = (40, 1200)
_CHOICE_CHARS = (25, 140)
_PHRASINGS = (
    "Explain what the Python {kind} `{call}` does.",
    "What does `{call}` do in Python?",
    "Describe the {kind} `{call}` of Python's standard library.",
    "Write a short description of the Python {kind} `{call}`.",
    "What is the purpose of Python's `{call}`?",
)


@dataclass(frozen=True)
class Entry:
    """A documented public function, method or class."""

    module: str
    name: str
    """Inside the module: `dedent`, `TextWrapper.wrap`."""
    kind: Literal["function", "method", "class"]
    signature: str
    """With parentheses and without self or cls; empty for a class."""
    doc: str

    @property
    def call(self) -> str:
        """`textwrap.dedent(text)`."""
        return f"{self.module}.{self.name}{self.signature}"


@dataclass(frozen=True)
class Module:
    """One module's documentation."""

    name: str
    doc: str
    entries: tuple[Entry, ...]


def fingerprint() -> str:
    """What the text depends on: the Python, this module's version, and which library files there are.

    Returns:
        A short text, cheap to compute: files are listed, not read.
    """
    listing = "\n".join(f"{name} {path.stat().st_size}" for name, path in [*_module_files(), *_topics_files()])
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    return f"{platform.python_implementation()}-{platform.python_version()}/v{SOURCE_VERSION}/{digest}"


def documents(split: Split) -> Iterator[str]:
    """The documents of one split: a module each, then a topic of the language reference each.

    Args:
        split: "train", or "validation" with about 15 % of the names.

    Returns:
        Plain texts in a fixed order.

    Raises:
        MissingError: this Python has no standard library in source form.
    """
    for module in _modules(split):
        yield _render(module)
    yield from _topics(split)


def instructions(split: Split) -> Iterator[dict[str, str]]:
    """Question and answer pairs about documented functions, methods and classes.

    Args:
        split: as for `documents`.

    Returns:
        Rows {"instruction", "input", "output"}; input is empty, output 40 to 1,200 characters.

    Raises:
        MissingError: this Python has no standard library in source form.
    """
    for module in _modules(split):
        for entry in module.entries:
            output = _first_paragraphs(entry.doc)
            if len(output) < _OUTPUT_CHARS[0] or len(entry.call) > 200:
                continue
            phrasing = _PHRASINGS[_hash("phrasing", entry.call) % len(_PHRASINGS)]
            yield {
                "instruction": phrasing.format(kind=entry.kind, call=entry.call),
                "input": "",
                "output": output,
            }


def choice_items(count: int) -> list[dict[str, Any]]:
    """Multiple-choice questions about held-out functions: which description is the right one?

    Wrong descriptions belong to other held-out functions: one of the same module where there is one, the rest
    of other modules. Every four consecutive items have their answers at four different positions.

    Args:
        count: how many; the first `count` of a fixed order.

    Returns:
        Items {"question": str, "choices": four strings, "answer": index of the right one}.

    Raises:
        UsageError: there are fewer.
    """
    items = _all_choice_items()
    if count > len(items):
        raise UsageError(f"pydoc has {len(items)} multiple-choice items, not {count}.", "Lower the limit.")
    return [{**item, "choices": list(item["choices"])} for item in items[:count]]


def _hash(*parts: str) -> int:
    """A number that depends on the text alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256("\0".join(("lors", *parts)).encode()).digest()[:8], "big")


def _is_held_out(name: str) -> bool:
    """Whether a top-level module or topic belongs to the validation split."""
    return _hash("split", name) % 100 < _HELD_OUT_PERCENT


# ---- reading the library


@cache
def _module_files() -> tuple[tuple[str, Path], ...]:
    """(dotted name, file) of the public modules, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(part in _SKIPPED or part[0] == "_" or not part.isidentifier() for part in parts):
            found[".".join(parts)] = path
    if not found:
        raise MissingError(
            f"No standard library in source form at {root}, which the text source pydoc is made from.",
            "Use another source or a local file.",
        )
    return tuple(sorted(found.items()))


def _topics_files() -> list[tuple[str, Path]]:
    """The language reference as plain text; some distributions leave it out."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    return [("pydoc_data.topics", path)] if path.is_file() else []


@cache
def _all_modules() -> tuple[Module, ...]:
    """Every public module that has documentation, sorted by name."""
    modules = []
    for name, path in _module_files():
        tree = ast.parse(path.read_bytes())
        entries: dict[str, Entry] = {}
        _collect(tree.body, name, "", entries)
        doc = _clean(ast.get_docstring(tree) or "")
        if doc or entries:
            modules.append(Module(name, doc, tuple(entries.values())))
    return tuple(modules)


def _collect(body: list[ast.stmt], module: str, prefix: str, entries: dict[str, Entry]) -> None:
    """Add the documented public definitions of a module's or class's body, the first of each name."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            _collect([*node.body, *node.orelse], module, prefix, entries)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name[0] == "_":
            continue
        name = prefix + node.name
        doc = _clean(ast.get_docstring(node) or "")
        if doc and name not in entries:
            kind: Literal["function", "method", "class"] = "method" if prefix else "function"
            if isinstance(node, ast.ClassDef):
                entries[name] = Entry(module, name, "class", "", doc)
            else:
                entries[name] = Entry(module, name, kind, _signature(node, is_method=bool(prefix)), doc)
        if isinstance(node, ast.ClassDef):
            _collect(node.body, module, f"{name}.", entries)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_method: bool) -> str:
    """`(text, width=70)`."""
    decorators = {item.id for item in node.decorator_list if isinstance(item, ast.Name)}
    arguments = node.args
    if is_method and "staticmethod" not in decorators:
        for positional in (arguments.posonlyargs, arguments.args):
            if positional:
                del positional[0]
                break
    if len(arguments.defaults) > len(arguments.posonlyargs) + len(arguments.args):
        arguments.defaults = arguments.defaults[1:]
    return f"({ast.unparse(arguments)})"


def _clean(doc: str) -> str:
    """A docstring without indentation, control characters and spaces at the ends of lines."""
    lines = inspect.cleandoc(doc).splitlines()
    return "\n".join("".join(c for c in line if c.isprintable()).rstrip() for line in lines).strip()


# ---- the two splits


@cache
def _modules(split: Split) -> tuple[Module, ...]:
    """The modules of one split; each docstring occurs once, and held-out ones not in training."""
    seen: set[str] = set()
    if split == "validation":
        train = _modules("train")
        seen.update(module.doc for module in train)
        seen.update(entry.doc for module in train for entry in module.entries)
    kept = []
    for module in _all_modules():
        if _is_held_out(module.name.partition(".")[0]) != (split == "validation"):
            continue
        entries = []
        for entry in module.entries:
            if entry.doc not in seen:
                seen.add(entry.doc)
                entries.append(entry)
        doc = module.doc if module.doc not in seen else ""
        seen.add(doc)
        if doc or entries:
            kept.append(Module(module.name, doc, tuple(entries)))
    return tuple(kept)


@cache
def _all_topics() -> dict[str, str]:
    """Name and text of each topic of the language reference, sorted by name."""
    topics: dict[str, str] = {}
    for _, path in _topics_files():
        for node in ast.parse(path.read_bytes()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
                topics = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return {name: _clean(topics[name]) for name in sorted(topics)}


@cache
def _topics(split: Split) -> tuple[str, ...]:
    """The topics of one split, without paragraphs that came before (long topics repeat shorter ones)."""
    seen: set[str] = set()
    if split == "validation":
        seen.update(paragraph for text in _topics("train") for paragraph in text.split("\n\n"))
    kept = []
    mine = {name: text for name, text in _all_topics().items() if _is_held_out(name) == (split == "validation")}
    for name in sorted(mine, key=lambda name: (-len(mine[name]), name)):
        paragraphs = mine[name].split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(paragraphs)
        if sum(map(len, fresh)) > 200:
            kept.append("\n\n".join(fresh))
    return tuple(kept)


def _render(module: Module) -> str:
    """A module's documentation as one text."""
    parts = [f"Module {module.name}", module.doc]
    for entry in module.entries:
        parts.append(f"{'class ' if entry.kind == 'class' else ''}{entry.call}\n{entry.doc}")
    return "\n\n".join(part for part in parts if part)


# ---- questions


def _first_paragraphs(doc: str) -> str:
    """The leading prose of a docstring, at most 1,200 characters, without examples and field lists."""
    taken: list[str] = []
    for paragraph in doc.split("\n\n"):
        first = paragraph.lstrip()
        if first.startswith((">>>", ":param", "@param", "---", "===")):
            break
        if sum(map(len, taken)) + 2 * len(taken) + len(paragraph) > _OUTPUT_CHARS[1]:
            break
        taken.append(paragraph)
        if len("\n\n".join(taken)) >= 400:
            break
    return "\n\n".join(taken).strip()


def _description(entry: Entry) -> str | None:
    """The docstring's first sentence, when it says something and does not give the name away."""
    first = " ".join(entry.doc.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)'\"])\.(?:\s|$)", first)[0].rstrip(".:;, ")
    own = entry.name.rpartition(".")[2].lower()
    plain = sentence.lower()
    if own in plain or own.replace("_", " ") in plain or own.replace("_", "") in plain.replace(" ", ""):
        return None
    fits = _CHOICE_CHARS[0] <= len(sentence) <= _CHOICE_CHARS[1] and sentence[0].isupper()
    if not fits or "(" in sentence.partition(" ")[0] or "->" in sentence or "=" in sentence:
        return None
    return f"{sentence}."


@cache
def _all_choice_items() -> tuple[dict[str, Any], ...]:
    """Every multiple-choice item, in the order of a hash."""
    pool: dict[str, Entry] = {}
    for module in _modules("validation"):
        for entry in module.entries:
            text = _description(entry) if entry.kind != "class" and len(entry.call) <= 120 else None
            if text is not None and text not in pool:
                pool[text] = entry
    ordered = sorted(pool.items(), key=lambda item: _hash("item", item[1].call))
    items = []
    for index, (right, entry) in enumerate(ordered):
        group = sorted(range(4), key=lambda place: _hash("place", str(index // 4), str(place)))
        choices = _distractors(right, entry, pool)
        answer = group[index % 4]
        choices.insert(answer, right)
        question = f"Which description fits the Python {entry.kind} `{entry.call}`?"
        items.append({"question": question, "choices": choices, "answer": answer})
    return tuple(items)


def _distractors(right: str, entry: Entry, pool: dict[str, Entry]) -> list[str]:
    """Three wrong descriptions, one of them of the same module where there is one."""
    ranked = sorted((text for text in pool if text != right), key=lambda text: _hash("wrong", entry.call, text))
    near = [text for text in ranked if pool[text].module == entry.module][:1]
    far = [text for text in ranked if pool[text].module != entry.module]
    return sorted([*near, *far[: 3 - len(near)]], key=lambda text: _hash("order", entry.call, text))
