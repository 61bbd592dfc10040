"""What is compiled: every kernel at every tile that can be picked, as calls on meta tensors.

Here stand calls of the launchers whose tiles, layouts and epilogues are more than layers of the catalog ask for. Kernels that
none of them launches are found by calling the layers: see catalog_cases.py.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import torch

from fastlayers import catalog
from fastlayers.kernels import epilogues
from fastlayers.kernels.conv import gather as conv
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.matmul import matmul, transpose
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.runtime import tiles as _tiles

from . import catalog_cases, stream_cases
from .case import GELU, RELU, TARGETS, Call, Case, geometry_of, maker
from .estimate import published_rows

__all__ = ["TARGETS", "Case", "cases", "representative"]

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


def _matmul_calls(dtype: torch.dtype, precision: str, rows: int = 0, columns: int = 0) -> Iterator[Call]:
    """Products of a (8192 + rows) x (4096 + rows) matrix and one with 4096 + columns columns. Triton specialises for sizes and
    strides that 16 divides, and for no others."""
    t, product = maker(dtype), functools.partial(matmul.matmul, precision=precision)
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
    yield "weight grad, bias grad, turned", kernel, functools.partial(weight_grad, operand_sums=t(n), out=t(k, n).T)


def _descriptor_cases(target: str) -> Iterator[Case]:
    """matmul behind tensor descriptors: every direction at every tile, alone, persistent, in shares of K, transposed."""
    for kind, products in matmul_tiles.descriptor_products(target).items():
        arithmetic = "16" if kind == "16" else "tf32"
        for product, dtype in ((product, dtype) for product in products for dtype in _KINDS[arithmetic]):
            directions = ["forward", "forward, added", "input grad, undo", "forward, gelu", "input grad, undo gelu"]
            if not product.transposed:
                directions += ["input grad, undo, sums", "input grad, undo gelu, sums"]
            if not (product.transposed or product.programs):
                directions += ["input grad", "weight grad", "weight grad, bias grad", "weight grad, bias grad, turned"]
            if product.splits > 1:
                directions = ["forward", "input grad", "weight grad, bias grad", "weight grad, bias grad, turned"]
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
        for size in (4096, 4100, 4099) if kind == "tf32" else ():  # columns divisible by 16, by 4, and odd
            call = functools.partial(transpose.columns_contiguous, maker(torch.float32)(8192, 4112)[:, :size])
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
    t, last = maker(dtype), torch.channels_last
    geometry = geometry_of(2, 1, precision)
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
    t, geometry = maker(dtype), geometry_of(2, 3, precision)
    x, y, w = t(32, 3, 224, 224), t(32, 64, 112, 112), t(64, 3, 7, 7)
    yield "forward", "_conv_kernel", functools.partial(conv.conv2d, x, w, None, y, **geometry)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)
    yield "weight grad", "_conv_weight_grad_kernel", functools.partial(conv.conv2d_weight_grad, y, x, w, **geometry)


def _grouped_calls(dtype: torch.dtype, precision: str) -> Iterator[Call]:
    """Groups of channels that a box's step of the sum would reach beyond, however many are packed."""
    t, last = maker(dtype), torch.channels_last
    geometry = geometry_of(2, 1, precision, groups=32)
    x, y = t(32, 160, 56, 56).to(memory_format=last), t(32, 160, 28, 28).to(memory_format=last)
    w = t(160, 5, 3, 3).to(memory_format=last)
    yield "forward", "_conv_kernel", functools.partial(conv.conv2d, x, w, t(160), y, then=RELU, **geometry)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)


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
    t, last, kernel = maker(dtype), torch.channels_last, "_conv_box_kernel"
    w, norm = t(256, 256, 3, 3), epilogues.Norm(t(256), t(256), t(256), t(256), 1e-5)
    x, half, planes = t(32, 256, 56, 56), t(32, 256, 28, 28), t(32, 256, 56, 56)
    x, half, w = (tensor.to(memory_format=last) for tensor in (x, half, w))
    once, twice = geometry_of(1, 1, "tf32"), geometry_of(2, 1, "tf32")
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
    stem = functools.partial(conv.conv2d, images, t(64, 3, 7, 7), None, y, **geometry_of(2, 3, "tf32"))
    yield "forward, first layer", kernel, stem
    thin = t(32, 16, 56, 56).to(memory_format=last)
    call = functools.partial(conv.conv2d, thin, t(16, 16, 3, 3).to(memory_format=last), None, thin, **once)
    yield "forward, 16 channels", kernel, call
    once, twice = geometry_of(1, 1, "tf32", groups=32), geometry_of(2, 1, "tf32", groups=32)
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
    t, last, kernel = maker(dtype), torch.channels_last, "_conv_box_weight_grad_kernel"
    w = t(256, 256, 3, 3).to(memory_format=last)
    x, half = (t(32, 256, size, size).to(memory_format=last) for size in (56, 28))
    odd = t(1, 256, 55, 57).to(memory_format=last)
    for name, dz, image, stride in (("", x, x, 1), (", stride 2", half, x, 2), (", over the edge", odd, odd, 1)):
        call = functools.partial(conv.conv2d_weight_grad, dz, image, w, **geometry_of(stride, 1, "tf32"))
        yield f"weight grad{name}", kernel, call
    call = functools.partial(conv.conv2d_weight_grad, x, x, t(256, 8, 3, 3), **geometry_of(1, 1, "tf32", groups=32))
    yield "weight grad, packed", kernel, call


@functools.cache
def cases(target: str) -> list[Case]:
    """Every kernel at every tile that can be picked on `target`."""
    narrow = [*_product_cases(target), *_descriptor_cases(target), *_box_cases(target)]
    narrow += stream_cases.cases(target)
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
    - on sm_90 everything in bfloat16 and TF32 that this file and stream_cases.py list; of strict float32 a quarter, as of
      GELU's products, whose main loops are those of ReLU's, and of what is listed for every length of a row (norms, cross
      entropy, softmax); of what follows from the catalog, hundreds of small kernels, a sixth; of float64 and 64-bit offsets an
      eighth;
    - on sm_90 the dk and dv of DETR's attention in float32, which no other row stands for: their tile is that of 32 features;
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
            if case.kernel == "attention_dkdv_kernel" and case.dtype == torch.float32 and "DETR" in case.name:
                return 1
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
