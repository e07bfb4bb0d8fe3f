"""The LoRS paper's own figures, to stand beside what was measured, and how the papers write methods and tasks.

Source: LoRS Tables 1-4, arXiv:2501.08582; `paper_tables.json` has every row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lors_cli.models.sources import short_name

SOURCE = "LoRS, arXiv:2501.08582"
METHODS = {
    "magnitude": "Magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "ria": "RIA", "admm": "ADMM",
    "lors": "LoRS", "sqft": "SQFT", "sqft-gc": "SQFT-gc", "spp": "SPP", "spp-gc": "SPP-gc", "hira": "HiRA",
    "hira-gc": "HiRA-gc", "lora": "LoRA",
}  # fmt: skip
TASKS = {
    "arc_challenge": "ARC-c", "arc_easy": "ARC-e", "boolq": "BoolQ", "hellaswag": "HellaSwag",
    "openbookqa": "OpenBookQA", "rte": "RTE", "winogrande": "WinoGrande",
}  # fmt: skip
"""In the order of the LoRS paper's tables."""
_TABLES = Path(__file__).with_name("paper_tables.json")


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables; None where the paper names nothing (a dense model has no pruner)."""

    table: int
    model: str
    prune: str | None
    tune: str | None
    pattern: str | None
    data: str | None
    acc: dict[str, float]
    """Accuracy in percent by task, in the paper's order."""
    average_printed: float
    """As the paper prints it; one of them is not the mean of its row."""

    def average(self, tasks: Iterable[str] | None = None) -> float | None:
        """The mean of these cells (None: of all seven) in percent, None when one of them is not in the paper."""
        names = list(self.acc) if tasks is None else list(tasks)
        if not names or not set(names) <= self.acc.keys():
            return None
        return math.fsum(self.acc[name] for name in names) / len(names)

    @property
    def is_misprinted(self) -> bool:
        """Whether the printed average is further from the cells' mean than rounding explains."""
        mean = self.average()
        return mean is not None and abs(mean - self.average_printed) > 0.015


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Every row, in the order of the tables."""
    content = json.loads(_TABLES.read_text(encoding="utf-8"))
    return tuple(PaperRow(**row) for row in content["rows"])


def find_paper_row(
    model: str, *, prune: str | None = None, pattern: str | None = None, sparsity: float | None = None,
    tune: str | None = None, data: str | None = None,
) -> PaperRow | None:  # fmt: skip
    """The paper's row for a model (see `model_key`) and how it was pruned and tuned, None when it has none.

    Of unstructured models the paper has sparsity 0.5 alone. Recomputing layers changes no result: sqft-gc is sqft.
    """
    if pattern == "unstructured" and sparsity != 0.5:
        return None
    method = tune.removesuffix("-gc") if tune else None
    wanted = (model_key(model), prune, pattern if prune else None, method, data if method else None)
    for row in paper_rows():
        if (model_key(row.model), row.prune, row.pattern, row.tune, row.data) == wanted:
            return row
    return None


def model_key(path: str) -> str:
    """A model's name without what hub ids of the same weights differ in.

    `meta-llama/Meta-Llama-3-8B`, a folder of that name and the hub's cache folder are llama-3-8b; an instruct or chat
    model keeps its ending and so is another model.
    """
    return short_name(path).lower().removeprefix("meta-").removesuffix("-hf")
