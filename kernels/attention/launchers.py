"""The launchers of attention."""

import math
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reduce import sum_partials
from ..runtime import launch, tiles
from ..runtime.tiles import Tile, cdiv
from . import tiles as picks
from .forward import attention_kernel
from .gradients import attention_dkdv_kernel, attention_dq_kernel, dropout_factors_kernel
from .mask_grad import attention_mask_grad_kernel
from .shares import attention_merge_kernel, attention_shares_kernel
from .weights import attention_weights_delta_kernel, attention_weights_kernel

_LEAST_SCALE = 2.0**-64
"""Scales above this one multiply differences of scores (LATER); a log-sum-exp that is divided by much less would be infinite."""
_FARTHEST = 2**23
"""Steps within a tile, of at most 256 rows or columns, are multiplied by strides in 32 bits."""


def _near(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where rows or columns lie so far apart that offsets within a tile need 64 bits."""
    return x.contiguous() if max(x.stride()[2:]) >= _FARTHEST else x


def _order(x: torch.Tensor) -> int:
    """How the dimensions of x (B, H, rows, columns) follow each other in memory: 1 for this order, 2 for (B, rows, H, columns), 3
    for (rows, B, H, columns), 0 for any other."""
    b, h, m, _ = x.stride()
    return 1 if b >= h >= m else 2 if b >= m >= h else 3 if m >= b >= h else 0


def _fits_boxes(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch rows of one head: columns are contiguous, all else is aligned to 16 bytes
    and in one of three orders, and nothing is empty or read twice."""
    return (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and x.numel() > 0
        and all(0 < s * x.itemsize < 2**40 and s * x.itemsize % 16 == 0 for s in x.stride()[:3])
        and _order(x) > 0
    )


def _boxes(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of `rows` rows of one head at a time, with its dimensions in the order of memory."""
    order = {1: (0, 1, 2, 3), 2: (0, 2, 1, 3), 3: (2, 0, 1, 3)}[_order(x)]
    sizes, strides = [x.shape[i] for i in order], [x.stride(i) for i in order]
    return TensorDescriptor(x, sizes, strides, [(1, 1, rows, columns)[i] for i in order])


def _has_vectors(*tensors: torch.Tensor) -> bool:
    """Whether rows of these are loaded 128 bits at a time."""
    return all(
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and x.shape[3] % 16 == 0
        and all(s % 16 == 0 for s in x.stride()[:3])
        for x in tensors
    )


def lse_factor(features: int, scale: float | None) -> float:
    """What the `lse` of a call without a mask is multiplied by to be natural logarithms of sums of exponentials."""
    scale = _scale(features, scale)
    return scale if scale > _LEAST_SCALE else 1.0


def _scale(features: int, scale: float | None) -> float:
    return features**-0.5 if scale is None else scale


class _Call(NamedTuple):
    """What all kernels of a call are given alike."""

    sizes: tuple[int, ...]
    """H, L, S, GROUP"""
    scale: float
    keep: int
    """How many of 65536 weights dropout keeps. What is kept is divided by that very share."""
    unkeep: float
    mask: Any
    masks: tuple[int, ...]
    """The mask's strides."""
    meta: dict[str, Any]


def _prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *,
    causal: bool, dropout: float, scale: float | None, precision: str,
) -> _Call:  # fmt: skip
    (b, h, l, d), (_, h_k, s, dv) = q.shape, v.shape
    scale = _scale(d, scale)
    keep = round((1 - dropout) * 2**16)
    masks = (0,) * 4
    if mask is not None:
        mask = mask.expand(b, h, l, s)
        masks = mask.stride()
    device = tiles.device(q.device)
    meta = dict(
        D=d, DV=dv, CAUSAL=causal, PRECISION=picks.precision(q.dtype, precision, device),
        LATER=mask is None and scale > _LEAST_SCALE, OF_KEYS=mask is not None and (masks[2] == 0 or l == 1),
        ACC=tiles.triton_dtype(torch.promote_types(q.dtype, torch.float32)),
        TILE_D=max(16, triton.next_power_of_2(d)), TILE_V=max(16, triton.next_power_of_2(dv)),
    )  # fmt: skip
    return _Call(
        (h, l, s, h // max(h_k, 1)),
        scale,
        keep,
        2**16 / keep if keep else 0.0,
        mask,
        masks,
        meta,
    )


def _tile(
    table: str, call: _Call, dropout: float, first: torch.Tensor, *boxed: torch.Tensor, plain: bool = True
) -> tuple[Tile, int, dict[str, Any]]:
    """The tile of a kernel; the order of memory for descriptors of `boxed`, or 0 for pointers; what the kernel is launched with.

    Args:
        first: a tensor that pointers load in any case.
        plain: whether the kernel is given nothing else that takes registers.
    """
    device = tiles.device(first.device)
    orders = {_order(x) for x in boxed}
    boxes = device.architecture in picks.BOX_ARCHITECTURES and first.itemsize == 2 and len(orders) == 1
    boxes = boxes and all(map(_fits_boxes, boxed))
    aligned = _has_vectors(first) if boxes else _has_vectors(first, *boxed)
    # A mask of keys is a vector, and costs no more than the bounds do.
    plain = plain and aligned and dropout == 0 and (call.mask is None or call.meta["OF_KEYS"])
    features = max(call.meta["TILE_D"], call.meta["TILE_V"])
    tile = picks.pick(table, first.dtype, features, device, plain=plain, boxes=boxes)
    meta = dict(TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps, num_stages=tile.stages)
    order = orders.pop() if boxes else 0
    return tile, order, {**call.meta, **meta, "BOXES": order}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    causal: bool,
    dropout: float,
    scale: float | None,
    precision: str,
    empty_is_nan: bool = False,
) -> None:
    """dropout(softmax(scale * q k^T + mask)) v into `out`, and what the backward needs of each query's scores into `lse`: their
    log-sum-exp, with LATER divided by the scale.

    Query m may attend to key n if the mask's boolean is True there or its number isn't -inf, and if n <= m with `causal`. A
    query that may attend to nothing gets 0 or, with `empty_is_nan`, NaN, and so do its weights and gradients.

    Shape: q and out (B, H, L, ·), k and v (B, H / GROUP, S, ·), mask any that expands to (B, H, L, S), all with any strides; lse
        (B, H, L), contiguous; seed (1,), given for a dropout above 0.
    Dtype: q, k, v and out floating, alike; mask bool or floating; seed int64; lse float32, or float64 if q is.
    """
    q, k, v = map(_near, (q, k, v))
    call = _prepare(q, k, v, mask, causal=causal, dropout=dropout, scale=scale, precision=precision)
    if not causal and dropout == 0:  # with causal and few queries, no query attends to many keys
        (b, h, l, _), (_, _, s, _) = q.shape, k.shape
        features, device = max(call.meta["TILE_D"], call.meta["TILE_V"]), tiles.device(q.device)
        picked = picks.shares(b, h, call.sizes[-1], l, s, q.dtype, features, device)
        if picked is not None:
            _in_shares(picked, call, q, k, v, out, lse, empty_is_nan)
            return
    tile, order, meta = _tile("attention", call, dropout, q, k, v)
    operands: tuple[Any, ...] = (k, v)
    if order:
        operands = _boxes(k, tile.n, meta["TILE_D"]), _boxes(v, tile.n, meta["TILE_V"])
    launch.launch(
        attention_kernel, cdiv(q.shape[2], tile.m) * q.shape[0] * q.shape[1],
        q, *operands, call.mask, seed, out, lse, *call.sizes, call.scale, call.keep, call.unkeep,
        *q.stride(), *k.stride(), *v.stride(), *call.masks, *out.stride(), EMPTY_IS_NAN=empty_is_nan, **meta,
    )  # fmt: skip


def _in_shares(
    picked: picks.Shares,
    call: _Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    empty_is_nan: bool,
) -> None:
    """`attention` where each program takes a share of the keys."""
    (b, h, l, _), (_, h_k, s, dv) = q.shape, v.shape
    group, tile, meta = call.sizes[-1], picked.tile, dict(call.meta)
    del meta["CAUSAL"]
    meta["OF_KEYS"] = call.mask is not None and ((call.masks[2] == 0 or l == 1) and (call.masks[1] == 0 or group == 1))
    share = cdiv(cdiv(s, tile.n), picked.shares) * tile.n
    shares, rows = max(cdiv(s, max(share, 1)), 1), b * h * l
    found, found_lse = out, lse
    if shares > 1:
        kept = torch.promote_types(q.dtype, torch.float32)
        found = launch.empty((shares, b, h, l, dv), dtype=kept, device=q.device)
        found_lse = launch.empty((shares, b, h, l), dtype=kept, device=q.device)
    launch.launch(
        attention_shares_kernel, shares * b * h_k * cdiv(group * l, tile.m),
        q, k, v, call.mask, found, found_lse, *call.sizes, shares, share, call.scale,
        *q.stride(), *k.stride(), *v.stride(), *call.masks, *(found.stride() if shares > 1 else (0, *out.stride())), rows,
        EMPTY_IS_NAN=empty_is_nan and shares == 1, **meta, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if shares > 1:
        launch.launch(
            attention_merge_kernel, rows, found, found_lse, out, lse, h, l, rows, shares, call.scale, *out.stride(),
            LATER=meta["LATER"], DV=dv, EMPTY_IS_NAN=empty_is_nan, TILE_S=16, TILE_V=meta["TILE_V"],
        )  # fmt: skip


def attention_grad(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    *,
    causal: bool,
    dropout: float,
    scale: float | None,
    precision: str,
    d_mask: torch.Tensor | None = None,
    d_weights: torch.Tensor | None = None,
) -> None:
    """The gradients of `attention` and of `attention_weights`, each unless it is None.

    Shape: as there, with dy as its out and d_weights as its weights; d_mask as the mask, in four dimensions, each of any size
        that is expanded.
    """
    q, k, v, out, dy = map(_near, (q, k, v, out, dy))
    lse = lse.contiguous()
    call = _prepare(q, k, v, mask, causal=causal, dropout=dropout, scale=scale, precision=precision)
    (b, h, l, _), (_, h_k, s, _) = q.shape, k.shape
    delta, norm = launch.empty((b, h, l), dtype=lse.dtype, device=lse.device), None
    # In 16 bits the operands' own rounding is larger than what this mends, and so it is in TF32.
    if q.itemsize >= 4 and call.meta["PRECISION"] != "tf32":
        norm = launch.empty((b, h, l), dtype=lse.dtype, device=lse.device)
    none = (0, 0, 0, 0)
    more, part, dws = None, 1.0, none
    if d_weights is not None:
        d_weights, part = _per_head(d_weights, h)
        dws = d_weights.stride()
        more = launch.empty((b, h, l), dtype=lse.dtype, device=lse.device)
        tile, _, meta = _weights_tile(call, dropout, q)
        launch.launch(
            attention_weights_delta_kernel, cdiv(l, tile.m) * b * h,
            q, k, call.mask, seed, lse, d_weights, more, h, l, s, call.scale, call.keep, call.unkeep, part,
            *q.stride(), *k.stride(), *call.masks, *dws, **meta,
        )  # fmt: skip
    numbers = (*call.sizes, call.scale, call.keep, call.unkeep, part)
    strides = (*q.stride(), *k.stride(), *v.stride(), *call.masks, *dws)
    plain = d_weights is None
    tile, order, meta = _tile("attention_dq", call, dropout, q, k, v, plain=plain)
    operands: tuple[Any, ...] = (k, v)
    if order:
        operands = _boxes(k, tile.n, meta["TILE_D"]), _boxes(v, tile.n, meta["TILE_V"])
    launch.launch(
        attention_dq_kernel, cdiv(l, tile.m) * b * h,
        q, *operands, call.mask, seed, d_weights, more, out, dy, lse, delta, norm, dq, *numbers, *strides,
        *out.stride(), *dy.stride(), *(none if dq is None else dq.stride()), **meta,
    )  # fmt: skip
    if d_mask is not None:
        _mask_grad(d_mask, call, (q, k, v), seed, d_weights, dy, (lse, delta, norm), numbers, dws)
    if dk is None and dv is None:
        return
    tile, order, meta = _tile("attention_dkdv", call, dropout, k, q, dy, plain=plain)
    operands = (q, dy)
    if order:
        operands = _boxes(q, tile.m, meta["TILE_D"]), _boxes(dy, tile.m, meta["TILE_V"])
    launch.launch(
        attention_dkdv_kernel, cdiv(s, tile.n) * b * h_k,
        k, v, operands[0], call.mask, seed, d_weights, operands[1], lse, delta, norm, dk, dv, *numbers, *strides,
        *dy.stride(), *(none if dk is None else dk.stride()), *(none if dv is None else dv.stride()), **meta,
    )  # fmt: skip


def _mask_grad(
    d_mask: torch.Tensor,
    call: _Call,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seed: torch.Tensor | None,
    d_weights: torch.Tensor | None,
    dy: torch.Tensor,
    of_queries: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    numbers: tuple[Any, ...],
    d_weights_strides: tuple[int, ...],
) -> None:
    """The gradient of a mask. Where its elements are few, several programs share the sum of each: they write partial sums that
    lie as the gradient does, which is dense."""
    b, own_h, rows, columns = d_mask.shape
    h, l, s, _ = call.sizes
    device = tiles.device(dy.device)
    tile = picks.mask_tile(dy.dtype, device)
    meta = {name: call.meta[name] for name in ("D", "DV", "PRECISION", "OF_KEYS", "ACC")}
    features = min(tile.k, max(call.meta["TILE_D"], call.meta["TILE_V"]))
    sum_m, sum_n = rows == 1, columns == 1
    tiles_m, tiles_n = cdiv(l, tile.m), cdiv(s, tile.n)
    heads = h // max(own_h, 1)
    steps = qkv[0].shape[0] // max(b, 1) * heads * (tiles_m if sum_m else 1) * (tiles_n if sum_n else 1)
    tiles_m, tiles_n = 1 if sum_m else tiles_m, 1 if sum_n else tiles_n
    programs = b * own_h * tiles_m * tiles_n
    shares = picks.mask_shares(programs, steps, device)
    out, step = d_mask, cdiv(steps, shares)
    if shares > 1:
        out = launch.empty((shares, d_mask.numel()), dtype=of_queries[0].dtype, device=dy.device)
    launch.launch(
        attention_mask_grad_kernel, programs * shares,
        *qkv, call.mask, seed, d_weights, dy, *of_queries, out, *numbers,
        own_h, tiles_m, tiles_n, heads, steps, shares, step, d_mask.numel(),
        *[stride for x in qkv for stride in x.stride()], *call.masks, *d_weights_strides, *dy.stride(), *d_mask.stride(),
        SUM_M=sum_m, SUM_N=sum_n, **meta, TILE_M=tile.m, TILE_N=tile.n, TILE_K=features, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if shares > 1:
        sum_partials(out, d_mask.as_strided((d_mask.numel(),), (1,)))


def _per_head(weights: torch.Tensor, heads: int) -> tuple[torch.Tensor, float]:
    """Weights, or their gradient, as (B, H, L, S), and what part of a head's own they are: those of all heads if there are 4
    dimensions, else their mean."""
    if weights.dim() == 4:
        return weights, 1.0
    return weights[:, None].expand(-1, heads, -1, -1), 1 / max(heads, 1)


def _weights_tile(call: _Call, dropout: float, q: torch.Tensor) -> tuple[Tile, int, dict[str, Any]]:
    tile, order, meta = _tile("attention_weights", call, dropout, q)
    for name in ("DV", "CAUSAL", "BOXES", "TILE_V"):
        del meta[name]
    return tile, order, meta


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    lse: torch.Tensor,
    weights: torch.Tensor,
    *,
    dropout: float,
    scale: float | None,
    precision: str,
) -> None:
    """dropout(softmax(scale * q k^T + mask)), of which `attention` left `lse`, into `weights`: of each head, or their mean.

    Shape: q (B, H, L, ·), k (B, H, S, ·), mask and lse as there; weights (B, H, L, S), or (B, L, S) for the mean of the
        heads. All but lse with any strides.
    Dtype: as there; weights floating.
    """
    q, k, average = _near(q), _near(k), weights.dim() == 3
    call = _prepare(q, k, k, mask, causal=False, dropout=dropout, scale=scale, precision=precision)
    (b, h, l, _), s = q.shape, k.shape[2]
    weights, part = _per_head(weights, h)
    tile, _, meta = _weights_tile(call, dropout, q)
    launch.launch(
        attention_weights_kernel, cdiv(l, tile.m) * cdiv(s, tile.n) * b * (1 if average else h),
        q, k, call.mask, seed, lse, weights, h, l, s, call.scale, call.keep, call.unkeep, part,
        *q.stride(), *k.stride(), *call.masks, *weights.stride(), AVERAGE=average, **meta,
    )  # fmt: skip


def dropout_factors(seed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, dropout: float) -> torch.Tensor:
    """What dropout multiplies the weights (..., L, S) by: 0, or the inverse of the share that it keeps."""
    (*heads, l, s), keep = shape, round((1 - dropout) * 2**16)
    factors = launch.empty(shape, dtype=dtype, device=seed.device)
    launch.launch(
        dropout_factors_kernel, math.prod(heads) * cdiv(l, 16) * cdiv(s, 64),
        seed, factors, l, s, keep, 2**16 / keep if keep else 0.0, TILE_M=16, TILE_N=64,
    )  # fmt: skip
    return factors
