"""No process holds a model that is trained in shards; what comes out is what one process makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import log
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)
from two_processes import tune_config

from lors_cli.cli.launch import launch
from lors_cli.errors import UsageError
from lors_cli.machine import devices
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.loading import load_model
from lors_cli.models.packed.stage import pack_model
from lors_cli.models.streaming import open_blockwise
from lors_cli.recipe.packing import PackConfig
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.attach import put_adapters
from lors_cli.tuning.block_merge import BlockMerge
from lors_cli.tuning.merge import merge_counted
from lors_cli.tuning.norms import trained_norms
from lors_cli.tuning.stage import sparse_layers, tune
from lors_cli.tuning.training import sharding

NUM_BLOCKS = 6
SIZES = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 257,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
MODELS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "experts": MixtralConfig(**{**SIZES, "intermediate_size": 48}, num_local_experts=4, num_experts_per_tok=2),
    "shared": Qwen2MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
                             shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    "mixing": OPTConfig(vocab_size=258, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=512, init_std=0.3, pad_token_id=257),
    "wide": LlamaConfig(**{**SIZES, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": NUM_BLOCKS}),
}  # fmt: skip


def settings(rows: Path, **changes: Any) -> dict[str, Any]:
    return {"rank": 4, "alpha": 4.0, "learning_rate": 1e-2, "max_steps": 3, "batch_size": 4, "init_samples": 4,
            "per_device_batch_size": 2, "parallelism": "fsdp", "data": {"dataset": str(rows), "max_length": 320},
            **changes}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> tuple[dict[str, Any], Path, Path]:
    """The jobs; the folder in which one process did them; the folder in which two did."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in prunable_weights(model).values():
            weight.matrix[:, 0::4] = 0
            weight.matrix[:, 3::4] = 0
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    rows, texts = folder / "rows.jsonl", folder / "texts.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {n}", "input": "", "output": f"it is {n * 7 % 10}"}) + "\n"
                            for n in range(24)))  # fmt: skip
    texts.write_text("".join(json.dumps({"text": f"fox {n * 7 % 31} jumps. " * 9}) + "\n" for n in range(60)))
    isolated = {"dataset": str(texts), "max_length": 64, "shuffle_buffer": 8, "packing": "isolated"}
    jobs = {
        "tied": settings(rows, train_norms=True, skip=["*.o_proj"]),
        "experts": settings(rows),
        "shared": settings(rows, gradient_checkpointing=True),
        "lora": settings(rows, method="lora"),
        "isolated": settings(rows, data=isolated, max_steps=None, max_tokens=64 * 8),
    }
    models = {"lora": "tied", "isolated": "tied"}
    told = {"tune": {name: (str(folder / models.get(name, name)), job) for name, job in jobs.items()},
            "refused": (str(folder / "mixing"), jobs["isolated"]),
            "wide": (str(folder / "wide"), settings(rows))}  # fmt: skip
    one, two = folder / "one", folder / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORS_CACHE_DIR", str(folder / "cache"))
        for name, (model, job) in told["tune"].items():
            tune(tune_config(job), ModelConfig(path=model), one / name)
        two.mkdir()
        (folder / "jobs.json").write_text(json.dumps(told))
        script = Path(__file__).with_name("sharded_processes.py")
        assert launch([sys.executable, str(script), str(folder / "jobs.json"), str(two)], 2) == 0
    return told, one, two


@pytest.mark.long
@pytest.mark.parametrize("job", ["tied", "experts", "shared", "lora", "isolated"])
def test_a_model_in_shards_is_tuned_like_a_whole_one(both: tuple[dict[str, Any], Path, Path], job: str) -> None:
    _, one, two = both
    first, second = ([row["loss"] for row in log(folder / job)] for folder in (one, two))
    assert second == pytest.approx(first, abs=1e-4)
    for name in ("adapter/adapter_model.safetensors", "model.safetensors"):
        expected, found = load_file(one / job / name), load_file(two / job / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype
            assert torch.equal(tensor == 0, found[key] == 0), key
            torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-4)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter/adapter_config.json"):
        assert (one / job / name).read_bytes() == (two / job / name).read_bytes()
    metrics = [json.loads((folder / job / "stage.json").read_text())["metrics"] for folder in (one, two)]
    for key in ("layers", "violations", "pattern", "base_mask", "trainable_parameters", "zeroed", "skipped_layers"):
        assert metrics[0].get(key) == metrics[1].get(key)


@pytest.mark.long
def test_a_model_in_shards_that_mixes_texts_is_refused(both: tuple[dict[str, Any], Path, Path]) -> None:
    """Its weights are there by then: with stand-ins of zeros every model would keep texts apart."""
    said = "data.packing: isolated cannot be had with OPTForCausalLM: its attention does not end where positions"
    for rank in (0, 1):
        assert json.loads((both[2] / f"{rank}.json").read_text())["refused"].startswith(said)


@pytest.mark.long
def test_no_process_holds_more_than_its_part_and_a_block(both: tuple[dict[str, Any], Path, Path]) -> None:
    told, _, two = both
    tensors = load_file(Path(told["wide"][0]) / "model.safetensors")
    num_bytes = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
    blocks = sum(size for name, size in num_bytes.items() if ".layers." in name)
    block, outside = blocks / NUM_BLOCKS, sum(num_bytes.values()) - blocks
    adapters = 4 * 4 * NUM_BLOCKS * sum(sum(tensors[name].shape) for name in tensors if ".layers.0." in name)
    for rank in (0, 1):
        found = json.loads((two / f"{rank}.json").read_text())
        part = blocks / 2 + outside + adapters
        assert found["detecting"] < outside + block
        assert 0.9 * part < found["held"] < 1.1 * part
        assert found["loading"] < 1.1 * part + block
    assert json.loads((two / "0.json").read_text())["merging"] < outside + 2.5 * block < 0.6 * blocks


@pytest.mark.parametrize("processes", [2, 3, 7, 40])
def test_every_row_is_read_by_the_process_whose_shard_it_is(
    processes: int, tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse_llama()
    model.save_pretrained(tmp_path)
    source, name = open_blockwise(ModelConfig(path=str(tmp_path), dtype="float32")), "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    expected = list(torch.chunk(weight, processes))
    for variable, value in {"WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(variable, str(value))
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        asked: list[slice] = []
        monkeypatch.setattr(source, "read_rows", lambda name, rows, asked=asked: asked.append(rows) or weight[rows])
        found = sharding._own_rows(source, f"{name}.weight", weight, torch.device("cpu"), {})
        mine = expected[rank] if rank < len(expected) else weight[:0]
        (rows,) = asked
        assert torch.equal(found[rows], mine)
        assert rows.stop - rows.start == len(mine)


def test_blocks_are_merged_on_the_device_that_trains(sparse_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(devices, "resolve_device", lambda name: torch.device("meta"))
    config = TuneConfig(parallelism="fsdp")
    _, source = sharding.load_trainable(config, ModelConfig(path=str(sparse_checkpoint), dtype="float32"))
    assert source is not None
    assert source.device == torch.device("meta")


def test_norms_are_merged_by_what_trained_them(sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path) -> None:
    """Their units may have other last bits where they are computed anew."""
    model, config = ModelConfig(path=str(sparse_checkpoint), dtype="float32"), replace(config, train_norms=True)
    network, source = load_model(model), open_blockwise(model)
    layers = sparse_layers(source.weights(), sparse_checkpoint)
    put_adapters(config, network, list(layers), {})
    for norm in trained_norms(network).values():
        norm.unit *= 1.5
        norm.shift.data.normal_()
    BlockMerge(config, source, network, list(layers), {}).write(tmp_path, layers)
    merge_counted(network)
    merged = load_file(tmp_path / "model.safetensors")
    for name, parameter in network.named_parameters():
        assert name not in merged or torch.equal(merged[name], parameter), name


def test_a_packed_base_is_refused_by_name(
    tmp_path: Path, sparse_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_model(PackConfig(), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "packed")
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=r"packed is a quantised checkpoint \(lors_packed\), which can only be read"):
        sharding.load_trainable(TuneConfig(parallelism="fsdp"), ModelConfig(path=str(tmp_path / "packed")))
