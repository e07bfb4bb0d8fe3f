"""McNemar and the paired bootstrap against numbers worked out by hand and a naive loop."""

from __future__ import annotations

import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from lors_cli.evaluation import significance
from lors_cli.evaluation.significance import (
    Comparison,
    TextComparison,
    bootstrap_interval,
    compare,
    compare_models,
    compare_texts,
    mcnemar,
    p_text,
    permutation_test,
)
from lors_cli.evaluation.summary import average


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (8, 1, 2 * (1 + 9) / 512),
        (3, 7, 2 * (1 + 10 + 45 + 120) / 1024),
        (6, 6, 1.0),
        (0, 1, 1.0),
    ],
)
def test_mcnemar_by_hand(better: int, worse: int, expected: float) -> None:
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("better", "worse"), [(40, 70), (70, 40), (2100, 1900), (1516, 3807), (5000, 3000)])
def test_mcnemar_is_twice_the_tail_of_coin_tosses(better: int, worse: int) -> None:
    trials = better + worse
    tail = sum(Fraction(math.comb(trials, heads), 2**trials) for heads in range(min(better, worse) + 1))
    assert mcnemar(better, worse) == pytest.approx(float(2 * tail), rel=1e-12)


def test_interval_of_two_documents() -> None:
    # Drawing two of {0, 1}: mean 0, ½ and 1 with probabilities ¼, ½ and ¼.
    assert bootstrap_interval([[1, 0]]) == (0.0, 1.0)
    assert bootstrap_interval([[1, 1], [-1, -1, -1]]) == (0.0, 0.0)
    assert bootstrap_interval([[1, 1], [0, 0, 0]]) == (0.5, 0.5)


def test_interval_is_that_of_a_loop_over_documents() -> None:
    draw = random.Random(1)
    tasks = [[draw.choice([-1, 0, 0, 0, 1]) for _ in range(size)] for size in (30, 80)]
    means = []
    for _ in range(4000):
        sampled = [[draw.choice(task) for _ in task] for task in tasks]
        means.append(sum(sum(task) / len(task) for task in sampled) / 2)
    means.sort()
    low, high = bootstrap_interval(tasks)
    assert (low, high) == pytest.approx((means[100], means[3900]), abs=0.02)
    assert bootstrap_interval(tasks) == (low, high)


def test_interval_of_many_documents_is_normal() -> None:
    # A share q differ by +1 of n documents: variance q(1 − q)/n. Two tasks: the mean of two, half the standard error.
    tasks = [[1] * 200 + [0] * 1800, [1] * 100 + [0] * 900]
    error = math.sqrt(0.09 / 2000 + 0.09 / 1000) / 2
    low, high = bootstrap_interval(tasks)
    assert (low, high) == pytest.approx((0.1 - 1.96 * error, 0.1 + 1.96 * error), abs=0.1 * error)


def test_compare_by_hand() -> None:
    some = {"a": {1: 1, 2: 1, 3: 0, 4: 1}, "b": {1: 0, 2: 1}}
    other = {"a": {1: 0, 2: 1, 3: 0, 4: 0}, "b": {1: 1, 2: 1}}
    found = compare("tuned", "pruned", some, other)
    assert found is not None
    assert found.difference == pytest.approx((2 / 4 - 1 / 2) / 2)
    task = found.tasks["a"]
    assert (task.num_documents, task.difference, task.better, task.worse) == (4, 0.5, 2, 0)
    assert task.p_value == 0.5
    assert found.tasks["b"].p_value == 1.0
    assert found.p_value == 1.0  # two documents against one
    assert str(found) == "tuned − pruned: +0.00 points, McNemar p = 1"
    assert compare("x", "y", some, {"a": other["a"]}) is None
    assert compare("x", "y", some, {**other, "b": {1: 1, 3: 1}}) is None
    assert compare("x", "y", {}, {}) is None


def test_permutation_test_is_the_share_of_all_signs() -> None:
    draw = random.Random(2)
    tasks = [[draw.uniform(-0.4, 0.8) for _ in range(7)], [draw.choice([-1, 0, 1, 1]) for _ in range(5)]]
    found = abs(sum(sum(task) / len(task) for task in tasks))
    extreme = 0
    for signs in itertools.product((-1, 1), repeat=12):
        some, other = (sum(s * d for s, d in zip(signs[a:b], task, strict=True)) / len(task)
                       for a, b, task in ((0, 7, tasks[0]), (7, 12, tasks[1])))  # fmt: skip
        extreme += abs(some + other) >= found - 1e-12
    assert permutation_test(tasks) == pytest.approx(extreme / 2**12, abs=0.015)
    assert permutation_test(tasks) == permutation_test(tasks)
    assert permutation_test([[0.3]]) == permutation_test([[0.0, 0.0]]) == 1.0  # one document says nothing
    assert permutation_test([[1] * 8 + [-1] + [0] * 5]) == pytest.approx(mcnemar(8, 1), abs=0.01)


def test_many_fractions_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    tasks = [[draw.uniform(-1, 1.2) for _ in range(40)], [1.0, 0.0, -1.0]]
    whole = bootstrap_interval(tasks), permutation_test(tasks)
    monkeypatch.setattr(significance, "_MAX_DRAWN", 1000)
    assert (bootstrap_interval(tasks), permutation_test(tasks)) == (pytest.approx(whole[0], abs=1e-12), whole[1])


def test_fractions_are_no_wins_and_losses() -> None:
    # The first model has more of every document, by a hair: McNemar would call that eight wins, p = 0.0078.
    some = {"mc2": {number: 0.4 + 0.01 * number for number in range(8)}}
    other = {"mc2": {number: 0.4 + 0.01 * number - (0.001 if number else 0.5) for number in range(8)}}
    found = compare("tuned", "pruned", some, other)
    assert found is not None
    assert found.difference == pytest.approx((0.5 + 7 * 0.001) / 8)
    task = found.tasks["mc2"]
    assert (task.test, task.better, task.worse) == ("permutation", 8, 0)
    assert task.p_value == found.p_value == pytest.approx(2 / 2**8, abs=0.004)
    assert "permutation p = 0.0" in str(found)
    whole = {"a": {1: 1, 2: 1}}, {"a": {1: 0, 2: 0}}
    both = compare("tuned", "pruned", {**some, **whole[0]}, {**other, **whole[1]})
    assert both is not None
    assert [both.test, both.tasks["a"].test, both.tasks["a"].p_value] == ["permutation", "McNemar", 0.5]


def test_perplexities_by_hand() -> None:
    some, other = {0: 2.0, 1: 3.0, 2: 2.5}, {0: 2.1, 1: 3.2, 2: 2.4}
    (found,) = compare_texts("tuned", "pruned", {"web": some, "own": some}, {"web": other, "own": {0: 2.0, 1: 3.0}})
    assert (found.text, found.num_windows) == ("web", 3)
    assert found.difference == pytest.approx(math.exp(7.5 / 3) / math.exp(7.7 / 3) - 1)
    assert found.p_value == pytest.approx(6 / 8, abs=0.02)  # ±0.1 ±0.2 ±0.1: six of eight sums are at least 0.2
    assert str(found).startswith("tuned − pruned: perplexity of web -6.45 %, permutation p = 0.7")


def test_an_interval_begins_at_ten_documents_or_windows() -> None:
    for size, known in ((9, False), (10, True)):
        some, other = dict.fromkeys(range(size), 1), {number: number % 2 for number in range(size)}
        task = compare(
            "x", "y", {"a": some, "b": dict.fromkeys(range(40), 1)}, {"a": other, "b": dict.fromkeys(range(40), 0)}
        )
        assert task is not None
        (text,) = compare_texts("x", "y", {"web": some}, {"web": other})
        for found in (task, text):
            assert (found.low is not None, found.high is not None, "(95 %" in str(found)) == (known, known, known)
    assert task.low is not None
    assert task.high is not None
    assert (task.low, task.high) == pytest.approx(((0.2 + 1) / 2, (0.8 + 1) / 2), abs=0.01)  # two to eight of ten
    assert (text.low, text.high) == pytest.approx((math.expm1(0.2), math.expm1(0.8)), abs=0.02)


def test_perplexities_past_all_numbers_do_not_compare() -> None:
    fine = dict.fromkeys(range(10), 1.0)
    for broken in ({**fine, 0: 5000.0}, dict.fromkeys(fine, 800.0)):  # of one window in a draw too much, or always
        assert compare_texts("x", "y", {"web": broken}, {"web": fine}) == []
        (found,) = compare_texts("x", "y", {"web": fine}, {"web": broken})
        assert found.difference == pytest.approx(-1)


def test_p_as_text() -> None:
    assert [p_text(value) for value in (1.0, 0.0234, 0.00099)] == ["p = 1", "p = 0.023", "p < 0.001"]


def write_samples(folder: Path, label: str, tasks: dict[str, list[int | None]]) -> dict[str, Any]:
    """Samples as the eval stage writes them; a model's results."""
    metrics = {}
    for task, accuracies in tasks.items():
        path = folder / "samples" / label / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"doc_id": number, "target": 0, "acc": value} for number, value in enumerate(accuracies)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        known = [value for value in accuracies if value is not None]
        metrics[task] = {"acc": sum(known) / len(known) if len(known) == len(rows) else None}
    return {"tasks": metrics, "average": average(metrics), "perplexity": {}}


def write_windows(folder: Path, label: str, losses: list[float], tokens: str = "ab") -> dict[str, Any]:
    """Windows of a text as the eval stage writes them; a model's results."""
    path = folder / f"samples/{label}/perplexity-web.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"tokens": f"{tokens}{number}", "nll": loss} for number, loss in enumerate(losses)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"web": {"value": math.exp(sum(losses) / len(losses))}}
    return {"tasks": {}, "average": average({}), "perplexity": text}


def comparisons(folder: Path, results: dict[str, Any]) -> list[Comparison]:
    return compare_models(folder, results)["comparisons"]


def texts_compared(folder: Path, results: dict[str, Any]) -> list[TextComparison]:
    return compare_models(folder, results)["texts_compared"]


def test_texts_of_a_folder(tmp_path: Path) -> None:
    results = {
        "dense": write_windows(tmp_path, "dense", [2.0, 1.0]),
        "pruned": write_windows(tmp_path, "pruned", [4.0, 2.0]),
        "tuned": write_windows(tmp_path, "tuned", [3.0, 1.5]),
    }
    found = texts_compared(tmp_path, results)
    assert [(pair.first, pair.second) for pair in found] == [
        ("tuned", "pruned"), ("pruned", "dense"), ("tuned", "dense"),
    ]  # fmt: skip
    assert [pair.difference for pair in found] == pytest.approx([math.expm1(value) for value in (-0.75, 1.5, 0.75)])
    other_tokens = {**results, "pruned": write_windows(tmp_path, "pruned", [4.0, 2.0], "cd")}
    assert [(pair.first, pair.second) for pair in texts_compared(tmp_path, other_tokens)] == [("tuned", "dense")]
    for value in (9.0, None):  # the file is of another evaluation; the model is broken
        tuned = {**results["tuned"], "perplexity": {"web": {"value": value}}}
        assert texts_compared(tmp_path, {"dense": results["dense"], "tuned": tuned}) == []
    (tmp_path / "samples/dense/perplexity-web.jsonl").unlink()
    assert texts_compared(tmp_path, {label: results[label] for label in ("dense", "tuned")}) == []


@pytest.mark.parametrize("damaged", [b'"torn', b"\xab", b"[1]", b'{"tokens": ["a"], "nll": "1"}', b"null", b"{}"])
def test_damaged_samples_are_told_of_and_left_out(
    damaged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: dict[str, dict[str, Any]] = {}
    for label in ("dense", "pruned"):
        windows = write_windows(tmp_path, label, [2.0, 1.0])
        models[label] = write_samples(tmp_path, label, {"a": [1, 0]}) | {"perplexity": windows["perplexity"]}
    assert {key: len(found) for key, found in compare_models(tmp_path, models).items()} == {
        "comparisons": 1, "texts_compared": 1,
    }  # fmt: skip
    for name in ("perplexity-web.jsonl", "a.jsonl"):
        (tmp_path / "samples/dense" / name).write_bytes(damaged)
    assert compare_models(tmp_path, models) == {"comparisons": [], "texts_compared": []}
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("is damaged") == (0 if damaged.startswith(b"{") else 2)


def test_models_of_a_folder(tmp_path: Path) -> None:
    results = {
        "dense": write_samples(tmp_path, "dense", {"a": [1, 1, 1, 1], "b": [1, 0]}),
        "pruned": write_samples(tmp_path, "pruned", {"a": [0, 0, 0, 1], "b": [0, 0]}),
        "tuned": write_samples(tmp_path, "tuned", {"a": [1, 1, 0, 1], "b": [0, 0]}),
    }
    found = comparisons(tmp_path, results)
    assert [(pair.first, pair.second) for pair in found] == [
        ("tuned", "pruned"), ("pruned", "dense"), ("tuned", "dense"),
    ]  # fmt: skip
    for pair in found:
        values = [results[label]["average"]["value"] for label in (pair.first, pair.second)]
        assert pair.difference == pytest.approx(values[0] - values[1])
    assert found[1].p_value == pytest.approx(2 / 16)  # four documents lost, none won
    assert comparisons(tmp_path, {"dense": results["dense"]}) == []
    assert comparisons(tmp_path, {}) == []


def test_other_names_are_compared_with_the_first(tmp_path: Path) -> None:
    results = {label: write_samples(tmp_path, label, {"a": [1, 0]}) for label in ("x", "y", "z")}
    assert [(pair.first, pair.second) for pair in comparisons(tmp_path, results)] == [("y", "x"), ("z", "x")]
    results = {label: write_samples(tmp_path, label, {"a": [1, 0]}) for label in ("dense", "tuned", "packed")}
    found = [(pair.first, pair.second) for pair in comparisons(tmp_path, results)]
    assert found == [("tuned", "dense"), ("packed", "dense")]


def test_a_pair_without_a_task_of_its_average_is_left_out(tmp_path: Path) -> None:
    results = {label: write_samples(tmp_path, label, {"a": [1, 0], "b": [1, 0]}) for label in ("dense", "tuned")}
    for label in results:
        (tmp_path / "samples" / label / "b.jsonl").unlink()
    assert comparisons(tmp_path, results) == []


def test_documents_are_the_same_with_the_same_target_and_examples(tmp_path: Path) -> None:
    results = {label: write_samples(tmp_path, label, {"a": [1, 0]}) for label in ("dense", "tuned")}
    results["tuned"]["tasks"]["a"]["num_fewshot"] = 5
    assert comparisons(tmp_path, results) == []
    results["dense"]["tasks"]["a"]["num_fewshot"] = 5
    assert len(comparisons(tmp_path, results)) == 1
    path = tmp_path / "samples/tuned/a.jsonl"
    path.write_text(path.read_text().replace('"target": 0', '"target": "no"', 1))
    assert comparisons(tmp_path, results) == []


def test_documents_that_were_cut_to_whole_numbers_are_left_out(tmp_path: Path) -> None:
    results = {label: write_samples(tmp_path, label, {"mc2": [0, 0, 0]}) for label in ("dense", "pruned")}
    assert len(comparisons(tmp_path, results)) == 1
    results["dense"]["tasks"]["mc2"]["acc"] = 0.43  # as an earlier lors wrote it: the fractions' mean beside zeros
    assert comparisons(tmp_path, results) == []


def test_broken_models_and_lost_documents_are_left_out(tmp_path: Path) -> None:
    results = {
        "dense": write_samples(tmp_path, "dense", {"a": [1, 1]}),
        "pruned": write_samples(tmp_path, "pruned", {"a": [None, None]}),
        "tuned": write_samples(tmp_path, "tuned", {"a": [1, 0]}),
    }
    assert [(pair.first, pair.second) for pair in comparisons(tmp_path, results)] == [("tuned", "dense")]
    (tmp_path / "samples/dense/a.jsonl").unlink()
    assert comparisons(tmp_path, results) == []


@pytest.mark.parametrize("weighted", [True, False])
def test_a_group_is_compared_over_the_documents_of_its_tasks(weighted: bool, tmp_path: Path) -> None:
    scores = {"a": {"x": [1, 1, 0, 1], "y": [1, 0]}, "b": {"x": [0, 1, 0, 0], "y": [1, 1]}}
    results = {}
    for label, tasks in scores.items():
        result = write_samples(tmp_path, label, tasks)
        x, y = (sum(tasks[name]) / len(tasks[name]) for name in "xy")
        result["tasks"]["g"] = {"acc": (4 * x + 2 * y) / 6 if weighted else (x + y) / 2}
        result |= {"groups": {"g": ["inner", "y"], "inner": ["x"]}, "average": {"tasks": ["g"]}}
        results[label] = result
    (found,) = comparisons(tmp_path, results)
    # b − a: of x −2/4, of y +1/2
    assert found.difference == pytest.approx((-2 + 1) / 6 if weighted else 0)
    assert (found.tasks["g"].num_documents, found.tasks["g"].better, found.tasks["g"].worse) == (6, 1, 2)
    assert found.test == ("McNemar" if weighted else "permutation")
