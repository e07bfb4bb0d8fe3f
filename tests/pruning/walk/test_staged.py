"""Passes that stop before each group, reconstruction, hidden states on disk, OWL and permutation in the driver."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from killed_walks import killed_when
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.models.blocks import block_weights, decoder_blocks, prunable_weights
from lors_cli.models.streaming import BlockwiseModel
from lors_cli.pruning import methods, stage
from lors_cli.pruning.methods.reconstruct import reconstruct
from lors_cli.pruning.stage import prune
from lors_cli.pruning.walk import hidden_states
from lors_cli.pruning.walk.calibration import capture
from lors_cli.pruning.walk.driver import Outcome, prune_blocks
from lors_cli.pruning.walk.hidden_states import HiddenStates, choose_place
from lors_cli.pruning.walk.staged import run_staged, shared_inputs
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig
from lors_cli.sparsity import Pattern

Build = Callable[..., PreTrainedModel]


def pruned_in_memory(model: PreTrainedModel, batches: list[torch.Tensor], work: Path, **settings: Any) -> Outcome:
    config = PruneConfig(**settings)
    source = BlockwiseModel(model.requires_grad_(False), torch.device("cpu"), None)
    return prune_blocks(config, source, Pattern.of(config), work, batches)


def test_groups_of_shared_inputs(build: Build, batches: list[torch.Tensor]) -> None:
    model = build()
    hidden, arguments = capture(model, list(model.model.layers), batches)
    block = model.model.layers[0]
    weights = block_weights(block, "b")
    groups = shared_inputs(weights, partial(arguments[0].run, block, hidden[0], 0))
    assert groups == [
        ["b.self_attn.q_proj", "b.self_attn.k_proj", "b.self_attn.v_proj"], ["b.self_attn.o_proj"],
        ["b.mlp.gate_proj", "b.mlp.up_proj"], ["b.mlp.down_proj"],
    ]  # fmt: skip
    assert shared_inputs(weights, lambda: hidden[0]) is None  # never called


def test_true_sequential_wanda_equals_a_naive_run(build: Build, batches: list[torch.Tensor], tmp_path: Path) -> None:
    model, reference = build(), build()
    pruned_in_memory(model, batches, tmp_path, method="wanda", true_sequential=True)

    for layer in reference.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        stages = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                  [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]  # fmt: skip
        for linears in stages:  # whole forward passes anew for each group, on what is pruned so far
            squares: list[torch.Tensor] = []
            handle = linears[0].register_forward_pre_hook(
                lambda _, args, squares=squares: squares.append(args[0].double().square().sum((0, 1)))
            )
            with torch.no_grad():
                for batch in batches:
                    reference(input_ids=batch)
            handle.remove()
            norms = torch.stack(squares).sum(0).sqrt()
            for linear in linears:
                score = linear.weight.abs().double() * norms
                lowest = score.view(len(score), -1, 4).argsort(-1)[..., :2]
                linear.weight.data.view(len(score), -1, 4).scatter_(-1, lowest, 0.0)
    for (name, got), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_the_outputs_are_those_of_the_pruned_block(build: Build, batches: list[torch.Tensor], tmp_path: Path) -> None:
    model = build()
    seen: list[torch.Tensor] = []
    put = HiddenStates.put

    def noted(self: HiddenStates, number: int, hidden: torch.Tensor) -> None:
        if self._index == 1:
            seen.append(hidden)
        put(self, number, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HiddenStates, "put", noted)
        pruned_in_memory(model, batches, tmp_path, method="admm")
    for batch, hidden in zip(batches, seen, strict=True):
        caught: list[torch.Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
        model(input_ids=batch)
        handle.remove()
        torch.testing.assert_close(hidden, caught[0])


def test_an_error_inside_a_pass_comes_out() -> None:
    linear = nn.Linear(2, 2)

    def broken() -> torch.Tensor:
        linear(torch.ones(1, 2))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(run_staged([linear], [broken, broken], lambda *_: None, lambda _: None))
    assert not linear._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "OPT", "Gemma2", "Mixtral"])
@pytest.mark.parametrize("sequential", [False, True])
def test_reconstruction_brings_a_block_nearer_to_the_dense_one(
    architecture: str, sequential: bool, build: Build, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    errors = []
    dense = build(architecture)
    _, blocks = decoder_blocks(dense)
    hidden, arguments = capture(dense, list(blocks), batches)
    for epochs in (0, 3):
        model = build(architecture)
        (tmp_path / str(epochs)).mkdir()
        outcome = pruned_in_memory(
            model,
            batches,
            tmp_path / str(epochs),
            method="wanda",
            true_sequential=sequential,
            reconstruct_epochs=epochs,
        )
        assert all(layer.sparsity == 0.5 and not layer.violations for layer in outcome.layers)
        _, pruned_blocks = decoder_blocks(model)
        with torch.no_grad():
            difference = [arguments[0].run(pruned_blocks[0], x, number) - arguments[0].run(blocks[0], x, number)
                          for number, x in enumerate(hidden)]  # fmt: skip
        errors.append(sum(float(part.square().sum()) for part in difference))
    assert errors[1] < 0.9 * errors[0]


def test_steps_are_as_large_as_the_samples_that_there_are(
    build: Build, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    found, samples = [], torch.cat(batches)
    for size in (len(samples), 4 * len(samples)):
        model = build()
        (tmp_path / str(size)).mkdir()
        pruned_in_memory(model, [samples], tmp_path / str(size), method="wanda", reconstruct_epochs=1,
                         reconstruct_batch_size=size)  # fmt: skip
        found.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(*found)


def steps(block: Any, hidden: list[torch.Tensor], run: Any) -> list[Any]:
    """What `reconstruct` is given, the targets being what the block gives as it is."""
    with torch.no_grad():
        return [partial(tuple, (x, run(block, x, number), number)) for number, x in enumerate(hidden)]


def test_reconstruction_keeps_zeros_and_the_number_format(build: Build, batches: list[torch.Tensor]) -> None:
    model = build().bfloat16().requires_grad_(False)
    hidden, arguments = capture(model, list(model.model.layers), batches)
    block = model.model.layers[0]
    weights = block_weights(block, "b")
    inputs = steps(block, hidden, arguments[0].run)
    for weight in weights.values():
        weight.matrix[:, ::2] = 0
    norm = block.input_layernorm.weight.clone()
    first, last = reconstruct(block, [*weights.values()], arguments[0].run, inputs, epochs=4, seed=0)
    assert last < first
    for weight in weights.values():
        assert weight.matrix.dtype == torch.bfloat16
        assert not weight.matrix[:, ::2].any()
        assert weight.matrix[:, 1::2].all()
    assert torch.equal(block.input_layernorm.weight, norm)


@pytest.mark.parametrize("settings", [
    {"method": "sparsegpt"}, {"method": "admm"}, {"method": "wanda", "reconstruct_epochs": 1},
    {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5, "layer_sparsity": "owl"},
])  # fmt: skip
def test_hidden_states_on_disk_change_nothing(
    settings: dict[str, Any], checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for offload in ("device", "disk"):
        calibration = CalibrationConfig(dataset=str(token_file), batch_size=4, offload=offload)  # type: ignore[arg-type]
        prune(PruneConfig(calibration=calibration, **settings), ModelConfig(path=str(checkpoint)), tmp_path / offload)
        results.append(load_file(tmp_path / offload / "model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


OWL = {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5, "layer_sparsity": "owl"}
RECONSTRUCTED = {"method": "wanda", "reconstruct_epochs": 1}
"""The dense blocks' inputs go on before the pruned ones': the second block is begun by call 5, done by call 6."""


@pytest.mark.parametrize(("settings", "moments"), [
    ({"method": "admm"}, (1, 2, 4)), ({"method": "ria", "channel_permutation": True}, (1, 2, 4)),
    (OWL, (1, 3, 4, 5, 7, 8)), (RECONSTRUCTED, (1, 2, 3, 4, 5, 6)),
])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_bits(
    settings: dict[str, Any],
    moments: tuple[int, ...],
    checkpoint: Path,
    token_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = PruneConfig(calibration=CalibrationConfig(dataset=str(token_file), batch_size=4), **settings)
    model = ModelConfig(path=str(checkpoint))
    prune(config, model, tmp_path / "unbroken")
    for calls in moments:
        out = tmp_path / f"killed at {calls}"
        killed_when(lambda _, count, calls=calls: count == calls, config, model, out)  # type: ignore[misc]
        capsys.readouterr()
        prune(config, model, out)
        first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "unbroken", out))
        assert all(torch.equal(first[name], second[name]) for name in first), calls
        if settings is RECONSTRUCTED:
            said = [calls // 2 - 1] if calls >= 4 else []
            assert re.findall(r"resuming after (\d) of 3", capsys.readouterr().err) == [*map(str, said)], calls


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_time_of_blocks_that_an_earlier_call_pruned_counts(
    method: Any, checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PruneConfig(method=method, calibration=CalibrationConfig(dataset=str(token_file), batch_size=4))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_metrics", None)  # it fails after the last block
        with pytest.raises(TypeError):
            prune(config, ModelConfig(path=str(checkpoint)), tmp_path / "out")
    phases = {}
    for index in range(3):
        note = tmp_path / f"out/.work/block_000{index}.json"
        content = json.loads(note.read_text())
        assert 0 < sum(content["phases_s"].values()) <= content["elapsed_s"] + 0.01
        phases = content["phases_s"] = dict.fromkeys(content["phases_s"], 100.0)
        note.write_text(json.dumps({**content, "elapsed_s": 1000.0}))
    record = prune(config, ModelConfig(path=str(checkpoint)), tmp_path / "out")
    assert 3000 < record.elapsed_s < 3600
    if method == "wanda":
        assert all(300 <= record.metrics["phases_s"][name] < 400 for name in phases)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_where_auto_is_another_format_a_killed_run_begins_anew(
    method: Any, checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another node, whose processor has no bfloat16; blocks of both formats would make one checkpoint."""
    config = PruneConfig(method=method, calibration=CalibrationConfig(dataset=str(token_file), batch_size=4))
    model = ModelConfig(path=str(checkpoint))
    prune(config, replace(model, dtype="float32"), tmp_path / "unbroken")
    formats = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr("lors_cli.models.loading.resolve_dtype", lambda *args: next(formats))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_metrics", None)  # it fails after the last block
        with pytest.raises(TypeError):
            prune(config, model, tmp_path / "out")
    prune(config, model, tmp_path / "out")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "out"))
    assert all(torch.equal(first[name], second[name]) and second[name].dtype == torch.float32 for name in first)


def test_norms_that_a_family_keeps_in_float32(build: Build, tiny_tokenizer: Any, tmp_path: Path) -> None:
    build("GPT-OSS", vocab_size=258).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    model = ModelConfig(path=str(tmp_path / "dense"), dtype="float16", device="cpu")
    prune(PruneConfig(method="magnitude"), model, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found["model.norm.weight"].dtype == torch.float32
    assert found["model.embed_tokens.weight"].dtype == torch.float16


def test_where_hidden_states_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    free = type("Free", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert choose_place("auto", 500, cpu) == "device"
    assert choose_place("auto", 501, cpu) == "disk"
    assert choose_place("cpu", 10**9, cpu) == "device"
    assert choose_place("disk", 1, cpu) == "disk"
    assert hidden_states.SHARE_OF_FREE == 0.5


def test_owl_prunes_the_model_to_the_share_asked_for(checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
    config = PruneConfig(
        method="sparsegpt", pattern="unstructured", sparsity=0.5, layer_sparsity="owl",
        calibration=CalibrationConfig(dataset=str(token_file), batch_size=4),
    )  # fmt: skip
    record = prune(config, ModelConfig(path=str(checkpoint)), tmp_path / "out")
    layers = record.metrics["layers"]
    by_block = [
        {round(layer["sparsity"], 3) for layer in layers if layer["name"].startswith(f"model.layers.{index}.")}
        for index in range(3)
    ]
    assert len({min(shares) for shares in by_block}) > 1
    assert record.metrics["sparsity"] == pytest.approx(0.5, abs=2e-3)
    assert all(0.41 < share < 0.59 for shares in by_block for share in shares)


@pytest.mark.parametrize("method", ["ria", "admm", "magnitude"])
def test_channel_permutation_keeps_the_function_before_pruning(
    method: str, build: Build, batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a method that removes nothing, what is left is the permutation alone."""
    dense, model = build().double(), build().double()
    monkeypatch.setattr(methods, "prune_group", lambda _method, weights, *_: list(weights))
    config = PruneConfig(method=method, channel_permutation=True)  # type: ignore[arg-type]
    source = BlockwiseModel(model.requires_grad_(False), torch.device("cpu"), None)
    prune_blocks(config, source, Pattern.of(config), tmp_path, [] if method == "magnitude" else batches)
    moved = [name for name, weight in prunable_weights(model).items()
             if not torch.equal(weight.matrix, prunable_weights(dense)[name].matrix)]  # fmt: skip
    assert {name.rpartition(".")[2] for name in moved} == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for batch in batches:
        torch.testing.assert_close(model(input_ids=batch).logits, dense(input_ids=batch).logits, rtol=0, atol=1e-9)


def test_reconstruction_does_not_depend_on_the_size_of_gradients(build: Build, batches: list[torch.Tensor]) -> None:
    losses = []
    for scale in (1.0, 1e-5):
        model = build().requires_grad_(False)
        hidden, arguments = capture(model, list(model.model.layers), batches)
        block = model.model.layers[0]
        weights = block_weights(block, "b")

        def run(module: Any, *x: Any, scale: float = scale, arguments: Any = arguments) -> torch.Tensor:
            return scale * arguments[0].run(module, *x)

        inputs = steps(block, hidden, run)
        for weight in weights.values():
            weight.matrix[:, ::2] = 0
        losses.append(reconstruct(block, [*weights.values()], run, inputs, epochs=3, seed=0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][1] < losses[0][0]


def test_reconstruction_leaves_a_weight_of_zeros_alone(build: Build, batches: list[torch.Tensor]) -> None:
    model = build().requires_grad_(False)
    block = model.model.layers[0]
    block.mlp.down_proj.weight.zero_()
    hidden, arguments = capture(model, list(model.model.layers), batches)
    weights, inputs = [*block_weights(block, "b").values()], steps(block, hidden, arguments[0].run)
    block.mlp.up_proj.weight[:, ::2] = 0
    reconstruct(block, weights, arguments[0].run, inputs, epochs=1, seed=0)
    assert all(bool(parameter.isfinite().all()) for parameter in block.parameters())
    assert not block.mlp.down_proj.weight.any()


class TestRefusals:
    def refused(self, checkpoint: Path, token_file: Path, out: Path, message: str, **settings: Any) -> None:
        config = PruneConfig(calibration=CalibrationConfig(dataset=str(token_file), batch_size=4), **settings)
        with pytest.raises(UsageError, match=message):
            prune(config, ModelConfig(path=str(checkpoint)), out)
        assert not (out / "model.safetensors").exists()

    @pytest.mark.parametrize("settings", [OWL, {"method": "ria", "channel_permutation": True}, {"method": "magnitude"}])
    def test_weights_that_are_not_finite(
        self, settings: dict[str, Any], checkpoint: Path, token_file: Path, tmp_path: Path
    ) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = float("nan")
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        message = r"layers\.2\.mlp\.down_proj holds NaN|calibration inputs"
        self.refused(checkpoint, token_file, tmp_path / "out", message, **settings)

    def test_a_quantised_checkpoint(self, checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
        settings = json.loads((checkpoint / "config.json").read_text())
        settings["quantization_config"] = {"quant_method": "fp8"}
        (checkpoint / "config.json").write_text(json.dumps(settings))
        self.refused(checkpoint, token_file, tmp_path / "out", "says that the weights are quantised", method="wanda")

    def test_whole_numbers_for_weights(self, checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].to(torch.int8)
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        self.refused(checkpoint, token_file, tmp_path / "out", "holds I8", method="wanda")

    def test_reconstruction_in_float16(self, checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
        config = PruneConfig(
            method="wanda", reconstruct_epochs=1, calibration=CalibrationConfig(dataset=str(token_file), batch_size=4)
        )
        with pytest.raises(UsageError, match="do not fit into float16"):
            prune(config, ModelConfig(path=str(checkpoint), dtype="float16"), tmp_path / "out")


def test_owl_with_an_expert_that_no_token_reaches(build: Build, batches: list[torch.Tensor], tmp_path: Path) -> None:
    model = build("Mixtral", num_local_experts=16)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[9] = 0  # a router's logit of 0 is never among the two largest of 16
        layer.mlp.gate.weight.data[:2] *= 100
    outcome = pruned_in_memory(model, [batches[0][:1, :6]], tmp_path, **OWL)
    assert 0 in outcome.few_tokens.values()
    assert all(not layer.violations for layer in outcome.layers)
