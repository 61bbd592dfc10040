"""One step of a recurrent layer: two products, x W_ih^T + b_ih and h W_hh^T + b_hh, and a pointwise function of their sums:

lstm_cell: i, f, o = sigmoid, g = tanh,  c' = f c + i g,  h' = o tanh(c')
gru_cell:  r, z = sigmoid, n = tanh(x's + r h's),  h' = n + z (h - n)
rnn_tanh_cell, rnn_relu_cell: h' = tanh or relu
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import _kernels
from ..dispatch import support
from ..dispatch.precision import matmul_precision
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.matmul.matmul import matmul
    from ..kernels.recurrent import cells as kernels
    from ..kernels.reduce import activation_grad

__all__ = ["gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"]


def _parameter_grads(dz: Any, x: Any, dw: Any, db: Any, precision: str) -> None:
    """dw = dz^T x and db = the sum of dz's rows, as far as they are asked for."""
    if dw is not None:
        matmul(dz.T, x, out=dw, operand_sums=db, precision=precision)
    elif db is not None:
        activation_grad(dz[None], None, None, None, db)


class GRUCell(Operation):
    """input (B, I), hx (B, H), weights (3 H, I) and (3 H, H), biases (3 H,) or None -> (B, H)."""

    tensors = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    autocast = staticmethod(lambda x: torch.gru_cell(x, x, x.expand(3, 1), x.expand(3, 1)))
    kind: ClassVar[str] = "gru"
    gates: ClassVar[int] = 3

    def reference(self, *args: Any) -> Any:
        return torch.gru_cell(*args)

    def unsupported(self, t: Any, options: Any) -> str | None:
        for name, x in zip(self.tensors, t, strict=True):
            if x is None:
                if name not in ("bias_ih", "bias_hh", "cx"):
                    return BadInput(f"no {name}")
            elif x.dim() != (1 if name in ("bias_ih", "bias_hh") else 2):
                return BadInput(f"{name} with {x.dim()} dimensions")
        (batch, width), (rows, size) = t.input.shape, t.weight_hh.shape
        expected = {
            "hx": (batch, size),
            "cx": (batch, size),
            "weight_ih": (self.gates * size, width),
            "weight_hh": (rows, size),
            "bias_ih": (self.gates * size,),
            "bias_hh": (self.gates * size,),
        }
        for name, x in zip(self.tensors[1:], t[1:], strict=True):
            if x is not None and tuple(x.shape) != expected[name]:
                return BadInput(f"{name} {tuple(x.shape)}, not {expected[name]}")
        return BadInput(f"weights of {rows} rows") if rows != self.gates * size else None

    def precision(self, dtype: torch.dtype) -> str:
        return matmul_precision(dtype)

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        batch, size = t.hx.shape
        dtype = t.input.dtype
        found: dict[str, Out | str] = {"output": self._output(t.hx)}
        if self.kind == "lstm":
            found["cell"] = Out((batch, size), dtype)
        if needs and self.gates > 1:
            found["gates"] = Out((batch, 4 * size), dtype, differentiable=False)
        return found

    def _output(self, hx: Any) -> Out:
        return Out.pointwise(hx) if hx.device.type == "cpu" else Out(tuple(hx.shape), hx.dtype)  # as torch does

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        x = matmul(t.input, t.weight_ih.T, bias=t.bias_ih, precision=precision)
        a = matmul(t.hx, t.weight_hh.T, bias=t.bias_hh, precision=precision)
        c = t.hx if self.gates == 4 and t.cx is None else getattr(t, "cx", None)
        kernels.cell(self.kind, x, a, t.hx, c, out.output, out.cell, out.gates)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        # Second derivatives are made of torch's function, which needs all of its arguments.
        given = [name for name, x in zip(self.tensors, t, strict=True) if x is not None]
        return (*given, "gates")

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        *found, last = super().gradients(like, options, needs)
        same = self.gates != 3 and last is not None and found[-1] is not None
        return (*found, len(found) - 1 if same else last)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        some = next(d for d in dy.values() if d is not None)
        (batch, size), apart = some.shape, self.gates == 3

        def workspace(width: int) -> torch.Tensor:
            return Out((batch, width), some.dtype).empty(some.device)

        dx = workspace(self.gates * size)
        da = workspace(self.gates * size) if apart else None
        dh = workspace(size) if apart and grads.hx is not None else None
        h, y = (saved.hx if apart else None), (saved.output if self.gates == 1 else None)
        c, dc = (saved.cx if saved.cx is not None else saved.hx), getattr(grads, "cx", None)
        kernels.cell_grad(self.kind, dy.output, dy.cell, saved.gates, h, c, y, dx, da, dh, dc)
        da = dx if da is None else da
        if grads.input is not None:
            matmul(dx, saved.weight_ih, out=grads.input, precision=precision)
        if grads.hx is not None:
            matmul(da, saved.weight_hh, add=dh, out=grads.hx, precision=precision)
        _parameter_grads(dx, saved.input, grads.weight_ih, grads.bias_ih, precision)
        db = grads.bias_hh if apart or grads.bias_ih is None else None
        _parameter_grads(da, saved.hx, grads.weight_hh, db, precision)

    def flops(self, like: Any, options: Any, needs: Needs | None) -> int:
        batch, names = like.input.shape[0], self.tensors
        sizes = {n: 2 * batch * math.prod(like[names.index(n)].shape) for n in ("weight_ih", "weight_hh")}
        if needs is None:
            return sum(sizes.values())
        asked = dict(zip(names, needs, strict=True))
        of_x = asked["weight_ih"] + asked["input"]
        return sizes["weight_ih"] * of_x + sizes["weight_hh"] * (asked["weight_hh"] + asked["hx"])


class LSTMCell(GRUCell):
    """input (B, I), hx and cx (B, H), weights (4 H, I) and (4 H, H), biases (4 H,) or None -> (B, H) twice. cx may be None if it
    is hx, as in the first step of torch.nn.LSTMCell, and has no gradient: a call with one tensor twice isn't replayed."""

    tensors = ("input", "hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    autocast = staticmethod(lambda x: torch.lstm_cell(x, (x, x), x.expand(4, 1), x.expand(4, 1))[0])
    kind = "lstm"
    gates = 4

    def reference(self, input: Any, hx: Any, cx: Any, *params: Any) -> Any:
        return torch.lstm_cell(input, (hx, hx if cx is None else cx), *params)

    def results(self, options: Any) -> int:
        return 2

    def _output(self, hx: Any) -> Out:
        return Out(tuple(hx.shape), hx.dtype)


class RNNTanhCell(GRUCell):
    """input (B, I), hx (B, H), weights (H, I) and (H, H), biases (H,) or None -> (B, H). Saves what the gradients need alone."""

    autocast = staticmethod(lambda x: torch.rnn_tanh_cell(x, x, x, x))
    kind = "rnn_tanh"
    gates = 1

    def _output(self, hx: Any) -> Out:
        return Out(tuple(hx.shape), hx.dtype)

    def reference(self, *args: Any) -> Any:
        return torch.rnn_tanh_cell(*args)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        of_x, of_h, of_w, of_u, *_ = needs
        pairs = {"input": of_w, "hx": of_u, "weight_ih": of_x, "weight_hh": of_h, "output": True}
        return tuple([name for name, needed in pairs.items() if needed])

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        """From what was saved, which is less than torch's function needs."""
        with torch.autocast(dy.output.device.type, enabled=False):
            dz = self._gradient(dy.output, saved.output)
            return (
                dz @ saved.weight_ih if needs[0] else None,
                dz @ saved.weight_hh if needs[1] else None,
                dz.T @ saved.input if needs[2] else None,
                dz.T @ saved.hx if needs[3] else None,
                dz.sum(0) if needs[4] else None,
                dz.sum(0) if needs[5] else None,
            )

    def _gradient(self, dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return dy * (1 - y * y)


class RNNReluCell(RNNTanhCell):
    """As RNNTanhCell, with relu."""

    autocast = staticmethod(lambda x: torch.rnn_relu_cell(x, x, x, x))
    kind = "rnn_relu"

    def reference(self, *args: Any) -> Any:
        return torch.rnn_relu_cell(*args)

    def _gradient(self, dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y <= 0, 0.0, dy)


_lstm_cell, _gru_cell, _rnn_tanh_cell, _rnn_relu_cell = LSTMCell(), GRUCell(), RNNTanhCell(), RNNReluCell()


def lstm_cell(
    input: torch.Tensor,
    hx: Any,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h', c') of one step from (h, c). As torch.lstm_cell, which torch.nn.LSTMCell calls.

    Shape: input (B, I), hx a pair of (B, H), w_ih (4 H, I), w_hh (4 H, H), biases (4 H,), any strides; the results (B, H).
    Dtype: float16, bfloat16, float32, float64, the same for all; gates in float32 (float64), products as `linear`'s.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html; Hochreiter and Schmidhuber, "Long
        Short-Term Memory", 1997.
    """
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        call = functools.partial(torch.lstm_cell, input, hx, w_ih, w_hh, b_ih, b_hh)
        return support.run_reference("lstm_cell", BadInput("hx isn't a pair"), call)
    h, c = hx
    if h is c and isinstance(c, torch.Tensor):
        c = c.clone() if c.requires_grad else None
    return _lstm_cell((input, h, c, w_ih, w_hh, b_ih, b_hh))


def gru_cell(
    input: torch.Tensor,
    hx: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> torch.Tensor:
    """h' of one step. As torch.gru_cell, which torch.nn.GRUCell calls.

    Shape: input (B, I), hx (B, H), w_ih (3 H, I), w_hh (3 H, H), biases (3 H,), any strides; the result (B, H).
    Dtype: as `lstm_cell`.
    Runs on Triton when: as `lstm_cell`.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html; Cho et al., "Learning Phrase
        Representations using RNN Encoder-Decoder for Statistical Machine Translation", arXiv:1406.1078.
    """
    return _gru_cell((input, hx, w_ih, w_hh, b_ih, b_hh))


def rnn_tanh_cell(
    input: torch.Tensor,
    hx: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> torch.Tensor:
    """tanh(input W_ih^T + b_ih + hx W_hh^T + b_hh). As torch.rnn_tanh_cell, which torch.nn.RNNCell calls.

    Shape: input (B, I), hx (B, H), w_ih (H, I), w_hh (H, H), biases (H,), any strides; the result (B, H).
    Dtype: as `lstm_cell`.
    Runs on Triton when: as `lstm_cell`.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html
    """
    return _rnn_tanh_cell((input, hx, w_ih, w_hh, b_ih, b_hh))


def rnn_relu_cell(
    input: torch.Tensor,
    hx: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> torch.Tensor:
    """relu(input W_ih^T + b_ih + hx W_hh^T + b_hh). As torch.rnn_relu_cell, which torch.nn.RNNCell calls.

    Shape, Dtype, Runs on Triton when, Raises, Source: as `rnn_tanh_cell`.
    """
    return _rnn_relu_cell((input, hx, w_ih, w_hh, b_ih, b_hh))
