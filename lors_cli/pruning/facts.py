"""What fingerprints and estimates must know of the methods; light, where the methods load torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from lors_cli.grid import GridSpec

if TYPE_CHECKING:
    from lors_cli.recipe.schema import PruneConfig

Kind = Literal["none", "norm", "hessian"]
STATISTICS: dict[str, Kind] = {
    "magnitude": "none", "wanda": "norm", "ria": "norm", "sparsegpt": "hessian", "admm": "hessian",
}  # fmt: skip
"""What each method looks at."""
ADMM_ITERATIONS = 20
REFIT_ITERATIONS = 32
DESCENT_PASSES = 3
"""Over the codes of weights on grids."""
CAST_BYTES = 256 << 20
"""Of inputs that are held in float32 at a time, while they are summed."""


def statistics_kind(config: PruneConfig) -> Kind:
    """What must be known of the inputs: what the method looks at; the Hessian when weights are refitted or rounded."""
    return "hessian" if config.refit or config.quantize else STATISTICS[config.method]


def grid_spec(config: PruneConfig) -> GridSpec | None:
    """The grids that kept weights are rounded to; None where they stay floats."""
    return GridSpec(**asdict(config.quantize)) if config.quantize else None
