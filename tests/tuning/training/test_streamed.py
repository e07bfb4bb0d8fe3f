"""Tuning on streamed and on isolated text: resumed runs, token budgets, what is read again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import MODELS, killed_at, log

from lors_cli.data.samples import count_tokens
from lors_cli.data.stream import cache as token_cache
from lors_cli.data.stream.samples import TokenStream
from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.training.trainer import AdapterTrainer


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 2000)
    return tmp_path / "cache"


@pytest.fixture
def streamed(config: TuneConfig, tmp_path: Path) -> TuneConfig:
    """Eight steps of four samples, over two windows and a half."""
    path = tmp_path / "text.jsonl"
    lines = [
        f"Line {index}: fox {index * 7 % 31} jumps over {index % 5} dogs. " * (1 + index % 3) for index in range(400)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = TuneDataConfig(dataset=str(path), max_length=48, stream="on", shuffle_buffer=12, packing="isolated")
    return replace(config, data=data, learning_rate=1e-2)


def test_a_resumed_run_equals_an_unbroken_one(
    sparse_checkpoint: Path, streamed: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_root: Path
) -> None:
    model, whole = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "whole"
    tune(streamed, model, whole)
    seen: list[int] = []
    read = TokenStream.__getitem__

    def noted(self: TokenStream, index: Any) -> Any:
        seen.append(index)
        return read(self, index)

    monkeypatch.setattr(TokenStream, "__getitem__", noted)
    for step, cache_is_lost in ((1, False), (4, False), (7, False), (4, True)):
        shutil.rmtree(cache_root)  # the broken run reads nothing of those before it
        broken = tmp_path / f"broken at {step}, {cache_is_lost}"
        killed_at(step, streamed, model, broken, monkeypatch)
        if cache_is_lost:
            shutil.rmtree(cache_root)
        seen.clear()
        tune(streamed, model, broken)
        for name in MODELS:
            assert (whole / name).read_bytes() == (broken / name).read_bytes(), broken
        losses = [[row["loss"] for row in log(run)] for run in (whole, broken)]
        assert losses[0] == losses[1], broken
        assert len(losses[0]) == 8
        done = step // 3 * 3  # save_steps
        read_in_training = [index for index in seen if isinstance(index, int)][-4 * (8 - done) :]
        assert read_in_training == list(range(4 * done, 32)), broken  # none of the steps before is read again


def test_a_cached_run_equals_a_first_one_and_starts_no_process(
    sparse_checkpoint: Path, streamed: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    tune(streamed, model, tmp_path / "first")
    monkeypatch.setattr("lors_cli.data.stream.samples.Worker", None)
    tune(streamed, model, tmp_path / "second")
    assert (tmp_path / "first" / MODELS[0]).read_bytes() == (tmp_path / "second" / MODELS[0]).read_bytes()


def test_exactly_the_budget_of_tokens_is_trained_on(
    sparse_checkpoint: Path, streamed: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AdapterTrainer.micro_batch
    seen: list[int] = []

    def counted(self: AdapterTrainer, inputs: Any, *args: Any) -> torch.Tensor:
        seen.append(count_tokens(inputs))
        return original(self, inputs, *args)

    monkeypatch.setattr(AdapterTrainer, "micro_batch", counted)
    budget = 48 * 9 + 20  # two whole steps of four samples; two samples in the last, one of them of 20 tokens
    record = tune(replace(streamed, max_steps=None, max_tokens=budget, init="kaiming"),
                  ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")  # fmt: skip
    assert seen == [96, 96, 96, 96, 68]
    assert sum(seen) == record.metrics["tokens"] == budget
    assert (record.metrics["steps"], record.metrics["num_samples"]) == (3, 10)
    assert record.config["max_tokens"] == budget
    rows = log(tmp_path / "tune")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["learning_rate"] > rows[2]["learning_rate"]


def test_the_last_steps_loss_is_the_mean_over_its_own_labels(
    sparse_checkpoint: Path, streamed: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.models.loading import load_model

    budget = 48 * 5 + 20
    config = replace(streamed, max_steps=None, max_tokens=budget, learning_rate=1e-12, init="kaiming")
    batches: list[Any] = []
    original = AdapterTrainer.micro_batch

    def kept(self: AdapterTrainer, inputs: Any, *args: Any) -> torch.Tensor:
        batches.append({key: value.clone() for key, value in inputs.items()})
        return original(self, inputs, *args)

    monkeypatch.setattr(AdapterTrainer, "micro_batch", kept)
    model = ModelConfig(path=str(sparse_checkpoint), dtype="float32")
    tune(config, model, tmp_path / "tune")
    rows = log(tmp_path / "tune")
    network = load_model(model)
    for row, step in zip(rows, (batches[:2], batches[2:]), strict=True):
        total, count = 0.0, 0
        for batch in step:
            logits = network(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
                                                       reduction="none")  # fmt: skip
            total += float(losses.sum())
            count += int((batch["labels"][:, 1:] != -100).sum())
        assert row["loss"] == pytest.approx(total / count, rel=1e-4)


def test_packed_instructions_are_tuned_on_and_resumed(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = replace(config, data=replace(config.data, packing="isolated", max_length=512), max_steps=5)
    model = ModelConfig(path=str(sparse_checkpoint))
    record = tune(packed, model, tmp_path / "whole")
    assert record.metrics["num_samples"] < 20
    assert record.metrics["last_loss"] < record.metrics["first_loss"]
    killed_at(4, packed, model, tmp_path / "broken", monkeypatch)
    tune(packed, model, tmp_path / "broken")
    assert (tmp_path / "whole" / MODELS[0]).read_bytes() == (tmp_path / "broken" / MODELS[0]).read_bytes()


def test_a_model_that_mixes_texts_is_refused_before_training(
    config: TuneConfig, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shape = OPTConfig(vocab_size=258, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=512, init_std=0.3)  # fmt: skip
    model = OPTForCausalLM(shape)
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.ndim == 2:
            parameter.data[:, ::2] = 0
    model.save_pretrained(tmp_path / "opt")
    tiny_tokenizer.save_pretrained(tmp_path / "opt")
    with pytest.raises(UsageError, match="isolated cannot be had with OPTForCausalLM"):
        tune(replace(config, data=replace(config.data, packing="isolated")), ModelConfig(path=str(tmp_path / "opt")),
             tmp_path / "tune")  # fmt: skip
    assert records.read_record(tmp_path / "tune") is None


def test_every_setting_is_in_the_fingerprint_where_it_acts(streamed: TuneConfig) -> None:
    def fingerprint(**changes: Any) -> str:
        settings = {key: changes.pop(key) for key in ("max_steps", "max_tokens", "epochs") if key in changes}
        return stage_fingerprint(replace(streamed, data=replace(streamed.data, **changes), **settings), "base", None)

    found = [
        fingerprint(), fingerprint(packing=None), fingerprint(stream="off"), fingerprint(shuffle_buffer=13),
        fingerprint(max_steps=None, max_tokens=999), fingerprint(max_steps=None), fingerprint(template="chat"),
        fingerprint(train_on_prompt=True),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert fingerprint(stream="off") == fingerprint(stream="auto", shuffle_buffer=99)
    budget = {"max_steps": None, "max_tokens": 999}
    assert fingerprint(**budget) == fingerprint(**budget, epochs=9.0) == fingerprint(**budget, stream="auto")
