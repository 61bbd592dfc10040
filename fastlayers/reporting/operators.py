"""What torch's operators compute and move while a model runs on meta tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from .._torch import TorchDispatchMode, tree_leaves, tree_map
from ..dispatch import explain as explaining
from .gpus import Work

BACKWARD = "(backward)"
"""Stands for the module of torch's operators in the backward, which aren't known by module."""

_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view"}
"""Operators that compute nothing."""


def _of_convolution_backward(dy: Any, x: Any, weight: Any, *rest: Any, out_val: Any) -> int:
    transposed, (of_input, of_weight, _) = rest[4], rest[-1]
    # Each weight meets each pixel once: of the result, or of the input of a transposed convolution.
    return 2 * (x if transposed else dy).numel() * weight[0].numel() * (of_input + of_weight)


_FLOPS: dict[str, Callable[..., int]] = {"convolution_backward": _of_convolution_backward}
"""In the place of torch's count, which takes no account of groups."""


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Values:
    """The values of small tensors of integers and booleans, kept on the CPU beside their meta tensors: models look at them, for
    instance to see whether a mask hides anything. What is computed from floating-point numbers has no values."""

    MOST = 2**20
    """Elements of a tensor whose values are kept."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_meta(self, x: Any, dtype: torch.dtype | None) -> Any:
        """An input on the meta device, in this dtype if it is floating-point."""
        if not isinstance(x, torch.Tensor):
            return x
        floating = x.is_floating_point()
        new = torch.empty_like(x, device="meta", dtype=dtype if dtype is not None and floating else None)
        if x.device.type != "meta":
            self._keep(new, x.detach().to("cpu", copy=True))
        return new.requires_grad_(x.requires_grad)

    def answer(self, function: Any, args: Any) -> Any:
        """What an operator gives that asks for a value, or None where the value isn't known."""
        if function.overloadpacket.__name__ != "_local_scalar_dense" or args[0].device.type != "meta":
            return None
        value = self._of(args[0])
        return None if value is None else value.item()

    def follow(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Do on the CPU what an operator does on the meta device, if all that it needs is known."""
        given, results = tensors_in((args, kwargs)), tensors_in(result)
        known = {id(t): self._of(t) for t in given}
        random = torch.Tag.nondeterministic_seeded in function.tags or "empty" in function.overloadpacket.__name__
        if any(value is None for value in known.values()) or random or any(map(_too_much, results)):
            for t in results:
                self._kept.pop(id(t), None)  # it was written into
            return

        def value(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return known[id(x)] if isinstance(x, torch.Tensor) else x

        with contextlib.suppress(RuntimeError):  # not for the CPU, or not for these values
            computed = function(*tree_map(value, args), **tree_map(value, kwargs))
            for t, of in zip(results, tensors_in(computed), strict=True):
                self._keep(t, of)

    def _of(self, t: torch.Tensor) -> torch.Tensor | None:
        if t.device.type != "meta":
            return t
        # The tensor is kept as well, so that no other one gets its id.
        return self._kept[id(t)][1] if id(t) in self._kept else None

    def _keep(self, t: torch.Tensor, value: torch.Tensor) -> None:
        if t.device.type == "meta" and not _too_much(t):
            self._kept[id(t)] = t, value


def _too_much(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex() or t.numel() > Values.MOST


class Operators(TorchDispatchMode):
    """Counts torch's operators by the module that calls them.

    Args:
        calls: where they are noted.
        make: makes a `dry_run.Call`.
        values: what is known of the tensors.
    """

    def __init__(self, calls: list[Any], make: Callable[..., Any], values: Values):
        super().__init__()
        self.calls, self.make, self.values = calls, make, values
        self.backward = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        value = self.values.answer(function, args)
        if value is not None:
            return value
        result = function(*args, **kwargs)
        self.values.follow(function, args, kwargs, result)
        packet = function.overloadpacket
        if getattr(function, "is_view", False) or packet.__name__ in _FREE:
            return result
        counter = _FLOPS.get(packet.__name__, flop_registry.get(packet))
        flops = counter(*args, **kwargs, out_val=result) if counter is not None else 0
        self.note(packet.__name__, flops, (args, kwargs, result))
        return result

    def note(self, name: str, flops: int, moved: Any) -> None:
        """An operator that reads or writes these tensors. What runs on the CPU, to draw a seed for instance, is left out."""
        tensors = tensors_in(moved)
        if all([t.device.type != "meta" for t in tensors]):
            return
        work, nothing = Work(flops, sum(t.numel() * t.element_size() for t in tensors)), Work(0, 0)
        if self.backward:
            self.calls.append(self.make(name, BACKWARD, False, nothing, work))
        else:
            module = explaining.recorder.module if explaining.recorder is not None else ""
            self.calls.append(self.make(name, module, False, work, nothing))


class Attention(TorchFunctionMode):
    """Within, torch's scaled_dot_product_attention is noted as the one kernel (and the one of its backward) that torch takes on
    CUDA, rather than as the products, softmax and scores in memory that it takes on meta tensors."""

    def __init__(self, operators: Operators):
        super().__init__()
        self.operators = operators

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is _attention and _in_one_kernel(*args, **kwargs):
            return self._run(*args, **kwargs)
        return function(*args, **kwargs)

    def _run(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
        return _Fused.apply(self.operators, query, key, value, attn_mask)


_attention: Any = F.scaled_dot_product_attention


def _in_one_kernel(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> bool:
    """Whether torch has a kernel for it on CUDA: of flash attention or, with a mask or in float32, of efficient attention."""
    heads = query.dim() == 4 and query.dtype != torch.float64 and max(query.shape[-1], value.shape[-1]) <= 256
    shared = key.shape[1] != query.shape[1]  # as enable_gqa has it, which efficient attention doesn't take
    half = query.dtype in (torch.float16, torch.bfloat16)
    return heads and (attn_mask is None or not attn_mask.requires_grad) and (not shared or (half and attn_mask is None))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operators: Operators, *tensors: torch.Tensor | None) -> torch.Tensor:
        query, key, value, mask = tensors
        assert query is not None and key is not None and value is not None
        n, heads, rows, _ = query.shape
        output = query.new_empty(n, rows, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(n, heads, rows, dtype=torch.float32)
        ctx.operators = operators
        ctx.save_for_backward(query, key, value, mask, output, lse)
        pairs = 2 * math.prod(query.shape[:-1]) * key.shape[-2]
        operators.note(_attention.__name__, pairs * (query.shape[-1] + value.shape[-1]), (tensors, output, lse))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, *others = ctx.saved_tensors
        # The weights again and their gradient, then each of the three gradients.
        pairs = 2 * math.prod(query.shape[:-1]) * key.shape[-2]
        results = [torch.empty_like(t) for t in (query, key, value)]
        flops = pairs * (3 * query.shape[-1] + 2 * value.shape[-1])
        ctx.operators.note(f"{_attention.__name__}_backward", flops, (query, key, value, others, grads, results))
        return None, *results, None
