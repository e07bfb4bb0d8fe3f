"""The documents of a source from a position on, in batches that can be gone on from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lors_cli.data.sources import TextSource
from lors_cli.data.tokenising import batches

Position = dict[str, Any]
"""{"documents": number read before}, and for the hub "state", with which datasets opens the right file at once."""
START: Position = {"documents": 0}


def read_documents(source: TextSource, position: Position) -> Iterator[tuple[list[str], Position]]:
    """Batches of texts from a position on (START, or one that was given before), each with the position after it.

    Blank texts are counted and left out; a batch may have no other.
    """
    dataset = source.open_stream() if source.open_stream is not None else None
    if dataset is None:
        rows: Iterator[Any] = islice(source.rows(), position["documents"], None)
    else:
        skipped = position["documents"]  # read before without the hub, from what is kept here
        if "state" in position:
            dataset.load_state_dict(position["state"])
            skipped = 0
        rows = islice(source.read_streamed(dataset), skipped, None)
    number = position["documents"]
    for texts in batches(row["text"] for row in rows):
        number += len(texts)
        after = {"documents": number, **({"state": dataset.state_dict()} if dataset is not None else {})}
        yield [text for text in texts if text.strip()], after
