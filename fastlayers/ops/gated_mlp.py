"""The gated layers of a transformer (SwiGLU, GEGLU), from the input to what goes into the residual stream:

x (*, K) -> g = x G^T + b, u = x U^T + b (*, N), h = f(g) u, y = h D^T + b (*, M)
dh = dy D, dg = f'(g) (dh u), du = dh f(g), dx = dg G + du U
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch.precision import matmul_precision
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors
from .activation import CALLS, Activation

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.matmul import gated as kernels
    from ..kernels.matmul.matmul import matmul
    from ..kernels.reduce import activation_grad

__all__ = ["gated_mlp", "packed_gated_mlp"]


def _matrix(t: Any) -> Any:
    return None if t is None else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _weight_grad(dz: Any, x: Any, dw: Any, db: Any, precision: str) -> None:
    """The gradients of a weight and its bias, of which either may be None."""
    if dw is not None:
        matmul(dz.T, x, out=dw, operand_sums=db, precision=precision)
    elif db is not None:
        activation_grad(dz[None], None, None, None, db)


class GatedMlp(Operation):
    """input (*, K), gate and up weights (N, K), down weight (M, N), each with a bias or None -> (*, M).

    Saves both factors of what goes into the last product, and computes that anew: half of the intermediate
    results that torch's functions save.
    """

    tensors = (
        "input", "gate_weight", "gate_bias", "up_weight", "up_bias", "down_weight", "down_bias"
    )  # fmt: skip
    autocast = staticmethod(lambda x: F.linear(x, x))

    class Options(NamedTuple):
        activation: Activation

    def reference(
        self, input: Any, gate_weight: Any, gate_bias: Any, up_weight: Any, up_bias: Any, down_weight: Any,
        down_bias: Any, activation: Activation,
    ) -> Any:  # fmt: skip
        gate = activation(F.linear(input, gate_weight, gate_bias))
        return F.linear(gate * F.linear(input, up_weight, up_bias), down_weight, down_bias)

    def unsupported(self, t: Any, options: Options) -> str | None:
        if not options.activation.joins:
            return "an activation that autocast widens"
        weights = (t.gate_weight, t.up_weight, t.down_weight)
        if t.input.dim() == 0 or any([w is None or w.dim() != 2 for w in weights]):
            return BadInput("an input without dimensions, or a weight that isn't a matrix")
        n, k = t.gate_weight.shape
        if t.input.shape[-1] != k or t.up_weight.shape != t.gate_weight.shape or t.down_weight.shape[1] != n:
            shapes = [tuple(w.shape) for w in weights]
            return BadInput(f"weights {shapes} for an input {tuple(t.input.shape)}")
        for weight, bias in zip(weights, (t.gate_bias, t.up_bias, t.down_bias), strict=True):
            if bias is not None and bias.shape != weight.shape[:1]:
                return BadInput(f"a bias {tuple(bias.shape)} for a weight {tuple(weight.shape)}")
        return None

    def precision(self, dtype: torch.dtype) -> str:
        return matmul_precision(dtype)

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        rows, n, dtype = math.prod(t.input.shape[:-1]), t.gate_weight.shape[0], t.input.dtype
        found: dict[str, Out | str] = {"output": Out((*t.input.shape[:-1], t.down_weight.shape[0]), dtype)}
        kept = () if needs is None else self._kept(needs)
        return found | {k: Out((rows, n), dtype, differentiable=k != "hidden") for k in kept}

    def _kept(self, needs: Needs) -> tuple[str, ...]:
        """Names of what lies between the products that these gradients need."""
        if any(needs[:3]) or (any(needs[3:5]) and needs[5]):
            return "gate", "up"
        return ("gate",) if any(needs[3:5]) else ("hidden",) if needs[5] else ()

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        x = _matrix(t.input)
        hidden = out.hidden
        if hidden is None:
            hidden = Out((x.shape[0], t.gate_weight.shape[0]), x.dtype).empty(x.device)
        kernels.gated_matmul(
            x, t.gate_weight, t.up_weight, hidden, then=options.activation, precision=precision,
            gate_bias=t.gate_bias, up_bias=t.up_bias, gate_out=out.gate, up_out=out.up,
        )  # fmt: skip
        y = out.output.view(x.shape[0], t.down_weight.shape[0])
        matmul(hidden, t.down_weight.T, bias=t.down_bias, out=y, precision=precision)

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        names = self._kept(needs)
        names += ("down_weight",) if any(needs[:5]) else ()
        names += ("input",) if needs[1] or needs[3] else ()
        return (*names, "gate_weight", "up_weight") if needs[0] else names

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        d_output, hidden, x = _matrix(dy.output), saved.hidden, _matrix(saved.input)
        of_gate = any([g is not None for g in (grads.input, grads.gate_weight, grads.gate_bias)])
        of_up = any([g is not None for g in (grads.input, grads.up_weight, grads.up_bias)])
        d_hidden: Any = None
        d_gate: Any = None
        if of_gate or of_up:
            d_hidden = matmul(d_output, saved.down_weight, precision=precision)
        if of_gate:
            d_gate = Out(tuple(saved.gate.shape), saved.gate.dtype).empty(d_output.device)
        if hidden is None and grads.down_weight is not None:
            hidden = Out(tuple(saved.gate.shape), saved.gate.dtype).empty(d_output.device)
        d_up: Any = d_hidden if of_up else None  # in its memory
        if d_hidden is not None or hidden is not saved.hidden:
            kernels.gate(saved.gate, saved.up, hidden, d_hidden, d_gate, d_up, then=options.activation)
        _weight_grad(d_output, hidden, grads.down_weight, grads.down_bias, precision)
        _weight_grad(d_gate, x, grads.gate_weight, grads.gate_bias, precision)
        _weight_grad(d_up, x, grads.up_weight, grads.up_bias, precision)
        if grads.input is not None:
            first = matmul(d_gate, saved.gate_weight, precision=precision)
            matmul(d_up, saved.up_weight, add=first, out=grads.input.view(first.shape), precision=precision)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Options, needs: Needs) -> Tensors:
        """From what was saved, which is less than `reference` needs."""
        grads: list[Any] = [None] * len(needs)
        f, of_gate, of_up = options.activation, any(needs[:3]), needs[0] or any(needs[3:5])
        with torch.autocast(next(d for d in dy.values() if d is not None).device.type, enabled=False):
            d_gate, d_up = dy.gate, dy.up
            if dy.output is not None:
                given = dy.output if dy.output.layout is torch.strided else dy.output.to_dense()
                d_output = _matrix(given)
                if needs[6]:
                    grads[6] = d_output.sum(0)
                if needs[5]:
                    grads[5] = d_output.T @ (f(saved.gate) * saved.up if saved.hidden is None else saved.hidden)
                dh: Any = d_output @ saved.down_weight if of_gate or of_up else None
                if of_gate:
                    d_gate = _sum(d_gate, f.differentiate(dh * saved.up, saved.gate, "input"))
                if of_up:
                    d_up = _sum(d_up, dh * f(saved.gate))
            dx = None
            for i, dz, weight in ((1, d_gate, saved.gate_weight), (3, d_up, saved.up_weight)):
                if dz is None:
                    continue
                if needs[i]:
                    grads[i] = dz.T @ _matrix(saved.input)
                if needs[i + 1]:
                    grads[i + 1] = dz.sum(0)
                dx = _sum(dx, dz @ weight) if needs[0] else None
        grads[0] = None if dx is None else dx.reshape(like[0].shape)
        return grads

    def flops(self, like: Any, options: Options, needs: Needs | None) -> int:
        rows = math.prod(like.input.shape[:-1])
        gate, up, down = (2 * rows * math.prod(w.shape) for w in (like.gate_weight, like.up_weight, like.down_weight))
        if needs is None:
            return gate + up + down
        return gate * (needs[0] + needs[1]) + up * (needs[0] + needs[3]) + down * (any(needs[:5]) + needs[5])


class PackedGatedMlp(GatedMlp):
    """The same with gate and up in one weight (2 N, K) and one bias (2 N,), of which they are views. Their gradient is one tensor
    as well, written half by half."""

    tensors = ("input", "gate_up_weight", "gate_up_bias", "down_weight", "down_bias")

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        activation: Activation
        gate_last: bool

    def reference(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Any, gate_up_weight: Any, gate_up_bias: Any, down_weight: Any, down_bias: Any,
        activation: Activation, gate_last: bool,
    ) -> Any:  # fmt: skip
        gate, up = F.linear(input, gate_up_weight, gate_up_bias).chunk(2, -1)[:: -1 if gate_last else 1]
        return F.linear(activation(gate) * up, down_weight, down_bias)

    def unsupported(self, t: Any, options: Any) -> str | None:
        weight = t.gate_up_weight
        if weight is None or weight.dim() != 2 or weight.shape[0] % 2:
            return BadInput("a weight that has no halves")
        if t.gate_up_bias is not None and t.gate_up_bias.shape != weight.shape[:1]:
            return BadInput(f"a bias {tuple(t.gate_up_bias.shape)} for a weight {tuple(weight.shape)}")
        return super().unsupported(self._halves(t, options), options)

    def _halves(self, t: Any, options: Any) -> Any:
        """The tensors by the names of GatedMlp's, None where they are."""
        (gate, gate_bias), (up, up_bias) = zip(
            *[_split(packed, options.gate_last) for packed in (t.gate_up_weight, t.gate_up_bias)], strict=True
        )
        return _gated_mlp.Tensors(t.input, gate, gate_bias, up, up_bias, t.down_weight, t.down_bias)

    def _sizes(self, t: Any) -> Any:
        """The same of descriptions, as far as sizes go."""
        rows, k = t.gate_up_weight.shape
        half = Out((rows // 2, k), t.input.dtype)
        return _gated_mlp.Tensors(t.input, half, None, half, None, t.down_weight, t.down_bias)

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        return super().outputs(self._sizes(t), options, needs and _twice(needs))

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        super().forward(self._halves(t, options), out, options, precision)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        names = super().saves(t, options, _twice(needs))
        return (*names[:-2], "gate_up_weight") if needs[0] else names

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        super().backward(self._halves(grads, options), dy, _saved_halves(saved, options), options, precision)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        saved = _saved_halves(saved, options)
        found = super().differentiate(dy, saved, like, options, _twice(needs))
        turn = -1 if options.gate_last else 1
        packed = [None if found[i] is None else torch.cat((found[i], found[i + 2])[::turn]) for i in (1, 2)]
        return [found[0], *packed, found[5], found[6]]

    def flops(self, like: Any, options: Any, needs: Needs | None) -> int:
        return super().flops(self._sizes(like), options, needs and _twice(needs))


def _split(packed: Any, gate_last: bool) -> tuple[Any, Any]:
    """Views of the gate's half and the other one's."""
    if packed is None:
        return None, None
    first, second = packed.tensor_split(2)
    return (second, first) if gate_last else (first, second)


def _saved_halves(saved: Named, options: Any) -> Named:
    gate, up = _split(saved.gate_up_weight, options.gate_last)
    return Named(saved, gate_weight=gate, up_weight=up)


def _twice(needs: Needs) -> Needs:
    """The needs of GatedMlp's tensors."""
    x, weight, bias, down, down_bias = needs
    return x, weight, bias, weight, bias, down, down_bias


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a + b


_gated_mlp, _packed_gated_mlp = GatedMlp(), PackedGatedMlp()


def gated_mlp(
    input: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """linear(activation(linear(input, gate)) * linear(input, up), down): SwiGLU with "silu", GEGLU with "gelu" or "gelu_tanh".

    One kernel computes both inner products and multiplies them. Saves the two for the backward, half of what torch's functions
    save. They are rounded to the input's dtype as those functions round them; the activation's result isn't, and so the
    product of the two is rounded once less.

    Shape: input (*, K) with any leading dimensions or none, gate_weight and up_weight (N, K), down_weight (M, N), gate_bias and
        up_bias (N,), down_bias (M,); the result (*, M), contiguous. All with any strides.
    Dtype: float16, bfloat16, float32, float64, the same for all; sums in float32 (float64). float32 obeys
        torch.backends.cuda.matmul.fp32_precision. Under autocast, as torch.nn.functional.linear.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch's functions raise; ValueError for an activation that isn't the name of one without options that must be
        given.
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    tensors = (input, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias)
    return _gated_mlp(tensors, _named(activation))


def packed_gated_mlp(
    input: torch.Tensor,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    *,
    gate_last: bool = False,
) -> torch.Tensor:
    """`gated_mlp` with gate and up in one weight, as Phi-3 and timm's SwiGLUPacked have it:

        gate, up = linear(input, gate_up_weight, gate_up_bias).chunk(2, -1)
        linear(activation(gate) * up, down_weight, down_bias)

    Neither the weight nor its gradient is copied: both products read and write their half of it. Rounding as gated_mlp's.

    Shape: input (*, K), gate_up_weight (2 N, K), down_weight (M, N), gate_up_bias (2 N,), down_bias (M,), all with any strides;
        the result (*, M), contiguous.
    Dtype, Runs on Triton when, Raises: as gated_mlp.

    Args:
        gate_last: whether the gate is the second half, as in timm's GluMlp.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    tensors = (input, gate_up_weight, gate_up_bias, down_weight, down_bias)
    return _packed_gated_mlp(tensors, _named(activation), gate_last)


def _named(activation: str) -> Activation:
    name, approximate = ("gelu", ("tanh",)) if activation == "gelu_tanh" else (activation, ())
    try:
        return CALLS[name](*approximate)
    except (KeyError, TypeError):
        raise ValueError(f"no activation {activation!r} without options") from None


def gated_layers(
    input: torch.Tensor,
    gate: tuple[Any, Any],
    up: tuple[Any, Any],
    down: tuple[Any, Any],
    activation: Activation,
) -> torch.Tensor | None:
    """The same of three layers, each a weight and a bias or None. None where the kernels don't take it whole."""
    return _gated_mlp((input, *gate, *up, *down), activation, joined=True)


def packed_gated_layers(
    input: torch.Tensor, gate_up: tuple[Any, Any], down: tuple[Any, Any], activation: Activation, gate_last: bool
) -> torch.Tensor | None:
    """The same of two layers, of which the first one's result has the gate in one of its halves."""
    return _packed_gated_mlp((input, *gate_up, *down), activation, gate_last, joined=True)
