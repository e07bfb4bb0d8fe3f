"""Any folder that lors wrote has a report, and several are compared; numbers worked out by hand."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_pages import Page, is_safe
from sweep_folder import SweepFolder, write_json
from typer.testing import Result

from lors_cli.errors import MissingError, UsageError
from lors_cli.pipeline.reports import write_reports
from lors_cli.report.results import read_log

Lors = Callable[..., Result]


def scored(folder: Path, right: dict[str, dict[str, int]], *, tasks: tuple[str, ...] = ("boolq", "arc_easy"),
           documents: int = 10) -> Path:  # fmt: skip
    """What `lors eval --out FOLDER` leaves: of each model the number of documents that it has right, by task.

    Of arc_easy every second document has four choices, the others five; boolq has two.
    """
    for label, found in right.items():
        results = {task: {"acc": found[task] / documents, "acc_stderr": 0.1, "num_samples": documents}
                   for task in tasks}  # fmt: skip
        average = sum(found[task] for task in tasks) / documents / len(tasks)
        write_json(folder / f"{label}.json", {
            "model": f"owner/{label}", "tasks": results, "perplexity": {},
            "average": {"metric": "acc", "value": average, "tasks": list(tasks)},
        })  # fmt: skip
        for task in tasks:
            choices = [2] * documents if task == "boolq" else [4 + place % 2 for place in range(documents)]
            rows = [{"doc_id": place, "log_likelihoods": [-1.0] * choices[place], "acc": int(place < found[task])}
                    for place in range(documents)]  # fmt: skip
            path = folder / "samples" / label / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record(folder, "eval", {"tasks": list(tasks), "limit": None}, dict.fromkeys(right, "x"), {},
           [f"{label}.json" for label in right])  # fmt: skip
    return folder


def record(folder: Path, stage: str, config: dict[str, Any], inputs: dict[str, Any], metrics: dict[str, Any],
           files: list[str]) -> None:  # fmt: skip
    write_json(folder / "stage.json", {
        "stage": stage, "fingerprint": "f", "config": config, "inputs": inputs, "metrics": metrics, "environment": {},
        "elapsed_s": 60.0,
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
    })  # fmt: skip


def tuned(folder: Path, rank: int) -> Path:
    layers = [{"name": "model.layers.0.mlp.up_proj", "shape": [4, 4], "sparsity": 0.5}]
    metrics = {"steps": 3, "loss_before": 3.0, "loss_after": 2.0, "loss_samples": 16, "loss_held_out": False,
               "pattern": "2:4", "sparsity": 0.5, "violations": 0, "layers": layers,
               "peak_bytes": 700 * 2**20}  # fmt: skip
    record(folder, "tune", {"method": "lors", "rank": rank}, {"path": "sparse"}, metrics, [])
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "val_loss": 2.75}]
    (folder / "log.jsonl").write_text("".join(json.dumps({**row, "tokens_per_s": 9.0}) + "\n" for row in rows))
    return folder


def text_of(paths: list[Path]) -> str:
    return next(path for path in paths if path.suffix == ".md").read_text()


FORMATS = ["md", "html", "csv", "tex"]


def test_an_eval_folder_with_names_of_its_own(tmp_path: Path, lors: Lors) -> None:
    folder = scored(tmp_path / "scores", {"base": {"boolq": 9, "arc_easy": 4}, "mine": {"boolq": 2, "arc_easy": 4}})
    assert lors("report", str(folder)).exit_code == 0
    text = (folder / "report.md").read_text()
    assert text.startswith("# scores\n\nbase, mine: evaluated.\n")
    assert "| mine | owner/mine |" in text
    assert "| boolq | 90.00 ± 10.00 | 20.00 ± 10.00 | -70.00 |" in text
    assert "| boolq | -70.00, p = 0.016 |" in text  # seven documents, all of them worse: 2/2⁷
    html = (folder / "report.html").read_text()
    assert is_safe(Page(html))
    assert all(f">{word}</text>" in html for word in ("base", "mine", "guessing"))
    rows = list(csv.DictReader((folder / "report.csv").open(newline="")))
    assert {(row["label"], row["role"], row["model"]) for row in rows} == {
        ("base", "", "owner/base"), ("mine", "", "owner/mine"),
    }  # fmt: skip


def test_changed_scores_are_not_reported(tmp_path: Path) -> None:
    folder = scored(tmp_path / "scores", {"base": {"boolq": 9, "arc_easy": 4}})
    path = folder / "base.json"
    path.write_text(path.read_text().replace("0.9", "0.99"))
    with pytest.raises(UsageError, match="have been changed"):
        write_reports([folder], FORMATS, None)


def test_a_stage_alone_and_out(tmp_path: Path) -> None:
    paths = write_reports([tuned(tmp_path / "tuned", 8)], FORMATS, tmp_path / "elsewhere")
    assert {path.parent for path in paths} == {tmp_path / "elsewhere"}
    text = text_of(paths)
    assert "sparse: tuned with lors at rank 8." in text
    assert "Loss 3.0000 → 2.0000 on 16 samples" in text
    assert "figures/loss.png" in text
    assert "figures/sparsity.png" not in text, "a map of one colour"
    page = (tmp_path / "elsewhere/report.html").read_text()
    assert ">held out</text>" in page
    assert ">training</text>" in page
    assert not (tmp_path / "tuned/report.md").exists()


def test_a_merged_model(tmp_path: Path) -> None:
    layers = [{"name": f"model.layers.{block}.mlp.up_proj", "shape": [4, 4], "sparsity": 0.5 + 0.25 * block}
              for block in range(2)]  # fmt: skip
    metrics = {"layers_merged": 2, "zeroed": 0, "pattern": "2:4", "sparsity": 0.625, "violations": 0, "layers": layers,
               "adapter": {"method": "lors", "rank": 8}}  # fmt: skip
    record(tmp_path / "merged", "merge", {"adapter": "t/adapter"}, {"path": "sparse"}, metrics, [])
    text = text_of(write_reports([tmp_path / "merged"], FORMATS, None))
    assert "sparse: merged with an adapter of lors at rank 8." in text
    assert "| merged | 2:4 | 0.6250 | 0.5000 to 0.7500 | 0 |" in text
    assert "figures/sparsity.png" in text
    assert "| merge | 1 min 00 s |" in text
    rows = list(csv.DictReader((tmp_path / "merged/report.csv").open(newline="")))
    assert {(row["label"], row["role"], row["tune"]) for row in rows} == {("LoRS", "tuned", "lors")}
    numbers = {row["measure"]: row["value"] for row in rows if row["value"]}
    assert numbers == {"sparsity": "0.625", "violations": "0", "elapsed": "60.0"}


def with_windows(folder: Path, label: str, losses: list[float]) -> None:
    """Give a scored model the perplexity of a text, and its windows."""
    path = folder / f"{label}.json"
    value = math.exp(sum(losses) / len(losses))
    text = {"web": {"value": value, "tokens": 9, "sequence_length": 4}}
    write_json(path, {**json.loads(path.read_text()), "perplexity": text})
    rows = [{"tokens": f"w{number}", "nll": loss} for number, loss in enumerate(losses)]
    (folder / f"samples/{label}/perplexity-web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = json.loads((folder / "stage.json").read_text())
    write_json(folder / "stage.json", {**made, "files": {
        **made["files"], path.name: hashlib.sha256(path.read_bytes()).hexdigest(),
    }})  # fmt: skip


def test_perplexities_are_compared_window_by_window(tmp_path: Path) -> None:
    for name, losses in (("a", [3.0] * 16), ("b", [2.9] * 16)):
        right = {"boolq": 5, "arc_easy": 4}
        folder = scored(tmp_path / "runs" / name, {"dense": right, "tuned": right})
        with_windows(folder, "dense", [2.0] * 16)
        with_windows(folder, "tuned", losses)
    found = [tmp_path / "runs/a", tmp_path / "runs/b"]
    text = text_of(write_reports(found, ("md",), None))
    assert "| perplexity | b/tuned − a/tuned |" in text
    assert r"| web | -9.52 % (-9.52 … -9.52), p \< 0.001 |" in text  # e^−0.1, on every window
    assert "Without p" not in text
    with_windows(found[1], "tuned", [2.9] * 15)  # other windows
    text = text_of(write_reports(found, ("md",), None))
    assert "| web | -9.52 % |" in text
    assert "Without p: the two models' results of the same windows are not there" in text


def test_several_are_compared_with_the_first(tmp_path: Path) -> None:
    dense = {"boolq": 9, "arc_easy": 4}
    for name, right in (("a", 2), ("b", 8)):
        scored(tmp_path / "runs" / name, {"dense": dense, "tuned": {"boolq": right, "arc_easy": 4}})
    paths = write_reports([tmp_path / "runs/a", tmp_path / "runs/b"], FORMATS, None)
    assert {path.parent for path in paths} == {tmp_path / "runs/compare-a-b"}
    text = text_of(paths)
    assert text.startswith("# a, b compared\n")
    labels = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ") and " ± " in line]
    assert labels == ["dense", "a/tuned", "b/tuned"], "a dense model that both scored alike is there once"
    assert "| task | b/tuned − a/tuned |" in text
    assert "| boolq | +60.00, p = 0.031 |" in text  # six documents, all of them better: 2/2⁶
    assert "| arc_easy | +0.00, p = 1 |" in text
    first = {path: path.read_bytes() for path in [*paths, *(paths[0].parent / "figures").iterdir()]}
    for path in first:
        path.unlink()
    write_reports([tmp_path / "runs/a", tmp_path / "runs/b"], FORMATS, None)
    assert {path: path.read_bytes() for path in first} == first


def test_of_other_documents_there_is_no_p(tmp_path: Path) -> None:
    scored(tmp_path / "a", {"mine": {"boolq": 2, "arc_easy": 4}})
    scored(tmp_path / "b", {"other": {"boolq": 8}}, tasks=("boolq",), documents=20)
    text = text_of(write_reports([tmp_path / "a", tmp_path / "b"], FORMATS, tmp_path / "out"))
    assert "| task | b/other − a/mine |" in text
    assert "| boolq | +20.00 |" in text  # 8 of 20 and 2 of 10
    assert "p =" not in text
    assert "Without p" in text


def test_tasks_that_both_have_are_compared(tmp_path: Path) -> None:
    scored(tmp_path / "a", {"mine": {"boolq": 2, "arc_easy": 4}})
    scored(tmp_path / "b", {"mine": {"boolq": 8}}, tasks=("boolq",))
    text = text_of(write_reports([tmp_path / "a", tmp_path / "b"], FORMATS, tmp_path / "out"))
    assert "| boolq | +60.00, p = 0.031 |" in text
    assert "| arc_easy |" not in text
    assert "Without p" not in text
    assert "The average of" not in text


def changed(path: Path, **values: Any) -> None:
    """Give every document of a task other values."""
    rows = [{**json.loads(line), **values} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_no_task_is_dropped_from_the_differences(tmp_path: Path) -> None:
    for name, right in (("a", 2), ("b", 8)):
        scored(tmp_path / name, {"mine": {"boolq": right, "arc_easy": right}})
    changed(tmp_path / "b/samples/mine/arc_easy.jsonl", target=1)  # other right answers: of other documents
    scored(tmp_path / "c", {"mine": {"boolq": 5}}, tasks=("boolq",))
    text = text_of(write_reports([tmp_path / name for name in "abc"], ("md",), tmp_path / "out"))
    assert "| task | b/mine − a/mine | c/mine − a/mine |" in text
    assert "| boolq | +60.00, p = 0.031 | +30.00, p = 0.25 |" in text
    assert "| arc_easy | +60.00 | – |" in text
    assert re.search(r"\| average \| \+60.00 \(.*\), p = 0.031 \| \+30.00 \(.*\), p = 0.25 \|", text)
    assert "Without p: the two models' results of the same documents are not there" in text
    assert "The average of b/mine − a/mine is of boolq. The average of c/mine − a/mine is of boolq." in text
    (tmp_path / "a/samples/mine/arc_easy.jsonl").unlink()
    assert text_of(write_reports([tmp_path / name for name in "abc"], ("md",), tmp_path / "out")) == text


def test_other_examples_before_the_question_are_no_difference(tmp_path: Path) -> None:
    for name, shots in (("a", 0), ("b", 5)):
        folder = scored(tmp_path / name, {"mine": {"boolq": 2, "arc_easy": 4}})
        content = json.loads((folder / "mine.json").read_text())
        content["tasks"]["boolq"]["num_fewshot"] = shots
        write_json(folder / "mine.json", content)
        record(folder, "eval", {"tasks": ["boolq", "arc_easy"], "limit": None}, {"mine": "x"}, {}, ["mine.json"])
    text = text_of(write_reports([tmp_path / "a", tmp_path / "b"], ("md",), tmp_path / "out"))
    section = text.partition("## Differences")[2]
    assert "| boolq" not in section
    assert "| arc_easy | +0.00, p = 1 |" in section


def test_settings_that_differ_and_memory_in_a_unit_that_suits(tmp_path: Path) -> None:
    paths = write_reports([tuned(tmp_path / "a", 8), tuned(tmp_path / "b", 16)], FORMATS, tmp_path / "out")
    text = text_of(paths)
    assert "| setting | a | b |\n| :-- | --: | --: |\n| tune.rank | 8 | 16 |\n" in text
    html = (tmp_path / "out/report.html").read_text()
    assert ">Peak memory (MiB)</text>" in html
    assert all(f">{name}/tuned, held out</text>" in html for name in "ab")


def test_a_sweep_and_a_stage(sweep: Path, tmp_path: Path) -> None:
    scored(tmp_path / "scores", {"mine": {"boolq": 5, "arc_easy": 4}})
    text = text_of(write_reports([sweep, tmp_path / "scores"], FORMATS, tmp_path / "out"))
    assert "| llama3/SparseGPT + LoRS |" in text
    assert "| scores/mine |" in text
    assert "| llama3 | Sweep llama3. |" in text


def two_bases(folder: Path, methods: list[tuple[str, str]], patterns: tuple[str, ...] = ("2:4",)) -> Path:
    """A sweep over two dense models: of each, every pair of methods and pattern tuned."""
    made = SweepFolder(folder, folder.name, {})
    for base in ("o/7B", "o/8B"):
        for place, (prune, tune) in enumerate(methods):
            for pattern in patterns:
                name = f"{base[2:]}-{prune}-{tune}-{pattern}"
                config = {"method": prune, "pattern": pattern}
                stages = {"prune": made.stage(f"p-{name}", "prune", config, {}, 1.0, origin=base),
                          "tune": made.tune(f"t-{name}", tune)}  # fmt: skip
                acc = {"boolq": 0.5 + 0.1 * place + 0.2 * (base == "o/8B") + 0.05 * (pattern == "4:8")}
                made.cell(name, {}, stages=stages, models={"tuned": made.score(f"e-{name}", "tuned", acc, 9.0)})
    return made.close()


def test_models_of_sweeps_are_compared_with_their_likes(tmp_path: Path) -> None:
    one = two_bases(tmp_path / "a", [("sparsegpt", "lors"), ("wanda", "sqft")])
    two = two_bases(tmp_path / "b", [("wanda", "sqft"), ("ria", "lors")], ("2:4", "4:8"))
    text = text_of(write_reports([one, two], ("md",), tmp_path / "out"))
    title = next(line for line in text.splitlines() if line.startswith("| task | "))
    assert title[2:-2].split(" | ")[1:] == [
        "b/7B, 2:4: Wanda + SQFT − a/7B, 2:4: Wanda + SQFT", "b/7B, 4:8: Wanda + SQFT − a/7B, 2:4: Wanda + SQFT",
        "b/7B, 2:4: RIA + LoRS − a/7B, 2:4: SparseGPT + LoRS", "b/7B, 4:8: RIA + LoRS − a/7B, 2:4: SparseGPT + LoRS",
        "b/8B, 2:4: Wanda + SQFT − a/8B, 2:4: Wanda + SQFT", "b/8B, 4:8: Wanda + SQFT − a/8B, 2:4: Wanda + SQFT",
        "b/8B, 2:4: RIA + LoRS − a/8B, 2:4: SparseGPT + LoRS", "b/8B, 4:8: RIA + LoRS − a/8B, 2:4: SparseGPT + LoRS",
    ]  # fmt: skip
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith(("| a/", "| b/")) and "±" in line]
    assert len(set(rows)) == len(rows) == 12
    assert len([line for line in text.splitlines() if "**" in line]) == 1
    # 4 and 8 cells of 1 s, 1000 s and, in folders of the same names, 50 s
    assert "All stages together took 3 h 30 min" in text


def test_what_is_no_folder_of_ours(tmp_path: Path, lors: Lors) -> None:
    scored(tmp_path / "runs/a", {"mine": {"boolq": 2, "arc_easy": 4}})
    (tmp_path / "begun/.pieces").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name, said in (("runs", "runs/a"), ("begun", "not finished"), ("file", "is a file"), ("none", "is not there")):
        with pytest.raises(MissingError) as found:
            write_reports([tmp_path / name], FORMATS, None)
        assert said in f"{found.value.message} {found.value.hint}"
    (tmp_path / "runs/a/stage.json").write_text("{")
    with pytest.raises(UsageError, match="not the record of a stage"):
        write_reports([tmp_path / "runs/a"], FORMATS, None)
    assert lors("report", str(tmp_path / "none")).exit_code == 3


def test_no_other_report_is_overwritten(tmp_path: Path) -> None:
    one, two = (scored(tmp_path / name, {"mine": {"boolq": 2, "arc_easy": 4}}) for name in "ab")
    for folders in ([one, two], [two]):
        with pytest.raises(UsageError, match="report of its own"):
            write_reports(folders, FORMATS, one)
    with pytest.raises(UsageError, match="named twice"):
        write_reports([one, one], FORMATS, None)


def test_rows_with_a_held_out_loss(tmp_path: Path) -> None:
    path = tuned(tmp_path / "t", 8) / "log.jsonl"
    assert [row["step"] for row in read_log(path)] == [1, 2]
    assert [(row["step"], row["val_loss"]) for row in read_log(path, "val_loss")] == [(2, 2.75)]
