"""Layers that pruning is told to skip: dense to the bit, in no sum, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from typer.testing import Result

from lors_cli.errors import UsageError
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.inspection import inspect
from lors_cli.models.size import model_size
from lors_cli.models.skip import skipped
from lors_cli.models.streaming import BlockwiseModel
from lors_cli.pruning.methods.owl import allocate
from lors_cli.pruning.stage import prune
from lors_cli.pruning.walk import passes
from lors_cli.pruning.walk.driver import prune_blocks
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig
from lors_cli.sparsity import Pattern

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
NAMES = [f"model.layers.{block}.{linear}" for block in range(3) for linear in LINEARS]
OWL = {"method": "sparsegpt", "pattern": "unstructured", "sparsity": 0.5, "layer_sparsity": "owl"}
WAYS: list[dict[str, Any]] = [
    {"method": "magnitude"}, {"method": "wanda"}, {"method": "ria", "channel_permutation": True},
    {"method": "sparsegpt", "true_sequential": True}, {"method": "admm", "refit": True},
    {"method": "sparsegpt", "reconstruct_epochs": 1}, {"method": "magnitude", "channel_permutation": True},
    {"method": "sparsegpt", "pattern": "unstructured", "sparsity": 0.6}, OWL,
]  # fmt: skip


def config_of(token_file: Path, skip: tuple[str, ...], **settings: Any) -> PruneConfig:
    return PruneConfig(calibration=CalibrationConfig(dataset=str(token_file), batch_size=4), skip=skip, **settings)


@pytest.mark.parametrize("settings", WAYS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_skipped_layers_stay_dense_to_the_bit_and_the_others_are_as_sparse_as_asked(
    settings: dict[str, Any], checkpoint: Path, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skip = ("model.layers.1.*", "*.up_proj", "model.layers.[0]*.v_proj")
    value = "model.layers.0.self_attn.v_proj"
    expected = [name for name in NAMES if ".layers.1." in name or name.endswith("up_proj") or name == value]
    record = prune(config_of(token_file, skip, **settings), ModelConfig(path=str(checkpoint)), tmp_path / "out")
    dense, sparse = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    zeros = total = 0
    for name in NAMES:
        before, after = dense[f"{name}.weight"], sparse[f"{name}.weight"]
        if name in expected:
            assert torch.equal(before, after), name
        else:
            zeros, total = zeros + int((after == 0).sum()), total + after.numel()
            if settings.get("layer_sparsity") != "owl":
                assert abs(float((after == 0).float().mean()) - settings.get("sparsity", 0.5)) < 0.02, name
    assert zeros / total == pytest.approx(settings.get("sparsity", 0.5), abs=0.01)
    assert record.metrics["dense_layers"] == expected
    assert record.metrics["sparsity"] == pytest.approx(zeros / total, abs=1e-6)
    assert [layer["name"] for layer in record.metrics["layers"]] == [name for name in NAMES if name not in expected]
    assert "skipped: 10 layers stay dense: model.layers.0.self_attn.v_proj, " in capsys.readouterr().err
    found = inspect(ModelConfig(path=str(tmp_path / "out")))
    assert found["violations"] == 0
    assert found["dense_layers"] == expected
    assert "10 linear layers, embeddings and output head are dense" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(("skip", "idle"), [(("*.v_proj", "*.up_proj"), True), (("model.layers.0.*",), False)])
def test_what_nothing_comes_of_is_said(
    skip: tuple[str, ...], idle: bool, checkpoint: Path, token_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = config_of(token_file, skip, method="magnitude", channel_permutation=True)
    prune(config, ModelConfig(path=str(checkpoint)), tmp_path / "out")
    said = capsys.readouterr().err
    assert ("no inputs of the pruned weights can be permuted; nothing is." in said) == idle
    assert "magnitude looks at weights alone: calibration is not read" in said


def test_without_a_record_a_skipped_layer_is_neither_a_violation_nor_in_the_pattern(
    checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    prune(
        config_of(token_file, ("*.0.*", "*.down_proj"), method="wanda"),
        ModelConfig(path=str(checkpoint)),
        tmp_path / "out",
    )
    model = ModelConfig(path=str(tmp_path / "out"))
    known = inspect(model)
    assert inspect(model, Pattern(2, 4, 0.5)) == known
    (tmp_path / "out/stage.json").unlink()
    found = inspect(model)
    assert (found["pattern"], found["sparsity"], found["violations"]) == ("2:4", 0.5, 0)
    assert {layer["name"] for layer in found["layers"]} == {layer["name"] for layer in known["layers"]}
    assert found["dense_layers"] == known["dense_layers"]
    assert inspect(model, Pattern(2, 4, 0.5))["violations"] > 1000  # nothing says that they were skipped


def test_what_is_not_skipped_is_pruned_as_ever(checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
    made = {}
    for name, skip in (("all", ()), ("some", ("model.layers.0.mlp.*", "model.layers.2.*"))):
        prune(config_of(token_file, skip, method="sparsegpt"), ModelConfig(path=str(checkpoint)), tmp_path / name)
        made[name] = load_file(tmp_path / name / "model.safetensors")
    for linear in LINEARS[:4]:  # which nothing before them has changed
        key = f"model.layers.0.{linear}.weight"
        assert torch.equal(made["all"][key], made["some"][key])
    key = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(made["all"][key], made["some"][key]), "its inputs come through the dense MLP"


def test_owl_shares_out_among_the_blocks_that_are_pruned(
    checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def noted(ratios: list[float], sizes: list[int], sparsity: float) -> list[float]:
        given.append((ratios, sizes))
        return allocate(ratios, sizes, sparsity)

    monkeypatch.setattr(passes, "allocate", noted)
    whole, partly = config_of(token_file, (), **OWL), config_of(token_file, ("model.layers.0.*", "*.2.mlp.*"), **OWL)
    for number, config in enumerate((whole, partly)):
        record = prune(config, ModelConfig(path=str(checkpoint)), tmp_path / str(number))
        assert record.metrics["sparsity"] == pytest.approx(0.5, abs=5e-3)
    (ratios, sizes), (fewer, smaller) = given
    attention = 2 * 32 * 32 + 2 * 16 * 32
    assert sizes == [attention + 3 * 32 * 64] * 3
    assert smaller == [sizes[1], attention]
    assert fewer[0] == ratios[1]
    assert fewer[1] != ratios[2]


@pytest.mark.parametrize(("family", "epochs"), [("Mixtral", 0), ("Qwen2-MoE", 0), ("Mixtral", 1)])
def test_one_expert_of_several(
    family: str, epochs: int, build: Callable[..., PreTrainedModel], batches: list[torch.Tensor], tmp_path: Path
) -> None:
    dense, model = build(family), build(family)
    skip = ("*.experts.1.*", "*.q_proj")
    source = BlockwiseModel(model.requires_grad_(False), torch.device("cpu"), None)
    config = PruneConfig(method="wanda", skip=skip, reconstruct_epochs=epochs)
    prune_blocks(config, source, Pattern.of(config), tmp_path, batches)
    before = prunable_weights(dense)
    left = {name for name, weight in prunable_weights(model).items() if torch.equal(weight.matrix, before[name].matrix)}
    assert left == {name for name in before if ".experts.1." in name or name.endswith("q_proj")}
    assert any(".experts.1." in name for name in left)


def test_a_layer_that_cannot_have_the_pattern_can_be_skipped(
    checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(checkpoint))
    with pytest.raises(UsageError, match="32 inputs are no multiple of 64"):
        prune(config_of(token_file, (), method="wanda", pattern="32:64"), model, tmp_path / "out")
    skip = ("*.self_attn.*", "*.gate_proj", "*.up_proj")
    record = prune(config_of(token_file, skip, method="wanda", pattern="32:64"), model, tmp_path / "out")
    assert len(record.metrics["layers"]) == 3
    assert record.metrics["violations"] == 0


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("model.layer.0.*", "model.layers.0.*"), ("*.down_porj", "*.down_proj"), ("*down_proj.weight", "*.down_proj"),
        ("model.layers.0.mlp.donw_proj", "model.layers.0.mlp.down_proj"), ("model.layers.7.*", "model.layers.1.*"),
        ("*.mlp.upproj", "*.mlp.up_proj"),
    ],
)  # fmt: skip
def test_a_glob_that_matches_nothing_is_refused_with_what_is_near(glob: str, near: str) -> None:
    with pytest.raises(UsageError, match="is the name of no layer") as caught:
        skipped(["*.q_proj", glob], NAMES)
    assert glob in caught.value.message
    assert near in str(caught.value.hint).removesuffix(".").removeprefix("Near it are ").split(", ")


def test_everything_cannot_be_skipped() -> None:
    with pytest.raises(UsageError, match=r"\*\.mlp\.\*, \*attn\* leaves no layer"):
        skipped(["*.mlp.*", "*attn*"], NAMES)


def test_globs_are_looked_at_before_anything_is_loaded(at_workshop: Path, lors: Callable[..., Result]) -> None:
    flags = ("--skip", "*.dwn_proj,*.q_proj", "--method", "magnitude", "--dry-run")
    result = lors("prune", "dense", "--out", "out", *flags)
    assert result.exit_code == 2
    assert result.stderr.count("*.dwn_proj is the name of no layer") == 1, "it was said twice, by two looks"
    assert "*.down_proj" in result.stderr
    planned = json.loads(lors("prune", "dense", "--out", "out", *flags, "--json").stdout)
    assert len(planned["in_the_way"]) == 1
    assert "*.dwn_proj" in planned["stages"][0]["estimate"], "the plan was lost"
    assert not Path("out").exists()
    Path("skip.yaml").write_text("method: magnitude\nskip: ['*.down_proj', model.layers.0.*]\n")
    result = lors("prune", "dense", "--out", "out", "--config", "skip.yaml", "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["metrics"]["dense_layers"]) == 8
    result = lors("inspect", "out")
    assert "in 6 linears, 0 violations; 8 skipped and dense" in result.stdout


def test_a_star_without_quotes_says_that_it_wants_them(at_workshop: Path, lors: Callable[..., Result]) -> None:
    result = lors("prune", "dense", "--out", "out", "skip=[*.down_proj]")
    assert result.exit_code == 2
    assert "a text that starts with * must be in quotes" in result.stderr


def test_a_size_without_layers(checkpoint: Path) -> None:
    size = model_size(ModelConfig(path=str(checkpoint)))
    assert size is not None
    assert [layer[0] for layer in size.layers] == NAMES
    assert size.without(()) is size
    less = size.without(["model.layers.0.*", "*.down_proj"])
    assert less.linears == ((32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32)) * 2
    assert less.block == tuple((*shape, False) for shape in less.linears[:6])
    assert size.num_prunable - less.num_prunable == 2 * 32 * 32 + 2 * 16 * 32 + 2 * 64 * 32 + 3 * 32 * 64
