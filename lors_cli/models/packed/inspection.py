"""The zeros of a packed checkpoint, counted where they lie: a weight at a time, unpacked only where it must be."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.files import atomic
from lors_cli.models.packed.format import grid_keys, mask_key, read_packed, unpack
from lors_cli.models.quantised import PACKED
from lors_cli.models.tensor_files import entry_of
from lors_cli.sparsity import LayerSparsity, Pattern, missing_zeros, num_violations

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lors_cli.grid import GridSpec
    from lors_cli.models.packed.checkpoint import Checkpoint


def packed_settings(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a packed checkpoint; None of any other."""
    settings: Any = atomic.read_json(folder / "config.json")
    found = settings.get("quantization_config") if isinstance(settings, dict) else None
    return found if isinstance(found, dict) and found.get("quant_method") == PACKED else None


def measure_packed(
    tensors: Mapping[str, Any], keys: Mapping[str, str], shapes: Mapping[str, tuple[int, int]],
    kept: Mapping[str, int], held: Pattern | None, patterns: Mapping[str, Pattern | None],
    specs: Mapping[str, GridSpec],
) -> list[LayerSparsity]:  # fmt: skip
    """Zeros and violations of packed weights.

    Args:
        tensors: of the files, as slices.
        keys: the files' names of the values, by name of the linear; `shapes` (R, C), `kept` values or bytes, and the
            grids of codes likewise.
        held: N:M that the file says of its masks.
        patterns: what each weight is held against; None where nothing is known; only these are measured.

    Raises:
        UsageError: a weight is not as the file says.
    """
    found = []
    for name, pattern in patterns.items():
        packed = read_packed(
            name, lambda key: tensors[key][...], keys[name], shapes[name], held, kept[name], specs.get(name)
        )
        weight = packed.values if packed.grid is None else unpack(packed)  # a code is 0 by its group's zero point
        zeros = math.prod(shapes[name]) - int(torch.count_nonzero(weight))
        if pattern is None or (held is not None and (held.n, held.m) == (pattern.n, pattern.m)):
            broken = 0
        elif pattern.structured:
            broken = num_violations(unpack(packed), pattern)
        else:
            broken = missing_zeros(shapes[name], zeros, pattern)
        found.append(LayerSparsity(name, shapes[name], zeros, broken))
    return found


def packed_facts(
    tensors: Mapping[str, Any], keys: Mapping[str, str], shapes: Mapping[str, tuple[int, int]],
    specs: Mapping[str, GridSpec],
) -> dict[str, Any]:  # fmt: skip
    """What `lors inspect` says besides: bytes of the files' tensors and of the plain ones; of codes, bits a weight."""
    entries = {key: entry_of(key, tensor) for key, tensor in tensors.items()}
    total = sum(entry.num_bytes for entry in entries.values())
    packed = unpacked = 0
    for name, key in keys.items():
        parts = grid_keys(key, specs.get(name))
        packed += sum(entries[part].num_bytes for part in (key, mask_key(key), *parts))
        unpacked += math.prod(shapes[name]) * entries[parts[0] if parts else key].dtype.itemsize
    found: dict[str, Any] = {"packed": {"bytes": total, "bytes_plain": total - packed + unpacked}}
    if specs:
        num_weights = sum(math.prod(shapes[name]) for name in keys)
        found |= {"quantize": asdict(next(iter(specs.values()))), "bits_a_weight": round(8 * packed / num_weights, 4),
                  "off_grid": 0}  # fmt: skip
    return found


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
    layers = measure_packed(source.tensors, source.keys, source.shapes, kept, held, wanted, source.specs)
    pattern = next(iter(wanted.values()), None)
    if patterns is None and held is None:
        zeros, total = sum(layer.num_zeros for layer in layers), sum(math.prod(layer.shape) for layer in layers)
        pattern = Pattern(None, None, zeros / max(total, 1))
    return layers, pattern
