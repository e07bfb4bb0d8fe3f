"""How large a packed checkpoint is and how fast: by its record, and by `lors bench --decode` where that lies beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lors_cli.files import atomic, records
from lors_cli.models.card import PackedSize
from lors_cli.models.sources import is_known_as
from lors_cli.output import console

FOLDER_NAME, FILE_NAME = "bench", "bench.json"


def unpackable(names: Sequence[str]) -> str:
    """What is said of weights that cannot be packed."""
    return (
        f"{console.counted(len(names), 'weight')} of experts in one tensor or Conv1D cannot be packed, first {names[0]}"
    )


def packed_size(folder: Path, record: records.StageRecord) -> PackedSize:
    """Of a packed checkpoint and its record, with what was measured of it."""
    return size_said(record.metrics, measured_speed(folder, record))


def size_said(metrics: Mapping[str, Any], speed: str = "") -> PackedSize:
    """By the metrics of a pack stage."""
    return PackedSize(metrics["bytes"], metrics["bytes_before"], speed, metrics.get("quantize", {}).get("bits"))


def measured_speed(folder: Path, record: records.StageRecord) -> str:
    """One sentence on how much faster a packed checkpoint decodes; empty where that was not measured.

    Args:
        folder: the checkpoint's; `lors bench --decode --model FOLDER --out …/bench` writes beside it.
        record: the checkpoint's.
    """
    document = atomic.read_json(folder.resolve().parent / FOLDER_NAME / FILE_NAME)
    if not isinstance(document, dict) or not is_known_as(document.get("model"), folder, record):
        return ""
    try:
        return _sentence(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # another version's, or changed by hand
        console.detail(f"  {folder.parent / FOLDER_NAME / FILE_NAME} says no speed: {type(error).__name__} {error}")
        return ""


def _sentence(document: dict[str, Any]) -> str:
    environment, settings = document["environment"], document["settings"]
    if settings["blocks"] is not None:  # not of the whole model
        return ""
    (cell,) = [found for name, found in document["cells"].items() if name.startswith("decode ")]
    dense, packed = (cell[arm]["tokens_per_s"]["median"] for arm in ("dense", "packed"))
    where = f"{environment['device']}, {console.counted(environment['threads'], 'thread')}"
    kernel = f", {environment['kernel']}" if environment.get("kernel") else ""
    return (
        f"Decoding at batch {settings['batch_size']} in {settings['dtype']} ({where}{kernel}): {packed:,.1f} tokens/s "
        f"packed, {dense:,.1f} dense, {cell['dense_over_packed']['median']:.2f} times as fast."
    )
