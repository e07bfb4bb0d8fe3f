"""Text sources: those with a name, any dataset on the hub, and the user's own files.

A named source is read from the hub, or, when `data_dir` (or $LORS_DATA_DIR) is given, from the files there; a file that
is missing there is an error, never a step to the hub. Opening a source reads its first row at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lors_cli.data import hub, pydoc_text
from lors_cli.data.corpora import joined_rows, local_rows, subset_rows
from lors_cli.data.known import KNOWN, SOURCES, Kind, Known, Split, data_file, resolve_data_dir, split_of
from lors_cli.data.layouts import LAYOUTS, Layout, Row, layout_of, mapped, read_row
from lors_cli.data.prompts import whole_text
from lors_cli.data.text_files import FORMATS, Columns, file_format, is_format, read_rows, read_text, row_layout
from lors_cli.errors import MissingError, UsageError, did_you_mean
from lors_cli.files.hashes import cached_sha256
from lors_cli.recipe.schema import CalibrationConfig, ColumnsConfig, TuneDataConfig

Want = Literal["text", "instructions"]
_ROWS_MARK = "#2"
"""Of how rows of the user's are read: 2 since blank texts are left out, and since an input, a context and a history are
read beside an instruction alone."""


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
    open_stream: Callable[[], Any | None] | None = field(default=None, repr=False, compare=False)
    """Opens streamed text on the hub as a `datasets.IterableDataset`, None where it is read from the cache here."""
    read_streamed: Callable[[Iterable[Row]], Iterator[Row]] = field(default=iter, repr=False, compare=False)
    """What the rows of `open_stream` say."""
    num_bytes: int = 0
    """Of the local file, where there is one."""
    layout: str | None = None
    """Of the rows of a user's file or dataset."""
    found_at: str | None = None
    """Commit and split of a user's dataset on the hub."""
    original_rows: int | None = None
    """Of the dataset that a local file is a copy of, maybe of a part."""
    _first: Callable[[int], list[Row]] | None = field(default=None, repr=False, compare=False)

    def rows(self) -> Iterator[Row]:
        """The rows in their order: {"text"}, {"instruction", "input", "output"} or {"messages": turns}.

        Raises:
            UsageError: a row of a local file is broken; the message names file and row.
        """
        return self._read()

    def first_rows(self, number: int) -> list[Row]:
        """The first rows, without downloading the others."""
        return list(islice(self._read(), number)) if self._first is None else self._first(number)


def open_source(
    name: str,
    *,
    split: Split,
    data_dir: Path | None,
    want: Want = "text",
    columns: ColumnsConfig | None = None,
    chosen: str | None = None,
) -> TextSource:
    """The source that a user named; of the hub no more than the first row is read before rows are asked for.

    Args:
        name: one of `SOURCES`; a file: .jsonl .json .csv .tsv .txt (each also .gz or .zst), .parquet, or .safetensors
            with `input_ids` (num_samples, sequence_length); or a dataset on the hub (`hub.FORM`). A path that is
            there goes before a dataset of the same name.
        split: what it is for. "validation" is what perplexity is measured on: held-out rows; of wikitext2 the test
            split. A file has no splits and gives all its rows.
        chosen: the split by its own name, where the user gives one.
        data_dir: folder with local copies of the named sources; default $LORS_DATA_DIR, else the hub.
        columns: our names to those of a file's columns, where they are not known.
        want: "text" turns instruction rows into prompt and response as one text. "instructions" lets pydoc give
            pairs; a source of plain text stays one.

    Raises:
        UsageError: no such source or split, or a broken file.
        MissingError: a file or dataset is not there.
    """
    source = _open(name, split, data_dir, want, columns, chosen)
    if want == "text" and source.kind == "instructions":
        read, first = source.rows, source.first_rows
        return replace(source, kind="text", _read=lambda: _as_text(read()),
                       _first=lambda number: list(_as_text(iter(first(number)))))  # fmt: skip
    return source


def tuning_source(config: TuneDataConfig, data_dir: Path | None) -> TextSource:
    """The source that is tuned on."""
    return open_source(config.dataset, split="train", data_dir=data_dir, want="instructions", columns=config.columns,
                       chosen=config.split)  # fmt: skip


def calibration_source(config: CalibrationConfig, data_dir: Path | None) -> TextSource:
    """The source that a pruner is calibrated on."""
    return open_source(config.dataset, split="train", data_dir=data_dir, columns=config.columns, chosen=config.split)


def fingerprint_source(
    name: str, *, split: Split, data_dir: Path | None, columns: ColumnsConfig | None = None, chosen: str | None = None
) -> str:
    """What identifies the content of `open_source`'s source, without reading more than needed.

    Returns:
        A SHA-256 of the content for local files, `hub:<repo>@<commit>/<config>/<split>` for the hub (which is asked
        for the commit once a process), Python's version and this source's own for pydoc; of the user's rows also the
        version of how they are read.

    Raises:
        UsageError: no such source or split.
        MissingError: a file is not there, or the hub has no such dataset.
    """
    return _find(name, split, data_dir, columns, chosen)[0]


def _find(
    name: str, split: Split, data_dir: Path | None, columns: ColumnsConfig | None, chosen: str | None
) -> tuple[str, str, hub.Place | Path | None]:
    """A source's fingerprint, the split of a named one, and where it lies; pydoc lies nowhere."""
    mapping = json.dumps(columns.names, sort_keys=True) if columns is not None else ""
    if name in SOURCES:
        if mapping:
            raise UsageError(f"columns is for rows of your own, and {name} is known.", "Leave columns out.")
        part = split_of(name, split, chosen)
        if name == "pydoc":
            return f"pydoc:{pydoc_text.fingerprint()}/{part}", part, None
        known, folder = KNOWN[name], resolve_data_dir(data_dir)
        if folder is None:
            place = _known_place(name)
            return place.fingerprint(part) + known.mark, part, place
        path = data_file(name, known, part, folder)
        return f"{known.subset or name.removesuffix('-lines')}{known.mark}:{cached_sha256(path)}", part, path
    part = chosen or ("train" if split == "train" else "held-out")
    if (on_hub := _hub_place(name)) is not None:
        return on_hub.fingerprint(part) + mapping + _ROWS_MARK, part, on_hub
    path = _user_file(name)
    form = file_format(path)
    if mapping and form in ("txt", "safetensors"):
        raise UsageError(f"columns is for files of rows, and {name} is none.", "Leave columns out.")
    if chosen not in (None, "train"):
        raise UsageError(
            f"split: {chosen} is for datasets, and {name} is one file without splits.",
            "Leave split out, or name another file.",
        )
    mark = "" if form in ("txt", "safetensors") else _ROWS_MARK
    return f"{form}{mark}:{cached_sha256(path)}{mapping}", part, path


def _open(
    name: str, split: Split, data_dir: Path | None, want: Want, columns: ColumnsConfig | None, chosen: str | None
) -> TextSource:
    fingerprint, part, place = _find(name, split, data_dir, columns, chosen)
    if place is None:
        return _open_pydoc(part, want, fingerprint)
    known, names = KNOWN.get(name), columns.names if columns else None
    if isinstance(place, hub.Place):
        if known is not None:
            return _open_known(name, known, place, part, fingerprint)
        return _open_hub(name, place, chosen or ("train" if split == "train" else None), want, fingerprint, names)
    if known is None:
        return _open_file(name, place, fingerprint, names)
    if (join := known.join) is not None:
        lines = partial(local_rows, place, blank_count=join is joined_rows)
        return TextSource(name, "text", fingerprint, None, False, lambda: iter([{"text": join(lines())}]))
    if known.subset is not None:
        part_rows = partial(subset_rows, place, known.subset)
        return TextSource(name, known.kind, fingerprint, None, False, part_rows, num_bytes=place.stat().st_size)
    original = known.num_rows if part == "train" else None
    return replace(_open_file(name, place, fingerprint), original_rows=original)


def _open_known(name: str, known: Known, place: hub.Place, split: str, fingerprint: str) -> TextSource:
    """A named source on the hub."""
    keys = ("text",) if known.kind == "text" else ("instruction", "input", "output")
    join = known.join

    def read(rows: Iterator[Row]) -> Iterator[Row]:
        if join is not None:
            yield {"text": join(row["text"] for row in rows)}
            return
        for row in rows:
            yield {key: row[key] for key in keys}

    rows = hub.streamed_rows if known.streamed else hub.all_rows
    return TextSource(
        name, known.kind, fingerprint, None, known.streamed, lambda: read(rows(place, split)),
        _first=lambda number: list(read(iter(hub.first_rows(place, split, number)))),
        open_stream=(lambda: hub.open_stream(place, split)) if known.streamed else None,
        read_streamed=lambda rows: hub.told(place, lambda: rows),
    )  # fmt: skip


def _open_hub(
    name: str, place: hub.Place, wanted: str | None, want: Want, fingerprint: str, columns: Columns
) -> TextSource:
    """A dataset on the hub: text, and whatever is read as text, is streamed, instructions are downloaded."""
    commit, seen = place.commit, hub.remembered(fingerprint)
    if seen is None or seen["layout"] not in LAYOUTS:
        split = hub.find_split(place, wanted)
        first = hub.first_rows(place, split, 1)
        if not first:
            raise UsageError(f"{place.repo} has no row in its split {split}.")
        found = layout_of(mapped(first[0], columns, f"{place.repo}:1"), f"{place.repo}:1")
        seen = {"split": split, "layout": found.name, "text": "by line" if hub.reads_lines(place) else ""}
        hub.remember(fingerprint, seen)
    split, layout = seen["split"], LAYOUTS[seen["layout"]]
    read = partial(_read_hub_row, layout=layout, columns=columns)

    def checked(rows: Iterator[Row]) -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            yield read(row, f"{place.repo}:{number}")

    streamed = layout.kind == "text" or want == "text"
    lines = ", each line of its files a text of its own" if seen.get("text") else ""
    rows = hub.streamed_rows if streamed else hub.all_rows
    return TextSource(
        name, layout.kind, fingerprint, None, streamed, lambda: checked(rows(place, split)),
        _first=lambda number: list(checked(iter(hub.first_rows(place, split, number)))),
        open_stream=(lambda: hub.open_stream(place, split)) if layout.kind == "text" else None,
        read_streamed=lambda rows: (read(row, place.repo) for row in hub.told(place, lambda: rows)),
        layout=layout.name, found_at=f"commit {commit[:8]}, split {split}{lines}",
    )  # fmt: skip


def _read_hub_row(row: Row, place: str, *, layout: Layout, columns: Columns) -> Row:
    return read_row(mapped(row, columns, place), layout, place)


def _open_pydoc(part: str, want: Want, fingerprint: str) -> TextSource:
    split: Split = "validation" if part == "validation" else "train"
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
        return TextSource(name, "text", fingerprint, None, False, lambda: iter([{"text": read_text(path)}]),
                          num_bytes=path.stat().st_size)  # fmt: skip
    layout, size = row_layout(path, columns), path.stat().st_size
    return TextSource(name, layout.kind, fingerprint, None, False, lambda: read_rows(path, layout, columns),
                      num_bytes=size, layout=layout.name)  # fmt: skip


def _no_rows(path: Path) -> Iterator[Row]:
    raise UsageError(f"{path} holds tokens, not text.", "Give a file of text or rows.")


def _as_text(rows: Iterator[Row]) -> Iterator[Row]:
    """Instruction rows as whole texts."""
    for row in rows:
        yield {"text": whole_text(row)}


# ---- where things lie


def _known_place(name: str) -> hub.Place:
    """Where a named source lies on the hub."""
    known = KNOWN[name]
    other = "The dataset slimpajama-6b is a part of it from another place; or use" if name == "slimpajama" else "Or use"
    instead = f"{other} data_dir=FOLDER with a local copy, or name a local file (docs/data.md)."
    return hub.Place(known.repo, known.config, instead=instead)


def _hub_place(name: str) -> hub.Place | None:
    """The dataset on the hub that `name` means; a path that is there, and a name that ends as files do, means none."""
    path = Path(os.path.expanduser(name))
    return None if is_format(path.name) or path.exists() else hub.parse(name)


def _user_file(name: str) -> Path:
    """The file that `name` is the path of."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if path.is_dir():
        hint = f"Files: {', '.join(FORMATS)}."
        if hub.parse(name) is not None:
            hint += " For the hub's dataset of this name, run the command in another folder."
        raise UsageError(f"{name} is a folder; a file is needed.", hint)
    if is_format(path.name):
        raise MissingError(f"No file {name}.", f"Seen from {Path.cwd()}.")
    raise UsageError(
        " ".join(filter(None, (f"There is no dataset or file {name!r}.", did_you_mean(name.lower(), SOURCES)))),
        f"Datasets: {', '.join(SOURCES)}; or a file ({', '.join(FORMATS)}). {hub.what_to_write(name)}",
    )
