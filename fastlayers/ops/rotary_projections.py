"""What attention is given: three projections of one input in heads, of which query and key are turned by their positions.

x (B, L, E) -> q = turned(x Q^T + b), k = turned(x K^T + b), v = x V^T + b, each (B, heads, L, D)
dz = (turned back dq, turned back dk, dv), dx = dz_q Q + dz_k K + dz_v V, dQ = dz_q^T x, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch import autocast
from ..dispatch.precision import matmul_precision
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out
from .rotary import _rotary_embedding, angles_unsupported, for_each

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import rotary as kernels
    from ..kernels.matmul.matmul import matmul
    from ..kernels.matmul.rotary import rotary_matmul
    from ..kernels.reduce import activation_grad

__all__ = ["packed_rotary_projections", "rotary_projections"]

_RESULTS = ("query", "key", "value")
_DIMENSIONS = "other dimensions than (B, L, E), and (L, R) or (B, L, R)"


def _linear(x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, x)


def _matrix(t: Any) -> Any:
    return None if t is None else t.reshape(t.shape[0] * t.shape[1], t.shape[2])


def _heads(matrix: Any, batch: int, length: int, head_dim: int) -> Any:
    """Of (B L, H D) a view (B, H, L, D)."""
    return matrix.view(batch, length, matrix.shape[1] // head_dim, head_dim).transpose(1, 2)


def _product(t: Any) -> Any:
    """Of (B, H, L, D), in that order of memory, the view (B L, H D)."""
    b, h, l, d = t.shape
    return t.transpose(1, 2).view(b * l, h * d)


class RotaryProjections(Operation):
    """input (B, L, E), a weight (H D, E), (G D, E) and (G D, E) and a bias or None of query, key and value, cos and sin as
    RotaryEmbedding's -> query (B, H, L, D), key and value (B, G, L, D), in the order of memory of the products.

    One kernel computes the three products and turns the first two, where a head's features are a power of two and all of them
    are turned, or the pairs are interleaved, and where there are tiles enough for the GPU. Elsewhere three products run and
    `rotary`. Both round the products to the input's dtype before they are turned. Saves the input, the weights and the angles.
    """

    tensors = (
        "input", "query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "value_bias", "cos", "sin"
    )  # fmt: skip
    floats = tensors[:-2]
    autocast = staticmethod(_linear)
    cast = floats

    class Options(NamedTuple):
        head_dim: int
        interleaved: bool

    def reference(
        self, input: Any, query_weight: Any, query_bias: Any, key_weight: Any, key_bias: Any, value_weight: Any,
        value_bias: Any, cos: Any, sin: Any, head_dim: int, interleaved: bool,
    ) -> Any:  # fmt: skip
        layers = (query_weight, query_bias), (key_weight, key_bias), (value_weight, value_bias)
        q, k, v = [_in_heads(F.linear(input, w, b), w.shape[0] // max(head_dim, 1), head_dim) for w, b in layers]
        return (*_rotary_embedding.reference(q, k, cos, sin, interleaved), v)

    def results(self, options: Any) -> int:
        return 3

    def precision(self, dtype: torch.dtype) -> str:
        return matmul_precision(dtype)

    def unsupported(self, t: Any, options: Any) -> str | None:
        layers = _layers(t)
        if t.input.dim() != 3:
            return _DIMENSIONS
        if any([w is None or w.dim() != 2 for w, _ in layers]):
            return BadInput("a weight that isn't a matrix")
        for weight, bias in layers:
            if weight.shape[1] != t.input.shape[-1] or options.head_dim < 1 or weight.shape[0] % options.head_dim:
                return BadInput(f"a weight {tuple(weight.shape)} for an input {tuple(t.input.shape)}")
            if bias is not None and bias.shape != weight.shape[:1]:
                return BadInput(f"a bias {tuple(bias.shape)} for a weight {tuple(weight.shape)}")
        return self._angles_unsupported(t, options)

    def _angles_unsupported(self, t: Any, options: Any) -> str | None:
        x, cos, sin = t.input, t.cos, t.sin
        if cos is None or sin is None:
            return BadInput("no cos or sin")
        if cos.dim() not in (2, 3) or cos.shape != sin.shape:
            return _DIMENSIONS
        shape = (x.shape[0], 0, x.shape[1], options.head_dim)
        return angles_unsupported(cos, sin, shape, dtype_after(x))

    def sizes(self, t: Any, options: Any) -> tuple[int, ...]:
        """How many features query, key and value have."""
        return t.query_weight.shape[0], t.key_weight.shape[0], t.value_weight.shape[0]

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        (b, l, _), d, dtype = t.input.shape, options.head_dim, t.input.dtype
        q, k, v = [Out((b, n // d, l, d), dtype, (l * n, d, n, 1)) for n in self.sizes(t, options)]
        return {"query": Out.pointwise(q), "key": Out.pointwise(k), "value": v}

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        x, (b, l, _), d = _matrix(t.input), t.input.shape, options.head_dim
        weights, biases = zip(*_layers(t), strict=True)
        outs, angles = [_product(out[name]) for name in _RESULTS], for_each(t.cos, t.sin, b)
        words: Any = dict(interleaved=options.interleaved)
        if rotary_matmul(x, weights, biases, outs, *angles, head_dim=d, precision=precision, **words):
            return
        products = [*[Out(tuple(y.shape), y.dtype).empty(y.device) for y in outs[:2]], outs[2]]
        for weight, bias, z in zip(weights, biases, products, strict=True):
            matmul(x, weight.T, bias=bias, out=z, precision=precision)
        pairs = [(_heads(z, b, l, d), y) for z, y in zip(products[:2], (out.query, out.key), strict=True)]
        kernels.rotary(pairs, *angles, **words)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        names = ("input",) if any(needs[1:7:2]) else ()
        names += ("query_weight", "key_weight", "value_weight") if needs[0] else ()
        return (*names, "cos", "sin") if any(needs[:5]) else names

    def reached(self, given: Sequence[str], needs: Needs) -> Needs:
        q, k, v = [name in given for name in _RESULTS]
        of = (True, q, q, k, k, v, v, False, False)
        return tuple([need and known for need, known in zip(needs, of, strict=True)])

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        layers, dys, products = _layers(grads), [], []
        for name, gradients in zip(_RESULTS, layers, strict=True):
            d, product = dy[name], None
            if grads.input is None and not any([g is not None for g in gradients]):
                d = None
            elif name == "value" and d is not None and d.transpose(1, 2).is_contiguous():
                d, product = None, _product(d)
            elif d is not None:
                product = Out((d.shape[0] * d.shape[2], d.shape[1] * d.shape[3]), d.dtype).empty(d.device)
            dys.append(d)
            products.append(product)
        _turn_back(dys, products, saved, options)
        x, weights = _matrix(saved.input), (saved.query_weight, saved.key_weight, saved.value_weight)
        for dz, (dw, db) in zip(products, layers, strict=True):
            _weight_grad(dz, x, dw, db, precision)
        pairs = [(dz, w) for dz, w in zip(products, weights, strict=True) if dz is not None and grads.input is not None]
        dx: Any = None
        for i, (dz, w) in enumerate(pairs):
            out = _matrix(grads.input) if i == len(pairs) - 1 else None
            dx = matmul(dz, w, add=dx, out=out, precision=precision)

    def flops(self, like: Any, options: Any, needs: Needs | None) -> int:
        b, l, e = like.input.shape
        each = [2 * b * l * e * n for n in self.sizes(like, options)]
        if needs is None:
            return sum(each)
        return sum([n * (needs[0] + needs[1 + 2 * i]) for i, n in enumerate(each)])


class PackedRotaryProjections(RotaryProjections):
    """The same with one weight ((H + 2 G) D, E), whose gradient is one product, and so is the input's."""

    tensors = ("input", "weight", "bias", "cos", "sin")
    floats = tensors[:-2]
    cast = floats

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        heads: tuple[int, int]
        """Of the query, and of key and value."""
        head_dim: int
        interleaved: bool

    def reference(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Any, weight: Any, bias: Any, cos: Any, sin: Any, heads: tuple[int, int], head_dim: int,
        interleaved: bool,
    ) -> Any:  # fmt: skip
        h, g = heads
        packed = _in_heads(F.linear(input, weight, bias), h + 2 * g, head_dim)
        q, k, v = packed.split((h, g, g), -3)
        v = v.transpose(-3, -2).contiguous().transpose(-3, -2)  # not a view that keeps query and key
        return (*_rotary_embedding.reference(q, k, cos, sin, interleaved), v)

    def unsupported(self, t: Any, options: Any) -> str | None:
        if t.input.dim() != 3:
            return _DIMENSIONS
        if t.weight is None or t.weight.dim() != 2 or min(options.heads) < 0:
            return BadInput("a weight that isn't a matrix, or a negative number of heads")
        if t.weight.shape != (sum(self.sizes(t, options)), t.input.shape[-1]) or options.head_dim < 1:
            return BadInput(f"a weight {tuple(t.weight.shape)} for {options.heads} heads and {tuple(t.input.shape)}")
        if t.bias is not None and t.bias.shape != t.weight.shape[:1]:
            return BadInput(f"a bias {tuple(t.bias.shape)} for a weight {tuple(t.weight.shape)}")
        return self._angles_unsupported(t, options)

    def sizes(self, t: Any, options: Any) -> tuple[int, ...]:
        h, g = options.heads
        return h * options.head_dim, g * options.head_dim, g * options.head_dim

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        weights, biases = (_parts(packed, 0, self.sizes(t, options)) for packed in (t.weight, t.bias))
        layers = [item for layer in zip(weights, biases, strict=True) for item in layer]
        super().forward(_rotary_projections.Tensors(t.input, *layers, t.cos, t.sin), out, options, precision)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        names = ("input",) if needs[1] else ()
        return (*names, *(("weight",) if needs[0] else ()), "cos", "sin")

    def reached(self, given: Sequence[str], needs: Needs) -> Needs:
        return needs

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        some = next(d for d in dy.values() if d is not None)
        b, _, l, _ = some.shape
        sizes = self.sizes(None, options)
        packed = Out((b * l, sum(sizes)), some.dtype).empty(some.device)
        parts = _parts(packed, 1, sizes)
        for name, part in zip(_RESULTS, parts, strict=True):
            if dy[name] is None:
                part.zero_()
        _turn_back([dy[name] for name in _RESULTS], parts, saved, options)
        _weight_grad(packed, _matrix(saved.input), grads.weight, grads.bias, precision)
        if grads.input is not None:
            matmul(packed, saved.weight, out=_matrix(grads.input), precision=precision)

    def flops(self, like: Any, options: Any, needs: Needs | None) -> int:
        b, l, e = like.input.shape
        return 2 * b * l * e * sum(self.sizes(like, options)) * (1 if needs is None else needs[0] + needs[1])


def _in_heads(x: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, head_dim)).transpose(-3, -2)


def _parts(packed: Any, dim: int, sizes: Sequence[int]) -> list[Any]:
    """Views one after the other; not by `split`, whose list of views a replay can't repeat."""
    return [None if packed is None else packed.narrow(dim, sum(sizes[:i]), n) for i, n in enumerate(sizes)]


def _layers(t: Any) -> tuple[tuple[Any, Any], ...]:
    """Weight and bias, or their gradients, of query, key and value."""
    return (t.query_weight, t.query_bias), (t.key_weight, t.key_bias), (t.value_weight, t.value_bias)


def _turn_back(dys: Sequence[Any], parts: Sequence[Any], saved: Named, options: Any) -> None:
    """From the gradients of query, key and value, write those of the products (B L, H D), of which some may be None."""
    pairs = [
        None if d is None or part is None else (d, _heads(part, d.shape[0], d.shape[2], options.head_dim))
        for d, part in zip(dys, parts, strict=True)
    ]
    turned, value = [pair for pair in pairs[:2] if pair is not None], pairs[2]
    given = [pair for pair in pairs if pair is not None]
    if not given:
        return
    batch, _, length, _ = given[0][0].shape
    angles = [] if saved.cos is None else for_each(saved.cos, saved.sin, batch)
    if turned:
        kernels.rotary(turned, *angles, interleaved=options.interleaved, backward=True)
    if value is not None:  # copied by the same kernel, since a copy by torch couldn't be replayed
        none = angles[0].narrow(-1, 0, 0) if angles else Out((batch, length, 0), value[0].dtype).empty(value[0].device)
        kernels.rotary([value], none, none, interleaved=False)


def _weight_grad(dz: Any, x: Any, dw: Any, db: Any, precision: str) -> None:
    """The gradients of a weight and its bias, of which either may be None."""
    if dw is not None:
        matmul(dz.T, x, out=dw, operand_sums=db, precision=precision)
    elif db is not None:
        activation_grad(dz[None], None, None, None, db)


_rotary_projections, _packed_rotary_projections = RotaryProjections(), PackedRotaryProjections()

Layers = Sequence[torch.Tensor | None]


def rotary_projections(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Layers | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of an attention layer, in heads, query and key turned by the angles that belong to their positions:

        q, k, v = (linear(input, w, b).unflatten(-1, (-1, head_dim)).transpose(1, 2) for w, b in zip(weights, biases))
        (*rotary_embedding(q, k, cos, sin, interleaved=interleaved), v)

    One kernel in 16 bits and TF32, where D is a power of two from 4 to 128 (256 with sm_90's or sm_100's tensor memory
    accelerator), where all features are turned or pairs are interleaved, and where there are tiles enough for the GPU; four
    otherwise, for single tokens too. The products are rounded to the input's dtype before they are turned, and what is turned
    once more, as by those two functions. In the backward one kernel turns both gradients back; each projection has a product for
    its weight's gradient and one that is added to the input's. Saves the input, the weights and the angles.

    Shape: input (B, L, E), weights (H * D, E), (G * D, E) and (G * D, E) of query, key and value, D being head_dim, with any
        strides, biases of as many features; cos and sin (L, R), (1, L, R) or (B, L, R), R even and at most D; the results
        (B, H, L, D), (B, G, L, D) and (B, G, L, D), in memory (B, L, H, D) and (B, L, G, D).
    Dtype: float16, bfloat16, float32, float64, the same for all but cos and sin, which are float32 or of that dtype. Sums in
        float32 (float64). float32 obeys torch.backends.cuda.matmul.fp32_precision. Under autocast, the products as
        torch.nn.functional.linear, and the results in its dtype.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), the input has three dimensions, D is at
        most 1024, and cos and sin don't require grad.
    Raises: what torch's functions raise.

    Args:
        weights, biases: of query, key and value, as torch.nn.Linear has them; each bias, or all of them, may be None.
        head_dim: the features of one head.
        interleaved: as rotary_embedding's.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    layers = zip(weights, (None,) * 3 if biases is None else biases, strict=True)
    tensors = (input, *[t for layer in layers for t in layer], cos, sin)
    return _rotary_projections(tensors, head_dim, interleaved)


def packed_rotary_projections(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: tuple[int, int],
    head_dim: int,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rotary_projections` with query, key and value one after the other in one weight, as Phi-3 has them. Neither it nor its
    gradient is copied, and each gradient is one product.

    Shape: as rotary_projections; weight ((H + 2 G) * D, E), bias ((H + 2 G) * D,).
    Dtype, Runs on Triton when, Raises: as rotary_projections.

    Args:
        heads: how many the query has, and how many key and value have.
        head_dim, interleaved: as rotary_projections'.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    return _packed_rotary_projections((input, weight, bias, cos, sin), (*heads,), head_dim, interleaved)


def dtype_after(input: torch.Tensor) -> torch.dtype:
    """The dtype that a product of this input has, under autocast as it is now."""
    return autocast.dtype_after(_linear, input)


def rotary_layers(
    input: torch.Tensor, layers: Sequence[tuple[Any, Any]], cos: Any, sin: Any, head_dim: int, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`rotary_projections` of the weight and bias of three layers. None where the kernels don't take it whole."""
    tensors = (input, *[t for layer in layers for t in layer], cos, sin)
    return _rotary_projections(tensors, head_dim, interleaved, joined=True)


def packed_rotary_layers(
    input: torch.Tensor, layer: tuple[Any, Any], cos: Any, sin: Any, heads: tuple[int, int], head_dim: int,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """The same of one layer."""
    return _packed_rotary_projections((input, *layer, cos, sin), (*heads,), head_dim, interleaved, joined=True)
