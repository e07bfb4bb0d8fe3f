"""What all figures share: settings, a canvas, and their bytes as PNG and as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lors_cli.errors import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, AXIS, GRID, PAGE = "#222222", "#888888", "#DDDDDD", "#FFFFFF"
DENSE = "#4D4D4D"
PALETTE = {"dense": DENSE, "pruned": "#E69F00", "tuned": "#0072B2"}  # Okabe and Ito, safe for colour-blind eyes
METHOD_COLOURS = {
    "lora": "#7A5230", "lora-float32": "#B89B7F", "lors": PALETTE["tuned"], "lors-cached": "#56B4E9",
    "lors-nearest": "#003F66", "lors-packed": "#CC79A7", "lors-int4": "#E0B0CC", "lors-qa": "#882255",
    "sqft": "#8C6BB1", "sqft-gc": "#C5B3DB", "sqft-qa": "#332288", "spp": "#D55E00", "spp-gc": "#F0997A",
    "hira": "#009E73", "hira-gc": "#8FD0BB", "lors-exact": "#1B4F9C", "lors-rotating": "#7FA3DB",
}  # fmt: skip
"""None of them is that of a dense or a pruned model."""
THEMED = {INK: "currentColor", AXIS: "var(--axis)", GRID: "var(--grid)", PAGE: "var(--page)", DENSE: "var(--dense)"}
"""What an SVG leaves to the page's style, so that it fits light and dark pages."""
_SETTINGS = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 13, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 12, "axes.labelsize": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": AXIS, "axes.axisbelow": True, "legend.frameon": False,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.labelcolor": INK, "figure.facecolor": "white",
    "savefig.facecolor": "white", "svg.fonttype": "none", "text.parse_math": False,
}  # fmt: skip

Draw: TypeAlias = "Callable[[], Figure | None]"
"""Draws a figure; None when there is nothing to draw."""


@dataclass(frozen=True)
class Look:
    """How the figures of a report show a model."""

    colour: str = PALETTE["tuned"]
    dashes: Any = "solid"
    family: str = ""
    """What its hue stands for, as in a legend."""
    hue: str = PALETTE["tuned"]


@dataclass(frozen=True)
class Drawing:
    """A figure as a file's bytes and as an `<svg>` element."""

    png: bytes
    svg: str


def style() -> AbstractContextManager[None]:
    """The settings that every figure is drawn with, as a context; the user's own are not looked at."""
    import matplotlib as mpl

    settings: Any = {**mpl.rcParamsDefault, **_SETTINGS, "backend": "Agg"}
    return mpl.rc_context(settings)


def draw_all(figures: Mapping[str, Draw]) -> dict[str, Drawing]:
    """Every figure by name that there is something to draw for."""
    drawings = {}
    for name, draw in figures.items():
        with style():
            figure = draw()
            if figure is not None:
                drawings[name] = Drawing(png(figure), svg(figure, name))
    return drawings


def canvas(width: float, height: float) -> Figure:
    """A figure of its own (inches) without axes, outside pyplot, so that no state is left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_of(width: float, height: float) -> tuple[Figure, Any]:
    """A `canvas` and its only axes."""
    figure = canvas(width, height)
    return figure, figure.add_subplot()


def short(label: str) -> str:
    """What fits beside a figure."""
    return shorten(label, 48)


def sparsity_map(rows: Mapping[str, Mapping[int, float]]) -> Figure | None:
    """Shares of zeros by label and block; a block that a row lacks stays empty. None where all shares are the same."""
    blocks = sorted({block for shares in rows.values() for block in shares})
    found = [share for shares in rows.values() for share in shares.values()]
    if not found or max(found) - min(found) < 5e-4:
        return None
    longest = max(len(short(label)) for label in rows)
    cell = 0.3 if len(blocks) <= 36 else 11 / len(blocks)
    figure, axes = figure_of(max(4.2, 1.3 + 0.085 * longest + cell * len(blocks)), 1.3 + 0.3 * len(rows))
    grid = [[shares.get(block, math.nan) for block in blocks] for shares in rows.values()]
    ends = {"vmin": math.floor(20 * min(found)) / 20, "vmax": math.ceil(20 * max(found)) / 20}
    image = axes.imshow(grid, **ends, cmap="Blues", aspect="auto", interpolation="nearest")
    axes.set_title("Share of weights that are zero", fontsize=11, pad=8)
    axes.set_xlabel("decoder block", fontsize=10)
    every = max(1, math.ceil(len(blocks) / 16))
    axes.set_xticks(range(0, len(blocks), every), [str(block) for block in blocks[::every]])
    axes.set_yticks(range(len(rows)), [short(label) for label in rows])
    axes.set_xticks([column + 0.5 for column in range(len(blocks) - 1)], minor=True)
    axes.set_yticks([row + 0.5 for row in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color=PAGE, linewidth=1)
    axes.tick_params(which="both", length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.03, fraction=0.05, ticks=list(ends.values()))
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    solids: Any = bar.solids
    solids.set_rasterized(True)  # 256 shapes otherwise
    return figure


def byte_unit(most: float) -> tuple[str, int]:
    """The unit that suits numbers of bytes up to `most`, and its size."""
    return ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20) if most >= 2**20 else ("KiB", 2**10)


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with numbers as they are written, not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e5 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def png(figure: Figure) -> bytes:
    """PNG bytes without the writer's name and the date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None, "Creation Time": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """An `<svg>` element to stand in a page: no date, no outside names, colours of `THEMED`.

    Every id in it begins with `name`, which is unique in the page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # fmt: skip
    text = buffer.getvalue()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', text))

    def mend(tag: re.Match[str]) -> str:
        """A tag's attributes; the text between tags stays as it is."""
        found = re.sub(r' id="([\w.-]+)"', lambda key: f' id="{name}-{key[1]}"' if key[1] in used else "", tag[0])
        found = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", found)
        found = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", found)
        return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda colour: THEMED.get(colour[0].upper(), colour[0]), found)

    text = re.sub(r"<[^!>][^>]*>", mend, text)
    width = figure.get_figwidth() * 96  # CSS pixels; a narrow page may make it smaller
    text = re.sub(r"^<svg\b[^>]*?viewBox", f'<svg role="img" style="max-width: {width:.0f}px" viewBox', text)
    return re.sub(r"\n\s*\n?", "\n", text).strip() + "\n"
