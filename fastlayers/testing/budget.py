"""The error budget: twice torch's own error against float64, and a band of a few roundings.

float64 itself has no better judge than torch's float64, and gets sixteen such bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Errors:
    """Largest and root-mean-square error against float64, of ours and of torch's, and how large they may be."""

    ours: tuple[float, float]
    torchs: tuple[float, float]
    allowed: tuple[float, float]

    @property
    def within(self) -> bool:
        return all(ours <= allowed for ours, allowed in zip(self.ours, self.allowed, strict=True))


def neighbours(*tensors: torch.Tensor, count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    """The tensors, and, in float32, as often as `count` with every element moved to the next number up or down.

    torch's error on a single input is a matter of luck where terms cancel. Its largest error on inputs that float32 can't
    tell apart is not. In 16 bits the last rounding decides alone, and moving the input would only loosen the budget. 0 and 1 stay
    as they are: they are exact, and beyond them no number is a probability.
    """

    def moved(x: torch.Tensor) -> torch.Tensor:
        away = torch.where(torch.rand_like(x) < 0.5, float("inf"), float("-inf"))
        return torch.where((x == 0) | (x == 1), x, torch.nextafter(x, away)) if x.dtype == torch.float32 else x

    return [tensors, *(tuple(map(moved, tensors)) for _ in range(count if tensors[0].dtype == torch.float32 else 0))]


def errors(ours: torch.Tensor, torchs: Sequence[torch.Tensor], exact: torch.Tensor, scale: float = 0.0) -> Errors:
    """The errors of ours, and the largest of torch's results; `exact` is the float64 result. NaN where `exact` has none,
    or the other way around, is an infinite error; infinities must agree.

    Args:
        scale: size of the numbers that results are differences of. Their rounding remains, however small a difference is.
    """

    def measure(result: torch.Tensor) -> tuple[float, float]:
        # What is beyond the dtype's range is rightly infinite in it.
        rounded = exact.to(ours.dtype)
        finite = rounded.isfinite()
        same = (result.isnan() == rounded.isnan()).all() and (result[rounded.isinf()] == rounded[rounded.isinf()]).all()
        if not same:
            return float("inf"), float("inf")
        error = (result.double() - exact)[finite]
        return (error.abs().max().item(), error.square().mean().sqrt().item()) if error.numel() else (0.0, 0.0)

    finite = exact[exact.to(ours.dtype).isfinite()]
    # 16 bits: two units in the last place, for what is summed in float32 and rounded once. float32: four, since the sum
    # itself is rounded at every step, in an order that may suit one of us, and a single exponential is good to two.
    eps = torch.finfo(ours.dtype).eps * (2 if ours.dtype.itemsize == 2 else 4)
    band = (
        (eps * finite.abs().max().item(), eps * finite.square().mean().sqrt().item()) if finite.numel() else (0.0, 0.0)
    )
    if band[0] == 0:  # the judge, too, may have rounded to 0, as x (1 + erf(x / sqrt(2))) / 2 does for x below -8.3
        band = (torch.finfo(torch.float64).eps * 16,) * 2
    if ours.dtype != torch.float64:  # what is rounded to 16 bits was computed in float32
        terms = torch.finfo(torch.float32).eps * scale / 2
        band = max(band[0], terms), max(band[1], terms)
    each = [measure(result) for result in torchs]
    torch_errors = max(e[0] for e in each), max(e[1] for e in each)
    if ours.dtype == torch.float64:
        # There is nothing more exact to judge by: `exact` is torch's own result, rounded in another order.
        # What torch's error says of conditioning in float32 (rstd of nearly equal numbers is some hundreds) is missing here.
        least = 512 * torch.finfo(torch.float64).eps * scale
        return Errors(measure(ours), torch_errors, (max(16 * band[0], least), max(16 * band[1], least)))
    # Where torch itself is wrong about NaN or inf there is no budget, and ours must be right.
    base = tuple(0.0 if e == float("inf") else e for e in torch_errors)
    return Errors(measure(ours), torch_errors, (2 * base[0] + band[0], 2 * base[1] + band[1]))


def assert_within_budget(
    ours: torch.Tensor,
    torchs: torch.Tensor | Sequence[torch.Tensor],
    exact: torch.Tensor,
    what: str = "result",
    scale: float = 0.0,
) -> None:
    """Shape, dtype, device as torch's; error at most twice torch's own, plus the band.

    Args:
        torchs: torch's result, or those on `neighbours` of the input, the input's own first.
        scale: as that of `errors`.

    Raises:
        AssertionError: with the three errors.
    """
    several = [torchs] if isinstance(torchs, torch.Tensor) else torchs
    first = several[0]
    assert ours.shape == first.shape, f"{what}: shape {tuple(ours.shape)}, torch's is {tuple(first.shape)}"
    assert ours.dtype == first.dtype, f"{what}: dtype {ours.dtype}, torch's is {first.dtype}"
    assert ours.device == first.device, f"{what}: on {ours.device}, torch's is on {first.device}"
    found = errors(ours.detach(), [t.detach() for t in several], exact.detach(), scale)
    assert found.within, (
        f"{what}: (max, rms) error {found.ours}, torch's {found.torchs}, allowed {found.allowed}, scale {scale}"
    )
