"""The gradient's sketches against the gradient itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.models.blocks import prunable_weights
from lors_cli.tuning.head import causal_lm_loss, model_loss
from lors_cli.tuning.initialization import gradient_directions
from lors_cli.tuning.sketch import GradientSketch, SketchedLinear

CPU = torch.device("cpu")


def _tokens(rank: int, noise: float, rows: int = 60, columns: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """dY (tokens, R) and X (tokens, C) whose dYᵀX has a given rank, and a tail on top."""
    generator = torch.Generator().manual_seed(0)
    U, V = torch.randn(rank, rows, generator=generator), torch.randn(rank, columns, generator=generator)
    tail = torch.randn(300, rows, generator=generator), torch.randn(300, columns, generator=generator)
    return torch.cat([U, noise * tail[0]]), torch.cat([V, noise * tail[1]])


def test_sketches_are_those_of_the_summed_gradient_however_the_tokens_come() -> None:
    dY, X = _tokens(3, 0.1)
    sketch = GradientSketch(60, 90, 4, seed=1, device=CPU)
    for part in torch.arange(len(X)).split(7):
        sketch.add(dY[part], X[part])
    dW = dY.T @ X
    torch.testing.assert_close(sketch.S, dW @ sketch.omega, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sketch.T, sketch.psi @ dW, rtol=1e-4, atol=1e-3)


def test_a_matrix_of_low_rank_is_found_exactly() -> None:
    dY, X = _tokens(4, 0.0)
    sketch = GradientSketch(60, 90, 4, seed=1, device=CPU)
    sketch.add(dY, X)
    found, exact = sketch.right_singular_vectors(4), torch.linalg.svd(dY.T @ X).Vh[:4]
    torch.testing.assert_close((found @ exact.T).abs(), torch.eye(4), rtol=1e-3, atol=1e-3)


def test_with_a_tail_it_captures_nearly_what_the_exact_vectors_do() -> None:
    dY, X = _tokens(8, 0.15)
    dW = dY.T @ X
    sketch = GradientSketch(60, 90, 8, seed=1, device=CPU)
    sketch.add(dY, X)
    found, exact = sketch.right_singular_vectors(8), torch.linalg.svd(dW).Vh[:8]
    share = [float((dW @ vectors.T).norm() ** 2 / (dW @ exact.T).norm() ** 2) for vectors in (found, exact)]
    assert 0.97 < share[0] <= share[1] == 1


@pytest.mark.parametrize(("rows", "columns", "rank"), [(4, 30, 8), (30, 4, 4), (1, 5, 3)])
def test_a_rank_above_what_there_is_gives_an_orthonormal_basis_all_the_same(rows: int, columns: int, rank: int) -> None:
    sketch = GradientSketch(rows, columns, rank, seed=0, device=CPU)
    sketch.add(torch.randn(50, rows), torch.randn(50, columns))
    found = sketch.right_singular_vectors(rank)
    torch.testing.assert_close(found @ found.T, torch.eye(rank), rtol=1e-4, atol=1e-4)


def test_the_layer_computes_what_the_linear_does_and_passes_the_gradient_on() -> None:
    linear = nn.Linear(90, 60).requires_grad_(False)
    sketch = GradientSketch(60, 90, 4, seed=0, device=CPU)
    x = torch.randn(2, 7, 90, requires_grad=True)
    y = SketchedLinear(linear, sketch)(x)
    assert torch.equal(y, linear(x))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ linear.weight)
    dW = upstream.reshape(-1, 60).T @ x.detach().reshape(-1, 90)
    torch.testing.assert_close(sketch.S, dW @ sketch.omega, rtol=1e-4, atol=1e-3)


def _batches(num: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 258, (num, 2, 16), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk_head", [False, True])
def test_directions_of_a_model_agree_with_the_exact_ones(
    checkpointing: bool, chunk_head: bool, sparse_llama: Callable[..., PreTrainedModel]
) -> None:
    model, batches = sparse_llama(), _batches(3)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in prunable_weights(model)}
    options = {"seed": 0, "loss": causal_lm_loss if chunk_head else model_loss}
    sketched = gradient_directions(model, linears, batches, 4, **options)
    exact = gradient_directions(model, linears, batches, 4, exact=True, **options)
    assert all(model.get_submodule(name) is linear for name, linear in linears.items())
    overlaps = [float((sketched[name] @ exact[name].T).square().sum() / 4) for name in linears]
    assert sketched.keys() == linears.keys()
    assert sum(overlaps) / len(overlaps) > 0.8
    again = gradient_directions(model, linears, batches, 4, **options)
    assert all(torch.equal(again[name], sketched[name]) for name in linears)


def test_recomputing_blocks_draws_no_dropout() -> None:
    """OPT's blocks call dropout themselves, by their own training mode and rate."""
    torch.manual_seed(0)
    shape = OPTConfig(vocab_size=258, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=64, dropout=0.5)  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in prunable_weights(model)}
    plain = gradient_directions(model, linears, _batches(2), 4, seed=0)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with patch.object(torch.utils.checkpoint, "checkpoint", wraps=torch.utils.checkpoint.checkpoint) as recomputed:
        model._set_gradient_checkpointing(gradient_checkpointing_func=partial(recomputed, use_reentrant=False))
        again = gradient_directions(model, linears, _batches(2), 4, seed=0)
    assert recomputed.call_count == 2 * 2  # blocks and batches
    assert all(torch.equal(again[name], plain[name]) for name in linears)
    assert model.model.decoder.layers[0].dropout == 0.5
    assert not any(module.training for module in model.modules())


def test_a_rank_above_the_inputs_is_refused_by_name(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    model = sparse_llama()
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in prunable_weights(model)}
    with pytest.raises(UsageError, match=r"rank: 40 is above the 32 inputs of model\.layers\.0"):
        gradient_directions(model, linears, _batches(1), 40, seed=0)
