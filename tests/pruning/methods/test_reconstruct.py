"""Reconstruction of weights on a grid; the rest of it is tested in tests/pruning/walk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.models.blocks import PrunableWeight, block_weights, decoder_blocks
from lors_cli.pruning.methods.reconstruct import Rounded, reconstruct
from lors_cli.pruning.walk.calibration import capture

Build = Callable[..., PreTrainedModel]
SPECS = [GridSpec(4, 32), GridSpec(4, 32, symmetric=False), GridSpec(8, 32)]


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_the_formula(spec: GridSpec) -> None:
    """scale · (clamp(round(w / scale) + zero) − zero) by autograd, rounding straight through, weight by weight."""
    torch.manual_seed(0)
    weight, columns = torch.randn(3, 72), range(72)
    grid = fit_grid(weight, weight.abs() > 0.5, spec)
    w, scales = weight.clone().requires_grad_(), grid.scales.clone().mul_(0.7).requires_grad_()
    upstream = torch.randn(3, 72)
    Rounded.apply(w, scales, grid).backward(upstream)

    w64, scales64 = (tensor.detach().double().requires_grad_() for tensor in (w, scales))
    total, num_cut = torch.zeros((), dtype=torch.float64), 0
    for row in range(3):
        for column in columns:
            scale = scales64[row, column // 32]
            zero = spec.middle if grid.zeros is None else float(grid.zeros[row, column // 32])
            ratio = w64[row, column] / scale
            code = ratio + (ratio.round() - ratio).detach() + zero
            num_cut += not 0 <= float(code) <= spec.num_codes - 1
            total = total + upstream[row, column].double() * scale * (code.clamp(0, spec.num_codes - 1) - zero)
    total.backward()
    assert num_cut
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scales.grad.double(), scales64.grad, rtol=1e-4, atol=1e-4)


def halved(
    build: Build, batches: list[torch.Tensor], architecture: str = "Llama", dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, PrunableWeight], Any, list[Any]]:
    """A block whose larger weights stay, its weights, how it is run, and on what towards what."""
    model = build(architecture).to(dtype).requires_grad_(False)
    blocks = list(decoder_blocks(model)[1])
    hidden, arguments = capture(model, blocks, batches)
    block = blocks[0]
    weights = block_weights(block, "b")
    run = arguments[0].run
    with torch.no_grad():
        inputs = [partial(tuple, (x, run(block, x, number), number)) for number, x in enumerate(hidden)]
    for weight in weights.values():
        smaller = weight.matrix.abs().view(len(weight.matrix), -1, 4).argsort(-1)[..., :2]
        weight.matrix.view(len(weight.matrix), -1, 4).scatter_(-1, smaller, 0.0)
    return block, weights, run, inputs


def to_grids(weights: dict[str, PrunableWeight], spec: GridSpec) -> dict[str, Grid]:
    """Round all weights to grids."""
    grids = {name: fit_grid(weight.matrix, weight.matrix != 0, spec) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.matrix.copy_(grids[name].rounded(weight.matrix))
    return grids


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "Mixtral"])
def test_weights_stay_on_grids_whose_scales_learn(
    architecture: str, spec: GridSpec, build: Build, batches: list[torch.Tensor]
) -> None:
    block, weights, run, inputs = halved(build, batches, architecture, torch.bfloat16)
    zeros = {name: weight.matrix == 0 for name, weight in weights.items()}
    grids = to_grids(weights, spec)
    before = dict(grids)
    first, last = reconstruct(block, [*weights.values()], run, inputs, epochs=4, seed=0, grids=grids)
    assert last < first
    assert grids.keys() == weights.keys()
    for name, weight in weights.items():
        assert grids[name].scales.dtype == weight.matrix.dtype == torch.bfloat16
        assert grids[name].rounded(weight.matrix).equal(weight.matrix), name
        assert not weight.matrix[zeros[name]].any()
    assert any(not grids[name].scales.equal(before[name].scales) for name in weights)


def loss(block: Any, run: Any, inputs: list[Any]) -> float:
    with torch.no_grad():
        pairs = [(run(block, x, number), due) for x, due, number in (given() for given in inputs)]
    return sum(float((got - due).square().sum() / due.square().sum()) for got, due in pairs) / len(pairs)


def test_rounding_inside_is_better_than_rounding_afterwards(build: Build, batches: list[torch.Tensor]) -> None:
    spec, losses = GridSpec(4, 32), []
    for inside in (True, False):
        block, weights, run, inputs = halved(build, batches)
        grids = to_grids(weights, spec) if inside else {}
        reconstruct(block, [*weights.values()], run, inputs, epochs=12, seed=0, grids=grids)
        if not inside:
            to_grids(weights, spec)
        losses.append(loss(block, run, inputs))
    assert losses[0] < losses[1]


def test_a_weight_without_a_grid_is_tuned_as_ever(build: Build, batches: list[torch.Tensor]) -> None:
    block, weights, run, inputs = halved(build, batches, "Mixtral")
    names = [name for name in weights if "experts.0" not in name]
    grids = to_grids({name: weights[name] for name in names}, GridSpec(4, 32))
    reconstruct(block, [*weights.values()], run, inputs, epochs=1, seed=0, grids=grids)
    assert sorted(grids) == sorted(names)
    for name, weight in weights.items():
        values = weight.matrix[0].unique()
        assert (len(values) <= 16 * -(-weight.shape[1] // 32)) == (name in names), name
