"""Tuning on several sources: killed and resumed, the loss of a step, and what record and card tell."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forking import signalled
from killed_runs import MODELS, killed_at, log

from lors_cli.models.loading import load_model
from lors_cli.recipe.schema import MixConfig, ModelConfig, PruneConfig, TuneConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training.trainer import AdapterTrainer


@pytest.fixture
def mixed(config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TuneConfig:
    """Eight steps of four samples: forty instructions, streamed text, and isolated text, each more than once."""
    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("streamed", "short"):
        lines = [{"text": f"{name} {n}: fox {n * 7 % 31} jumps. " * 5} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mix = (MixConfig(dataset=str(tmp_path / "streamed.jsonl"), weight=0.4, stream="on"),
           MixConfig(dataset=str(tmp_path / "short.jsonl"), weight=0.2, packing="isolated"))  # fmt: skip
    return replace(config, data=replace(config.data, mix=mix, shuffle_buffer=3), val_size=5, eval_steps=4)


def _numbers(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in log(out)]


def test_a_resumed_run_equals_an_unbroken_one_and_record_and_card_name_every_source(
    sparse_checkpoint: Path, mixed: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    tune(mixed, model, tmp_path / "whole")
    killed_at(5, mixed, model, tmp_path / "broken", monkeypatch)
    record = tune(mixed, model, tmp_path / "broken")
    for name in MODELS:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert _numbers(tmp_path / "whole") == _numbers(tmp_path / "broken")
    told = record.metrics["data"]["mix"]
    assert [(part["num_samples"], part["weight"]) for part in told] == [(13, 0.4), (13, 0.4), (6, 0.2)]
    assert record.metrics["val_samples"] == 5
    assert len(record.inputs["mix"]) == 2
    card = " ".join((tmp_path / "broken/README.md").read_text().split())
    assert "tuned on rows.jsonl 40 %, streamed.jsonl 40 %, short.jsonl 20 % with lors" in card.replace("\\", "")
    assert str(tmp_path) not in card


def test_the_loss_of_a_step_is_the_mean_over_the_labels_of_all_its_sources(
    sparse_checkpoint: Path, mixed: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sample alone through the plain model: neither padding nor positions may mix the sources."""
    import torch

    batches: list[Any] = []
    original = AdapterTrainer.micro_batch

    def kept(self: AdapterTrainer, inputs: Any, *args: Any) -> torch.Tensor:
        batches.append((self.step, {key: value.clone() for key, value in inputs.items()}))
        return original(self, inputs, *args)

    monkeypatch.setattr(AdapterTrainer, "micro_batch", kept)
    config = replace(mixed, learning_rate=1e-12, init="kaiming", max_steps=3)
    model = ModelConfig(path=str(sparse_checkpoint), dtype="float32")
    tune(config, model, tmp_path / "tune")
    network = load_model(model)
    kinds: set[str] = set()
    for row in log(tmp_path / "tune"):
        total, count = 0.0, 0
        for _, batch in (each for each in batches if each[0] == row["step"] - 1):
            kinds |= set(batch)
            marks = batch.get("position_ids", batch.get("attention_mask"))
            for ids, labels, mark in zip(batch["input_ids"], batch["labels"], marks, strict=True):
                for first, last in _texts(mark, "position_ids" in batch):
                    wanted = labels[first + 1 : last]
                    if (wanted != -100).any():
                        logits = network(ids[None, first:last], use_cache=False).logits[0, :-1]
                        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                        count += int((wanted != -100).sum())
        assert row["loss"] == pytest.approx(total / count, rel=1e-4)
    assert kinds == {"input_ids", "labels", "attention_mask", "position_ids"}


def _texts(mark: Any, isolated: bool) -> list[tuple[int, int]]:
    """First and last+1 token of every text of a row, by its positions or its mask."""
    if not isolated:
        return [(0, int(mark.sum()))]
    starts = [place for place in range(len(mark)) if mark[place] == 0]
    ends = [next((n for n in range(first + 1, len(mark)) if mark[n] <= mark[n - 1]), len(mark)) for first in starts]
    return list(zip(starts, ends, strict=True))


@pytest.mark.long
def test_killed_for_good_and_gone_on_with_on_a_real_model(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.pruning import prune

    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path / "cache"))
    prune(PruneConfig(method="magnitude"), str(shared_dir / "data/models/stories260k"), tmp_path / "sparse")

    def call(out: str) -> list[str]:
        return ["tune", str(tmp_path / "sparse"), "--out", str(tmp_path / out), "--data-dir", str(shared_dir / "data"),
                "data.dataset=slimpajama", "data.mix=[{dataset: alpaca, weight: 0.25}]", "data.max_length=128",
                "data.stream=on", "max_steps=12", "batch_size=8", "save_steps=3", "val_size=16"]  # fmt: skip

    killed = signalled(signal.SIGKILL, "checkpoint-6", *call("broken"))
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "broken/checkpoints/checkpoint-3").is_dir()
    for out in ("broken", "whole"):
        assert signalled(signal.SIGKILL, "never", *call(out)).returncode == 0
    for name in MODELS:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert _numbers(tmp_path / "whole") == _numbers(tmp_path / "broken")
