"""Packing checkpoints: what is packed, that nothing is lost, and that transformers loads them in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import made_sparse, pack, quantised, same, unpack
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.models import tensor_files
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.inspection import inspect
from lors_cli.models.loading import load_model
from lors_cli.models.packed.checkpoint import Checkpoint, unpack_model
from lors_cli.models.packed.linear import PackedLinear
from lors_cli.models.packed.stage import pack_model
from lors_cli.output.console import gib
from lors_cli.pruning.stage import prune
from lors_cli.recipe.packing import PackConfig
from lors_cli.recipe.schema import ModelConfig, PruneConfig
from lors_cli.sparsity import Pattern, keep_largest
from lors_cli.tuning.loading import load

LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def sparse(checkpoint: Path) -> Path:
    return made_sparse(checkpoint)


def test_a_model_whose_base_is_a_file_is_packed(checkpoint: Path, tmp_path: Path) -> None:
    prune(PruneConfig(method="magnitude", pattern="2:4"), ModelConfig(path=str(checkpoint)), tmp_path / "sparse")
    record = json.loads((tmp_path / "sparse/stage.json").read_text())
    (tmp_path / "m.gguf").touch()
    record["inputs"]["path"] = str(tmp_path / "m.gguf")
    (tmp_path / "sparse/stage.json").write_text(json.dumps(record))
    assert pack(tmp_path / "sparse", tmp_path / "packed").stage == "pack"


def test_a_packed_model_loads_in_one_line_and_gives_the_same_logits(sparse: Path, tmp_path: Path) -> None:
    record = pack(sparse, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(model.get_submodule(LAYERS[0]), PackedLinear)
    tokens = torch.arange(2, 22).view(2, 10)
    dense = AutoModelForCausalLM.from_pretrained(sparse)
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
    assert record.metrics["pattern"] == "2:4"
    assert record.metrics["bytes"] < record.metrics["bytes_before"]
    there = sum(tensor.nbytes for tensor in load_file(tmp_path / "packed/model.safetensors").values())
    assert record.metrics["bytes"] == there


@pytest.mark.parametrize(("pattern", "expected"), [("2:4", "2:4"), ("4:8", "4:8"), ("unstructured", "unstructured")])
def test_unpacking_gives_the_files_tensors_back_bit_for_bit(
    checkpoint: Path, tmp_path: Path, pattern: str, expected: str
) -> None:
    sparse = made_sparse(checkpoint, Pattern.parse(pattern, 0.6 if pattern == "unstructured" else None))
    assert pack(sparse, tmp_path / "packed").metrics["pattern"] == expected
    unpack(tmp_path / "packed", tmp_path / "plain")
    same(sparse, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert (tmp_path / "plain/tokenizer.json").read_bytes() == (sparse / "tokenizer.json").read_bytes()


def test_what_a_family_keeps_in_float32_stays_so(
    build: Callable[..., PreTrainedModel], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    build("GPT-OSS", vocab_size=258).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    folder = made_sparse(tmp_path / "dense")
    source = ModelConfig(path=str(folder), dtype="float16")
    pack_model(PackConfig(), source, tmp_path / "packed")
    unpack_model(Checkpoint(replace(source, path=str(tmp_path / "packed")), packed=True), tmp_path / "plain")
    for name in ("packed", "plain"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found["model.layers.0.input_layernorm.weight"].dtype == torch.float32
        assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float16


def test_saving_and_loading_again_gives_equal_tensors(sparse: Path, tmp_path: Path) -> None:
    pack(sparse, tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("packed", "again")
    ]
    assert said[0] == said[1]


def test_dequantize_makes_plain_linears_at_loading_and_later(sparse: Path, tmp_path: Path) -> None:
    pack(sparse, tmp_path / "packed")
    model = load_model(ModelConfig(path=str(tmp_path / "packed")))
    later = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize()
    before = load_file(sparse / "model.safetensors")
    for found in (model, later):
        assert not hasattr(found.config, "quantization_config")
        for name in LAYERS:
            assert type(found.get_submodule(name)) is torch.nn.Linear
            assert torch.equal(found.get_submodule(name).weight, before[f"{name}.weight"])


def test_without_the_import_loading_fails_and_gives_no_random_weights(sparse: Path, tmp_path: Path) -> None:
    pack(sparse, tmp_path / "packed")
    pack(quantised(sparse), tmp_path / "codes")
    library = "from transformers import AutoModelForCausalLM as A\n"
    before = (
        "for folder in ('packed', 'codes'):\n"
        "    try: A.from_pretrained(folder)\n"
        "    except Exception as error: print(folder, 'ignore_mismatched_sizes' in str(error))\n"
    )
    loaded = "for folder in ('packed', 'codes'): print(type(A.from_pretrained(folder)).__name__)\n"
    refusals = ["packed True", "codes True"]
    for code, said in ((library + before + "import lors_cli\n", refusals), ("import lors_cli\n" + library, [])):
        done = subprocess.run([sys.executable, "-c", code + loaded], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [*said, "LlamaForCausalLM", "LlamaForCausalLM"]


def test_lors_takes_a_packed_model_for_what_was_packed(sparse: Path, tmp_path: Path) -> None:
    pack(sparse, tmp_path / "packed")
    (tmp_path / "packed/stage.json").unlink()  # another's packed model
    models = [load_model(ModelConfig(path=str(path))) for path in (sparse, tmp_path / "packed")]
    plain, packed = (prunable_weights(model) for model in models)
    assert all(torch.equal(plain[name].matrix, packed[name].matrix) for name in plain)
    found = [inspect(ModelConfig(path=str(path))) for path in (sparse, tmp_path / "packed")]
    sizes = found[1].pop("packed")
    assert found[0] == found[1]
    files = [load_file(path / "model.safetensors") for path in (tmp_path / "packed", sparse)]
    assert sizes == dict(
        zip(("bytes", "bytes_plain"), (sum(tensor.nbytes for tensor in file.values()) for file in files), strict=True)
    )


def test_layers_with_few_zeros_stay_dense_and_dense_models_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="is dense"):
        pack(checkpoint, tmp_path / "packed")
    made_sparse(checkpoint, spare="layers.1.")
    record = pack(checkpoint, tmp_path / "packed")
    assert record.metrics["left_dense"]
    assert all(name.startswith("model.layers.1.") for name in record.metrics["left_dense"])
    assert "with too few zeros stay dense, first model.layers.1." in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(model.get_submodule(LAYERS[0]), PackedLinear)
    assert type(model.get_submodule(LAYERS[1])) is torch.nn.Linear


def test_many_more_zeros_than_a_pattern_asks_for_are_packed_unstructured(checkpoint: Path, tmp_path: Path) -> None:
    made_sparse(checkpoint)
    made_sparse(checkpoint, Pattern.parse("unstructured", 0.8))
    record = pack(checkpoint, tmp_path / "packed")
    assert record.metrics["pattern"] == "unstructured"
    nonzeros = sum(int((load_file(checkpoint / "model.safetensors")[f"{name}.weight"] != 0).sum())
                   for name in (layer["name"] for layer in record.metrics["layers"]))  # fmt: skip
    settings = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert sum(settings["modules"].values()) == nonzeros


def test_what_is_packed_or_plain_already_is_said_to_be_so(sparse: Path, tmp_path: Path) -> None:
    pack(sparse, tmp_path / "packed")
    with pytest.raises(UsageError, match="is packed already"):
        pack(tmp_path / "packed", tmp_path / "twice")
    with pytest.raises(UsageError, match="is not packed"):
        unpack(sparse, tmp_path / "plain")


def test_another_number_format_is_packed_as_asked(sparse: Path, tmp_path: Path) -> None:
    pack_model(PackConfig(), ModelConfig(path=str(sparse), dtype="bfloat16"), tmp_path / "packed")
    before, after = load_file(sparse / "model.safetensors"), load_file(tmp_path / "packed/model.safetensors")
    assert after[f"{LAYERS[0]}.weight"].dtype == torch.bfloat16
    model = load_model(ModelConfig(path=str(tmp_path / "packed")))
    assert torch.equal(model.get_submodule(LAYERS[0]).weight, before[f"{LAYERS[0]}.weight"].bfloat16())
    assert json.loads((tmp_path / "packed/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("make", [made_sparse, quantised])
def test_a_killed_call_goes_on_at_the_file_it_was_in(
    make: Callable[[Path], Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lors_cli.models.packed.checkpoint.MAX_SHARD_SIZE", "10KB")
    sparse = make(checkpoint)
    whole = pack(sparse, tmp_path / "whole")
    written: list[str] = []
    finish = tensor_files.TensorWriter.finish

    def stop_at_third(self: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(self.path.name)
        finish(self)

    monkeypatch.setattr(tensor_files.TensorWriter, "finish", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        pack(sparse, tmp_path / "packed")
    assert not (tmp_path / "packed/config.json").exists()
    first = list(written)
    monkeypatch.setattr(
        tensor_files.TensorWriter, "finish", lambda self: (written.append(self.path.name), finish(self))
    )
    again = pack(sparse, tmp_path / "packed")
    assert len(set(written)) == len(written) > len(first)
    assert again.files == whole.files
    assert len([name for name in whole.files if name.endswith(".safetensors")]) > 3


BREAKS: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], None]] = {
    "a module that is none": lambda settings, tensors: settings["modules"].update({"model.layers.9.up": 3}),
    "a norm": lambda settings, tensors: settings["modules"].update({"model.norm": 3}),
    "more values than places": lambda settings, tensors: settings["modules"].update({LAYERS[0]: 10**12}),
    "fewer values": lambda settings, tensors: settings["modules"].update({LAYERS[0]: 3}),
    "no number": lambda settings, tensors: settings["modules"].update({LAYERS[0]: "3"}),
    "no modules": lambda settings, tensors: settings.update(modules={}),
    "a list": lambda settings, tensors: settings.update(modules=[LAYERS[0]]),
    "another version": lambda settings, tensors: settings.update(version=2),
    "another pattern": lambda settings, tensors: settings.update(pattern="1:4"),
    "no pattern": lambda settings, tensors: settings.update(pattern="often"),
    "a pattern that is no text": lambda settings, tensors: settings.update(pattern=4),
    "no mask": lambda settings, tensors: tensors.pop(f"{LAYERS[0]}.weight_mask"),
    "no values": lambda settings, tensors: tensors.pop(f"{LAYERS[0]}.weight"),
    "another mask": lambda settings, tensors: tensors[f"{LAYERS[0]}.weight_mask"].fill_(-1),
    "a float mask": lambda settings, tensors: tensors.update(
        {f"{LAYERS[0]}.weight_mask": tensors[f"{LAYERS[0]}.weight_mask"].float()}
    ),
    "a square": lambda settings, tensors: tensors.update({f"{LAYERS[0]}.weight": torch.zeros(32, 32)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_packed_models_are_refused_in_words_by_every_way_of_loading(
    sparse: Path, tmp_path: Path, kind: str
) -> None:
    packed = tmp_path / "packed"
    pack(sparse, packed)
    settings: Any = json.loads((packed / "config.json").read_text())
    tensors = load_file(packed / "model.safetensors")
    BREAKS[kind](settings["quantization_config"], tensors)
    (packed / "config.json").write_text(json.dumps(settings))
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    (packed / "stage.json").unlink()
    with pytest.raises(UsageError):
        load_model(ModelConfig(path=str(packed)))
    with pytest.raises(UsageError):
        unpack(packed, tmp_path / "plain")
    assert not (tmp_path / "plain/config.json").exists()
    with pytest.raises(Exception, match=r"."):
        AutoModelForCausalLM.from_pretrained(packed)


def test_every_architecture_is_packed_or_refused_in_words(
    architecture: str, build: Callable[..., PreTrainedModel], word_tokenizer: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its plain linears are packed; experts in one tensor and Conv1D stay as they are, which is said."""
    model = build(architecture)
    pattern = Pattern.parse("2:4")
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight.matrix.mul_(keep_largest(weight.matrix.abs(), pattern, per_row=False))
    model.save_pretrained(tmp_path / "sparse")
    word_tokenizer.save_pretrained(tmp_path / "sparse")
    plain = [name for name, weight in prunable_weights(model).items() if not weight.is_linear]
    if len(plain) == len(prunable_weights(model)):
        with pytest.raises(UsageError, match=f"cannot be packed: 8 weights of .* Conv1D cannot .*, first {plain[0]}"):
            pack(tmp_path / "sparse", tmp_path / "packed")
        return
    record = pack(tmp_path / "sparse", tmp_path / "packed")
    assert record.metrics.get("left_plain", []) == plain
    assert ("cannot be packed, first" in capsys.readouterr().err) == bool(plain)
    packed = load_model(ModelConfig(path=str(tmp_path / "packed"), dtype="float32"))
    sparse = load_model(ModelConfig(path=str(tmp_path / "sparse"), dtype="float32"))
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, packed.state_dict()[name]), name
    assert record.metrics["layers"]


def test_a_loaded_model_generates_as_the_sparse_one_and_compiles_whole(sparse: Path, tmp_path: Path) -> None:
    pack(sparse, tmp_path / "packed")
    packed, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "packed", sparse))
    start = torch.tensor([[5, 9, 3]])
    texts = [model.generate(start, max_new_tokens=12, do_sample=False).tolist() for model in (packed, plain)]
    assert texts[0] == texts[1]
    mlp, x = packed.model.layers[0].mlp, torch.randn(1, 3, 32)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x), mlp(x))


def test_where_there_is_no_kernel_weights_are_unpacked_and_it_is_said_why(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(sparse, tmp_path / "packed")
    monkeypatch.setattr("lors_cli.models.packed.kernels.ops.available", lambda *_: "there is no C compiler here")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert type(model.get_submodule(LAYERS[0])) is torch.nn.Linear
    assert "there is no C compiler here" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "plain")
    before, after = load_file(sparse / "model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_is_brought_where_no_kernel_is_says_once_that_it_is_slow(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(sparse, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    monkeypatch.setattr("lors_cli.models.packed.kernels.ops.available", lambda *_: "there is no kernel now")
    model(torch.tensor([[5, 9, 3]]))
    said = capsys.readouterr().err
    assert said.count("unpacked for every product: there is no kernel now. model.dequantize()") == 1


def test_packed_weights_are_not_offloaded(sparse: Path, tmp_path: Path) -> None:
    """They were said to be missing from the checkpoint."""
    pytest.importorskip("accelerate")
    pack(sparse, tmp_path / "packed")
    with pytest.raises(UsageError, match="has no room on the devices of device_map"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "disk"}, offload_folder=tmp_path)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_dry_run_says_the_size_that_packing_then_makes(
    checkpoint: Path, tmp_path: Path, lors: Callable[..., Any], pattern: str, recorded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sparse = made_sparse(checkpoint, Pattern.parse(pattern, 0.6 if pattern == "unstructured" else None))
    if recorded:
        metrics = inspect(ModelConfig(path=str(sparse)))
        records.staging_dir(sparse)
        record = records.StageRecord(
            "prune", "f" * 64, {"method": "x"}, {"model": "m", "path": "p"}, metrics, {}, 1, {}
        )
        records.publish(sparse, record)
        monkeypatch.setattr("lors_cli.models.packed.plan.plan_packing", None)  # no file is read
    found = lors("pack", sparse, "--out", tmp_path / "packed", "--dry-run", "--json")
    assert found.exit_code == 0, found.output
    assert not (tmp_path / "packed").exists()
    monkeypatch.undo()
    (stage,) = json.loads(found.stdout)["stages"]
    metrics = pack(sparse, tmp_path / "packed").metrics
    before, after = (gib(metrics[key]) for key in ("bytes_before", "bytes"))
    share = metrics["bytes"] / metrics["bytes_before"]
    assert stage["makes"] == f"{before} → {after}, {share:.1%}; {len(metrics['layers'])} linears packed"


def test_a_dry_run_of_unpacking_writes_nothing_and_a_full_disk_is_refused(
    sparse: Path, tmp_path: Path, lors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--unpack --dry-run wrote the whole checkpoint."""
    pack(sparse, tmp_path / "packed")
    arguments = "pack", tmp_path / "packed", "--out", tmp_path / "plain", "--unpack"
    found = lors(*arguments, "--dry-run", "--json")
    assert found.exit_code == 0, found.output
    assert not (tmp_path / "plain").exists()
    said, metrics = json.loads(found.stdout), unpack(tmp_path / "packed", tmp_path / "p")
    assert {key: said[key] for key in metrics} == metrics
    monkeypatch.setattr("lors_cli.pipeline.resources.free_disk", lambda folder: said["disk_bytes"] - 1)
    assert lors(*arguments).exit_code == 4
    assert not (tmp_path / "plain").exists()


def test_a_dry_run_refuses_a_dense_model(checkpoint: Path, tmp_path: Path, lors: Callable[..., Any]) -> None:
    found = lors("pack", checkpoint, "--out", tmp_path / "packed", "--dry-run")
    assert found.exit_code == 2
    assert "is dense" in found.output


def test_a_dry_run_of_a_recipe_whose_model_is_yet_to_come_says_no_size(
    checkpoint: Path, tmp_path: Path, lors: Callable[..., Any]
) -> None:
    recipe = f"name: r\nmodel: {{path: {checkpoint}, device: cpu}}\nprune: {{method: magnitude}}\npack: {{}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    command = "run", tmp_path / "r.yaml", "--out", tmp_path / "run"

    def makes(*changes: str) -> list[bool]:
        found = lors(*command, *changes, "--dry-run", "--json")
        assert found.exit_code == 0, found.output
        return ["makes" in stage for stage in json.loads(found.stdout)["stages"]]

    assert makes() == [False, False]
    assert lors(*command, "--until", "prune").exit_code == 0
    assert makes() == [False, True]
    assert makes("prune.pattern=1:4") == [False, False], "that of the model before"


def test_a_changed_setting_before_a_packed_model_is_told(at_finished: Path, lors: Callable[..., Any]) -> None:
    """The plan asked the pack stage for inputs that it did not tell: an assertion, shown as a bug."""
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text() + "pack: {}\n")
    assert lors("run", "tiny.yaml", "--until", "pack").exit_code == 0
    found = lors("run", "tiny.yaml", "tune.rank=2", "--until", "pack")
    assert found.exit_code == 0, found.stderr
    said = " ".join(found.stderr.split())
    assert "pack: the model it reads has changed, replaces a packed model (2:4); to keep it: --out OTHER" in said
    other = lors("pack", "runs/tiny/prune", "--out", "runs/tiny/pack")
    assert "pack: model runs/tiny/tune → runs/tiny/prune, replaces a packed model (2:4)" in " ".join(
        other.stderr.split()
    )


def test_what_generates_keeps_the_weights_packed(sparse: Path, tmp_path: Path) -> None:
    """`lors generate` and `load` unpacked them, and so never showed the faster decoding."""
    pack(sparse, tmp_path / "packed")
    model, _ = load(tmp_path / "packed")
    assert isinstance(model.get_submodule(LAYERS[0]), PackedLinear)
    assert not any(parameter.requires_grad for parameter in model.parameters())
