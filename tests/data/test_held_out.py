"""What is held out: the same samples whatever the training is, and none of them in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lors_cli.data.held_out import num_held_out
from lors_cli.data.samples import TuneData
from lors_cli.data.stream import cache as token_cache
from lors_cli.data.tokens import tuning_data
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneConfig, TuneDataConfig

EOS = 257
LENGTH = 48
HELD_OUT = 5


@pytest.fixture(autouse=True)
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 100)  # less than what is held out


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for number in range(40):
            file.write(json.dumps({"instruction": f"say {number}", "input": "", "output": f"it is {number}"}) + "\n")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    found = [f"Line {number}: fox {number * 7 % 31} jumps. " * (1 + number % 4) for number in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return found


def read(
    path: Path, tokenizer: Any, val_size: float | None, data: dict[str, Any] | None = None, **tune: Any
) -> TuneData:
    config = TuneConfig(val_size=val_size, batch_size=4, data=TuneDataConfig(dataset=str(path), **(data or {})), **tune)
    return tuning_data(config, tokenizer, model_max_length=512, data_dir=None)


def ids(samples: Any) -> list[tuple[int, ...]]:
    return [tuple(sample["input_ids"]) for sample in samples]


@pytest.mark.parametrize(("val_size", "number"), [(7, 7), (0.25, 10), (0.01, 1), (0.126, 6)])
def test_rows_are_either_held_out_or_trained_on(rows: Path, tiny_tokenizer: Any, val_size: float, number: int) -> None:
    every = ids(read(rows, tiny_tokenizer, None).samples)
    data = read(rows, tiny_tokenizer, val_size)
    kept, held_out = ids(data.samples), ids(data.held_out)
    assert len(held_out) == number
    assert kept == [sample for sample in every if sample not in held_out]
    assert sorted(kept + held_out) == sorted(every)
    assert data.num_tokens == sum(map(len, kept))


def test_a_share_is_rounded_up_but_not_by_the_floats_error() -> None:
    assert [num_held_out(share, 100) for share in (0.07, 0.071, 0.14, 0.0001)] == [7, 8, 14, 1]


@pytest.mark.parametrize("kind", ["rows", "packed rows", "tokens", "text", "stream"])
def test_the_split_is_the_same_for_every_method_rank_length_and_seed(
    rows: Path, texts: list[str], tiny_tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    path, data = rows, {}
    if kind == "packed rows":
        data = {"packing": "isolated"}
    elif kind == "tokens":
        path = tmp_path / "ids.safetensors"
        save_file({"input_ids": torch.arange(30 * 16).view(30, 16).to(torch.int32) % 250}, path)
    elif kind in ("text", "stream"):
        path, data = tmp_path / "text.jsonl", {"max_length": LENGTH, "stream": "on" if kind == "stream" else "off"}
    first = read(path, tiny_tokenizer, HELD_OUT, data, max_steps=3)
    other = read(path, tiny_tokenizer, HELD_OUT, data, max_steps=9, seed=5, method="spp", rank=2, learning_rate=0.5)
    assert ids(first.held_out) == ids(other.held_out)
    assert len(first.held_out) == HELD_OUT
    if kind != "stream":  # which is in the order of its seed
        assert ids(read(path, tiny_tokenizer, HELD_OUT, data, seed=0).samples) != []
    first.close()
    other.close()


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_a_texts_first_documents_are_held_out_and_training_begins_with_the_next(
    texts: list[str], tiny_tokenizer: Any, tmp_path: Path, stream: str, packing: str
) -> None:
    begin = [256] if packing == "isolated" and tiny_tokenizer("").input_ids else []
    documents = [[*begin, *tiny_tokenizer(text, add_special_tokens=False).input_ids, EOS] for text in texts]
    tokens = [token for document in documents for token in document]
    held_out = [tuple(tokens[first : first + LENGTH]) for first in range(0, HELD_OUT * LENGTH, LENGTH)]
    used, number = 0, 0
    while used < HELD_OUT * LENGTH:
        used += len(documents[number])
        number += 1
    rest = [token for document in documents[number:] for token in document]
    left = [tuple(rest[first : first + LENGTH]) for first in range(0, len(rest) - LENGTH + 1, LENGTH)]
    data = {"max_length": LENGTH, "stream": stream, "packing": packing, "shuffle_buffer": 4}
    found = read(tmp_path / "text.jsonl", tiny_tokenizer, HELD_OUT, data, epochs=1.0)
    assert ids(found.held_out) == held_out
    assert len(left) - len(found.samples) == (stream == "off")  # in memory both parts lose what fills no sample
    assert sorted(ids(found.samples)) == sorted(left[: len(found.samples)])
    assert len(left) > 20
    assert ("position_ids" in found.held_out[0]) == (packing == "isolated")
    found.close()


@pytest.mark.parametrize("stream", ["on", "off"])
def test_held_out_samples_count_among_num_samples(
    texts: list[str], tiny_tokenizer: Any, tmp_path: Path, stream: str
) -> None:
    data = {"max_length": LENGTH, "stream": stream, "num_samples": 12}
    found = read(tmp_path / "text.jsonl", tiny_tokenizer, HELD_OUT, data, epochs=2.0)
    assert len(set(ids(found.samples))) == 12 - HELD_OUT
    found.close()


@pytest.mark.parametrize("stream", ["on", "off"])
def test_one_long_document_is_cut(tiny_tokenizer: Any, tmp_path: Path, stream: str) -> None:
    (tmp_path / "book.txt").write_text("".join(f"{number} " for number in range(500)))
    data = {"max_length": LENGTH, "stream": stream}
    found = read(tmp_path / "book.txt", tiny_tokenizer, 3, data, epochs=1.0)
    tokens = [*tiny_tokenizer((tmp_path / "book.txt").read_text(), add_special_tokens=False).input_ids, EOS]
    blocks = [tuple(tokens[first : first + LENGTH]) for first in range(0, len(tokens) - LENGTH + 1, LENGTH)]
    assert ids(found.held_out) == blocks[:3]
    assert sorted(ids(found.samples)) == sorted(blocks[3:])
    found.close()


def test_a_share_of_a_text_in_memory_is_of_its_samples(texts: list[str], tiny_tokenizer: Any, tmp_path: Path) -> None:
    number = sum(len(tiny_tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts) // LENGTH
    data = {"max_length": LENGTH, "stream": "off"}
    assert len(read(tmp_path / "text.jsonl", tiny_tokenizer, 0.2, data).held_out) == -(-number // 5)


def test_what_cannot_be_held_out_is_refused(rows: Path, texts: list[str], tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="val_size: 40 holds out 40 of 40 samples and leaves none to train on"):
        read(rows, tiny_tokenizer, 40)
    data = {"max_length": LENGTH, "stream": "on"}
    with pytest.raises(UsageError, match=r"val_size: 0\.1 is a share, and how long streamed text is shows at its end"):
        read(tmp_path / "text.jsonl", tiny_tokenizer, 0.1, data, max_steps=2)
    with pytest.raises(UsageError, match="has too little text"):
        read(tmp_path / "text.jsonl", tiny_tokenizer, 10_000, data, max_steps=2)
    with pytest.raises(UsageError, match="holds out 10000 of"):
        read(tmp_path / "text.jsonl", tiny_tokenizer, 10_000, {**data, "stream": "off"}, max_steps=2)


def test_without_val_size_nothing_is_held_out(rows: Path, tiny_tokenizer: Any) -> None:
    data = read(rows, tiny_tokenizer, None)
    assert (len(data.held_out), len(data.samples)) == (0, 40)
