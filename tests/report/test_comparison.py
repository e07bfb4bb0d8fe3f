"""The table in the paper's layout, every number worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lors_cli.output.markdown import Row
from lors_cli.report.comparison import model_label, notes, pattern_name, results_table
from lors_cli.report.measures import Group, ScoredModel, measures

PRUNE = {"method": "sparsegpt", "pattern": "2:4", "sparsity": None}
TUNE = {"method": "lors", "data": {"dataset": "alpaca"}}
LLAMA = "meta-llama/Llama-2-7b-hf"


def content(boolq: float, rte: float, perplexity: float | None) -> dict[str, Any]:
    return {
        "model": "x",
        "tasks": {"rte": {"acc": rte, "acc_stderr": 0.03, "num_samples": 10},
                  "boolq": {"acc": boolq, "acc_norm": 0.9, "acc_stderr": 0.04, "num_samples": 10}},
        "average": {"metric": "acc", "value": (boolq + rte) / 2, "tasks": ["rte", "boolq"]},
        "perplexity": {"wikitext2": {"value": perplexity, "tokens": 9, "sequence_length": 8}},
    }  # fmt: skip


def group(base: str = LLAMA, **changes: Any) -> Group:
    """SparseGPT took BoolQ from 80 to 60 and RTE from 60 to 50; LoRS brought them to 70 and 56."""
    prune = {**PRUNE, **changes.pop("prune", {})}
    dense = ScoredModel("dense", "dense", base, scores=content(0.8, 0.6, 5.0), **changes)
    pruned = ScoredModel("pruned", "SparseGPT", base, prune=prune, scores=content(0.6, 0.5, 20.0), **changes)
    tuned = ScoredModel("tuned", "SparseGPT + LoRS", base, prune=prune, tune=TUNE, scores=content(0.7, 0.56, 10.0),
                        shares={"accuracy": 0.08 / 0.15}, **changes)  # fmt: skip
    return Group("Llama", (dense, pruned, tuned))


def cells(row: Row) -> list[str]:
    return [f"{cell.text} {cell.extra}".strip() + ("!" if cell.is_best else "") for cell in row.cells]


def test_our_numbers_the_papers_and_the_difference() -> None:
    found = results_table([group()])
    assert found.columns == ("model", "BoolQ", "RTE", "average", "ppl wikitext2", "recovered acc")
    # The average's standard error is sqrt(3² + 4²) / 2; the paper's averages are of BoolQ and RTE alone.
    assert [cells(row) for row in found.rows] == [
        ["dense", "80.00 ± 4.00", "60.00 ± 3.00", "70.00 ± 2.50", "5.00", ""],
        ["paper (ours − paper)", "77.74 (+2.26)", "62.82 (-2.82)", "70.28 (-0.28)", "", ""],
        ["SparseGPT", "60.00 ± 4.00", "50.00 ± 3.00", "55.00 ± 2.50", "20.00", ""],
        ["paper (ours − paper)", "68.90 (-8.90)", "63.18 (-13.18)", "66.04 (-11.04)", "", ""],
        ["SparseGPT + LoRS", "70.00 ± 4.00!", "56.00 ± 3.00!", "63.00 ± 2.50!", "10.00!", "53.3%"],
        ["paper (ours − paper)", "74.22 (-4.22)", "63.90 (-7.90)", "69.06 (-6.06)", "", "71.2% (-17.9)"],
    ]
    assert [row.kind for row in found.rows] == ["row", "detail"] * 3


def test_an_unknown_model_has_no_papers_row() -> None:
    found = results_table([group("HuggingFaceTB/SmolLM2-135M")])
    assert [row.cells[0].text for row in found.rows] == ["dense", "SparseGPT", "SparseGPT + LoRS"]
    assert "LoRS, arXiv" not in " ".join(notes([group("HuggingFaceTB/SmolLM2-135M")]))


def test_groups_have_headings() -> None:
    rows = results_table([group("a/b"), group("c/d")]).rows
    assert [row.cells[0].text for row in rows if row.kind == "group"] == ["Llama", "Llama"]


def test_a_model_without_scores_says_why() -> None:
    failed = ScoredModel("tuned", "SparseGPT + SPP", LLAMA, prune=PRUNE, status="failed", error="no memory")
    (*_, row) = results_table([Group("g", (*group("a/b").models, failed))]).rows
    assert cells(row) == ["SparseGPT + SPP (failed)", "–", "–", "–", "–", "–"]


def test_equal_ones_are_all_best_unless_there_is_no_other() -> None:
    _, pruned, tuned = group("a/b").models
    again = replace(tuned, label="again")
    rows = results_table([Group("g", (pruned, tuned, again))]).rows
    assert [cells(row)[1] for row in rows] == ["60.00 ± 4.00", "70.00 ± 4.00!", "70.00 ± 4.00!"]
    for models in ((tuned, again), (tuned,)):
        assert "!" not in "".join(cell for row in results_table([Group("g", models)]).rows for cell in cells(row))


def test_numbers_that_are_missing_or_broken() -> None:
    broken = content(0.6, 0.5, None)
    broken["tasks"]["rte"] = {"acc": None, "num_samples": 10}
    broken["average"]["value"] = None
    dense = group("a/b").models[0]
    _, row = results_table([Group("g", (dense, ScoredModel("pruned", "SparseGPT", "a/b", scores=broken)))]).rows
    assert cells(row) == ["SparseGPT", "60.00 ± 4.00", "–", "–", "–"]


def test_other_metrics_follow_the_papers_tasks() -> None:
    scores = content(0.6, 0.5, 9.0)
    scores["tasks"] = {"gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1}, **scores["tasks"]}
    model = ScoredModel("dense", "dense", "a/b", scores=scores)
    assert [item.title for item in measures([model])][:3] == ["BoolQ", "RTE", "gsm8k exact_match,strict"]
    assert [item.metric for item in measures([model], with_norm=True)][:2] == ["acc", "acc_norm"]


def test_notes_name_what_is_not_as_in_the_paper() -> None:
    said = " ".join(notes([group(limit=200, prune={"refit": True})]))
    for words in ("arXiv:2501.08582, table 1", "first 200 documents", "refit True"):
        assert words in said
    plain = " ".join(notes([group()]))
    assert "documents" not in plain
    assert "settings" not in plain


def test_the_misprint_is_said_once_and_only_where_it_is_shown() -> None:
    prune = {"method": "sparsegpt", "pattern": "2:4"}
    twice = tuple(ScoredModel("tuned", name, "meta-llama/Meta-Llama-3-8B", prune=prune, tune=TUNE,
                              scores=content(0.7, 0.56, 10.0)) for name in ("a", "b"))  # fmt: skip
    said = " ".join(notes([Group("g", twice)]))
    assert said.count("prints 57.94") == 1
    assert "Llama-3-8B, SparseGPT + LoRS; the mean of its cells, 57.12, is shown" in said
    assert "57.94" not in " ".join(notes([group()]))


@pytest.mark.parametrize(
    ("role", "prune", "tune", "label"),
    [
        ("dense", PRUNE, TUNE, "dense"),
        ("pruned", PRUNE, {}, "SparseGPT"),
        ("tuned", PRUNE, TUNE, "SparseGPT + LoRS"),
        ("tuned", {}, TUNE, "LoRS"),
        ("tuned", {"method": "new"}, {}, "new + tuned"),
        ("pruned", {}, {}, "pruned"),
    ],
)
def test_labels(role: str, prune: dict[str, Any], tune: dict[str, Any], label: str) -> None:
    assert model_label(role, prune, tune) == label


def test_pattern_names() -> None:
    assert pattern_name(PRUNE) == "2:4"
    assert pattern_name({"pattern": "unstructured", "sparsity": 0.6}) == "60% unstructured"
    assert pattern_name({}) == ""
