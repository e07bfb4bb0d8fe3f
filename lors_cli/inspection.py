"""`lors inspect`: the sparsity of any checkpoint, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli import run_dir
from lors_cli.errors import UsageError
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
    held_to = {} if pattern else layer_patterns(linears, record)
    patterns: dict[str, Pattern | None] = {**held_to} if held_to else dict.fromkeys(linears, pattern)
    layers = [measure(name, linears[name].weight, held) for name, held in patterns.items()]
    return summarise(layers, next(iter(patterns.values()), None))


def layer_patterns(linears: dict[str, nn.Linear], record: run_dir.StageRecord | None) -> dict[str, Pattern]:
    """What each pruned linear keeps to, from the stage record beside a checkpoint or else from its zeros.

    Unstructured sparsity is held to by each linear on its own: it may differ from one to the next.

    Args:
        linears: of the decoder blocks, by full name.
        record: of the stage that wrote the checkpoint, if there is one.

    Returns:
        The pattern of every pruned linear; empty for a dense model.

    Raises:
        UsageError: the record names a linear that the model lacks.
    """
    name = record.metrics.get("pattern") if record else None
    if record is not None and name not in (None, "dense"):
        shares = {layer["name"]: layer["sparsity"] for layer in record.metrics["layers"]}
        missing = [layer for layer in shares if layer not in linears]
        if missing:
            raise UsageError(f"stage.json names {missing[0]}, which the checkpoint does not have.")
        if name != "unstructured":
            return dict.fromkeys(shares, Pattern.parse(name))
        return {layer: Pattern(None, None, share) for layer, share in shares.items()}
    found = detect_pattern(linears)
    if found is None:
        return {}
    zeros = {layer: float((linear.weight == 0).double().mean()) for layer, linear in linears.items()}
    if found.structured:
        return {layer: found for layer, share in zeros.items() if share >= DENSE_BELOW}
    return {layer: Pattern(None, None, share) for layer, share in zeros.items() if share >= DENSE_BELOW}


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
    return Pattern(None, None, sparsity)
