"""`lors inspect`: the sparsity of any checkpoint, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli import run_dir
from lors_cli.sparsity import DENSE_BELOW, Pattern, measure, num_violations, summarise

if TYPE_CHECKING:
    from torch import nn

    from lors_cli.recipe import ModelConfig

CANDIDATES = ((1, 4), (2, 4), (1, 2), (2, 8), (4, 8), (4, 16), (8, 16), (16, 32))
TOLERATED = 0.01
"""Share of groups that may break an N:M pattern for it still to be recognised (and its violations counted)."""


def inspect(model: ModelConfig, pattern: Pattern | None = None) -> dict[str, Any]:
    """Sparsity, pattern and violations over the linears of the decoder blocks; embeddings and head are left out.

    Args:
        model: any checkpoint.
        pattern: what to hold it against; by default what its stage.json says, else what its zeros look like.

    Returns:
        The document of DESIGN §4: pattern, sparsity, violations, layers.
    """
    from lors_cli.models import load_model, prunable_linears

    folder = Path(model.path)
    record = run_dir.read_record(folder) if folder.is_dir() else None
    linears = prunable_linears(load_model(model))
    if pattern is None and record is not None:
        pattern = _recorded(record)
        names = {layer["name"] for layer in record.metrics.get("layers", ())}
        linears = {name: linear for name, linear in linears.items() if not names or name in names}
    if pattern is None:
        pattern = detect_pattern(linears)
    return summarise([measure(name, linear.weight, pattern) for name, linear in linears.items()], pattern)


def _recorded(record: run_dir.StageRecord) -> Pattern | None:
    name = record.metrics.get("pattern")
    if name in (None, "dense"):
        return None
    return Pattern.parse(name, record.metrics["sparsity"] * 0.999)


def detect_pattern(linears: dict[str, nn.Linear]) -> Pattern | None:
    """The pattern that the zeros of a model look like; None when it is dense.

    Args:
        linears: by full name.
    """
    weights = [linear.weight for linear in linears.values()]
    total = sum(weight.numel() for weight in weights)
    sparsity = sum(int((weight == 0).sum()) for weight in weights) / max(total, 1)
    if sparsity < DENSE_BELOW:
        return None
    for n, m in CANDIDATES:
        candidate = Pattern(n, m, 1 - n / m)
        if sparsity < candidate.sparsity - TOLERATED or any(weight.shape[1] % m for weight in weights):
            continue
        if sum(num_violations(weight, candidate) for weight in weights) <= TOLERATED * total / m:
            return candidate
    return Pattern(None, None, 0.999 * min(float((weight == 0).float().mean()) for weight in weights))
