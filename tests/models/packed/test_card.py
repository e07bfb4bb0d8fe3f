"""The card of a packed model: what the sparse model's says, and what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import Result

from lors_cli.files import records
from lors_cli.models.packed.measured import measured_speed, packed_size
from lors_cli.output.console import gib

Lors = Callable[..., Result]


def packed(lors: Lors, model: str, out: str = "packed") -> ModelCard:
    done = lors("pack", model, "--out", out)
    assert done.exit_code == 0, done.output
    return ModelCard.load(Path(out, "README.md"))


def test_of_a_run_it_says_how_the_model_was_made(at_finished: Path, lors: Lors) -> None:
    card = packed(lors, "runs/tiny/tune")
    sparse = ModelCard.load("runs/tiny/tune/README.md")
    metrics = json.loads(Path("packed/stage.json").read_text())["metrics"]
    assert f"{gib(metrics['bytes'])} instead of {gib(metrics['bytes_before'])}" in card.text
    assert card.data.tags == [*sparse.data.tags, "lors_packed"]
    same = ("base_model", "license", "datasets", "language", "library_name", "pipeline_tag")
    assert all(getattr(card.data, key, None) == getattr(sparse.data, key, None) for key in same)
    said = [
        line for line in sparse.text.splitlines() if line.startswith(("A sparse version", "| steps", "| violations"))
    ]
    assert len(said) == 3
    assert all(line in card.text for line in said)
    assert "import lors_cli" in card.text
    assert str(at_finished) not in card.text
    assert records.is_finished(Path("packed"), json.loads(Path("packed/stage.json").read_text())["fingerprint"])


def test_an_edited_card_is_kept_below_how_to_load_it(at_finished: Path, lors: Lors) -> None:
    own = "---\nlicense: mit\ntags: [mine]\n---\n# My model\n\nIt knows birds.\n"
    Path("runs/tiny/prune/README.md").write_text(own)
    card = packed(lors, "runs/tiny/prune")
    assert (card.data.license, card.data.tags) == ("mit", ["mine", "lors_packed"])
    assert card.text.rstrip().endswith("# My model\n\nIt knows birds.")
    assert card.text.index("import lors_cli") < card.text.index("# My model")


def test_of_another_s_model_without_a_card(at_finished: Path, lors: Lors) -> None:
    shutil.copytree("runs/tiny/prune", "theirs")
    for name in ("stage.json", "README.md"):
        Path("theirs", name).unlink()
    card = packed(lors, "theirs")
    assert "A sparse version of theirs. 50.00% of the weights" in card.text
    assert "import lors_cli" in card.text
    assert card.data.tags == ["sparse", "lors", "2:4", "lors_packed"]


MEASURED: dict[str, Any] = {
    "settings": {"batch_size": 1, "dtype": "bfloat16", "blocks": None},
    "environment": {"device": "CPU", "threads": 1, "kernel": "AVX2"},
    "cells": {"decode 64 tokens": {"dense": {"tokens_per_s": {"median": 10.04}},
                                   "packed": {"tokens_per_s": {"median": 18.0}},
                                   "dense_over_packed": {"median": 1.793}}},
}  # fmt: skip


def test_speed_is_said_only_where_it_was_measured_of_this_model(at_finished: Path, lors: Lors) -> None:
    packed(lors, "runs/tiny/tune", "runs/tiny/pack")
    folder = Path("runs/tiny/pack")
    record = records.read_record(folder)
    assert record is not None
    assert measured_speed(folder, record) == ""
    Path("runs/tiny/bench").mkdir()
    measured = Path("runs/tiny/bench/bench.json")
    measured.write_text(json.dumps({**MEASURED, "model": "pack:another:auto"}))
    assert measured_speed(folder, record) == ""
    measured.write_text(json.dumps({"model": f"pack:{record.fingerprint}:auto"}))
    assert measured_speed(folder, record) == ""
    of_this = {**MEASURED, "model": f"pack:{record.fingerprint}:auto"}
    measured.write_text(json.dumps({**of_this, "settings": {**MEASURED["settings"], "blocks": 1}}))
    assert measured_speed(folder, record) == ""
    measured.write_text(json.dumps(of_this))
    said = ("Decoding at batch 1 in bfloat16 (CPU, 1 thread, AVX2): 18.0 tokens/s packed, 10.0 dense, 1.79 times as "
            "fast.")  # fmt: skip
    assert measured_speed(folder, record) == packed_size(folder, record).speed == said


def test_what_bench_measures_of_it_is_in_the_report(
    at_finished: Path, lors: Lors, capsys: pytest.CaptureFixture
) -> None:
    """The bench's own file, and the run's report with size and speed, in the CSV too."""
    packed(lors, "runs/tiny/tune", "runs/tiny/pack")
    done = lors("bench", "--decode", "--model", "runs/tiny/pack", "--out", "runs/tiny/bench", "--tokens", "3",
                "--lengths", "4", "--rounds", "1", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert lors("report", "runs/tiny").exit_code == 0
    metrics = json.loads(Path("runs/tiny/pack/stage.json").read_text())["metrics"]
    report = Path("runs/tiny/report.md").read_text()
    section = report.partition("## Packed")[2].partition("## ")[0]
    assert gib(metrics["bytes_before"]) in section
    assert f"{gib(metrics['bytes'])} | {100 * metrics['bytes'] / metrics['bytes_before']:.1f} %" in section
    assert "Decoding at batch 1 in bfloat16" in section
    lines = [line for line in Path("runs/tiny/report.csv").read_text().splitlines() if "_bytes," in line]
    assert {tuple(line.split(",")[3:4] + line.split(",")[11:15:3]) for line in lines if "peak" not in line} == {
        ("tuned", "plain_bytes", str(metrics["bytes_before"])), ("tuned", "packed_bytes", str(metrics["bytes"])),
    }  # fmt: skip


def test_the_report_of_a_pack_stage_alone(at_finished: Path, lors: Lors) -> None:
    packed(lors, "runs/tiny/prune")
    done = lors("report", "packed")
    assert done.exit_code == 0, done.output
    report = Path("packed/report.md").read_text()
    assert "## Packed" in report
    assert "packed_bytes" in Path("packed/report.csv").read_text()
    assert "| packed | 2:4 |" in report
