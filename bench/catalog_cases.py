"""What is compiled for a layer because it stands in the catalog.

Each case of a row, its `speeds` first, is called on meta tensors, forward and backward: as the launchers pick their tiles, and
once for every other row of every table of tiles that is asked on the way. Every launch whose code no earlier one has becomes a
case of the audit, unless bench/cases.py launches that kernel by itself. So a new layer needs nothing here.

Of a row without `speeds`, whose kernels differ from another row's in a few instructions, only the first case is compiled, for one
GPU and in two dtypes.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable
from typing import Any

import torch

from fastlayers import catalog, nn
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.reporting.dry_run import Launch, Noted, meta_is_gpu, noting
from fastlayers.reporting.gpus import Work

from .case import Case
from .cost import Call, cost
from .workloads import modes
from .workloads import precision as switches

Kernel = tuple[str, ...]
"""The names of a kernel and of the tile functions that it is compiled with."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ALONE = "sm_90"
"""The one GPU for which rows without speeds are compiled."""


def cases(target: str, by_hand: Iterable[Case]) -> list[Case]:
    """The cases of all rows of the catalog, but for kernels that, with the same epilogue, are compiled `by_hand`."""
    device = _tiles.Device(target, 132)
    covered = {compiled(case, device) for case in by_hand}
    rows = [row for row in catalog.ROWS if row.speeds or target == _ALONE]
    return [case for row in rows for case in _Cases(row, device, covered).collect()]


def compiled(case: Case, device: _tiles.Device) -> Kernel:
    """What a case compiles."""
    with noting(device) as noted, _tiles.force(**case.force):
        case.call()
    return [kernel(launch) for launch in noted.launches if launch.kernel.__name__ == case.kernel][case.before]


class _Cases:
    """Collects the cases of one row of the catalog."""

    def __init__(self, row: catalog.Row, device: _tiles.Device, covered: set[Kernel]):
        self.row, self.device, self.covered = row, device, covered
        self.found: list[Case] = []
        self._codes: set[Any] = set()
        self._tiles: set[Any] = set()
        self._labels: set[Any] = set()

    def collect(self) -> list[Case]:
        """As the launchers pick first, then every tile that no call of this row has picked for the same kernel and dtype."""
        arithmetics = [(dtype, "ieee") for dtype in (_DTYPES if self.row.speeds else (torch.bfloat16, torch.float64))]
        if self.row.speeds and "tf32" in modes(self.row):
            arithmetics.append((torch.float32, "tf32"))
        asked: list[tuple[str, functools.partial[Any], Noted]] = []
        every = self.row.speeds | self.row.cases
        for name, case in every.items() if self.row.speeds else [*every.items()][:1]:
            for dtype, precision in arithmetics:
                call = functools.partial(_call, case, dtype, precision=precision)
                noted = self._noted(call)
                if {kernel(launch) for launch in noted.launches} <= self.covered:
                    break  # in the other dtypes as well
                if self._add(name, call, noted):
                    asked.append((name, call, noted))
        tried: set[Any] = set()  # each tile once: _add ignores repeated tiles, whatever the size
        for name, call, noted in asked if self.row.speeds else ():
            asking = {i: kernel(launch) for launch in noted.launches for i in launch.questions}
            for number in sorted(i for i, asks in asking.items() if asks not in self.covered):
                table, tiles = noted.questions[number]
                for tile in tiles:
                    key = (call.args[1], call.keywords["precision"], asking[number], table, tile)
                    if key in tried:
                        continue
                    tried.add(key)
                    forced = functools.partial(call, answers=((number, tile),))
                    self._add(name, forced, self._noted(forced), forced=True)
        return self.found

    def _noted(self, call: functools.partial[Any]) -> Noted:
        with noting(self.device, dict(call.keywords.get("answers", ()))) as noted:
            case, dtype = call.args
            _pass(case, dtype, call.keywords["precision"])
        return noted

    def _add(self, name: str, call: functools.partial[Any], noted: Noted, forced: bool = False) -> bool:
        """Make cases of the launches with new code; of those in a forced tile only if the tile is new, too. Whether there are
        any."""
        counts: collections.Counter[str] = collections.Counter()
        before, (case, dtype) = len(self.found), call.args
        for launch in noted.launches:
            launched, tile = launch.kernel.__name__, (dtype, kernel(launch), _described(launch))
            earlier, code = counts[launched], (dtype, _code(launch))
            counts[launched] += 1
            if kernel(launch) in self.covered or code in self._codes or (forced and tile in self._tiles):
                continue
            self._codes.add(code)
            self._tiles.add(tile)
            label = f"{self.row.name} {_described(launch)}{' tf32' * (call.keywords['precision'] == 'tf32')}, {name}"
            label += f", launch {earlier + 1}" * (earlier > 0)
            while (dtype, label) in self._labels:
                label += "'"
            self._labels.add((dtype, label))
            work = functools.partial(_work, case, dtype, "backward" if launch.backward else "forward")
            # The small cases' odd sizes are for narrow offsets alone: nobody has 2**31 elements of them.
            wide = "WIDE" in launch.meta and name in self.row.speeds
            alone = sum(other.backward == launch.backward for other in noted.launches) == 1
            options: Any = dict(can_be_wide=wide, before=earlier, cost=work, alone=alone)
            self.found.append(Case(label, launched, dtype, call, {}, **options))
        return len(self.found) > before


def _call(case: catalog.Case, dtype: torch.dtype, precision: str, answers: tuple[Any, ...] = ()) -> None:
    """What a case of the audit calls.

    Args:
        answers: numbers of questions for tiles, and the tiles that they are answered with.
    """
    with meta_is_gpu(), _tiles.listen(dict(answers)):
        _pass(case, dtype, precision)


def _pass(case: catalog.Case, dtype: torch.dtype, precision: str) -> None:
    """Forward and backward of our layer."""
    with switches(precision):
        call = Call.of(case, nn, dtype)
        call.backward(call.forward())


def _work(case: catalog.Case, dtype: torch.dtype, direction: str) -> Work:
    return getattr(cost(case, dtype), direction)


def kernel(launch: Launch) -> Kernel:
    """Which one a launch is of."""
    functions = [value.__name__ for value in launch.meta.values() if callable(value) and hasattr(value, "__name__")]
    return launch.kernel.__name__, *functions


def _described(launch: Launch) -> str:
    """The kernel and its tile, as in the other cases' names."""
    meta = launch.meta
    sizes = "x".join(str(size) for key, size in meta.items() if key.startswith("TILE"))
    stages = f"s{meta['num_stages']}" if "num_stages" in meta else ""
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel").replace("_", " ")
    return f"{name} {sizes} w{meta.get('num_warps', 4)}{stages}"


def _code(launch: Launch) -> Any:
    """What Triton compiles for: constants, dtypes, and of numbers whether they are 1 or divisible by 16."""
    constants = [(key, getattr(value, "__name__", value)) for key, value in launch.meta.items()]
    params = getattr(launch.kernel, "params", ())[: len(launch.args)]  # not in the interpreter
    fixed = [param.is_constexpr for param in params] or [False] * len(launch.args)
    same = [param.do_not_specialize for param in params] or [False] * len(launch.args)
    args = [
        value if f else type(value) if s else _specialised(value)
        for f, s, value in zip(fixed, same, launch.args, strict=True)
    ]
    return launch.kernel.__name__, *constants, *args


def _specialised(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, tuple):
        return tuple([_specialised(item) for item in value])
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, *value.block_shape
    if type(value) is int:
        return value == 1, value % 16 == 0, value >= 2**31
    return type(value)
