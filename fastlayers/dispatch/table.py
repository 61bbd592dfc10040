"""Rows of text in aligned columns, for the reports that people read in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def columns(*rows: Sequence[str]) -> str:
    """The rows, every column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
