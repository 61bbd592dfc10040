"""torch.nn.modules.rnn."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from ..ops import recurrent, recurrent_cells

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


def _calling(functions: types.ModuleType, theirs: type[nn.Module]) -> Any:
    """The class's own forward, with all its checks and errors, but with these functions in the place of torch's, which it calls
    by the name _VF."""
    forward = theirs.forward
    if not isinstance(forward, types.FunctionType):  # somebody has replaced it by something else, which is then called
        return forward
    space = {**forward.__globals__, "_VF": functions}
    del space["__name__"]  # Dynamo would look for what the forward calls in the module of this name
    made = types.FunctionType(forward.__code__, space, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__module__, made.__doc__ = __name__, forward.__doc__
    return made


class RNN(nn.RNN):
    """Elman RNN over sequences. As torch.nn.RNN; see `fastlayers.ops.recurrent.rnn_tanh` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    forward = _calling(recurrent, nn.RNN)


class LSTM(nn.LSTM):
    """LSTM over sequences. As torch.nn.LSTM; see `fastlayers.ops.recurrent.lstm` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    forward = _calling(recurrent, nn.LSTM)


class GRU(nn.GRU):
    """GRU over sequences. As torch.nn.GRU; see `fastlayers.ops.recurrent.gru` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    forward = _calling(recurrent, nn.GRU)


class RNNCell(nn.RNNCell):
    """One step of an Elman RNN. As torch.nn.RNNCell; see `fastlayers.ops.recurrent_cells.rnn_tanh_cell` for shapes, dtypes and
    errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html
    """

    forward = _calling(recurrent_cells, nn.RNNCell)


class LSTMCell(nn.LSTMCell):
    """One step of an LSTM. As torch.nn.LSTMCell; see `fastlayers.ops.recurrent_cells.lstm_cell` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """

    forward = _calling(recurrent_cells, nn.LSTMCell)


class GRUCell(nn.GRUCell):
    """One step of a GRU. As torch.nn.GRUCell; see `fastlayers.ops.recurrent_cells.gru_cell` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """

    forward = _calling(recurrent_cells, nn.GRUCell)
