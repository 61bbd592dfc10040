"""What ran where in a whole program: a count of layers, kernels and calls, which takes next to no time."""

from __future__ import annotations

from collections import Counter

from .. import _kernels
from .table import columns


class Tally:
    """What `fastlayers.patched` counted, the whole process's. Prints as a table."""

    def __init__(self) -> None:
        self.layers: Counter[str] = Counter()
        """Layers that were built as ours, by their class's name."""
        self.torchs: Counter[tuple[str, str]] = Counter()
        """Other layers that were built, by their class's name and the reason."""
        self.kernels: Counter[str] = Counter()
        """Launches, by the kernel's name."""
        self.left: Counter[tuple[str, str]] = Counter()
        """Calls that torch's own functions took, by the function's name and the reason."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = []
        for title, counter in (
            ("layers accelerated", self.layers),
            ("layers left to torch", self.torchs),
            ("kernels launched", self.kernels),
            ("calls left to torch", self.left),
        ):
            for key, count in counter.most_common() or [("", 0)]:
                name, reason = key if isinstance(key, tuple) else (key, "")
                rows.append((title, f"{count:,}", name, reason))
                title = ""
        return "\n".join([line.rstrip() for line in columns(*rows).split("\n")])


active: tuple[Tally, ...] = ()
"""The tallies of all `patched` blocks that are on."""


def start(tally: Tally) -> None:
    """Begin to count into this tally."""
    _let_count((*active, tally))


def stop(tally: Tally) -> None:
    """Stop counting into this tally."""
    _let_count(tuple([other for other in active if other is not tally]))


def _let_count(tallies: tuple[Tally, ...]) -> None:
    global active
    active = tallies
    if _kernels.launch is not None:
        _kernels.launch.counters = tuple([tally.kernels for tally in tallies])
