"""The report of a small run folder made by hand."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from report_pages import Page, is_safe

from lors_cli.recipe.schema import STAGES
from lors_cli.report.results import read_log
from lors_cli.report.run import write_run_report, write_stage_report
from lors_cli.report.stage_figures import split_name
from lors_cli.tuning.training.step_log import StepLog

TASKS = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande"]
KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
RECIPE = """name: small
model: {path: owner/base}
prune: {method: wanda, pattern: '2:4'}
tune: {method: lors, rank: 8}
eval: {tasks: [boolq]}
"""


def scores(role: str, value: float, perplexity: float) -> dict[str, Any]:
    tasks = {
        task: {"acc": value + 0.03 * index, "acc_stderr": 0.012, "num_samples": 100} for index, task in enumerate(TASKS)
    }
    average = sum(task["acc"] for task in tasks.values()) / len(tasks)
    return {
        "model": role,
        "tasks": tasks,
        "average": {"metric": "acc", "value": average, "tasks": TASKS},
        "perplexity": {"wikitext2": {"value": perplexity, "tokens": 4096, "sequence_length": 2048}},
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def stage(name: str, config: dict[str, Any], metrics: dict[str, Any], elapsed_s: float) -> dict[str, Any]:
    packages = {"torch": "2.8.0", "lm-eval": "absent"}
    environment = {"python": "3.11.9", "platform": "Linux-test", "processors": 8, "packages": packages}
    return {
        "stage": name, "fingerprint": "ab" * 16, "config": config, "inputs": {"path": "owner/base"},
        "metrics": metrics, "environment": environment, "elapsed_s": elapsed_s,
        "files": {"model.safetensors": "cd" * 32},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    layers = [
        {"name": f"model.layers.{block}.{kind}", "shape": [8, 8], "sparsity": 0.5 + 0.01 * (block % 3 - 1)}
        for block in range(30)
        for kind in KINDS
    ]
    found = {"pattern": "2:4", "sparsity": 0.5, "violations": 0, "layers": layers}
    pruning = {"method": "wanda", "pattern": "2:4", "calibration": {"dataset": "c4", "seed": 5}}
    write_json(folder / "prune/stage.json", stage("prune", pruning, found, 125.0))
    tuning = {"method": "lors", "rank": 8, "seed": 7}
    losses = {"steps": 200, "tokens_per_s": 1234.0, "loss_before": 3.25, "loss_after": 1.875, "loss_samples": 16,
              "loss_held_out": False}  # fmt: skip
    write_json(folder / "tune/stage.json", stage("tune", tuning, {**found, **losses}, 3700.0))
    draw = random.Random(0)
    rows = [
        {"step": step, "loss": 1.8 + 1.4 / (1 + step / 20) + draw.gauss(0, 0.08), "tokens_per_s": 9.0}
        for step in range(1, 201)
    ]
    (folder / "tune/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 201, "lo')
    for role, value, perplexity in (("dense", 0.45, 14.5), ("pruned", 0.36, 31.2), ("tuned", 0.41, 19.9)):
        write_json(folder / f"eval/{role}.json", scores(role, value, perplexity))
    write_json(folder / "eval/stage.json", stage("eval", {"tasks": TASKS}, {}, 12.0))
    return folder


def all_bytes(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in [*run.glob("report.*"), *(run / "figures").iterdir()]}


def test_report_has_the_numbers(run: Path) -> None:
    path = write_run_report(run, STAGES)[0]
    text = path.read_text()
    assert path == run / "report.md"
    assert text.startswith("# small\n\nowner/base: pruned with wanda to 2:4 (50.0% of the pruned weights are zero)")
    for part in ("tuned with lors at rank 8", "45.00", "36.00", "19.900", "Loss 3.2500 → 1.8750 on 16 samples",
                 "1,234 tokens", "2 min 05 s", "1 h 01 min", "torch 2.8.0", "Linux-test", "55.6%",
                 RECIPE.strip()):  # fmt: skip
        assert part in text
    assert "lm-eval" not in text
    assert "| prune | 2 min 05 s | 5 |" in text


def test_every_figure_is_a_png_and_linked(run: Path) -> None:
    text = write_run_report(run, STAGES)[0].read_text()
    names = sorted(path.name for path in (run / "figures").iterdir())
    assert names == ["accuracy.png", "loss.png", "perplexity.png", "sparsity.png"]
    for name in names:
        content = (run / "figures" / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 5000
        assert b"tEXt" not in content
        assert f"](figures/{name})" in text


def test_a_second_report_is_the_same_bytes(run: Path) -> None:
    write_run_report(run, STAGES)
    first = all_bytes(run)
    assert {Path(name).suffix for name in first} == {".md", ".html", ".csv", ".tex", ".png"}
    for name in first:
        Path(name).unlink()
    write_run_report(run, STAGES)
    assert all_bytes(run) == first


def test_the_page_says_what_the_markdown_says(run: Path) -> None:
    (run / "recipe.yaml").write_text(RECIPE + "# </code><script>alert(1)</script>\n")
    write_run_report(run, STAGES)
    text = (run / "report.html").read_text()
    page = Page(text)
    assert is_safe(page)
    assert "http" not in text
    headings = [found for tag, found in page.texts if tag == "h2"]
    assert headings == [line[3:] for line in (run / "report.md").read_text().splitlines() if line.startswith("## ")]
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "# </code><script>alert(1)</script>" in next(found for tag, found in page.texts if tag == "code")
    said = [found for _, found in page.texts]
    for part in ("36.00 ± 1.20", "Loss 3.2500 → 1.8750", "2 min 05 s", "perplexity wikitext2"):
        assert any(part in found for found in said)


def test_a_model_of_the_paper_has_its_figures_beside(run: Path) -> None:
    assert "Beside the paper" not in write_run_report(run, STAGES)[0].read_text()
    (run / "recipe.yaml").write_text(RECIPE.replace("owner/base", "meta-llama/Llama-2-7b-hf"))
    text = write_run_report(run, STAGES)[0].read_text()
    assert "## Beside the paper" in text
    assert "| ↳ paper (ours − paper) | 43.52 (+1.48) | 76.35 (-28.35) |" in text
    rows = list(csv.DictReader((run / "report.csv").open(newline="")))
    (row,) = [row for row in rows if (row["role"], row["measure"], row["name"]) == ("pruned", "acc", "rte")]
    assert float(row["value"]) == pytest.approx(51.0)
    assert float(row["paper"]) == 53.07  # Wanda 2:4
    assert float(row["ours_minus_paper"]) == pytest.approx(51.0 - 53.07)
    assert "Wanda & \\textbf{" not in (run / "report.tex").read_text(), "tuned is best of pruned and tuned"


@pytest.mark.parametrize(
    ("absent", "section", "figure"),
    [("eval", "## Results", "accuracy.png"), ("tune", "## Tuning", "loss.png")],
)
def test_absent_stage_has_no_section(run: Path, absent: str, section: str, figure: str) -> None:
    write_run_report(run, STAGES)
    (run / absent).rename(run.parent / absent)
    text = write_run_report(run, STAGES)[0].read_text()
    assert section not in text
    assert not (run / "figures" / figure).exists(), "a figure of results that are gone is removed"


def test_only_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: bare\nmodel: {path: x}\nprune: {}\n")
    text = write_run_report(tmp_path, STAGES)[0].read_text()
    assert "## Settings" in text
    assert "## Results" not in text
    assert "## How it was made" not in text


def test_the_held_out_loss_is_told_and_what_a_teacher_adds_to_the_other(run: Path) -> None:
    record = json.loads((run / "tune/stage.json").read_text())
    record["metrics"] |= {
        "loss_before": 4.5, "loss_after": 2.5, "loss_samples": 4, "loss_held_out": True, "val_samples": 4,
        "val_loss_first": 4.75, "val_loss_best": 4.25, "val_loss_last": 4.375, "val_best_step": 20, "model_step": 20,
    }  # fmt: skip
    for distill, words in ((None, "Loss 4.5000 → 2.5000"), ({"weight": 0.5}, "Loss (with the teacher's part) 4.5000")):
        record["config"]["distill"] = distill
        write_json(run / "tune/stage.json", record)
        text = write_run_report(run, STAGES)[0].read_text()
        assert words in text
        said = "Held-out loss of 4 samples: 4.7500 first, 4.2500 at best, after step 20, 4.3750 last. The model is that"
        assert f"{said} of step 20." in text


def test_settings_of_a_single_stage_are_without_those_that_are_not_set(run: Path) -> None:
    record = stage("tune", {"method": "lors", "val_size": None, "data": {"columns": None}}, {}, 1.0)
    write_json(run / "tune/stage.json", record)
    text = write_stage_report(run / "tune", ("md",))[0].read_text()
    assert "method: lors" in text
    assert "null" not in text


def test_examples_before_questions_are_not_called_zero_shot(run: Path) -> None:
    content = scores("dense", 0.4, 9.0)
    for task in content["tasks"].values():
        task["num_fewshot"] = 5
    write_json(run / "eval/dense.json", content)
    assert "ero-shot" not in write_run_report(run, STAGES)[0].read_text()


def test_one_model_without_numbers(run: Path) -> None:
    for role in ("dense", "tuned"):
        (run / f"eval/{role}.json").unlink()
    broken = scores("pruned", 0.3, 1.0)
    broken["tasks"]["rte"]["acc"] = None
    broken["average"]["value"] = None
    broken["perplexity"]["wikitext2"]["value"] = None
    write_json(run / "eval/pruned.json", broken)
    text = write_run_report(run, STAGES)[0].read_text()
    assert "figures/accuracy.png" in text
    assert "figures/perplexity.png" not in text
    assert "won back" not in text


def test_models_are_compared_document_by_document(run: Path) -> None:
    assert "Significance" not in write_run_report(run, STAGES)[0].read_text()  # no documents' results are there
    for role, right in (("dense", 9), ("pruned", 2), ("tuned", 8)):
        content = scores(role, right / 10, 1.0)
        content["tasks"] = {task: {"acc": right / 10, "num_samples": 10} for task in TASKS}
        write_json(run / f"eval/{role}.json", content)
        for task in TASKS:
            path = run / f"eval/samples/{role}/{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"doc_id": i, "acc": int(i < right)}) + "\n" for i in range(10)))
    text = write_run_report(run, STAGES)[0].read_text()
    assert "| task | tuned − pruned | pruned − dense | tuned − dense |" in text
    assert "| rte | +60.00, p = 0.031 | -70.00, p = 0.016 | -10.00, p = 1 |" in text  # 2/2⁶, 2/2⁷, one document
    assert r"), p \< 0.001 | -70.00 (-" in text
    assert "), p = 0.016 |" in text  # seven documents in all


def test_a_log_is_read_as_the_trainer_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [{"step": 1, "loss": 2.0, "tokens_per_s": 9.0}, {"step": 2, "loss": math.nan, "tokens_per_s": 9.0},
            {"step": 3, "loss": None, "tokens_per_s": 9.0, "skipped": "x"}, {"step": 4, "loss": 1.0}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[" * 100_000 + '\n{"step": 5, "l')
    assert [row["step"] for row in StepLog(path).rows()] == [1, 2, 3]
    assert [row["step"] for row in read_log(path)] == [1]


def test_split_name() -> None:
    assert split_name("model.layers.12.self_attn.q_proj") == (12, "q_proj")
    assert split_name("transformer.h.3.mlp.c_fc") == (3, "c_fc")
    assert split_name("project") == (0, "project")
