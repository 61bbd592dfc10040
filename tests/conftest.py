"""Where the suite runs: on the GPU if there is one, else on the CPU in Triton's interpreter, made honest and watched."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

# The interpreter multiplies small matrices in NumPy: threads of its own only get in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ.setdefault("FASTLAYERS_TEST_SEED", str(random.SystemRandom().randrange(2**31)))  # one for all workers

import honest_interpreter  # noqa: E402
import sanitizer  # noqa: E402

import fastlayers  # noqa: E402
from fastlayers._selfcheck import strict_float32  # noqa: E402
from fastlayers.kernels import _launch, _record, _tiles  # noqa: E402
from fastlayers.kernels._tiles import Tile  # noqa: E402

torch.set_num_threads(1)
if _launch.INTERPRETED:
    honest_interpreter.install()
    sanitizer.install()


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if GPU else "Triton's interpreter, made honest and watched"
    return f"fastlayers on {where}; FASTLAYERS_TEST_SEED={os.environ['FASTLAYERS_TEST_SEED']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_random_data(request: pytest.FixtureRequest) -> None:
    """New data in every run; the header says how to get the same again."""
    torch.manual_seed(int(os.environ["FASTLAYERS_TEST_SEED"]) ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and workspace starts as NaN: an element that nobody writes shows."""

    allocate = _launch.allocate

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor if tensor.device.type == "meta" else tensor.fill_(float("nan"))

    monkeypatch.setattr(_launch, "allocate", poisoned)
    monkeypatch.setattr(_launch, "allocate_quickly", {})


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """Kernels or an error, strict float32, and nothing left behind."""
    with strict_float32(), fastlayers.policy("triton"):
        yield


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one at every replay."""
    counted: list[None] = []
    play = _record.Take.play
    monkeypatch.setattr(_record.Take, "play", lambda *a: (counted.append(None), play(*a))[1])
    return counted


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles so small that small shapes cross their edges."""
    tiles = dict(
        product=Tile(32, 16, 16), pointwise=Tile(1, 64), activation_grad=Tile(16, 16), sum_partials=Tile(2, 32)
    )
    with _tiles.force(**tiles):
        yield
