"""What is compiled: every kernel at every tile that can be picked, as calls of the launchers on meta tensors."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastlayers.kernels import _tiles, conv, conv_box, epilogues, matmul, pointwise, reduce, softmax
from fastlayers.kernels._tiles import Product, Tile
from fastlayers.testing import SPECS

from .gpus import Work

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Case:
    """One kernel at one tile: `call` launches it, and only what `kernel` names is compiled."""

    name: str
    kernel: str
    dtype: torch.dtype
    call: Callable[[], object]
    force: dict[str, Tile | Product]
    wide: bool = False
    """Compiled for offsets of 64 bits."""

    @property
    def streams(self) -> bool:
        """Whether memory alone decides the speed, so that every load and store must be 128 bits wide. Rows of up to 8
        elements, which aren't aligned, can't be."""
        rows = r"relu|softmax (grad )?(rows \d\d|blocks)"
        images = r"to channels_last \d|depthwise (input grad )?\S+ stride \d channels_last"
        return re.match(f"{rows}|{images}", self.name) is not None

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{' wide' * self.wide}"

    @property
    def arithmetic(self) -> str:
        """The kind of it, as in kernels/_tiles.py. Strict float32 in several products of tensor cores counts as theirs."""
        if self.dtype != torch.float32:
            return "64" if self.dtype == torch.float64 else "16"
        precisions = [getattr(self.call, "keywords", {}).get("precision")]
        precisions += [getattr(tile, "precision", None) for tile in self.force.values()]
        return "ieee" if {*precisions} <= {"ieee", None} else "tf32"

    @functools.cached_property
    def work(self) -> Work | None:
        """What the whole call computes and moves, by the Spec of the layer that it is a direction of, if it is of one."""
        return _work(self.call)


def _work(call: Any) -> Work | None:
    """From the launcher's arguments."""
    args, keywords, nn = call.args, call.keywords, torch.nn
    x, direction = args[0], "forward"
    launcher = call.func.__name__
    if launcher == "matmul":
        name, make = "Linear", lambda: nn.Linear(args[1].shape[0], args[1].shape[1])
    elif launcher.startswith("conv2d"):
        # conv2d(x, w, ...), conv2d_input_grad(dz, w, dx), conv2d_weight_grad(dz, x, dw)
        operands = {"conv2d": (0, 1, "forward"), "conv2d_input_grad": (2, 1, "input grad")}
        image, weight, direction = operands.get(launcher, (1, 2, "weight grad"))
        x, w = args[image], args[weight]
        geometry = {key: keywords[key] for key in ("stride", "padding", "dilation", "groups")}
        o, c, *kernel = w.shape
        name, make = "Conv2d", lambda: nn.Conv2d(c * geometry["groups"], o, tuple(kernel), **geometry)
    elif launcher in ("pointwise", "pointwise_grad", "activation_grad"):
        name, make = "ReLU", nn.ReLU
    elif launcher in ("softmax", "softmax_grad"):
        name, make = "Softmax", lambda: nn.Softmax(args[-2])
    else:
        return None
    if launcher.endswith("grad") and not launcher.startswith("conv2d"):
        direction = "backward"
    spec = next(spec for spec in SPECS if spec.name == name)
    with torch.device("meta"):
        layer: Any = make().to(x.dtype)
    flops, elements = spec.flops(layer, x, direction), spec.elements(layer, x, direction)  # type: ignore[arg-type]
    return Work(flops, elements * x.dtype.itemsize)


def _maker(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.empty(shape, dtype=dtype, device="meta")


_KINDS = {
    "16": (torch.float16, torch.bfloat16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
    "64": (torch.float64,),
}


def _product_cases(target: str) -> Iterator[Case]:
    """matmul and convolution: three directions each at every tile, and the ways in which small tiles alone are used."""
    for (kind, size), tile in _tiles.products(target).items():
        precision = "tf32" if kind == "tf32" else "ieee"
        name = f"{kind}/{size} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}"
        for dtype in _KINDS[kind]:
            calls = [("matmul", *call) for call in _matmul_calls(0, dtype, precision)]
            boxes = target in _tiles.BOX_ARCHITECTURES and kind in ("16", "tf32")
            # Where boxes are, pointers are for what is done before an operand is copied: _tiles.BOX_FLOPS.
            channels, pixels = (64, 28) if boxes else (256, 56)
            calls += [("conv", *call) for call in _conv_calls(dtype, precision, channels, pixels)]
            # What _tiles never picks: a large tile for a convolution, or where rows of an operand are summed.
            if size == "large":
                calls = [c for c in calls if c[0] == "matmul" and "bias grad" not in c[1]]
            if size in ("medium", "skinny"):
                calls = [c for c in calls if c[0] == "matmul" or c[1] != "weight grad"]
            if size == "gather":
                calls += [("matmul odd", *call) for call in _matmul_calls(1, dtype, precision)]
                if boxes:
                    calls += [("conv grouped", *call) for call in _grouped_calls(dtype, precision)]
                else:
                    calls += [("conv stem", *call) for call in _stem_calls(dtype, precision)]
            for family, direction, kernel, call in calls:
                yield Case(f"{family} {direction} {name}", kernel, dtype, call, dict(product=tile))


Call = tuple[str, str, Callable[[], object]]
"""Direction, kernel, and what launches it."""


def _matmul_calls(odd: int, dtype: torch.dtype, precision: str) -> Iterator[Call]:
    t, product = _maker(dtype), functools.partial(matmul.matmul, precision=precision)
    m, n, k = 8192 + odd, 4096 + odd, 4096 + odd
    kernel = "_matmul_kernel"
    forward = functools.partial(product, t(m, k), t(n, k).T, bias=t(n), then="relu")
    yield "forward", kernel, forward
    yield "forward, added", kernel, functools.partial(forward, add=t(m, n))
    yield "input grad", kernel, functools.partial(product, t(m, n), t(n, k))
    undo = functools.partial(product, t(m, n), t(n, k), undo=("relu", t(m, k)))
    yield "input grad, undo", kernel, undo
    yield "input grad, undo, sums", kernel, functools.partial(undo, column_sums=dtype)
    weight_grad = functools.partial(product, t(m, n).T, t(m, k))
    yield "weight grad", kernel, weight_grad
    yield "weight grad, bias grad", kernel, functools.partial(weight_grad, operand_sums=dtype)


def _descriptor_cases(target: str) -> Iterator[Case]:
    """matmul behind tensor descriptors: every direction at every tile, alone, persistent, in shares of K, transposed."""
    for kind, products in _tiles.descriptor_products(target).items():
        arithmetic = "16" if kind == "16" else "tf32"
        for product, dtype in ((product, dtype) for product in products for dtype in _KINDS[arithmetic]):
            directions = ["forward", "forward, added", "input grad", "input grad, undo", "input grad, undo, sums"]
            directions += ["weight grad", "weight grad, bias grad"]
            if product.programs:
                directions = ["forward", "forward, added", "input grad, undo", "input grad, undo, sums"]
            elif product.transposed:
                directions = ["forward", "forward, added", "input grad, undo"]
            elif product.splits > 1:
                directions = ["forward", "input grad", "weight grad, bias grad"]
            tile, how = product.tile, " transposed" * product.transposed + " persistent" * (product.programs > 0)
            name = (
                f"{kind} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}{how}{' shared' * (product.splits > 1)}"
            )
            for direction, _, call in _matmul_calls(0, dtype, "ieee" if arithmetic == "16" else kind):
                if direction in directions:
                    yield Case(
                        f"matmul tma {direction} {name}",
                        "_matmul_tma_kernel",
                        dtype,
                        call,
                        dict(matmul=product),
                    )


def _specialized_cases() -> Iterator[Case]:
    """matmul by warps with a job each, in all layouts of its operands."""
    product = _tiles.specialized(_tiles.Device("sm_90", 132))
    tile = product.tile
    for dtype in _KINDS["16"]:
        for direction, _, call in _matmul_calls(0, dtype, "ieee"):
            if direction in ("forward", "input grad", "weight grad"):
                name = f"matmul specialized {direction} 16 {tile.m}x{tile.n}x{tile.k} s{tile.stages}"
                kernel = "_matmul_specialized_kernel"
                yield Case(name, kernel, dtype, call, dict(matmul=product))


def _conv_calls(dtype: torch.dtype, precision: str, c: int, size: int) -> Iterator[Call]:
    t, last = _maker(dtype), torch.channels_last
    geometry = _geometry(2, 1, precision)
    x, y = t(32, c, size, size).to(memory_format=last), t(32, c, size // 2, size // 2).to(memory_format=last)
    w = t(c, c, 3, 3).to(memory_format=last)
    forward = functools.partial(conv.conv2d, x, w, t(c), y, then="relu", **geometry)
    yield "forward", "_conv_kernel", forward
    yield "forward, added", "_conv_kernel", functools.partial(forward, residual=y)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)
    yield "weight grad", "_conv_weight_grad_kernel", functools.partial(conv.conv2d_weight_grad, y, x, w, **geometry)


def _stem_calls(dtype: torch.dtype, precision: str) -> Iterator[Call]:
    """NCHW and three channels: loads element by element, steps that straddle taps."""
    t, geometry = _maker(dtype), _geometry(2, 3, precision)
    x, y, w = t(32, 3, 224, 224), t(32, 64, 112, 112), t(64, 3, 7, 7)
    yield "forward", "_conv_kernel", functools.partial(conv.conv2d, x, w, None, y, **geometry)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)
    yield "weight grad", "_conv_weight_grad_kernel", functools.partial(conv.conv2d_weight_grad, y, x, w, **geometry)


def _grouped_calls(dtype: torch.dtype, precision: str) -> Iterator[Call]:
    """Groups of channels that a box's step of the sum would reach beyond, however many are packed."""
    t, last = _maker(dtype), torch.channels_last
    geometry = _geometry(2, 1, precision, groups=32)
    x, y = t(32, 160, 56, 56).to(memory_format=last), t(32, 160, 28, 28).to(memory_format=last)
    w = t(160, 5, 3, 3).to(memory_format=last)
    yield "forward", "_conv_kernel", functools.partial(conv.conv2d, x, w, t(160), y, then="relu", **geometry)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)


def _geometry(stride: int, padding: int, precision: str, groups: int = 1) -> dict[str, Any]:
    pairs = dict(stride=(stride, stride), padding=(padding, padding), dilation=(1, 1))
    return dict(**pairs, groups=groups, precision=precision)


def _box_cases(target: str) -> Iterator[Case]:
    """Convolutions through descriptors, at every tile: both strides, few channels, results in NCHW."""
    for (kind, size), tile in _tiles.box_tiles(target).items():
        for dtype in _KINDS[kind]:
            calls = _box_weight_grad_calls(dtype) if size.startswith("weight") else _box_calls(dtype)
            for direction, kernel, call in calls:
                if size == "large" and ("packed" in direction or direction == "forward, NCHW, added"):  # never picked
                    continue
                name = f"box {direction} {kind}/{size} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}"
                yield Case(name, kernel, dtype, call, dict(box=tile))


def _box_calls(dtype: torch.dtype) -> Iterator[Call]:
    t, last, kernel = _maker(dtype), torch.channels_last, "_conv_box_kernel"
    w, norm = t(256, 256, 3, 3), epilogues.Norm(t(256), t(256), t(256), t(256), 1e-5)
    x, half, planes = t(32, 256, 56, 56), t(32, 256, 28, 28), t(32, 256, 56, 56)
    x, half, w = (tensor.to(memory_format=last) for tensor in (x, half, w))
    once, twice = _geometry(1, 1, "tf32"), _geometry(2, 1, "tf32")
    forward = functools.partial(conv.conv2d, x, w, t(256), then="relu", norm=norm)
    yield "forward", kernel, functools.partial(forward, x, **once)
    yield "forward, NCHW", kernel, functools.partial(forward, planes, **once)
    yield "forward, added", kernel, functools.partial(forward, x, residual=x, **once)
    yield "forward, NCHW, added", kernel, functools.partial(forward, planes, residual=planes, **once)
    yield "forward, stride 2", kernel, functools.partial(forward, half, **twice)
    yield "input grad", kernel, functools.partial(conv.conv2d_input_grad, x, w, x, **once)
    yield "input grad, stride 2", kernel, functools.partial(conv.conv2d_input_grad, half, w, x, **twice)
    images, y = t(32, 3, 224, 224), t(32, 64, 112, 112).to(memory_format=last)
    stem = functools.partial(conv.conv2d, images, t(64, 3, 7, 7), None, y, **_geometry(2, 3, "tf32"))
    yield "forward, first layer", kernel, stem
    thin = t(32, 16, 56, 56).to(memory_format=last)
    call = functools.partial(conv.conv2d, thin, t(16, 16, 3, 3).to(memory_format=last), None, thin, **once)
    yield "forward, 16 channels", kernel, call
    once, twice = _geometry(1, 1, "tf32", groups=32), _geometry(2, 1, "tf32", groups=32)
    w = t(256, 8, 3, 3)
    yield "forward, packed", kernel, functools.partial(conv.conv2d, x, w, t(256), x, then="relu", norm=norm, **once)
    yield "forward, packed, stride 2", kernel, functools.partial(conv.conv2d, x, w, t(256), half, then="relu", **twice)
    yield "input grad, packed", kernel, functools.partial(conv.conv2d_input_grad, x, w, x, **once)
    yield "input grad, packed, stride 2", kernel, functools.partial(conv.conv2d_input_grad, half, w, x, **twice)
    # Groups of six: short steps of the sum, and no division by a member's channels is a shift.
    x, half, w = t(32, 192, 56, 56).to(memory_format=last), t(32, 192, 28, 28).to(memory_format=last), t(192, 6, 3, 3)
    norm = epilogues.Norm(t(192), t(192), t(192), t(192), 1e-5)
    forward = functools.partial(conv.conv2d, x, w, t(192), half, then="relu", norm=norm, residual=half)
    yield "forward, packed sixes, added, stride 2", kernel, functools.partial(forward, **twice)
    yield "input grad, packed sixes, stride 2", kernel, functools.partial(conv.conv2d_input_grad, half, w, x, **twice)


def _box_weight_grad_calls(dtype: torch.dtype) -> Iterator[Call]:
    t, last, kernel = _maker(dtype), torch.channels_last, "_conv_box_weight_grad_kernel"
    w = t(256, 256, 3, 3).to(memory_format=last)
    x, half = (t(32, 256, size, size).to(memory_format=last) for size in (56, 28))
    odd = t(1, 256, 55, 57).to(memory_format=last)
    for name, dz, image, stride in (("", x, x, 1), (", stride 2", half, x, 2), (", over the edge", odd, odd, 1)):
        call = functools.partial(conv.conv2d_weight_grad, dz, image, w, **_geometry(stride, 1, "tf32"))
        yield f"weight grad{name}", kernel, call
    call = functools.partial(conv.conv2d_weight_grad, x, x, t(256, 8, 3, 3), **_geometry(1, 1, "tf32", groups=32))
    yield "weight grad, packed", kernel, call


def _depthwise_calls(dtype: torch.dtype) -> Iterator[Call]:
    t = _maker(dtype)
    for layout, format in (("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format)):
        for size, stride in ((3, 1), (3, 2), (7, 1)):
            geometry = _geometry(stride, size // 2, "ieee", groups=256)
            x, y = (t(32, 256, n, n).to(memory_format=format) for n in (56, 56 // stride))
            w, name = t(256, 1, size, size), f"{size}x{size} stride {stride} {layout}"
            kernel, gradient = "_depthwise_kernel", "_depthwise_weight_grad_kernel"
            forward = functools.partial(conv.conv2d, x, w, t(256), y, then="relu", **geometry)
            yield f"depthwise {name}", kernel, forward
            yield f"depthwise input grad {name}", kernel, functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)
            call = functools.partial(conv.conv2d_weight_grad, y, x, w, **geometry)
            yield f"depthwise weight grad {name}", gradient, call


def _conversion_calls(dtype: torch.dtype) -> Iterator[Call]:
    for channels in (256, 48, 16, 8):
        x = _maker(dtype)(32, channels, 56, 56)
        yield f"to channels_last {channels}", "_channels_last_kernel", functools.partial(conv_box.channels_last, x)
    pack = functools.partial(conv_box._pack, _maker(dtype)(1024, 8, 3, 3), 128, 8, 64)
    yield "packed weight", "_pack_kernel", pack
    images = _maker(dtype)(32, 3, 224, 224)
    copy = functools.partial(conv_box.channels_last, images, pitch=4, size=(224, 240), left=3)
    yield "to channels_last, first layer", "_channels_last_kernel", copy


def _memory_cases() -> Iterator[Case]:
    """The memory-bound kernels: pointwise, reductions, softmax."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, kernel, call in _memory_calls(dtype):
            yield Case(name, kernel, dtype, call, {})


def _memory_calls(dtype: torch.dtype) -> Iterator[Call]:
    yield from _depthwise_calls(dtype)
    yield from _conversion_calls(dtype)
    t, accumulate = _maker(dtype), torch.promote_types(dtype, torch.float32)
    x = t(4096, 4096)
    yield "relu", "_pointwise_kernel", functools.partial(pointwise.pointwise, x, "relu")
    yield "relu grad", "_pointwise_grad_kernel", functools.partial(pointwise.pointwise_grad, x, x, "relu")
    for layout, y in (("rows", x[None]), ("columns", x[None].mT)):
        call = functools.partial(reduce.activation_grad, y, undo=("relu", y), column_sums=dtype)
        yield f"activation grad {layout}", "_activation_grad_kernel", call
    for count in (8, 64):
        partials = _maker(accumulate)(count, 512, 512)
        call = functools.partial(reduce.sum_partials, partials, t(512, 512), bias=t(512), then="relu")
        yield f"sum partials {count}", "_sum_partials_kernel", call
        yield f"sum partials {count}, added", "_sum_partials_kernel", functools.partial(call, add=t(512, 512))
        call = functools.partial(reduce.sum_partials, _maker(accumulate)(count, 512), t(512))
        yield f"sum partials {count}, one row", "_sum_partials_kernel", call
    rows = {f"rows {d}": ("rows", t(4096, d)) for d in _tiles._SOFTMAX_ROWS}
    shapes = dict(long=(64, 131072), few=(64, 512, 16), short=(64, 32, 4096), tall=(64, 512, 4096), one=(64, 128, 4096))
    blocks = {f"blocks {name}": ("blocks", t(*shape)) for name, shape in shapes.items()}
    for name, (design, x) in (rows | blocks).items():
        forward = functools.partial(softmax.softmax, x, 1, dtype)
        backward = functools.partial(softmax.softmax_grad, x, x, 1, dtype)
        if design == "blocks" or _tiles.softmax_rows(x.shape[1], accumulate):
            yield f"softmax {name}", f"_softmax_{design}_kernel", forward
        if design == "blocks" or _tiles.softmax_rows(x.shape[1], accumulate, gradient=True):
            yield f"softmax grad {name}", f"_softmax_{design}_grad_kernel", backward


@functools.cache
def cases(target: str) -> list[Case]:
    """Every kernel at every tile that can be picked on `target`."""
    narrow = [*_product_cases(target), *_descriptor_cases(target), *_box_cases(target), *_memory_cases()]
    if target == "sm_90":
        narrow += _specialized_cases()
    return narrow + [
        dataclasses.replace(case, wide=True)
        for case in narrow
        if case.dtype in (torch.bfloat16, torch.float32)
        and case.kernel != "_pack_kernel"  # whose offsets always are
        and (
            not case.force
            or "/gather" in case.name
            or ("tma" in case.name and "shared" not in case.name and "persistent" not in case.name)
            or ("/large" not in case.name and case.kernel == "_conv_box_kernel")
        )
    ]


def representative(case: Case, target: str) -> bool:
    """Whether a case is in the audit that CI runs, which must end within minutes. The rule:

    - one dtype for each kind of arithmetic: not float16, whose code is bfloat16's with other names in it;
    - on sm_90 everything in bfloat16, TF32 and what memory decides, of strict float32 half, of float64 and 64-bit offsets
      an eighth;
    - on the other targets a sixth of what is in bfloat16, TF32 and what memory decides, and nothing of the rest; on
      sm_86 and sm_89, which have sm_80's instructions and less memory, a twenty-fourth;
    - which ones is decided by a checksum of their names, so that a new case changes nothing for the others;
    - of every kernel at least one.
    """
    return case.label in _representative(target)


@functools.cache
def _representative(target: str) -> frozenset[str]:
    def share(case: Case) -> int:
        """One of how many."""
        if case.dtype == torch.float16:
            return 0
        rare = case.wide or case.dtype == torch.float64
        strict = case.arithmetic == "ieee" and bool(case.force)
        if target == "sm_90":
            return 8 if rare else 2 if strict else 1
        return 0 if rare or strict else 24 if target in ("sm_86", "sm_89") else 6

    shares = [(case, share(case)) for case in cases(target)]
    chosen = [c for c, one_in in shares if one_in and zlib.crc32(c.label.encode()) % one_in == 0]
    seen = {case.kernel for case in chosen}
    for case, _ in shares:
        if case.kernel not in seen and case.dtype != torch.float16:
            chosen.append(case)
            seen.add(case.kernel)
    return frozenset(case.label for case in chosen)
