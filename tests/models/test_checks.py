"""Broken and hostile checkpoints: each is refused in words, and nothing of it is run, waited for or read elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lors_cli.bench.model import sparse_model
from lors_cli.errors import ResourceError, UsageError
from lors_cli.models.checks import check_size, check_vocabulary, load_error, loading, safetensors_files
from lors_cli.models.loading import load_config, load_model, load_tokenizer
from lors_cli.models.sources import locate, model_fingerprint
from lors_cli.models.streaming import open_blockwise
from lors_cli.recipe.schema import ModelConfig

LOADERS = (load_model, open_blockwise)


@pytest.fixture
def model(at_workshop: Path) -> Path:
    """A copy of the workshop's model, in the current folder."""
    shutil.copytree("dense", "model")
    return Path("model")


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", dtype="float32")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.write_text, (Path("unpickled"), "x"))


def for_bench(config: ModelConfig) -> Any:
    return sparse_model(None, config.path, None, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("load", [*LOADERS, for_bench])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_not_read(model: Path, load: Callable[[ModelConfig], Any], name: str) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Trap(), model / name)
    with pytest.raises(UsageError) as raised:
        load(config_of(model))
    assert "save_pretrained" in str(raised.value)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("shard", ["../dense/model.safetensors", "sub/model.safetensors", "..", "", "a\0.safetensors",
                                   None, 3, "pytorch_model.bin", "x" * 300 + ".safetensors"])  # fmt: skip
@pytest.mark.parametrize("load", LOADERS)
def test_an_index_that_leads_elsewhere(model: Path, load: Callable[[ModelConfig], Any], shard: Any) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    torch.save(Trap(), model / "pytorch_model.bin")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(UsageError, match="which is not in the checkpoint's folder"):
        load(config_of(model))
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"weight_map": []}', "[" * 100_000, "\0"])
def test_a_broken_index(model: Path, content: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UsageError, match="is no index of a checkpoint"):
        safetensors_files(model, "model")


def test_an_index_of_nothing(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(UsageError, match="names no file"):
        safetensors_files(model, "model")


@pytest.mark.parametrize("load", [load_config, load_tokenizer, *LOADERS])
def test_a_models_own_code_is_not_run_and_nobody_is_asked(
    model: Path, load: Callable[[ModelConfig], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_question(prompt: str = "") -> str:
        raise AssertionError(prompt)

    monkeypatch.setattr("builtins.input", no_question)
    (model / "own.py").write_text("open('executed', 'w')\n")
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"})
    edit(model / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.C", None]})
    with pytest.raises(UsageError, match="needs Python code that comes with the model"):
        load(config_of(model))
    assert not Path("executed").exists()


def test_code_beside_a_known_architecture_is_left_out(model: Path, tmp_path: Path) -> None:
    (model / "own.py").write_text("open('executed', 'w')\n")
    edit(model / "config.json", auto_map={"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"})
    loaded = load_model(config_of(model))
    assert type(loaded).__name__ == "LlamaForCausalLM"
    loaded.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not hasattr(load_config(config_of(model)), "auto_map")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model.safetensors"])
def test_pipes_and_devices_are_refused_at_once(model: Path, name: str) -> None:
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (model / name).unlink()
        put(model / name)
        with pytest.raises(UsageError, match=f"{name} is no file that can be read"):
            model_fingerprint(config_of(model))


def test_an_adapter_in_the_folder_does_not_lead_to_its_base(model: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "dense", "r": 1, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UsageError, match="holds an adapter beside the model"):
        locate("model")


@pytest.mark.parametrize(("key", "value"), [
    ("max_position_embeddings", "\0"), ("hidden_size", None), ("num_attention_heads", 0), ("hidden_act", "nonsense"),
    ("num_hidden_layers", 10**6), ("num_hidden_layers", -1), ("hidden_size", 10**7), ("vocab_size", 10**9),
    ("intermediate_size", 10**18), ("dtype", "nonsense"), ("rope_parameters", 3),
])  # fmt: skip
def test_values_in_config_json_that_no_model_has(model: Path, key: str, value: Any) -> None:
    edit(model / "config.json", **{key: value})
    for load in LOADERS:
        with pytest.raises((UsageError, ResourceError)) as raised:
            load(config_of(model))
        assert "\n" not in raised.value.message


def test_sizes_are_held_against_the_files(model: Path) -> None:
    settings = load_config(config_of(model))
    check_size(settings, model, "model")
    settings.hidden_size = 1_000_000
    with pytest.raises(UsageError, match=r"at least .* weights; its files hold [\d,]+ bytes"):
        check_size(settings, model, "model")
    (model / "model.safetensors").unlink()
    check_size(settings, model, "model")  # without files there is nothing to compare


def test_a_tokenizer_of_a_larger_vocabulary(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token: number + 3 for token, number in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        added["id"] += 3
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"its tokenizer has '.*' as 258, and the model knows ids below 258 only"):
        load_tokenizer(config_of(model))


def test_added_tokens_beyond_the_embedding_are_let_be_but_not_used_to_pad(tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 259
    check_vocabulary(tokenizer, 258, "model")
    assert tokenizer.beyond_embedding == {258: "<image>", 259: "<pad>"}
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 257
    with pytest.raises(UsageError, match="'</s>' as 257"):
        check_vocabulary(tokenizer, 257, "model")


def test_every_command_names_an_added_token_without_an_embedding(model: Path, lors: Callable[..., Any]) -> None:
    """An IndexError, exit 1, where a text spelt the token out."""
    tokenizer = load_tokenizer(config_of(model))
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(model)
    assert lors("prune", "model", "--out", "sparse", "method=magnitude").exit_code == 0
    for name in ("text.jsonl", "rows.jsonl"):
        Path(name).write_text(Path(name).read_text().replace("fox", "<image>").replace("say", "<image>"))
    Path("tune.yaml").write_text("data: {dataset: rows.jsonl}\n")
    tune = ("tune", "sparse", "--out", "tuned", "rank=2", "max_steps=1", "batch_size=2", "data.max_length=128")
    commands: list[tuple[str, ...]] = [
        ("prune", "model", "--out", "out", "--method", "wanda", "--calibration", "text.jsonl",
         "calibration.num_samples=2", "calibration.sequence_length=64"),
        ("eval", "model", "--out", "eval", "tasks=[]", "perplexity=[text.jsonl]", "perplexity_length=64"),
        (*tune, "--dataset", "rows.jsonl"), (*tune, "--dataset", "text.jsonl"),
        (*tune, "--dataset", "text.jsonl", "data.stream=on"),
        ("data", "show", "tune.yaml", "--model", "model"),
    ]  # fmt: skip
    for command in commands:
        result = lors(*command)
        assert result.exit_code == 2, (command, result.output)
        assert "'<image>', token 258, which the tokenizer has and the model has no embedding for" in " ".join(
            result.output.split()
        )


def test_whatever_transformers_raises_is_the_files_fault() -> None:
    class PanicException(BaseException):
        """As pyo3 names its own."""

    for error in (IndexError("x"), AssertionError(), RecursionError("deep"), PanicException("rust")):
        with pytest.raises(UsageError, match=r"^model: the checkpoint cannot be loaded"):
            with loading("model", "the checkpoint"):
                raise error
    with pytest.raises(KeyboardInterrupt), loading("model", "the checkpoint"):
        raise KeyboardInterrupt
    with pytest.raises(ResourceError), loading("model", "the checkpoint"):
        raise MemoryError
    assert isinstance(load_error("model", "x", ValueError("pass trust_remote_code=True")), UsageError)


def test_a_header_that_lies_about_its_length(model: Path) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    for lie in (0, 1, 2**31, 2**64 - 1):
        path.write_bytes(lie.to_bytes(8, "little") + content[8:])
        for load in LOADERS:
            with pytest.raises(UsageError, match="the checkpoint cannot be loaded"):
                load(config_of(model))


def test_weights_that_are_no_floats(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="no number format of weights"):
        open_blockwise(config_of(model))
