"""A gate and what it lets through: c = then(x @ gate.T + bias) * (x @ up.T + bias), and the gradients at both factors.

One kernel computes both products: it fetches a tile of x once for both weights, and writes c without having written either
factor, unless they are asked for. Where there are so few tiles that the sums would have to be shared out among programs, the two
products run by themselves, and `gate` joins them. Both factors are rounded to x's dtype before they are multiplied, so that c is
the same whether the factors are kept or not; the activation's result is not rounded.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .. import epilogues
from ..runtime import launch, tiles
from ..runtime.tiles import Device, Tile, cdiv
from .matmul import _descriptor, _fits_a_descriptor, _place, matmul
from .tiles import INTERPRETER, Product, arithmetic

# As in tiles.py; n columns of either weight. "descriptors": through the tensor memory accelerator, on architectures with one.
_GATED = {
    ("16", "large"): Tile(128, 64, 64, warps=8, stages=3),
    ("16", "small"): Tile(64, 64, 64, warps=8, stages=3),
    ("16", "gather"): Tile(64, 32, 32, warps=8, stages=2),
    ("tf32", "large"): Tile(128, 64, 32, warps=8, stages=3),
    ("tf32", "small"): Tile(64, 32, 32, warps=4, stages=3),
    ("tf32", "gather"): Tile(32, 32, 32, warps=8, stages=2),
    ("ieee", "large"): Tile(64, 64, 16, warps=8, stages=3),
    ("ieee", "small"): Tile(32, 32, 16, warps=4, stages=3),
    ("ieee", "gather"): Tile(32, 32, 16, warps=8, stages=2),
    ("64", "large"): Tile(32, 32, 16, warps=8, stages=2),
    ("64", "small"): Tile(32, 32, 16, warps=8, stages=2),
    ("64", "gather"): Tile(32, 16, 16, warps=8, stages=2),
}
_DESCRIPTORS = {
    "sm_90": Tile(128, 128, 64, warps=8, stages=4),
    "sm_100": Tile(128, 128, 64, warps=8, stages=3),
}
_FLAT = Tile(1, 1024, warps=4)
"""n elements."""


@triton.jit
def _finish(
    gate, up, c_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, pid_m, pid_n, M, N, A0, A1,
    THEN: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Of a tile of both factors: their product and, if asked for, they themselves."""
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    offsets = m[:, None] * N + n[None, :]
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
    rounded_gate = gate.to(c_ptr.dtype.element_ty)
    rounded_up = up.to(c_ptr.dtype.element_ty)
    if gate_ptr is not None:
        tl.store(gate_ptr + offsets, rounded_gate, mask=inside)
    if up_ptr is not None:
        tl.store(up_ptr + offsets, rounded_up, mask=inside)
    c = THEN(rounded_gate.to(ACC), epilogues.options(A0, A1, ACC)) * rounded_up.to(ACC)
    tl.store(c_ptr + offsets, c.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_matmul_kernel(
    c_ptr, x_ptr, gate_weight_ptr, up_weight_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr,
    M, N, K, x_m, x_k, gate_n, gate_k, up_n, up_k, A0: tl.float64, A1: tl.float64,
    THEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, K_FITS: tl.constexpr,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of c. Reads a tile row of x and the same tile row of both weights."""
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), GROUP)
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    if WIDE:
        k = k.to(tl.int64)
    gate = tl.zeros((TILE_M, TILE_N), ACC)
    up = tl.zeros((TILE_M, TILE_N), ACC)
    for start in range(0, K, TILE_K):
        x_inside = (m < M)[:, None]
        w_inside = (n < N)[None, :]
        if not K_FITS:
            k_inside = k < K - start
            x_inside = x_inside & k_inside[None, :]
            w_inside = w_inside & k_inside[:, None]
        x = tl.load(x_ptr + (m[:, None] * x_m + (start + k)[None, :] * x_k), mask=x_inside, other=0.0)
        one = tl.load(gate_weight_ptr + ((start + k)[:, None] * gate_k + n[None, :] * gate_n), mask=w_inside, other=0.0)
        other = tl.load(up_weight_ptr + ((start + k)[:, None] * up_k + n[None, :] * up_n), mask=w_inside, other=0.0)
        gate = tl.dot(x, one, gate, input_precision=PRECISION, out_dtype=ACC)
        up = tl.dot(x, other, up, input_precision=PRECISION, out_dtype=ACC)
    _finish(gate, up, c_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, pid_m, pid_n, M, N, A0, A1,
            THEN, ACC, WIDE, TILE_M, TILE_N)  # fmt: skip


@triton.jit
def _gated_matmul_tma_kernel(
    c_ptr, x, gate_weight, up_weight, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr,
    M, N, K, A0: tl.float64, A1: tl.float64,
    THEN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, X_TRANSPOSED: tl.constexpr,
    GATE_TRANSPOSED: tl.constexpr, UP_TRANSPOSED: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As _gated_matmul_kernel, for descriptors, which read zeros outside of a matrix: of x (M, K), or of (K, M) with
    X_TRANSPOSED; of the weights (N, K), likewise."""
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), GROUP)
    first_m, first_n = pid_m * TILE_M, pid_n * TILE_N
    gate = tl.zeros((TILE_M, TILE_N), tl.float32)
    up = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, K, TILE_K):
        if X_TRANSPOSED:
            x_tile = x.load([k, first_m]).T
        else:
            x_tile = x.load([first_m, k])
        if GATE_TRANSPOSED:
            one = gate_weight.load([k, first_n])
        else:
            one = gate_weight.load([first_n, k]).T
        if UP_TRANSPOSED:
            other = up_weight.load([k, first_n])
        else:
            other = up_weight.load([first_n, k]).T
        gate = tl.dot(x_tile, one, gate, input_precision=PRECISION)
        up = tl.dot(x_tile, other, up, input_precision=PRECISION)
    _finish(gate, up, c_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, pid_m, pid_n, M, N, A0, A1,
            THEN, tl.float32, WIDE, TILE_M, TILE_N)  # fmt: skip


@triton.jit
def _gate_kernel(
    gate_ptr, up_ptr, c_ptr, dc_ptr, d_gate_ptr, d_up_ptr, SIZE, A0: tl.float64, A1: tl.float64,
    THEN: tl.constexpr, UNDO: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE consecutive elements. Of both factors, their product c and, given its gradient dc, those of theirs that
    aren't None. d_up may be dc."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    inside = i < SIZE
    A = epilogues.options(A0, A1, ACC)
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0).to(ACC)
    y = THEN(gate, A)
    if c_ptr is not None:
        up = tl.load(up_ptr + i, mask=inside, other=0.0).to(ACC)
        tl.store(c_ptr + i, (y * up).to(c_ptr.dtype.element_ty), mask=inside)
    if dc_ptr is not None:
        dc = tl.load(dc_ptr + i, mask=inside, other=0.0).to(ACC)
        if d_gate_ptr is not None:
            d_gate = UNDO(dc * tl.load(up_ptr + i, mask=inside, other=0.0).to(ACC), gate, A)
            tl.store(d_gate_ptr + i, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
        if d_up_ptr is not None:
            tl.store(d_up_ptr + i, (dc * y).to(d_up_ptr.dtype.element_ty), mask=inside)


def _rows(dtype: torch.dtype, precision: str, device: Device, *, vectors: bool, descriptors: bool) -> Iterator[Product]:
    """All that `_pick` may choose from, whatever the sizes, the largest tile first."""
    kind = arithmetic(dtype, precision)
    accelerated = _DESCRIPTORS.get(device.architecture) if descriptors and kind == "16" else None
    if accelerated is not None:
        yield Product(accelerated, precision, descriptors=True)
    for size in ("large", "small") if vectors else ("gather",):
        yield Product(_GATED[kind, size], precision)


def _pick(
    m: int, n: int, dtype: torch.dtype, precision: str, device: Device, *, vectors: bool, descriptors: bool
) -> Product | None:
    """The largest tile that gives at least three quarters of the multiprocessors a program, and of which no more than half lies
    outside of the matrix. None where there is none, so that the sums would have to be shared out."""
    if dtype != torch.float32:
        precision = "ieee"  # it concerns float32 alone
    rows = [*_rows(dtype, precision, device, vectors=vectors, descriptors=descriptors)]
    asked: Product | None = tiles.ask("gated_matmul", lambda: rows)
    if asked is not None:
        return replace(asked, precision=precision)
    if device.architecture == "interpreter":
        return Product(INTERPRETER, precision)
    for row in rows:
        programs = cdiv(m, row.tile.m) * cdiv(n, row.tile.n)
        if 2 * m > row.tile.m and 4 * programs >= 3 * device.multiprocessors:
            return row
    return None


def gated_matmul(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    out: torch.Tensor,
    *,
    then: epilogues.Activation,
    precision: str,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    gate_out: torch.Tensor | None = None,
    up_out: torch.Tensor | None = None,
) -> None:
    """out = then(x @ gate_weight.T + gate_bias) * (x @ up_weight.T + up_bias).

    Shape: x (M, K) and both weights (N, K), any strides; biases (N,); out, gate_out and up_out (M, N), contiguous.
    Dtype: float16, bfloat16, float32 or float64, the same for all; precision ("ieee" or "tf32") concerns float32.

    Args:
        gate_out, up_out: where to write the factors, rounded, the former before the activation. None: nowhere.
    """
    (m, k), n = x.shape, gate_weight.shape[0]
    operands = (x, gate_weight, up_weight)
    wide = launch.wide(*operands, out)
    picked = _pick(
        m, n, x.dtype, precision, tiles.device(x.device),
        vectors=not wide and all(launch.vectors(t) for t in operands),
        descriptors=all(_fits_a_descriptor(t) for t in operands),
    )  # fmt: skip
    if picked is None:
        gate_out = matmul(x, gate_weight.T, bias=gate_bias, out=gate_out, precision=precision)
        up_out = matmul(x, up_weight.T, bias=up_bias, out=up_out, precision=precision)
        gate(gate_out, up_out, out, then=then)
        return
    tile = picked.tile
    function, options = epilogues.tile_function(then)
    biases = [None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias)]
    rest: tuple[object, ...] = (gate_out, up_out, *biases, m, n, k)
    meta = dict(
        THEN=function, PRECISION=picked.precision, WIDE=wide, GROUP=8,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    programs = cdiv(m, tile.m) * cdiv(n, tile.n)
    if picked.descriptors:
        described = [_descriptor(t, rows, tile.k) for t, rows in zip(operands, (tile.m, tile.n, tile.n), strict=True)]
        words = ("X_TRANSPOSED", "GATE_TRANSPOSED", "UP_TRANSPOSED")
        transposed = {word: turned for word, (_, turned) in zip(words, described, strict=True)}
        launch.launch(
            _gated_matmul_tma_kernel, programs, out, *[d for d, _ in described], *rest, *options, **transposed, **meta
        )
        return
    launch.launch(
        _gated_matmul_kernel, programs, out, *operands, *rest, *x.stride(), *gate_weight.stride(), *up_weight.stride(), *options,
        ACC=tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32)), K_FITS=k % tile.k == 0, **meta,
    )  # fmt: skip


def gate(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    out: torch.Tensor | None = None,
    d_out: torch.Tensor | None = None,
    d_gate: torch.Tensor | None = None,
    d_up: torch.Tensor | None = None,
    *,
    then: epilogues.Activation,
) -> None:
    """out = then(gate) * up and, if the gradient d_out is given, those of gate and up.

    Shape: all the same; gate and up with any strides, the others contiguous.
    Dtype: floating, the same; computed in float32 (float64).

    Args:
        up: None where d_up alone is asked for.
        out, d_gate, d_up: None if it isn't needed. d_up may be d_out, which is overwritten then.
    """
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    tile = tiles.ask("gate", lambda: (_FLAT,)) or _FLAT
    function, options = epilogues.tile_function(then)
    backward, _ = epilogues.tile_function(then, grad=True, of="input")
    launch.launch(
        _gate_kernel, cdiv(gate.numel(), tile.n), gate, up, out, d_out, d_gate, d_up, gate.numel(), *options,
        THEN=function, UNDO=None if d_gate is None else backward,
        ACC=tiles.triton_dtype(torch.promote_types(gate.dtype, torch.float32)), WIDE=launch.wide(elements=gate.numel()),
        TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
