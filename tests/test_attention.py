"""Attention: what the catalog's rows can't say of it."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract import by_formula
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import fastlayers
import fastlayers.functional as F
from fastlayers.kernels.attention import launchers
from fastlayers.kernels.attention import tiles as picks
from fastlayers.kernels.attention.tiles import Shares
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles
from fastlayers.kernels.runtime.tiles import Device, Tile
from fastlayers.ops.projected_attention import projected_attention
from fastlayers.testing import assert_within_budget, neighbours

pytestmark = pytest.mark.usefixtures("small_tiles")
MASKS = [(20, 37), (1, 37), (20, 1), (1, 1, 1, 37), (2, 1, 1, 37), (1, 3, 20, 37), (2, 3, 1, 1), (2, 1, 20, 37)]


def gradients(function: Callable[..., Any], *tensors: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """The result of a function of tensors, and every gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def judge(ours: Callable[..., Any], theirs: Callable[..., Any], *tensors: torch.Tensor, scale: float = 1) -> None:
    """Result and gradients at most twice as far from float64 as torch's formula. `scale`: the size of what the last gradient is
    the sum of."""
    dy = torch.randn_like(theirs(*tensors))
    mine = gradients(ours, *tensors, dy=dy)
    with by_formula():
        others = [gradients(theirs, *moved, dy=moved_dy) for *moved, moved_dy in neighbours(*tensors, dy)]
        exact = gradients(theirs, *[t.double() for t in tensors], dy=dy.double())
    for i, (a, c, *b) in enumerate(zip(mine, exact, *others, strict=True)):
        assert_within_budget(a, b, c, str(i), scale if i == len(tensors) else 1)


def heads(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in shapes]


def layers(device: torch.device, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Ours and torch's, with the same parameters."""
    ours, theirs = fastlayers.nn.MultiheadAttention(*args, **kwargs), nn.MultiheadAttention(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases are 0 at first
            parameter.normal_(0, 0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


# --- scaled_dot_product_attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_are_broadcast(shape: tuple[int, ...], device: torch.device) -> None:
    allowed = torch.rand(shape, device=device) > 0.3
    mask = allowed if len(shape) == 2 else torch.randn(shape, device=device).masked_fill(~allowed, -torch.inf)
    tensors = [t.to(device) for t in heads((2, 3, 20, 8), (2, 3, 37, 8), (2, 3, 37, 8))]

    def attend(space: Any) -> Callable[..., torch.Tensor]:
        return lambda *t: space.scaled_dot_product_attention(
            *t, mask if mask.dtype == torch.bool else mask.to(t[0].dtype)
        )

    judge(attend(F), attend(torch.nn.functional), *tensors)


@pytest.mark.parametrize(("queries", "keys"), [(5, 37), (37, 5)])
def test_causal_with_other_numbers_of_keys_and_shared_heads(queries: int, keys: int, device: torch.device) -> None:
    """Query m attends to the keys up to m, wherever the keys end; four heads share two."""
    tensors = [t.to(device) for t in heads((1, 4, queries, 8), (1, 2, keys, 8), (1, 2, keys, 8))]
    ours, theirs = (
        functools.partial(space.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        for space in (F, torch.nn.functional)
    )
    judge(ours, theirs, *tensors)


@pytest.mark.parametrize("shares", [1, 3, 9])
@pytest.mark.parametrize(
    ("queries", "group", "mask"),
    [(1, 2, None), (3, 3, (2, 1, 3, 70)), (1, 3, (1, 6, 1, 70)), (7, 1, (1, 1, 1, 70)), (9, 2, (2, 6, 9, 70))],
    ids=str,
)
def test_keys_are_shared_out(
    queries: int, group: int, mask: tuple[int, ...] | None, shares: int, device: torch.device, launched: list[str]
) -> None:
    """Among more programs than there are blocks of keys, too; the first 40 keys, which some shares have alone, are hidden, and
    one query attends to nothing."""
    tensors = [t.to(device) for t in heads((2, 6, queries, 12), *[(2, 6 // group, 70, 12)] * 2)]
    allowed = None
    if mask is not None:
        allowed = torch.rand(mask, device=device) > 0.3
        allowed[..., :40] = False
        allowed[0, 0, 0] = False

    def attend(space: Any) -> Callable[..., torch.Tensor]:
        return lambda *t: space.scaled_dot_product_attention(*t, allowed, scale=0.3, enable_gqa=True)

    with tiles.force(attention_shares=Shares(Tile(16, 32), shares)):
        judge(attend(F), attend(torch.nn.functional), *tensors)
    forward = ["attention_shares_kernel"] + ["attention_merge_kernel"] * (shares > 1)
    assert launched == [*forward, "attention_dq_kernel", "attention_dkdv_kernel"]


def test_when_keys_are_shared_out() -> None:
    """Where queries are few: until every multiprocessor has two programs. Otherwise, and for short keys, never."""
    gpu, half = Device("sm_90", 132), torch.bfloat16
    decoding = picks.shares(1, 32, 4, 1, 8192, half, 128, gpu)
    assert decoding is not None and decoding.tile.m == 16
    assert 132 <= 8 * decoding.shares <= 264
    many = picks.shares(64, 32, 4, 1, 8192, half, 128, gpu)
    assert many is not None and many.shares == 1  # K and V are read once for four heads
    chunk = picks.shares(1, 8, 1, 128, 8192, half, 128, gpu)
    assert chunk is not None and chunk.shares > 4
    alone = picks.shares(64, 32, 1, 1, 8192, half, 128, gpu)
    assert alone is not None and alone.shares == 1 and alone.tile.m == 16  # not a tile of 128 rows for one query
    for batch, group, queries, keys in ((1, 4, 1, 200), (1, 1, 4096, 4096), (32, 1, 100, 850)):
        assert picks.shares(batch, 32, group, queries, keys, half, 128, gpu) is None


@pytest.mark.parametrize("masked", [40, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_numbers_that_mask(masked: int, dtype: torch.dtype, device: torch.device) -> None:
    """The least number of float32, as many models fill their masks with, of the first keys or of all of them."""
    q, k, v = (t.to(device, dtype) for t in heads((1, 1, 18, 16), (1, 1, 300, 16), (1, 1, 300, 16)))
    mask = torch.zeros(18, 300, device=device)
    mask[:, :masked] = torch.finfo(torch.float32).min
    y = F.scaled_dot_product_attention(q, k, v, mask.to(dtype) if dtype == torch.float32 else mask)
    right = v.double().mean(2, keepdim=True).expand(y.shape)
    if masked < 300:
        scores = (q.double() @ k.double().mT / 4)[..., masked:]
        right = scores.softmax(-1) @ v[:, :, masked:].double()
    torch.testing.assert_close(y.double(), right, rtol=4e-3, atol=4e-3)


def test_heads_of_more_than_four_dimensions_in_any_order(device: torch.device) -> None:
    tensors = [torch.randn(3, 2, 2, 5, 8, device=device).transpose(0, 2) for _ in range(3)]
    judge(F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention, *tensors)


def test_a_query_without_keys_gives_nothing(device: torch.device) -> None:
    q, k, v = (t.to(device).requires_grad_() for t in heads((1, 2, 18, 8), (1, 2, 20, 8), (1, 2, 20, 8)))
    mask = torch.ones(18, 20, dtype=torch.bool, device=device)
    mask[3] = False
    for given in (mask, torch.zeros(18, 20, device=device).masked_fill(~mask, -torch.inf)):
        y = F.scaled_dot_product_attention(q, k, v, given)
        assert not y[:, :, 3].any()
        found = torch.autograd.grad(y.sum(), (q, k, v))
        assert not found[0][:, :, 3].any()
        assert all(g.isfinite().all() for g in found)


def test_gradients_beside_a_weight_that_is_nearly_1(device: torch.device) -> None:
    """Then ds is small beside dp and delta, and has their errors unless its rows add up to 0."""
    q, k, v, dy = (t.to(device) for t in heads((1, 2, 16, 8), (1, 2, 16, 8), (1, 2, 16, 64), (1, 2, 16, 64)))
    q, k, v, dy = q / 4 + 1, k / 4, 9 * v, 9 * dy
    k[:, :, 3] += 2.2
    with by_formula():
        exact = gradients(
            torch.nn.functional.scaled_dot_product_attention, *[t.double() for t in (q, k, v)], dy=dy.double()
        )
        torchs = gradients(torch.nn.functional.scaled_dot_product_attention, q, k, v, dy=dy)
    _, dq, dk, _ = gradients(F.scaled_dot_product_attention, q, k, v, dy=dy)
    assert (dq - exact[1]).norm() < (torchs[1] - exact[1]).norm()
    leaf = k.clone().requires_grad_()
    (alone,) = torch.autograd.grad(F.scaled_dot_product_attention(q, leaf, v), leaf, dy)
    torch.testing.assert_close(alone, dk, rtol=0, atol=0)  # dq isn't asked for


def test_a_backend_that_somebody_chose_computes(device: torch.device) -> None:
    q, k, v = (t.to(device) for t in heads((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8)))
    with sdpa_kernel(SDPBackend.MATH), fastlayers.policy("auto"):
        (decision,) = fastlayers.explain(F.scaled_dot_product_attention, q, k, v)
    assert decision.path == "torch"
    (decision,) = fastlayers.explain(F.scaled_dot_product_attention, q, k, v)
    assert decision.path == "triton"


# --- MultiheadAttention ----------------------------------------------------------------------------------------------------


def test_heads_are_read_where_one_product_wrote_them(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kernels: the packed projection, attention, and the projection of the result, which reads what attention wrote."""
    ours, _ = layers(device, 12, 3)
    seen: list[list[torch.Tensor]] = []
    attend = launchers.attention
    monkeypatch.setattr(launchers, "attention", lambda *a, **k: (seen.append([*a[:3], a[5]]), attend(*a, **k))[1])
    x = torch.randn(20, 2, 12, device=device)
    decisions = list(fastlayers.explain(ours, x, x, x, need_weights=False))
    assert [d.op for d in decisions] == ["linear", "scaled_dot_product_attention", "linear"]
    assert [len(d.kernels) for d in decisions] == [1, 1, 1]
    q, k, v, output = seen[0]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert output.permute(2, 0, 1, 3).is_contiguous()


@pytest.mark.parametrize("batch_first", [False, True])
def test_saves_no_more_than_torch(batch_first: bool, device: torch.device) -> None:
    pair = layers(device, 32, 4, batch_first=batch_first)
    x = torch.randn(20, 3, 32, device=device, requires_grad=True)
    sizes = []
    for layer in pair:
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x, x, x, need_weights=False)
        sizes.append(sum(storages.values()))
    assert sizes[0] <= sizes[1]


@contextmanager
def inference(layer: nn.Module, on: bool) -> Iterator[None]:
    """In eval without gradients, where torch may call its single operator; or in training."""
    layer.train(not on)
    with torch.set_grad_enabled(not on):
        yield


@pytest.mark.parametrize("eval", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_queries_without_keys(eval: bool, need_weights: bool, batch_first: bool, device: torch.device) -> None:
    """0 or NaN before the last projection, as torch: which of them depends on the path that torch takes."""
    ours, theirs = layers(device, 8, 2, batch_first=batch_first)
    x = torch.randn(3, 3, 8, device=device)
    padding = torch.tensor([[True] * 3, [False, True, True], [False] * 3], device=device)
    later = torch.ones(3, 3, dtype=torch.bool, device=device).triu(1)
    results = []
    for layer in (ours, theirs):
        with inference(layer, eval):
            results.append(
                [
                    layer(x, x, x, padding, need_weights, mask, average_attn_weights=average)
                    for mask, average in ((None, True), (later, False), (later.expand(6, 3, 3), True))
                ]
            )
    torch.testing.assert_close(*results, equal_nan=True)
    strides = [tree_map(lambda t: t.stride() if isinstance(t, torch.Tensor) else t, r) for r in results]
    assert strides[0] == strides[1]


@pytest.mark.parametrize("need_weights", [False, True])
def test_training_beside_torchs(need_weights: bool, device: torch.device) -> None:
    """Self-attention and cross-attention, as in a decoder, for several steps."""
    pair = layers(device, 8, 2, kdim=6, vdim=6, add_bias_kv=True)
    x, memory, goal = (torch.randn(shape, device=device) for shape in ((5, 2, 8), (7, 2, 6), (5, 2, 8)))
    losses: list[list[float]] = []
    for layer in pair:
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, 0.9)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = (layer(x, memory, memory, need_weights=need_weights)[0] - goal).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*[[*layer.parameters()] for layer in pair], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
def test_second_derivatives(need_weights: bool, device: torch.device) -> None:
    ours, _ = layers(device, 4, 2, dtype=torch.float64)
    x = torch.randn(3, 1, 4, device=device, dtype=torch.float64, requires_grad=True)
    later = torch.ones(3, 3, dtype=torch.bool, device=device).triu(1)

    def call(x: torch.Tensor) -> torch.Tensor:
        return ours(x, x, x, need_weights=need_weights, attn_mask=later, is_causal=True)[0]

    assert torch.autograd.gradgradcheck(call, (x,), fast_mode=True)


def test_dropout(device: torch.device) -> None:
    """Of the weights, in training alone; what is returned are the weights as dropout leaves them."""
    ours, _ = layers(device, 8, 2, dropout=0.5)
    x = torch.randn(20, 2, 8, device=device)
    plain = ours.eval()(x, x, x)
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], plain[0])
    ours.train()
    _, weights = ours(x, x, x, average_attn_weights=False)
    kept = weights != 0
    assert 0.4 < kept.float().mean() < 0.6
    right = ours.eval()(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(weights[kept], 2 * right[kept])
    many = torch.stack([ours.train()(x, x, x, need_weights=False)[0] for _ in range(10)])
    assert not torch.equal(many[0], many[1])
    assert (many.mean(0) - plain[0]).abs().mean() < 0.6 * (many[0] - plain[0]).abs().mean()  # 0.32 to be expected


@pytest.mark.parametrize("apart", ["rows", "columns"])
def test_offsets_of_64_bits(apart: str, device: torch.device) -> None:
    """Rows or columns of the mask and of the weights' gradient lie 2**28 elements apart, and most of a tile's aren't there: the
    check that nothing wraps sees them."""
    l, s, strides = (2, 37, (2**28, 1)) if apart == "rows" else (20, 2, (1, 2**28))
    mask, dw = (torch.empty_strided((l, s), strides, device=device).copy_(torch.randn(l, s)) for _ in range(2))
    x, memory = torch.randn(l, 1, 8, device=device), torch.randn(s, 1, 8, device=device)
    found = []
    for layer in layers(device, 8, 2):
        leaves = [t.clone().requires_grad_() for t in (x, memory)]
        y, w = layer(*leaves, leaves[1], attn_mask=mask)
        found.append([y, w, *torch.autograd.grad((y, w), leaves, (torch.ones_like(y), dw[None]))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [True, False])
def test_gradients_through_the_weights(average: bool, device: torch.device, launched: list[str]) -> None:
    """Of the weights alone, and of both results, with a mask that leaves one query nothing to attend to: NaN, as torch gives."""
    for layer in (pair := layers(device, 8, 2)):
        layer.double()
    x = torch.randn(19, 2, 8, device=device, dtype=torch.float64)
    mask = (torch.rand(19, 19, device=device) > 0.7).fill_diagonal_(False)
    dy, dw = torch.randn_like(x), torch.randn(2, *[2] * (not average), 19, 19, device=device, dtype=torch.float64)
    for hidden in (False, True):
        if hidden:
            mask[3] = True
        found = []
        for layer in pair:
            leaf = x.clone().requires_grad_()
            y, w = layer(leaf, leaf, leaf, attn_mask=mask, average_attn_weights=average)
            given = [leaf, layer.in_proj_weight]
            alone = torch.autograd.grad(w, given, dw, retain_graph=True)
            found.append([y, w, *alone, *torch.autograd.grad((y, w), given, (dy, dw))])
        torch.testing.assert_close(*found, equal_nan=True)
        assert found[0][0].isnan().any() == hidden
    assert {"attention_weights_kernel", "attention_weights_delta_kernel"} <= {*launched}


def test_gradients_through_the_weights_with_dropout(device: torch.device) -> None:
    """As by the formula, of which second derivatives are made, with the same choice."""
    q, k, v = (torch.randn(n, 2, 12, device=device, dtype=torch.float64).requires_grad_() for n in (5, 21, 21))
    y, w = projected_attention((q, k, v, None), 3, 1, 0.4, False, "mean", True, None)
    dy, dw = torch.randn_like(y), torch.randn_like(w)
    kernels, formula = (
        torch.autograd.grad((y, w), (q, k, v), (dy, dw), retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    torch.testing.assert_close(kernels, formula)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_nothing_is_copied(
    batch_first: bool, need_weights: bool, device: torch.device, plays: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the input, whose rows are those of a transposed batch, nor the three gradients of what one projection wrote. And
    views of that are replayed."""
    ours, theirs = layers(device, 8, 2, batch_first=batch_first)
    read: list[set[int]] = []
    written: list[set[int]] = []
    launch, grad = _launch.launch, launchers.attention_grad

    def note_read(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        read.append({t.data_ptr() for t in args if isinstance(t, torch.Tensor)})
        launch(kernel, programs, *args, **meta)

    def note_written(*args: Any, **options: Any) -> None:
        written.append({g.untyped_storage().data_ptr() for g in args[8:11]})
        grad(*args, **options)

    x = torch.randn(3, 5, 8, device=device, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(_launch, "launch", note_read)
        patch.setattr(launchers, "attention_grad", note_written)
        ours(x, x, x, need_weights=need_weights)[0].sum().backward()
    assert x.data_ptr() in read[0]
    assert [len(storages) for storages in written] == [1]
    for _ in range(4):
        results = []
        for layer in (ours, theirs):
            layer.zero_grad()
            x = torch.randn(3, 5, 8, device=device) if layer is ours else x.detach()
            y = layer(x.requires_grad_(), x, x, need_weights=need_weights)[0]
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, layer.in_proj_weight))])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(plays) >= 6, "two projections and attention, forward and backward"


def test_out_proj_is_read_and_never_called(device: torch.device) -> None:
    ours, theirs = layers(device, 8, 2)
    for layer in (ours, theirs):
        layer.out_proj.register_forward_hook(lambda *_: pytest.fail("torch doesn't call it"))
        nn.utils.parametrizations.weight_norm(layer.out_proj)
    x = torch.randn(3, 2, 8, device=device)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


WRONG: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a key of another width": lambda layer, x: layer(x, x[..., :4], x[..., :4]),
    "another batch": lambda layer, x: layer(x, x[:, :1], x[:, :1]),
    "other values than keys": lambda layer, x: layer(x, x, x[:2]),
    "dimensions": lambda layer, x: layer(x[None], x[None], x[None]),
    "a mask's size": lambda layer, x: layer(x, x, x, attn_mask=torch.zeros(2, 2, device=x.device)),
    "a padding mask's size": lambda layer, x: layer(x, x, x, torch.zeros(2, 2, device=x.device)),
    "a mask of integers": lambda layer, x: layer(
        x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.int64, device=x.device)
    ),
    "is_causal without a mask": lambda layer, x: layer(x, x, x, is_causal=True),
    "another dtype": lambda layer, x: layer(x.half(), x.half(), x.half()),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_torchs(name: str, device: torch.device) -> None:
    ours, theirs = layers(device, 8, 2)
    x = torch.randn(3, 2, 8, device=device)
    with pytest.raises((AssertionError, RuntimeError)) as right:
        WRONG[name](theirs, x)
    with pytest.raises(right.type) as mine:
        WRONG[name](ours, x)
    assert str(mine.value) == str(right.value)


def test_warns_as_torch_of_masks_of_two_dtypes(device: torch.device) -> None:
    pair = layers(device, 8, 2)
    x, seen = torch.randn(3, 2, 8, device=device), []
    padding, mask = torch.zeros(2, 3, dtype=torch.bool, device=device), torch.randn(3, 3, device=device)
    for layer in pair:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = layer(x, x, x, padding, attn_mask=mask)
        seen.append((result, [(w.category, str(w.message)) for w in caught]))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1] != []


def test_what_is_no_plain_case_is_torchs(device: torch.device) -> None:
    """vmap and per-sample gradients, and a copy on the meta device."""
    ours, theirs = layers(device, 8, 2)
    xs = torch.randn(2, 3, 2, 8, device=device)
    with fastlayers.policy("auto"):
        batched = [torch.func.vmap(lambda x: m(x, x, x)[0])(xs) for m in (ours, theirs)]  # noqa: B023
        meta = copy.deepcopy(ours).to("meta")(xs[0].to("meta"), xs[0].to("meta"), xs[0].to("meta"))
    torch.testing.assert_close(*batched)
    assert meta[0].is_meta


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("eval", [False, True])
def test_compiles_whole(eval: bool, device: torch.device) -> None:
    ours, theirs = layers(device, 8, 2, batch_first=True)
    x = torch.randn(2, 3, 8, device=device)
    later = torch.ones(3, 3, dtype=torch.bool, device=device).triu(1)
    torch._dynamo.reset()
    with inference(ours, eval), inference(theirs, eval):
        compiled: Any = torch.compile(ours, backend="eager", fullgraph=True)
        for words in (dict(need_weights=False, attn_mask=later, is_causal=True), dict(attn_mask=later)):
            torch.testing.assert_close(compiled(x, x, x, **words), theirs(x, x, x, **words))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", ["query", "keys"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_nested_tensors_are_torchs(nested: str, batch_first: bool, device: torch.device) -> None:
    ours, theirs = layers(device, 8, 2, batch_first=batch_first)
    ragged = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], device=device)
    dense = torch.randn(2, 3, 8, device=device)
    arguments = (ragged,) * 3 if nested == "query" else (dense, ragged, ragged)
    outcomes = []
    for layer in (ours.eval(), theirs.eval()):
        with torch.no_grad(), fastlayers.policy("auto"):
            try:
                outcomes.append(layer(*arguments, need_weights=False)[0].to_padded_tensor(0.0))
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}")
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes)
