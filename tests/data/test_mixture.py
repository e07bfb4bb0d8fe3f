"""Several sources mixed by weight: shares, order, passes, what is held out, and what is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lors_cli.data.mixture import dealt
from lors_cli.data.samples import IGNORED, PadCollator, Sample
from lors_cli.data.stream import cache as token_cache
from lors_cli.data.tokens import tuning_data
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import MixConfig, TuneConfig, TuneDataConfig


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text (lower case, 40 words a line), ten instructions (upper case), and a second text of digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 1000)
    words = random.Random(0)
    _write("text.jsonl", [{"text": " ".join(words.choice(["fox", "dog", "owl", "hen"]) for _ in range(40))}
                          for _ in range(60)])  # fmt: skip
    _write("rows.jsonl", [{"instruction": f"SAY {n}", "input": "", "output": f"IT IS {n} " * n} for n in range(1, 11)])
    _write("digits.jsonl", [{"text": f"{n:040d}"} for n in range(60)])


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _config(*mix: MixConfig, max_steps: int = 10, **changes: Any) -> TuneConfig:
    data = changes.pop("data", {})
    return TuneConfig(data=TuneDataConfig(**{"dataset": "text.jsonl", "max_length": 320, **data, "mix": mix}),
                      max_steps=max_steps, batch_size=4, **changes)  # fmt: skip


ROWS = MixConfig(dataset="rows.jsonl", weight=0.3)


def _load(config: TuneConfig, tokenizer: Any) -> Any:
    return tuning_data(config, tokenizer, model_max_length=512, data_dir=None)


def _is_row(sample: Sample) -> bool:
    """Instructions have tokens without a label, text has none."""
    return IGNORED in sample["labels"][1:]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1 / 3, 2 / 3), (0.01, 0.99), (0.5, 0.25, 0.25), (0.6, 0.3, 0.1)])
def test_every_prefix_has_its_shares(weights: tuple[float, ...]) -> None:
    order = dealt(weights, 500)
    for number in range(1, 501):
        counts = Counter(order[:number])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - weight * number) < 1 + 1e-9


@pytest.mark.parametrize("stream", ["off", "on"])
def test_shares_are_of_samples_and_each_source_is_passed_over_in_turn(tiny_tokenizer: Any, stream: str) -> None:
    config = _config(ROWS, data={"stream": stream, "shuffle_buffer": 8}, max_steps=20)
    data = _load(config, tiny_tokenizer)
    samples = list(data.samples)
    data.close()
    rows = [tuple(sample["input_ids"]) for sample in samples if _is_row(sample)]
    text = [tuple(sample["input_ids"]) for sample in samples if not _is_row(sample)]
    assert (len(samples), len(rows), len(text)) == (80, 24, 56)
    alone = _load(
        replace(config, data=replace(config.data, dataset="rows.jsonl", stream="off", mix=())), tiny_tokenizer
    )
    everything = Counter(tuple(sample["input_ids"]) for sample in alone.samples)
    assert Counter(rows[:10]) == Counter(rows[10:20]) == everything  # two whole passes
    assert rows[:10] != rows[10:20]  # shuffled anew
    assert not Counter(rows[20:]) - everything
    blocks = _load(TuneConfig(data=replace(config.data, mix=(), stream="off"), epochs=1.0), tiny_tokenizer)
    number = len(blocks.samples)
    whole = Counter(tuple(sample["input_ids"]) for sample in blocks.samples)
    assert number > 20
    assert Counter(text[:number]) == whole if number <= 56 else not Counter(text) - whole
    assert sum(map(len, rows)) + sum(map(len, text)) == data.num_tokens


def test_the_order_follows_from_the_seed_alone(tiny_tokenizer: Any) -> None:
    first, again, other = (list(_load(_config(ROWS, seed=seed), tiny_tokenizer).samples) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [_is_row(sample) for sample in first] == [_is_row(sample) for sample in other]


@pytest.mark.parametrize("stream", ["off", "on"])
def test_each_source_holds_out_its_share_and_none_of_it_is_trained_on(tiny_tokenizer: Any, stream: str) -> None:
    config = _config(ROWS, val_size=10, max_steps=40, data={"stream": stream})
    data = _load(config, tiny_tokenizer)
    held_out, trained = list(data.held_out), list(data.samples)
    data.close()
    assert [_is_row(sample) for sample in held_out].count(True) == 3
    assert len(held_out) == 10
    assert any(map(_is_row, held_out[:3]))  # the first few are of both
    for kind in (True, False):
        kept = {tuple(sample["input_ids"]) for sample in held_out if _is_row(sample) == kind}
        assert not kept & {tuple(sample["input_ids"]) for sample in trained if _is_row(sample) == kind}


def test_a_share_is_held_out_of_each_source(tiny_tokenizer: Any) -> None:
    data = _load(_config(ROWS, val_size=0.2), tiny_tokenizer)
    assert sum(map(_is_row, data.held_out)) == 2  # of ten rows
    text = _load(TuneConfig(data=TuneDataConfig(dataset="text.jsonl", max_length=320), val_size=0.2), tiny_tokenizer)
    assert len(data.held_out) - 2 == len(text.held_out)


def test_every_source_keeps_its_own_settings(tiny_tokenizer: Any) -> None:
    rows = MixConfig(dataset="rows.jsonl", weight=0.4, template="vicuna", train_on_prompt=True, num_samples=3)
    mixed = _config(rows, MixConfig(dataset="digits.jsonl", weight=0.2, packing="isolated"))
    samples = list(_load(mixed, tiny_tokenizer).samples)
    texts = [tiny_tokenizer.decode(sample["input_ids"]) for sample in samples]
    chats = [text for text in texts if "USER:" in text]
    assert len(set(chats)) == 3
    assert (len(chats), sum("000" in text for text in texts)) == (16, 8)
    for sample, text in zip(samples, texts, strict=True):
        assert ("position_ids" in sample) == ("000" in text)
        assert ("USER:" in text) <= (IGNORED not in sample["labels"][1:])


def test_isolated_and_plain_samples_share_a_batch() -> None:
    """By hand: a plain sample is one text, its padding a text a token."""
    plain = {"input_ids": [5, 6], "labels": [5, 6]}
    isolated = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, 2, IGNORED, 4], "position_ids": [0, 1, 0, 1]}
    batch = PadCollator(9)([plain, isolated])
    assert batch["position_ids"].tolist() == [[0, 1, 1, 1], [0, 1, 0, 1]]
    assert batch["input_ids"].tolist() == [[5, 6, 9, 9], [1, 2, 3, 4]]
    assert "attention_mask" not in batch


def test_a_record_tells_the_mix(tiny_tokenizer: Any) -> None:
    told = _load(_config(ROWS), tiny_tokenizer).origin["mix"]
    assert [(part["dataset"], part["weight"], part["num_samples"]) for part in told] == [
        ("text.jsonl", 0.7, 28), ("rows.jsonl", 0.3, 12),
    ]  # fmt: skip
    assert told[1]["passes"] == 1.2
    assert told[0]["source"].startswith("jsonl#2:")
    assert told[0]["source"] != told[1]["source"]


def test_a_weight_that_comes_to_nothing_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"the weight of rows.jsonl is too low .* 10 steps with 4 samples"):
        _load(_config(replace(ROWS, weight=0.01)), tiny_tokenizer)


def test_max_tokens_and_epochs_are_refused() -> None:
    data = TuneDataConfig(dataset="text.jsonl", mix=(ROWS,))
    for settings in ({}, {"epochs": 2.0}, {"max_tokens": 5000}):
        with pytest.raises(ValueError, match=r"data\.mix: it needs max_steps"):
            TuneConfig(data=data, **settings)  # type: ignore[arg-type]


RECIPE = """\
name: mixed
model: {path: model}
tune:
  max_steps: 4
  data:
    dataset: text.jsonl
    mix:
      - {dataset: rows.jsonl, weight: 0.3}
"""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("weight: 0.3", "weigth: 0.3"), "mixed.yaml:8: tune.data.mix.weigth: unknown key; did you mean"),
        (("weight: 0.3", "weight: 3"), "mixed.yaml:8: tune.data.mix.weight: must be below 1, not 3"),
        (("rows.jsonl, weight", "text.jsonl, weight"), "tune.data.mix: text.jsonl is listed twice"),
        (("}", "}\n      - {dataset: a.txt, weight: 0.7}"), "tune.data.mix: the weights add up to 1, which leaves"),
        (("max_steps: 4", "epochs: 4"), "tune.data.mix: it needs max_steps"),
        (("mix:\n      - {dataset: rows.jsonl, weight: 0.3}", "mix: rows.jsonl"), "tune.data.mix: must be a list"),
        (("weight: 0.3", "weight: 0.3, columns: {input: a}"), "tune.data.mix.columns: columns must be text, or"),
    ],
)
def test_mistakes_in_a_mix_are_one_message(lors: Callable[..., Result], changed: tuple[str, str], said: str) -> None:
    Path("mixed.yaml").write_text(RECIPE.replace(*changed) if changed[0] != "}" else RECIPE.replace("0.3}", "0.3}" +
                                  changed[1][1:]))  # fmt: skip
    result = lors("run", "mixed.yaml", "--dry-run")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split()), result.stderr


def test_a_missing_file_of_a_mix_ends_with_3_before_anything_is_run(lors: Callable[..., Result]) -> None:
    Path("mixed.yaml").write_text(RECIPE)
    Path("rows.jsonl").unlink()
    result = lors("run", "mixed.yaml", "--dry-run")
    assert result.exit_code == 3, result.stderr
    assert "No file rows.jsonl" in result.stderr
