"""Checkpoints read block by block, and files written tensor by tensor, against transformers' and safetensors' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from lors_cli.errors import UsageError
from lors_cli.models.loading import load_model
from lors_cli.models.stored import match
from lors_cli.models.streaming import BlockwiseModel, open_blockwise
from lors_cli.models.tensor_files import Entry, TensorWriter, saved_tensors, write_checkpoint, write_tensors
from lors_cli.recipe.schema import ModelConfig

Build = Callable[..., PreTrainedModel]


def checkpoint_of(source: BlockwiseModel) -> dict[str, torch.Tensor]:
    """Every tensor as it would be written."""
    tensors = {entry.name: load() for entry, load in source.outer_tensors()}
    for index in range(len(source.blocks)):
        with source.block(index):
            tensors.update({name: tensor.clone() for name, tensor in source.checkpoint_tensors(index).items()})
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_weights_are_those_of_the_whole_model(
    architecture: str, dtype: str, build: Build, tmp_path: Path
) -> None:
    build(architecture).save_pretrained(tmp_path / "dense")
    config = ModelConfig(path=str(tmp_path / "dense"), dtype=dtype)  # type: ignore[arg-type]
    whole, source = load_model(config), open_blockwise(config)
    assert source.streamed
    assert all(parameter.is_meta for parameter in source.network.parameters())
    for (name, expected), buffer in zip(whole.named_buffers(), source.network.buffers(), strict=True):
        assert buffer.dtype == expected.dtype, name
        assert torch.equal(buffer, expected), name
    expected = whole.state_dict()
    for index in range(len(source.blocks)):
        with source.block(index) as block:
            for name, tensor in block.state_dict().items():
                assert torch.equal(tensor, expected[f"{source.prefix}.{index}.{name}"]), name
        assert all(parameter.is_meta for parameter in source.network.parameters())

    whole.save_pretrained(tmp_path / "saved")
    saved, streamed = load_file(tmp_path / "saved" / "model.safetensors"), checkpoint_of(source)
    assert saved.keys() == streamed.keys()
    for name, tensor in saved.items():
        assert streamed[name].dtype == tensor.dtype
        assert torch.equal(streamed[name], tensor), name


@pytest.mark.parametrize("architecture", ["Llama", "OPT", "GPT-2", "Gemma3"])
def test_embeddings_are_there_only_for_a_while(architecture: str, build: Build, tmp_path: Path) -> None:
    model = build(architecture)
    model.save_pretrained(tmp_path)
    source = open_blockwise(ModelConfig(path=str(tmp_path), dtype="float32"))
    with source.embeddings():
        assert torch.equal(source.network.get_input_embeddings().weight, model.get_input_embeddings().weight)
        assert all(parameter.is_meta for parameter in source.blocks.parameters())
    assert all(parameter.is_meta for parameter in source.network.parameters())


def test_a_tied_head_is_written_once(build: Build, tmp_path: Path) -> None:
    build(tie_word_embeddings=True).save_pretrained(tmp_path)
    source = open_blockwise(ModelConfig(path=str(tmp_path), dtype="float32"))
    names = checkpoint_of(source).keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    head_alone = load_file(tmp_path / "model.safetensors")
    head_alone["lm_head.weight"] = head_alone.pop("model.embed_tokens.weight")
    save_file(head_alone, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = open_blockwise(ModelConfig(path=str(tmp_path), dtype="float32"))
    assert torch.equal(checkpoint_of(again)["model.embed_tokens.weight"], head_alone["lm_head.weight"])


def test_shards_are_read(build: Build, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    source = open_blockwise(ModelConfig(path=str(tmp_path), dtype="float32"))
    streamed, expected = checkpoint_of(source), model.state_dict()
    assert all(torch.equal(streamed[name], expected[name]) for name in streamed)


class TestMatch:
    """By names alone: no network, no files; `state` has something for every tensor of the network."""

    state = dict.fromkeys(["model.norm.weight", "model.experts.gate_up_proj", "lm_head.weight"], 1)

    def test_a_key_goes_by_its_own_name(self) -> None:
        found = match(["lm_head.weight", "model.norm.weight"], self.state, [], "model")
        assert found == {
            "lm_head.weight": [("lm_head.weight", False)],
            "model.norm.weight": [("model.norm.weight", False)],
        }

    def test_the_base_models_prefix_is_added_and_strangers_are_left_out(self) -> None:
        assert match(["norm.weight", "rotary.inv_freq"], self.state, [], "model") == {
            "model.norm.weight": [("norm.weight", False)]
        }

    def test_renamed_and_joined(self) -> None:
        conversions = [
            WeightRenaming("ln_f", "norm"),
            WeightRenaming("unused", "norm"),
            WeightConverter(
                ["experts.*.w1.weight", "experts.*.w3.weight"], "experts.gate_up_proj",
                [MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
        ]  # fmt: skip
        joined = [f"model.experts.{number}.{key}.weight" for number in (0, 1) for key in ("w1", "w3")]
        assert match([*joined, "model.ln_f.weight"], self.state, conversions, "model") == {
            "model.experts.gate_up_proj": [(key, True) for key in joined],
            "model.norm.weight": [("model.ln_f.weight", False)],
        }
        assert [item.was_used() for item in conversions] == [True, False, True]

    def test_a_conversion_that_leads_out_of_the_network_is_not_followed(self) -> None:
        conversions = [WeightRenaming("lm_head", "head")]
        assert match(["lm_head.weight"], self.state, conversions, "model") == {
            "lm_head.weight": [("lm_head.weight", False)]
        }


class TestRefusals:
    @pytest.fixture
    def folder(self, build: Build, tmp_path: Path) -> Path:
        build().save_pretrained(tmp_path)
        return tmp_path

    def open(self, folder: Path) -> BlockwiseModel:
        return open_blockwise(ModelConfig(path=str(folder), dtype="float32"))

    def rewrite(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def test_a_missing_weight(self, folder: Path) -> None:
        self.rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight") is None)
        with pytest.raises(UsageError, match=r"1 weights are missing .* first: model\.layers\.1\.mlp\.up_proj\.weight"):
            self.open(folder)

    def test_a_weight_of_another_shape(self, folder: Path) -> None:
        self.rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
        with pytest.raises(UsageError, match=r"wrong shape, first: model\.norm\.weight"):
            self.open(folder)

    def test_pickled_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UsageError, match=r"has no model\.safetensors"):
            self.open(folder)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
    def test_an_index_that_leaves_the_folder(self, folder: Path, name: str) -> None:
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UsageError, match="which is not in the checkpoint's folder"):
            self.open(folder)

    @pytest.mark.parametrize("found", ["</s>", [2, "</s>"], 2.5, True])
    def test_a_special_token_that_is_no_number(self, found: object, folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": found}))
        source = ModelConfig(path=str(folder), dtype="float32")
        for load in (open_blockwise, load_model):
            with pytest.raises(UsageError, match=r"generation_config\.json has .* as eos_token_id"):
                load(source)

    def test_a_truncated_file(self, folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(UsageError, match="cannot be loaded"):
            self.open(folder)


TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "scalar": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
}


class TestTensorFiles:
    def test_safetensors_reads_what_is_written(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "x.safetensors", {**TENSORS, "turned": TENSORS["a"].T}, {"format": "pt"})
        read = load_file(tmp_path / "x.safetensors")
        assert read.keys() == {*TENSORS, "turned"}
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
        assert torch.equal(read["turned"], TENSORS["a"].T)
        assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
        again = {entry.name: load() for entry, load in saved_tensors(tmp_path / "x.safetensors")}
        assert all(torch.equal(again[name], tensor) for name, tensor in TENSORS.items())

    def test_nothing_appears_before_the_end(self, tmp_path: Path) -> None:
        writer = TensorWriter(tmp_path / "x.safetensors", [Entry.of("a", TENSORS["a"])])
        with pytest.raises(AssertionError, match="a was not written"):
            writer.finish()
        writer.write("a", TENSORS["a"])
        assert not (tmp_path / "x.safetensors").exists()
        writer.finish()
        assert (tmp_path / "x.safetensors").exists()

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(TensorWriter, "write", full)
        with pytest.raises(OSError, match="No space"):
            write_tensors(tmp_path / "x.safetensors", TENSORS)
        assert list(tmp_path.iterdir()) == []

    def test_large_checkpoints_are_sharded(self, tmp_path: Path) -> None:
        tensors = {f"w{index}": torch.full((100,), float(index)) for index in range(5)}
        entries = [(Entry.of(name, tensor), lambda tensor=tensor: tensor) for name, tensor in tensors.items()]
        write_checkpoint(tmp_path, entries, max_shard_size="1KB")
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 5 * 400
        assert len(set(index["weight_map"].values())) == 3
        for name, file in index["weight_map"].items():
            assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
