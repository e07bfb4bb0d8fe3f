"""Configurations that say one thing and files that hold another: what is loaded, and what is refused, on every path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lors_cli.bench.model import sparse_model
from lors_cli.errors import MissingError, UsageError
from lors_cli.models import quantised
from lors_cli.models.inspection import inspect
from lors_cli.models.loading import load_model, load_tokenizer, save_checkpoint
from lors_cli.models.size import model_size
from lors_cli.models.streaming import open_blockwise
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import ModelConfig, PruneConfig

Tensors = dict[str, torch.Tensor]
UP, HEAD, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.arange(2, 26).view(2, 12)


def at(folder: Path, dtype: Any = "float32") -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", dtype=dtype)


def for_bench(config: ModelConfig) -> Any:
    return sparse_model(None, config.path, None, torch.float32, torch.device("cpu"))


LOADERS = [load_model, open_blockwise, for_bench, inspect]
every_path = pytest.mark.parametrize("load", LOADERS)


def rewrite(folder: Path, change: Callable[[Tensors], Any], **config: Any) -> Tensors:
    """Change a checkpoint's tensors in place, and its configuration."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return tensors


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


class TestAHeadOfItsOwnBesideATiedConfiguration:
    @pytest.fixture
    def folder(self, checkpoint: Path) -> Path:
        """config.json ties, and the file holds a head of other values."""
        rewrite(checkpoint, lambda tensors: None, tie_word_embeddings=True)
        assert not torch.equal(*(load_file(checkpoint / "model.safetensors")[name] for name in (HEAD, EMBEDDING)))
        return checkpoint

    def test_every_path_keeps_it_as_transformers_does(self, folder: Path) -> None:
        truth = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(truth.lm_head.weight, load_file(folder / "model.safetensors")[HEAD])
        for model in (load_model(at(folder)), for_bench(at(folder))[0]):
            assert torch.equal(logits(model), logits(truth))
            assert model.config.tie_word_embeddings is False
            model.tie_weights()  # as PEFT and a resize do
            assert torch.equal(logits(model), logits(truth))
        blockwise = {entry.name: load for entry, load in open_blockwise(at(folder)).outer_tensors()}
        assert torch.equal(blockwise[HEAD](), truth.lm_head.weight)
        assert torch.equal(blockwise[EMBEDDING](), truth.model.embed_tokens.weight)

    def test_a_pruned_checkpoint_has_it_in_transformers(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "sparse"
        prune(PruneConfig(method="magnitude", pattern="unstructured", sparsity=0.02), at(folder), out)
        truth, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, out))
        assert torch.equal(pruned.lm_head.weight, truth.lm_head.weight)
        assert torch.equal(pruned.model.embed_tokens.weight, truth.model.embed_tokens.weight)
        truth.model.layers.load_state_dict(pruned.model.layers.state_dict())
        assert torch.equal(logits(pruned), logits(truth))
        assert torch.equal(logits(load_model(at(out))), logits(truth))  # what eval and tune load

    def test_it_is_saved_and_loaded_again(self, folder: Path, tmp_path: Path) -> None:
        truth = logits(AutoModelForCausalLM.from_pretrained(folder))
        save_checkpoint(load_model(at(folder)), load_tokenizer(at(folder)), tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), truth)
        assert torch.equal(logits(load_model(at(tmp_path / "again"))), truth)

    def test_the_user_is_told(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for load in (load_model, open_blockwise):
            load(at(folder))
            assert "its files hold lm_head.weight with values of its own" in " ".join(capsys.readouterr().err.split())

    def test_a_head_that_is_equal_stays_tied(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
        model, source = load_model(at(folder)), open_blockwise(at(folder))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert HEAD not in {entry.name for entry, _ in source.outer_tensors()}
        assert model.config.tie_word_embeddings
        assert source.network.config.tie_word_embeddings
        assert "values of its own" not in capsys.readouterr().err

    def test_a_difference_that_rounding_takes_away_is_none(self, folder: Path) -> None:
        def nearly(tensors: Tensors) -> None:
            tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().float()
            tensors[HEAD] = tensors[EMBEDDING] * (1 + 2**-12)

        rewrite(folder, nearly)
        for dtype, tied in (("bfloat16", True), ("float32", False)):
            truth = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            assert (truth.lm_head.weight is truth.model.embed_tokens.weight) is tied
            names = {entry.name for entry, _ in open_blockwise(at(folder, dtype)).outer_tensors()}
            assert (HEAD not in names) is tied
            assert load_model(at(folder, dtype)).config.tie_word_embeddings is tied


def as_fp8(tensors: Tensors, name: str = "_scale") -> None:
    scale = tensors[UP].abs().max() / 448
    tensors.update({UP: (tensors[UP] / scale).to(torch.float8_e4m3fn), UP + name: scale.clone()})


def beside(suffix: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({UP.removesuffix("weight") + suffix: value})


QUANTISED_FILES: dict[str, Callable[[Tensors], Any]] = {
    "FP8 with weight_scale": as_fp8,
    "FP8 in blocks": lambda tensors: as_fp8(tensors, "_scale_inv"),
    "FP8 alone": lambda tensors: (as_fp8(tensors), tensors.pop(UP + "_scale")),
    "int8": lambda tensors: tensors.update({UP: (tensors[UP] * 100).to(torch.int8)}),
    "a scale beside a plain weight": beside("weight_scale", torch.tensor(0.5)),
    "a zero point beside a plain weight": beside("weight_zero_point", torch.zeros(1, dtype=torch.int8)),
    "qweight": beside("qweight", torch.zeros(4, 4, dtype=torch.int32)),
    "qweight in place of the weight": lambda tensors: (beside("qweight", torch.ones(2, 2).int())(tensors),
                                                       tensors.pop(UP)),
    "bitsandbytes": beside("weight.quant_state.bitsandbytes__nf4", torch.zeros(8, dtype=torch.uint8)),
    "scales of the attention's cache": lambda tensors: tensors.update(
        {"model.layers.0.self_attn.k_scale": torch.tensor(1.0)}),
}  # fmt: skip


@every_path
@pytest.mark.parametrize("what", QUANTISED_FILES)
def test_quantised_numbers_are_never_taken_for_weights(load: Any, what: str, checkpoint: Path) -> None:
    rewrite(checkpoint, QUANTISED_FILES[what])
    (checkpoint / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UsageError, match=r"no quantization_config|no number format of weights") as raised:
        load(at(checkpoint))
    assert "Give the checkpoint in bfloat16" in str(raised.value.hint)


def test_scales_that_are_the_networks_own_or_another_towers_are_no_sign(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"vision_tower.patches.scale": torch.ones(3)}))
    assert logits(load_model(at(checkpoint))).isfinite().all()


def blocks_of(weight: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 numbers, a scale a block, and the weight that they stand for, block by block."""
    rows, columns = -(-weight.shape[0] // side), -(-weight.shape[1] // side)
    numbers, scales, plain = torch.zeros_like(weight), torch.zeros(rows, columns), torch.zeros_like(weight)
    for row in range(rows):
        for column in range(columns):
            place = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            scales[row, column] = weight[place].abs().max() / 448
            numbers[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn).float()
            plain[place] = numbers[place] * scales[row, column]
    return numbers.to(torch.float8_e4m3fn), scales, plain


class TestFp8WithItsConfiguration:
    def store(self, folder: Path, side: int, **config: Any) -> Tensors:
        """Put the linears of a checkpoint into FP8 blocks; gives what they stand for."""
        plain: Tensors = {}

        def change(tensors: Tensors) -> None:
            for name in [name for name in tensors if "_proj" in name]:
                tensors[name], tensors[f"{name}_scale_inv"], plain[name] = blocks_of(tensors[name], side)

        quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [side, side]}
        rewrite(folder, change, quantization_config=quantization, **config)
        return plain

    def test_weights_are_made_plain_on_every_path(self, checkpoint: Path, tmp_path: Path) -> None:
        plain = self.store(checkpoint, 16)
        model = load_model(at(checkpoint))
        assert all(torch.equal(model.state_dict()[name], weight) for name, weight in plain.items())
        source = open_blockwise(at(checkpoint))
        with source.block(1):
            assert torch.equal(source.checkpoint_tensors(1)[UP], plain[UP])
        size = model_size(at(checkpoint))
        assert size is not None
        assert (source.streamed, size.streamed) == (False, False)
        out = tmp_path / "sparse"
        prune(PruneConfig(method="magnitude", pattern="2:4"), at(checkpoint), out)
        kept = load_file(out / "model.safetensors")[UP]
        assert torch.equal(kept, torch.where(kept == 0, 0.0, plain[UP]))
        assert (kept.view(-1, 4) != 0).sum(1).tolist() == [2] * (kept.numel() // 4)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_all_of_the_model_is_in_one_number_format(self, checkpoint: Path, dtype: str) -> None:
        """A float32 file whose configuration says bfloat16 gave a mixture, and exit 1 at the first linear."""
        self.store(checkpoint, 16, dtype="bfloat16")
        model = load_model(at(checkpoint, dtype))
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert logits(model).isfinite().all()

    @every_path
    def test_blocks_that_do_not_fill_a_weight_are_refused(self, load: Any, checkpoint: Path) -> None:
        """transformers 5.23 takes 48 + 16 columns in two blocks of 48 for two blocks of 32."""
        plain = self.store(checkpoint, 48)
        wrong = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
        assert not torch.allclose(wrong["model.layers.1.mlp.down_proj.weight"],
                                  plain["model.layers.1.mlp.down_proj.weight"], rtol=0.01)  # fmt: skip
        with pytest.raises(UsageError, match="FP8 blocks of 48 × 48 that do not fill it"):
            load(at(checkpoint))

    @every_path
    def test_a_scale_by_a_name_that_transformers_does_not_know(self, load: Any, checkpoint: Path) -> None:
        rewrite(checkpoint, as_fp8, quantization_config={"quant_method": "fp8", "activation_scheme": "static"})
        with pytest.raises(UsageError, match="is FP8 without a scale that transformers knows"):
            load(at(checkpoint))


def test_mxfp4_is_made_plain_and_saved_under_plain_names(build: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    build("GPT-OSS").save_pretrained(tmp_path / "mx")
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    name = "model.layers.0.mlp.experts.down_proj"
    numbers = torch.Generator().manual_seed(0)

    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(("down_proj", "gate_up_proj"))]:
            experts, inputs, outputs = tensors.pop(key).shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{key}_blocks"] = torch.randint(256, (*shape, 16), generator=numbers, dtype=torch.uint8)
            tensors[f"{key}_scales"] = torch.randint(120, 125, shape, generator=numbers, dtype=torch.uint8)

    stored = rewrite(tmp_path / "mx", change, quantization_config={"quant_method": "mxfp4"})
    loaded = load_model(at(tmp_path / "mx")).state_dict()[name]
    for expert, inner, output in [(0, 0, 0), (1, 33, 7), (3, 63, 31), (2, 10, 20)]:
        byte = int(stored[f"{name}_blocks"][expert, output, inner // 32, inner % 32 // 2])
        exponent = int(stored[f"{name}_scales"][expert, output, inner // 32]) - 127
        assert loaded[expert, inner, output] == table[byte >> 4 if inner % 2 else byte & 15] * 2.0**exponent
    source = open_blockwise(at(tmp_path / "mx"))
    with source.block(0):
        assert name in source.checkpoint_tensors(0)


COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}}},
}  # fmt: skip


@every_path
def test_compressed_tensors_names_the_package(load: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "is_installed", lambda name: False)
    rewrite(checkpoint, as_fp8, quantization_config=COMPRESSED)
    with pytest.raises(MissingError) as raised:
        load(at(checkpoint))
    assert str(raised.value.hint).startswith("pip install compressed-tensors")


def test_compressed_tensors_are_made_plain(checkpoint: Path) -> None:
    pytest.importorskip("compressed_tensors")
    stored = rewrite(checkpoint, as_fp8, quantization_config=COMPRESSED)
    expected = stored[UP].float() * stored[f"{UP}_scale"]
    assert torch.equal(load_model(at(checkpoint)).state_dict()[UP], expected)


@every_path
@pytest.mark.parametrize(("method", "message"), [("gptq", "is quantised .gptq."), ("fp8", "the files hold plain ones")])
def test_a_configuration_that_says_quantised(load: Any, method: str, message: str, checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: None, quantization_config={"quant_method": method})
    with pytest.raises(UsageError, match=message):
        load(at(checkpoint))


@every_path
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.",
                                    "_fsdp_wrapped_module."])  # fmt: skip
def test_names_that_a_wrapper_left_behind(load: Any, prefix: str, checkpoint: Path) -> None:
    def wrap(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    rewrite(checkpoint, wrap)
    first = prefix if prefix != "module._orig_mod." else "module."
    with pytest.raises(UsageError, match=f"its weights' names hold '{first}'") as raised:
        load(at(checkpoint))
    assert f"key.replace('{first}', '')" in str(raised.value.hint)


def test_the_way_out_of_wrapped_names_works(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    plain = load_file(file)
    rewrite(checkpoint, lambda tensors: [tensors.update({f"module.{name}": tensors.pop(name)}) for name in plain])
    with pytest.raises(UsageError) as raised:
        load_model(at(checkpoint))
    _, _, line = str(raised.value.hint).partition("Take it off: ")
    import safetensors

    exec(line.rstrip("."), {"safetensors": safetensors, "load_file": load_file, "FILE": file})
    assert logits(load_model(at(checkpoint))).isfinite().all()


def test_a_block_that_was_compiled_alone(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({UP.replace(".mlp", "._orig_mod.mlp"): tensors.pop(UP)}))
    with pytest.raises(UsageError, match=r"names hold '_orig_mod\.', which torch\.compile"):
        open_blockwise(at(checkpoint))


@every_path
def test_a_stale_file_beside_an_index(load: Any, checkpoint: Path, build: Callable[..., PreTrainedModel]) -> None:
    build(num_hidden_layers=3).save_pretrained(checkpoint, max_shard_size="20KB")  # leaves model.safetensors there
    assert (checkpoint / "model.safetensors").is_file()
    with pytest.raises(UsageError, match="holds two checkpoints") as raised:
        load(at(checkpoint))
    assert "Remove the one that is out of date" in str(raised.value.hint)
    (checkpoint / "model.safetensors").unlink()
    load(at(checkpoint))


@pytest.mark.parametrize("load", [load_model, open_blockwise])
def test_tensors_without_a_place_are_said(load: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration of fewer layers cuts a model without a word otherwise; so does attention_bias: false."""
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32), "model.layers.0.self_attn.rotary_emb.inv_freq":
            torch.ones(4)}  # fmt: skip
    rewrite(checkpoint, lambda tensors: tensors.update(bias))
    load(at(checkpoint))
    shown = " ".join(capsys.readouterr().err.split())
    assert (
        "1 tensors have no place in LlamaForCausalLM and are left out, first: model.layers.0.self_attn.q_proj.bias"
        in shown
    )
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.bias"), num_hidden_layers=2)
    load(at(checkpoint))
    assert "9 tensors have no place" in " ".join(capsys.readouterr().err.split())
