"""Rows of local files: JSON lines, JSON, Parquet and plain text; every mistake with its file and row."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from lors_cli.errors import UsageError, shorten

FORMATS = (".jsonl", ".json", ".parquet", ".txt", ".safetensors")
MAX_ROW_BYTES = 64 << 20
"""Of a line in JSON lines."""
MAX_FILE_BYTES = 1 << 30
"""Of a .txt, or of a .json that is one list, which are read whole; unpacked."""
_HINT = 'A row is {"text": …} or {"instruction": …, "output": …} with an optional "input".'
SURROGATE = re.compile("[\ud800-\udfff]")
_KEYS = {"text": ("text",), "instructions": ("instruction", "input", "output")}


def file_format(path: Path) -> str:
    """How a file is to be read, by the end of its name: "jsonl", "json", "parquet", "txt" or "safetensors".

    Raises:
        UsageError: its name ends otherwise.
    """
    name = path.name.lower()
    for suffix in FORMATS:
        gzipped = suffix in (".jsonl", ".json", ".txt") and name.endswith(f"{suffix}.gz")
        if name.endswith(suffix) or gzipped:
            return suffix[1:]
    raise UsageError(
        f"{path} is of no known format.",
        f"The name must end in {', '.join(FORMATS)}; .jsonl, .json and .txt also with .gz.",
    )


def row_kind(path: Path) -> Literal["text", "instructions"]:
    """Whether a file holds texts or instructions, judged by its first row.

    A row with both (the hub's table of Alpaca has both) counts as an instruction.

    Raises:
        UsageError: the file is empty or its first row is neither.
    """
    for number, value in islice(json_values(path), 1):
        if isinstance(value, dict):
            if "instruction" in value and "output" in value:
                return "instructions"
            if "text" in value:
                return "text"
        raise UsageError(f"{path}:{number}: this row is neither text nor an instruction.", _HINT)
    raise UsageError(f"{path} is empty.", _HINT)


def read_rows(
    path: Path, kind: Literal["text", "instructions"], only: Callable[[dict[str, Any]], bool] = lambda _: True
) -> Iterator[dict[str, str]]:
    """The rows of a .jsonl, .json (a list, or JSON lines) or .parquet file; blank lines are passed over.

    Returns:
        {"text"} or {"instruction", "input", "output"}, other keys left out.

    Raises:
        UsageError: a row is broken; the message says `file:row`, rows counted from 1 (lines in JSON lines).
    """
    for number, value in json_values(path):
        if not isinstance(value, dict):
            raise UsageError(f"{path}:{number}: not an object but {shown_value(value)}.", _HINT)
        if only(value):
            yield {key: _text_of(path, number, value, key) for key in _KEYS[kind]}


def read_text(path: Path) -> str:
    """The whole of a .txt or .txt.gz file, with newlines as they are.

    Raises:
        UsageError: it is empty, or not UTF-8; the message names the line.
    """
    with _opened(path) as file:
        data = _whole(file, path)
    text = _decode(path, 1, data).removeprefix("\ufeff")
    if not text.strip():
        raise UsageError(f"{path} is empty.")
    return text


def _text_of(path: Path, number: int, value: dict[str, Any], key: str) -> str:
    """One value of a row, checked."""
    found = value.get(key)
    if key == "input" and found is None:
        return ""
    if key not in value:
        near = f" It has {', '.join(map(repr, value))}." if value else " It is empty."
        raise UsageError(f"{path}:{number}: the row has no {key!r}.{near}", _HINT)
    if not isinstance(found, str):
        raise UsageError(f"{path}:{number}: {key!r} must be text, not {shown_value(found)}.", _HINT)
    if SURROGATE.search(found):
        raise UsageError(f"{path}:{number}: {key!r} holds half a surrogate pair, which is no character.")
    return found


def shown_value(value: Any) -> str:
    """A JSON value for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return shorten(text, 41)


def json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number, value) of a file of rows, not yet checked.

    Raises:
        UsageError: a row is no JSON, with file and row.
    """
    form = file_format(path)
    if form == "parquet":
        yield from _parquet_values(path)
        return
    if form == "json":
        with _opened(path) as file:
            while (head := file.read(1)).isspace() or head in (b"\xef", b"\xbb", b"\xbf"):
                continue
        if head == b"[":
            yield from _array_values(path)
            return
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise UsageError(
                    f"{path}:{number}: a row of more than {MAX_ROW_BYTES >> 20} MiB.", "Split it: a row is one text."
                )
            text = _decode(path, number, line).removeprefix("\ufeff" if number == 1 else "")
            if text.strip():
                yield number, _parse(path, number, text.rstrip())


def _whole(file: IO[bytes], path: Path) -> bytes:
    """All that is left of a file, which a small gzip may unpack to more than any memory holds."""
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} holds more than {MAX_FILE_BYTES >> 20} MiB.", "Give it as JSON lines.")
    return data


def _array_values(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a .json file that is one list."""
    with _opened(path) as file:
        text = _decode(path, 1, _whole(file, path)).removeprefix("\ufeff")
    yield from enumerate(_parse(path, 1, text), 1)


def _parquet_values(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a Parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            columns = [name for name in batch.schema.names if name in ("text", *_KEYS["instructions"])]
            for value in batch.select(columns).to_pylist():
                number += 1
                yield number, value
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


def _decode(path: Path, number: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        row = number + data.count(b"\n", 0, error.start)
        raise UsageError(f"{path}:{row}: not UTF-8 ({error.reason}).", "Save the file as UTF-8.") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked when its name ends in .gz."""
    gzipped = path.name.lower().endswith(".gz")
    with gzip.open(path, "rb") if gzipped else open(path, "rb") as file:
        try:
            yield file  # type: ignore[misc]
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is not a whole gzip file: {error}") from error
