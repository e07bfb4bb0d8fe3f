"""Text that every machine has: the documentation of the running Python's own standard library.

The `.py` files of the standard library are parsed, never imported, so the result depends on their content alone:
no machine paths, no side effects, the same order everywhere. Whole top-level modules (and topics of the language
reference) are held out by a hash of their name, and a docstring or paragraph that the training split also has is
left out of the validation split, so that held-out text is unseen text.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from lors_cli.data.known import Split
from lors_cli.data.pydoc_parse import Entry, Module, all_modules, all_topics, module_files, topics_files
from lors_cli.errors import UsageError
from lors_cli.files import hashes

SOURCE_VERSION = 1
"""Raised when the same Python would give another text."""

_HELD_OUT_PERCENT = 15
_SALT = "lors-4"
"""Chosen among a few so that about 13 % of the characters, from modules of many kinds, are held out."""
_OUTPUT_CHARS = (40, 1200)
_CHOICE_CHARS = (25, 140)
_PHRASINGS = (
    "Explain what the Python {kind} `{call}` does.",
    "What does `{call}` do in Python?",
    "Describe the {kind} `{call}` of Python's standard library.",
    "Write a short description of the Python {kind} `{call}`.",
    "What is the purpose of Python's `{call}`?",
)


def fingerprint() -> str:
    """What the text depends on: the Python, this module's version, and which library files there are (not read)."""
    listing = "\n".join(f"{name} {path.stat().st_size}" for name, path in [*module_files(), *topics_files()])
    digest = hashes.digits(listing, 16)
    return f"{platform.python_implementation()}-{platform.python_version()}/v{SOURCE_VERSION}/{digest}"


def documents(split: Split) -> Iterator[str]:
    """The documents of one split (validation: about 15 %): a module each, then a topic of the language reference each.

    Raises:
        MissingError: this Python has no standard library in source form.
    """
    for module in _modules(split):
        yield _render(module)
    yield from _topics(split)


def instructions(split: Split) -> Iterator[dict[str, str]]:
    """Question and answer pairs about documented functions, methods and classes.

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
    """The first `count` multiple-choice questions about held-out functions: which description is the right one?

    Wrong descriptions belong to other held-out functions: one of the same module where there is one, the rest
    of other modules. Every four consecutive items have their answers at four different positions.

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
    return int.from_bytes(hashlib.sha256("\0".join((_SALT, *parts)).encode()).digest()[:8], "big")


def _is_held_out(name: str) -> bool:
    """Whether a top-level module or topic belongs to the validation split."""
    return _hash("split", name) % 100 < _HELD_OUT_PERCENT


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
    for module in all_modules():
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
def _topics(split: Split) -> tuple[str, ...]:
    """The topics of one split, without paragraphs that came before (long topics repeat shorter ones)."""
    seen: set[str] = set()
    if split == "validation":
        seen.update(paragraph for text in _topics("train") for paragraph in text.split("\n\n"))
    kept = []
    mine = {name: text for name, text in all_topics().items() if _is_held_out(name) == (split == "validation")}
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
    while len(taken) > 1 and taken[-1].endswith(":"):  # announces an example that was left out
        taken.pop()
    return "\n\n".join(taken).strip()


def _description(entry: Entry) -> str | None:
    """The docstring's first sentence, when it says something and does not give the name away."""
    first = " ".join(entry.doc.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)'\"])\.(?:\s|$)", first)[0].rstrip(".:;,?! ")
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
