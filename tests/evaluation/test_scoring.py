"""Rows with branches against a loop over single sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_scores import assert_same

from lors_cli.evaluation import scoring
from lors_cli.evaluation.prefix_tree import Choice
from lors_cli.evaluation.scoring import score_choices

VOCABULARY = 300
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {key: COMMON[key] for key in ("vocab_size", "hidden_size", "initializer_range")}
Questions = Callable[..., list[Choice]]
OTHERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 24},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8},
    "Phi3": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3},
    "GPTNeoX": {},
    "GPT2": {"n_layer": 3, "n_head": 4, "n_positions": 256},
    "GPTNeo": {"num_heads": 4, "attention_types": [[["global", "local", "local"], 1]], "window_size": 24},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    "Granite": {"logits_scaling": 4.0},
    "Bloom": {"n_layer": 3, "n_head": 4},
    "Mpt": {"n_layers": 3, "n_heads": 4},
    "RecurrentGemma": {"attention_window_size": 24, "lru_width": 32, "num_key_value_heads": None},
}
NO_BRANCHES = {"GPTNeo", "Bloom", "Mpt", "RecurrentGemma"}
NO_HEAD = {"Gemma2", "Granite", "RecurrentGemma"}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    settings = SMALL if name in ("Bloom", "Mpt") else COMMON
    config = getattr(transformers, f"{name}Config")(**{**settings, **OTHERS[name]})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


@torch.no_grad()
def alone(model: Any, choices: list[Choice]) -> list[tuple[float, bool]]:
    """Each choice by itself, in float64."""
    results = []
    for choice in choices:
        logits = model(torch.tensor([choice.tokens])).logits[0, -len(choice.targets) :]
        wanted = torch.tensor(choice.targets)
        picked = logits.double().log_softmax(-1).gather(1, wanted[:, None])
        results.append((float(picked.sum()), bool((logits.argmax(-1) == wanted).all())))
    return results


@pytest.mark.parametrize("name", OTHERS)
def test_equals_single_sequences(name: str, told: list[str], questions: Questions) -> None:
    model, choices = tiny(name), questions()
    assert_same(score_choices(model, choices, batch_size=4), alone(model, choices))
    assert any("do not share their context" in line for line in told) == (name in NO_BRANCHES)
    assert any("all logits are computed" in line for line in told) == (name in NO_HEAD)
    told.clear()
    score_choices(model, choices[:4], batch_size=4)
    assert told == []  # a model is tried once


def test_a_switch_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """True was taken for a window of one place, with which no two choices share their context."""
    monkeypatch.setitem(OTHERS, "Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0})
    assert scoring._window(tiny("Qwen2")) == 24


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "GPT2", "RecurrentGemma"])
def test_trial_in_bfloat16_tells_rounding_from_error(name: str, told: list[str], questions: Questions) -> None:
    model, choices = tiny(name, torch.bfloat16), questions()
    score_choices(model, choices, batch_size=4)
    assert any("do not share" in line for line in told) == (name in NO_BRANCHES)


def test_a_model_that_ignores_the_mask_gets_plain_rows(
    told: list[str], monkeypatch: pytest.MonkeyPatch, questions: Questions
) -> None:
    model, choices = tiny("Llama"), questions()
    expected, forward = alone(model, choices), model.model.forward

    def deaf(*arguments: Any, attention_mask: Any = None, **options: Any) -> Any:
        return forward(*arguments, **options)

    monkeypatch.setattr(model.model, "forward", deaf)
    assert_same(score_choices(model, choices, batch_size=4), expected)
    assert any("gives other logits" in line for line in told)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_any_batch_size(batch_size: int, questions: Questions) -> None:
    model, choices, steps = tiny("Llama"), questions(), []
    found = score_choices(model, choices, batch_size=batch_size, on_progress=steps.append)
    assert_same(found, alone(model, choices))
    assert sum(steps) == len(choices)
    assert score_choices(model, [], batch_size=batch_size) == []


def test_small_chunks_of_logits(monkeypatch: pytest.MonkeyPatch, questions: Questions) -> None:
    monkeypatch.setitem(scoring.CHUNK_LOGITS, "cpu", 5 * VOCABULARY)
    for name in ("Llama", "Granite"):
        model, choices = tiny(name), questions()
        assert_same(score_choices(model, choices, batch_size=8), alone(model, choices))


def test_context_is_computed_once_and_the_head_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama")
    context, endings = list(range(10, 40)), [[50, 51, 52], [60, 61], [50, 51, 53, 54], [70], [71], [50, 51, 52]]
    choices = [Choice([*context, *ending][:-1], ending, 0) for ending in endings]
    score_choices(model, choices[:1], batch_size=1)  # the trial
    tokens, heads = [], []
    model.model.register_forward_pre_hook(lambda _, __, options: tokens.append(options["input_ids"]), with_kwargs=True)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].shape))
    assert_same(score_choices(model, choices, batch_size=4), alone(model, choices))
    # 30 of context; 50, 51, 53 and 60 are read once each; 52, 54, 61, 70, 71 are only predicted
    assert tokens[0].tolist() == [[*context, 50, 51, 53, 60]]
    assert heads[0] == (5, 32)  # after the context, 50, 51, 53 and 60
