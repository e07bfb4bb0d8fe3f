"""The baselines against their formulas in plain autograd, what they keep for backward, and the stage with each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.files import atomic
from lors_cli.models.blocks import prunable_weights
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.adapter import AdapterConfig, load_adapter, peft_type, save_adapter
from lors_cli.tuning.attach import adapter_layers, attach, base_mask
from lors_cli.tuning.baselines import LAYERS, check_rank
from lors_cli.tuning.stage import tune

ROWS, COLUMNS, RANK, ALPHA = 24, 16, 4, 6.0
SCALE = ALPHA / RANK**0.5
BASELINES = [method for method in LAYERS if method != "lors"]


def _linear(dtype: torch.dtype = torch.float64, rows: int = ROWS, columns: int = COLUMNS) -> nn.Linear:
    torch.manual_seed(5)
    linear = nn.Linear(columns, rows).to(dtype)
    linear.weight.data[:, ::2] = 0
    return linear


def _layer(method: str, linear: nn.Linear) -> nn.Module:
    layer = LAYERS[method](linear, RANK, ALPHA)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def _formula(method: str, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, A: torch.Tensor, B: torch.Tensor):
    """Y as its paper writes it, element by element where that is clearer."""
    if method.startswith("sqft"):
        update = torch.where(W == 0, torch.zeros_like(W), B @ A)
    elif method.startswith("spp"):
        rows = [W[i] * A[i // (W.shape[0] // A.shape[0])] * B[i, 0] for i in range(W.shape[0])]
        update = torch.stack(rows)
    elif method.startswith("hira"):
        update = W * (B @ A)
    else:
        update = B @ A
    return x @ (W + SCALE * update).T + bias


@pytest.mark.parametrize("method", BASELINES)
def test_outputs_and_gradients_are_those_of_the_formula(method: str) -> None:
    linear = _linear()
    layer = _layer(method, linear)
    x = torch.randn(3, 5, COLUMNS, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, ROWS, dtype=torch.float64)
    y = layer(x)
    y.backward(upstream)

    x2, A, B = (part.detach().clone().requires_grad_() for part in (x, layer.lora_A, layer.lora_B))
    expected = _formula(method, x2, linear.weight.detach(), linear.bias.detach(), A, B)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in ((x.grad, x2.grad), (layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert linear.weight.grad is None


@pytest.mark.parametrize("method", list(LAYERS))
def test_a_new_layer_computes_what_the_linear_did_and_merges_to_what_it_computes(method: str) -> None:
    linear = _linear(torch.float32)
    x = torch.randn(7, COLUMNS)
    before = linear(x)
    torch.testing.assert_close(LAYERS[method](linear, RANK, ALPHA)(x), before, rtol=0, atol=0)
    layer = _layer(method, linear)
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=1e-5, atol=1e-5)
    kept = bool((layer.merged_weight()[linear.weight == 0] == 0).all())
    assert kept == layer.keeps_zeros == (method != "lora")


@pytest.mark.parametrize("method", list(LAYERS))
def test_adapters_are_float32_around_a_bfloat16_weight(method: str) -> None:
    layer = _layer(method, _linear(torch.bfloat16))
    layer(torch.randn(3, COLUMNS, dtype=torch.bfloat16)).float().sum().backward()
    for part in (layer.lora_A, layer.lora_B):
        assert part.dtype == torch.float32
        assert part.grad is not None
        assert part.grad.dtype == torch.float32


def _saved_matrices(method: str) -> int:
    """Bytes kept for backward beyond X and the parameters, that are as large as the weight or its mask."""
    linear = _linear(torch.float32, rows=64, columns=32)
    layer = _layer(method, linear)
    x = torch.randn(5, 32, requires_grad=True)
    known = {parameter.data_ptr() for parameter in layer.parameters()} | {x.data_ptr()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known and tensor.numel() == linear.weight.numel():
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sum(saved.values())


def test_what_each_method_keeps_for_backward() -> None:
    """The paper's point: SQFT keeps a mask and a merged weight, SPP two products, the others nothing of W's size."""
    elements = 64 * 32
    assert {method: _saved_matrices(method) / elements for method in LAYERS} == {
        "lors": 0, "lora": 0, "sqft": 5, "sqft-gc": 0, "spp": 8, "spp-gc": 0, "hira": 4, "hira-gc": 0,
    }  # fmt: skip


def test_a_rank_that_spp_cannot_take_is_refused_with_those_it_can() -> None:
    with pytest.raises(UsageError, match=r"rank: 5 .*1, 2, 3, 4, 6, 12$"):
        check_rank("spp-gc", 5, [24, 36])
    check_rank("lors", 5, [24, 36])
    check_rank("spp", 6, [24, 36])


@pytest.mark.parametrize("method", ["sqft", "spp", "hira"])
def test_a_saved_adapter_gives_the_same_logits(
    method: str, tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel]
) -> None:
    ids = torch.arange(40).reshape(2, 20)
    model = sparse_llama()
    layers = attach(model, list(prunable_weights(model)), 4, 8.0, use_rslora=True, method=method)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    config = AdapterConfig(method, 4, 8.0, True, tuple(layers), "some/base", "print", base_mask(model, layers),
                           "float32")  # fmt: skip
    save_adapter(model, tmp_path, config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == peft_type(method)
    loaded = load_adapter(sparse_llama(), tmp_path)
    assert type(next(iter(adapter_layers(loaded).values()))) is LAYERS[method]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", BASELINES)
def test_the_tune_stage_with_every_method(
    method: str, sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    chosen = replace(config, method=method, init=None, max_steps=3)
    record = tune(chosen, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert record.metrics["pattern"] == ("dense" if method == "lora" else "2:4")
    assert record.metrics["violations"] == 0
    assert (record.metrics["sparsity"] < 0.01) == (method == "lora")
    assert atomic.read_json(tmp_path / "tune/adapter/adapter_config.json")["peft_type"] == peft_type(method)


def test_checkpointing_inside_a_layer_changes_nothing_but_memory(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    for method in ("sqft", "spp"):
        model = ModelConfig(path=str(sparse_checkpoint))
        chosen = replace(config, init="kaiming", max_steps=2)
        for name in (method, f"{method}-gc"):
            tune(replace(chosen, method=name), model, tmp_path / name)
        plain, again = (tmp_path / name / "model.safetensors" for name in (method, f"{method}-gc"))
        assert plain.read_bytes() == again.read_bytes()


def test_stock_peft_loads_what_is_lora_and_nothing_else(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    from peft import PeftModel, PeftType
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(sparse_checkpoint)
    for method in ("lora", "lors"):
        tune(replace(config, method=method, init="kaiming", max_steps=2), ModelConfig(path=str(sparse_checkpoint)),
             tmp_path / method)  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    ids = torch.arange(20)[None]
    logits = PeftModel.from_pretrained(base, str(tmp_path / "lora/adapter"))(ids).logits
    torch.testing.assert_close(F.softmax(logits, -1), F.softmax(merged(ids).logits, -1), rtol=0.1, atol=2e-3)
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(base, str(tmp_path / "lors/adapter"))
    known = {kind.value for kind in PeftType}  # it has a HiRA of its own, and would load ours as an untrained one
    assert {method for method in LAYERS if peft_type(method) in known} == {"lora"}


@pytest.mark.parametrize("method", [method for method in LAYERS if method != "lora"])
def test_the_random_start_is_drawn_on_the_cpu_wherever_the_weight_is(method: str) -> None:
    """A GPU drew other numbers than the CPU, on which the weights are when they are to be sharded."""
    states = []
    for device in ("cpu", "meta"):
        torch.manual_seed(5)
        layer = LAYERS[method](nn.Linear(16, 24, device="meta").to_empty(device=device), 4, 4.0)
        assert layer.lora_A.device.type == device
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(5)
    first = LAYERS[method](nn.Linear(16, 24, device="meta").to_empty(device="cpu"), 4, 4.0).lora_A
    torch.manual_seed(5)
    drawn = nn.init.kaiming_uniform_(nn.Parameter(torch.empty(4, 16)), a=5**0.5)
    assert torch.equal(first, drawn)
