"""The sources that have a name: where each lies on the hub and below `data_dir`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lors_cli.data.corpora import joined_lines, joined_rows
from lors_cli.errors import MissingError, UsageError

Kind = Literal["text", "instructions", "tokens"]
Split = Literal["train", "validation"]
"""What a text is for: to learn from, or to measure perplexity on."""
DATA_DIR_VARIABLE = "LORS_DATA_DIR"


@dataclass(frozen=True)
class Known:
    """Where a named source lies."""

    kind: Kind
    files: dict[str, str]
    """Split to file below data_dir; a split that no one has is absent."""
    repo: str
    config: str | None
    splits: tuple[str, ...] = ("train",)
    """On the hub."""
    held_out: str = "validation"
    """The split that perplexity is measured on."""
    streamed: bool = False
    subset: str | None = None
    """Only rows with this meta.redpajama_set_name, in local files."""
    join: Callable[[Iterable[str]], str] | None = None
    """What makes one document of WikiText's rows."""
    mark: str = ""
    """In fingerprints, after those of another join."""
    num_rows: int | None = None
    """Of the original's training split, which a local copy may have a part of."""


_SLIMPAJAMA_FILES = {
    "train": "slimpajama_like/train.jsonl.gz",
    "validation": "slimpajama_like/validation.jsonl.gz",
}
_THREE_SPLITS = ("train", "validation", "test")
_WIKITEXT = (
    {"test": "wikitext2/test.txt.gz"}, "Salesforce/wikitext", "wikitext-2-raw-v1", _THREE_SPLITS, "test",
)  # fmt: skip
KNOWN = {
    "alpaca": Known("instructions", {"train": "alpaca/train.jsonl.gz"}, "tatsu-lab/alpaca", None, num_rows=52_002),
    "c4": Known(
        "text", _SLIMPAJAMA_FILES, "allenai/c4", "en", ("train", "validation"), streamed=True, subset="RedPajamaC4"
    ),
    "slimpajama": Known(
        "text", _SLIMPAJAMA_FILES, "cerebras/SlimPajama-627B", None, _THREE_SPLITS, streamed=True
    ),
    "slimpajama-6b": Known(
        "text", _SLIMPAJAMA_FILES, "DKYoon/SlimPajama-6B", None, _THREE_SPLITS, streamed=True
    ),
    "wikitext2": Known("text", *_WIKITEXT, join=joined_rows, mark="/rows"),
    "wikitext2-lines": Known("text", *_WIKITEXT, join=joined_lines),
}  # fmt: skip
SOURCES = tuple(sorted([*KNOWN, "pydoc"]))


def resolve_data_dir(name: str | Path | None) -> Path | None:
    """The folder with local datasets: `name`, else $LORS_DATA_DIR, else None for the hub.

    Raises:
        MissingError: it is no folder.
    """
    chosen = name or os.environ.get(DATA_DIR_VARIABLE)
    if not chosen:
        return None
    folder = Path(os.path.expanduser(chosen))
    if not folder.is_dir():
        source = "data_dir" if name else f"${DATA_DIR_VARIABLE}"
        raise MissingError(f"{source}: {folder} is no folder.", "docs/how-to.md shows its layout.")
    return folder


def data_file(name: str, known: Known, split: str, data_dir: Path) -> Path:
    """The local copy of a named source.

    Raises:
        MissingError: it is not there.
    """
    if split not in known.files:
        there = ", ".join(known.files.values())
        raise MissingError(
            f"{data_dir} has no {split} split of {name}, only {there}.",
            "Choose another dataset, or leave data_dir out to read it from the hub.",
        )
    path = data_dir / known.files[split]
    if not path.is_file():
        raise MissingError(
            f"No {name} data at {path}.", "Put the file there, or leave data_dir out to read from the hub."
        )
    return path


def split_of(name: str, use: Split, chosen: str | None) -> str:
    """The split of a named source that is meant.

    Raises:
        UsageError: it has none of that name.
    """
    known = KNOWN.get(name)  # pydoc is none of them
    splits = known.splits if known else ("train", "validation")
    held_out = known.held_out if known else "validation"
    split = chosen or (held_out if use == "validation" else "train")
    if split not in splits:
        hint = f"Write split: {splits[0]}, or leave it out." if chosen else (
            "Perplexity is measured on held-out text: wikitext2, pydoc, c4, slimpajama, or a file."
        )  # fmt: skip
        raise UsageError(f"{name} has no {split} split, only {', '.join(splits)}.", hint)
    return split
