"""Figures as bytes: the same each time, without names from outside, in the page's colours."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from lors_cli.report.drawing import draw_all, figure_of, sparsity_map

HOSTILE = 'a <script> "b" $x_1$ id="c" #222222'


def curve(label: str) -> Any:
    figure, axes = figure_of(6, 4)
    axes.plot([1, 2, 3], [3.0, 1.0, 2.0], marker="o", label=label)
    axes.legend()
    return figure


def test_names_stay_text_and_nothing_is_outside() -> None:
    found = draw_all({"one": lambda: curve(HOSTILE), "none": lambda: None})
    assert list(found) == ["one"]
    svg = found["one"].svg
    assert "http" not in svg
    assert "<script" not in svg
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert HOSTILE in [element.text for element in root.iter("text")]
    assert "currentColor" in svg


def test_ids_are_the_figures_own_and_all_used() -> None:
    found = draw_all({"one": lambda: curve("x"), "two": lambda: curve("x")})
    for name, drawing in found.items():
        root = ElementTree.fromstring(drawing.svg.replace("xlink:href", "href"))
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert ids
        assert len(ids) == len(set(ids))
        for key in ids:
            assert key.startswith(f"{name}-")
            assert f'href="#{key}"' in drawing.svg or f"url(#{key})" in drawing.svg


def test_the_same_figure_is_the_same_bytes(monkeypatch: Any) -> None:
    first = draw_all({"one": lambda: curve("x")})
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert draw_all({"one": lambda: curve("x")}) == first


def test_a_map_of_sparsity() -> None:
    found = draw_all({"map": lambda: sparsity_map({"q_proj": {0: 0.5, 1: 0.25}, "up_proj": {1: 0.5}})})["map"]
    root = ElementTree.fromstring(found.svg.replace("xlink:href", "href"))
    texts = [element.text for element in root.iter("text")]
    assert {"q_proj", "up_proj", "decoder block"} <= set(texts)
    assert len(found.svg) < 30_000
