"""Gradient initialisation against gradients taken the plain way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.models.blocks import prunable_weights
from lors_cli.tuning import initialization
from lors_cli.tuning.initialization import gradient_directions, top_right_singular_vectors


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: model.get_submodule(name) for name in prunable_weights(model)}  # type: ignore[misc]


def test_singular_vectors_of_a_small_matrix_are_those_of_the_full_svd() -> None:
    dW = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    found = top_right_singular_vectors(dW, 3)
    exact = torch.linalg.svd(dW).Vh[:3]
    torch.testing.assert_close((found @ exact.T).abs(), torch.eye(3), rtol=1e-4, atol=1e-4)


def test_randomised_svd_finds_the_leading_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(150, 150, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(200, 150, generator=generator)).Q
    dW = (U * torch.tensor([2.0**-k for k in range(150)])) @ V.T
    found = top_right_singular_vectors(dW, 8)
    torch.testing.assert_close(found @ found.T, torch.eye(8), rtol=1e-4, atol=1e-4)
    captured = (found @ V[:, :8]).square().sum() / 8
    assert captured > 0.999
    assert bool((found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all())


def test_same_seed_same_directions_and_the_global_generator_is_left_alone() -> None:
    dW = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = top_right_singular_vectors(dW, 8, seed=1), top_right_singular_vectors(dW, 8, seed=1)
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_rank_above_the_inputs_is_refused() -> None:
    with pytest.raises(UsageError, match="rank: 9"):
        top_right_singular_vectors(torch.randn(20, 8), 9)


def test_a_rank_above_the_outputs_is_completed_to_an_orthonormal_basis() -> None:
    found = top_right_singular_vectors(torch.randn(4, 20), 8)
    torch.testing.assert_close(found @ found.T, torch.eye(8), rtol=1e-5, atol=1e-5)


def _batches(num: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num):
        ids = torch.randint(0, 258, (2, 16), generator=generator)
        labels = ids.clone()
        labels[:, :5] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


@pytest.mark.parametrize("budget", [1, 8 << 10, 64 << 20])
def test_directions_come_from_the_summed_loss_gradient(
    sparse_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(initialization, "SMALLEST_BUDGET", budget)
    model, batches = sparse_llama(), _batches(3)
    linears = linears_of(model)
    directions = gradient_directions(model, linears, batches, 2, seed=0, exact=True)

    for linear in linears.values():
        linear.weight.requires_grad_()
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    model(**together).loss.backward()
    assert directions.keys() == linears.keys()
    for name, linear in linears.items():
        exact = torch.linalg.svd(linear.weight.grad).Vh[:2]
        torch.testing.assert_close((directions[name] @ exact.T).abs(), torch.eye(2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("exact", [False, True])
def test_weights_are_frozen_again_and_hold_no_gradient(
    exact: bool, sparse_llama: Callable[..., PreTrainedModel]
) -> None:
    model = sparse_llama()
    linears = linears_of(model)
    gradient_directions(model, linears, _batches(1), 2, seed=0, exact=exact)
    assert linears_of(model) == linears
    assert all(not linear.weight.requires_grad and linear.weight.grad is None for linear in linears.values())


def test_never_more_than_a_share_of_the_gradients_is_in_memory(
    sparse_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialization, "SMALLEST_BUDGET", 0)
    linears = linears_of(sparse_llama())
    total = sum(linear.weight.numel() for linear in linears.values())
    groups = list(initialization._layer_groups(linears))
    assert [name for group in groups for name in group] == list(reversed(linears))
    for group in groups:
        size: Any = sum(linear.weight.numel() for linear in group.values())
        assert size <= total / 8 or len(group) == 1
