"""Which elements dropout drops: Philox4x32-10 in the order in which torch goes through it on CUDA, by NumPy. Looks inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastlayers.functional as FL
from fastlayers.kernels import dropout as kernels

SEED, OFFSET = 2**40 + 7, 2**34 + 8
WORD = 0xFFFFFFFF


def philox(key: tuple[int, int], counter: list[Any]) -> list[Any]:
    """Ten rounds, of numbers below 2**32 as uint64."""
    c = [np.asarray(x).astype(np.uint64) for x in counter]
    k0, k1 = key
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        low, high = np.uint64(WORD), np.uint64(32)
        c = [(b >> high) ^ c[1] ^ np.uint64(k0), b & low, (a >> high) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


def test_known_answers() -> None:
    """Random123's."""
    assert [int(x) for x in philox((0, 0), [0] * 4)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(x) for x in philox((WORD,) * 2, [WORD] * 4)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def kept(n: int, p: float, vector: int, lanes: int, double: bool) -> np.ndarray:
    """Which of n elements are kept."""
    e, threads = np.arange(n, dtype=np.int64), kernels.threads(n, torch.device("cpu"))
    if vector > 1:
        chunk = e // vector
        turn, thread = chunk // threads, chunk % threads
        call, lane = OFFSET // 4 + turn * ((vector + 3) // 4) + e % vector // 4, e % vector % 4
    else:
        thread, lane, call = e % threads, e // threads % lanes, OFFSET // 4 + e // threads // lanes
    words = np.stack(philox((SEED & WORD, SEED >> 32), [call & WORD, call >> 32, thread, thread * 0]))
    if lanes == 2:
        number = words[2 * lane, e] ^ (words[2 * lane + 1, e] << np.uint64(21))
        return number.astype(np.float64) * 2.0**-53 + 2.0**-54 < 1 - p
    number = words[lane, e].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    return number < (1 - p if double else np.float32(1 - p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [5, 1000, 20000])
def test_the_mask(dtype: torch.dtype, n: int) -> None:
    """Of chunks and of single elements, in one turn and in several, the draw given as numbers and in memory."""
    draw, x, double = torch.tensor([SEED, OFFSET]), torch.ones(n, dtype=dtype), dtype == torch.float64
    for aligned in (16, 8, dtype.itemsize):
        vector = kernels.vector(x, dtype, aligned)
        for in_memory in (False, True):
            y = torch.empty_like(x)
            if vector > 1:
                kernels.dropout_chunks(x, y, draw, 0.3, 1.0, vector, in_memory)
            else:
                kernels.dropout_lanes(x, y, draw, 0.3, (1.0, 0.0, 0.0), 4, True, in_memory)
            assert ((y != 0).numpy() == kept(n, 0.3, vector, 4, double)).all()
    kernels.dropout_lanes(x, y, draw, 0.3, (1.0, 0.0, 0.0), kernels.lanes(dtype))
    assert ((y != 0).numpy() == kept(n, 0.3, 0, kernels.lanes(dtype), double)).all()


def test_draws(plays: list[None], device: torch.device) -> None:
    """The same under one seed, another one at every other call, also by replays; the gradient's mask is the output's."""
    x = torch.randn(6, 8, device=device, requires_grad=True)
    found = []
    for i in range(6):
        torch.manual_seed(i // 2)
        y = FL.dropout(x, 0.4)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, x * gradient)
        found.append(gradient)
    assert plays
    assert [torch.equal(found[i], found[i + 1]) for i in range(5)] == [True, False, True, False, True]


def test_nothing_to_do(device: torch.device) -> None:
    """The input itself."""
    x = torch.randn(3, 4, device=device)
    assert FL.dropout(x, 0.5, training=False) is FL.dropout(x, 0.0) is x
    empty = x[:0]
    assert FL.dropout(empty, 0.5) is empty


def test_in_place(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    z = x.clone()
    assert FL.dropout(z, 0.5, inplace=True) is z
    assert z._version == 1
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(z, x * gradient)


def test_checkpoint(device: torch.device) -> None:
    """What is computed again draws the same."""
    x = torch.randn(3, 40, device=device, requires_grad=True)
    kept: list[torch.Tensor] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        y = FL.dropout(x.sin(), 0.5)
        kept.append(y.detach() != 0)
        return y.square().sum()

    torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False).backward()
    assert len(kept) == 2
    assert torch.equal(*kept)
