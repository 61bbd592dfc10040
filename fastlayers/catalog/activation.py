"""Activations."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..fusion.plan import Role
from ..ops.activation import Activation, _pointwise, joined
from ..ops.gated import _glu, _prelu
from ..ops.smooth import swish
from .row import Case, Make, Row, case, rows_of


def _role(function: str, *options: str) -> Role:
    """Of layers whose attributes of these names are the function's arguments. Without any, all layers are the same."""
    if not options:
        return Role("activation", Activation(function))
    return Role("activation", of=lambda layer: joined(function, *[getattr(layer, name) for name in options]))


class Swish(torch.nn.Module):
    """As models write it, of torch's functions; with fastlayers.nn, one call of ours."""

    def __init__(self, nn: Any, factor: float):
        super().__init__()
        self.factor, self.joined = factor, nn is not torch.nn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swish(x, self.factor) if self.joined else x * torch.sigmoid(self.factor * x)


def _matrix(make: Make) -> Case:
    return case(make, (13, 11))


_row = functools.partial(Row, operation=_pointwise, speeds={})
"""Of an activation that is measured and audited by its likes: those whose rows have speeds."""
_ANY = "any shape and strides"
_VIEW = "inplace on a view that requires grad"
_NEEDED = "inplace where the derivative needs what it overwrites: writing into what the derivative needs"


ROWS = (
    _row(
        "ReLU",
        f"{_ANY}; inplace with torch's version counting; NaN stays NaN",
        _VIEW,
        function="relu",
        role=_role("relu"),
        speeds=rows_of(lambda nn: nn.ReLU()),
        cases=dict(
            matrix=_matrix(lambda nn: nn.ReLU()),
            scalar=case(lambda nn: nn.ReLU(), ()),
            image=case(lambda nn: nn.ReLU(), (2, 3, 5, 4)),
        ),
    ),
    _row(
        "GELU",
        f"{_ANY}; approximate none and tanh; infinities and NaN as torch",
        "another word for `approximate`",
        function="gelu",
        role=_role("gelu", "approximate"),
        speeds=rows_of(lambda nn: nn.GELU()),
        cases=dict(
            matrix=_matrix(lambda nn: nn.GELU()),
            tanh=_matrix(lambda nn: nn.GELU("tanh")),
            image=case(lambda nn: nn.GELU(), (2, 3, 5, 4)),
            after_linear=case(lambda nn: nn.Sequential(nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 5)), (4, 7)),
            after_linear_tanh=case(lambda nn: nn.Sequential(nn.Linear(7, 6), nn.GELU("tanh"), nn.ReLU()), (4, 7)),
            after_conv=case(lambda nn: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Conv2d(3, 2, 1)), (2, 2, 5, 6)),
        ),
    ),
    _row(
        "Sigmoid",
        _ANY,
        "nothing beyond the last row",
        function="sigmoid",
        role=_role("sigmoid"),
        speeds=rows_of(lambda nn: nn.Sigmoid()),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Sigmoid()),
            after_linear=case(lambda nn: nn.Sequential(nn.Linear(7, 6), nn.Sigmoid()), (4, 7)),
        ),
    ),
    _row(
        "LeakyReLU",
        f"{_ANY}, any slope",
        f"{_VIEW}; {_NEEDED}, with a negative slope",
        function="leaky_relu",
        role=_role("leaky_relu", "negative_slope"),
        speeds=rows_of(lambda nn: nn.LeakyReLU(0.1)),
        cases=dict(
            matrix=_matrix(lambda nn: nn.LeakyReLU(0.1)),
            rising=_matrix(lambda nn: nn.LeakyReLU(-0.5)),
            after_linear=case(
                lambda nn: nn.Sequential(nn.Linear(7, 6), nn.LeakyReLU(0.2), nn.Linear(6, 5), nn.LeakyReLU()), (4, 7)
            ),
            after_conv=case(lambda nn: nn.Sequential(nn.Conv2d(2, 3, 2), nn.LeakyReLU(0.3)), (1, 2, 4, 5)),
        ),
    ),
    _row(
        "Mish",
        f"{_ANY}; infinities and NaN as torch",
        f"{_NEEDED}; {_VIEW}",
        function="mish",
        role=_role("mish"),
        speeds=rows_of(lambda nn: nn.Mish()),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Mish()),
        ),
    ),
    _row(
        "Tanh",
        _ANY,
        "nothing beyond the last row",
        function="tanh",
        role=_role("tanh"),
        scale=4,  # its gradient dy - dy y^2 is a difference of numbers of dy's size
        cases=dict(
            matrix=_matrix(lambda nn: nn.Tanh()),
        ),
    ),
    _row(
        "SiLU",
        f"{_ANY}; infinities and NaN as torch",
        f"{_NEEDED}; {_VIEW}",
        function="silu",
        role=_role("silu"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.SiLU()),
            after_linear=case(lambda nn: nn.Sequential(nn.Linear(7, 6), nn.SiLU(), nn.Linear(6, 5)), (4, 7)),
        ),
    ),
    _row(
        "swish",
        f"`x * sigmoid(factor * x)`, as `fuse` finds it of CLIP's QuickGELU; {_ANY}, any factor; infinities and NaN as torch",
        "nothing beyond the last row",
        function="swish",
        cases=dict(
            matrix=_matrix(lambda nn: Swish(nn, 1.702)),
        ),
    ),
    _row(
        "ELU",
        f"{_ANY}, any alpha",
        f"{_VIEW}; {_NEEDED}, with a negative alpha",
        function="elu",
        role=_role("elu", "alpha"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.ELU(0.7)),
            negative=_matrix(lambda nn: nn.ELU(-0.5)),
            after_linear=case(lambda nn: nn.Sequential(nn.Linear(7, 6), nn.ELU(), nn.Linear(6, 5), nn.ELU(-2)), (4, 7)),
        ),
    ),
    _row(
        "SELU",
        _ANY,
        _VIEW,
        function="selu",
        role=_role("selu"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.SELU()),
        ),
    ),
    _row(
        "CELU",
        f"{_ANY}, any positive alpha",
        f"{_VIEW}; an alpha that isn't positive",
        function="celu",
        role=_role("celu", "alpha"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.CELU(0.5)),
        ),
    ),
    _row(
        "ReLU6",
        f"{_ANY}; NaN stays NaN",
        _VIEW,
        function="relu6",
        role=_role("hardtanh", "min_val", "max_val"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.ReLU6()),
        ),
    ),
    _row(
        "Hardtanh",
        f"{_ANY}, any bounds; NaN stays NaN",
        f"{_VIEW}; {_NEEDED}, with bounds that 16 bits don't hold",
        function="hardtanh",
        role=_role("hardtanh", "min_val", "max_val"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Hardtanh(-0.7, 0.4)),
            after_linear=case(
                lambda nn: nn.Sequential(nn.Linear(7, 6), nn.Hardtanh(), nn.Linear(6, 5), nn.Hardtanh(-0.3, 0.7)),
                (4, 7),
            ),
        ),
    ),
    _row(
        "Hardswish",
        f"{_ANY}; infinities and NaN as torch",
        f"{_NEEDED}; {_VIEW}",
        function="hardswish",
        role=_role("hardswish"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Hardswish()),
        ),
    ),
    _row(
        "Hardsigmoid",
        f"{_ANY}; NaN as torch",
        f"{_NEEDED}; {_VIEW}",
        function="hardsigmoid",
        role=_role("hardsigmoid"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Hardsigmoid()),
        ),
    ),
    _row(
        "Softplus",
        f"{_ANY}, any positive beta, any threshold",
        "a beta that isn't positive",
        function="softplus",
        role=_role("softplus", "beta", "threshold"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Softplus()),
            beta=_matrix(lambda nn: nn.Softplus(2, 0.5)),
            after_linear=case(lambda nn: nn.Sequential(nn.Linear(7, 6), nn.Softplus(1.5)), (4, 7)),
        ),
    ),
    _row(
        "Softsign",
        f"{_ANY}; infinities and NaN as torch",
        "nothing beyond the last row",
        function="softsign",
        role=_role("softsign"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Softsign()),
        ),
    ),
    _row(
        "LogSigmoid",
        f"{_ANY}; infinities and NaN as torch",
        "nothing beyond the last row",
        function="logsigmoid",
        role=_role("logsigmoid"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.LogSigmoid()),
        ),
    ),
    _row(
        "Threshold",
        f"{_ANY}, any threshold and value; NaN stays NaN",
        f"{_VIEW}; {_NEEDED}, with a value above the threshold",
        function="threshold",
        role=_role("threshold", "threshold", "value"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Threshold(0.3, -1)),
            above=_matrix(lambda nn: nn.Threshold(0.2, 20)),
        ),
    ),
    _row(
        "Hardshrink",
        f"{_ANY}, any lambd; NaN stays NaN",
        "nothing beyond the last row",
        function="hardshrink",
        role=_role("hardshrink", "lambd"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Hardshrink(0.4)),
        ),
    ),
    _row(
        "Softshrink",
        f"{_ANY}, any lambd; NaN stays NaN",
        "nothing beyond the last row",
        function="softshrink",
        role=_role("softshrink", "lambd"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Softshrink(0.4)),
            after_linear=case(lambda nn: nn.Sequential(nn.Linear(7, 6), nn.Softshrink(0.25)), (4, 7)),
        ),
    ),
    _row(
        "Tanhshrink",
        _ANY,
        "nothing beyond the last row",
        function="tanhshrink",
        role=_role("tanhshrink"),
        cases=dict(
            matrix=_matrix(lambda nn: nn.Tanhshrink()),
        ),
    ),
    Row(
        "PReLU",
        "any shape and strides; one slope, or one for each channel, whose gradient is summed in a fixed order",
        "nothing beyond the last row",
        operation=_prelu,
        function="prelu",
        speeds={},
        cases=dict(
            channels=case(lambda nn: nn.PReLU(5), (3, 5, 4, 7)),
            one=case(lambda nn: nn.PReLU(), (13, 11)),
            features=case(lambda nn: nn.PReLU(7, init=-0.5), (9, 7)),
        ),
    ),
    Row(
        "GLU",
        "any dim, shape and strides",
        "nothing beyond the last row",
        operation=_glu,
        function="glu",
        speeds={},
        cases=dict(
            rows=case(lambda nn: nn.GLU(), (13, 14)),
            channels=case(lambda nn: nn.GLU(1), (2, 6, 3, 5)),
            first=case(lambda nn: nn.GLU(0), (8, 5)),
        ),
    ),
)
