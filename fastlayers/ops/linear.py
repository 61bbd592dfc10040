"""Linear layers, alone or in a chain with their activations:

x (*, K), W (N, K), b (N,) -> z = x W^T + b, y = f(z) (*, N)
dz = f'(z) dy, dx = dz W, dW = dz^T x, db = sum of dz over rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch.precision import matmul_precision
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors
from .activation import Activation

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.matmul.matmul import matmul
    from ..kernels.reduce import activation_grad

__all__ = ["linear"]


def _flows(needs: Sequence[bool]) -> list[bool]:
    """For each layer, and for the end of the chain: whether the gradient has to reach its input, because x or a parameter
    before it wants one."""
    flows = [needs[0]]
    for i in range(1, len(needs), 2):
        flows.append(flows[-1] or needs[i] or needs[i + 1])
    return flows


def _matrix(t: Any) -> Any:
    return None if t is None else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _dense(t: Any) -> Any:
    """A gradient that somebody gives may be sparse: torch's products take that, but not all that follows here."""
    return t if t is None or t.layout is torch.strided else t.to_dense()


class Linear(Operation):
    """input (*, K), then weight (N, K) and bias (N,) or None of each layer -> (*, N).

    One kernel computes a layer with its activation. In backward, the product that makes a layer's dx also applies the
    derivative of the activation before it, and the one that makes its dW adds up its bias gradient, so that nothing between
    two layers runs on its own.
    """

    tensors = ("input", "*params")
    autocast = staticmethod(lambda x: F.linear(x, x))

    class Options(NamedTuple):
        activations: tuple[Activation | None, ...]
        """One for each layer."""

    def reference(self, input: Any, *rest: Any) -> Any:
        *params, activations = rest
        for i, f in enumerate(activations):
            input = F.linear(input, params[2 * i], params[2 * i + 1])
            input = input if f is None else f(input)
        return input

    def unsupported(self, t: Any, options: Options) -> str | None:
        if t.input.dim() == 0:
            return BadInput("an input without dimensions")
        width = t.input.shape[-1]
        for w, b in zip(t.params[::2], t.params[1::2], strict=True):
            if w is None:
                return BadInput("no weight")
            if w.dim() != 2:
                return f"a weight with {w.dim()} dimensions"
            if w.shape[1] != width:
                return BadInput(f"{width} features for a weight of {tuple(w.shape)}")
            if b is not None and b.shape != w.shape[:1]:
                return BadInput(f"a bias of {tuple(b.shape)} for a weight of {tuple(w.shape)}")
            width = w.shape[0]
        return None

    def precision(self, dtype: torch.dtype) -> str:
        return matmul_precision(dtype)

    def _kept(self, options: Options, needs: Needs) -> list[str]:
        """Names of what lies between the layers that these gradients need: z0 before an activation, h0 after it."""
        names, flows, last = [], _flows(needs), len(options.activations) - 1
        for i, f in enumerate(options.activations):
            if f is not None and f.saves == "input" and flows[i + 1]:
                names.append(f"z{i}")
            if (f is not None and f.saves == "output" and flows[i + 1]) or (i < last and needs[3 + 2 * i]):
                names.append("output" if i == last else f"h{i}")
        return names

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        x, rows = t.input, math.prod(t.input.shape[:-1])
        widths = [w.shape[0] for w in t.params[::2]]
        hidden = [n for n in self._kept(options, needs) if n != "output"] if needs else []
        found: dict[str, Out | str] = {"output": Out((*x.shape[:-1], widths[-1]), x.dtype)}
        return found | {n: Out((rows, widths[int(n[1:])]), x.dtype) for n in hidden}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        h, last = _matrix(t.input), len(options.activations) - 1
        for i, f in enumerate(options.activations):
            w, b = t.params[2 * i : 2 * i + 2]
            # Without a name, the result before this one is freed as soon as this one is there.
            like = Out((h.shape[0], w.shape[0]), h.dtype)
            after = out.output.view(like.shape) if i == last else out[f"h{i}"]
            after = like.empty(h.device) if after is None else after
            matmul(h, w.T, bias=b, then=f, z=out[f"z{i}"], out=after, precision=precision)
            h = after

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        """In the order in which the layers save, called one by one."""
        flows, kept, last = _flows(needs), self._kept(options, needs), len(options.activations) - 1
        names = ["input"] if needs[1] else []
        for i in range(last + 1):
            names += [f"params{2 * i}"] if flows[i] else []
            names += [name for name in (f"z{i}", "output" if i == last else f"h{i}") if name in kept]
        return tuple(names)

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        """A weight's gradient lies as the weight does, which may be a transposed view: then autograd keeps it as the parameter's
        without a copy."""
        found: list[Any] = [*super().gradients(like, options, needs)]
        for i, w in enumerate(like.params, 1):
            if found[i] is not None and w.stride() == (1, w.shape[0]):
                found[i] = Out(w.shape, w.dtype, w.stride())
        return tuple(found)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        flows, last = _flows([g is not None for g in (grads.input, *grads.params)]), len(options.activations) - 1

        def undo(i: int) -> Any:
            """The activation after layer i, and what its derivative needs."""
            f = options.activations[i]
            if f is None or not flows[i + 1]:
                return None
            return f, _matrix(saved[f"z{i}" if f.saves == "input" else "output" if i == last else f"h{i}"])

        def sums(i: int) -> Any:
            """A bias gradient that no weight gradient carries."""
            dw, db = grads.params[2 * i : 2 * i + 2]
            return db if dw is None else None

        dz, undone = _matrix(dy.output), undo(last)
        if undone is not None or sums(last) is not None:
            f, kept = undone or (None, None)
            dh = dz
            dz = dh if f is None else Out(tuple(dh.shape), dh.dtype).empty(dh.device)
            activation_grad(
                dh[None], None if kept is None else kept[None], f, None if f is None else dz[None], sums(last)
            )
        for i in range(last, -1, -1):
            dw, db = grads.params[2 * i : 2 * i + 2]
            if dw is not None:
                h = _matrix(saved.input) if i == 0 else saved[f"h{i - 1}"]
                matmul(dz.T, h, out=dw, operand_sums=db, precision=precision)
            w = saved[f"params{2 * i}"]
            if i > 0 and flows[i]:
                dz = matmul(dz, w, undo=undo(i - 1), column_sums=sums(i - 1), precision=precision)
            elif flows[i]:
                matmul(dz, w, out=grads.input.view(dz.shape[0], w.shape[1]), precision=precision)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Options, needs: Needs) -> Tensors:
        """From what was saved, which is less than `reference` needs."""
        flows, last = _flows(needs), len(options.activations) - 1
        grads: list[Any] = [None] * len(needs)

        def add(a: Any, b: Any) -> Any:
            return b if a is None else a if b is None else a + b

        with torch.autocast(next(d for d in dy.values() if d is not None).device.type, enabled=False):
            dh = None
            for i in range(last, -1, -1):
                f, name = options.activations[i], "output" if i == last else f"h{i}"
                dz = add(dh, _matrix(_dense(dy[name])))
                if f is not None and dz is not None and flows[i + 1]:
                    dz = f.differentiate(dz, _matrix(saved[f"z{i}" if f.saves == "input" else name]))
                dz = add(dz, dy[f"z{i}"])
                if dz is None:
                    continue
                if needs[2 + 2 * i]:
                    grads[2 + 2 * i] = dz.sum(0)
                if needs[1 + 2 * i]:
                    grads[1 + 2 * i] = dz.T @ (_matrix(saved.input) if i == 0 else saved[f"h{i - 1}"])
                dh = dz @ saved[f"params{2 * i}"] if flows[i] else None
        grads[0] = dh.reshape(like[0].shape) if needs[0] and dh is not None else None
        return grads

    def flops(self, like: Any, options: Options, needs: Needs | None) -> int:
        rows, flows = math.prod(like.input.shape[:-1]), None if needs is None else _flows(needs)
        sizes = [2 * rows * math.prod(w.shape) for w in like.params[::2]]
        if needs is None or flows is None:
            return sum(sizes)
        return sum(size * (needs[1 + 2 * i] + flows[i]) for i, size in enumerate(sizes))


_linear = Linear()
_ALONE = _linear.options((None,))


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """input @ weight.T + bias. As torch.nn.functional.linear.

    Shape: input (*, in_features) with any leading dimensions or none, weight (out_features, in_features), bias
        (out_features,); the result (*, out_features), contiguous. All with any strides.
    Dtype: float16, bfloat16, float32, float64, the same for all; sums in float32 (float64). float32 obeys
        torch.backends.cuda.matmul.fp32_precision. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and bias is None or (out_features,).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear.html
    """
    return _linear.run((input, weight, bias), _ALONE)


def linear_chain(
    input: torch.Tensor, params: Sequence[torch.Tensor | None], activations: tuple[Activation | None, ...]
) -> torch.Tensor | None:
    """Linear layers and the activations between them as one function for autograd: a kernel a layer in forward, two in
    backward. None where the kernels don't take it whole.

    Shape: input (*, K); params: weight (N_i, N_i-1) and bias (N_i,) or None of each layer.
    Dtype, Runs on Triton when: as `linear`, for all layers at once.
    """
    return _linear((input, *params), activations, joined=True)
