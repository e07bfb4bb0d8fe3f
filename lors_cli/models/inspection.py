"""`lors inspect`: the sparsity of any checkpoint, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.models.blocks import PrunableWeight, prunable_weights
from lors_cli.sparsity import DENSE_BELOW, Pattern, measure, num_violations, summarise

if TYPE_CHECKING:
    from lors_cli.recipe.schema import ModelConfig

CANDIDATES = ((1, 4), (2, 4), (1, 2), (2, 8), (4, 8), (4, 16), (8, 16), (16, 32))
TOLERATED = 0.01
"""Share of groups that may break an N:M pattern for it still to be recognised (and its violations counted)."""


def inspect(model: ModelConfig, pattern: Pattern | None = None) -> dict[str, Any]:
    """Sparsity, pattern and violations over the decoder blocks' weights; embeddings, head and routers are left out.

    Args:
        pattern: what to hold it against; by default what its stage.json says, else what its zeros look like.

    Returns:
        The document of `lors inspect --json`: pattern, sparsity, violations, layers.
    """
    from lors_cli.models.loading import load_model

    folder = Path(model.path)
    record = records.read_record(folder) if folder.is_dir() else None
    weights = prunable_weights(load_model(model))
    held_to = {} if pattern else layer_patterns(weights, record)
    patterns: dict[str, Pattern | None] = {**held_to} if held_to else dict.fromkeys(weights, pattern)
    layers = [measure(name, weights[name].matrix, held) for name, held in patterns.items()]
    return summarise(layers, next(iter(patterns.values()), None))


def layer_patterns(weights: dict[str, PrunableWeight], record: records.StageRecord | None) -> dict[str, Pattern]:
    """What each pruned weight keeps to (none of a dense model), by the stage record beside a checkpoint or its zeros.

    Unstructured sparsity is held to by each weight on its own: it may differ from one to the next.

    Raises:
        UsageError: the record names a weight that the model lacks.
    """
    name = record.metrics.get("pattern") if record else None
    if record is not None and name not in (None, "dense"):
        shares = {layer["name"]: layer["sparsity"] for layer in record.metrics["layers"]}
        missing = [layer for layer in shares if layer not in weights]
        if missing:
            raise UsageError(f"stage.json names {missing[0]}, which the checkpoint does not have.")
        if name != "unstructured":
            return dict.fromkeys(shares, Pattern.parse(name))
        return {layer: Pattern(None, None, share) for layer, share in shares.items()}
    found = detect_pattern(weights)
    if found is None:
        return {}
    zeros = {layer: float((weight.matrix == 0).double().mean()) for layer, weight in weights.items()}
    return {layer: found if found.structured else Pattern(None, None, share)
            for layer, share in zeros.items() if share >= DENSE_BELOW}  # fmt: skip


def detect_pattern(weights: dict[str, PrunableWeight]) -> Pattern | None:
    """The pattern that the zeros of a model look like; None when it is dense."""
    matrices = [weight.matrix for weight in weights.values()]
    total = sum(matrix.numel() for matrix in matrices)
    sparsity = sum(int((matrix == 0).sum()) for matrix in matrices) / max(total, 1)
    if sparsity < DENSE_BELOW:
        return None
    for n, m in CANDIDATES:
        candidate = Pattern(n, m, 1 - n / m)
        if sparsity < candidate.sparsity - TOLERATED or any(matrix.shape[1] % m for matrix in matrices):
            continue
        if sum(num_violations(matrix, candidate) for matrix in matrices) <= TOLERATED * total / m:
            return candidate
    return Pattern(None, None, sparsity)
