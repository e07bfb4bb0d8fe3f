"""The driver: whole checkpoints, every architecture, resumption, refusals, a naive sequential Wanda."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_walks import Killed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lors_cli.errors import SparsityError, UsageError
from lors_cli.files import hashes, records
from lors_cli.models.streaming import BlockwiseModel
from lors_cli.models.tensor_files import TensorWriter
from lors_cli.pruning import methods
from lors_cli.pruning import stage as pruning
from lors_cli.pruning.methods import STATISTICS
from lors_cli.pruning.stage import prune, stage_fingerprint
from lors_cli.pruning.walk import driver
from lors_cli.pruning.walk.block import Block
from lors_cli.pruning.walk.driver import Outcome, prune_blocks
from lors_cli.pruning.walk.hidden_states import HiddenStates
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig
from lors_cli.sparsity import Pattern

Build = Callable[..., PreTrainedModel]
METHODS = list(STATISTICS)


def config_of(method: str, token_file: Path | str = "c4", **changes: Any) -> PruneConfig:
    calibration = CalibrationConfig(dataset=str(token_file), batch_size=4)
    return PruneConfig(**{"method": method, "calibration": calibration, **changes})


def is_linear_of_a_block(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def groups_with_more_than_two(weight: torch.Tensor) -> int:
    return sum(sum(value != 0 for value in row[start : start + 4]) > 2
               for row in weight.tolist() for start in range(0, len(row), 4))  # fmt: skip


def pruned_in_memory(config: PruneConfig, model: PreTrainedModel, batches: list[torch.Tensor], work: Path) -> Outcome:
    """Prune a model that is in memory whole, in place."""
    source = BlockwiseModel(model.requires_grad_(False), torch.device("cpu"), None)
    return prune_blocks(config, source, Pattern.of(config), work, [] if config.method == "magnitude" else batches)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_checkpoint(method: str, checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = config_of(method, token_file)
    record = prune(config, ModelConfig(path=str(checkpoint)), out)

    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("w5 w7").input_ids == [5, 7]
    dense, sparse = weights_in(checkpoint), weights_in(out)
    assert dense.keys() == sparse.keys() == dict(model.named_parameters()).keys()
    pruned = [name for name in dense if is_linear_of_a_block(name)]
    assert len(pruned) == 3 * 7
    for name, weight in sparse.items():
        assert weight.dtype == torch.float32
        if name in pruned:
            assert groups_with_more_than_two(weight) == 0
            assert int((weight == 0).sum()) == weight.numel() // 2
            if method not in ("sparsegpt", "admm"):
                assert torch.equal(weight[weight != 0], dense[name][weight != 0])
        else:
            assert torch.equal(weight, dense[name])

    stage = json.loads((out / "stage.json").read_text())
    assert stage["stage"] == "prune"
    assert stage["fingerprint"] == record.fingerprint
    assert records.is_finished(out, record.fingerprint)
    assert stage["config"]["method"] == method
    assert stage["inputs"]["path"] == str(checkpoint)
    metrics = stage["metrics"]
    assert (metrics["pattern"], metrics["sparsity"], metrics["violations"]) == ("2:4", 0.5, 0)
    assert metrics["dtype"] == "float32"
    assert {layer["name"] + ".weight" for layer in metrics["layers"]} == set(pruned)
    assert all(layer["sparsity"] == 0.5 for layer in metrics["layers"])
    if method != "magnitude":
        assert metrics["calibration"].pop("source").startswith("safetensors:")
        assert metrics["calibration"] == {"num_samples": 10, "sequence_length": 24, "tokens": 240}
    assert set(stage["files"]) == {path.name for path in out.iterdir()} - {"stage.json"}
    assert stage["files"] == {name: hashes.file_sha256(out / name) for name in stage["files"]}


def test_the_checkpoint_does_not_tell_where_or_when_it_was_made(
    checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        prune(config_of("wanda", token_file), ModelConfig(path=str(checkpoint)), tmp_path / name)
    names = {path.name for path in (tmp_path / "first").iterdir()} - {"stage.json", "README.md"}
    assert "model.safetensors" in names
    for name in names:
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "second" / name).read_bytes()
        assert str(tmp_path).encode() not in content


NUM_PARAMETERS = {"Phi3": 8, "OPT": 12, "GPT-NeoX": 8, "GPT-2": 8, "Mixtral": 12, "Qwen2-MoE": 4 + 2 + 3 + 4 + 3,
                  "Qwen3-MoE": 12, "GPT-OSS": 12, "BLOOM": 8, "Falcon": 8, "Falcon-40B": 8, "Falcon-RW": 8, "MPT": 8,
                  "GPT-J": 12, "CodeGen": 8, "Gemma3n": 22, "Gemma4": 18}  # fmt: skip
"""Parameters of two blocks that are to be pruned; a mixture's are two for all of its experts."""


def block_matrices(model: PreTrainedModel) -> dict[str, list[torch.Tensor]]:
    """By parameter, the (out_features, in_features) matrices in the blocks, written down family by family."""
    found = {}
    for name, module in model.named_modules():
        in_block = ".layers." in name or ".h." in name or ".blocks." in name
        in_block = in_block and ".vision_tower." not in name
        router = name.endswith(("mlp.gate", "shared_expert_gate")) or ".altup." in name
        if in_block and not router and isinstance(module, (torch.nn.Linear, Conv1D)):
            weight = module.weight.detach()
            found[f"{name}.weight"] = [weight.T if isinstance(module, Conv1D) else weight]
        if name.endswith(".experts"):
            for key in ("gate_up_proj", "down_proj"):
                experts = getattr(module, key).detach()
                is_transposed = type(module).__name__ == "GptOssExperts"
                found[f"{name}.{key}"] = list(experts.transpose(1, 2) if is_transposed else experts)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_architecture(
    architecture: str, method: str, build: Build, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = build(architecture)
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    pruned_in_memory(config_of(method), model, batches, tmp_path)
    matrices = block_matrices(model)
    assert len(matrices) == NUM_PARAMETERS.get(architecture, 14)
    for name, weight in model.state_dict().items():
        if name in matrices:
            for matrix in matrices[name]:
                assert groups_with_more_than_two(matrix) == 0
                assert int(matrix.count_nonzero()) == matrix.numel() // 2
        else:
            assert torch.equal(weight, dense[name])
    assert bool(model(input_ids=batches[0]).logits.isfinite().all())


def test_wanda_equals_a_naive_sequential_run(build: Build, batches: list[torch.Tensor], tmp_path: Path) -> None:
    model, reference = build(), build()
    pruned_in_memory(config_of("wanda"), model, batches, tmp_path)

    layers = reference.model.layers
    for layer in layers:
        # The layer as it is, behind already pruned ones; whole forward passes and one plain hook a linear.
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        squares: dict[torch.nn.Module, torch.Tensor] = {}

        def listen(module: torch.nn.Module, args: Any, squares: dict = squares) -> None:
            added = args[0].double().square().sum((0, 1))
            squares[module] = squares.get(module, 0) + added

        handles = [linear.register_forward_pre_hook(listen) for linear in linears]
        with torch.no_grad():
            for batch in batches:
                reference(input_ids=batch)
        for handle in handles:
            handle.remove()
        for linear in linears:
            weight = linear.weight.data
            score = weight.abs().double() * squares[linear].sqrt()
            for row in range(weight.shape[0]):
                for start in range(0, weight.shape[1], 4):
                    lowest = score[row, start : start + 4].argsort()[:2] + start
                    weight[row, lowest] = 0
    for (name, got), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(got, expected), name


@pytest.fixture
def unbroken(checkpoint: Path, token_file: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    out = tmp_path / "unbroken"
    prune(config_of("sparsegpt", token_file), ModelConfig(path=str(checkpoint)), out)
    return weights_in(out)


@pytest.mark.parametrize("moment", ["before", "between", "after"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_killed_run_goes_on_and_ends_in_the_same_weights(
    block: int,
    moment: str,
    unbroken: dict[str, torch.Tensor],
    checkpoint: Path,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, model, config = tmp_path / "out", ModelConfig(path=str(checkpoint)), config_of("sparsegpt", token_file)
    advance, finish = HiddenStates.advance, TensorWriter.finish

    def killed_advance(self: HiddenStates, *args: Any) -> None:
        if self._index == block and moment == "before":
            raise Killed
        advance(self, *args)
        if self._index == block + 1 and moment == "after":
            self.settle()
            raise Killed

    def killed_finish(self: TensorWriter) -> None:
        if moment == "between" and self.path.name.startswith(f"inputs_{block + 1:04d}"):
            raise Killed
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "advance", killed_advance)
        patch.setattr(TensorWriter, "finish", killed_finish)
        with pytest.raises(Killed):
            prune(config, model, out)
    assert records.read_record(out) is None
    assert not (out / "model.safetensors").exists()

    done: list[int] = []
    prune_block = driver.prune_block

    def counted(block: Block, *args: Any) -> None:
        done.append(block.index)
        prune_block(block, *args)

    monkeypatch.setattr(driver, "prune_block", counted)
    record = prune(config, model, out)
    first = block + 1 if moment == "after" else block
    assert done == list(range(first, 3))
    assert records.is_finished(out, record.fingerprint)
    assert not (out / ".work").exists()
    resumed = weights_in(out)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_other_settings_do_not_go_on_from_a_killed_run(
    checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "out", ModelConfig(path=str(checkpoint))
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_metrics", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            prune(config_of("sparsegpt", token_file), model, out)
    assert list((out / ".work").glob("block_*"))
    prune(config_of("wanda", token_file), model, out)
    prune(config_of("wanda", token_file), model, tmp_path / "clean")
    clean = weights_in(tmp_path / "clean")
    assert all(torch.equal(weight, clean[name]) for name, weight in weights_in(out).items())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_broken_pattern_publishes_nothing(
    method: str, checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "prune_group", lambda _method, weights, *_: list(weights))
    out = tmp_path / "out"
    with pytest.raises(SparsityError, match=r"21 pruned weights break 2:4, first model\.layers\.0") as raised:
        prune(config_of(method, token_file), ModelConfig(path=str(checkpoint)), out)
    assert raised.value.exit_code == 5
    assert {path.name for path in out.iterdir()} <= {".work", ".staging"}
    assert not list(out.rglob("model.safetensors"))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> ModelConfig:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(methods, "prune_group", never)
    monkeypatch.setattr(pruning, "_calibration_batches", never)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_width_that_has_no_groups_is_refused_before_work(
    method: str, checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_work(monkeypatch)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_proj \(32 × 32\) cannot be 2:5"):
        prune(config_of(method, token_file, pattern="2:5"), ModelConfig(path=str(checkpoint)), tmp_path / "out")


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_unstructured(method: str, sparsity: float, build: Build, batches: list[torch.Tensor], tmp_path: Path) -> None:
    config = config_of(method, pattern="unstructured", sparsity=sparsity)
    for layer in pruned_in_memory(config, build(), batches, tmp_path).layers:
        rows, columns = layer.shape
        whole, by_row = int(rows * columns * sparsity), rows * int(columns * sparsity)
        assert layer.num_zeros == (by_row if method == "wanda" else whole)
        assert layer.violations == 0


def test_the_model_itself_is_no_place_for_the_result(checkpoint: Path) -> None:
    before = weights_in(checkpoint)
    with pytest.raises(UsageError, match="is the model itself"):
        prune(config_of("magnitude"), ModelConfig(path=str(checkpoint)), checkpoint)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_in(checkpoint).items())


class TestStageFingerprint:
    def test_it_covers_settings_model_and_calibration_text(self, token_file: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.safetensors"
        other.write_bytes(token_file.read_bytes() + b" ")
        configs = [
            config_of("wanda", token_file),
            config_of("ria", token_file),
            config_of("wanda", token_file, pattern="1:4"),
            config_of("wanda", other),
            PruneConfig(method="wanda", calibration=CalibrationConfig(dataset=str(token_file), seed=1)),
        ]
        found = [stage_fingerprint(config, "m", None) for config in configs]
        found.append(stage_fingerprint(configs[0], "other model", None))
        assert len(set(found)) == len(found)
        assert stage_fingerprint(configs[0], "m", None) == found[0]

    def test_the_file_counts_by_content_and_not_by_name(self, token_file: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(token_file.read_bytes())
        assert stage_fingerprint(config_of("wanda", token_file), "m", None) == stage_fingerprint(
            config_of("wanda", copy), "m", None
        )

    def test_magnitude_needs_no_text(self) -> None:
        nowhere = config_of("magnitude", "/nowhere.txt")
        assert stage_fingerprint(nowhere, "m", None) == stage_fingerprint(config_of("magnitude"), "m", None)
