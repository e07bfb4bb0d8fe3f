"""The model card, read back as the hub reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lors_cli.models.card import looks_like_hub_id, model_card

PRUNE = {"method": "wanda", "pattern": "2:4", "sparsity": None, "calibration": {"dataset": "c4", "seed": 0}}
TUNE = {"method": "lors", "rank": 16, "data": {"dataset": "alpaca"}}
METRICS = {"pattern": "2:4", "sparsity": 0.5, "calibration": {"num_samples": 128}, "violations": 0}
ENVIRONMENT = {"python": "3.11.9", "packages": {"torch": "2.8.0"}}


def card(**changes: Any) -> tuple[dict[str, Any], str]:
    values: dict[str, Any] = {
        "base_model": "owner/base-1", "prune": PRUNE, "tune": TUNE, "metrics": METRICS, "environment": ENVIRONMENT,
    }  # fmt: skip
    text = model_card(**{**values, **changes})
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter() -> None:
    front, _ = card()
    assert front["base_model"] == "owner/base-1"
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["sparsity", "lors", "pruning", "wanda", "2:4"]


def test_body() -> None:
    _, body = card()
    for part in ("50.00%", "pattern 2:4", "wanda, calibrated", "calibrated on c4", "alpaca", "rank 16", "torch 2.8.0",
                 "from_pretrained(folder", "neither faster nor smaller", "those of the base model"):  # fmt: skip
        assert part in body


def test_pruned_only() -> None:
    front, body = card(tune=None, metrics={**METRICS, "pattern": "unstructured"}, prune={**PRUNE, "method": "ria"})
    assert front["tags"] == ["sparsity", "lors", "pruning", "ria", "unstructured"]
    assert "tuned" not in body


def test_tuned_from_a_foreign_sparse_model() -> None:
    front, body = card(prune=None)
    assert "pruning" not in front["tags"]
    assert "pruned with" not in body


@pytest.mark.parametrize(
    "name", ["/data/my model", "./folder", "llama", "a/b/c", "x/y.gguf", "package://m/f.gguf", "a/b\n---\nlicense: mit"]
)
def test_no_hub_id(name: str) -> None:
    front, body = card(base_model=name)
    assert "base_model" not in front
    assert "license" not in front
    assert "\n---\n" not in body


def test_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks_like_hub_id("owner/base-1")
    (tmp_path / "owner/base-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not looks_like_hub_id("owner/base-1")


def test_hostile_values_stay_values() -> None:
    front, body = card(prune={**PRUNE, "method": "x: y\n---\nlicense: mit", "note": "a|b\n# heading"})
    assert "license" not in front
    assert "x: y\n---\nlicense: mit" in front["tags"]
    assert "\n# heading" not in body
