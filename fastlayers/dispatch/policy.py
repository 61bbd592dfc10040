"""The user's choice between kernels and torch."""

from __future__ import annotations

import threading
from typing import Literal

Path = Literal["auto", "triton", "torch"]

current: Path = "auto"
"""What holds now."""


class NotAccelerated(RuntimeError):
    """Under policy("triton"): a call that the kernels can't take. The message says why."""


class policy:
    """Choose the path for every call from now on, or, as a context manager, until the end of the block.

    - "auto" (the default): the kernels wherever they can take the call, torch otherwise.
    - "triton": the kernels, or `NotAccelerated` with the reason.
    - "torch": torch's own functions.

    The choice is the process's, like torch.backends' switches: threads share it.

    Raises:
        ValueError: for any other word.
    """

    def __init__(self, path: Path):
        if path not in ("auto", "triton", "torch"):
            raise ValueError(f'policy must be "auto", "triton" or "torch", not {path!r}')
        self._path: Path = path
        self._entered = False
        self._choose()

    def _choose(self) -> None:
        with _lock:
            others = [choice for choice in _choices if choice is not self]
            kept = [c for i, c in enumerate(others) if c._entered or i >= len(others) - _KEPT]
            _choices[:] = [*kept, self]
            _apply()

    def __enter__(self) -> None:
        self._entered = True
        if not _choices or _choices[-1] is not self:  # something else was chosen since this object was made
            self._choose()

    def __exit__(self, *_: object) -> None:
        """Restore the latest choice that is still in force. Threads may leave their blocks in any order."""
        with _lock:
            place = _choices.index(self)
            # A choice that was made within this block, and not as a block of its own, ends with it.
            _choices[place:] = [choice for choice in _choices[place + 1 :] if choice._entered]
            self._entered = False
            _apply()


_choices: list[policy] = []
"""The choices in force, oldest first. The last one decides."""
_KEPT = 100
"""How many choices that aren't blocks are kept, so that the list doesn't grow with every call of `policy`."""
_lock = threading.Lock()


def _apply() -> None:
    global current
    current = _choices[-1]._path if _choices else "auto"
