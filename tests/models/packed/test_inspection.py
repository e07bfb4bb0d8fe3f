"""`lors inspect` of packed checkpoints: what it says of the plain one, without unpacking it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import made_sparse, pack
from safetensors.torch import load_file, save_file
from typer.testing import Result

from lors_cli.errors import UsageError
from lors_cli.models import inspection, loading
from lors_cli.models.inspection import inspect
from lors_cli.models.packed import inspection as packed_inspection
from lors_cli.recipe.schema import ModelConfig
from lors_cli.sparsity import Pattern

Lors = Callable[..., Result]


def packed_and_plain(checkpoint: Path, tmp_path: Path, pattern: Pattern, spare: str = "!") -> list[ModelConfig]:
    made_sparse(checkpoint, pattern, spare)
    pack(checkpoint, tmp_path / "packed")
    return [ModelConfig(path=str(path)) for path in (tmp_path / "packed", checkpoint)]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("pattern", [Pattern.parse("2:4"), Pattern.parse("unstructured", 0.6)], ids=str)
def test_the_same_is_said_as_of_the_plain_model_and_nothing_is_unpacked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: Pattern, recorded: bool
) -> None:
    packed, plain = packed_and_plain(checkpoint, tmp_path, pattern)
    expected = inspect(plain)
    if not recorded:
        (tmp_path / "packed/stage.json").unlink()
    monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.setattr(packed_inspection, "unpack", None)
    found = inspect(packed)
    sizes = found.pop("packed")
    assert found == expected
    files = [load_file(Path(model.path) / "model.safetensors") for model in (packed, plain)]
    assert list(sizes.values()) == [sum(tensor.nbytes for tensor in file.values()) for file in files]
    assert "packed" not in expected


def test_a_recorded_one_makes_no_network(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = packed_and_plain(checkpoint, tmp_path, Pattern.parse("2:4"))
    monkeypatch.setattr(inspection, "_measure_packed", None)
    assert inspect(packed)["violations"] == 0


@pytest.mark.parametrize("asked", ["2:4", "4:8", "1:4", "2:8"])
def test_held_against_any_pattern_as_the_plain_model_is(checkpoint: Path, tmp_path: Path, asked: str) -> None:
    packed, plain = packed_and_plain(checkpoint, tmp_path, Pattern.parse("2:4"))
    found, expected = (inspect(model, Pattern.parse(asked)) for model in (packed, plain))
    assert found.pop("packed")
    assert found == expected
    assert bool(found["violations"]) == (asked in ("1:4", "2:8"))


@pytest.mark.parametrize("recorded", [True, False])
def test_what_stayed_dense_is_named(checkpoint: Path, tmp_path: Path, recorded: bool) -> None:
    packed, _ = packed_and_plain(checkpoint, tmp_path, Pattern.parse("2:4"), spare="layers.1.")
    if not recorded:
        (tmp_path / "packed/stage.json").unlink()
    found = inspect(packed)
    assert (found["pattern"], found["sparsity"]) == ("2:4", 0.5)
    assert (len(found["layers"]), len(found["dense_layers"])) == (14, 7)
    assert all(name.startswith("model.layers.1.") for name in found["dense_layers"])


def test_a_weight_that_fills_zeros_of_an_unstructured_one_is_told(checkpoint: Path, tmp_path: Path) -> None:
    packed, _ = packed_and_plain(checkpoint, tmp_path, Pattern.parse("unstructured", 0.6))
    record = json.loads((tmp_path / "packed/stage.json").read_text())
    record["metrics"]["layers"][0]["sparsity"] = 0.9
    (tmp_path / "packed/stage.json").write_text(json.dumps(record))
    assert inspect(packed)["violations"] > 10


@pytest.mark.parametrize("recorded", [True, False])
def test_a_broken_mask_is_refused_in_words(checkpoint: Path, tmp_path: Path, recorded: bool) -> None:
    packed, _ = packed_and_plain(checkpoint, tmp_path, Pattern.parse("2:4"))
    tensors = load_file(tmp_path / "packed/model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("_mask")).bitwise_xor_(torch.tensor(3).int())
    save_file(tensors, tmp_path / "packed/model.safetensors", {"format": "pt"})
    if not recorded:
        (tmp_path / "packed/stage.json").unlink()
    with pytest.raises(UsageError, match="is no packed weight of"):
        inspect(packed)


def test_the_command_says_packed_and_its_size(checkpoint: Path, tmp_path: Path, lors: Lors) -> None:
    packed, plain = packed_and_plain(checkpoint, tmp_path, Pattern.parse("2:4"))
    assert " instead of " in lors("inspect", packed.path).stdout
    assert " instead of " not in lors("inspect", plain.path).stdout
    found = json.loads(lors("inspect", packed.path, "--json").stdout)
    assert set(found) == {"pattern", "sparsity", "violations", "layers", "prompt", "packed"}
    assert set(found["packed"]) == {"bytes", "bytes_plain"}
