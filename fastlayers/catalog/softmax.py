"""Softmax and its relatives. Those without speeds run softmax's kernels with another last line."""

from ..ops.softmax import _log_softmax, _softmax, _softmin
from .row import Row, case, rows_of

_NO_DIMENSIONS = "a tensor without dimensions"

ROWS = (
    # Before Softmax, which is the row of their function.
    Row(
        "Softmax2d",
        "images, one or a batch",
        "nothing beyond the last row",
        operation=_softmax,
        function="softmax",
        speeds={},
        cases=dict(
            batch=case(lambda nn: nn.Softmax2d(), (2, 5, 3, 4)), image=case(lambda nn: nn.Softmax2d(), (3, 2, 7))
        ),
    ),
    Row(
        "Softmax",
        "any dim and length; dim=None with torch's choice and warning; rows of -inf and NaN as torch",
        _NO_DIMENSIONS,
        operation=_softmax,
        function="softmax",
        speeds=rows_of(lambda nn: nn.Softmax(-1)),
        cases=dict(
            rows=case(lambda nn: nn.Softmax(-1), (9, 37)),
            columns=case(lambda nn: nn.Softmax(1), (3, 21, 5)),
            first=case(lambda nn: nn.Softmax(0), (17, 3)),
            one=case(lambda nn: nn.Softmax(1), (4, 1)),
            vector=case(lambda nn: nn.Softmax(0), (23,)),
        ),
    ),
    Row(
        "LogSoftmax",
        "as Softmax",
        _NO_DIMENSIONS,
        operation=_log_softmax,
        function="log_softmax",
        speeds={},
        cases=dict(
            rows=case(lambda nn: nn.LogSoftmax(-1), (9, 37)),
            columns=case(lambda nn: nn.LogSoftmax(1), (3, 21, 5)),
        ),
    ),
    Row(
        "Softmin",
        "as Softmax",
        _NO_DIMENSIONS,
        operation=_softmin,
        function="softmin",
        speeds={},
        cases=dict(
            rows=case(lambda nn: nn.Softmin(-1), (9, 37)),
            columns=case(lambda nn: nn.Softmin(1), (3, 21, 5)),
        ),
    ),
)
