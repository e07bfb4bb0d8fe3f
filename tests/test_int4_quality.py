"""The benchmark of quality over size: its cells' order, the bits that it counts, its table and figure."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import int4_quality

from lors_cli.models.packed.stage import pack_model
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import ModelConfig, PackConfig, PruneConfig

LINEARS = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)  # q and o, k and v, gate, up and down of three blocks
BESIDES = 2 * 64 * 32 + 7 * 32  # embedding, head, norms


def test_a_base_comes_before_what_is_tuned_from_it_and_perplexities_before_tasks() -> None:
    cells = int4_quality.cells_of(["admm-int4-lors-qa", "dense"], with_tasks=True)
    assert cells == [("dense", "model"), ("admm-int4", "model"), ("admm-int4-lors-qa", "model"),
                     ("admm-int4-lors-qa", "tasks"), ("dense", "tasks")]  # fmt: skip
    whole = int4_quality.cells_of(list(int4_quality.ROWS), with_tasks=True)
    assert [kind for _, kind in whole] == ["model"] * len(int4_quality.ROWS) + ["tasks"] * len(int4_quality.ROWS)
    assert all(whole.index(before) < whole.index(cell) for cell in whole if (before := int4_quality.needed(cell)))


ROWS = 3 * (2 * 32 + 2 * 16 + 2 * 64 + 32)


@pytest.mark.parametrize(("bits", "expected"), [(None, 16 * LINEARS), (3, 3 * LINEARS + 16 * ROWS)])
def test_bits_of_a_dense_model(bits: int | None, expected: int, checkpoint: Path) -> None:
    """No row here has more than 128 inputs: each has one group and one scale of 16 bits."""
    found = int4_quality.dense_size(str(checkpoint), bits)
    assert found["bits"] == round(expected / LINEARS, 4)
    assert found["file_bytes"] == expected // 8 + 2 * BESIDES
    assert found["bits_file"] == round(8 * found["file_bytes"] / (LINEARS + BESIDES), 4)


def test_bits_of_a_packed_model(checkpoint: Path, tmp_path: Path) -> None:
    source = ModelConfig(path=str(checkpoint), dtype="bfloat16", device="cpu")
    prune(PruneConfig(method="magnitude", pattern="2:4"), source, tmp_path / "sparse")
    pack_model(PackConfig(), ModelConfig(path=str(tmp_path / "sparse")), tmp_path / "packed")
    found = int4_quality.packed_size(tmp_path / "packed", tmp_path / "sparse")
    tail = 3 * 7 * 32 * 16  # 32 zeros behind the values of each linear
    assert found["bits"] == round((LINEARS * 9 + tail) / LINEARS, 4)
    tensors = load_file(tmp_path / "packed/model.safetensors").values()
    assert found["file_bytes"] == sum(tensor.nbytes for tensor in tensors)


class TestRunning:
    def options(self, tmp_path: Path) -> argparse.Namespace:
        return argparse.Namespace(work=tmp_path / "work", out=tmp_path / "out.json", jobs=2)

    def start(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str | None = None) -> list[Any]:
        """Have cells be processes that write their names; gives the cells in the order in which they began."""
        begun: list[Any] = []

        def begin(cell: int4_quality.Cell, options: argparse.Namespace) -> subprocess.Popen[bytes]:
            begun.append(cell)
            file = int4_quality.cell_file(options.work, cell)
            file.parent.mkdir(parents=True, exist_ok=True)
            code = f"open({str(file)!r}, 'w').write({json.dumps({cell[1]: cell[0]})!r})"
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)" if cell[0] == failing else code])

        monkeypatch.setattr(int4_quality, "start", begin)
        return begun

    def test_what_is_there_is_not_measured_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options = self.options(tmp_path)
        cells = int4_quality.cells_of(["sparsegpt-int4-lors"], with_tasks=True)
        begun = self.start(monkeypatch, tmp_path)
        assert int4_quality.run_all(cells, options)
        assert begun == cells
        assert json.loads(options.out.read_text()) == {
            "sparsegpt-int4": {"model": "sparsegpt-int4"},
            "sparsegpt-int4-lors": {"model": "sparsegpt-int4-lors", "tasks": "sparsegpt-int4-lors"},
        }
        assert int4_quality.run_all(cells, options)
        assert begun == cells

    def test_a_cell_that_fails_takes_those_that_need_it_along(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cells = int4_quality.cells_of(["sparsegpt-int4-lors", "dense"], with_tasks=True)
        begun = self.start(monkeypatch, tmp_path, failing="sparsegpt-int4")
        assert not int4_quality.run_all(cells, self.options(tmp_path))
        assert sorted(begun) == [("dense", "model"), ("dense", "tasks"), ("sparsegpt-int4", "model")]


FIGURES = {
    "dense": {"bits": 16.0, "bits_file": 16.0, "file_bytes": 269e6, "wikitext2": 29.53, "mean_acc": 0.45},
    "sparsegpt-int4": {"bits": 3.13, "bits_file": 5.8, "file_bytes": 98e6, "wikitext2": 120.0},
}


def test_the_table_of_a_page_is_made_anew() -> None:
    page = f"before\n\n{int4_quality.BEGIN}\n\nold\n\n{int4_quality.END}\n\nafter\n"
    new = int4_quality.with_table(page, FIGURES)
    assert new.startswith("before\n\n")
    assert new.endswith("\n\nafter\n")
    assert "old" not in new
    assert "| dense bfloat16 | 16.00 | 16.00 | 269 | 29.53 | 45.00 |" in new
    assert "| 2:4 int4, SparseGPT | 3.13 | 5.80 | 98 | 120.00 |  |" in new
    assert int4_quality.with_table(new, FIGURES) == new
    assert "\n\n![Quality over bits a weight](plot.png)\n\n" in int4_quality.with_table(new, FIGURES, "plot.png")


def test_the_figure_is_small_and_the_same_each_time() -> None:
    png = int4_quality.figure(FIGURES)
    assert png.startswith(b"\x89PNG")
    assert len(png) < 200_000
    assert png == int4_quality.figure(FIGURES)
    perplexities = {"dense": {key: value for key, value in FIGURES["dense"].items() if key != "mean_acc"}}
    assert int4_quality.figure(perplexities).startswith(b"\x89PNG")
