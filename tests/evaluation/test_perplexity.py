"""Token perplexity against a naive loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lors_cli.evaluation import perplexity
from lors_cli.evaluation.perplexity import summed_nll, token_perplexity


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _windows(count: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(1))


def _naive_nll(model: Any, windows: torch.Tensor) -> float:
    """One prefix at a time, float64 throughout: the definition, spelled out."""
    wide = type(model)(model.config).double().eval()
    wide.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    losses = []
    with torch.no_grad():
        for window in windows:
            for position in range(1, len(window)):
                logits = wide(window[None, :position]).logits[0, -1]
                probability = torch.exp(logits) / torch.exp(logits).sum()
                losses.append(-math.log(float(probability[window[position]])))
    return sum(losses) / len(losses)


def test_equals_naive_float64_loop(tiny_model: Any) -> None:
    windows = _windows()
    expected = _naive_nll(tiny_model, windows)
    found = token_perplexity(tiny_model, windows, batch_size=2)
    assert found["tokens"] == 5 * 11
    assert found["sequence_length"] == 12
    assert found["nll"] == pytest.approx(expected, rel=1e-5)
    assert found["value"] == pytest.approx(math.exp(expected), rel=1e-5)
    alone = [_naive_nll(tiny_model, window[None]) for window in windows]
    assert found["window_nll"] == pytest.approx(alone, rel=1e-5)


def test_batches_and_chunks_do_not_change_the_result(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = _windows()
    whole = token_perplexity(tiny_model, windows, batch_size=5)
    sizes: list[int] = []
    inner = torch.nn.functional.cross_entropy

    def recorded(logits: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        sizes.append(logits.numel())
        assert logits.dtype == torch.float32
        return inner(logits, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    monkeypatch.setattr(perplexity, "MAX_CHUNK_LOGITS", 3 * 50)
    monkeypatch.setattr(perplexity, "MAX_BATCH_LOGITS", 2 * 12 * 50)
    done: list[int] = []
    found = token_perplexity(tiny_model, windows, batch_size=5, on_progress=done.append)
    assert max(sizes) == 3 * 50
    assert done == [2, 2, 1]
    assert found["nll"] == pytest.approx(whole["nll"], rel=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(2, 300, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(0, 40, (2, 300), generator=torch.Generator().manual_seed(1))
    log_probabilities = torch.log_softmax(logits.double(), dim=-1)
    expected = (-log_probabilities.gather(-1, targets[..., None])).sum((1, 2)).tolist()
    assert summed_nll(logits, targets) == pytest.approx(expected, rel=1e-6)


def test_broken_model_gives_nan_not_a_crash(tiny_model: Any) -> None:
    import copy

    broken = copy.deepcopy(tiny_model)
    broken.lm_head.weight.data.fill_(float("nan"))
    assert math.isnan(token_perplexity(broken, _windows(), batch_size=2)["value"])
    huge = copy.deepcopy(tiny_model)
    huge.lm_head.weight.data.mul_(1e6)
    assert math.isinf(token_perplexity(huge, _windows(), batch_size=2)["value"])
