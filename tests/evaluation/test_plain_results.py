"""lm-eval's values as plain JSON values."""

from __future__ import annotations

from lors_cli.evaluation.plain_results import finite


def test_finite_gives_plain_numbers() -> None:
    import numpy as np

    assert finite(np.float32(0.5)) == 0.5
    assert type(finite(np.int64(3))) is int
    assert [finite(value) for value in ("N/A", float("nan"), float("inf"), None, [1])] == [None] * 5
