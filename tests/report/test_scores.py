"""The table of scores by model, task and cell, every number worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scored_models import scored

from lors_cli.evaluation.summary import average
from lors_cli.output.markdown import Row
from lors_cli.report.measures import Group, ScoredModel, measures
from lors_cli.report.scores import by_cell, by_model, by_task, notes

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
    prune, tune = {**PRUNE, **changes.pop("prune", {})}, {**TUNE, **changes.pop("tune", {})}
    dense = ScoredModel("dense", "dense", base, scores=content(0.8, 0.6, 5.0), **changes)
    pruned = ScoredModel("pruned", "SparseGPT", base, prune=prune, scores=content(0.6, 0.5, 20.0), **changes)
    tuned = ScoredModel("tuned", "SparseGPT + LoRS", base, prune=prune, tune=tune, scores=content(0.7, 0.56, 10.0),
                        shares={"accuracy": 0.08 / 0.15}, **changes)  # fmt: skip
    return Group("Llama", (dense, pruned, tuned))


def cells(row: Row) -> list[str]:
    return [f"{cell.text} {cell.extra}".strip() + ("!" if cell.is_best else "") for cell in row.cells]


def test_our_numbers_the_papers_and_the_difference() -> None:
    found = by_model([group()])
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
    found = by_model([group("HuggingFaceTB/SmolLM2-135M")])
    assert [row.cells[0].text for row in found.rows] == ["dense", "SparseGPT", "SparseGPT + LoRS"]
    assert "LoRS, arXiv" not in " ".join(notes([group("HuggingFaceTB/SmolLM2-135M")]))


def test_groups_have_headings() -> None:
    rows = by_model([group("a/b"), group("c/d")]).rows
    assert [row.cells[0].text for row in rows if row.kind == "group"] == ["Llama", "Llama"]


def test_a_model_without_scores_says_why() -> None:
    failed = ScoredModel("tuned", "SparseGPT + SPP", LLAMA, prune=PRUNE, status="failed", error="no memory")
    (*_, row) = by_model([Group("g", (*group("a/b").models, failed))]).rows
    assert cells(row) == ["SparseGPT + SPP (failed)", "–", "–", "–", "–", "–"]


def test_equal_ones_are_all_best_unless_there_is_no_other() -> None:
    _, pruned, tuned = group("a/b").models
    again = replace(tuned, label="again")
    rows = by_model([Group("g", (pruned, tuned, again))]).rows
    assert [cells(row)[1] for row in rows] == ["60.00 ± 4.00", "70.00 ± 4.00!", "70.00 ± 4.00!"]
    for models in ((tuned, again), (tuned,)):
        assert "!" not in "".join(cell for row in by_model([Group("g", models)]).rows for cell in cells(row))


def test_models_that_only_have_names_have_no_best() -> None:
    dense, pruned, tuned = group("a/b").models
    named = [replace(model, role="", shares={}) for model in (dense, pruned, tuned)]  # one of them is dense
    for models, expected in ((named, set()), ([*named, pruned, replace(tuned, label="best")], {"best"})):
        shown = [Group("g", tuple(models))]
        best = {row.cells[0].text for row in by_model(shown).rows for cell in row.cells if cell.is_best}
        assert best == expected
        assert ("Bold" in " ".join(notes(shown))) == bool(expected)


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"num_samples": 5}, ["BoolQ", "average"]),
        ({"tasks": ["boolq"]}, ["average"]),
        ({"tokens": 99}, ["ppl wikitext2"]),
        ({"sequence_length": 4}, ["ppl wikitext2"]),
        ({}, []),
    ],
)
def test_of_what_was_not_measured_alike_none_is_best(change: dict[str, Any], columns: list[str]) -> None:
    dense, pruned, tuned = group("a/b").models
    scored = content(0.7, 0.56, 10.0)
    places = {"num_samples": scored["tasks"]["boolq"], "tasks": scored["average"]}
    for name, value in change.items():
        places.get(name, scored["perplexity"]["wikitext2"])[name] = value
    shown = [Group("g", (dense, pruned, replace(tuned, scores=scored, shares={})))]
    table = by_model(shown)
    best = {title for title, found in zip(table.columns, table.rows[-1].cells, strict=True) if found.is_best}
    assert best == {"BoolQ", "RTE", "average", "ppl wikitext2"} - {*columns}
    said = " ".join(notes(shown))
    assert (f"not all of them compare: {', '.join(columns)}." in said) == bool(columns)
    assert ("compare" in said) == bool(columns)


def test_numbers_that_are_missing_or_broken() -> None:
    broken = content(0.6, 0.5, None)
    broken["tasks"]["rte"] = {"acc": None, "num_samples": 10}
    broken["average"]["value"] = None
    dense = group("a/b").models[0]
    _, row = by_model([Group("g", (dense, ScoredModel("pruned", "SparseGPT", "a/b", scores=broken)))]).rows
    assert cells(row) == ["SparseGPT", "60.00 ± 4.00", "–", "–", "–"]


def test_other_metrics_follow_the_papers_tasks() -> None:
    scores = content(0.6, 0.5, 9.0)
    scores["tasks"] = {"gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1}, **scores["tasks"]}
    model = ScoredModel("dense", "dense", "a/b", scores=scores)
    assert [item.title for item in measures([model])][:3] == ["BoolQ", "RTE", "gsm8k exact_match,strict"]
    assert [item.metric for item in measures([model], every_metric=True)][:2] == ["acc", "acc_norm"]


def test_notes_name_what_is_not_as_in_the_paper() -> None:
    said = " ".join(notes([group(limit=200, prune={"refit": True})]))
    for words in ("arXiv:2501.08582, table 1", "first 200 documents", "refit True"):
        assert words in said
    said = " ".join(notes([group(tune={"gradient": "rotating"})]))
    assert "LoRS's gradients had the mask in them here" in said
    plain = " ".join(notes([group(tune={"gradient": "approximate"})]))
    assert "gradients" not in plain
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


# By task --------------------------------------------------------------------------------------------------------


def test_table(trio: dict[str, Any]) -> None:
    columns, rows = by_task(trio)
    assert columns == ["task", "dense", "pruned", "Δ dense", "tuned", "Δ dense", "recovered"]
    assert rows == [
        ["arc_easy", "60.00 ± 1.23", "40.00 ± 1.23", "-20.00", "55.00 ± 1.23", "-5.00", ""],
        ["  acc_norm", "50.00", "30.00", "-20.00", "45.00", "-5.00", ""],
        ["boolq", "80.00 ± 2.00", "60.00 ± 2.00", "-20.00", "75.00 ± 2.00", "-5.00", ""],
        ["average acc", "70.00", "50.00", "-20.00", "65.00", "-5.00", "75.0%"],
        ["perplexity wikitext2", "7.389", "20.086", "+12.696", "9.488", "+2.099", "75.0%"],
    ]


def test_one_model_of_any_name(trio: dict[str, Any]) -> None:
    columns, rows = by_task({"mine": trio["dense"]})
    assert columns == ["task", "mine"]
    assert rows[-2:] == [["average acc", "70.00"], ["perplexity wikitext2", "7.389"]]


def test_two_models_are_compared_to_the_first(trio: dict[str, Any]) -> None:
    columns, rows = by_task({"a": trio["tuned"], "b": trio["pruned"]})
    assert columns == ["task", "a", "b", "Δ a"]
    assert rows[0] == ["arc_easy", "55.00 ± 1.23", "40.00 ± 1.23", "-15.00"]


def test_missing_values_are_dashes_and_no_average_is_invented() -> None:
    broken = scored(None, 0.5, 0.8, None)
    assert broken["average"]["value"] is None
    _, rows = by_task({"dense": broken})
    assert rows[0] == ["arc_easy", "–"]
    assert [row[0] for row in rows] == ["arc_easy", "  acc_norm", "boolq", "perplexity wikitext2"]
    assert rows[-1][1] == "–"


def test_task_without_accuracy_shows_its_own_metric() -> None:
    tasks = {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1, "num_samples": 4}}
    result = {"model": "m", "tasks": tasks, "average": average(tasks), "perplexity": {}}
    assert by_task({"m": result}) == (["task", "m"], [["gsm8k exact_match,strict-match", "25.00 ± 10.00"]])


def test_every_metric_has_its_row_below_the_tasks_accuracy() -> None:
    tasks = {
        "mrpc": {"acc": 0.5, "acc_stderr": 0.01, "f1": 0.75, "f1_stderr": 0.02, "num_samples": 9},
        "lambada": {"perplexity": 20.5, "perplexity_stderr": 1.0, "acc": 0.25, "num_samples": 9},
    }
    result = {"model": "m", "tasks": tasks, "average": average(tasks), "perplexity": {}}
    assert by_task({"m": result})[1] == [
        ["mrpc", "50.00 ± 1.00"], ["  f1", "0.750"], ["lambada", "25.00"], ["  perplexity", "20.500"],
        ["average acc", "37.50"],
    ]  # fmt: skip


# By cell --------------------------------------------------------------------------------------------------------


def scores(acc: float, perplexity: float) -> dict[str, Any]:
    tasks = {"rte": {"acc": acc, "acc_stderr": 0.03}, "boolq": {"acc": acc, "acc_stderr": 0.04}}
    return {
        "tasks": tasks, "average": {"metric": "acc", "value": acc, "tasks": ["rte", "boolq"]},
        "perplexity": {"wikitext2": {"value": perplexity, "tokens": 9, "sequence_length": 9}},
    }  # fmt: skip


def cell(name: str, acc: float, perplexity: float, status: str = "done") -> dict[str, Any]:
    results = {"dense": scores(0.6, 10.0), "pruned": scores(0.4, 1000.0), "tuned": scores(acc, perplexity)}
    if status != "done":
        del results["tuned"]
    return {"name": name, "status": status, "models": dict.fromkeys(("dense", "pruned", "tuned"), ""),
            "results": results}  # fmt: skip


def test_a_row_a_cell_with_the_best_marked() -> None:
    cells = [cell("a", 0.5, 100.0), cell("b", 0.55, 31.6227766), cell("c", 0, 0, "failed"), cell("d", 0.5, 10.0)]
    columns, rows, bold, unlike = by_cell(cells)
    assert columns == ["cell", "average acc", "ppl wikitext2", "recovered acc", "recovered ppl"]
    assert rows == [
        ["a", "50.00 ±2.5", "100.000", "50.0 %", "50.0 %"],  # √(0.03² + 0.04²)/2; log 100 lies between log 10 and 1000
        ["b", "55.00 ±2.5", "31.623", "75.0 %", "75.0 %"],
        ["c (failed)", "–", "–", "–", "–"],
        ["d", "50.00 ±2.5", "10.000", "50.0 %", "100.0 %"],
    ]
    assert bold == {(1, 1), (3, 2), (1, 3), (3, 4)}
    assert unlike == ""


def test_one_row_has_no_best_and_equal_ones_share_it() -> None:
    assert by_cell([cell("a", 0.5, 100.0)])[2] == set()
    _, _, bold, _ = by_cell([cell("a", 0.5, 100.0), cell("b", 0.5, 100.0)])
    assert {(0, 1), (1, 1), (0, 2), (1, 2)} <= bold


def test_cells_that_were_not_measured_alike_have_no_best_and_it_is_said() -> None:
    other = cell("b", 0.55, 31.6)
    for result in other["results"].values():
        result["perplexity"]["wikitext2"]["sequence_length"] = 5
    _, _, bold, unlike = by_cell([cell("a", 0.5, 100.0), other])
    assert {column for _, column in bold} == {1, 3}
    assert unlike.endswith("not all of them compare: ppl wikitext2, recovered ppl wikitext2.")


def test_nothing_to_show_is_shown_as_that() -> None:
    assert by_cell([cell("a", 0, 0, "pending")])[1] == [["a (pending)", "–"]]
    unscored = {"name": "a", "status": "done", "models": {}, "results": {}}
    assert by_cell([unscored])[1] == [["a", "–"]]


@pytest.mark.parametrize(
    ("text", "said"), [("wikitext2", "joined by two newlines, as in papers"), ("wikitext2-lines", "non-blank lines")]
)
def test_notes_say_which_text_of_wikitext2_a_perplexity_is_of(text: str, said: str) -> None:
    scores = content(0.8, 0.6, 5.0)
    scores["perplexity"] = {text: scores["perplexity"]["wikitext2"]}
    found = " ".join(notes([Group("g", (ScoredModel("dense", "dense", "a/b", scores=scores),))]))
    assert found.count("Perplexity of") == 1
    assert f"Perplexity of {text} is" in found
    assert said in found


def test_groups_and_examples_in_tables() -> None:
    tasks = {
        "mmlu": {"acc": 0.5, "acc_stderr": 0.01, "num_samples": 30, "num_fewshot": 5},
        "stem": {"acc": 0.4, "num_samples": 20, "num_fewshot": 5},
        "physics": {"acc": 0.3, "num_samples": 10, "num_fewshot": 5},
        "sums": {"exact_match,first": 0.25, "exact_match_stderr,first": 0.02, "num_samples": 9, "num_fewshot": 0},
    }
    result = {"model": "m", "tasks": tasks, "groups": {"mmlu": ["stem"], "stem": ["physics"]},
              "average": {"metric": "acc", "value": 0.5, "tasks": ["mmlu"]}, "perplexity": {}}  # fmt: skip
    assert by_task({"m": result})[1] == [
        ["mmlu (5-shot)", "50.00 ± 1.00"], ["  stem (5-shot)", "40.00"], ["    physics (5-shot)", "30.00"],
        ["sums exact_match,first", "25.00 ± 2.00"], ["average acc", "50.00"],
    ]  # fmt: skip
    zero = {**result, "tasks": {"mmlu": {"acc": 0.2, "num_samples": 30, "num_fewshot": 0}}, "groups": {}}
    model = ScoredModel("dense", "dense", "m", scores=result)
    table = by_model([Group("", (model, ScoredModel("tuned", "tuned", "m", scores=zero)))])
    assert [column for column in table.columns if "mmlu" in column] == ["mmlu (5-shot)", "mmlu"]
    assert not any("stem" in column for column in table.columns)
    assert model.paper is None


def test_few_shot_scores_are_not_held_against_the_papers() -> None:
    def paper(shots: int) -> object:
        tasks = {"arc_easy": {"acc": 0.5, "num_samples": 9, "num_fewshot": shots}}
        model = ScoredModel("dense", "dense", "meta-llama/Llama-2-7b-hf", scores={"tasks": tasks})
        return model.paper

    assert paper(0) is not None
    assert paper(5) is None
