"""Instruction rows as samples: templates, labels, packing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.data.instructions import first_fit
from lors_cli.data.samples import PadCollator, TuneData, count_tokens, isolated_sample
from lors_cli.data.tokenising import encode
from lors_cli.data.tokens import tuning_samples
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneDataConfig

END = 257
ROWS = [
    {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
    {"instruction": "Greet", "input": "", "output": "Hi"},
]
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return _write(tmp_path, ROWS)


def _write(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _samples(path: str, tokenizer: Any, **config: Any) -> TuneData:
    return tuning_samples(TuneDataConfig(dataset=path, **config), tokenizer, seed=0, num_needed=None,
                          model_max_length=4096, data_dir=None)  # fmt: skip


def _chatting(tokenizer: Any, template: str = CHATML) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _prompt_and_response(sample: dict[str, list[int]]) -> tuple[str, bytes]:
    masked = sample["labels"].count(-100)
    assert sample["labels"] == [-100] * masked + sample["input_ids"][masked:]
    ids = sample["input_ids"]
    return bytes(ids[:masked]).decode(), bytes(token for token in ids[masked:] if token != END)


@pytest.mark.parametrize(
    ("template", "prompts", "responses"),
    [
        (
            "alpaca",
            [
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n"
                "### Input:\n1 2\n\n### Response:",
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nGreet\n\n### Response:",
            ],
            [b"3", b"Hi"],
        ),
        (
            "alpaca_short",
            [
                "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n",
                "### Instruction:\nGreet\n\n### Response:\n",
            ],
            [b"3", b"Hi"],
        ),
        (
            "vicuna",
            [
                "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                "detailed, and polite answers to the user's questions. USER: Add {x}.\n1 2 ASSISTANT:",
                "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                "detailed, and polite answers to the user's questions. USER: Greet ASSISTANT:",
            ],
            [b" 3", b" Hi"],
        ),
    ],
)
def test_templates(rows: str, tiny_tokenizer: Any, template: str, prompts: list[str], responses: list[bytes]) -> None:
    samples = _samples(rows, tiny_tokenizer, template=template).samples
    assert [_prompt_and_response(sample) for sample in samples] == list(zip(prompts, responses, strict=True))
    assert all(sample["input_ids"][-1] == END for sample in samples)


def test_default_template_and_labels_are_those_of_stanford_alpaca(rows: str, tiny_tokenizer: Any) -> None:
    chosen = _samples(rows, tiny_tokenizer, template="alpaca", train_on_prompt=False)
    assert _samples(rows, tiny_tokenizer).samples == chosen.samples


def test_a_tokenizer_that_puts_spaces_first_gets_one_before_vicunas_response(rows: str, shared_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data/models/stories260k")
    _, sample = _samples(rows, tokenizer, template="vicuna").samples
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Greet ASSISTANT: Hi"
    )
    assert sample["input_ids"] == [*tokenizer(prompt).input_ids, tokenizer.eos_token_id]


def test_chat_template_gives_the_conversation_that_the_tokenizer_writes(rows: str, tiny_tokenizer: Any) -> None:
    tokenizer = _chatting(tiny_tokenizer)
    for row, sample in zip(ROWS, _samples(rows, tokenizer, template="chat").samples, strict=True):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        prompt = f"<|user|>{question}<|end|>\n<|assistant|>"
        assert bytes(sample["input_ids"]).decode() == f"{prompt}{row['output']}<|end|>"
        assert sample["labels"] == [-100] * len(prompt) + list(f"{row['output']}<|end|>".encode())
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        assert whole == bytes(sample["input_ids"]).decode() + "\n"


def test_chat_template_without_an_end_of_its_own_ends_in_eos(rows: str, tiny_tokenizer: Any) -> None:
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    sample = _samples(rows, _chatting(tiny_tokenizer, template), template="chat").samples[1]
    assert sample["input_ids"] == [*b"Greet Hi", END]


def test_chat_template_that_writes_the_date_does_not_change_with_the_day(rows: str, tiny_tokenizer: Any) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}{% for message in messages %}|{{ message['content'] }}{% endfor %}"
    sample = _samples(rows, _chatting(tiny_tokenizer, template), template="chat").samples[1]
    assert bytes(sample["input_ids"][:-1]).decode() == "2024-07-26|Greet|Hi"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "needs the tokenizer's chat template, and this one has none"),
        ("{{ raise_exception('no assistant') }}", "refuses a conversation of user, assistant: no assistant"),
        ("{{ messages[0]['content'] }}", "leaves the answer out"),
        ("{{ messages[0] + 1 }}", "refuses a question and its answer: unsupported operand"),
        ("{{ 1 // 0 }}", "refuses a question and its answer: integer division"),
        ("{{ unclosed", "refuses a question and its answer: unexpected end"),
        ({"tool_use": "x"}, "refuses a question and its answer: This model has multiple chat templates"),
        (3, "refuses a question and its answer"),
        (["x"], "refuses a question and its answer"),
    ],
)
def test_unusable_chat_templates(rows: str, tiny_tokenizer: Any, template: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _samples(rows, _chatting(tiny_tokenizer, template), template="chat")


def test_the_prompt_can_be_learnt_too(rows: str, tiny_tokenizer: Any) -> None:
    masked = _samples(rows, tiny_tokenizer)
    whole = _samples(rows, tiny_tokenizer, train_on_prompt=True)
    assert [sample["input_ids"] for sample in masked.samples] == [sample["input_ids"] for sample in whole.samples]
    assert all(sample["labels"] == sample["input_ids"] for sample in whole.samples)


# ---- packing


def _naive_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for index, length in enumerate(lengths):
        for content in bins:
            if sum(lengths[item] for item in content) + length <= capacity:
                content.append(index)
                break
        else:
            bins.append([index])
    return bins


@pytest.mark.parametrize("count", [1, 2, 3, 64, 257])
def test_first_fit_is_first_fit(count: int) -> None:
    lengths = [1 + index * index * 7 % 50 for index in range(count)]
    assert first_fit(lengths, 50) == _naive_first_fit(lengths, 50)
    assert first_fit([50] * count, 50) == [[index] for index in range(count)]


def test_packed_instructions_are_whole_and_keep_apart(tmp_path: Path, tiny_tokenizer: Any) -> None:
    many = [{"instruction": "a" * (i % 13 + 1), "output": f"{i:03d}" * (i % 5 + 1)} for i in range(50)]
    path = _write(tmp_path, many)
    single = _samples(path, tiny_tokenizer, template="alpaca_short", max_length=256)
    packed = _samples(path, tiny_tokenizer, template="alpaca_short", max_length=256, packing="isolated")
    assert (packed.num_rows, packed.num_tokens) == (50, single.num_tokens)
    lengths = [len(sample["input_ids"]) for sample in single.samples]
    found: list[tuple[list[int], list[int]]] = []
    for sample in packed.samples:
        assert len(sample["input_ids"]) == len(sample["labels"]) == len(sample["position_ids"]) <= 256
        starts = [place for place, position in enumerate(sample["position_ids"]) if position == 0]
        for first, last in zip(starts, [*starts[1:], len(sample["input_ids"])], strict=True):
            assert sample["position_ids"][first:last] == list(range(last - first))
            found.append((sample["input_ids"][first:last], sample["labels"][first:last]))
    expected = [(sample["input_ids"], sample["labels"]) for sample in single.samples]
    assert sorted(found) == sorted(expected)
    assert len(packed.samples) == len(_naive_first_fit(lengths, 256)) < 20
    assert packed.samples == _samples(path, tiny_tokenizer, template="alpaca_short", max_length=256,
                                      packing="isolated").samples  # fmt: skip


def test_no_text_of_a_pack_predicts_the_next_ones_start(rows: str, tiny_tokenizer: Any) -> None:
    (sample,) = _samples(rows, tiny_tokenizer, packing="isolated", train_on_prompt=True).samples
    starts = [place for place, position in enumerate(sample["position_ids"]) if position == 0]
    assert len(starts) == 2
    assert [place for place, label in enumerate(sample["labels"]) if label == -100] == starts


def test_num_samples_counts_rows_of_packed_instructions(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = _write(tmp_path, [{"instruction": "a", "output": "b"}] * 40)
    data = _samples(path, tiny_tokenizer, template="alpaca_short", packing="isolated", num_samples=30)
    assert sum(sample["position_ids"].count(0) for sample in data.samples) == data.num_rows == 30


def test_instructions_are_never_concatenated(rows: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="would let the instructions"):
        _samples(rows, tiny_tokenizer, packing="concatenated")


def test_settings_of_instructions_are_refused_for_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("abc " * 300)
    for setting in ({"template": "vicuna"}, {"train_on_prompt": True}):
        with pytest.raises(UsageError, match=r"is for instructions, and .*a\.txt is text"):
            _samples(str(tmp_path / "a.txt"), tiny_tokenizer, **setting)


def test_batches_of_isolated_texts_have_positions_and_no_mask() -> None:
    texts = [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    batch = PadCollator(0)([isolated_sample(texts), isolated_sample(texts[1:]), isolated_sample(texts[:1])])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 6], [5, 6, 0, 0, 0], [7, 8, 9, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 1, 1, 1], [0, 1, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 6], [-100, 6, -100, -100, -100], [-100, 8, 9, -100, -100]]
    assert "attention_mask" not in batch
    assert count_tokens(batch) == 10
    assert count_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}) == 5


# ---- text


def test_isolated_text_has_the_blocks_of_concatenated_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    documents = [chr(97 + i % 26) * (1 + i * 7 % 40) for i in range(300)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    plain, isolated = (
        _samples(str(path), tiny_tokenizer, max_length=16, packing=packing).samples
        for packing in ("concatenated", "isolated")
    )
    assert plain == _samples(str(path), tiny_tokenizer, max_length=16).samples
    assert [sample["input_ids"] for sample in plain] == [sample["input_ids"] for sample in isolated]
    for sample in isolated:
        position, ids = 0, sample["input_ids"]
        for place, token in enumerate(ids):
            if place and ids[place - 1] == END:
                position = 0
            assert sample["position_ids"][place] == position
            assert sample["labels"][place] == (-100 if position == 0 else token)
            position += 1


def test_isolated_documents_begin_as_the_tokenizer_begins_a_text(tmp_path: Path, shared_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data/models/stories260k")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"cat {i}"}) + "\n" for i in range(90)))
    (ids,) = encode(tokenizer, ["cat 0"])
    length = len(ids) + 2
    samples = _samples(str(path), tokenizer, max_length=length, packing="isolated", num_samples=10_000).samples
    begun = [sample for sample in samples if sample["input_ids"][:1] == [tokenizer.bos_token_id]]
    assert len(begun) > 5
    joined = [token for sample in _samples(str(path), tokenizer, max_length=length).samples
              for token in sample["input_ids"]]  # fmt: skip
    assert tokenizer.bos_token_id not in joined
