"""The benchmark of quality over size: its cells' order, the bits that it counts, its table and figure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cells
import int4_quality

from lors_cli.models.packed.stage import pack_model
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import ModelConfig, PackConfig, PruneConfig

LINEARS = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)  # q and o, k and v, gate, up and down of three blocks
BESIDES = 2 * 64 * 32 + 7 * 32  # embedding, head, norms
MARKS = int4_quality.marks_of(Path("results/int4-quality-cpu.json"))


def test_a_base_comes_before_what_is_tuned_from_it_and_perplexities_before_tasks() -> None:
    wanted = int4_quality.cells_of(["admm-int4-lors-qa", "dense"], with_tasks=True)
    assert wanted == ["dense.model", "admm-int4.model", "admm-int4-lors-qa.model", "admm-int4-lors-qa.tasks",
                     "dense.tasks"]  # fmt: skip
    whole = int4_quality.cells_of(list(int4_quality.ROWS), with_tasks=True)
    assert [cell.partition(".")[2] for cell in whole] == (
        ["model"] * len(int4_quality.ROWS) + ["tasks"] * len(int4_quality.ROWS))  # fmt: skip
    assert all(whole.index(before) < whole.index(cell) for cell in whole if (before := int4_quality.needed(cell)))


def test_a_cell_waits_for_its_base_and_rows_join_their_cells() -> None:
    wanted = int4_quality.cells_of(["sparsegpt-int4-lors", "dense"], with_tasks=True)
    assert int4_quality.ready(wanted, {}) == ["dense.model", "sparsegpt-int4.model"]
    found = {"sparsegpt-int4.model": {"bits": 3.1}, "dense.model": {"bits": 16}, "dense.tasks": {"mean_acc": 0.4}}
    assert int4_quality.ready(wanted, found) == [
        "dense.model", "sparsegpt-int4.model", "sparsegpt-int4-lors.model", "dense.tasks"]  # fmt: skip
    assert int4_quality.rows_of(found) == {"dense": {"bits": 16, "mean_acc": 0.4}, "sparsegpt-int4": {"bits": 3.1}}


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


FIGURES = {
    "dense": {"bits": 16.0, "bits_file": 16.0, "file_bytes": 269e6, "wikitext2": 29.53, "mean_acc": 0.45},
    "sparsegpt-int4": {"bits": 3.13, "bits_file": 5.8, "file_bytes": 98e6, "wikitext2": 120.0},
}


def test_the_table_of_a_page_is_made_anew() -> None:
    page = "before\n\n{}\n\nold\n\n{}\n\nafter\n".format(*MARKS)
    table = list(int4_quality.table(FIGURES))
    new = cells.with_table(page, MARKS, table)
    assert new.startswith("before\n\n")
    assert new.endswith("\n\nafter\n")
    assert "old" not in new
    assert "| dense bfloat16 | 16.00 | 16.00 | 269 | 29.53 | 45.00 |" in new
    assert "| 2:4 int4, SparseGPT | 3.13 | 5.80 | 98 | 120.00 |  |" in new
    assert cells.with_table(new, MARKS, table) == new
    assert "\n\n![Bits](plot.png)\n\n" in cells.with_table(page, MARKS, table, "![Bits](plot.png)")


def test_the_figure_is_small_and_the_same_each_time() -> None:
    png = int4_quality.figure(FIGURES)
    assert png.startswith(b"\x89PNG")
    assert len(png) < 200_000
    assert png == int4_quality.figure(FIGURES)
    perplexities = {"dense": {key: value for key, value in FIGURES["dense"].items() if key != "mean_acc"}}
    assert int4_quality.figure(perplexities).startswith(b"\x89PNG")
