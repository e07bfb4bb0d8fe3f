"""Conversations as tokens: those of the whole text that the template gives, whatever the tokenizer's kind."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lors_cli.data.prompts import ChatTemplate, Turn
from lors_cli.data.saved_prompts import answer_ending, template_name, trained_template
from lors_cli.data.tokens import tuning_samples
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneDataConfig

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TRAINING = [
    "Lily went to the park. Once upon a time, Lily said: hello!", "### Response:\nTell a story. USER: [INST] [/INST]",
    "<|user|>\n<|assistant|>\nassistant\nuser\nsystem\n", "日本語 ASSISTANT: Lily",
] * 3  # fmt: skip
TEMPLATES = {
    "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + "
    "' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}",
}
ENDS = {"llama2": "</s>", "mistral": "</s>", "zephyr": "</s>", "chatml": "<|im_end|>"}


def _trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind: byte-level BPE, or as sentencepiece makes them, with and without an added space."""
    name, _, how = kind.partition(" ")
    bpe = models.BPE(unk_token="<unk>", byte_fallback=name == "legacy")
    tokenizer = Tokenizer(models.Unigram() if name == "unigram" else bpe)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if name == "bytes" else []
    if name == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=how == "space")
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.decoder = decoders.ByteLevel()
    elif name == "legacy":  # as Llama 2's tokenizer.json: a space is put before each piece between special tokens
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # sentencepiece learns words alone
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=how)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=how)
    if name == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(TRAINING, trainer)
    else:
        special = SPECIAL + (alphabet if name == "legacy" else [])
        tokenizer.train_from_iterator(TRAINING, trainers.BpeTrainer(
            vocab_size=620 if name != "pieces" else 200, special_tokens=special, show_progress=False,
            initial_alphabet=[] if name == "legacy" else alphabet,
        ))  # fmt: skip
    if name == "legacy":  # the bytes are plain tokens there, not special ones
        content = json.loads(tokenizer.to_str())
        content["pre_tokenizer"] = None
        content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ["bytes", "bytes space", "pieces always", "pieces first", "pieces never", "unigram always", "legacy"]
_made: dict[str, PreTrainedTokenizerFast] = {}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param not in _made:
        _made[request.param] = _trained(request.param)
    return _made[request.param]


def _samples(folder: Path, tokenizer: Any, rows: list[Any], **config: Any) -> list[dict[str, list[int]]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(tuning_samples(TuneDataConfig(dataset=str(path), **config), tokenizer, seed=0, num_needed=None,
                               model_max_length=4096, data_dir=None).samples)  # fmt: skip


def _parts(sample: dict[str, list[int]], tokenizer: Any) -> list[tuple[bool, str]]:
    """Runs of tokens alike in being learnt, and their text."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != -100)
    return [(learnt, tokenizer.decode([token for token, _ in run])) for learnt, run in runs]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["Lily went.", "日本語", "  \n Lily", "x"])
def test_chat_has_the_tokens_of_the_whole_conversation(
    tmp_path: Path, tokenizer: Any, template: str, answer: str
) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    row = {"instruction": "Tell a story.", "input": "", "output": answer}
    (sample,) = _samples(tmp_path, tokenizer, [row], template="chat")
    talk = [{"role": "user", "content": "Tell a story."}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"]
    assert sample["input_ids"] == whole[: len(sample["input_ids"])]
    assert not tokenizer.decode(whole[len(sample["input_ids"]) :]).strip()
    before, after = _parts(sample, tokenizer)
    assert (before[0], after[0]) == (False, True)
    assert not before[1].strip().endswith(answer.strip())
    plain = tokenizer.decode(tokenizer(answer.strip(), add_special_tokens=False).input_ids).strip()
    assert after[1].replace(" ", "").strip() == (plain + ENDS[template]).replace(" ", "")


@pytest.mark.parametrize("template", ["alpaca", "alpaca_short", "vicuna"])
def test_templates_have_the_tokens_of_the_whole_text(tmp_path: Path, tokenizer: Any, template: str) -> None:
    (sample,) = _samples(tmp_path, tokenizer, [{"instruction": "Tell.", "output": "Lily went."}], template=template)
    prompts = {
        "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nTell.\n\n### Response:",
        "alpaca_short": "### Instruction:\nTell.\n\n### Response:\n",
        "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: Tell. ASSISTANT: ",
    }
    whole = tokenizer(prompts[template] + "Lily went.", add_special_tokens=False).input_ids
    assert sample["input_ids"] == [*whole, tokenizer.eos_token_id]
    before, after = _parts(sample, tokenizer)
    assert (before[0], after[0], after[1].strip()) == (False, True, "Lily went.</s>")


def test_no_space_is_put_between_prompt_and_answer() -> None:
    tokenizer = _trained("legacy")
    tokenizer.chat_template = TEMPLATES["llama2"]
    text = ChatTemplate(tokenizer, 2).render([Turn("user", "Tell."), Turn("assistant", "Lily", learnt=True)]).text
    assert text == "<s>[INST] Tell. [/INST] Lily </s>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    assert tokens[-4:] == ["▁[/INST]", "▁Lily", "▁", "</s>"]  # tokenised apart there is a "▁" before "▁Lily"


def test_a_token_that_spans_the_boundary_is_learnt(tmp_path: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(["</s>", *"ab: ", ":a"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "a")]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ':' }}{% endfor %}"
    (sample,) = _samples(tmp_path, tokenizer, [{"instruction": "b", "output": "ab"}], template="chat")
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"]) == ["b", ":a", "b", ":"]
    assert [label != -100 for label in sample["labels"]] == [False, True, True, True]


def test_only_the_assistants_turns_are_learnt(tmp_path: Path, tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "Tell a story."}, {"role": "assistant", "content": "Lily went."},
        {"role": "user", "content": "Once more: Lily went."}, {"role": "assistant", "content": "hello!"},
    ]  # fmt: skip
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        (sample,) = _samples(tmp_path, tokenizer, [{"messages": talk}], template="chat")
        whole = tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"]
        assert sample["input_ids"] == whole[: len(sample["input_ids"])]
        learnt = [text.replace(" ", "").strip() for is_learnt, text in _parts(sample, tokenizer) if is_learnt]
        assert learnt == [f"Lilywent.{ENDS[name]}", f"hello!{ENDS[name]}"]


@pytest.mark.parametrize("last", ["", " \n"])
def test_an_empty_answer_is_not_learnt(tmp_path: Path, last: str) -> None:
    tokenizer = _trained("bytes")
    talk = [
        {"role": "user", "content": "Tell a story."}, {"role": "assistant", "content": ""},
        {"role": "user", "content": "Tell."}, {"role": "assistant", "content": "Lily went."},
        {"role": "user", "content": "Once more."}, {"role": "assistant", "content": last},
    ]  # fmt: skip
    without_end = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    for name, template in {**TEMPLATES, "without end": without_end}.items():
        tokenizer.chat_template = template
        (sample,) = _samples(tmp_path, tokenizer, [{"messages": talk}], template="chat")
        learnt = [text.replace(" ", "").strip() for is_learnt, text in _parts(sample, tokenizer) if is_learnt]
        assert learnt == [f"Lilywent.{ENDS.get(name, '')}"], name


def test_no_token_of_the_next_turn_is_learnt(tmp_path: Path) -> None:
    """Phi-3 ends a conversation with one token more than a turn, and both begin alike: <|end|>, <|user|>."""
    tokenizer = _trained("bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>", "<|all|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|all|>' }}{% endif %}"
    )
    talk = [{"role": role, "content": text} for role, text in (
        ("user", "Tell."), ("assistant", "Lily went."), ("user", "More."), ("assistant", "hello!"))]  # fmt: skip
    (sample,) = _samples(tmp_path, tokenizer, [{"messages": talk}], template="chat")
    learnt = [text.strip() for is_learnt, text in _parts(sample, tokenizer) if is_learnt]
    assert learnt == ["Lily went.<|end|>", "hello!<|end|>\n<|all|>"]


def test_several_templates_by_name_are_none_of_ours() -> None:
    assert template_name({"default": TEMPLATES["chatml"], "tool_use": "x"}) is None


def _render(template: str, *turns: Turn) -> Any:
    tokenizer = _made.setdefault("bytes", _trained("bytes"))
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, 2).render(turns)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("assistant: {{ messages[-1]['content'] }}", "leaves the instruction out"),
        ("{{ messages[1]['content'] }} {{ messages[2]['content'] }}", "leaves the system prompt out"),
        ("{{ messages[0]['content'] }} {{ messages[1]['content'] }}", "leaves the answer out"),
        ("{{ messages[0]['content'] }} {{ messages[1]['content'] | upper }} {{ messages[2]['content'] }}",
         "leaves the instruction out"),
    ],
)  # fmt: skip
def test_a_template_that_loses_a_text_is_refused(template: str, message: str) -> None:
    turns = [Turn("system", "s"), Turn("user", "an"), Turn("assistant", "zz", learnt=True)]
    if "messages[2]" not in template and "-1" in template:
        turns = turns[1:]
    with pytest.raises(UsageError, match=message):
        _render(template, *turns)


def test_what_a_template_makes_of_an_answer_is_the_answer() -> None:
    """As Qwen 3 does: an answer without its reasoning gets an empty one."""
    template = (
        "{{ messages[0]['content'] }}|{% set a = messages[1]['content'] %}"
        "{{ a if '</think>' in a else '<think></think>' + a }}<|im_end|>"
    )
    plain = _render(template, Turn("user", "q"), Turn("assistant", "A", learnt=True))
    assert [plain.text[first:stop] for first, _, stop in plain.spans] == ["A<|im_end|>"]
    thought = _render(template, Turn("user", "q"), Turn("assistant", "<think>x</think>A", learnt=True))
    assert [thought.text[first:stop] for first, _, stop in thought.spans] == ["x</think>A<|im_end|>"]


def test_an_end_that_the_answer_brings_is_not_learnt_twice() -> None:
    found = _render(TEMPLATES["chatml"], Turn("user", "q"), Turn("assistant", "A<|im_end|>", learnt=True))
    assert found.text[found.spans[0][0] : found.spans[0][2]] == "A<|im_end|>"


# ---- as a checkpoint says them

ROWS = [
    {"instruction": "Tell a story.", "output": "Lily went."},
    {"instruction": " Tell {x} {{ y }} 'a' \"b\" \\n\n", "input": "日本語\n{% z %}", "output": " hello!\n"},
    {"instruction": "Tell.", "input": "", "output": "USER: x ASSISTANT:"},
]


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer like `tokenizer` that puts BOS before a text, as Llama's."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", ["alpaca", "alpaca_short", "vicuna"])
def test_the_saved_template_gives_what_training_saw(
    tmp_path: Path, tokenizer: Any, template: str, bos: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = with_bos(tokenizer) if bos else tokenizer
    tokenizer.chat_template = trained_template(template, tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    samples = _samples(tmp_path, tokenizer, ROWS, template=template, max_length=4096)
    for row, sample in zip(ROWS, samples, strict=True):
        question = {"role": "user", "content": row["instruction"], "input": row.get("input")}
        whole = loaded.apply_chat_template([question, {"role": "assistant", "content": row["output"]}])["input_ids"]
        assert whole == sample["input_ids"]
        asked = loaded.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
        text = loaded.apply_chat_template([question, {"role": "assistant", "content": "x"}], tokenize=False)
        assert text == f"{asked}{' ' if template == 'vicuna' else ''}x</s>"
    assert template_name(loaded.chat_template) == template
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("roles", [["system", "user"], ["user", "assistant", "user"], ["assistant"]])
def test_the_saved_template_refuses_what_was_not_trained(roles: list[str]) -> None:
    tokenizer = _made.setdefault("bytes", _trained("bytes"))
    talk = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(TemplateError, match="one question and its answer"):
        tokenizer.apply_chat_template(talk, chat_template=trained_template("alpaca", tokenizer), tokenize=False)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_ends_as_in_training(tmp_path: Path, template: str) -> None:
    tokenizer = _made.setdefault("bytes", _trained("bytes"))
    tokenizer.chat_template = TEMPLATES[template]
    (sample,) = _samples(tmp_path, tokenizer, ROWS[:1], template="chat")
    assert answer_ending("chat", tokenizer)[-1] == sample["labels"][-1]
    assert tokenizer.decode(answer_ending("chat", tokenizer)).strip() == ENDS[template]
    assert answer_ending("alpaca", tokenizer) == answer_ending(None, tokenizer) == [tokenizer.eos_token_id]
