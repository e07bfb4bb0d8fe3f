"""Sparsity patterns, their masks, and whether a weight keeps to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from lors_cli.recipe.schema import PruneConfig

DENSE_BELOW = 0.05
"""A weight with a smaller share of zeros counts as dense when nothing says that it was pruned."""
CANDIDATES = ((1, 4), (2, 4), (1, 2), (2, 8), (4, 8), (4, 16), (8, 16), (16, 32))
"""Patterns N:M that zeros are recognised by, in this order."""
DIGITS = 6
"""Of a share of zeros, in records."""


@dataclass(frozen=True)
class Pattern:
    """Which weights may stay: `n` of every `m` consecutive inputs of a row or, where these are None, a share of all."""

    n: int | None
    m: int | None
    sparsity: float

    @classmethod
    def parse(cls, pattern: str, sparsity: float | None = None) -> Pattern:
        """`2:4`, any `N:M`, or `unstructured` with a sparsity.

        Raises:
            UsageError: it is none of these.
        """
        if pattern == "unstructured":
            if sparsity is None or not 0 < sparsity < 1:
                raise UsageError("unstructured sparsity needs a share between 0 and 1, for example --sparsity 0.5")
            return cls(None, None, sparsity)
        n, separator, m = pattern.partition(":")
        if not (separator and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
            raise UsageError(f"{pattern!r} is no sparsity pattern; write N:M with 0 < N < M (2:4), or unstructured")
        return cls(int(n), int(m), 1 - int(n) / int(m))

    @classmethod
    def of(cls, config: PruneConfig) -> Pattern:
        """The pattern a prune config asks for."""
        return cls.parse(config.pattern, config.sparsity)

    def num_removed(self, num_weights: int) -> int:
        """How many of `num_weights` go: their share, rounded down to whole weights (0.29 of 100 is 29)."""
        return int(num_weights * self.sparsity + 1e-6)

    @property
    def structured(self) -> bool:
        """Whether it is N:M."""
        return self.m is not None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.structured else "unstructured"

    def check_shape(self, name: str, shape: Iterable[int]) -> None:
        """Refuse a weight whose inputs don't divide into groups of M.

        Raises:
            UsageError: naming the weight.
        """
        out_features, in_features = shape
        if self.m is not None and in_features % self.m:
            raise UsageError(
                f"{name} ({out_features} × {in_features}) cannot be {self}: {in_features} inputs are no multiple "
                f"of {self.m}."
            )


TWO_OF_FOUR = Pattern(2, 4, 0.5)
"""What GPUs of the field have circuits for."""


def keep_largest(scores: torch.Tensor, pattern: Pattern, *, per_row: bool) -> torch.Tensor:
    """The mask that keeps the highest scores.

    N:M compares within each group, unstructured over the whole weight, or with `per_row` within each row.

    Returns:
        (out_features, in_features) bool, True where the weight stays. Exactly the share asked for is removed,
        rounded down to whole weights; among equal scores the later go first, over the whole weight the later rows.
    """
    import torch

    if pattern.m is not None:
        groups = scores.unflatten(1, (-1, pattern.m)).unbind(-1)
        return torch.stack(keep_of_group(groups, pattern), dim=-1).flatten(1)
    rows = scores if per_row else scores.reshape(1, -1)
    num_kept = rows.shape[1] - pattern.num_removed(rows.shape[1])
    if num_kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    lowest_kept = _smallest(rows, rows.shape[1] - num_kept)
    mask = rows >= lowest_kept
    excess = mask.sum(-1, keepdim=True) - num_kept
    if bool(excess.any()):  # equal scores: as many of the last of them go
        tied = rows == lowest_kept
        from_the_right = tied.flip(-1).cumsum(-1, dtype=torch.int32)
        mask &= ~(tied & (from_the_right <= excess.int()).flip(-1))
    return mask.view_as(scores)


def _smallest(rows: torch.Tensor, number: int) -> torch.Tensor:
    """The value of every row that so many are smaller than, (rows, 1)."""
    import torch

    if rows.is_cuda and torch.are_deterministic_algorithms_enabled():  # kthvalue's place among equals is not
        return rows.sort(dim=-1).values[:, number, None]
    return rows.kthvalue(number + 1, dim=-1, keepdim=True).values


def keep_of_group(scores: Sequence[torch.Tensor], pattern: Pattern) -> list[torch.Tensor]:
    """The mask of M competing scores, which may be vectors or matrices; a score stays if fewer than N beat it.

    Among equal scores the earlier stay. Counting is several times quicker than sorting groups of four.
    """
    import torch

    assert pattern.n is not None
    masks = []
    for i, score in enumerate(scores):
        beaten = torch.zeros(score.shape, dtype=torch.int16, device=score.device)
        for j, other in enumerate(scores):
            if j != i:
                beaten += other >= score if j < i else other > score
        masks.append(beaten < pattern.n)
    return masks


def num_violations(weight: torch.Tensor, pattern: Pattern) -> int:
    """How many groups keep more than N weights; for unstructured, how many zeros are missing."""
    if pattern.m is not None:
        if weight.shape[1] % pattern.m:
            return weight.numel()
        kept = (weight != 0).unflatten(1, (-1, pattern.m)).sum(-1)
        return int((kept > pattern.n).sum())
    return missing_zeros(tuple(weight.shape), int((weight == 0).sum()), pattern)


def missing_zeros(shape: tuple[int, ...], num_zeros: int, pattern: Pattern) -> int:
    """How many zeros a weight lacks to unstructured sparsity.

    Shares are rounded down to whole weights in every row (Wanda) or in every 128 columns (SparseGPT), and to `DIGITS`
    where they come from a record.
    """
    rows, columns = shape
    by_row = rows * pattern.num_removed(columns)
    by_block = pattern.num_removed(rows * columns) - -(-columns // 128) - int(rows * columns * 0.5 / 10**DIGITS)
    return max(0, min(by_row, by_block) - num_zeros)


@dataclass(frozen=True)
class LayerSparsity:
    """One linear's zeros."""

    name: str
    shape: tuple[int, ...]
    num_zeros: int
    violations: int

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero."""
        return self.num_zeros / (self.shape[0] * self.shape[1])

    def as_packed(self, pattern: Pattern | None) -> tuple[int, int, float]:
        """Its rows, columns and the share that is kept when it is packed: N:M as N, zeros among them or not."""
        rows, columns = self.shape
        return rows, columns, 1 - (pattern.sparsity if pattern and pattern.structured else self.sparsity)


def measure(name: str, weight: torch.Tensor, pattern: Pattern | None) -> LayerSparsity:
    """Count a weight's zeros and its violations of `pattern` (none without one)."""
    violations = num_violations(weight, pattern) if pattern else 0
    return LayerSparsity(name, tuple(weight.shape), int((weight == 0).sum()), violations)


def summarise(layers: list[LayerSparsity], pattern: Pattern | None) -> dict[str, Any]:
    """The document of `lors inspect --json`, of every pruned linear; `pattern` is None for a dense model."""
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    zeros = sum(layer.num_zeros for layer in layers)
    return {
        "pattern": str(pattern) if pattern else "dense",
        "sparsity": round(zeros / total, DIGITS) if total else 0.0,
        "violations": sum(layer.violations for layer in layers),
        "layers": [{"name": layer.name, "shape": list(layer.shape), "sparsity": round(layer.sparsity, DIGITS)}
                   for layer in layers],
    }  # fmt: skip


def mask_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of where the given weights are zero, to tie an adapter to its base; their order does not matter."""
    import numpy as np

    parts = []
    for name, weight in weights:
        bits = np.packbits((weight != 0).cpu().numpy())
        parts.append((name, tuple(weight.shape), hashlib.sha256(bits.tobytes()).hexdigest()))
    return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()
