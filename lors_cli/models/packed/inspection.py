"""The zeros of a packed checkpoint, counted where they lie: a weight at a time, unpacked only where it must be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.files import atomic
from lors_cli.models.packed.format import Packed, check, mask_key, row_starts, unpack
from lors_cli.models.quantised import PACKED
from lors_cli.models.tensor_files import entry_of
from lors_cli.sparsity import LayerSparsity, Pattern, missing_zeros, num_violations

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lors_cli.models.packed.checkpoint import Checkpoint


def packed_settings(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a packed checkpoint; None of any other."""
    settings: Any = atomic.read_json(folder / "config.json")
    found = settings.get("quantization_config") if isinstance(settings, dict) else None
    return found if isinstance(found, dict) and found.get("quant_method") == PACKED else None


def measure_packed(
    tensors: Mapping[str, Any], keys: Mapping[str, str], shapes: Mapping[str, tuple[int, int]],
    kept: Mapping[str, int], held: Pattern | None, patterns: Mapping[str, Pattern | None],
) -> list[LayerSparsity]:  # fmt: skip
    """Zeros and violations of packed weights.

    Args:
        tensors: of the files, as slices.
        keys: the files' names of the values, by name of the linear; `shapes` (R, C) and `kept` values likewise.
        held: N:M that the file says of its masks.
        patterns: what each weight is held against; None where nothing is known; only these are measured.

    Raises:
        UsageError: a weight is not as the file says.
    """
    found = []
    for name, pattern in patterns.items():
        values, mask = tensors[keys[name]][:], tensors[mask_key(keys[name])][:]
        check(name, values, mask, shapes[name], held, kept[name])
        zeros = math.prod(shapes[name]) - int(torch.count_nonzero(values))
        if pattern is None or (held is not None and (held.n, held.m) == (pattern.n, pattern.m)):
            broken = 0
        elif pattern.structured:
            packed = Packed(values, mask, row_starts(mask), shapes[name][1])
            broken = num_violations(unpack(packed), pattern)
        else:
            broken = missing_zeros(shapes[name], zeros, pattern)
        found.append(LayerSparsity(name, shapes[name], zeros, broken))
    return found


def packed_sizes(tensors: Mapping[str, Any], plain: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Bytes of the files' tensors, and what they would be unpacked; `plain` are packed weights' shapes, by key."""
    entries = {key: entry_of(key, tensor) for key, tensor in tensors.items()}
    total = sum(entry.num_bytes for entry in entries.values())
    packed = sum(entries[key].num_bytes + entries[mask_key(key)].num_bytes for key in plain)
    unpacked = sum(math.prod(shape) * entries[key].dtype.itemsize for key, shape in plain.items())
    return {"bytes": total, "bytes_plain": total - packed + unpacked}


def measure_checkpoint(
    source: Checkpoint, patterns: Mapping[str, Pattern | None] | None
) -> tuple[list[LayerSparsity], Pattern | None]:
    """A whole packed checkpoint, whatever is known of it.

    Args:
        patterns: what each weight is held against; None: to what the file says, unstructured to its own share.
    """
    assert source.config is not None
    held, kept = source.config.structured, source.config.modules
    names = list(kept) if patterns is None else [name for name in kept if name in patterns]
    wanted = {name: held if patterns is None else patterns[name] for name in names}
    layers = measure_packed(source.tensors, source.keys, source.shapes, kept, held, wanted)
    pattern = next(iter(wanted.values()), None)
    if patterns is None and held is None:
        zeros, total = sum(layer.num_zeros for layer in layers), sum(math.prod(layer.shape) for layer in layers)
        pattern = Pattern(None, None, zeros / max(total, 1))
    return layers, pattern
