"""Recurrent layers."""

from typing import Any

from ..ops.recurrent import _gru, _lstm, _rnn_tanh
from ..ops.recurrent_cells import _gru_cell, _lstm_cell, _rnn_tanh_cell
from .row import Case, Cases, Row, case

_SIZES = {
    "512 to 512, 64 x 100 steps": (64, 100, 512, 512),
    "128 to 128, 64 x 100 steps": (64, 100, 128, 128),
    "64 to 64, 256 x 50 steps": (256, 50, 64, 64),
    "1024 to 1024, 64 x 50 steps": (64, 50, 1024, 1024),
    "80 to 320, 16 x 200 steps": (16, 200, 80, 320),
}
"""Sequences, steps, features, units."""


def _layer(name: str, batch: int, steps: int, features: int, units: int, **options: Any) -> Case:
    return case(lambda nn: getattr(nn, name)(features, units, **options), (steps, batch, features))


def _speeds(name: str) -> Cases:
    return {
        **{size: _layer(name, *numbers) for size, numbers in _SIZES.items()},
        "both directions, 128 to 128, 64 x 100 steps": _layer(name, 64, 100, 128, 128, bidirectional=True),
    }


_SEQUENCES = (
    "any number of layers, one direction or two, dropout between layers, batch_first, packed sequences, one sequence without a "
    "batch, any strides; up to 128 units in 16 bits (32 in float32) one launch for a layer's steps, above one for each step"
)

ROWS = (
    Row(
        "LSTM",
        _SEQUENCES,
        "proj_size",
        operation=_lstm,
        scale=1,  # the derivatives of gates are differences, 1 - y, of which little is left where y is nearly 1
        function="lstm",
        speeds=_speeds("LSTM"),
        cases=dict(
            steps=case(lambda nn: nn.LSTM(5, 6), (3, 4, 5)),
            both=case(lambda nn: nn.LSTM(4, 7, bidirectional=True, batch_first=True), (2, 3, 4)),
            layers=case(lambda nn: nn.LSTM(3, 5, num_layers=2, bias=False), (2, 3, 3)),
            no_batch=case(lambda nn: nn.LSTM(3, 5), (3, 3), (2, 1, 5)),
        ),
    ),
    Row(
        "GRU",
        "as LSTM",
        "nothing beyond the last row",
        operation=_gru,
        scale=1,
        function="gru",
        speeds=_speeds("GRU"),
        cases=dict(
            steps=case(lambda nn: nn.GRU(5, 6), (3, 4, 5), (1, 4, 6)),
            both=case(lambda nn: nn.GRU(4, 7, bidirectional=True, batch_first=True), (2, 3, 4)),
            layers=case(lambda nn: nn.GRU(3, 5, num_layers=2, bias=False), (2, 3, 3)),
        ),
    ),
    Row(
        "RNN",
        "as LSTM; tanh or relu",
        "nothing beyond the last row",
        operation=_rnn_tanh,
        scale=1,
        function="rnn_tanh",
        functions=("rnn_relu",),
        speeds={name: speed for name, speed in _speeds("RNN").items() if "1024" not in name},
        cases=dict(
            steps=case(lambda nn: nn.RNN(5, 6), (3, 4, 5), (1, 4, 6)),
            both=case(lambda nn: nn.RNN(4, 7, nonlinearity="relu", bidirectional=True, batch_first=True), (2, 3, 4)),
            layers=case(lambda nn: nn.RNN(3, 5, num_layers=2, bias=False), (2, 3, 3)),
        ),
    ),
    Row(
        "LSTMCell",
        "a batch or none, any strides; with or without biases; two products and one pointwise kernel in each direction",
        "nothing beyond the last row",
        operation=_lstm_cell,
        function="lstm_cell",
        speeds={
            f"{size} to {size}, batch {batch}": case(lambda nn, size=size: nn.LSTMCell(size, size), (batch, size))
            for batch, size in ((64, 1024), (4096, 1024), (256, 256), (1, 512))
        },
        cases=dict(
            # Without a batch, torch takes the two states as one tensor, too.
            states=case(lambda nn: nn.LSTMCell(7, 9), (7,), (2, 9)),
            alone=case(lambda nn: nn.LSTMCell(7, 6), (5, 7)),
            no_bias=case(lambda nn: nn.LSTMCell(4, 9, bias=False), (3, 4)),
        ),
    ),
    Row(
        "GRUCell",
        "as LSTMCell",
        "nothing beyond the last row",
        operation=_gru_cell,
        function="gru_cell",
        speeds={
            f"{size} to {size}, batch {batch}": case(
                lambda nn, size=size: nn.GRUCell(size, size), (batch, size), (batch, size)
            )
            for batch, size in ((64, 1024), (4096, 1024), (256, 256), (1, 512))
        },
        cases=dict(
            states=case(lambda nn: nn.GRUCell(7, 6), (5, 7), (5, 6)),
            no_bias=case(lambda nn: nn.GRUCell(4, 9, bias=False), (3, 4), (3, 9)),
            no_batch=case(lambda nn: nn.GRUCell(4, 9), (4,), (9,)),
            alone=case(lambda nn: nn.GRUCell(3, 5), (4, 3)),
        ),
    ),
    Row(
        "RNNCell",
        "as LSTMCell; tanh or relu",
        "nothing beyond the last row",
        operation=_rnn_tanh_cell,
        function="rnn_tanh_cell",
        functions=("rnn_relu_cell",),
        speeds={
            f"{size} to {size}, batch {batch}": case(
                lambda nn, size=size: nn.RNNCell(size, size), (batch, size), (batch, size)
            )
            for batch, size in ((64, 1024), (256, 256))
        },
        cases=dict(
            states=case(lambda nn: nn.RNNCell(7, 6), (5, 7), (5, 6)),
            relu=case(lambda nn: nn.RNNCell(4, 9, nonlinearity="relu"), (3, 4), (3, 9)),
            no_bias=case(lambda nn: nn.RNNCell(4, 9, bias=False), (3, 4), (3, 9)),
            alone=case(lambda nn: nn.RNNCell(3, 5), (4, 3)),
        ),
    ),
)
