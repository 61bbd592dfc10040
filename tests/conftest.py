"""Where the suite runs: on the GPU if there is one, else on the CPU in Triton's interpreter, made honest and watched; or, with
rehearsal.py, nowhere."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The interpreter multiplies small matrices in NumPy: threads of its own only get in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

GPU = torch.cuda.is_available()
REHEARSED = "rehearsal" in sys.modules
if not GPU and not REHEARSED:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ.setdefault("FASTLAYERS_TEST_SEED", str(random.SystemRandom().randrange(2**31)))  # one for all workers

import honest_interpreter  # noqa: E402
import quick_interpreter  # noqa: E402
import recorded  # noqa: E402
import sanitizer  # noqa: E402

import fastlayers  # noqa: E402
from fastlayers.kernels.matmul.tiles import Product  # noqa: E402
from fastlayers.kernels.runtime import launch as _launch  # noqa: E402
from fastlayers.kernels.runtime import record as _record  # noqa: E402
from fastlayers.kernels.runtime import replay as _replay  # noqa: E402
from fastlayers.kernels.runtime import tiles as _tiles  # noqa: E402
from fastlayers.kernels.runtime.tiles import Tile  # noqa: E402
from fastlayers.selfcheck import strict_float32  # noqa: E402

torch.set_num_threads(1)
if _launch.INTERPRETED:
    honest_interpreter.install()
    quick_interpreter.install()
    sanitizer.install()


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if GPU else "Triton's interpreter, made honest and watched"
    where = "a GPU that isn't there" if REHEARSED else where
    return f"fastlayers on {where}; FASTLAYERS_TEST_SEED={os.environ['FASTLAYERS_TEST_SEED']}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="I/N: the I-th of N shares of the tests, divided by their names")
    parser.addoption(
        "--record",
        type=Path,
        help="a file for a line of each test; see recorded.py",
    )
    parser.addoption(
        "--hang", type=float, default=120.0, help="with --record: seconds after which a test ends the process"
    )


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--record"):
        config.pluginmanager.register(recorded.Recorder(path, config.getoption("--hang")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, shares = map(int, config.getoption("--share").split("/"))
    others = [item for item in items if zlib.crc32(item.nodeid.encode()) % shares != share]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % shares == share]
    for item in items:
        if "gpu" in item.keywords and not (GPU or REHEARSED):
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
    """Every output and workspace starts as NaN, of integers as the largest one: an element that nobody writes shows."""

    allocate = _launch.allocate

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "meta":
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

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
    # Earlier tests of the same layer may have filled its bucket of signatures, which would then learn new ones more slowly.
    monkeypatch.setattr(_replay, "PER_BUCKET", 1000)
    counted: list[None] = []
    play = _record.Recording.play
    monkeypatch.setattr(_record.Recording, "play", lambda *a: (counted.append(None), play(*a))[1])
    return counted


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched since the test began, or since it emptied the list."""
    names: list[str] = []
    launch = _launch.launch

    def watch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        if programs:
            names.append(getattr(kernel, "__name__", None) or kernel.fn.__name__)
        launch(kernel, programs, *args, **meta)

    monkeypatch.setattr(_launch, "launch", watch)
    return names


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles so small that small shapes cross their edges."""
    tiles = dict(
        product=Tile(32, 16, 16), pointwise=Tile(1, 64), activation_grad=Tile(16, 16), sum_partials=Tile(2, 32),
        elementwise_loss=Tile(1, 64), elementwise_loss_grad=Tile(1, 64), nll_loss=Tile(1, 4), nll_loss_grad=Tile(2, 16),
        embedding=Tile(2, 4), embedding_grad=Tile(2, 4), embedding_bag=Tile(2, 4), sample_weights_grad=Tile(2, 4),
        linear_cross_entropy_rows=Tile(4, 1), gated_matmul=Product(Tile(32, 16, 16), "ieee"), gate=Tile(1, 64),
        rotary_matmul=Product(Tile(16, 16, 16), "ieee"),
        gated=Tile(1, 64), gated_channels=Tile(16, 4), rotary=Tile(1, 16),
        layer_norm=Tile(2, 16), cross_entropy=Tile(2, 4, 2), cross_entropy_grad=Tile(2, 16),
        fold=Tile(2, 16), pool=Tile(32, 2), pool_large=Tile(2, 16),
        attention=Tile(16, 32), attention_dq=Tile(16, 16), attention_dkdv=Tile(16, 32), attention_weights=Tile(16, 32),
        attention_mask_grad=Tile(16, 32, 16),
        batch_norm=Tile(4, 16), batch_norm_merge=Tile(4, 8), batch_norm_whole=Tile(1, 64),
        cosine_rows=Tile(2, 16), cosine_columns=Tile(4, 8), cosine_shares=Tile(4, 4),
    )  # fmt: skip
    with _tiles.force(**tiles):
        yield


@pytest.fixture
def large_tiles() -> Iterator[None]:
    """Tiles for large tensors: the interpreter takes as long over a small one. No compiler could put them into registers."""
    with (
        _tiles.force(pointwise=Tile(1, 2**16), gated=Tile(1, 2**16))
        if _launch.INTERPRETED
        else contextlib.nullcontext()
    ):
        yield


@pytest.fixture
def few_programs() -> Iterator[None]:
    """Pooling in large tiles, which take the interpreter no longer than small ones; it goes through windows pixel by pixel.
    Compiled, they would spill."""
    with _tiles.force(pool=Tile(4096, 1)) if _launch.INTERPRETED else contextlib.nullcontext():
        yield
