"""Text sources: alpaca, slimpajama, slimpajama-6b, c4, wikitext2, wikitext2-lines, pydoc, and the user's own files.

A source is read from the hub, or, when `data_dir` (or $LORS_DATA_DIR) is given, from the files there; a file that
is missing there is an error, never a step to the hub. Opening a source reads its first row at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lors_cli.data import pydoc_text
from lors_cli.data.corpora import joined_lines, joined_rows, local_rows, subset_rows
from lors_cli.data.layouts import Row
from lors_cli.data.prompts import whole_text
from lors_cli.data.text_files import FORMATS, Columns, file_format, read_rows, read_text, row_layout
from lors_cli.errors import MissingError, UsageError, nearest, translate
from lors_cli.files.hashes import cached_sha256
from lors_cli.recipe.schema import ColumnsConfig

Split = Literal["train", "validation"]
Kind = Literal["text", "instructions", "tokens"]
Want = Literal["text", "instructions"]


@dataclass(frozen=True)
class TextSource:
    """Somewhere that text comes from."""

    name: str
    """As the user wrote it."""
    kind: Kind
    fingerprint: str
    """Of the content for local files, of the place for the hub."""
    path: Path | None
    """The file, for kind "tokens"."""
    streamed: bool
    """Text that must not be read whole."""
    _read: Callable[[], Iterator[Row]] = field(repr=False, compare=False)
    open_stream: Callable[[], Any] | None = field(default=None, repr=False, compare=False)
    """Opens streamed text on the hub as a `datasets.IterableDataset`."""
    num_bytes: int = 0
    """Of the local file, where there is one."""
    layout: str | None = None
    """Of the rows of a user's file."""

    def rows(self) -> Iterator[Row]:
        """The rows in their order: {"text"}, {"instruction", "input", "output"} or {"messages": turns}.

        Raises:
            UsageError: a row of a local file is broken; the message names file and row.
        """
        return self._read()


@dataclass(frozen=True)
class _Known:
    """Where a named source lies."""

    kind: Kind
    files: dict[str, str]
    """Split to file below data_dir; a split that no one has is absent."""
    repo: str
    config: str | None
    splits: dict[str, str]
    """Split to the hub's name of it."""
    streamed: bool = False
    subset: str | None = None
    """Only rows with this meta.redpajama_set_name, in local files."""
    join: Callable[[Iterable[str]], str] | None = None
    """What makes one document of WikiText's rows."""
    mark: str = ""
    """In fingerprints, after those of another join."""


_SLIMPAJAMA_FILES = {
    "train": "slimpajama_like/train.jsonl.gz",
    "validation": "slimpajama_like/validation.jsonl.gz",
}
_BOTH_SPLITS = {"train": "train", "validation": "validation"}
_WIKITEXT = (
    {"validation": "wikitext2/test.txt.gz"}, "Salesforce/wikitext", "wikitext-2-raw-v1",
    {"train": "train", "validation": "test"},
)  # fmt: skip
_KNOWN = {
    "alpaca": _Known(
        "instructions", {"train": "alpaca/train.jsonl.gz"}, "tatsu-lab/alpaca", None, {"train": "train"}
    ),
    "c4": _Known(
        "text", _SLIMPAJAMA_FILES, "allenai/c4", "en", _BOTH_SPLITS, streamed=True, subset="RedPajamaC4"
    ),
    "slimpajama": _Known(
        "text", _SLIMPAJAMA_FILES, "cerebras/SlimPajama-627B", None, _BOTH_SPLITS, streamed=True
    ),
    "slimpajama-6b": _Known(
        "text", _SLIMPAJAMA_FILES, "DKYoon/SlimPajama-6B", None, _BOTH_SPLITS, streamed=True
    ),
    "wikitext2": _Known("text", *_WIKITEXT, join=joined_rows, mark="/rows"),
    "wikitext2-lines": _Known("text", *_WIKITEXT, join=joined_lines),
}  # fmt: skip
SOURCES = tuple(sorted([*_KNOWN, "pydoc"]))
DATA_DIR_VARIABLE = "LORS_DATA_DIR"


def open_source(
    name: str, *, split: Split, data_dir: Path | None, want: Want = "text", columns: ColumnsConfig | None = None
) -> TextSource:
    """The source that a user named; nothing is downloaded before its rows are asked for.

    Args:
        name: one of `SOURCES`, or a file: .jsonl .json .csv .tsv .txt (each also .gz), .parquet, or .safetensors with
            `input_ids` (num_samples, sequence_length).
        split: "validation" is what perplexity is measured on: held-out rows; of wikitext2 the test split. A file
            has no splits and gives all its rows.
        data_dir: folder with local copies of the named sources; default $LORS_DATA_DIR, else the hub.
        columns: our names to those of a file's columns, where they are not known.
        want: "text" turns instruction rows into prompt and response as one text. "instructions" lets pydoc give
            pairs; a source of plain text stays one.

    Raises:
        UsageError: no such source or split, or a broken file.
        MissingError: a file is not there.
    """
    source = _open(name, split, data_dir, want, columns)
    if want == "text" and source.kind == "instructions":
        read = source.rows
        return replace(source, kind="text", _read=lambda: _as_text(read()))
    return source


def fingerprint_source(name: str, *, split: Split, data_dir: Path | None, columns: ColumnsConfig | None = None) -> str:
    """What identifies the content of `open_source`'s source, without a network and without reading more than needed.

    Returns:
        A SHA-256 of the content for local files, `hub:<repo>/<config>/<split>` for the hub, Python's version and
        this source's own for pydoc.

    Raises:
        UsageError: no such source or split.
        MissingError: a file is not there.
    """
    if columns is not None and (name in SOURCES or file_format(Path(name)) in ("txt", "safetensors")):
        raise UsageError(f"columns is for files of rows, and {name} is none.", "Leave columns out.")
    if name == "pydoc":
        return f"pydoc:{pydoc_text.fingerprint()}/{split}"
    known = _KNOWN.get(name)
    if known is None:
        path = _user_file(name)
        mapping = json.dumps(columns.names, sort_keys=True) if columns is not None else ""
        return f"{file_format(path)}:{cached_sha256(path)}{mapping}"
    folder = resolve_data_dir(data_dir)
    if folder is None:
        return f"hub:{known.repo}/{known.config or 'default'}/{_hub_split(name, known, split)}{known.mark}"
    path = _data_file(name, known, split, folder)
    return f"{known.subset or name.removesuffix('-lines')}{known.mark}:{cached_sha256(path)}"


def _open(name: str, split: Split, data_dir: Path | None, want: Want, columns: ColumnsConfig | None) -> TextSource:
    fingerprint = fingerprint_source(name, split=split, data_dir=data_dir, columns=columns)
    if name == "pydoc":
        return _open_pydoc(split, want, fingerprint)
    known = _KNOWN.get(name)
    if known is None:
        return _open_file(name, _user_file(name), fingerprint, columns.names if columns else None)
    folder = resolve_data_dir(data_dir)
    if folder is None:
        hub_split = _hub_split(name, known, split)
        opens = (lambda: _hub_dataset(known, hub_split)) if known.streamed else None
        return TextSource(
            name, known.kind, fingerprint, None, known.streamed, lambda: _hub_rows(known, hub_split), opens
        )
    path = _data_file(name, known, split, folder)
    if (join := known.join) is not None:
        rows = partial(local_rows, path, blank_count=join is joined_rows)
        return TextSource(name, "text", fingerprint, None, False, lambda: iter([{"text": join(rows())}]))
    if known.subset is not None:
        subset = known.subset
        size = path.stat().st_size
        return TextSource(name, known.kind, fingerprint, None, False, lambda: subset_rows(path, subset), num_bytes=size)
    return _open_file(name, path, fingerprint)


def _open_pydoc(split: Split, want: Want, fingerprint: str) -> TextSource:
    if want == "instructions":
        return TextSource("pydoc", "instructions", fingerprint, None, False, lambda: pydoc_text.instructions(split))
    return TextSource(
        "pydoc", "text", fingerprint, None, False, lambda: ({"text": text} for text in pydoc_text.documents(split))
    )


def _open_file(name: str, path: Path, fingerprint: str, columns: Columns = None) -> TextSource:
    form = file_format(path)
    if form == "safetensors":
        return TextSource(name, "tokens", fingerprint, path, False, lambda: _no_rows(path))
    if form == "txt":
        return TextSource(name, "text", fingerprint, None, False, lambda: iter([{"text": read_text(path)}]))
    layout, size = row_layout(path, columns), path.stat().st_size
    return TextSource(name, layout.kind, fingerprint, None, False, lambda: read_rows(path, layout, columns),
                      num_bytes=size, layout=layout.name)  # fmt: skip


def _no_rows(path: Path) -> Iterator[Row]:
    raise UsageError(f"{path} holds tokens, not text.", "Give a file of text or rows.")


def _as_text(rows: Iterator[Row]) -> Iterator[Row]:
    """Instruction rows as whole texts."""
    for row in rows:
        yield {"text": whole_text(row)}


def _hub_dataset(known: _Known, hub_split: str) -> Any:
    """A dataset on the hub, or a MissingError where it cannot be reached."""
    from datasets import load_dataset

    try:
        return load_dataset(known.repo, known.config, split=hub_split, streaming=known.streamed)
    except Exception as error:
        reason = translate(error)
        if isinstance(reason, MissingError):
            what = f"The dataset {known.repo} cannot be had: {reason.message}"
            raise MissingError(what, _instead(known, reason)) from error
        raise


def _instead(known: _Known, reason: MissingError) -> str:
    """What to do where a dataset cannot be had."""
    subset = known is _KNOWN["slimpajama"]
    other = "The dataset slimpajama-6b is a part of it from another place; or use" if subset else "Or use"
    return f"{reason.hint} {other} data_dir=FOLDER with a local copy, or name a local file (README, Data)."


def _hub_rows(known: _Known, hub_split: str) -> Iterator[Row]:
    """Its rows."""
    rows = _hub_dataset(known, hub_split)
    if known.join is not None:
        yield {"text": known.join(row["text"] for row in rows)}
        return
    keys = ("text",) if known.kind == "text" else ("instruction", "input", "output")
    for row in rows:
        yield {key: row[key] for key in keys}


# ---- where things lie


def resolve_data_dir(name: str | Path | None) -> Path | None:
    """The folder with local datasets: `name`, else $LORS_DATA_DIR, else None for the hub.

    Raises:
        MissingError: it is no folder.
    """
    chosen = name or os.environ.get(DATA_DIR_VARIABLE)
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        source = "data_dir" if name else f"${DATA_DIR_VARIABLE}"
        raise MissingError(f"{source}: {folder} is no folder.", "It should look like the layout in the README.")
    return folder


def _data_file(name: str, known: _Known, split: Split, data_dir: Path) -> Path:
    """The local copy of a named source."""
    _hub_split(name, known, split)
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


def _hub_split(name: str, known: _Known, split: Split) -> str:
    if split not in known.splits:
        raise UsageError(
            f"{name} has no {split} split, only {', '.join(known.splits)}.",
            "Perplexity is measured on held-out text: wikitext2, pydoc, c4, slimpajama, or a file.",
        )
    return known.splits[split]


def _user_file(name: str) -> Path:
    """The file that `name` is the path of."""
    path = Path(name).expanduser()
    if path.is_file():
        file_format(path)
        return path
    if path.is_dir():
        raise UsageError(f"{name} is a folder; a file is needed.", f"Files: {', '.join(FORMATS)}.")
    if name.removesuffix(".gz").endswith(FORMATS):
        raise MissingError(f"No file {name}.", f"Seen from {Path.cwd()}.")
    close = nearest(name.lower(), SOURCES)
    suggestion = f" Did you mean {close}?" if close else ""
    raise UsageError(
        f"There is no dataset or file {name!r}.{suggestion}",
        f"Datasets: {', '.join(SOURCES)}; or a file ({', '.join(FORMATS)}).",
    )
