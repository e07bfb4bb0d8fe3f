"""What guessing gives, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lors_cli.report.chance import chance_levels
from lors_cli.report.measures import Measure, ScoredModel


def write(folder: Path, task: str, choices: list[int], **values: float) -> None:
    path = folder / "samples" / "m" / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"responses": ["a\u2028b\x85c"]}  # which are no ends of lines
    rows = [{"doc_id": place, **values, **({"log_likelihoods": [-1.0] * count} if count else told)}
            for place, count in enumerate(choices)]  # fmt: skip
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_one_over_the_choices_of_each_document(tmp_path: Path) -> None:
    write(tmp_path, "mixed", [4, 4, 5, 2])
    write(tmp_path, "arc_easy", [4, 5])
    write(tmp_path, "lambada", [1, 1])
    write(tmp_path, "gsm8k", [0, 0])
    write(tmp_path, "whole", [4, 4], acc=1)
    write(tmp_path, "truthfulqa_mc2", [5, 6], acc=0.43)  # the probability of all true answers, of any number
    tasks = ("mixed", "arc_easy", "lambada", "gsm8k", "rte", "unknown", "whole", "truthfulqa_mc2")
    found = chance_levels(tmp_path, {"m": {"tasks": {task: {} for task in tasks}}})
    assert found == {
        "mixed": pytest.approx((0.25 + 0.25 + 0.2 + 0.5) / 4),
        "arc_easy": pytest.approx(0.225),
        "whole": 0.25,
        "rte": 0.5,  # known without documents
    }


def test_of_an_average_only_where_all_its_tasks_have_one() -> None:
    average = {"average": {"tasks": ["rte", "boolq"]}}
    model = ScoredModel("dense", "dense", "", scores=average, chance={"rte": 0.5, "boolq": 0.25})
    assert Measure("average", "accuracy").chance(model) == pytest.approx(37.5)
    assert Measure("task", "rte", "acc_norm").chance(model) == 50
    assert Measure("task", "rte", "f1").chance(model) is None
    one = ScoredModel("dense", "dense", "", scores=average, chance={"rte": 0.5})
    assert Measure("average", "accuracy").chance(one) is None
    assert Measure("perplexity", "rte").chance(one) is None
