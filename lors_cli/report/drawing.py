"""What all figures share: settings, a canvas, PNG bytes."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any

GRID = "#DDDDDD"
_SETTINGS = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 13, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 12, "axes.labelsize": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.axisbelow": True, "legend.frameon": False,
    "xtick.color": "#333333", "ytick.color": "#333333", "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """The settings that every figure is drawn with, as a context; the user's own are not looked at."""
    import matplotlib as mpl

    settings: Any = {**mpl.rcParamsDefault, **_SETTINGS, "backend": "Agg"}
    return mpl.rc_context(settings)


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own (inches), outside pyplot, so that no state is left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def png(figure: Any) -> bytes:
    """PNG bytes without the writer's name and the date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None, "Creation Time": None})
    return buffer.getvalue()
