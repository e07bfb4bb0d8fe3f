"""Sweep files: the grid's product, what goes with a value, and every mistake at its line and cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from lors_cli.errors import UsageError
from lors_cli.recipe.loading import load_recipe
from lors_cli.sweep.cells import Sweep, load_sweep, select_cells

BASE = """\
name: base
model: {path: m}
prune: {method: wanda}
tune: {rank: 8}
eval: {tasks: [rte]}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def load(text: str, *overrides: str) -> Sweep:
    Path("s.yaml").write_text(text if "name:" in text else f"name: s\nrecipe: base.yaml\n{text}")
    return load_sweep(Path("s.yaml"), overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(text, *overrides)
    return caught.value.message.splitlines()


def names(sweep: Sweep) -> list[str]:
    return [cell.name for cell in sweep.cells]


def test_the_cells_are_the_product_of_the_axes() -> None:
    sweep = load("grid: {prune.method: [wanda, ria], tune.rank: [4, 16], tune.use_rslora: [true, false]}\n")
    expected = [
        (method, rank, scaled) for method in ("wanda", "ria") for rank in (4, 16) for scaled in (True, False)
    ]  # fmt: skip
    found = [cell.recipe for cell in sweep.cells]
    assert [
        (r.prune.method, r.tune.rank, r.tune.use_rslora) for r in found if r.prune and r.tune
    ] == expected  # fmt: skip
    assert names(sweep)[0] == "wanda-rank4-use_rsloratrue"
    assert len(set(names(sweep))) == 8
    assert sweep.axes == {"prune.method": ["wanda", "ria"], "tune.rank": [4, 16], "tune.use_rslora": [True, False]}


def test_a_cell_is_the_base_recipe_with_its_overrides() -> None:
    sweep = load(
        "set: {eval.limit: 5, tune: {epochs: 2, data.max_length: 64}, seed: 7}\n"
        "grid: {tune.method: [lors, spp]}\n"
        "per: {tune.method: {spp: {tune.learning_rate: 3e-2, tune.alpha: 8}}}\n"
    )
    common = ["eval.limit=5", "tune.epochs=2", "tune.data.max_length=64", "seed=7"]
    lors, spp = sweep.cells
    assert lors.recipe == load_recipe(Path("base.yaml"), [*common, "tune.method=lors"])
    assert spp.recipe == load_recipe(
        Path("base.yaml"), [*common, "tune.method=spp", "tune.learning_rate=3e-2", "tune.alpha=8"]
    )
    assert spp.recipe.tune is not None
    assert spp.recipe.tune.seed == 7
    assert spp.values == {"tune.method": "spp"}
    assert spp.overrides == {
        "eval.limit": 5, "tune.epochs": 2, "tune.data.max_length": 64, "seed": 7, "tune.method": "spp",
        "tune.learning_rate": 3e-2, "tune.alpha": 8,
    }  # fmt: skip


def test_several_base_recipes_are_an_axis() -> None:
    Path("other.yaml").write_text(BASE.replace("name: base", "name: other").replace("path: m", "path: n"))
    sweep = load(
        "name: s\nrecipe: [base.yaml, other.yaml]\ngrid: {tune.method: [lors, sqft]}\n"
        "per: {recipe: {other: {tune.rank: 2}}}\n"
    )
    assert names(sweep) == ["base-lors", "base-sqft", "other-lors", "other-sqft"]
    assert list(sweep.axes) == ["recipe", "tune.method"]
    assert [(cell.base, cell.recipe.model.path) for cell in sweep.cells][1:3] == [("base", "m"), ("other", "n")]
    assert [cell.recipe.tune.rank for cell in sweep.cells if cell.recipe.tune] == [8, 8, 2, 2]
    assert names(load("name: s\nrecipe: [base.yaml, other.yaml]\n")) == ["base", "other"]


def test_a_recipe_beside_the_sweep_and_one_in_it() -> None:
    Path("far").mkdir()
    Path("far/near.yaml").write_text(BASE)
    Path("far/s.yaml").write_text("name: s\nrecipe: near.yaml\ngrid: {tune.rank: [1, 2]}\n")
    assert len(load_sweep(Path("far/s.yaml")).cells) == 2
    inline = "name: s\nrecipe:\n  name: mine\n  model: {path: m}\n  tune: {}\ngrid: {tune.rank: [1, 2]}\n"
    assert load(inline).cells[0].base == "mine"
    assert load("name: s\nrecipe: quickstart\ngrid: {tune.rank: [1]}\n").cells[0].recipe.name == "quickstart"


def test_a_list_of_grids() -> None:
    sweep = load("grid:\n- {prune.method: [wanda, ria], tune.rank: [4]}\n- {tune.alpha: [1, 2.5]}\n")
    assert names(sweep) == ["wanda-rank4", "ria-rank4", "alpha1", "alpha2.5"]
    assert [list(cell.values) for cell in sweep.cells][1:3] == [["prune.method", "tune.rank"], ["tune.alpha"]]
    assert list(sweep.axes) == ["prune.method", "tune.rank", "tune.alpha"]
    message = problems("grid:\n- {tune.rank: [4, 5]}\n- {tune.rank: [5]}\n")
    assert message == ["grid: two cells are the same: tune.rank=5"]


def test_names_are_told_apart() -> None:
    sweep = load("grid:\n- {tune.data.dataset: [c4]}\n- {prune.calibration.dataset: [c4]}\n")
    assert names(sweep) == ["tune.data.dataset=c4", "prune.calibration.dataset=c4"]
    sweep = load("grid: {prune.pattern: [2:4, 4:8], tune.learning_rate: [1e-4, 0.01]}\n")
    assert names(sweep)[0] == "2of4-learning_rate0.0001"
    assert [cell.recipe.prune.pattern for cell in sweep.cells if cell.recipe.prune] == ["2:4", "2:4", "4:8", "4:8"]


def test_values_that_differ_in_their_last_digit_or_far_from_their_end_are_two_cells() -> None:
    found = names(load("grid: {tune.learning_rate: [1e-4, 1.00000001e-4]}\n"))
    assert found == ["learning_rate0.0001", "learning_rate0.000100000001"]
    far = "x" * 60
    for texts in (f"[/a/{far}, /b/{far}]", "[a b, a_b]", f"[a-{'x' * 59}, b-{'x' * 59}]"):
        found = names(load(f"grid: {{tune.data.dataset: {texts}}}\n"))
        assert len(set(found)) == 2
        assert all(name.startswith("tune.data.dataset=") for name in found)
    assert found[0].startswith("tune.data.dataset=xxx")
    assert names(load(f"grid: {{tune.data.dataset: [a-{'x' * 59}]}}\n")) == ["x" * 59]  # no option of a command


def test_values_are_read_as_in_a_recipe() -> None:
    sweep = load(
        "grid: {prune.pattern: [2:4, unstructured], tune.learning_rate: [1e-4]}\n"
        "per:\n  prune.pattern: {unstructured: {prune.sparsity: 0.5}}\n"
        "  tune.learning_rate: {0.0001: {tune.min_learning_rate: 1e-5}}\n"
    )
    assert [cell.recipe.prune.sparsity for cell in sweep.cells if cell.recipe.prune] == [None, 0.5]
    assert [cell.recipe.tune.min_learning_rate for cell in sweep.cells if cell.recipe.tune] == [1e-5, 1e-5]


def test_the_command_line_wins_over_the_file() -> None:
    text = (
        "set: {eval.limit: 5}\ngrid: {tune.method: [lors, spp]}\n"
        "per: {tune.method: {spp: {tune.learning_rate: 3e-2, tune.rank: 4}}}\n"
    )
    sweep = load(text, "eval.limit=2", "tune.learning_rate=1e-3")
    assert [cell.recipe.eval.limit for cell in sweep.cells if cell.recipe.eval] == [2, 2]
    assert [cell.recipe.tune.learning_rate for cell in sweep.cells if cell.recipe.tune] == [1e-3, 1e-3]
    assert [cell.recipe.tune.rank for cell in sweep.cells if cell.recipe.tune] == [8, 4]
    assert problems(text, "tune.method=lors") == [
        "override tune.method=lors: tune.method is an axis of the grid; --only chooses cells"
    ]
    assert "did you mean tune.rank?" in problems(text, "tune.rnak=2")[0]


def test_a_seed_on_the_command_line_is_every_stages() -> None:
    sweep = load("set: {tune.seed: 5}\ngrid: {tune.rank: [2, 4]}\n", "seed=7")
    Path("again.yaml").write_text(sweep.text)
    for cell in (*sweep.cells, *load_sweep(Path("again.yaml")).cells):
        assert cell.recipe.tune is not None
        assert cell.recipe.prune is not None
        assert (cell.recipe.tune.seed, cell.recipe.prune.calibration.seed) == (7, 7)
    (bare,) = load("set: {tune: null, eval.models: [dense, pruned]}\ngrid: {prune.method: [wanda]}\n", "seed=7").cells
    assert bare.recipe.tune is None
    assert problems("grid: {tune.seed: [1, 2]}\n", "seed=7") == [
        "override seed=7: tune.seed is an axis of the grid; --only chooses cells"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "set: {eval.limit: 5, tune: {data.max_length: 64}}\n"
        "grid: {prune.pattern: [2:4, unstructured], tune.rank: [4, 8], tune.use_rslora: [true, false]}\n"
        "per: {prune.pattern: {unstructured: {prune.sparsity: 0.5}}, tune.rank: {8: {tune.alpha: 2}}, "
        "tune.use_rslora: {false: {tune.epochs: 1.5}}}\n",
        "grid:\n- {tune.rank: [4, 8]}\n- {prune.method: [ria]}\n",
        "name: s\nrecipe: [base.yaml, quickstart]\nset: {tune: null, eval.models: [dense, pruned]}\n",
    ],
)
def test_the_resolved_text_is_the_same_sweep(text: str) -> None:
    sweep = load(text, "eval.limit=3")
    Path("elsewhere").mkdir()
    Path("elsewhere/again.yaml").write_text(sweep.text)
    Path("base.yaml").unlink()
    assert load_sweep(Path("elsewhere/again.yaml")) == sweep


def test_only() -> None:
    sweep = load("grid: {prune.method: [wanda, ria], tune.method: [lors, sqft, spp]}\n")
    assert select_cells(sweep, []) == sweep.cells
    assert [cell.name for cell in select_cells(sweep, ["ria-s*", "wanda-spp"])] == ["wanda-spp", "ria-sqft", "ria-spp"]
    with pytest.raises(UsageError) as caught:
        select_cells(sweep, ["wanda-sp"])
    assert "--only wanda-sp" in caught.value.message
    assert "Did you mean wanda-spp?" in str(caught.value.hint)


# Mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("recipe: base.yaml\ngrid: {tune.rank: [1]}\nname: a b\n", ["s.yaml:3: name: must start with a letter"]),
    ("name: s\ngrid: {tune.rank: [1]}\n", ["s.yaml:1: recipe: this key is missing"]),
    ("name: s\nrecipe: bsae.yaml\ngrid: {tune.rank: [1]}\n", ["s.yaml:2: recipe: There is no recipe 'bsae.yaml'"]),
    ("name: s\nrecipe: [base.yaml, base.yaml]\n", ["s.yaml:2: recipe: two recipes are named base"]),
    ("name: s\nrecipe: []\n", ["s.yaml:2: recipe: must have at least one entry"]),
    ("name: s\nrecipe: table1\n", ["s.yaml:2: recipe: table1 is no recipe."]),
    ("set: {eval.limit: 3}\n", ["s.yaml:1: grid: this key is missing"]),
    ("gird: {tune.rank: [1]}\n", ["s.yaml:3: gird: unknown key; did you mean grid?", "grid: this key is missing"]),
    ("tune: {rank: 3}\ngrid: {tune.rank: [1]}\n", ["s.yaml:3: tune: unknown key; a recipe's own settings go below"]),
    ("grid:\n  tune.rnak: [1]\n", ["s.yaml:4: grid.tune.rnak: unknown key; did you mean tune.rank?"]),
    ("grid:\n  tune.rank: [1]\n  tune.rank: [2]\n", ["s.yaml:5: grid.tune.rank: given twice; the first is on line 4"]),
    ("grid: {tune.rank: 3}\n", ["grid.tune.rank: must be a list of values, for example [3]"]),
    ("grid: {tune.rank: []}\n", ["grid.tune.rank: must be a list of values"]),
    ("grid: {tune.rank: [1, 2, 1]}\n", ["grid.tune.rank: 1 is listed twice"]),
    ("grid: {eval.tasks: [[rte], [boolq]]}\n", ["grid.eval.tasks: each value must be one text"]),
    ("grid: {tune: [1]}\n", ["grid.tune: is a section; an axis is a single setting, such as tune.method"]),
    ("grid: {recipe: [a]}\n", ["grid.recipe: base recipes are listed at the top level"]),
    ("grid: []\nset: {seed: 1}\n", ["grid: must hold axes"]),
    ("grid: {tune.rank: [1]}\nset:\n", ["s.yaml:4: set: must hold a recipe's settings"]),
    ("grid: {tune.rank: [1]}\nset: {tune.rank: 3}\n", ["s.yaml:4: set: tune.rank is an axis of the grid too"]),
    ("grid: {tune.rank: [1]}\nset: {tune.alpha: 3, tune: {alpha: 4}}\n", ["set: tune.alpha is given twice"]),
    ("grid: {tune.rank: [1]}\nset: {name: x}\n", ["set.name: a cell's name is made from its values"]),
    ("grid: {tune.rank: [1]}\nper: {tune.method: {lors: {seed: 1}}}\n", ["per.tune.method: is no axis of the grid"]),
    ("grid: {tune.method: [lors]}\nper: {tune.method: {losr: {seed: 1}}}\n", ["did you mean lors?"]),
    ("grid: {tune.method: [lors]}\nper: {tune.method: {lors: {tune.metod: 1}}}\n", ["did you mean tune.method?"]),
    ("grid: {tune.method: [lors]}\nper: {tune.method: {lors: {tune.method: spp}}}\n", ["is an axis of the grid"]),
    ("grid: {tune.method: [lors]}\nper: {tune.method: lors}\n", ["per.tune.method: must hold values of this axis"]),
    (
        "grid: {tune.method: [lors], tune.rank: [1]}\n"
        "per: {tune.method: {lors: {seed: 1}},\n  tune.rank: {1: {seed: 2}}}\n",
        ["s.yaml:5: seed is given on s.yaml:4 too"],
    ),
    (
        "grid: {seed: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], tune.rank: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],\n"
        " eval.limit: [1, 2, 3, 4, 5, 6, 7, 8, 9]}\n",
        ["makes 1089 cells; at most 1000"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=[said[-1] for _, said in MISTAKES])
def test_mistakes(text: str, said: list[str]) -> None:
    found = problems(text)
    for part in said:
        assert any(part in line for line in found), found


def test_all_mistakes_are_told_at_once() -> None:
    assert len(problems("set: {tune.rnak: 1, seed: }\ngrid: {tune.method: lors, prune.patern: [2:4]}\nfoo: 1\n")) == 5


def test_what_is_wrong_with_a_recipe_names_its_cells() -> None:
    found = problems(
        "set:\n  tune.epochs: 0\ngrid:\n  tune.method: [lors, spp, hirra]\n  tune.rank: [8, no]\n"
        "per: {tune.method: {spp: {tune.init: gradient}}}\n"
    )
    assert found == [
        "s.yaml:4: tune.epochs: must be above 0, not 0 (cells lors-rank8, lors-no, spp-rank8 and 3 more)",
        "s.yaml:7: tune.rank: must be a whole number, not no (cells lors-no, spp-no, hirra-no)",
        "s.yaml:8: tune.init: gradient is for additive updates, and spp multiplies the weight "
        "(cells spp-rank8, spp-no)",
        "s.yaml:6: tune.method: must be one of lors, sqft, sqft-gc, spp, spp-gc, hira, hira-gc, lora, not hirra; "
        "did you mean hira? (cells hirra-rank8, hirra-no)",
    ]


def test_a_mistake_in_the_base_recipe_has_its_own_place() -> None:
    Path("base.yaml").write_text(BASE.replace("rank: 8", "rnak: 8"))
    (line,) = problems("grid: {tune.method: [lors]}\n")
    assert line == "base.yaml:4: tune.rnak: unknown key; did you mean rank? (cell lors)"
