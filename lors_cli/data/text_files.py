"""Rows of local files: JSON lines, JSON, Parquet, CSV and plain text; every mistake with its file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lors_cli.data.layouts import KEYS, Layout, Row, layout_of, mapped, read_row, shown_value, with_newlines
from lors_cli.errors import UsageError

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".safetensors")
PACKABLE = (".jsonl", ".json", ".csv", ".tsv", ".txt")
PACKED = (".gz", ".zst")
Columns = Mapping[str, str] | None
"""Our names of columns to those of a file."""
MAX_ROW_BYTES = 64 << 20
"""Of a line in JSON lines."""
MAX_FILE_BYTES = 1 << 30
"""Of a .txt, or of a .json that is one list, which are read whole; unpacked."""
_HINT = 'A row is an object: {"text": …}, {"instruction": …, "output": …}, {"messages": […]} (docs/data.md).'


def file_format(path: Path) -> str:
    """How a file is to be read, by the end of its name: "jsonl", "json", "parquet", "csv", "tsv", "txt" or
    "safetensors".

    Raises:
        UsageError: its name ends otherwise.
    """
    found = _format(path.name)
    if found is None:
        raise UsageError(
            f"{path} is of no known format.",
            f"The name must end in {', '.join(FORMATS)}; {', '.join(PACKABLE)} also with {' or '.join(PACKED)}.",
        )
    return found


def is_format(name: str) -> bool:
    """Whether a name ends as those of files that can be read do."""
    return _format(name) is not None


def _format(name: str) -> str | None:
    name = name.lower()
    for suffix in FORMATS:
        packed = suffix in PACKABLE and name.endswith(tuple(suffix + packing for packing in PACKED))
        if name.endswith(suffix) or packed:
            return suffix[1:]
    return None


def row_layout(path: Path, columns: Columns = None) -> Layout:
    """What rows a file holds, judged by all keys of its first one; later rows must be alike.

    Raises:
        UsageError: the file is empty, or its first row is of no layout or of several.
    """
    for number, value in islice(json_values(path, columns), 1):
        if isinstance(value, dict):
            return layout_of(mapped(value, columns, f"{path}:{number}"), f"{path}:{number}")
        raise UsageError(f"{path}:{number}: not an object but {shown_value(value)}.", _HINT)
    raise UsageError(f"{path} is empty.", _HINT)


def read_rows(
    path: Path, layout: Layout, columns: Columns = None, only: Callable[[Row], bool] = lambda _: True
) -> Iterator[Row]:
    """The rows of a file of them, as their layout reads them; blank lines are passed over.

    Args:
        only: rows that are not meant are passed over.

    Raises:
        UsageError: a row is broken; the message says `file:row`, rows counted from 1 (lines in JSON lines).
    """
    for number, value in json_values(path, columns):
        place = f"{path}:{number}"
        if not isinstance(value, dict):
            raise UsageError(f"{place}: not an object but {shown_value(value)}.", _HINT)
        if only(value):
            yield read_row(mapped(value, columns, place), layout, place)


def read_text(path: Path) -> str:
    """The whole of a .txt file, packed or not, its line ends a newline each.

    Raises:
        UsageError: it is empty, or not UTF-8; the message names the line.
    """
    with _opened(path) as file:
        data = _whole(file, path)
    text = decode(path, 1, data).removeprefix("\ufeff")
    if not text.strip():
        raise UsageError(f"{path} is empty.")
    return with_newlines(text, str(path))


def json_values(path: Path, columns: Columns = None) -> Iterator[tuple[int, Any]]:
    """(row number, value) of a file of rows, not yet checked.

    Raises:
        UsageError: a row is no JSON, with file and row.
    """
    form = file_format(path)
    if form == "parquet":
        yield from _parquet_values(path, KEYS | set((columns or {}).values()))
        return
    if form in ("csv", "tsv"):
        yield from _table_values(path, "," if form == "csv" else "\t")
        return
    with _opened(path) as file:
        while (head := file.read(1)).isspace() or head in (b"\xef", b"\xbb", b"\xbf"):
            continue
    if head == b"[":  # a list, whatever the file is called
        yield from _array_values(path)
        return
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise UsageError(
                    f"{path}:{number}: a row of more than {MAX_ROW_BYTES >> 20} MiB.", "Split it: a row is one text."
                )
            text = decode(path, number, line).removeprefix("\ufeff" if number == 1 else "")
            if text.strip():
                yield number, _parse(path, number, text.rstrip())


def _whole(file: IO[bytes], path: Path) -> bytes:
    """All that is left of a file, which a small packed one may unpack to more than any memory holds."""
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} holds more than {MAX_FILE_BYTES >> 20} MiB.", "Give it as JSON lines.")
    return data


def _array_values(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a .json file that is one list."""
    with _opened(path) as file:
        text = decode(path, 1, _whole(file, path)).removeprefix("\ufeff")
    yield from enumerate(_parse(path, 1, text), 1)


def _table_values(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """The rows of a .csv or .tsv file, whose first line names its columns; numbers are those of a row's last line."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    width = len(reader.fieldnames or ())
                    raise UsageError(
                        f"{path}:{reader.line_num}: more or fewer than the {width} cells of the first line.",
                        "Put cells with a comma or a line end in double quotes.",
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.line_num}: broken table: {error}.") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error.reason}).", "Save the file as UTF-8.") from error


def _parquet_values(path: Path, wanted: set[str] | frozenset[str]) -> Iterator[tuple[int, Any]]:
    """The rows of a Parquet file; columns that are not wanted are null."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            names = batch.schema.names
            for value in batch.select([name for name in names if name in wanted]).to_pylist():
                number += 1
                yield number, dict.fromkeys(names) | value
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the machine's; pyarrow's own OSErrors have no number
            raise
        raise UsageError(f"{path}:{number + 1}: not a sound Parquet file: {error}") from error


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        row = number + error.lineno - 1
        raise UsageError(f"{path}:{row}: broken JSON: {error.msg} at column {error.colno}.", _HINT) from error
    except RecursionError as error:
        raise UsageError(f"{path}:{number}: JSON that is nested too deep.", _HINT) from error
    except ValueError as error:  # Python reads no number of more than 4300 digits
        raise UsageError(f"{path}:{number}: broken JSON: a number that is too long.", _HINT) from error


def decode(place: Path | str, number: int, data: bytes, hint: str = "Save it as UTF-8.") -> str:
    """Lines from `number` on of a file, or of what else `place` names.

    Raises:
        UsageError: they are not UTF-8; the message names the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        row = number + data.count(b"\n", 0, error.start)
        raise UsageError(f"{place}:{row}: not UTF-8 ({error.reason}).", hint) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked when its name ends in .gz or .zst."""
    with _unpacked(path) as file:
        try:
            yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is not a whole gzip file: {error}") from error
        except OSError as error:
            if error.errno is not None or not path.name.lower().endswith(".zst"):  # the machine's has a number
                raise
            raise UsageError(f"{path} is not a whole zstd file: {error}") from error


def _unpacked(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        import pyarrow  # whose reader knows a file that was cut off, as that of zstandard does not

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")
