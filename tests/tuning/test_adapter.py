"""Adapters on disk: the right base, and only that; merges that keep every zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lors_cli.errors import MissingError, SparsityError, UsageError
from lors_cli.files.records import read_record
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.sources import model_fingerprint
from lors_cli.recipe.schema import ModelConfig
from lors_cli.tuning import adapter as adapters
from lors_cli.tuning import attach as tuning_attach
from lors_cli.tuning.adapter import AdapterConfig, base_of, load_adapter, save_adapter
from lors_cli.tuning.attach import adapter_layers, attach, base_mask
from lors_cli.tuning.loading import open_model
from lors_cli.tuning.lors import LorsLinear
from lors_cli.tuning.merge import merge, merge_counted

IDS = torch.arange(40).reshape(2, 20)


def _adapted(model: PreTrainedModel) -> PreTrainedModel:
    attach(model, list(prunable_weights(model)), rank=4, alpha=8.0, use_rslora=True)
    generator = torch.Generator().manual_seed(7)
    for layer in adapter_layers(model).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    layers = adapter_layers(model)
    config = AdapterConfig("lors", 4, 8.0, True, tuple(layers), "some/base", "fingerprint", base_mask(model, layers),
                           "float32")  # fmt: skip
    save_adapter(model, folder, config)
    return folder


def test_a_loaded_adapter_gives_the_same_logits(tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel]) -> None:
    model = _adapted(sparse_llama(torch.bfloat16))
    folder = _saved(model, tmp_path / "adapter")
    loaded = load_adapter(sparse_llama(torch.bfloat16), folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_merged_model_gives_the_same_logits_bit_for_bit(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = _adapted(sparse_llama(dtype))
        before = model(IDS).logits
        merge_counted(model)
        assert not adapter_layers(model)
        assert torch.equal(model(IDS).logits, before)


def test_merging_keeps_every_zero_and_counts_new_ones(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    model = _adapted(sparse_llama())
    masks = {name: layer.weight != 0 for name, layer in adapter_layers(model).items()}
    name, layer = next(iter(adapter_layers(model).items()))
    layer.lora_B.data.zero_()
    layer.lora_A.data.zero_()
    row, column = (int(index[0]) for index in layer.weight.nonzero(as_tuple=True))
    layer.lora_A.data[0, column] = 1.0
    layer.lora_B.data[row, 0] = -layer.weight[row, column] / layer.scale
    lost = merge_counted(model).zeroed
    weights = {key: weight.matrix for key, weight in prunable_weights(model).items()}
    assert all(bool((weights[key][~mask] == 0).all()) for key, mask in masks.items())
    assert weights[name][row, column] == 0
    assert lost == sum(int((weights[key][mask] == 0).sum()) for key, mask in masks.items()) >= 1


def test_a_merge_that_fills_a_zero_is_stopped(
    sparse_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _adapted(sparse_llama())
    monkeypatch.setattr(LorsLinear, "merged_weight", lambda self: torch.ones_like(self.weight))
    with pytest.raises(SparsityError, match="fill zeros"):
        merge_counted(model)


def test_a_base_with_other_zeros_is_refused(tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel]) -> None:
    folder = _saved(_adapted(sparse_llama()), tmp_path / "adapter")
    other = sparse_llama()
    weight = next(iter(prunable_weights(other).values())).matrix
    weight[0, 0], weight[0, 1] = 1.0, 0.0
    with pytest.raises(UsageError, match="zeros lie elsewhere"):
        load_adapter(other, folder)


def test_on_disk_it_looks_like_peft_but_is_not_taken_for_lora(
    tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel]
) -> None:
    folder = _saved(_adapted(sparse_llama()), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORS"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_another_kind_of_adapter_is_refused(tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel]) -> None:
    folder = _saved(_adapted(sparse_llama()), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(UsageError, match="LORA adapter, none of LORS, LORS_HIRA, SPP, SQFT"):
        load_adapter(sparse_llama(), folder)


def test_missing_and_broken_files_are_named(tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(MissingError, match="adapter configuration"):
        load_adapter(sparse_llama(), tmp_path)
    folder = _saved(_adapted(sparse_llama()), tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        load_adapter(sparse_llama(), folder)
    tensors = tuning_attach.adapter_tensors(_adapted(sparse_llama()))
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    with pytest.raises(UsageError, match="does not fit its configuration"):
        load_adapter(sparse_llama(), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="not readable JSON"):
        load_adapter(sparse_llama(), folder)


@pytest.mark.parametrize(("key", "value"), [
    ("peft_type", ["LORS"]), ("r", 10**18), ("r", 0), ("r", None), ("lora_alpha", 1e300), ("lora_alpha", -1),
    ("lora_alpha", 10**400), ("target_modules", [["x"]]), ("target_modules", "q_proj"), ("target_modules", {"a": 1}),
    ("trained_norms", [3]), ("base_mask", None),
])  # fmt: skip
def test_values_in_adapter_config_json_that_no_adapter_has(
    key: str, value: Any, tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel]
) -> None:
    folder = _saved(_adapted(sparse_llama()), tmp_path)
    path = folder / "adapter_config.json"
    adapters.read_adapter_config(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    if (key, value) == ("base_mask", None):  # a text of no mask: found out when it is compared
        with pytest.raises(UsageError, match="the zeros lie elsewhere"):
            load_adapter(sparse_llama(), folder)
        return
    with pytest.raises(UsageError, match=r"adapter_config\.json is"):
        adapters.read_adapter_config(folder)


def test_the_base_is_loaded_as_it_was_trained_and_another_one_is_told_of(
    sparse_checkpoint: Path, tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In another format or on other weights the adapter gave other outputs, without a word."""
    layers = adapter_layers(model := _adapted(sparse_llama(torch.bfloat16)))
    source = ModelConfig(path=str(sparse_checkpoint), device="cpu")
    config = AdapterConfig("lors", 4, 8.0, True, tuple(layers), source.path, model_fingerprint(source),
                           base_mask(model, layers), "float32")  # fmt: skip
    save_adapter(model, tmp_path / "adapter", config)
    adapter = ModelConfig(path=str(tmp_path / "adapter"), device="cpu")
    assert open_model(adapter)[0].dtype == torch.float32
    assert "trained on" not in capsys.readouterr().err
    assert open_model(replace(adapter, dtype="bfloat16"))[0].dtype == torch.bfloat16
    assert "trained on weights in float32, and these are in bfloat16" in capsys.readouterr().err
    merge(source.path, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    record = read_record(tmp_path / "merged")
    assert record is not None
    assert record.inputs["model"] == config.base_fingerprint
    assert next(iter(load_file(tmp_path / "merged" / "model.safetensors").values())).dtype == torch.float32

    save_adapter(model, tmp_path / "adapter", replace(config, base_dtype="bfloat16"))
    (other := sparse_llama(torch.bfloat16)).get_parameter("model.norm.weight").mul_(2)
    other.save_pretrained(sparse_checkpoint)
    assert open_model(adapter)[0].dtype == torch.bfloat16
    assert "is not what the adapter was trained on" in capsys.readouterr().err


def test_of_the_same_hub_id_the_commit_is_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "model_fingerprint", lambda config: f"{config.path}@{config.revision}")
    config = AdapterConfig(
        "lors", 4, 8.0, True, (), "some/base", "hub:some/base@c0ffee:auto:bos=true", "mask", "float32"
    )
    base, _ = base_of(config, ModelConfig(path="some/base"))
    assert (base.revision, base.add_bos_token, base.dtype) == ("c0ffee", True, "float32")
    given = ModelConfig(path="some/base", revision="v2", add_bos_token=False, dtype="bfloat16")
    assert base_of(config, given)[0] == given
    assert base_of(config, ModelConfig(path="other/base"))[0].revision == "main"
