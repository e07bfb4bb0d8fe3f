"""lm-eval's values as plain JSON values."""

from __future__ import annotations

import json

import numpy as np

from lors_cli.evaluation.plain_results import finite, plain_result


def test_finite_gives_plain_numbers() -> None:
    assert finite(np.float32(0.5)) == 0.5
    assert type(finite(np.int64(3))) is int
    assert [finite(value) for value in ("N/A", float("nan"), float("inf"), None, [1])] == [None] * 5


def test_scores_are_whole_numbers_only_where_they_are_whole() -> None:
    def row(number: int, acc: object) -> dict[str, object]:
        return {"doc_id": number, "target": 0, "filter": "none", "filtered_resps": [(-1.0, False)],
                "metrics": ["acc", "acc_norm"], "acc": acc, "acc_norm": acc}  # fmt: skip

    values = [1.0, True, np.float64(0.0), np.float32(0.75), 0.25, 1 - 1e-9, float("nan")]
    results = {"samples": {"t": [row(number, acc) for number, acc in enumerate(values)]},
               "results": {"t": {"acc,none": 0.5}}, "n-samples": {"t": {"effective": 7}}}  # fmt: skip
    found = [sample["acc"] for sample in plain_result("t", "x t", results).samples]
    assert json.dumps(found) == "[1, 1, 0, 0.75, 0.25, 0.999999999, null]"
