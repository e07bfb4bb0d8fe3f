"""One colour a model, in every figure of a report."""

from __future__ import annotations

from pathlib import Path

from lors_cli.report.colours import coloured
from lors_cli.report.drawing import METHOD_COLOURS, PALETTE, sparsity_map, style
from lors_cli.report.groups import groups
from lors_cli.report.measures import Group, ScoredModel
from lors_cli.report.results import read_sweep
from lors_cli.report.score_figures import accuracy_panels
from lors_cli.report.stage_figures import loss_of_cells


def model(role: str, label: str, method: str = "") -> ScoredModel:
    return ScoredModel(role, label, "b", tune={"method": method} if method else {})


def looks(*models: ScoredModel) -> dict[str, str]:
    (group,) = coloured([Group("g", models)])
    return {found.label: found.look.colour for found in group.models}


def test_roles_have_their_colours() -> None:
    found = looks(model("dense", "d"), model("pruned", "p"), model("tuned", "t", "sqft"))
    assert found == {"d": PALETTE["dense"], "p": PALETTE["pruned"], "t": PALETTE["tuned"]}


def test_of_several_methods_each_has_its_own() -> None:
    methods = ("lors", "sqft", "spp", "hira", "lora", "mine")
    found = looks(model("dense", "d"), model("pruned", "p"), *(model("tuned", name, name) for name in methods))
    assert len(set(found.values())) == 8
    assert {name: found[name] for name in methods[:5]} == {name: METHOD_COLOURS[name] for name in methods[:5]}


def test_several_of_a_kind_are_shades_and_the_first_keeps_the_hue() -> None:
    found = looks(*(model("tuned", str(place), "lors") for place in range(4)))
    assert found["0"] == PALETTE["tuned"]
    reds = [int(colour[1:3], 16) for colour in found.values()]
    assert reds == sorted(set(reds)), "lighter and lighter"


def test_names_keep_their_colours_when_one_comes_after() -> None:
    few = looks(model("", "base"), model("", "mine"))
    more = looks(model("", "base"), model("", "mine"), model("", "later"))
    assert few == {name: more[name] for name in few}
    assert len(set(more.values())) == 3


def test_bars_and_curves_of_a_model_have_one_colour(sweep: Path) -> None:
    results = read_sweep(sweep)
    found = groups(results)
    with style():
        panels, losses = accuracy_panels(found), loss_of_cells(results.cells, found)
    assert panels is not None
    assert losses is not None
    labels = [tick.get_text() for tick in panels.axes[0].get_yticklabels()]
    bars = dict(zip(labels, (bar.get_facecolor()[:3] for bar in panels.axes[0].patches), strict=True))
    from matplotlib.colors import to_rgb

    curves = {line.get_label(): to_rgb(line.get_color()) for line in losses.axes[0].lines}
    assert len(curves) == 4
    assert {label: bars[label] for label in curves} == curves
    legend = [text.get_text() for text in panels.legends[0].get_texts()]
    assert legend == ["dense", "pruned", "LoRS", "SPP", "SQFT", "the paper's", "guessing"]


def test_panels_and_their_numbers_do_not_touch(sweep: Path) -> None:
    with style():
        figure = accuracy_panels(groups(read_sweep(sweep)))
        assert figure is not None
        figure.canvas.draw()
        boxes = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()]
    for place, box in enumerate(boxes):
        for other in boxes[place + 1 :]:
            beside = box.x1 + 4 < other.x0 or other.x1 + 4 < box.x0
            assert beside or box.y1 + 2 < other.y0 or other.y1 + 2 < box.y0


def test_a_map_of_one_colour_is_not_drawn() -> None:
    assert sparsity_map({"q_proj": {0: 0.5, 1: 0.5}}) is None
    with style():
        small = sparsity_map({"q_proj": {0: 0.4, 1: 0.6}})
    assert small is not None
    assert small.get_figwidth() < 5
    assert small.get_figheight() < 2
