"""Text from a model, held against a loop that takes the likeliest token of the logits, without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.data.asked import PromptFormat, question
from lors_cli.errors import UsageError
from lors_cli.models import loading
from lors_cli.models.generation import Sampling, generate_text
from lors_cli.recipe.schema import ModelConfig

PLAIN = PromptFormat("plain", "for the test")
ROW = question("Once upon a time")


@pytest.fixture(scope="module")
def stories(shared_dir: Path) -> tuple[Any, Any]:
    config = ModelConfig(path=str(shared_dir / "data" / "models" / "stories260k"), device="cpu")
    return loading.load_model(config), loading.load_tokenizer(config)


def naive(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens, one by one."""
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_greedy_text_is_that_of_the_likeliest_tokens(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    said = generate_text(model, tokenizer, PLAIN, ROW, Sampling(20))
    expected = naive(model, tokenizer(ROW["instruction"]).input_ids, 20)
    assert said.text == tokenizer.decode(expected)
    assert (said.tokens, said.finish_reason, said.prompt) == (20, "length", "Once upon a time")
    assert said.tokens_per_s > 0


def test_pieces_make_up_the_text(stories: tuple[Any, Any]) -> None:
    pieces: list[str] = []
    said = generate_text(*stories, PLAIN, ROW, Sampling(25), pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces).strip() == said.text.strip()


def test_answer_ends_at_each_of_the_generation_settings_end_tokens(
    stories: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = stories
    tokens = naive(model, tokenizer(ROW["instruction"]).input_ids, 8)
    end = tokens[5]
    assert end not in tokens[:5]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [511, end])
    said = generate_text(model, tokenizer, PLAIN, ROW, Sampling(50))
    assert (said.tokens, said.finish_reason) == (6, "stop")


def test_the_model_s_own_sampling_settings_are_put_aside_and_come_back(
    stories: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = stories
    usual = generate_text(model, tokenizer, PLAIN, ROW, Sampling(20)).text
    own = model.generation_config
    for key, value in (("repetition_penalty", 9.0), ("do_sample", True), ("temperature", 3.0), ("max_length", 7)):
        monkeypatch.setattr(own, key, value)
    assert generate_text(model, tokenizer, PLAIN, ROW, Sampling(20)).text == usual
    assert model.generation_config is own


def test_draws_follow_the_seed_and_leave_the_global_generator_alone(stories: tuple[Any, Any]) -> None:
    state = torch.random.get_rng_state()
    texts = [generate_text(*stories, PLAIN, ROW, Sampling(20, 1.2, 1.0, seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_from_the_likeliest_alone_are_greedy(stories: tuple[Any, Any]) -> None:
    greedy = generate_text(*stories, PLAIN, ROW, Sampling(15)).text
    assert generate_text(*stories, PLAIN, ROW, Sampling(15, 1.0, 1e-6, 4)).text == greedy
    assert generate_text(*stories, PLAIN, ROW, Sampling(15, 1e-4, 1.0, 4)).text == greedy


def test_text_ends_at_the_model_s_limit_and_a_longer_prompt_is_refused(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    long = question("a " * 600)
    with pytest.raises(UsageError, match=r"The prompt has \d+ tokens, and the model takes 512"):
        generate_text(model, tokenizer, PLAIN, long, Sampling(5))
    words = "the " * 700
    while len(tokenizer(words).input_ids) > 509:
        words = words[:-4]
    said = generate_text(model, tokenizer, PLAIN, question(words), Sampling(50))
    assert said.tokens == 512 - len(tokenizer(words).input_ids)
    assert said.finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p 1.5"),
        ({"top_p": 0.5}, "give a temperature too"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)
