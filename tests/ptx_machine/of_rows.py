"""Calls that kernels.py runs of what goes by rows: softmax, norms, masked attention."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels import dropout, norm
from fastlayers.testing import assert_within_budget


def softmax(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    every = []
    for function, given in ((FL.softmax, dtype), (torch.softmax, dtype), (torch.softmax, torch.float64)):
        leaf = x.to(given).requires_grad_()
        y = function(leaf, dim)
        every.append([y, *torch.autograd.grad(y, leaf, dy.to(given))])
    for ours, torchs, exact in zip(*every, strict=True):
        assert_within_budget(ours, torchs, exact)


def dropped_norm(center: bool, dtype: torch.dtype) -> None:
    """A residual, what dropout leaves of x, and their norm in one kernel each way, beside a launch for each."""
    torch.manual_seed(0)
    x, residual, dy, dtotal = torch.randn(4, 9, 40).to(dtype)
    w, b = torch.randn(2, 40).to(dtype)
    drop = dropout.Drop(torch.tensor([2**40 + 5, 8]), 0.3, 1 / 0.7, 16 // dtype.itemsize)
    out, total, expected, sum_, dx, dropped, dx_expected, dropped_expected = torch.empty(8, 9, 40, dtype=dtype)
    mean, rstd = torch.empty(2, 9, dtype=torch.promote_types(dtype, torch.float32))
    dw, db = torch.empty(2, 40, dtype=dtype)
    bias, mean, db = (b, mean, db) if center else (None, None, None)
    norm.layer_norm(x, residual, w, bias, out, total, mean, rstd, 40, 1e-5, center, drop)
    drop.launch(x, sum_, residual)
    norm.layer_norm(sum_, None, w, bias, expected, None, mean, rstd, 40, 1e-5, center)
    assert torch.equal(total, sum_)
    torch.testing.assert_close(out, expected)
    norm.layer_norm_grad(dy, dtotal, total, w, mean, rstd, dx, dw, db, 40, center, (drop, dropped))
    norm.layer_norm_grad(dy, dtotal, total, w, mean, rstd, dx_expected, dw, db, 40, center)
    drop.launch(dx, dropped_expected)
    torch.testing.assert_close(dx, dx_expected)
    assert torch.equal(dropped, dropped_expected)


def running_averages(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4).to(dtype)
    ours = fastlayers.nn.InstanceNorm2d(3, track_running_stats=True).to(dtype)
    theirs, exact = (torch.nn.InstanceNorm2d(3, track_running_stats=True).to(t) for t in (dtype, torch.float64))
    results = ours(x), theirs(x), exact(x.double())
    assert_within_budget(*results)
    for name in ("running_mean", "running_var"):
        assert_within_budget(*(getattr(layer, name) for layer in (ours, theirs, exact)), name)


def masked(keys: int, dtype: torch.dtype) -> None:
    """Attention whose mask is a finite number for the first `keys` of 160: the least one, as many models fill theirs with."""
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(1, 2, 20, 16), *torch.randn(2, 1, 2, 160, 16), torch.randn(1, 2, 20, 16)
    mask = torch.zeros(20, 160)
    mask[:, :keys] = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    every = []
    for function, given in (
        (FL.scaled_dot_product_attention, dtype),
        (torch.nn.functional.scaled_dot_product_attention, dtype),
        (torch.nn.functional.scaled_dot_product_attention, torch.float64),
    ):
        leaves = [t.to(dtype).to(given).requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH) if function is not FL.scaled_dot_product_attention else torch.enable_grad():
            y = function(*leaves, mask.to(given))
        gradients = torch.autograd.grad(y, leaves, dy.to(dtype).to(given))
        # Of rows that are masked whole a log-sum-exp can't tell how many keys there are: the README has it among the differences.
        every.append([y, *gradients] if keys < 160 else [y])
    for ours, torchs, exact in zip(*every, strict=True):
        assert_within_budget(ours, torchs, exact, scale=16)


def dropped_twice(dtype: torch.dtype) -> None:
    """What second derivatives of attention take for dropout's choice is what its forward dropped."""
    torch.manual_seed(0)
    q, k = torch.zeros(2, 1, 3, 40, 16, dtype=dtype)
    v, dy = torch.eye(64, dtype=dtype).expand(1, 3, 64, 64).clone(), torch.randn(1, 3, 40, 64).to(dtype)
    k = k[:, :, :1].expand(1, 3, 64, 16)
    y = FL.scaled_dot_product_attention(q, k, v.requires_grad_(), dropout_p=0.4)
    assert 0.5 < (y != 0).double().mean() < 0.7
    (dv,) = torch.autograd.grad(y, v, dy, create_graph=True)
    # The weights of a query are all the same, and values are unit vectors: the result is the weights after dropout.
    exact = y.double().mT @ dy.double()
    assert_within_budget(dv, (y.float().mT @ dy.float()).to(dtype), exact)


def averaged(dtype: torch.dtype) -> None:
    """An activation's gradient from that of a mean, which is expanded."""
    torch.manual_seed(0)
    x, dys = torch.randn(6, 40, 7).to(dtype), [torch.randn(6).to(dtype), torch.randn(40, 7).to(dtype)]
    every = []
    for gelu, given in ((FL.gelu, dtype), (torch.nn.functional.gelu, dtype), (torch.nn.functional.gelu, torch.float64)):
        leaf = x.to(given).requires_grad_()
        means = gelu(leaf).mean((1, 2)), gelu(leaf).mean(0)
        every.append([torch.autograd.grad(y, leaf, dy.to(given))[0] for y, dy in zip(means, dys, strict=True)])
    for ours, torchs, exact in zip(*every, strict=True):
        assert_within_budget(ours, torchs, exact)
