"""The site's pictures, as SVG, drawn by matplotlib when the site is built."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TEAL, GREY, LIGHT = "#00897b", "#78909c", "#b2dfdb"


def _drawing(width: float, height: float) -> tuple[Figure, Any]:
    """A white sheet whose unit is an inch, the origin at its lower left corner: readable on a dark page too."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def _box(
    axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str = LIGHT, **style: Any
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor=GREY
        )
    )
    style = {"ha": "center", "va": "center", "fontsize": 10} | style
    axes.text(x + width / 2, y + height / 2, text, **style)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0})
    if text:
        axes.text((start[0] + end[0]) / 2 + 0.06, (start[1] + end[1]) / 2 + 0.06, text, fontsize=9, color=GREY)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    # Words as words, which can be searched and take a tenth of the space of their outlines; the same file from the same picture.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlayers"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def house() -> str:
    """Who stands on whom."""
    figure, axes = _drawing(8.6, 3.9)
    storeys = [
        ("fastlayers/modules/", "what state is there?", "knows nothing of devices, dtypes, Triton"),
        ("fastlayers/ops/", "what is computed, saved, supported?", "knows nothing of policy, replay, autograd, Dynamo"),
        ("the engine", "which path does a call take, how do gradients flow?", "knows nothing of any one layer"),
        ("kernels/", "how do tiles move?", "knows nothing of autograd, nn, policy"),
    ]
    for i, (name, question, blind) in enumerate(storeys):
        y = 3.0 - 0.95 * i
        _box(axes, 0.15, y, 5.7, 0.75, f"{name}: {question}\n{blind}", fontsize=9)
        if i:
            _arrow(axes, (3, y + 0.95), (3, y + 0.75))
    _box(
        axes,
        6.2,
        2.05,
        2.25,
        1.7,
        "fastlayers/catalog/\na row per layer, from which\naccelerate, tests, benchmark\nand tables follow",
        "#eceff1",
        fontsize=8.5,
    )
    _box(axes, 6.2, 0.15, 2.25, 1.7, "fastlayers/fusion/\nwhich neighbours run\nas one call", "#eceff1", fontsize=8.5)
    return _svg(figure)


def call() -> str:
    """The way of one call."""
    figure, axes = _drawing(8.6, 2.9)
    _box(axes, 0.15, 1.7, 1.5, 0.8, "layer(x)")
    _box(axes, 2.3, 1.7, 1.9, 0.8, "can the kernels\ntake this call?")
    _box(axes, 4.9, 1.7, 1.6, 0.8, "seen before?")
    _box(axes, 7.0, 2.05, 1.45, 0.65, "replay", TEAL, color="white")
    _box(axes, 7.0, 1.1, 1.45, 0.65, "launchers", TEAL, color="white")
    _box(axes, 2.3, 0.2, 1.9, 0.8, "torch's own function;\nexplain says why", "#eceff1", fontsize=9)
    _arrow(axes, (1.65, 2.1), (2.3, 2.1))
    _arrow(axes, (4.2, 2.1), (4.9, 2.1), "yes")
    _arrow(axes, (3.25, 1.7), (3.25, 1.0), "no")
    _arrow(axes, (6.5, 2.2), (7.0, 2.35), "yes")
    _arrow(axes, (6.5, 1.9), (7.0, 1.5), "no")
    return _svg(figure)


def fusion() -> str:
    """Four layers, one kernel."""
    figure, axes = _drawing(8.6, 2.4)
    for i, name in enumerate(["Conv2d", "BatchNorm2d", "+ residual", "ReLU"]):
        x = 1.1 + 1.9 * i
        _box(axes, x, 1.4, 1.3, 0.6, name)
        _arrow(axes, (x - 0.6, 1.7), (x, 1.7))
    _arrow(axes, (8.1, 1.7), (8.5, 1.7))
    axes.text(
        4.3, 2.15, "four kernels: each writes its result to memory, and the next one reads it", fontsize=9, ha="center"
    )
    _box(
        axes,
        1.1,
        0.3,
        7.0,
        0.6,
        "one kernel: Conv2d, BatchNorm2d, + residual, ReLU on the tile while it is in registers",
        TEAL,
        color="white",
        fontsize=9,
    )
    _arrow(axes, (0.5, 0.6), (1.1, 0.6))
    _arrow(axes, (8.1, 0.6), (8.5, 0.6))
    return _svg(figure)


PICTURES: dict[str, Callable[[], str]] = {"house": house, "call": call, "fusion": fusion}
