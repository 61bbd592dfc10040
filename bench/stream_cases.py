"""What the audit compiles of the kernels that memory decides: depthwise convolutions, copies, pointwise functions, reductions,
softmax, losses, norms."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastlayers.kernels import dropout, loss, norm, pointwise, reduce, softmax
from fastlayers.kernels.conv import gather as conv
from fastlayers.kernels.conv import layout
from fastlayers.kernels.runtime import tiles as _tiles

from .case import GELU, GELU_TANH, RELU, Call, Case, geometry_of, maker


def _depthwise_calls(dtype: torch.dtype) -> Iterator[Call]:
    for order, format in (("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format)):
        for size, stride in ((3, 1), (3, 2), (7, 1)):
            yield from _depthwise(dtype, 256, size, stride, format, f"{size}x{size} stride {stride} {order}")
    for size in (3, 7):  # of channels that can't be loaded 128 bits at a time
        yield from _depthwise(dtype, 24, size, 1, torch.channels_last, f"of 24 channels {size}x{size}")


def _depthwise(
    dtype: torch.dtype, channels: int, size: int, stride: int, format: torch.memory_format, name: str
) -> Iterator[Call]:
    t, geometry = maker(dtype), geometry_of(stride, size // 2, "ieee", groups=channels)
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
        x = maker(dtype)(32, channels, 56, 56)
        yield f"to channels_last {channels}", "_channels_last_kernel", functools.partial(layout.channels_last, x)
    pack = functools.partial(layout.pack_weight, maker(dtype)(1024, 8, 3, 3), 128, 8, 64)
    yield "packed weight", "_pack_kernel", pack
    images = maker(dtype)(32, 3, 224, 224)
    copy = functools.partial(layout.channels_last, images, pitch=4, size=(224, 240), left=3)
    yield "to channels_last, first layer", "_channels_last_kernel", copy


def cases(target: str) -> Iterator[Case]:
    """All of them."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, kernel, call in _memory_calls(dtype, _tiles.Device(target, 132).most_warps):
            yield Case(name, kernel, dtype, call, {})
    yield from _loss_cases()
    yield from _norm_cases()


def _memory_calls(dtype: torch.dtype, warps: int) -> Iterator[Call]:
    yield from _depthwise_calls(dtype)
    yield from _conversion_calls(dtype)
    t, accumulate = maker(dtype), torch.promote_types(dtype, torch.float32)
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
        partials = maker(accumulate)(count, 512, 512)
        call = functools.partial(reduce.sum_partials, partials, t(512, 512), bias=t(512), then=RELU)
        yield f"sum partials {count}", "_sum_partials_kernel", call
        yield f"sum partials {count}, added", "_sum_partials_kernel", functools.partial(call, add=t(512, 512))
        gelu = functools.partial(call, then=GELU, z=t(512, 512))
        yield f"sum partials {count}, gelu", "_sum_partials_kernel", gelu
        undo = functools.partial(reduce.sum_partials, partials, t(512, 512), undo=(GELU, t(512, 512)))
        yield f"sum partials {count}, undo gelu", "_sum_partials_kernel", undo
        call = functools.partial(reduce.sum_partials, maker(accumulate)(count, 512), t(512))
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


def _loss_cases() -> Iterator[Case]:
    """Cross entropy: vocabularies, few and short rows, images; rows whose length no vector divides."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, kernel, call in _cross_entropy_calls(dtype):
            yield Case(name, kernel, dtype, call, {})


def _cross_entropy_calls(dtype: torch.dtype) -> Iterator[Call]:
    t, accumulate = maker(dtype), maker(torch.promote_types(dtype, torch.float32))
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
        # The longest odd rows take the kernel of blocks, the longest even ones the most warps.
        odd = {what: [1001, max(tile.n for tile in tiles if tile.warps < 16) - 1] for what, tiles in whole.items()}
        sizes = {what: [*(tile.n for tile in tiles), 1000, *odd[what]] for what, tiles in whole.items()}
        drop = dropout.Drop(torch.zeros(2, dtype=torch.int64), 0.1, 1 / 0.9, 16 // dtype.itemsize)
        for center, added, drops in itertools.product((True, False), (False, True), (None, drop)):
            if drops and not added:
                continue
            name = ("layer" if center else "rms") + " norm{} {}" + ", added" * added + ", dropped" * (drops is not None)
            odd_too = drops is None  # with dropout, rows of odd length take another kernel
            for size in [n for n in sizes["rows"] if odd_too or n % 2 == 0] if center or not added or drops else ():
                forward, _ = _norm_calls(size, dtype, center, added, drops)
                rows = size % 2 == 0 or size < 8192  # with 64-bit offsets, longer odd rows take the kernel of blocks
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
    t, statistics = maker(dtype), maker(torch.promote_types(dtype, torch.float32))
    x, w, rstd = t(4096, size), t(size), statistics(4096)
    bias, mean = (w, rstd) if center else (None, None)
    other = x if added else None
    forward = functools.partial(norm.layer_norm, x, other, w, bias, x, other, mean, rstd, size, 1e-5, center, drop)
    gradients = (x, w, bias)
    backward = functools.partial(
        norm.layer_norm_grad, x, other, x, w, mean, rstd, *gradients, size, center, drop and (drop, x)
    )
    return forward, backward
