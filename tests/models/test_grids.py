"""Grids beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lors_cli.errors import UsageError
from lors_cli.grid import GridSpec, fit_grid
from lors_cli.models.grids import GRIDS_NAME, load_grids, save_grids


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_come_back_as_they_were(tmp_path: Path, symmetric: bool) -> None:
    torch.manual_seed(0)
    weights = {f"layers.{number}.proj": torch.randn(4, 80).bfloat16() for number in range(3)}
    grids = {name: fit_grid(weight, weight > 0, GridSpec(4, 32, symmetric)) for name, weight in weights.items()}
    save_grids(tmp_path, grids)
    loaded = load_grids(tmp_path)
    assert loaded.keys() == grids.keys()
    for name, weight in weights.items():
        assert loaded[name].spec == grids[name].spec
        assert loaded[name].rounded(weight).equal(grids[name].rounded(weight))


def test_a_folder_without_grids_has_none(tmp_path: Path) -> None:
    assert load_grids(tmp_path) == {}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a.scale": torch.ones(2, 3)}, {"bits": "4", "group_size": "32"}),
        ({"a.scale": torch.ones(2, 3)}, {"bits": "9", "group_size": "32", "symmetric": "true"}),
        ({"a.scale": torch.ones(2, 3)}, {"bits": "4", "group_size": "32", "symmetric": "false"}),
        ({"a.scale": torch.zeros(2, 3)}, {"bits": "4", "group_size": "32", "symmetric": "true"}),
        ({"a.scale": torch.ones(6)}, {"bits": "4", "group_size": "32", "symmetric": "true"}),
        ({"a.scale": torch.tensor([[float("nan")]])}, {"bits": "4", "group_size": "32", "symmetric": "true"}),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    (tmp_path / GRIDS_NAME).parent.mkdir()
    save_file(tensors, tmp_path / GRIDS_NAME, metadata=metadata)
    with pytest.raises(UsageError, match="no file of grids"):
        load_grids(tmp_path)


def test_no_file_at_all_in_disguise_is_refused(tmp_path: Path) -> None:
    (tmp_path / GRIDS_NAME).parent.mkdir()
    (tmp_path / GRIDS_NAME).write_bytes(b"not tensors")
    with pytest.raises(UsageError, match="no file of grids"):
        load_grids(tmp_path)
