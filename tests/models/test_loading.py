"""Finding, fingerprinting, loading and refusing models."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lors_cli.errors import LorsError, MissingError, ResourceError, UsageError, translate
from lors_cli.files.records import StageRecord, publish, staging_dir
from lors_cli.machine.devices import resolve_device, set_seed
from lors_cli.models import loading
from lors_cli.models.blocks import decoder_blocks, model_max_length
from lors_cli.models.checks import load_error
from lors_cli.models.loading import load_config, load_model, load_tokenizer, resolve_dtype, save_checkpoint
from lors_cli.models.size import model_size
from lors_cli.models.sources import ModelSource, locate, model_fingerprint
from lors_cli.models.streaming import open_blockwise
from lors_cli.recipe.schema import ModelConfig

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama as a checkpoint folder."""
    path = tmp_path / "model"
    save_checkpoint(tiny_llama(), tiny_tokenizer, path)
    return path


def at(path: Path | str, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(path), **changes)


class TestLocate:
    def test_a_folder(self, folder: Path) -> None:
        assert locate(str(folder)) == ModelSource(folder=folder)
        assert locate(str(folder)).name_or_path == str(folder)

    def test_a_folder_in_the_home(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert locate("~/model") == ModelSource(folder=folder)

    def test_a_gguf_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        assert locate(str(tmp_path / "m.gguf")) == ModelSource(folder=tmp_path, gguf_file="m.gguf")

    def test_a_gguf_file_in_upper_case(self, tmp_path: Path) -> None:
        (tmp_path / "M.GGUF").write_bytes(b"GGUF")
        assert locate(str(tmp_path / "M.GGUF")) == ModelSource(folder=tmp_path, gguf_file="M.GGUF")

    @pytest.mark.parametrize("name", ["m-00001-of-00003.gguf", "m-00002-of-00003.GGUF"])
    def test_a_part_of_a_split_gguf(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(UsageError, match=r"is part \d of 3 of a split \.gguf") as raised:
            locate(str(tmp_path / name))
        assert "llama-gguf-split --merge m-00001-of-00003.gguf m.gguf" in str(raised.value.hint)
        (tmp_path / "m-00001-of-00001.gguf").write_bytes(b"GGUF")
        assert locate(str(tmp_path / "m-00001-of-00001.gguf")).gguf_file == "m-00001-of-00001.gguf"

    def test_a_folder_that_holds_a_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "M.GGUF").write_bytes(b"GGUF")
        with pytest.raises(MissingError) as raised:
            locate(str(tmp_path))
        assert str(raised.value.hint) == f"It holds M.GGUF: give that file, {tmp_path / 'M.GGUF'}."

    @pytest.mark.parametrize("name", ["gpt2", "meta-llama/Meta-Llama-3-8B", "org_1/model.v2"])
    def test_a_hub_id(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert locate(name) == ModelSource(repo=name)
        assert locate(name).name_or_path == name

    def test_a_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "some_weights"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "m.gguf").write_bytes(b"GGUF")
        monkeypatch.syspath_prepend(tmp_path)
        assert locate("package://some_weights/m.gguf") == ModelSource(folder=package, gguf_file="m.gguf")
        with pytest.raises(MissingError, match=r"has no other\.gguf; it has m\.gguf"):
            locate("package://some_weights/other.gguf")

    @pytest.mark.parametrize("name", [
        "/no/such", "./nothing", "../nothing", "~/nothing", "~nobody_at_all/x", "a/b/c", "with space", "nothing.gguf",
        "/no/such.gguf",
    ])  # fmt: skip
    def test_what_is_not_there(self, name: str) -> None:
        with pytest.raises(MissingError, match="No such model"):
            locate(name)

    def test_a_folder_without_a_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(MissingError, match=r"no config\.json"):
            locate(str(tmp_path))

    def test_another_file(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="is a file"):
            locate(str(folder / "model.safetensors"))

    @pytest.mark.parametrize("name", [
        "package://", "package://x", "package://x/y.bin", "package://x-y/z.gguf", "package://x/../z.gguf",
        "package://os//etc/z.gguf", "package://x/.gguf/",
    ])  # fmt: skip
    def test_a_malformed_package(self, name: str) -> None:
        with pytest.raises(UsageError, match="not of the form"):
            locate(name)

    @pytest.mark.parametrize("module", ["no_such_package_here", "sys", "__main__"])
    def test_a_package_that_is_none(self, module: str) -> None:
        with pytest.raises(MissingError, match=f"package {module} is not installed") as raised:
            locate(f"package://{module}/m.gguf")
        assert raised.value.exit_code == 3


class TestFingerprint:
    @staticmethod
    def age(folder: Path) -> None:
        """Make files look old, so that their hashes are remembered."""
        for file in folder.iterdir():
            os.utime(file, (1_700_000_000, 1_700_000_000))

    @pytest.mark.parametrize("old", [False, True])
    def test_it_follows_the_content(self, folder: Path, old: bool) -> None:
        if old:
            self.age(folder)
        before = model_fingerprint(at(folder))
        assert model_fingerprint(at(folder)) == before
        weights = folder / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        after = model_fingerprint(at(folder))
        assert after != before
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        assert model_fingerprint(at(folder)) == before

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_it_covers_configuration_and_tokenizer(self, folder: Path, name: str) -> None:
        before = model_fingerprint(at(folder))
        (folder / name).write_text((folder / name).read_text() + " ")
        assert model_fingerprint(at(folder)) != before

    def test_other_files_and_the_place_do_not_matter(self, folder: Path) -> None:
        before = model_fingerprint(at(folder))
        (folder / "notes.txt").write_text("hello")
        moved = folder.rename(folder.parent / "elsewhere")
        assert model_fingerprint(at(moved)) == before

    def test_dtype_and_revision_matter_and_the_device_does_not(self, folder: Path) -> None:
        assert model_fingerprint(at(folder, dtype="float32")) != model_fingerprint(at(folder))
        assert model_fingerprint(at(folder, device="cpu")) == model_fingerprint(at(folder))
        assert model_fingerprint(at("org/m", revision="a")) != model_fingerprint(at("org/m", revision="b"))
        assert model_fingerprint(at("org/m")) != model_fingerprint(at("org/n"))

    def test_a_revision_of_what_lies_here_is_told_of_once(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        snapshot = tmp_path / "models--org--m/snapshots/c0ffee"
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(folder)
        for config in (at(folder), at(folder, revision="v2"), at(snapshot, revision="c0ffee")):
            load_config(config)
            load_tokenizer(config)
        shown = capsys.readouterr().err
        assert shown.count("has no effect") == 1
        assert f"warning: revision: v2 has no effect: {folder} is read as it lies here" in shown

    def test_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"one")
        before = model_fingerprint(at(tmp_path / "m.gguf"))
        assert model_fingerprint(at(tmp_path / "m.gguf")) == before
        (tmp_path / "m.gguf").write_bytes(b"two")
        assert model_fingerprint(at(tmp_path / "m.gguf")) != before

    def test_a_stage_folder_answers_with_its_stage_until_it_is_touched(
        self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        out = tmp_path / "prune"
        save_checkpoint(tiny_llama(), tiny_tokenizer, staging_dir(out))
        publish(out, StageRecord("prune", "f" * 32, {}, {}, {}, {}, 0.0, {}))
        assert model_fingerprint(at(out)) == f"prune:{'f' * 32}:auto"
        (out / "notes.txt").touch()
        assert model_fingerprint(at(out)) == f"prune:{'f' * 32}:auto"
        added = set()
        for text in ("one", "two"):  # a tokenizer without a template is given one, and then another
            (out / "chat_template.jinja").write_text(text)
            added.add(model_fingerprint(at(out)))
        assert len(added) == 2
        assert all(found.startswith("folder:") for found in added)
        (out / "chat_template.jinja").unlink()
        weights = load_file(out / "model.safetensors")
        weights[UP][0, 0] += 1
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        assert model_fingerprint(at(out)).startswith("folder:")


class TestDtypeAndDevice:
    @pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
    def test_a_named_dtype_is_taken(self, name: str) -> None:
        config = at("x", dtype=name)
        assert resolve_dtype(config, torch.float32, torch.device("cpu")) == getattr(torch, name)

    @pytest.mark.parametrize(("stored", "device", "fast", "expected"), [
        (torch.float32, "cpu", False, torch.float32),
        (torch.float32, "cuda", True, torch.float32),
        (torch.bfloat16, "cpu", True, torch.bfloat16),
        (torch.bfloat16, "cpu", False, torch.float32),
        (torch.float16, "cpu", True, torch.bfloat16),
        (torch.float16, "cpu", False, torch.float32),
        (torch.float16, "cuda", False, torch.float16),
        (torch.bfloat16, "cuda", False, torch.bfloat16),
        (None, "cuda", False, torch.bfloat16),
        (None, "cpu", True, torch.bfloat16),
        (None, "cpu", False, torch.float32),
    ])  # fmt: skip
    def test_auto(
        self,
        stored: torch.dtype | None,
        device: str,
        fast: bool,
        expected: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: fast)
        assert resolve_dtype(at("x"), stored, torch.device(device)) == expected

    def test_auto_is_the_files_own_where_the_configuration_says_none(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Float32 weights were loaded as bfloat16."""
        monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
        settings = json.loads((folder / "config.json").read_text())
        del settings["dtype"]
        (folder / "config.json").write_text(json.dumps(settings))
        assert load_model(at(folder, device="cpu")).dtype == open_blockwise(at(folder)).network.dtype == torch.float32
        assert model_size(at(folder, device="cpu")).bytes_a_weight == 4  # type: ignore[union-attr]
        assert "loaded in" not in capsys.readouterr().err
        half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
        assert load_model(at(folder, device="cpu")).dtype == torch.bfloat16
        assert "weights are stored in float16 and loaded in bfloat16" in capsys.readouterr().err

    def test_a_device_that_is_not_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
        for name in ("cuda", "cuda:1", "mps"):
            with pytest.raises(UsageError, match=f"device: {name}"):
                resolve_device(name)

    def test_a_numbered_gpu_is_the_current_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton launches on the current GPU, whatever the tensors' own is."""
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        assert resolve_device("cuda:1") == torch.device("cuda:1")
        assert resolve_device("cpu") == torch.device("cpu")
        assert current == [torch.device("cuda:1")]
        with pytest.raises(UsageError, match="there is no cuda:2 here, torch sees 2 GPUs"):
            resolve_device("cuda:2")


class TestLoadModel:
    def test_it_is_ready_for_inference(self, folder: Path) -> None:
        model = load_model(at(folder))
        assert not model.training
        assert model.dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in model.parameters())
        expected = tiny_llama().state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
        assert torch.is_grad_enabled()

    def test_dtype(self, folder: Path) -> None:
        assert load_model(at(folder, dtype="bfloat16")).dtype == torch.bfloat16

    def damage(self, folder: Path, how: str) -> None:
        weights = folder / "model.safetensors"
        tensors, content = load_file(weights), weights.read_bytes()
        weights.unlink()
        if how == "truncated":
            weights.write_bytes(content[: len(content) // 2])
        elif how == "empty":
            weights.touch()
        elif how == "junk":
            weights.write_bytes(os.urandom(1000))
        elif how == "missing keys":
            del tensors[UP]
            save_file(tensors, weights, metadata={"format": "pt"})
        elif how == "wrong shape":
            save_file({**tensors, UP: torch.zeros(3, 5)}, weights, metadata={"format": "pt"})
        elif how == "pickle":
            torch.save(tensors, folder / "pytorch_model.bin")
        elif how == "missing shard":
            index = {"metadata": {}, "weight_map": {UP: "model-00001-of-00002.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    @pytest.mark.parametrize(("how", "message"), [
        ("truncated", "the checkpoint cannot be loaded"),
        ("empty", "the checkpoint cannot be loaded"),
        ("junk", "the checkpoint cannot be loaded"),
        ("missing keys", f"1 weights are missing or of the wrong shape, first: {UP}"),
        ("wrong shape", f"1 weights are missing or of the wrong shape, first: {UP}"),
        ("pickle", "Only safetensors are read"),
        ("no weights", "Only safetensors are read"),
        ("missing shard", "model-00001-of-00002"),
    ])  # fmt: skip
    def test_damaged_weights(self, folder: Path, how: str, message: str) -> None:
        self.damage(folder, how)
        with pytest.raises(UsageError) as raised:
            load_model(at(folder))
        assert message in str(raised.value)
        assert str(folder) in str(raised.value)
        assert raised.value.exit_code == 2

    def test_a_pickle_is_not_even_opened(self, folder: Path) -> None:
        marker = folder / "opened"

        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (marker,)

        self.damage(folder, "pickle")
        torch.save({UP: Trap()}, folder / "pytorch_model.bin")
        with pytest.raises(UsageError):
            load_model(at(folder))
        assert not marker.exists()

    @pytest.mark.parametrize("content", ["{bad", "[]", "{}", '{"model_type": "no_such_model"}', '{"model_type": "t5"}'])
    def test_a_broken_configuration(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(UsageError, match=str(folder)):
            load_model(at(folder))

    @pytest.mark.parametrize("content", [b"", b"GGUF junk", b"no gguf file at all, but longer than a header is"])
    @pytest.mark.parametrize("load", [load_model, load_tokenizer], ids=["model", "tokenizer"])
    def test_a_broken_gguf(self, tmp_path: Path, content: bytes, load: Any) -> None:
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(UsageError, match=r"m\.gguf"):
            load(at(tmp_path / "m.gguf"))

    @pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
    def test_a_hub_id_without_a_network(self, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants as hub

        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Exception) as raised:  # noqa: PT011 (LorsError, or what translate makes one)
            load(at("no-such-org/no-such-model"))
        found = translate(raised.value)
        assert isinstance(found, MissingError)

    def test_full_memory_and_disk_stay_what_they_are(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import transformers

        def full(*_: Any, **__: Any) -> None:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
        with pytest.raises(ResourceError, match="memory"):
            load_model(at(folder))


class TestLoadTokenizer:
    def test_as_saved(self, folder: Path) -> None:
        tokenizer = load_tokenizer(at(folder))
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
        assert tokenizer("ab").input_ids == [97, 98]

    def test_without_pad_it_gets_eos(self, folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["pad_token"]
        file.write_text(json.dumps(settings))
        assert load_tokenizer(at(folder)).pad_token_id == 257

    def test_without_eos(self, folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in settings.items() if not key.endswith("_token")}))
        with pytest.raises(UsageError, match="no EOS token"):
            load_tokenizer(at(folder))

    def test_a_sentencepiece_model_alone(self, folder: Path) -> None:
        """It was called "no such folder", though the folder is there."""
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
        edit = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**edit, "tokenizer_class": "LlamaTokenizer"}))
        if importlib.util.find_spec("sentencepiece") or importlib.util.find_spec("tiktoken"):
            pytest.skip("what reads it is installed")
        with pytest.raises(MissingError, match=r"tokenizer\.model, which needs the package sentencepiece") as raised:
            load_tokenizer(at(folder))
        assert str(raised.value.hint).startswith("pip install sentencepiece protobuf")

    def test_a_package_that_is_missing_is_no_missing_folder(self, folder: Path) -> None:
        error = load_error(str(folder), "its tokenizer", ModuleNotFoundError("No module named 'x'", name="x"))
        assert isinstance(error, MissingError)
        assert "no such folder" not in str(error)
        assert error.hint == "pip install x"

    @pytest.mark.parametrize("broken", ["none", "tokenizer.json", "tokenizer_config.json"])
    def test_none_or_broken(self, folder: Path, broken: str) -> None:
        if broken == "none":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        else:
            (folder / broken).write_text("{")
        with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
            load_tokenizer(at(folder))


class TestBlocks:
    def test_they_are_found_with_their_prefix(self) -> None:
        model = tiny_llama()
        prefix, blocks = decoder_blocks(model)
        assert prefix == "model.layers"
        assert blocks is model.model.layers

    def test_one_block_is_enough(self) -> None:
        prefix, blocks = decoder_blocks(tiny_llama(num_hidden_layers=1))
        assert (prefix, len(blocks)) == ("model.layers", 1)

    def test_the_largest_list_of_the_right_length_is_taken(self) -> None:
        model = tiny_llama()
        model.adapters = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        assert decoder_blocks(model)[0] == "model.layers"

    def test_no_blocks(self) -> None:
        model = tiny_llama()
        model.model.layers = nn.ModuleList([model.model.layers[0], nn.Identity()])
        with pytest.raises(UsageError, match="LlamaForCausalLM is not supported"):
            decoder_blocks(model)

    def test_an_encoder_works_through_the_same_search(self) -> None:
        config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                            intermediate_size=64, is_decoder=True)  # fmt: skip
        assert decoder_blocks(BertLMHeadModel(config))[0] == "bert.encoder.layer"


def test_a_saved_checkpoint_loads_bit_for_bit(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for tied in (False, True):
        model = tiny_llama(tie_word_embeddings=tied).bfloat16()
        save_checkpoint(model, tiny_tokenizer, tmp_path / str(tied))
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / str(tied), dtype="auto")
        assert loaded.dtype == torch.bfloat16
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name])


def test_model_max_length() -> None:
    assert model_max_length(tiny_llama()) == model_max_length(tiny_llama().config) == 64


def test_set_seed_reaches_every_generator() -> None:
    import random

    import numpy

    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(1))

    set_seed(3)
    first = draw()
    set_seed(3)
    assert draw() == first
    set_seed(4)
    assert all(new != old for new, old in zip(draw(), first, strict=True))


def test_every_refusal_is_one_message() -> None:
    for name in ("/no/such", "package://x", "package://no_such_package_here/m.gguf"):
        with pytest.raises(LorsError) as raised:
            locate(name)
        assert "\n" not in raised.value.message


def test_a_half_published_folder_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".publishing.json").write_text("[]")
    with pytest.raises(MissingError, match="half written"):
        locate(str(tmp_path))


def test_a_run_folder_and_an_adapter_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "config.json").write_text("{}")
    with pytest.raises(MissingError) as run:
        locate(str(tmp_path))
    assert "run folder" in str(run.value)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingError) as adapter:
        locate(str(tmp_path / "adapter"))
    assert "lors merge" in str(adapter.value)


def test_the_tokenizer_is_part_of_a_stages_fingerprint(tmp_path: Path) -> None:
    from lors_cli.files import records

    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (records.staging_dir(tmp_path) if name == "config.json" else tmp_path / records.STAGING_NAME).joinpath(
            name
        ).write_text("{}")
    records.publish(tmp_path, records.StageRecord("prune", "f", {}, {}, {}, {}, 1.0, {}))
    config = ModelConfig(path=str(tmp_path))
    before = model_fingerprint(config)
    assert before.startswith("prune:f:")
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert model_fingerprint(config) != before


def test_loading_and_writing_are_counted(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    from lors_cli.output import progress

    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    monkeypatch.setenv("LORS_HEARTBEAT_S", "1e-9")
    config = ModelConfig(path=str(workshop / "dense"))
    model = load_model(config)
    save_checkpoint(model, load_tokenizer(config), tmp_path)
    shown = capsys.readouterr().err
    num_weights = len(model.state_dict())
    assert f"loading: {num_weights}/{num_weights} weights" in shown
    assert "writing: 1/1 files" in shown
    assert logging.set_tqdm_hook(None) is None  # the hook of transformers is free again


def test_a_broken_load_ends_its_bar() -> None:
    from transformers.utils import logging

    from lors_cli.models.quiet import library_bars

    def load() -> None:
        with library_bars("loading", "weights"):
            for _ in logging.tqdm([1, 2, 3]):
                raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        load()
    assert logging.set_tqdm_hook(None) is None


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_token_is_added_or_not_and_saved_so(add_bos_token: bool, shared_dir: Path, tmp_path: Path) -> None:
    from lors_cli.data.tokenising import begin_tokens
    from lors_cli.models.sources import model_fingerprint

    path = str(shared_dir / "data/models/stories260k")
    plain, told = ModelConfig(path=path), ModelConfig(path=path, add_bos_token=add_bos_token)
    tokenizer = loading.load_tokenizer(told)
    assert (
        tokenizer("The cat").input_ids == [1] * add_bos_token + tokenizer("The cat", add_special_tokens=False).input_ids
    )
    assert begin_tokens(tokenizer) == [1] * add_bos_token
    assert model_fingerprint(told) == f"{model_fingerprint(plain)}:bos={str(add_bos_token).lower()}"
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(path) / name).read_bytes())
    assert begin_tokens(loading.load_tokenizer(ModelConfig(path=str(tmp_path)))) == [1] * add_bos_token
