"""Exact gradients by row tiles: those of SQFT and HiRA in plain autograd, with nothing of the weight's size made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import killed_at
from on_grids import linear_on_a_grid
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.attach import adapter_layers, attach
from lors_cli.tuning.baselines import LAYERS
from lors_cli.tuning.kernels.exact_gradients import ROWS_ON_CPU
from lors_cli.tuning.kernels.scratch import scratch_memory
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.lors import LorsLinear, PackedLorsLinear, choose_gradients
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training.trainer import AdapterTrainer

ROWS, COLUMNS, RANK = 2 * ROWS_ON_CPU + 88, 48, 4
PAIRS = [("lors", "sqft"), ("hira-gc", "hira")]
"""A layer whose gradients come by tiles, and the one whose autograd they have to be."""


def sparse_linear(dtype: torch.dtype, columns: int = COLUMNS) -> nn.Linear:
    """Of three tiles, the last one short; some groups of four keep fewer than two."""
    torch.manual_seed(2)
    linear = nn.Linear(columns, ROWS).to(dtype)
    with torch.no_grad():
        groups = linear.weight.view(ROWS, -1, 4)
        groups.scatter_(2, torch.rand(groups.shape).argsort(-1)[..., :2], 0.0)
        linear.weight[torch.rand(linear.weight.shape) < 0.1] = 0
    return linear


def layer_of(method: str | type[AdapterLinear], linear: nn.Linear, **options: Any) -> Any:
    """With exact gradients, lora_B no longer zero."""
    made = LAYERS[method] if isinstance(method, str) else method
    torch.manual_seed(3)
    layer: Any = made(linear, RANK, 3.0, **options)
    nn.init.normal_(layer.lora_B, std=0.3)
    if isinstance(layer, LorsLinear):
        layer.exact = True
    return layer


def gradients(layer: Any, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Y and the gradients of X and of both adapters."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    assert x.grad is not None
    return [y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad]


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(3, 5, COLUMNS, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(3, 5, ROWS, generator=generator, dtype=torch.float64).to(dtype))  # fmt: skip


@pytest.mark.parametrize(("method", "reference"), PAIRS)
def test_they_are_those_of_plain_autograd(method: str, reference: str) -> None:
    linear, given = sparse_linear(torch.float64), case(torch.float64)
    found, expected = (gradients(layer_of(name, linear), *given) for name in (method, reference))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    approximate = layer_of("lors", linear)
    approximate.exact = False
    assert not torch.allclose(gradients(approximate, *given)[3], expected[3], rtol=0.1)


@pytest.mark.parametrize(("method", "reference"), PAIRS)
def test_in_bfloat16_they_are_as_near_to_float64_as_autograds(method: str, reference: str) -> None:
    linear = sparse_linear(torch.bfloat16)
    exact = deepcopy(layer_of(reference, linear)).double()
    given = case(torch.bfloat16)
    ours, theirs = (gradients(layer_of(name, linear), *given) for name in (method, reference))
    truth = gradients(exact, *(part.double() for part in given))
    for place in (2, 3):
        assert ours[place].dtype == torch.float32
        errors = [float((found[place] - truth[place]).norm() / truth[place].norm()) for found in (ours, theirs)]
        assert errors[0] < max(1.5 * errors[1], 0.01)


def packable() -> Iterator[tuple[nn.Linear, dict[str, Any]]]:
    """2:4 with explicit zeros, unstructured, and codes of 4 bits."""
    yield sparse_linear(torch.bfloat16), {}
    linear = sparse_linear(torch.float32)
    linear.weight.data[:, :3] = torch.tensor([1.0, 0.0, 2.0])
    linear.weight.data[1, :8] = 3.0
    yield linear, {}
    torch.manual_seed(4)
    linear, grid = linear_on_a_grid(ROWS, COLUMNS, torch.bfloat16)
    yield linear, {"grid": grid}


@pytest.mark.parametrize("kernels", [True, False])
def test_a_packed_base_gives_the_same_bits(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr("lors_cli.models.packed.kernels.ops.available", lambda *_: "of the test")
    for linear, options in packable():
        given = case(linear.weight.dtype)
        plain, packed = (gradients(layer_of(made, linear, **options), *given)
                         for made in (LorsLinear, PackedLorsLinear))  # fmt: skip
        for ours, theirs in zip(packed, plain, strict=True):
            assert torch.equal(ours, theirs)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made anew, in numbers, but for those known."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, leaf.numel())
        return result


@contextmanager
def saved_bytes(layer: nn.Module) -> Iterator[list[int]]:
    """What is kept for backward beside what the layer holds."""
    held = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    found: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in held:
            found.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("made", ["lors", "hira-gc", PackedLorsLinear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_x_alone_is_kept_and_backward_makes_nothing_of_the_weights_size(
    made: str | type[AdapterLinear], dtype: torch.dtype
) -> None:
    layer = layer_of(made, sparse_linear(dtype))
    layer.rounding = "stochastic"
    x, upstream = (part.requires_grad_() for part in case(dtype))
    with saved_bytes(layer) as saved:
        y = layer(x)
    assert sum(saved) == x.nbytes
    with Largest(scratch_memory()) as seen:
        y.backward(upstream.detach())
    assert seen.numbers == ROWS_ON_CPU * COLUMNS
    with Largest(scratch_memory()) as seen:  # which would see SQFT's
        layer_of("sqft", sparse_linear(dtype))(x).backward(upstream.detach())
    assert seen.numbers == ROWS * COLUMNS


@pytest.mark.parametrize(("method", "reference"), PAIRS)
def test_under_autocast_products_are_in_its_dtype_and_gradients_in_the_parameters_own(
    method: str, reference: str
) -> None:
    linear = sparse_linear(torch.float32)
    linear.weight.data[linear.weight != 0] *= 1e-3
    x, upstream = case(torch.float32)
    layer = layer_of(method, linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(layer, x, upstream.bfloat16())
    expected = gradients(layer_of(reference, linear), x, upstream)
    assert [part.dtype for part in found] == [torch.bfloat16, *[torch.float32] * 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("method", ["lors", "hira-gc"])
def test_it_compiles_without_graph_breaks(method: str) -> None:
    layer, given = layer_of(method, sparse_linear(torch.float32)), case(torch.float32)
    expected = gradients(layer, *given)
    layer.compile(backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(layer, *given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_hira_merges_to_the_same_bits_however_it_is_computed() -> None:
    x, _ = case(torch.bfloat16)
    linear = sparse_linear(torch.bfloat16)
    found = [layer_of(method, linear) for method in ("hira", "hira-gc")]
    assert torch.equal(found[0](x), found[1](x))
    assert torch.equal(found[0].merged_weight(), found[1].merged_weight())


def test_rotating_gradients_are_exact_once_in_four_steps_in_every_layer(
    sparse_llama: Callable[..., PreTrainedModel],
) -> None:
    model = sparse_llama()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    layers = attach(model, names, 2, 2.0, use_rslora=True)

    def exact(step: int, gradient: Any = "rotating") -> set[str]:
        choose_gradients(model, gradient, step)
        return {name for name, layer in adapter_layers(model).items() if layer.exact}  # type: ignore[attr-defined]

    turns = [exact(step) for step in range(4)]
    assert sorted(name for turn in turns for name in turn) == sorted(layers)
    assert {len(turn) for turn in turns} == {3, 4}  # of 14
    assert exact(9) == exact(5) == turns[1]
    assert exact(9, "exact") == set(layers)
    assert exact(9, "approximate") == set()


# ---- the stage


def weights(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes() + (folder / "model.safetensors").read_bytes()


def test_the_trainer_turns_the_quarter_with_its_step(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[int]] = {}
    original = AdapterTrainer.micro_batch

    def noted(self: AdapterTrainer, *args: Any) -> torch.Tensor:
        layers = adapter_layers(self.model).values()
        seen[self.step] = [place for place, layer in enumerate(layers) if layer.exact]  # type: ignore[attr-defined]
        return original(self, *args)

    monkeypatch.setattr(AdapterTrainer, "micro_batch", noted)
    config = replace(config, gradient="rotating", init="kaiming", max_steps=6)
    tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path)
    assert seen == {step: list(range(step % 4, 14, 4)) for step in range(6)}


@pytest.mark.long
def test_each_choice_has_its_own_result_whatever_the_weights_are_held_in(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    model, found = ModelConfig(path=str(sparse_checkpoint)), {}
    for gradient in ("approximate", "exact", "rotating"):
        chosen = replace(config, gradient=gradient, max_steps=3)  # type: ignore[arg-type]
        record = tune(chosen, model, tmp_path / gradient)
        assert record.metrics["violations"] == 0
        found[gradient] = weights(tmp_path / gradient)
    assert len(set(found.values())) == 3
    for number, changes in enumerate(({"base": "packed", "merged_cache": "off"}, {"gradient_checkpointing": True})):
        tune(replace(config, gradient="exact", max_steps=3, **changes), model, tmp_path / str(number))  # type: ignore[arg-type]
        assert weights(tmp_path / str(number)) == found["exact"]


@pytest.mark.long
def test_a_killed_run_with_rotating_gradients_ends_in_the_same_bits(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, gradient="rotating", init="kaiming", max_steps=6, save_steps=2)
    model = ModelConfig(path=str(sparse_checkpoint))
    tune(config, model, tmp_path / "whole")
    for step in (2, 5):  # after a checkpoint, and between two
        killed_at(step, config, model, tmp_path / str(step), monkeypatch)
        tune(config, model, tmp_path / str(step))
        assert weights(tmp_path / str(step)) == weights(tmp_path / "whole")


@pytest.mark.parametrize("gradient", ["exact", "rotating"])
def test_methods_whose_gradients_are_exact_refuse_it(config: TuneConfig, gradient: Any) -> None:
    for method in set(LAYERS) - {"lors"}:
        with pytest.raises(
            ValueError, match=f"gradient: {gradient} is for method: lors, and the gradients of {method}"
        ):
            replace(config, method=method, init="kaiming", gradient=gradient)  # type: ignore[arg-type]
