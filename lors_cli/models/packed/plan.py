"""Which weights of a checkpoint are packed, to what pattern, and how many values each keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.models.grids import GRIDS_NAME
from lors_cli.models.packed.format import PADDING, WORD, num_stored, pack
from lors_cli.models.packed.measured import unpackable
from lors_cli.output import progress
from lors_cli.recipe.rules import LEAST_ZEROS
from lors_cli.sparsity import CANDIDATES, Pattern, num_violations

if TYPE_CHECKING:
    import torch

    from lors_cli.files.records import StageRecord
    from lors_cli.grid import Grid, GridSpec

SLACK = 1.05
"""N:M is packed as such where it keeps at most so many times the non-zeros; with more explicit zeros, unstructured."""


@dataclass(frozen=True)
class PackPlan:
    """What is packed: `modules` with the values, or bytes of codes, that each keeps; and linears that stay dense."""

    pattern: str
    modules: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    nonzeros: dict[str, int]
    dense: list[str]

    @property
    def held(self) -> Pattern | None:
        """The pattern N:M, None for unstructured."""
        return None if self.pattern == "unstructured" else Pattern.parse(self.pattern)


def plan_packing(
    path: str, names: Iterable[str], read: Callable[[str], torch.Tensor], usual: Any = None,
    grids: Mapping[str, Grid] | None = None, others: Sequence[str] = (),
) -> PackPlan:  # fmt: skip
    """Look at every weight once.

    Args:
        path: names the model in messages.
        names: of the linears.
        read: a linear's weight by name, (R, C).
        usual: a pattern that the model is said to have, tried first.
        grids: that weights lie on, by name; these are packed however few zeros they have.
        others: weights that cannot be packed.

    Raises:
        UsageError: none has enough zeros, or a weight does not lie on its grid.
    """
    import torch

    names, grids = list(names), grids or {}
    candidates = [Pattern(n, m, 1 - n / m) for n, m in CANDIDATES]
    if usual not in (None, "dense", "unstructured") and Pattern.parse(usual) not in candidates:
        candidates.insert(0, Pattern.parse(usual))
    nonzeros: dict[str, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    dense: list[str] = []
    stored: dict[str, int] = {}
    with progress.progress("count zeros", len(names), "weights") as task:
        for name in names:
            weight = read(name)
            count = int(torch.count_nonzero(weight))
            if name not in grids and count > (1 - LEAST_ZEROS) * weight.numel():
                dense.append(name)
            else:
                rows, columns = weight.shape
                nonzeros[name], shapes[name] = count, (rows, columns)
                stored[name] = _num_bytes(name, weight, grids[name]) if name in grids else count
                candidates = _kept_to(weight, candidates)
            task.advance()
    if not nonzeros:
        if not names:
            raise UsageError(f"{path} cannot be packed: {unpackable(others)}.")
        raise UsageError(
            f"{path} is dense: no linear of its decoder blocks is zero at {LEAST_ZEROS:.0%} of its places"
            f"{f', and {unpackable(others)}' if others else ''}.",
            "Prune it first: lors prune",
        )
    for pattern in candidates:
        kept = {name: rows * (columns // _m(pattern)) * (pattern.n or 0) for name, (rows, columns) in shapes.items()}
        if sum(kept.values()) <= SLACK * sum(nonzeros.values()):
            for name in kept.keys() & grids.keys():
                spec = grids[name].spec
                kept[name] = _bytes_of(pattern, *shapes[name], spec) or num_stored(read(name), pattern, spec)
            return PackPlan(str(pattern), kept, shapes, nonzeros, dense)
    return PackPlan("unstructured", stored, shapes, nonzeros, dense)


def _num_bytes(name: str, weight: torch.Tensor, grid: Grid) -> int:
    """Bytes of a weight's codes, all non-zeros kept."""
    try:
        return len(pack(weight, grid=grid).values) - PADDING
    except ValueError as error:
        raise UsageError(
            f"{name} and {GRIDS_NAME} beside the model do not fit: {error}.",
            "Was it tuned since it was quantised? tune.quantization_aware=true keeps to the grid. Or remove the folder "
            f"{GRIDS_NAME.partition('/')[0]}: then its values are packed as they are.",
        ) from error


def _bytes_of(pattern: Pattern, rows: int, columns: int, spec: GridSpec) -> int | None:
    """Bytes of the codes of N:M; None where words of the mask keep different numbers."""
    if spec.bits == 8:
        return rows * (columns // _m(pattern)) * (pattern.n or 0)
    if WORD % _m(pattern):
        return None
    whole, rest = divmod(columns, WORD)
    in_words = [(width // _m(pattern) * (pattern.n or 0) + 1) // 2 for width in (WORD, rest)]
    return rows * (whole * in_words[0] + in_words[1])


def recorded_kept(record: StageRecord | None, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """How many values each linear will keep, by the record of its checkpoint; empty where it does not say.

    Good to the digits that a record has of a share.
    """
    metrics = record.metrics if record else {}
    pattern = metrics.get("pattern")
    if pattern in (None, "dense"):
        return {}
    zeros = {layer["name"]: layer["sparsity"] for layer in metrics.get("layers", ()) if layer["name"] in shapes}
    sizes = {name: shapes[name][0] * shapes[name][1] for name, share in zeros.items() if share >= LEAST_ZEROS}
    kept = {name: round(size * (1 - zeros[name])) for name, size in sizes.items()}
    if pattern != "unstructured":
        held = Pattern.parse(pattern)
        filled = {name: size // _m(held) * (held.n or 0) for name, size in sizes.items()}
        if sum(filled.values()) <= SLACK * sum(kept.values()):
            return filled
    return kept


def _m(pattern: Pattern) -> int:
    assert pattern.m is not None
    return pattern.m


def _kept_to(weight: torch.Tensor, candidates: list[Pattern]) -> list[Pattern]:
    """Those of the patterns N:M that a weight keeps to; one that keeps to 2:4 keeps to 4:8."""
    held: list[Pattern] = []
    for pattern in candidates:
        if weight.shape[1] % _m(pattern):
            continue
        implied = any(_m(pattern) % _m(other) == 0 and pattern.sparsity == other.sparsity for other in held)
        if implied or not num_violations(weight, pattern):
            held.append(pattern)
    return held
