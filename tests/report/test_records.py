"""CSV, read back as a program would."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from lors_cli.files.records import StageRecord
from lors_cli.report.groups import groups
from lors_cli.report.measures import Group, ScoredModel
from lors_cli.report.records import HEADER, to_csv
from lors_cli.report.results import read_sweep

SEVEN = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")


def lines(text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text))
    assert tuple(reader.fieldnames or ()) == HEADER
    return list(reader)


def test_the_same_numbers_come_back(sweep: Path) -> None:
    found = lines(to_csv(groups(read_sweep(sweep))))
    (lors,) = [line for line in found if line["label"] == "SparseGPT + LoRS" and line["name"] == "boolq"]
    assert (lors["value"], lors["stderr"], lors["unit"]) == ("54.0", "1.0", "percent")
    assert float(lors["paper"]) == 79.08
    assert float(lors["ours_minus_paper"]) == pytest.approx(54.0 - 79.08)
    assert (lors["prune"], lors["pattern"], lors["tune"], lors["data"]) == ("sparsegpt", "2:4", "lors", "alpaca")
    assert (lors["cells"], lors["role"], lors["status"]) == ("sparsegpt-lors", "tuned", "done")
    of_lors = {(line["measure"], line["name"]): line["value"] for line in found if line["label"] == "SparseGPT + LoRS"}
    assert [float(of_lors["acc", task]) for task in SEVEN] == [46.0, 50.0, 54.0, 58.0, 62.0, 66.0, 70.0]
    assert float(of_lors["average", "accuracy"]) == 58.0
    assert float(of_lors["perplexity", "wikitext2"]) == 20.0
    assert float(of_lors["recovered", "accuracy"]) == 60.0  # from 52 to 58 of 62
    assert of_lors["tokens_per_s", ""] == "1234.0"
    assert of_lors["trainable_parameters", ""] == "4884480"
    assert of_lors["violations", ""] == "0"
    assert (of_lors["elapsed", "tune"], of_lors["elapsed", "eval"]) == ("1000.0", "50.0")


def test_shared_models_are_there_once_and_unfinished_ones_say_why(sweep: Path) -> None:
    found = lines(to_csv(groups(read_sweep(sweep))))
    dense = [line for line in found if line["role"] == "dense" and line["measure"] == "average"]
    assert len(dense) == 1
    assert len(dense[0]["cells"].split()) == 6
    (failed,) = [line for line in found if line["cells"] == "wanda-spp"]
    assert (failed["status"], failed["error"]) == ("failed", "Not enough memory: 3.1 GiB are missing.")
    (pending,) = [line for line in found if line["cells"] == "wanda-sqft"]
    assert (pending["status"], pending["measure"], pending["value"]) == ("pending", "", "")


def test_names_come_back_as_they_were() -> None:
    name = "a,b \"c\"\n<script>; 'x'"
    model = ScoredModel("tuned", name, "m/n", cells=("c",), status="failed", error=name)
    (line,) = lines(to_csv([Group(name, (model,))]))
    assert (line["group"], line["label"], line["error"]) == (name, name, name)


def test_every_metric_and_subtask_is_there() -> None:
    tasks = {
        "glue": {"acc": 0.5, "f1": 0.75, "f1_stderr": 0.02, "num_samples": 9},
        "mrpc": {"acc": 0.25, "num_samples": 9},
    }
    model = ScoredModel("dense", "dense", "m/n", scores={"tasks": tasks, "groups": {"glue": ["mrpc"]}})
    found = [(line["name"], line["measure"], line["value"], line["stderr"])
             for line in lines(to_csv([Group("g", (model,))]))]  # fmt: skip
    assert found == [("glue", "acc", "50.0", ""), ("glue", "f1", "0.75", "0.02"), ("mrpc", "acc", "25.0", "")]


def test_every_number_has_six_digits_after_the_point_at_most() -> None:
    third = 1 / 3
    made = StageRecord("tune", "f", {}, {}, {"sparsity": third, "steps": 3, "last_loss": 100 * third}, {}, third, {})
    model = ScoredModel("tuned", "x", "m/n", made=made, eval_s=third, scores={
        "tasks": {"rte": {"acc": third, "acc_stderr": third}}, "perplexity": {"web": {"value": 10 * third}},
    })  # fmt: skip
    found = {line["measure"] + line["name"]: line["value"] for line in lines(to_csv([Group("g", (model,))]))}
    assert found == {
        "accrte": "33.333333", "perplexityweb": "3.333333", "sparsity": "0.333333", "steps": "3",
        "last_loss": "33.333333", "elapsedtune": "0.333333", "elapsedeval": "0.333333",
    }  # fmt: skip


def test_nothing_is_a_header() -> None:
    assert lines(to_csv([])) == []
