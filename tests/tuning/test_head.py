"""The chunked head against the plain one: loss and gradients, and models that it must be kept away from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from lors_cli.tuning import head
from lors_cli.tuning.head import causal_lm_loss, chunked_cross_entropy, model_loss, why_not_chunked


def _case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 7, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 50, (3, 7), generator=generator)
    labels[0, :5] = -100
    labels[2] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_and_gradient_equal_the_plain_ones(
    chunk_tokens: int, num_items: int | None, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * 50 * chunk_tokens})
    hidden, weight, labels = _case(torch.float64)
    bias = torch.randn(50, dtype=torch.float64) if has_bias else None
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    loss = chunked_cross_entropy(ours, weight, bias, labels, num_items)
    (3 * loss).backward()
    plain = F.cross_entropy(F.linear(theirs, weight, bias).view(-1, 50), labels.view(-1), reduction="sum")
    plain = plain / (num_items or int((labels != -100).sum()))
    (3 * plain).backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_plain_one() -> None:
    hidden, weight, labels = _case(torch.bfloat16)
    chosen = labels.view(-1) != -100

    def plain(dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        logits = F.linear(leaf, weight.to(dtype)).to(max(dtype, torch.float32, key=lambda kind: kind.itemsize))
        loss = F.cross_entropy(logits.view(-1, 50), labels.view(-1))
        loss.backward()
        return float(loss), leaf.grad.double().view(-1, 16)[chosen]

    leaf = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(leaf, weight, None, labels)
    loss.backward()
    truth, usual = plain(torch.float64), plain(torch.bfloat16)
    assert abs(float(loss) - truth[0]) <= abs(usual[0] - truth[0]) + 1e-4
    error = (leaf.grad.double().view(-1, 16)[chosen] - truth[1]).norm()
    assert error <= 1.05 * (usual[1] - truth[1]).norm()


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * 50 * 2})
    sizes: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: sizes.append(args[0].shape[0]) or linear(*args))
    hidden, weight, labels = _case(torch.float32)
    chunked_cross_entropy(hidden.requires_grad_(), weight, None, labels).backward()
    assert sizes == [2, 2, 2, 2, 1]  # nine labels in chunks of two tokens; tokens without one are left out


def test_the_loss_of_a_model_equals_its_own(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    model = sparse_llama()
    ids = torch.randint(0, 256, (3, 12))
    labels = ids.masked_fill(torch.rand(3, 12) < 0.3, -100)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    assert why_not_chunked(model, inputs) == ""
    for num_items in (None, torch.tensor(50)):
        own = model(**inputs, num_items_in_batch=num_items).loss
        torch.testing.assert_close(causal_lm_loss(model, inputs, num_items), own)


def test_soft_capped_logits_are_found_by_trying() -> None:
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    ids = torch.randint(0, 64, (2, 12))
    assert "more in it" in why_not_chunked(model, {"input_ids": ids, "labels": ids})


def test_a_trained_or_unusual_head_is_left_alone(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    model = sparse_llama()
    ids = torch.randint(0, 256, (1, 12))
    model.get_output_embeddings().weight.requires_grad_(True)
    assert why_not_chunked(model, {"input_ids": ids, "labels": ids}) == "its head is trained"
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 258)))
    assert "no plain linear" in why_not_chunked(model, {"input_ids": ids, "labels": ids})


def test_the_models_own_loss_is_a_share_of_its_step_with_or_without_a_say(
    sparse_llama: Callable[..., PreTrainedModel],
) -> None:
    model = sparse_llama()
    ids = torch.arange(24).view(2, 12)
    labels = ids.clone()
    labels[1, :7] = -100
    plain = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 40
    for takes_number in (True, False):  # of the labels in the step
        model.accepts_loss_kwargs = takes_number
        found = model_loss(model, {"input_ids": ids, "labels": labels}, torch.tensor(40.0))
        torch.testing.assert_close(found, plain)
        # a process whose samples are all blanks has no label, and still takes part in backward
        model.requires_grad_(True)
        nothing = model_loss(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)}, torch.tensor(40.0))
        nothing.backward()
        assert float(nothing.detach()) == 0.0
        assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)
        model.zero_grad()
