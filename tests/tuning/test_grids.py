"""Tuning on a quantised sparse base: its operator, and the stage, whose result lies on the base's grid bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import signalled
from killed_runs import killed_at
from on_grids import FOUR_BITS, SPECS, by_numbers, linear_on_a_grid, save_on_grids
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.grid import Grid
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.grids import GRIDS_NAME, load_grids
from lors_cli.models.packed.format import Packed
from lors_cli.models.packed.stage import pack_model
from lors_cli.output import console
from lors_cli.pipeline.pushing import INNER_FILES
from lors_cli.recipe.schema import ModelConfig, PackConfig, PruneConfig, QuantizeConfig, Recipe, TuneConfig
from lors_cli.tuning.adapter import load_adapter, read_adapter_config
from lors_cli.tuning.attach import attach
from lors_cli.tuning.baselines import LAYERS, SqftLinear
from lors_cli.tuning.kernels import masked_merge
from lors_cli.tuning.kernels.on_grid import lies_on
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.lors import LorsLinear, PackedLorsLinear, lors_linear
from lors_cli.tuning.merge import merge
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.training import preparation

IDS = torch.arange(40).reshape(2, 20)
RESULTS = ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", GRIDS_NAME)


def layer_on_a_grid(layer_class: type[AdapterLinear], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A layer that stays on its grid, lora_B no longer zero."""
    torch.manual_seed(11)
    linear, grid = linear_on_a_grid(48, 64, dtype)
    layer = layer_class(linear, 4, 4.0, grid=grid)
    layer.quantization_aware, layer.rounding = True, options.pop("rounding", "nearest")
    torch.nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def straight_through(layer: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *, masked: bool) -> torch.Tensor:
    """Y of the rounded merged weight in plain autograd, its gradient that of what is rounded (and masked)."""
    mask = (layer.weight != 0).to(x.dtype)
    update = layer.scale * B @ A
    exact = layer.weight + (update * mask if masked else update)
    rounded = layer.base_grid.rounded((layer.weight + layer.scale * B @ A).detach()) * mask
    return F.linear(x, exact + (rounded - exact).detach(), layer.bias)


@pytest.mark.parametrize(("layer_class", "masked"), [(LorsLinear, False), (SqftLinear, True)])
def test_forward_and_gradients_equal_autograd_of_the_unfused_formula(
    layer_class: type[AdapterLinear], masked: bool
) -> None:
    layer = layer_on_a_grid(layer_class)
    x = torch.randn(3, 5, 64, requires_grad=True)
    upstream = torch.randn(3, 5, 48)
    y = layer(x)
    y.backward(upstream)
    theirs = [part.detach().clone().requires_grad_() for part in (x, layer.lora_A, layer.lora_B)]
    expected = straight_through(layer, *theirs, masked=masked)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, other in zip((x, layer.lora_A, layer.lora_B), theirs, strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert lies_on(layer.merged_weight(), layer.base_grid)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layer_class", [LorsLinear, PackedLorsLinear, SqftLinear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_merged_linear_gives_the_bits_of_the_forward_pass(
    layer_class: type[AdapterLinear], dtype: torch.dtype, rounding: str
) -> None:
    layer = layer_on_a_grid(layer_class, dtype, rounding=rounding)
    x = torch.randn(7, 64).to(dtype)
    assert torch.equal(layer(x), layer.to_linear()(x))
    assert lies_on(layer.merged_weight(), layer.base_grid)
    assert not torch.equal(layer.merged_weight(), layer.weight)


@pytest.mark.parametrize("layer_class", [LorsLinear, SqftLinear])
def test_updates_that_a_weight_s_dtype_cannot_hold_reach_the_grid(layer_class: type[AdapterLinear]) -> None:
    """Of products that are exact, so that one sum in float32 is all there is to round."""
    layer = layer_on_a_grid(layer_class, torch.bfloat16, rounding="stochastic")
    layer.lora_A.data.copy_(torch.randint(-4, 5, layer.lora_A.shape) / 128)
    layer.lora_B.data.copy_(torch.randint(-4, 5, layer.lora_B.shape) / 32)
    total = layer.weight.float() + layer.scale * (layer.lora_B @ layer.lora_A)
    assert not torch.equal(total.bfloat16().float(), total)
    assert torch.equal(layer.merged_weight(), by_numbers(total, layer.weight, layer.base_grid, "stochastic"))


def test_saved_for_backward_is_the_input_and_nothing_else() -> None:
    layer = layer_on_a_grid(LorsLinear)
    x = torch.randn(9, 64, requires_grad=True)
    known = {parameter.data_ptr() for parameter in layer.parameters()} | {layer.weight.data_ptr()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).sum().backward()
    assert [tensor.shape for tensor in saved if tensor.data_ptr() not in known] == [x.shape]


def test_a_packed_base_holds_codes_and_gives_the_same_gradients() -> None:
    found = []
    for layer_class in (LorsLinear, PackedLorsLinear):
        layer, x = layer_on_a_grid(layer_class, rounding="stochastic"), torch.ones(3, 64, requires_grad=True)
        layer(x).square().sum().backward()
        found.append([x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.merged_weight(), layer.weight])
    for plain, codes in zip(*found, strict=True):
        torch.testing.assert_close(codes, plain, rtol=0, atol=0)
    assert layer.values.dtype == torch.uint8
    assert layer.values.numel() < 48 * 64 / 2 / 2 * 1.2 + 32  # half of the weights, two a byte


def test_codes_that_no_kernel_reads_on_a_gpu_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = nn.Sequential(layer_on_a_grid(PackedLorsLinear))
    network.device, network.dtype = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(Packed, "device", network.device)
    monkeypatch.setattr(masked_merge, "why_no_cuda_kernel", lambda *_: "")
    console.configure(verbosity=1)
    preparation._keep_merged(network, TuneConfig(merged_cache="off"), sharded=False)
    said = capsys.readouterr().err
    assert "merged by unpacking by torch's operations, as no CUDA kernel reads codes, then one CUDA kernel" in said
    assert "warning: base: packed holds codes here" in said


def test_it_compiles_to_the_same_bits() -> None:
    layer = layer_on_a_grid(LorsLinear, rounding="stochastic")
    x = torch.randn(5, 64)
    compiled = torch.compile(lors_linear, fullgraph=True, backend="aot_eager")
    given = (x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scale)
    found = compiled(*given, rounding="stochastic", grid=layer.base_grid)
    torch.testing.assert_close(found, layer(x), rtol=1e-6, atol=1e-6)


# ---- the stage


@pytest.fixture
def quantised(tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> Path:
    """The sparse Llama on grids of 4 bits, as an ordinary checkpoint with the grids beside it."""
    return save_on_grids(sparse_llama(torch.bfloat16), tiny_tokenizer, tmp_path / "quantised")


@pytest.fixture
def aware(config: TuneConfig) -> TuneConfig:
    return replace(config, quantization_aware=True)


def same_files(one: Path, two: Path, names: tuple[str, ...] = RESULTS) -> None:
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize("method", ["lors", "sqft", "sqft-gc"])
def test_the_tuned_model_lies_on_its_base_s_grid(
    quantised: Path, aware: TuneConfig, tmp_path: Path, method: str
) -> None:
    init = "gradient" if method == "lors" else "kaiming"
    record = tune(replace(aware, method=method, init=init), ModelConfig(path=str(quantised)), tmp_path / "out")
    assert (tmp_path / "out" / GRIDS_NAME).read_bytes() == (quantised / GRIDS_NAME).read_bytes()
    before, after, grids = (load_file(quantised / "model.safetensors"), load_file(tmp_path / "out/model.safetensors"),
                            load_grids(tmp_path / "out"))  # fmt: skip
    assert len(grids) == 14
    for name, grid in grids.items():
        base, tuned = before[f"{name}.weight"], after[f"{name}.weight"]
        assert torch.equal(torch.where(tuned != 0, grid.rounded(tuned), 0), tuned)
        assert bool((tuned[base == 0] == 0).all())
    assert record.metrics["moved"] > 0.01
    assert record.metrics["loss_after"] < record.metrics["loss_before"]
    assert record.metrics["quantize"] == {"bits": 4, "group_size": 32, "symmetric": True}
    assert record.metrics["bits_a_weight"] == 4 * 0.5 + 1 + 16 / 32
    # and the adapter on its base is the very same model, here and merged by `lors merge`
    network = AutoModelForCausalLM.from_pretrained(quantised, dtype="auto").requires_grad_(False).eval()
    adapted = load_adapter(network, tmp_path / "out/adapter")
    tuned_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert torch.equal(adapted(IDS).logits, tuned_model(IDS).logits)
    merge(str(quantised), tmp_path / "out/adapter", tmp_path / "merged")
    same_files(tmp_path / "out", tmp_path / "merged", ("model.safetensors", GRIDS_NAME))
    content = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert content["quantization_aware"] is True
    adapter_files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out/adapter").rglob("*.*")}
    assert {*adapter_files, GRIDS_NAME} == set(INNER_FILES)  # `lors push` takes all of them
    assert content["peft_type"] == f"{method.removesuffix('-gc').upper()}_QA"  # which an earlier lors refuses


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_no_way_of_holding_weights_changes_a_bit(
    quantised: Path, aware: TuneConfig, tmp_path: Path, rounding: Any
) -> None:
    aware, model = replace(aware, rounding=rounding), ModelConfig(path=str(quantised))
    tune(aware, model, tmp_path / "plain")
    for name, changes in {"packed": {"base": "packed"}, "kept": {"merged_cache": "on"}, "anew": {"merged_cache": "off"},
                          "blocks": {"gradient_checkpointing": True}}.items():  # fmt: skip
        tune(replace(aware, **changes), model, tmp_path / name)
        same_files(tmp_path / "plain", tmp_path / name)


def test_a_killed_run_ends_in_the_same_bits(
    quantised: Path, aware: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(path=str(quantised))
    tune(aware, model, tmp_path / "whole")
    killed_at(4, aware, model, tmp_path / "broken", monkeypatch)
    tune(aware, model, tmp_path / "broken")
    same_files(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("before", ["checkpoint-6", "stage.json"])
def test_kill_9_and_the_same_call_again(quantised: Path, aware: TuneConfig, tmp_path: Path, before: str) -> None:
    tune(replace(aware, per_device_batch_size=None), ModelConfig(path=str(quantised)), tmp_path / "whole")
    settings = ["rank=4", "alpha=4", "learning_rate=5e-2", "max_steps=8", "batch_size=4", "init_samples=4",
                "save_steps=3", f"data.dataset={aware.data.dataset}", "data.max_length=320",
                "quantization_aware=true"]  # fmt: skip
    call = ["tune", str(quantised), "--out", str(tmp_path / "broken"), *settings]
    assert signalled(signal.SIGKILL, before, *call).returncode == -signal.SIGKILL
    assert not (tmp_path / "broken" / "stage.json").exists()
    again = signalled(signal.SIGKILL, "never", *call)
    assert again.returncode == 0, again.stderr
    same_files(tmp_path / "whole", tmp_path / "broken")


def test_a_float_merge_leaves_the_grid_and_says_so(
    quantised: Path, config: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tune(config, ModelConfig(path=str(quantised)), tmp_path / "out")
    said = "the tuned model leaves its 4-bit grid; tune.quantization_aware=true keeps it"
    assert capsys.readouterr().err.count(said) == 1
    assert not (tmp_path / "out/grid").exists()
    assert not (tmp_path / "out/adapter/grid").exists()
    assert "quantize" not in record.metrics
    merge(str(quantised), tmp_path / "out/adapter", tmp_path / "merged")
    assert capsys.readouterr().err.count(said) == 1
    assert not (tmp_path / "merged/grid").exists()
    packed = replace(config, base="packed")
    tune(packed, ModelConfig(path=str(quantised)), tmp_path / "packed")
    same_files(tmp_path / "out", tmp_path / "packed", RESULTS[:3])


def test_a_packed_base_tunes_to_the_same_bits_and_its_result_packs_to_codes(
    quantised: Path, aware: TuneConfig, tmp_path: Path
) -> None:
    pack_model(PackConfig(), ModelConfig(path=str(quantised)), tmp_path / "codes")
    tune(aware, ModelConfig(path=str(quantised)), tmp_path / "plain")
    for base in ("plain", "packed"):
        tune(replace(aware, base=base), ModelConfig(path=str(tmp_path / "codes")), tmp_path / f"of-{base}")  # type: ignore[arg-type]
        same_files(tmp_path / "plain", tmp_path / f"of-{base}", ("model.safetensors", RESULTS[1], GRIDS_NAME))
    merge(str(tmp_path / "codes"), tmp_path / "plain/adapter", tmp_path / "merged")  # the same weights, held otherwise
    same_files(tmp_path / "plain", tmp_path / "merged", ("model.safetensors", GRIDS_NAME))
    pack_model(PackConfig(), ModelConfig(path=str(tmp_path / "plain")), tmp_path / "small")
    name = "model.layers.0.mlp.up_proj"
    tensors, tuned = load_file(tmp_path / "small/model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    assert tensors[f"{name}.weight"].dtype == torch.uint8
    codes = load_grids(quantised)[name].codes(tuned[f"{name}.weight"])
    first = next(int(code) for code, value in zip(codes[0], tuned[f"{name}.weight"][0], strict=True) if value != 0)
    assert first in (int(tensors[f"{name}.weight"][0]) & 15, int(tensors[f"{name}.weight"][0]) >> 4)


def test_a_base_without_a_grid_is_refused(sparse_checkpoint: Path, aware: TuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"quantization_aware: the weights of .*sparse lie on no grid"):
        tune(aware, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "out")


def test_a_base_that_is_not_as_it_was_pruned_is_refused(quantised: Path, aware: TuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the weights are float32 and their grid is bfloat16") as refused:
        tune(aware, ModelConfig(path=str(quantised), dtype="float32"), tmp_path / "out")
    assert "dtype=bfloat16" in refused.value.hint
    tensors = load_file(quantised / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"] *= 1.01
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"{name} does not lie on its grid"):
        tune(aware, ModelConfig(path=str(quantised)), tmp_path / "out")


def test_an_adapter_belongs_on_its_very_base(
    quantised: Path, aware: TuneConfig, tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel],
    tiny_tokenizer: Any,
) -> None:  # fmt: skip
    """Zeros in the same places are enough for others; here other codes would merge to other bits."""
    tune(replace(aware, max_steps=1), ModelConfig(path=str(quantised)), tmp_path / "out")
    adapter = tmp_path / "out/adapter"
    assert read_adapter_config(adapter).base_grid
    coarser = save_on_grids(sparse_llama(torch.bfloat16), tiny_tokenizer, tmp_path / "coarser", SPECS[1])
    for base in (coarser, quantised):
        tensors = load_file(base / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj"
        weight, grid = tensors[f"{name}.weight"], load_grids(base)[name]
        place = tuple((weight == weight[weight != 0].max()).nonzero()[0].tolist())
        weight[place] = -weight[place]
        assert isinstance(grid, Grid)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match="zeros lie elsewhere" if base == coarser else "belongs on other weights"):
            merge(str(base), adapter, tmp_path / "merged")
    shutil.rmtree(adapter / "grid")
    with pytest.raises(UsageError, match="belongs on other weights"):
        merge(str(quantised), adapter, tmp_path / "merged")


def test_layers_without_an_adapter_stay_and_keep_their_grids(
    quantised: Path, aware: TuneConfig, tmp_path: Path
) -> None:
    tune(replace(aware, skip=("*.down_proj",)), ModelConfig(path=str(quantised)), tmp_path / "out")
    assert (tmp_path / "out" / GRIDS_NAME).read_bytes() == (quantised / GRIDS_NAME).read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (quantised, tmp_path / "out"))
    for name in before:
        assert torch.equal(before[name], after[name]) == (
            "_proj" not in name or "down_proj" in name or not name.endswith(".weight")
        ), name
    assert len(load_grids(tmp_path / "out/adapter")) == 12


def test_a_broken_adapter_is_seen_though_its_merged_weights_are_numbers(
    quantised: Path, aware: TuneConfig, tmp_path: Path
) -> None:
    tune(replace(aware, max_steps=1), ModelConfig(path=str(quantised)), tmp_path / "out")
    file = tmp_path / "out/adapter/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(UsageError, match="holds NaN or Inf"):
        merge(str(quantised), tmp_path / "out/adapter", tmp_path / "merged")


def test_the_fingerprint_moves_only_where_it_is_on(config: TuneConfig, aware: TuneConfig) -> None:
    fingerprint = stage_fingerprint(config, "m", None)
    assert fingerprint == stage_fingerprint(replace(config, quantization_aware=False), "m", None)
    assert fingerprint != stage_fingerprint(aware, "m", None)


def test_methods_that_have_no_such_form_and_recipes_that_make_no_grid_are_refused(config: TuneConfig) -> None:
    for method in set(LAYERS) - {"lors", "sqft", "sqft-gc"}:
        with pytest.raises(ValueError, match="quantization_aware: it is for method: lors and sqft"):
            replace(config, method=method, init="kaiming", quantization_aware=True)
    tuned, base = TuneConfig(quantization_aware=True), ModelConfig(path="m")
    with pytest.raises(ValueError, match=r"tune\.quantization_aware: .* prune has no quantize"):
        Recipe(name="r", model=base, prune=PruneConfig(), tune=tuned)
    assert Recipe(name="r", model=base, prune=PruneConfig(quantize=QuantizeConfig()), tune=tuned).tune == tuned
    assert Recipe(name="r", model=base, tune=tuned).tune == tuned


def test_every_value_of_the_quantised_base_has_a_grid(quantised: Path) -> None:
    """What the tests above stand on."""
    network = AutoModelForCausalLM.from_pretrained(quantised, dtype="auto")
    grids = load_grids(quantised)
    assert set(grids) == set(prunable_weights(network))
    assert all(grid.spec == FOUR_BITS for grid in grids.values())


@pytest.mark.parametrize("options", [{}, {"quantization_aware": True}, {"packed": True}])
def test_a_grid_is_held_where_it_is_read(options: dict[str, bool]) -> None:
    """On a GPU it took memory for methods that leave it."""
    linear, grid = linear_on_a_grid(48, 64, torch.float32)
    model = nn.ModuleDict({"linear": linear})
    layer = attach(model, ["linear"], 4, 4.0, use_rslora=True, grids={"linear": grid}, **options)["linear"]  # type: ignore[arg-type]
    assert (layer.base_grid is not None) == bool(options)
