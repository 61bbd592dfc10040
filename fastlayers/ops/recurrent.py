"""Recurrent layers over whole sequences.

The products of the input, x W_ih^T + b_ih, are one product over all steps. What remains of a step needs the step before it:
the product of the hidden state, and the cell (recurrent_cells.py). Backwards, the steps give the gradients of the gates, and
four products over all steps give the others. Layers run one after the other, each a call of its own for autograd; the two
directions of a layer run side by side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels, _torch
from .. import _torch_functional as F
from ..dispatch import support
from ..dispatch.precision import rnn_precision, without_cudnn
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors
from .recurrent_cells import _parameter_grads

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.matmul.matmul import matmul
    from ..kernels.recurrent import sequence as kernels
    from ..kernels.recurrent.layout import Layout

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]


def _autocast_of(function: Callable[..., Any], gates: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """How torch is asked what autocast does to one of its functions of sequences."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        state, w = x[None], x.expand(gates, 1)
        hx = (state, state) if gates == 4 else state
        try:
            return function(state, hx, [w, w], False, 1, 0.0, False, False, False)[0]
        except RuntimeError:  # oneDNN has no LSTM in this dtype
            return x

    return probe


_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _length(t: Any, options: Any) -> int:
    """How many steps there are."""
    return t.steps.shape[1] if t.steps is not None else t.input.shape[1 if options.batch_first else 0]


def _steps(batch_sizes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(2, T): the row where each step of packed sequences begins, and how many sequences run then."""
    steps = torch.stack([batch_sizes.cumsum(0) - batch_sizes, batch_sizes]).to(device)
    steps.batch_sizes = batch_sizes  # type: ignore[attr-defined]  # for torch's function, without asking the device
    return steps


def _batch_sizes(steps: torch.Tensor) -> torch.Tensor:
    """What `_steps` was made of, which torch's functions want on the CPU."""
    found = getattr(steps, "batch_sizes", None)
    return steps[1].cpu() if found is None else found


class GRU(Operation):
    """One layer. input (T, B, I), (B, T, I) or packed (ROWS, I); hx (D, B, H); of each direction weights (3 H, I) and (3 H, H),
    and biases (3 H,) twice or none -> output (.., D * H), h_n (D, B, H).

    steps (2, T), of packed sequences: where each step begins, and how many sequences run then.
    """

    tensors = ("input", "steps", "hx", "cx", "*weights")
    floats = ("input", "hx", "cx", "*weights")
    autocast = staticmethod(_autocast_of(torch.gru, 3))
    compiled = False
    kind: ClassVar[str] = "gru"
    gates: ClassVar[int] = 3
    function: ClassVar[Callable[..., Any]] = staticmethod(torch.gru)

    class Options(NamedTuple):
        has_biases: bool
        train: bool
        bidirectional: bool
        batch_first: bool

    def reference(self, input: Any, steps: Any, hx: Any, cx: Any, *rest: Any) -> Any:
        *weights, has_biases, train, bidirectional, batch_first = rest
        states = hx if cx is None else (hx, cx)
        fixed = (list(weights), has_biases, 1, 0.0, train, bidirectional)
        if steps is None:
            return self.function(input, states, *fixed, batch_first)
        return self.function(input, _batch_sizes(steps), states, *fixed)

    def unsupported(self, t: Any, options: Any) -> str | None:
        directions, per = 2 if options.bidirectional else 1, 4 if options.has_biases else 2
        if any([w is None for w in t.weights]) or t.hx is None or (t.cx is None) == (self.gates == 4):
            return BadInput("a weight or a state that is missing")
        if len(t.weights) == directions * (per + 1) and self.gates == 4:
            return "proj_size"
        if len(t.weights) != directions * per:
            return BadInput(f"{len(t.weights)} weights for {directions} directions")
        if t.input.dim() != (3 if t.steps is None else 2):
            return BadInput(f"an input with {t.input.dim()} dimensions")
        length, batch, size = _length(t, options), t.hx.shape[1] if t.hx.dim() == 3 else 0, t.hx.shape[-1]
        if length == 0:
            return BadInput("no step")
        if t.steps is None and batch != t.input.shape[0 if options.batch_first else 1]:
            return BadInput(f"an input {tuple(t.input.shape)} with states of {batch} sequences")
        for state in (t.hx, t.cx):
            if state is not None and tuple(state.shape) != (directions, batch, size):
                return BadInput(f"a state {tuple(state.shape)}, not {(directions, batch, size)}")
        rows = self.gates * size
        expected = [(rows, t.input.shape[-1]), (rows, size), (rows,), (rows,)][:per] * directions
        for w, shape in zip(t.weights, expected, strict=True):
            if tuple(w.shape) != shape:
                return BadInput(f"a weight or bias {tuple(w.shape)}, not {shape}")
            if w.dtype != t.weights[0].dtype:
                return BadInput(f"weights of {t.weights[0].dtype} and {w.dtype}")
        return None

    def precision(self, dtype: torch.dtype) -> str:
        return rnn_precision(dtype)

    def results(self, options: Any) -> int:
        return 2

    def _layout(self, t: Any, options: Any, batch: int, size: int, steps: Any) -> Layout:
        directions = 2 if options.bidirectional else 1
        return Layout(_length(t, options), batch, size, directions, options.batch_first, steps)

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        x, (directions, batch, size), dtype = t.input, t.hx.shape, t.input.dtype
        width, strides = directions * size, None
        if t.steps is None and options.batch_first:
            strides = (width, batch * width, 1)  # as torch, which transposes the result
        state = Out((directions, batch, size), dtype)
        found: dict[str, Out | str] = {"output": Out((*x.shape[:-1], width), dtype, strides), "h_n": state}
        if self.gates == 4:
            found["c_n"] = state
        if needs:
            rows = math.prod(x.shape[:-1])
            if self.gates == 4:
                found["cells"] = Out((directions, rows, size), dtype, differentiable=False)
            if self.gates > 1:
                found["gates"] = Out((directions, rows, 4 * size), dtype, differentiable=False)
        return found

    def _of_directions(self, options: Any, weights: Any, name: str) -> Any:
        """A pair of the weights, or gradients, of this name: of the two directions, or one and None."""
        i, per = _PARAMETERS.index(name), 4 if options.has_biases else 2
        if i >= per:
            return None, None
        return weights[i], weights[per + i] if options.bidirectional else None

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        x = t.input.reshape(-1, t.input.shape[-1])
        w, u, b, a = [self._of_directions(options, t.weights, name) for name in _PARAMETERS]
        products = [None if w[d] is None else matmul(x, w[d].T, bias=b[d], precision=precision) for d in range(2)]
        layout = self._layout(t, options, t.hx.shape[1], t.hx.shape[2], t.steps)
        kernels.forward(
            self.kind, layout, (products[0], products[1]), u, a, (t.hx, t.cx), out.output, (out.h_n, out.c_n),
            out.cells, out.gates, precision,
        )  # fmt: skip

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        # Second derivatives are made of torch's function, which needs all of its arguments.
        given = [name for name in ("input", "steps", "hx", "cx") if getattr(t, name) is not None]
        weights = [f"weights{i}" for i in range(len(t.weights))]
        return (*given, *weights, *self._kept(options, needs))

    def _kept(self, options: Any, needs: Needs) -> tuple[str, ...]:
        return ("output", "gates")

    @staticmethod
    def _asks_for_weight_hh(options: Any, needs: Needs) -> bool:
        return any(needs[5 :: 4 if options.has_biases else 2])

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        found = list(super().gradients(like, options, needs))
        if options.has_biases and self.gates != 3:
            for i in range(4 + 3, len(found), 4):  # of LSTM and RNN, the two biases have the same gradient
                if found[i] is not None and found[i - 1] is not None:
                    found[i] = i - 1
        return tuple(found)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        some = next(d for d in dy.values() if d is not None)
        u = self._of_directions(options, [saved[f"weights{i}"] for i in range(8)], "weight_hh")
        w = self._of_directions(options, [saved[f"weights{i}"] for i in range(8)], "weight_ih")
        dw, du, db, da_sums = [self._of_directions(options, grads.weights, name) for name in _PARAMETERS]
        size, directions = u[0].shape[1], 2 if options.bidirectional else 1
        y, x = saved.output, saved.input
        lead = (y if x is None else x).shape[:-1]
        rows = math.prod(lead)
        if saved.steps is not None:
            length, batch = saved.steps.shape[1], saved.hx.shape[1]
        else:
            length, batch = lead[::-1] if options.batch_first else lead
        layout = Layout(length, batch, size, directions, options.batch_first, saved.steps)

        def workspace(width: int, of: Any = (True, True)) -> Any:
            """Of each direction that there is, if it is asked for."""
            found = [
                Out((rows, width), some.dtype).empty(some.device) if d < directions and of[d] else None for d in (0, 1)
            ]
            return found[0], found[1]

        dx, apart = workspace(self.gates * size), self.gates == 3
        da = workspace(self.gates * size) if apart else (None, None)
        wanted = apart or any([d is not None for d in du])
        before = workspace(size, (wanted, wanted))
        kernels.backward(
            self.kind, layout, dy.output, (dy.h_n, dy.c_n), y, saved.cells, saved.gates, u, saved.hx, dx, da, before,
            (grads.hx, grads.cx), precision,
        )  # fmt: skip
        x = None if x is None else x.reshape(-1, x.shape[-1])
        so_far = None
        for d in range(directions):
            if grads.input is not None:
                flat = grads.input.view(rows, grads.input.shape[-1])
                out = flat if d == directions - 1 else Out(tuple(flat.shape), flat.dtype).empty(flat.device)
                so_far = matmul(dx[d], w[d], add=so_far, out=out, precision=precision)
            _parameter_grads(dx[d], x, dw[d], db[d], precision)
            sums = da_sums[d] if apart or db[d] is None else None
            _parameter_grads(da[d] if apart else dx[d], before[d], du[d], sums, precision)

    def flops(self, like: Any, options: Any, needs: Needs | None) -> int:
        rows, parameters = math.prod(like.input.shape[:-1]), 4 if options.has_biases else 2
        steps, total = _length(like, options), 0
        for i in range(0, len(like.weights), parameters):
            of_x, of_h = (2 * rows * math.prod(w.shape) for w in like.weights[i : i + 2])
            if needs is None:
                total += of_x + of_h
            else:  # the first step's hidden state has no gradient unless it is asked for
                through = of_h if needs[2] else of_h // steps * (steps - 1)
                total += of_x * (needs[0] + needs[4 + i]) + of_h * needs[5 + i] + through
        return total

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        if next(d for d in dy.values() if d is not None).device.type != "cuda":
            return super().differentiate(dy, saved, like, options, needs)
        with without_cudnn():  # which has no second derivatives
            return super().differentiate(dy, saved, like, options, needs)


class LSTM(GRU):
    """As GRU, with cx (D, B, H) -> c_n (D, B, H) and weights of 4 H rows."""

    autocast = staticmethod(_autocast_of(torch.lstm, 4))
    kind = "lstm"
    gates = 4
    function = staticmethod(torch.lstm)

    def results(self, options: Any) -> int:
        return 3

    def _kept(self, options: Any, needs: Needs) -> tuple[str, ...]:
        return ("cells", "gates", *(("output",) if self._asks_for_weight_hh(options, needs) else ()))


class RNNTanh(GRU):
    """As GRU, with weights of H rows. Saves what the gradients need alone."""

    autocast = staticmethod(_autocast_of(torch.rnn_tanh, 1))
    kind = "rnn_tanh"
    gates = 1
    function = staticmethod(torch.rnn_tanh)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        per = 4 if options.has_biases else 2
        found = ["output", *[f"weights{i}" for i in range(1, len(t.weights), per)]]
        if any(needs[4::per]):
            found.append("input")
        if needs[0]:
            found += [f"weights{i}" for i in range(0, len(t.weights), per)]
        if t.steps is not None:
            found.append("steps")
        if t.steps is not None or self._asks_for_weight_hh(options, needs):
            found.append("hx")
        return tuple(found)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        """From what was saved, which is less than torch's function needs."""
        per, size = 4 if options.has_biases else 2, saved.weights1.shape[1]

        def by_steps(t: Any) -> Any:
            """As a matrix, in the order of packed sequences."""
            if t is None or saved.steps is not None:
                return t
            t = t.transpose(0, 1) if options.batch_first else t
            return t.reshape(-1, t.shape[-1])

        if saved.steps is None:
            batch, length = saved.output.shape[:2] if options.batch_first else saved.output.shape[1::-1]
            counts = [batch] * length
        else:
            counts = _batch_sizes(saved.steps).tolist()
        y, x, dys = by_steps(saved.output), by_steps(saved.input), by_steps(dy.output)
        grads: list[Any] = [None] * len(needs)

        def add(i: int, gradient: Callable[[], torch.Tensor]) -> None:
            if needs[i]:
                grads[i] = gradient() if grads[i] is None else grads[i] + gradient()

        of_states = []
        with torch.autocast(y.device.type, enabled=False):
            for d in range(2 if options.bidirectional else 1):
                w, u = (saved[f"weights{per * d + i}"] for i in range(2))
                # split, since a batched gradient has no rule for a slice of everything
                own, dys_own = y.split(size, 1)[d], None if dys is None else dys.split(size, 1)[d]
                start = None if dy.h_n is None else dy.h_n[d]
                dz, dh = self._through_steps(own, dys_own, start, u, counts, d)
                of_states.append(dh)
                add(0, functools.partial(torch.matmul, dz, w))
                add(4 + per * d, functools.partial(torch.matmul, dz.T, x))
                if needs[5 + per * d]:
                    before = _before(own, saved.hx[d], counts, d)
                    add(5 + per * d, functools.partial(torch.matmul, dz.T, before))
                for i in range(6 + per * d, 4 + per * (d + 1)):
                    add(i, functools.partial(dz.sum, 0))
            if needs[2]:
                grads[2] = torch.stack(of_states)
        if needs[0] and saved.steps is None:
            grads[0] = grads[0].reshape(len(counts), counts[0], -1)
            grads[0] = grads[0].transpose(0, 1) if options.batch_first else grads[0]
        return grads

    def _through_steps(
        self, y: Any, dy: Any, dh: Any, u: torch.Tensor, counts: list[int], direction: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of all steps' sums, and of the first state, from that of the last one."""
        dh = y.new_zeros(counts[0], y.shape[1]) if dh is None else dh
        ys, dys = y.split(counts), [None] * len(counts) if dy is None else dy.split(counts)
        found: list[Any] = [None] * len(counts)
        for t in range(len(counts)) if direction else reversed(range(len(counts))):
            whole, others = dh.split([counts[t], counts[0] - counts[t]])
            found[t] = self._gradient(whole if dys[t] is None else whole + dys[t], ys[t])
            dh = torch.cat([found[t] @ u, others])
        return torch.cat(found), dh

    def _gradient(self, dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return dy * (1 - y * y)


class RNNRelu(RNNTanh):
    """As RNNTanh, with relu."""

    autocast = staticmethod(_autocast_of(torch.rnn_relu, 1))
    kind = "rnn_relu"
    function = staticmethod(torch.rnn_relu)

    def _gradient(self, dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y <= 0, 0.0, dy)


def _before(y: torch.Tensor, h: torch.Tensor, counts: list[int], direction: int) -> torch.Tensor:
    """The hidden state before each step."""
    ys, found = y.split(counts), []
    for t, count in enumerate(counts):
        last = t + 1 if direction else t - 1
        ran = min(counts[last], count) if 0 <= last < len(counts) else 0
        found.append(torch.cat([ys[last][:ran], h[ran:count]]) if ran else h[:count])
    return torch.cat(found)


_lstm, _gru, _rnn_tanh, _rnn_relu = LSTM(), GRU(), RNNTanh(), RNNRelu()


def _run(op: GRU, args: tuple[Any, ...]) -> Any:
    """One of torch's functions of sequences, by its arguments."""
    if is_dynamo_compiling() or len(args) != 9:
        return op.function(*args)
    packed = isinstance(args[1 if op.gates == 4 else 2], torch.Tensor)
    input, *sizes, hx, params, has_biases, layers, dropout, train, bidirectional = args if packed else args[:-1]
    batch_first = False if packed else args[-1]
    reason, directions = _refusal(op, args, packed), 2 if bidirectional else 1
    if reason is not None:
        return support.run_reference(op.label(None), reason, functools.partial(op.function, *args))
    steps = _steps(sizes[0], input.device) if packed else None
    states = (*hx,) if op.gates == 4 else (hx, None)
    options, per = (bool(has_biases), bool(train), bool(bidirectional), bool(batch_first)), len(params) // layers
    if layers == 1:
        return op((input, steps, *states, *params), *options)
    last: list[Any] = []
    for i in range(layers):
        own = [None if s is None else s[i * directions : (i + 1) * directions] for s in states]
        tensors = (input, steps, *own, *params[i * per : (i + 1) * per])
        found = op(tensors, *options, joined=i == 0)
        if found is None:  # then torch takes all layers at once
            reason = op.reason_against(tensors, op.options(*options)) or "a GPU that can't run a kernel of the call"
            return support.run_reference(op.label(None), reason, functools.partial(op.function, *args))
        input = found[0]
        if dropout and train and i < layers - 1:
            input = F.dropout(input, dropout)
        last.append(found[1:])
    return (input, *[torch.cat(each) for each in zip(*last, strict=True)])


def _refusal(op: GRU, args: tuple[Any, ...], packed: bool) -> str | None:
    """What of a call can't be divided into layers."""
    hx, params, has_biases, layers, _, _, bidirectional = args[2 if packed else 1 :][:7]
    if not isinstance(params, (list, tuple)) or (op.gates == 4 and (not isinstance(hx, (list, tuple)) or len(hx) != 2)):
        return BadInput("states or weights of another number")
    of_layers, per = layers * (2 if bidirectional else 1), 4 if has_biases else 2
    if len(params) != of_layers * per or layers < 1:
        projected = op.gates == 4 and len(params) == of_layers * (per + 1)
        return "proj_size" if projected else BadInput(f"{len(params)} weights for {layers} layers")
    if layers > 1:
        for state in hx if op.gates == 4 else (hx,):
            if not isinstance(state, torch.Tensor) or state.dim() != 3 or state.shape[0] != of_layers:
                return BadInput("states of another number of layers")
    if not packed:
        return None
    sizes, rows = args[1], args[0].shape[0] if isinstance(args[0], torch.Tensor) and args[0].dim() == 2 else -1
    if sizes.device.type != "cpu" or sizes.dtype != torch.int64 or sizes.dim() != 1 or int(sizes.sum()) != rows:
        return BadInput("batch_sizes that don't fit the rows")
    if bool((sizes[1:] > sizes[:-1]).any()):
        return BadInput("batch_sizes that increase")
    state = hx[0] if op.gates == 4 else hx
    if not isinstance(state, torch.Tensor) or state.dim() != 3 or int(sizes[0]) != state.shape[1]:
        return BadInput("states of another number of sequences")
    return None


@_torch.not_compiled(callees=True)
def lstm(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, h_n and c_n of an LSTM. As torch.lstm, which torch.nn.LSTM calls: (input, (h_0, c_0), params, has_biases,
    num_layers, dropout, train, bidirectional, batch_first), or (data, batch_sizes, (h_0, c_0), params, has_biases, num_layers,
    dropout, train, bidirectional) of packed sequences.

    Shape: input (T, B, I) or, batch_first, (B, T, I); data (ROWS, I); states (num_layers * D, B, H); any strides.
    Dtype: float16, bfloat16, float32, float64, the same for all; sums and gates in float32 (float64). float32 obeys
        torch.backends.cudnn.rnn.fp32_precision. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), without proj_size. One launch for a layer's
        steps up to 128 units in 16 bits (32 in float32, 64 in TF32 on sm_90, 16 in float64), above one for each step.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html; Hochreiter and Schmidhuber, "Long Short-Term
        Memory", 1997. Weights that stay on the chip: Diamos et al., "Persistent RNNs", ICML 2016.
    """
    return _run(_lstm, args)


@_torch.not_compiled(callees=True)
def gru(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and h_n of a GRU. As torch.gru, which torch.nn.GRU calls, with arguments as `lstm`, of which h_0 is a tensor.

    Shape, Dtype, Runs on Triton when, Raises: as `lstm`.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html; Cho et al., "Learning Phrase Representations
        using RNN Encoder-Decoder for Statistical Machine Translation", arXiv:1406.1078.
    """
    return _run(_gru, args)


@_torch.not_compiled(callees=True)
def rnn_tanh(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and h_n of an Elman RNN with tanh. As torch.rnn_tanh, which torch.nn.RNN calls, with arguments as `gru`.

    Shape, Dtype, Runs on Triton when, Raises: as `lstm`.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """
    return _run(_rnn_tanh, args)


@_torch.not_compiled(callees=True)
def rnn_relu(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and h_n of an Elman RNN with relu. As torch.rnn_relu, which torch.nn.RNN calls, with arguments as `gru`.

    Shape, Dtype, Runs on Triton when, Raises: as `lstm`.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """
    return _run(_rnn_relu, args)
