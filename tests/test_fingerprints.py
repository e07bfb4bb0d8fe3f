"""The fingerprints of stages, as finished runs have them on disk: a change here makes everyone's runs start anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lors_cli.data import sources
from lors_cli.evaluation import eval_fingerprint
from lors_cli.pruning import stage as pruning
from lors_cli.recipe.schema import (
    CalibrationConfig,
    DistillConfig,
    EvalConfig,
    MixConfig,
    PruneConfig,
    TuneConfig,
    TuneDataConfig,
)
from lors_cli.tuning import stage as tuning

ROW = '{"instruction": "say", "input": "", "output": "it"}\n'


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW)
    (tmp_path / "text.txt").write_text("some text\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "some"}\n')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PruneConfig(method="magnitude"), "8374dc3af0a56308405181043525e581"),
        (PruneConfig(calibration=CalibrationConfig(dataset="text.txt")), "fc39272dca3304b77152c24228769954"),
        (PruneConfig(calibration=CalibrationConfig(dataset="texts.jsonl")), "8272d806c680d93b74afdfd8fabd7200"),
        (
            PruneConfig(
                method="wanda",
                pattern="unstructured",
                sparsity=0.6,
                refit=True,
                calibration=CalibrationConfig(dataset="text.txt", num_samples=8, sequence_length=64),
            ),
            "3e89947f97c1d336db829266637ba06b",
        ),
        (
            PruneConfig(
                method="admm",
                pattern="4:8",
                reconstruct_epochs=2,
                calibration=CalibrationConfig(dataset="text.txt", seed=3),
            ),
            "f2b4ce7c9053e910f931e67920a119a3",
        ),
    ],
)
def test_of_pruning(config: PruneConfig, expected: str) -> None:
    assert pruning.stage_fingerprint(config, "model:0", None) == expected


DATA = TuneDataConfig(dataset="rows.jsonl")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TuneConfig(data=DATA, learning_rate=2e-5), "810f5073167b8a205bfee05e259911df"),
        (TuneConfig(data=replace(DATA, dataset="texts.jsonl"), learning_rate=2e-5), "e1e7e2202c02437be0de65be0be162c3"),
        (
            TuneConfig(data=DATA, method="sqft", rank=8, alpha=4, learning_rate=1e-3, max_steps=6),
            "9942a486b94d9a5280635b9cd8d5646a",
        ),
        (
            TuneConfig(data=DATA, init="kaiming", rounding="nearest", epochs=0.5, batch_size=4, learning_rate=2e-5),
            "0054b9fdb61f82dcbc21e40f5d005776",
        ),
        (
            TuneConfig(
                data=TuneDataConfig(dataset="text.txt", max_length=64),
                max_tokens=4096,
                spike_factor=3.0,
                learning_rate=2e-5,
            ),
            "151f818248f7ae08f807dde6e3a53c4d",
        ),
        (
            TuneConfig(
                data=DATA,
                train_norms=True,
                distill=DistillConfig(teacher="teacher.gguf", weight=0.5),
                learning_rate=2e-5,
            ),
            "93c393f758ded987d0fb3d1e1c2b5faa",
        ),
        (TuneConfig(data=DATA, method="sqft-gc", quantization_aware=True), "88cd4a2782c68cbf6181fc3309affe3b"),
    ],
)
def test_of_tuning(config: TuneConfig, expected: str, tmp_path: Path) -> None:
    (tmp_path / "teacher.gguf").write_bytes(b"GGUF")
    assert tuning.stage_fingerprint(config, "prune:0", None) == expected


def test_a_rate_that_the_method_implies_is_the_same_as_that_rate_written_out() -> None:
    implied = [
        ("lors", None, 1e-3),
        ("lors", "kaiming", 3e-3),
        ("sqft", "gradient", 1e-3),
        ("sqft-gc", None, 3e-3),
        ("spp", None, 3e-2),
        ("spp-gc", None, 3e-2),
        ("hira", None, 1e-2),
        ("hira-gc", None, 1e-2),
        ("lora", None, 3e-3),
    ]
    for method, init, rate in implied:
        left_out = TuneConfig(data=DATA, method=method, init=init, rank=1)  # type: ignore[arg-type]
        written, other = replace(left_out, learning_rate=rate), replace(left_out, learning_rate=2e-5)
        found = [tuning.stage_fingerprint(config, "prune:0", None) for config in (left_out, written, other)]
        assert found[0] == found[1] != found[2], method


@pytest.mark.parametrize(
    "change",
    [
        {"skip": ("*.down_proj",)},
        {"lr_schedule": "linear"},
        {"optim": "adamw_8bit"},
        {"spike_factor": 9.0},
        {"gradient": "exact"},
        {"gradient": "rotating"},
    ],
)
def test_a_setting_that_earlier_versions_lacked_counts_once_it_is_not_the_default(change: dict[str, Any]) -> None:
    config = TuneConfig(data=DATA)
    found = [tuning.stage_fingerprint(each, "prune:0", None) for each in (config, replace(config, **change))]
    assert found[0] != found[1]


def test_what_pruning_skips_counts() -> None:
    config = PruneConfig(method="magnitude")
    found = [pruning.stage_fingerprint(each, "model:0", None)
             for each in (config, replace(config, skip=("a.*",)), replace(config, skip=("b.*",)))]  # fmt: skip
    assert len(set(found)) == 3


def test_of_evaluation() -> None:
    config = EvalConfig(tasks=(), limit=3, perplexity=("text.txt",), perplexity_windows=4)
    assert eval_fingerprint(config, {"dense": "model:0", "tuned": "tune:0"}, None) == "65f8557f964ee60a8202287e24887b15"


@pytest.mark.parametrize(("name", "depends"), [("rows.jsonl", True), ("texts.jsonl", True), ("text.txt", False)])
def test_how_the_users_rows_are_read_counts_in_every_stage(
    name: str, depends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("other.txt").write_text("other text\n")
    mixed = TuneDataConfig(dataset="other.txt", mix=(MixConfig(dataset=name, weight=0.5),))

    def all_of_them() -> list[str]:
        return [
            pruning.stage_fingerprint(PruneConfig(calibration=CalibrationConfig(dataset=name)), "model:0", None),
            tuning.stage_fingerprint(TuneConfig(data=replace(DATA, dataset=name)), "prune:0", None),
            tuning.stage_fingerprint(TuneConfig(data=mixed, max_steps=3), "prune:0", None),
            eval_fingerprint(EvalConfig(tasks=(), perplexity=(name,)), {"dense": "model:0"}, None),
        ]

    before = all_of_them()
    monkeypatch.setattr(sources, "_ROWS_MARK", "#another")
    assert [old != new for old, new in zip(before, all_of_them(), strict=True)] == [depends] * 4
