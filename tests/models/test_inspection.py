"""`lors inspect`: sparsity, pattern and violations of any checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import Result

from lors_cli.models.blocks import block_weights
from lors_cli.models.inspection import detect_pattern
from lors_cli.sparsity import Pattern

Lors = Callable[..., Result]
PRUNED, TUNED = Path("runs/tiny/prune"), Path("runs/tiny/tune")


def rewrite(folder: Path, change: Callable[[torch.Tensor], None]) -> None:
    """Change the weights of every linear in the decoder blocks, in the file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            change(tensor)
    save_file(tensors, path, metadata={"format": "pt"})


def keep(n: int, m: int) -> Callable[[torch.Tensor], None]:
    """Zero all but the first n of every m inputs."""

    def change(weight: torch.Tensor) -> None:
        weight.view(weight.shape[0], -1, m)[:, :, n:] = 0

    return change


@pytest.mark.parametrize("folder", [PRUNED, TUNED])
def test_results_of_lors(at_finished: Path, lors: Lors, folder: Path) -> None:
    found = json.loads(lors("inspect", folder, "--json").stdout)
    assert (found["pattern"], found["violations"]) == ("2:4", 0)
    assert found["sparsity"] == pytest.approx(0.5, abs=0.005)
    assert len(found["layers"]) == 14
    assert set(found["layers"][0]) == {"name", "shape", "sparsity"}


def test_a_dense_model(at_workshop: Path, lors: Lors) -> None:
    found = json.loads(lors("inspect", "dense", "--json").stdout)
    assert (found["pattern"], found["violations"]) == ("dense", 0)
    assert found["sparsity"] < 0.01


def test_a_dense_model_held_against_a_pattern(at_workshop: Path, lors: Lors) -> None:
    result = lors("inspect", "dense", "--pattern", "2:4", "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["violations"] > 4000


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_a_pattern_is_recognised_without_a_record(at_workshop: Path, lors: Lors, n: int, m: int) -> None:
    rewrite(Path("dense"), keep(n, m))
    found = json.loads(lors("inspect", "dense", "--json").stdout)
    assert (found["pattern"], found["violations"]) == (f"{n}:{m}", 0)
    assert found["sparsity"] == pytest.approx(1 - n / m)


def test_unstructured_zeros_are_recognised(at_workshop: Path, lors: Lors) -> None:
    generator = torch.Generator().manual_seed(0)
    rewrite(Path("dense"), lambda weight: weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.5, 0))
    found = json.loads(lors("inspect", "dense", "--json").stdout)
    assert (found["pattern"], found["violations"]) == ("unstructured", 0)
    assert found["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("with_record", [True, False])
def test_one_broken_group_is_counted(at_finished: Path, lors: Lors, with_record: bool) -> None:
    if not with_record:
        (PRUNED / "stage.json").unlink()
    done: list[bool] = []

    def fill_one(weight: torch.Tensor) -> None:
        if not done:
            weight[0, :4] = 1
            done.append(True)

    rewrite(PRUNED, fill_one)
    result = lors("inspect", PRUNED, "--json")
    assert result.exit_code == 5
    found = json.loads(result.stdout)
    assert (found["pattern"], found["violations"]) == ("2:4", 1)
    assert "1 violations of 2:4" in result.stderr


def test_many_layers_are_folded(at_workshop: Path, lors: Lors) -> None:
    config = json.loads(Path("dense/config.json").read_text())
    tensors = load_file("dense/model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name]:
        for index in (2, 3):
            tensors[name.replace(".1.", f".{index}.")] = tensors[name].clone()
    save_file(tensors, "dense/model.safetensors", metadata={"format": "pt"})
    Path("dense/config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "12 more, shown with -v" in lors("inspect", "dense").stdout
    assert "more, shown" not in lors("inspect", "dense", "-v").stdout


def test_a_copied_checkpoint_is_the_same(at_finished: Path, lors: Lors) -> None:
    shutil.copytree(TUNED, "elsewhere")
    assert lors("inspect", "elsewhere", "--json").stdout == lors("inspect", TUNED, "--json").stdout


def test_detection_looks_at_all_layers_together() -> None:
    torch.manual_seed(0)
    weights = block_weights(nn.ModuleList([nn.Linear(32, 16, bias=False) for _ in range(3)]), "layers.0")
    assert detect_pattern(weights) is None
    for weight in weights.values():
        keep(2, 4)(weight.matrix)
    assert detect_pattern(weights) == Pattern(2, 4, 0.5)


def test_what_a_stage_recorded_is_read_without_making_the_model(
    at_finished: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.models import inspection, loading

    expected = {path: json.loads(lors("inspect", path, "--json").stdout) for path in (PRUNED, TUNED)}
    with monkeypatch.context() as patched:
        patched.setattr(loading, "load_model", None)
        for path, document in expected.items():
            assert json.loads(lors("inspect", path, "--json").stdout) == document
    monkeypatch.setattr(inspection, "_measure_recorded", lambda *_: None)  # by the model, as any other checkpoint
    for path, document in expected.items():
        assert json.loads(lors("inspect", path, "--json").stdout) == document


def test_sizes_are_remembered_and_a_broken_memory_is_none(
    at_finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lors_cli.models import size
    from lors_cli.recipe.schema import ModelConfig

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(size, "_known_sizes", {})
    first = size.model_size(ModelConfig(path="dense"))
    assert first is not None
    assert first.num_parameters > first.num_prunable == sum(rows * columns for rows, columns in first.linears)
    measured = size._measured
    for content in (None, "{}", '["x"]', "\x00"):
        monkeypatch.setattr(size, "_known_sizes", {})
        if content is None:
            monkeypatch.setattr(size, "_measured", None)
        else:
            monkeypatch.setattr(size, "_measured", measured)
            (tmp_path / "cache" / "lors" / "sizes.json").write_text(content)
        assert size.model_size(ModelConfig(path="dense")) == first
