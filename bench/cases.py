"""What is compiled: every kernel at every tile that can be picked, as calls on meta tensors.

Here stand calls of the launchers whose tiles, layouts and epilogues are more than layers of the catalog ask for. Kernels that
none of them launches are found by calling the layers: see catalog_cases.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastlayers import catalog
from fastlayers.kernels import dropout, epilogues, loss, norm, pointwise, reduce, softmax
from fastlayers.kernels.conv import gather as conv
from fastlayers.kernels.conv import layout
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.conv.geometry import Geometry
from fastlayers.kernels.matmul import matmul, transpose
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.ops.activation import Activation

from . import catalog_cases
from .case import TARGETS, Case
from .estimate import published_rows

__all__ = ["TARGETS", "Case", "cases", "representative"]

RELU, GELU, GELU_TANH = Activation("relu"), Activation("gelu"), Activation("gelu_tanh")


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
    for (kind, size), tile in matmul_tiles.products(target).items():
        precision = "tf32" if kind == "tf32" else "ieee"
        name = f"{kind}/{size} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}"
        for dtype in _KINDS[kind]:
            calls = [("matmul", *call) for call in _matmul_calls(dtype, precision)]
            calls += [
                ("matmul unaligned", direction, kernel, call)
                for direction, kernel, call in _matmul_calls(dtype, precision, columns=8)
                if direction
                in ("forward", "forward, added", "forward, gelu")  # only in these n isn't the row of an operand
            ]
            boxes = target in conv_tiles.BOX_ARCHITECTURES and kind in ("16", "tf32")
            # Where boxes are, pointers are for what is done before an operand is copied: conv_tiles.BOX_FLOPS.
            channels, pixels = (64, 28) if boxes else (256, 56)
            calls += [("conv", *call) for call in _conv_calls(dtype, precision, channels, pixels)]
            # What _tiles never picks: a large tile for a convolution, or where rows of an operand are summed.
            if size == "large":
                calls = [c for c in calls if c[0] != "conv" and "bias grad" not in c[1]]
            if size in ("medium", "skinny"):
                calls = [c for c in calls if c[0] != "conv" or c[1] != "weight grad"]
            if size == "gather":
                calls += [("matmul odd", *call) for call in _matmul_calls(dtype, precision, 1, 1)]
                if boxes:
                    calls += [("conv grouped", *call) for call in _grouped_calls(dtype, precision)]
                else:
                    calls += [("conv stem", *call) for call in _stem_calls(dtype, precision)]
            for family, direction, kernel, call in calls:
                yield Case(f"{family} {direction} {name}", kernel, dtype, call, dict(product=tile))


Call = tuple[str, str, Callable[[], object]]
"""Direction, kernel, and what launches it."""


def _matmul_calls(dtype: torch.dtype, precision: str, rows: int = 0, columns: int = 0) -> Iterator[Call]:
    """Products of a (8192 + rows) x (4096 + rows) matrix and one with 4096 + columns columns. Triton specialises for sizes and
    strides that 16 divides, and for no others."""
    t, product = _maker(dtype), functools.partial(matmul.matmul, precision=precision)
    m, n, k = 8192 + rows, 4096 + columns, 4096 + rows
    kernel = "_matmul_kernel"
    forward = functools.partial(product, t(m, k), t(n, k).T, bias=t(n), then=RELU)
    yield "forward", kernel, forward
    yield "forward, added", kernel, functools.partial(forward, add=t(m, n))
    yield "input grad", kernel, functools.partial(product, t(m, n), t(n, k))
    undo = functools.partial(product, t(m, n), t(n, k), undo=(RELU, t(m, k)))
    yield "input grad, undo", kernel, undo
    yield "input grad, undo, sums", kernel, functools.partial(undo, column_sums=t(k))
    gelu = functools.partial(product, t(m, k), t(n, k).T, bias=t(n), then=GELU, z=t(m, n))
    yield "forward, gelu", kernel, gelu
    undo = functools.partial(product, t(m, n), t(n, k), undo=(GELU, t(m, k)))
    yield "input grad, undo gelu", kernel, undo
    yield "input grad, undo gelu, sums", kernel, functools.partial(undo, column_sums=t(k))
    weight_grad = functools.partial(product, t(m, n).T, t(m, k))
    yield "weight grad", kernel, weight_grad
    yield "weight grad, bias grad", kernel, functools.partial(weight_grad, operand_sums=t(n))


def _descriptor_cases(target: str) -> Iterator[Case]:
    """matmul behind tensor descriptors: every direction at every tile, alone, persistent, in shares of K, transposed."""
    for kind, products in matmul_tiles.descriptor_products(target).items():
        arithmetic = "16" if kind == "16" else "tf32"
        for product, dtype in ((product, dtype) for product in products for dtype in _KINDS[arithmetic]):
            directions = ["forward", "forward, added", "input grad, undo", "forward, gelu", "input grad, undo gelu"]
            if not product.transposed:
                directions += ["input grad, undo, sums", "input grad, undo gelu, sums"]
            if not (product.transposed or product.programs):
                directions += ["input grad", "weight grad", "weight grad, bias grad"]
            if product.splits > 1:
                directions = ["forward", "input grad", "weight grad, bias grad"]
            if product.copied:
                directions = [direction for direction in directions if "grad" in direction]
            how = " transposed" * product.transposed + " copied" * product.copied
            how, tile = how + " persistent" * (product.programs > 0), product.tile
            name = (
                f"{kind} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}{how}{' shared' * (product.splits > 1)}"
            )
            precision = "ieee" if arithmetic == "16" else kind
            # Descriptors take rows of multiples of 16 bytes, so of 8 elements or 4.
            for alignment, extra in (("", 0), (" unaligned", 8)):
                for direction, _, call in _matmul_calls(dtype, precision, extra, extra):
                    if direction in directions:
                        label = f"matmul tma{alignment} {direction} {name}"
                        yield Case(label, "_matmul_tma_kernel", dtype, call, dict(matmul=product))
        for size in (4096, 4100, 4099) if kind == "tf32" else ():  # columns: what 16, 4 and 1 divide
            call = functools.partial(transpose.columns_contiguous, _maker(torch.float32)(8192, 4112)[:, :size])
            yield Case(f"transpose to columns {size}", "_transpose_kernel", torch.float32, call, {})


def _specialized_cases() -> Iterator[Case]:
    """matmul by warps with a job each, in all layouts of its operands."""
    product = matmul_tiles.specialized(_tiles.Device("sm_90", 132))
    tile = product.tile
    for dtype in _KINDS["16"]:
        for direction, _, call in _matmul_calls(dtype, "ieee"):
            if direction in ("forward", "input grad", "weight grad"):
                name = f"matmul specialized {direction} 16 {tile.m}x{tile.n}x{tile.k} s{tile.stages}"
                kernel = "_matmul_specialized_kernel"
                yield Case(name, kernel, dtype, call, dict(matmul=product))


def _conv_calls(dtype: torch.dtype, precision: str, c: int, size: int) -> Iterator[Call]:
    t, last = _maker(dtype), torch.channels_last
    geometry = _geometry(2, 1, precision)
    x, y = t(32, c, size, size).to(memory_format=last), t(32, c, size // 2, size // 2).to(memory_format=last)
    w = t(c, c, 3, 3).to(memory_format=last)
    forward = functools.partial(conv.conv2d, x, w, t(c), y, then=RELU, **geometry)
    yield "forward", "_conv_kernel", forward
    yield "forward, added", "_conv_kernel", functools.partial(forward, residual=y)
    yield "forward, gelu", "_conv_kernel", functools.partial(forward, then=GELU)
    yield "forward, measured", "_conv_kernel", functools.partial(forward, partials=epilogues.Partials(), then=None)
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
    yield "forward", "_conv_kernel", functools.partial(conv.conv2d, x, w, t(160), y, then=RELU, **geometry)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)


def _geometry(stride: int, padding: int, precision: str, groups: int = 1) -> dict[str, Any]:
    pads = padding, padding
    return dict(geometry=Geometry((stride, stride), pads, pads, (1, 1), groups), precision=precision)


def _box_cases(target: str) -> Iterator[Case]:
    """Convolutions through descriptors, at every tile: both strides, few channels, results in NCHW."""
    for (kind, size), tile in conv_tiles.box_tiles(target).items():
        for dtype in _KINDS[kind]:
            calls = _box_weight_grad_calls(dtype) if size.startswith("weight") else _box_calls(dtype)
            for direction, kernel, call in calls:
                crowded = "packed" in direction or "measured" in direction or direction == "forward, NCHW, added"
                if size == "large" and crowded:  # never picked
                    continue
                name = f"box {direction} {kind}/{size} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}"
                yield Case(name, kernel, dtype, call, dict(box=tile))


def _box_calls(dtype: torch.dtype) -> Iterator[Call]:
    t, last, kernel = _maker(dtype), torch.channels_last, "_conv_box_kernel"
    w, norm = t(256, 256, 3, 3), epilogues.Norm(t(256), t(256), t(256), t(256), 1e-5)
    x, half, planes = t(32, 256, 56, 56), t(32, 256, 28, 28), t(32, 256, 56, 56)
    x, half, w = (tensor.to(memory_format=last) for tensor in (x, half, w))
    once, twice = _geometry(1, 1, "tf32"), _geometry(2, 1, "tf32")
    forward = functools.partial(conv.conv2d, x, w, t(256), then=RELU, norm=norm)
    yield "forward", kernel, functools.partial(forward, x, **once)
    yield "forward, NCHW", kernel, functools.partial(forward, planes, **once)
    yield "forward, gelu", kernel, functools.partial(forward, x, **{**once, "then": GELU})
    measured: dict[str, Any] = {**once, "then": None, "norm": None, "partials": epilogues.Partials()}
    yield "forward, measured", kernel, functools.partial(forward, x, **measured)
    yield "forward, NCHW, measured", kernel, functools.partial(forward, planes, **measured)
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
    yield "forward, packed", kernel, functools.partial(conv.conv2d, x, w, t(256), x, then=RELU, norm=norm, **once)
    yield "forward, packed, stride 2", kernel, functools.partial(conv.conv2d, x, w, t(256), half, then=RELU, **twice)
    yield "input grad, packed", kernel, functools.partial(conv.conv2d_input_grad, x, w, x, **once)
    yield "input grad, packed, stride 2", kernel, functools.partial(conv.conv2d_input_grad, half, w, x, **twice)
    # Groups of six: short steps of the sum, and no division by a member's channels is a shift.
    x, half, w = t(32, 192, 56, 56).to(memory_format=last), t(32, 192, 28, 28).to(memory_format=last), t(192, 6, 3, 3)
    norm = epilogues.Norm(t(192), t(192), t(192), t(192), 1e-5)
    forward = functools.partial(conv.conv2d, x, w, t(192), half, then=RELU, norm=norm, residual=half)
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
    for order, format in (("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format)):
        for size, stride in ((3, 1), (3, 2), (7, 1)):
            yield from _depthwise(dtype, 256, size, stride, format, f"{size}x{size} stride {stride} {order}")
    for size in (3, 7):  # of channels that can't be loaded 128 bits at a time
        yield from _depthwise(dtype, 24, size, 1, torch.channels_last, f"of 24 channels {size}x{size}")


def _depthwise(
    dtype: torch.dtype, channels: int, size: int, stride: int, format: torch.memory_format, name: str
) -> Iterator[Call]:
    t, geometry = _maker(dtype), _geometry(stride, size // 2, "ieee", groups=channels)
    x, y = (t(32, channels, n, n).to(memory_format=format) for n in (56, 56 // stride))
    w = t(channels, 1, size, size)
    kernel, gradient = "_depthwise_kernel", "_depthwise_weight_grad_kernel"
    forward = functools.partial(conv.conv2d, x, w, t(channels), y, then=RELU, **geometry)
    yield f"depthwise {name}", kernel, forward
    if size == 7:
        yield f"depthwise {name} gelu", kernel, functools.partial(forward, then=GELU)
    yield f"depthwise input grad {name}", kernel, functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)
    call = functools.partial(conv.conv2d_weight_grad, y, x, w, **geometry)
    yield f"depthwise weight grad {name}", gradient, call


def _conversion_calls(dtype: torch.dtype) -> Iterator[Call]:
    for channels in (256, 48, 16, 8):
        x = _maker(dtype)(32, channels, 56, 56)
        yield f"to channels_last {channels}", "_channels_last_kernel", functools.partial(layout.channels_last, x)
    pack = functools.partial(layout.pack_weight, _maker(dtype)(1024, 8, 3, 3), 128, 8, 64)
    yield "packed weight", "_pack_kernel", pack
    images = _maker(dtype)(32, 3, 224, 224)
    copy = functools.partial(layout.channels_last, images, pitch=4, size=(224, 240), left=3)
    yield "to channels_last, first layer", "_channels_last_kernel", copy


def _memory_cases(target: str) -> Iterator[Case]:
    """The memory-bound kernels: pointwise, reductions, softmax."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, kernel, call in _memory_calls(dtype, _tiles.Device(target, 132).most_warps):
            yield Case(name, kernel, dtype, call, {})


def _memory_calls(dtype: torch.dtype, warps: int) -> Iterator[Call]:
    yield from _depthwise_calls(dtype)
    yield from _conversion_calls(dtype)
    t, accumulate = _maker(dtype), torch.promote_types(dtype, torch.float32)
    x = t(4096, 4096)
    yield "relu", "_pointwise_kernel", functools.partial(pointwise.pointwise, x, x, RELU)
    yield "relu grad", "_pointwise_grad_kernel", functools.partial(pointwise.pointwise_grad, x, x, x, RELU)
    for activation in (GELU, GELU_TANH):
        name = activation.function
        yield name, "_pointwise_kernel", functools.partial(pointwise.pointwise, x, x, activation)
        call = functools.partial(pointwise.pointwise_grad, x, x, x, activation)
        yield f"{name} grad", "_pointwise_grad_kernel", call
    for order, y in (("rows", x[None]), ("columns", x[None].mT)):
        call = functools.partial(reduce.activation_grad, y, y, RELU, y, t(4096))
        yield f"activation grad {order}", "_activation_grad_kernel", call
        for size, odd in (
            ("", y),
            (" of odd length", t(4097, 4097)[None] if order == "rows" else t(4097, 4097)[None].mT),
        ):
            for gelu in (GELU, GELU_TANH):
                call = functools.partial(reduce.activation_grad, odd, odd, gelu, odd, t(odd.shape[2]))
                yield f"activation grad {order}{size}, {gelu.function}", "_activation_grad_kernel", call
    for count in (8, 64):
        partials = _maker(accumulate)(count, 512, 512)
        call = functools.partial(reduce.sum_partials, partials, t(512, 512), bias=t(512), then=RELU)
        yield f"sum partials {count}", "_sum_partials_kernel", call
        yield f"sum partials {count}, added", "_sum_partials_kernel", functools.partial(call, add=t(512, 512))
        gelu = functools.partial(call, then=GELU, z=t(512, 512))
        yield f"sum partials {count}, gelu", "_sum_partials_kernel", gelu
        undo = functools.partial(reduce.sum_partials, partials, t(512, 512), undo=(GELU, t(512, 512)))
        yield f"sum partials {count}, undo gelu", "_sum_partials_kernel", undo
        call = functools.partial(reduce.sum_partials, _maker(accumulate)(count, 512), t(512))
        yield f"sum partials {count}, one row", "_sum_partials_kernel", call
    rows = {f"rows {d}": ("rows", t(4096, d)) for d in softmax._SOFTMAX_ROWS}
    shapes = dict(long=(64, 131072), few=(64, 512, 16), short=(64, 32, 4096), tall=(64, 512, 4096), one=(64, 128, 4096))
    blocks = {f"blocks {name}": ("blocks", t(*shape)) for name, shape in shapes.items()}
    for name, (design, x) in (rows | blocks).items():
        forward = functools.partial(softmax.softmax, x, x, 1)
        backward = functools.partial(softmax.softmax_grad, x, x, x, 1)
        if design == "blocks" or softmax.rows_tile(x.shape[1], accumulate, most_warps=warps):
            yield f"softmax {name}", f"_softmax_{design}_kernel", forward
            if name in _LOGARITHMS:
                log = functools.partial(softmax.softmax, x, x, 1, log=True)
                yield f"log softmax {name}", f"_softmax_{design}_kernel", log
        if design == "blocks" or softmax.rows_tile(x.shape[1], accumulate, gradient=True, most_warps=warps):
            yield f"softmax grad {name}", f"_softmax_{design}_grad_kernel", backward
            if name in _LOGARITHMS:
                log = functools.partial(softmax.softmax_grad, x, x, x, 1, log=True)
                yield f"log softmax grad {name}", f"_softmax_{design}_grad_kernel", log


_LOGARITHMS = ("rows 8192", "rows 16384", "rows 32768", "blocks tall")
"""The largest tiles of softmax, which are compiled for its logarithm as well."""


@functools.cache
def cases(target: str) -> list[Case]:
    """Every kernel at every tile that can be picked on `target`."""
    narrow = [*_product_cases(target), *_descriptor_cases(target), *_box_cases(target), *_memory_cases(target)]
    narrow += _loss_cases()
    narrow += _norm_cases()
    if target == "sm_90":
        narrow += _specialized_cases()
    narrow += catalog_cases.cases(target, narrow)
    return narrow + [
        dataclasses.replace(case, wide=True)
        for case in narrow
        if case.dtype in (torch.bfloat16, torch.float32)
        and case.can_be_wide
        and case.kernel not in ("_pack_kernel", "_sum_losses_kernel")  # whose offsets always are, or never
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
    - on sm_90 everything in bfloat16 and TF32 that this file lists; of strict float32 a quarter, as of GELU's products, whose
      main loops are those of ReLU's, and of what is listed for every length of a row (norms, cross entropy, softmax); of what
      follows from the catalog, hundreds of small kernels, a sixth; of float64 and 64-bit offsets an eighth;
    - of products with rows that 16 doesn't divide an eighth, and half of the persistent ones, which fill the shared memory;
    - on the other targets an eighth of what is in bfloat16, TF32 and what memory decides, and nothing of the rest; of what
      follows from the catalog, and on sm_86 and sm_89, which have sm_80's instructions and less memory, a forty-eighth;
    - which ones is decided by a checksum of their names, so that a new case changes nothing for the others;
    - of every kernel at least one;
    - what is compared with published figures.
    """
    return case.label in _representative(target)


@functools.cache
def _representative(target: str) -> frozenset[str]:
    layers = {row.name for row in catalog.ROWS}

    def share(case: Case) -> int:
        """One of how many."""
        if case.dtype == torch.float16:
            return 0
        family = case.name.split()[0]
        unaligned = "unaligned" in case.name
        rare = case.wide or case.dtype == torch.float64 or (unaligned and "persistent" not in case.name)
        strict = case.arithmetic == "ieee" and bool(case.force)
        if target == "sm_90":
            if rare or family in layers:
                return 8 if rare else 6
            if (
                strict
                or ("gelu" in case.name and bool(case.force))
                or family in ("cross", "layer", "rms", "softmax", "log")
            ):
                return 4
            return 2 if unaligned else 1
        return 0 if rare or strict else 48 if family in layers or target in ("sm_86", "sm_89") else 8

    shares = [(case, share(case)) for case in cases(target)]
    chosen = [c for c, one_in in shares if one_in and zlib.crc32(c.label.encode()) % one_in == 0]
    seen = {case.kernel for case in chosen}
    for case, _ in shares:
        if case.kernel not in seen and case.dtype != torch.float16:
            chosen.append(case)
            seen.add(case.kernel)
    return frozenset(case.label for case in chosen) | published_rows(target)


def _loss_cases() -> Iterator[Case]:
    """Cross entropy: vocabularies, few and short rows, images; rows whose length no vector divides."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, kernel, call in _cross_entropy_calls(dtype):
            yield Case(name, kernel, dtype, call, {})


def _cross_entropy_calls(dtype: torch.dtype) -> Iterator[Call]:
    t, accumulate = _maker(dtype), _maker(torch.promote_types(dtype, torch.float32))
    logits = {
        "vocabulary": t(8192, 128256), "odd vocabulary": t(8192, 50257), "few rows": t(64, 128256),
        "rows 1000": t(65536, 1000), "rows 10": t(1048576, 10), "rows 2": t(1048576, 2), "rows 128": t(65536, 128),
        "images": t(16, 21, 512, 512), "images 150": t(16, 150, 512, 512), "few images": t(1, 21, 64, 64),
        "odd images": t(16, 21, 129, 129), "channels_last images": t(16, 24, 512, 512).to(memory_format=torch.channels_last),
    }  # fmt: skip
    for name, x in logits.items():
        classes = torch.empty(x.shape[:1] + x.shape[2:], dtype=torch.int64, device="meta")
        ways = [("", classes, None, 0.0), (" probabilities", x, t(x.shape[1]), 0.1)]
        if name in ("vocabulary", "odd vocabulary", "rows 1000", "rows 128", "images", "images 150"):
            ways.insert(1, (" smoothed, weighted", classes, t(x.shape[1]), 0.1))
        if name == "odd vocabulary":
            ways.insert(1, (" smoothed", classes, None, 0.1))
        for way, target, weight, smoothing in ways:
            options: dict[str, Any] = dict(ignore_index=-100, reduction="mean", label_smoothing=smoothing)
            shape = loss.statistics_shape(
                x.shape, weighted=weight is not None, label_smoothing=smoothing, probabilities=target is x
            )
            statistics = None if shape is None else accumulate(*shape)
            given = (x, target, weight, accumulate() if target is classes else None, statistics)
            forward = functools.partial(loss.cross_entropy, x, target, weight, t(), *given[3:], **options)
            yield f"cross entropy{way} {name}", "_cross_entropy_kernel", forward
            dx = torch.empty(x.shape, dtype=dtype, device="meta")
            dtarget = torch.empty(x.shape, dtype=dtype, device="meta") if target is x else None
            backward = functools.partial(loss.cross_entropy_grad, t(), *given, dx, dtarget, **options)
            yield f"cross entropy grad{way} {name}", "_cross_entropy_grad_kernel", backward
            if name == "vocabulary" and not way:
                yield "cross entropy sum", "_sum_losses_kernel", forward


def _norm_cases() -> Iterator[Case]:
    """Layer and RMS normalisation: every length of rows that has a tile, longer ones, and ones that 16 doesn't divide."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        accumulate = torch.promote_types(dtype, torch.float32)
        whole = {"rows": norm._ROWS[accumulate], "grad": norm._ROWS_GRAD[accumulate]}
        # The longest of an odd length are worked through in blocks, where even ones have as many warps as there can be.
        odd = {what: [1001, max(tile.n for tile in tiles if tile.warps < 16) - 1] for what, tiles in whole.items()}
        sizes = {what: [*(tile.n for tile in tiles), 1000, *odd[what]] for what, tiles in whole.items()}
        drop = dropout.Drop(torch.zeros(2, dtype=torch.int64), 0.1, 1 / 0.9, 16 // dtype.itemsize)
        for center, added, drops in itertools.product((True, False), (False, True), (None, drop)):
            if drops and not added:
                continue
            name = ("layer" if center else "rms") + " norm{} {}" + ", added" * added + ", dropped" * (drops is not None)
            odd_too = drops is None  # rows of odd length are dropped from by another kernel
            for size in [n for n in sizes["rows"] if odd_too or n % 2 == 0] if center or not added or drops else ():
                forward, _ = _norm_calls(size, dtype, center, added, drops)
                rows = size % 2 == 0 or size < 8192  # longer ones of odd length take blocks where offsets have 64 bits
                yield Case(name.format("", size), "_layer_norm_rows_kernel", dtype, forward, {}, can_be_wide=rows)
            for size in [n for n in sizes["grad"] if odd_too or n % 2 == 0] if added else ():
                _, backward = _norm_calls(size, dtype, center, added, drops)
                yield Case(name.format(" grad", size), "_layer_norm_grad_kernel", dtype, backward, {})
        for size in (65536, 65535):
            forward, backward = _norm_calls(size, dtype, True, True)
            yield Case(f"layer norm blocks {size}, added", "_layer_norm_blocks_kernel", dtype, forward, {})
            yield Case(f"layer norm grad means {size}", "_layer_norm_grad_means_kernel", dtype, backward, {})
            yield Case(f"layer norm grad blocks {size}, added", "_layer_norm_grad_kernel", dtype, backward, {})
            forward, backward = _norm_calls(size, dtype, False, False)
            yield Case(f"rms norm blocks {size}", "_layer_norm_blocks_kernel", dtype, forward, {})
            yield Case(f"rms norm grad means {size}", "_layer_norm_grad_means_kernel", dtype, backward, {})


def _norm_calls(
    size: int, dtype: torch.dtype, center: bool, added: bool, drop: dropout.Drop | None = None
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of 4096 rows; `added`: a residual, and the gradient of its sum; `drop`: before it."""
    t, statistics = _maker(dtype), _maker(torch.promote_types(dtype, torch.float32))
    x, w, rstd = t(4096, size), t(size), statistics(4096)
    bias, mean = (w, rstd) if center else (None, None)
    other = x if added else None
    forward = functools.partial(norm.layer_norm, x, other, w, bias, x, other, mean, rstd, size, 1e-5, center, drop)
    gradients = (x, w, bias)
    backward = functools.partial(
        norm.layer_norm_grad, x, other, x, w, mean, rstd, *gradients, size, center, drop and (drop, x)
    )
    return forward, backward
