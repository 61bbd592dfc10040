"""The site's pictures, as SVG, drawn by matplotlib when the site is built."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TEAL, GREY, LIGHT = "#00897b", "#78909c", "#b2dfdb"
_WIDTH = 4.8
"""Of every picture, in inches: its words can be read on a phone, too."""
_CENTRED = {"ha": "center", "va": "center", "fontsize": 9}


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
    style = _CENTRED | style
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
    figure, axes = _drawing(_WIDTH, 4.9)
    storeys = [
        ("fastlayers/modules/", "what state is there?", "knows nothing of devices, dtypes, Triton"),
        ("fastlayers/ops/", "what is computed, saved, supported?", "knows nothing of policy, replay, autograd, Dynamo"),
        ("the engine", "which path does a call take, how do gradients flow?", "knows nothing of any one layer"),
        ("kernels/", "how do tiles move?", "knows nothing of autograd, nn, policy"),
    ]
    for i, (name, question, blind) in enumerate(storeys):
        y = 4.1 - 0.95 * i
        _box(axes, 0.1, y, 4.6, 0.7, f"{name}: {question}\n{blind}")
        if i:
            _arrow(axes, (2.4, y + 0.95), (2.4, y + 0.7))
    beside = [
        "fastlayers/catalog/\na row per layer, for\naccelerate, tests, tables",
        "fastlayers/fusion/\nwhich neighbours run\nas one call",
    ]
    for i, text in enumerate(beside):
        _box(axes, 0.1 + 2.35 * i, 0.1, 2.25, 0.85, text, "#eceff1")
    return _svg(figure)


def call() -> str:
    """The way of one call."""
    figure, axes = _drawing(_WIDTH, 3.9)
    _box(axes, 0.1, 3.2, 2.0, 0.6, "layer(x)")
    _box(axes, 0.1, 2.1, 2.0, 0.7, "can the kernels\ntake this call?")
    _box(axes, 2.7, 2.1, 2.0, 0.7, "torch's own function;\nexplain says why", "#eceff1")
    _box(axes, 0.1, 1.1, 2.0, 0.6, "seen before?")
    _box(axes, 2.7, 1.1, 2.0, 0.6, "replay", TEAL, color="white")
    _box(axes, 0.1, 0.1, 2.0, 0.6, "launchers", TEAL, color="white")
    _arrow(axes, (1.1, 3.2), (1.1, 2.8))
    _arrow(axes, (2.1, 2.45), (2.7, 2.45), "no")
    _arrow(axes, (1.1, 2.1), (1.1, 1.7), "yes")
    _arrow(axes, (2.1, 1.4), (2.7, 1.4), "yes")
    _arrow(axes, (1.1, 1.1), (1.1, 0.7), "no")
    return _svg(figure)


def fusion() -> str:
    """Four layers, one kernel."""
    figure, axes = _drawing(_WIDTH, 2.6)
    axes.text(2.4, 2.35, "four kernels: each writes its result to memory,\nand the next one reads it", **_CENTRED)
    for i, name in enumerate(["Conv2d", "BatchNorm2d", "+ residual", "ReLU"]):
        x = 0.3 + 1.1 * i
        _box(axes, x, 1.4, 0.9, 0.5, name, fontsize=8)
        _arrow(axes, (x - 0.2, 1.65), (x, 1.65))
    _arrow(axes, (4.5, 1.65), (4.7, 1.65))
    axes.text(2.4, 0.95, "one kernel: all four on the tile while it is in registers", **_CENTRED)
    _box(axes, 0.3, 0.2, 4.2, 0.5, "Conv2d, BatchNorm2d, + residual, ReLU", TEAL, color="white")
    _arrow(axes, (0.1, 0.45), (0.3, 0.45))
    _arrow(axes, (4.5, 0.45), (4.7, 0.45))
    return _svg(figure)


PICTURES: dict[str, Callable[[], str]] = {"house": house, "call": call, "fusion": fusion}
