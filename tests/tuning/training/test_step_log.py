"""`log.jsonl` as a killed run, or a hand, may have left it."""

from __future__ import annotations

import json
from pathlib import Path

from lors_cli.tuning.training.step_log import StepLog, loss_text


def row(step: int, **other: object) -> dict[str, object]:
    return {"step": step, "loss": 1.5, "tokens_per_s": 9.0, **other}


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    good = [row(1), row(2, loss=None, skipped="not finite"), row(3)]
    for each in good:
        log.append(each)
    broken = [
        b'{"step": 4, "lo', b"\xff\xef", b"null", b"[1]", json.dumps(row(5, loss=None)).encode(), b"[" * 100_000,
        json.dumps(row(5, tokens_per_s="x")).encode(), b'{"loss": 1.0, "tokens_per_s": 1.0}',
    ]  # fmt: skip
    log.path.write_bytes(log.path.read_bytes() + b"\n".join(broken))
    assert log.rows() == good
    log.cut_after(2)
    assert log.rows() == good[:2]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert StepLog(tmp_path / "none.jsonl").rows() == []


def test_a_loss_that_was_not_finite_is_said() -> None:
    metrics = {"loss_before": None, "loss_after": 2.5, "loss_samples": 1, "loss_held_out": True}
    assert loss_text(metrics) == "not finite → 2.5000 on 1 sample that training did not see"
