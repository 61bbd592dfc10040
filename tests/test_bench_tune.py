"""bench's search for tiles, and its comparison of the ways to compute one thing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_workloads import CPU, fake_gpu

from bench import clock, picks, report, tune
from fastlayers.kernels import pointwise, softmax
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Tile

__all__ = ["fake_gpu"]  # a fixture

# Tuning


def test_knobs() -> None:
    for knob in tune.knobs("sm_90"):
        assert knob.shipped not in knob.candidates
        assert len(set(knob.candidates)) == len(knob.candidates)
        assert 0 < len(knob.candidates) < 150
        assert knob.calls
    kinds = {knob.key[0] for knob in tune.knobs("sm_90") if knob.forced == "product"}
    assert kinds == {"16", "tf32", "ieee", "64"}
    for tile in tune.product_tiles("16", "large", "sm_80"):
        assert tile.stages * (tile.m + tile.n) * tile.k * 2 <= 166_912
        assert tile.m * tile.n >= 2**14


def knob(*candidates: Tile, calls: int = 2) -> tune.Knob:
    return tune.Knob(
        '_PRODUCT_ON["sm_90"]', ("16", "large"), Tile(128, 256, 64, 8), candidates, "product",
        tuple((str(i), lambda device: lambda: None) for i in range(calls)),
    )  # fmt: skip


A, B, C = Tile(128, 128, 64, 8), Tile(256, 128, 64, 8), Tile(64, 256, 64, 4)


def test_the_best_tile_over_all_shapes_is_chosen() -> None:
    this = knob(A, B, C)
    speeds = {this.shipped: [1.0, 1.0], A: [0.7, 1.9], B: [0.9, 0.8], C: [0.98, 0.98]}
    times, best, gain = tune.search(this, lambda knob, tile, i: speeds[tile][i])
    assert best == B
    assert gain == pytest.approx((1 / 0.72) ** 0.5)
    assert times == speeds


def test_noise_replaces_no_tile() -> None:
    this = knob(A)
    assert tune.search(this, lambda knob, tile, i: 1.0 if tile == this.shipped else 0.98)[1:] == (this.shipped, 1.0)
    # Fast the first time only: the second look, in turn, doesn't bear it out.
    seen: dict[Tile, int] = {}

    def drifting(knob: tune.Knob, tile: Tile, i: int) -> float:
        seen[tile] = seen.get(tile, 0) + 1
        return 0.5 if tile == A and seen[tile] <= 2 else 1.0

    assert tune.search(this, drifting)[1:] == (this.shipped, 1.0)


def test_tiles_that_fail_or_crawl_are_dropped() -> None:
    this = knob(A, B, C)
    asked: list[tuple[Tile, int]] = []

    def time_of(knob: tune.Knob, tile: Tile, i: int) -> float | None:
        asked.append((tile, i))
        return {A: None, B: 5.0}.get(tile, 1.0)

    times, best, _ = tune.search(this, time_of)
    assert set(times) == {this.shipped, C}
    assert best == this.shipped
    assert (B, 1) not in asked


def test_search_stops_when_time_is_up() -> None:
    times, _, gain = tune.search(knob(A, B), lambda knob, tile, i: 1.0, over=lambda: True)
    assert len(times) == 1
    assert gain == 1.0


def test_rows_are_python_of_the_tables() -> None:
    names = {"Tile": Tile}
    line = tune.source(knob(), A, 1.25, "NVIDIA H200")
    assert eval("{" + line.split("#")[0] + "}", names) == {("16", "large"): dataclasses.replace(A, stages=3)}
    assert "1.25x 128x256x64 w8s3 on NVIDIA H200" in line
    rows = next(k for k in tune.knobs("sm_90") if k.key == 4096)
    assert eval("{" + tune.source(rows, Tile(1, 4096, warps=16), 1.1, "x").split("#")[0] + "}", names) == {
        4096: Tile(1, 4096, warps=16)
    }
    flat = next(k for k in tune.knobs("sm_90") if k.table == "_POINTWISE")
    exec(tune.source(flat, Tile(1, 2048, warps=8), 1.1, "x"), names)
    assert names["_POINTWISE"] == Tile(1, 2048, warps=8)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("name", ["_PRODUCT", "_PRODUCT_ON", "_SOFTMAX_ROWS", "_POINTWISE"])
def test_the_tables_that_rows_are_for_exist(name: str) -> None:
    assert any(hasattr(module, name) for module in (matmul_tiles, pointwise, softmax))


@pytest.mark.usefixtures("fake_gpu")
def test_tuning_runs_a_candidate_as_forced() -> None:
    """Through the launcher, its result compared with the shipped tile's."""
    this = dataclasses.replace(
        knob(), shipped=Tile(32, 32, 16), calls=(("5x17x9", tune._product_call("ieee", 5, 17, 9)),)
    )  # fmt: skip
    time_of = tune._on_gpu(CPU)
    assert time_of(this, Tile(16, 32, 16), 0) is not None
    # The interpreter, like the compiler, takes powers of two alone.
    assert time_of(this, Tile(24, 32, 16), 0) is None


# Picks

HOPPER = _tiles.Device("sm_90", 132)


def test_every_job_has_every_way() -> None:
    """Pointers and descriptors, pointers and boxes; names that tell them apart; what is forced is what is picked then."""
    found = picks.jobs(HOPPER)
    assert {job.name.split(" ")[0] for job in found[:3]} == {"linear", "conv2d", "float32"}
    for job in found:
        names = [way.name for way in job.ways]
        assert names[0] == picks.PICKED
        assert len(set(names)) == len(names)
        kinds = {name.split(" ")[0] for name in names[1:]}
        assert kinds == {"pointers", "boxes" if job.name.startswith("conv2d") else "descriptors"}, job.name
        assert job.flops > 0
    assert len({job.name for job in found}) == len(found)
    assert all({name.split(" ")[0] for name in (w.name for w in job.ways[1:])} == {"pointers"} for job in picks.jobs(
        _tiles.Device("sm_80", 108)
    ))  # fmt: skip


def test_a_way_is_chosen_for_a_while() -> None:
    """And leaves nothing behind."""
    for make, ways in (
        (lambda: picks._products(HOPPER), ("pointers small", "descriptors 64x64x64")),
        (lambda: picks._convolutions(HOPPER), ("pointers small", "boxes small")),
    ):
        job = min(make(), key=lambda job: job.flops)
        for prefix in ways:
            way = next(way for way in job.ways if way.name.startswith(prefix))
            with way.chosen():
                if way.boxes is not None:
                    assert conv_tiles.takes_boxes(job.flops, torch.bfloat16, "ieee", HOPPER) is way.boxes
            assert conv_tiles.BOX_FLOPS == 500_000_000
            assert not _tiles.forced


def test_a_way_launches_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every job at its real size, without memory."""
    launched: list[str] = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, programs, *a, **meta: launched.append(kernel.__name__))
    monkeypatch.setattr(_tiles, "device", lambda device: HOPPER)
    monkeypatch.setattr(
        picks, "draw", lambda shape, dtype, device, seed: torch.empty(shape, dtype=dtype, device=device)
    )
    for this in picks.jobs(HOPPER):
        call, pointwise = this.make(torch.device("meta")), "1x1 stride 1" in this.name
        for way in this.ways:
            launched.clear()
            with way.chosen():
                call()
            assert ("_matmul_specialized_kernel" in launched) is way.name.endswith("specialized")
            tma = any(part in kernel for kernel in launched for part in ("tma", "box", "specialized"))
            assert way.name == picks.PICKED or pointwise or tma is not way.name.startswith("pointers"), (
                this.name,
                way.name,
            )


def test_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every job at its real size: the same shape and dtype, without memory."""
    monkeypatch.setattr(_launch, "launch", lambda *args, **meta: None)
    monkeypatch.setattr(_tiles, "device", lambda device: HOPPER)
    monkeypatch.setattr(
        picks, "draw", lambda shape, dtype, device, seed: torch.empty(shape, dtype=dtype, device=device)
    )
    for this in picks.jobs(HOPPER):
        assert this.torchs is not None
        ours, theirs = (make(torch.device("meta"))() for make in (this.make, this.torchs))
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), this.name
        assert (this.mode == "tf32") is this.name.startswith("tf32")


def job(name: str, flops: int) -> picks.Job:
    return picks.Job(
        name, flops, lambda device: lambda: torch.ones(1), (picks.Way(picks.PICKED, {}), picks.Way("pointers a", {}))
    )


def test_regret_and_what_follows() -> None:
    fast, slow = "descriptors 128x256x64 w8s4", "descriptors 64x64x64 w4s5"
    measured = [
        (
            job("linear large", 10**12),
            {"picked": 1.0, fast: 1.0, slow: 2.0, f"{slow} in 4 shares": 0.1, "pointers a": 3.0},
        ),
        (job("linear larger", 10**13), {"picked": 4.0, fast: 2.0, slow: 2.5, "pointers a": 6.0}),
        (job("linear small", 10**8), {"picked": 1.0, fast: 1.5, slow: 1.0, "pointers a": 0.5}),
        (job("conv2d small", 10**8), {"picked": 1.0, "boxes a": 1.5, "pointers a": 0.5}),
        (job("conv2d other", 10**7), {"picked": 1.0, "pointers a": 1.0}),
    ]
    assert picks.regret(measured[1][1]) == (2.0, fast)
    assert picks.regret(measured[4][1]) == (1.0, picks.PICKED)  # of equals the pick is the best
    shares = picks.shares(measured)
    assert shares == {"128x256x64 w8s4": pytest.approx(1.0), "64x64x64 w4s5": pytest.approx((0.5 * 0.8) ** 0.5)}
    assert picks.break_even(measured[:3], "descriptors") == 10**8
    assert picks.break_even(measured[:2], "descriptors") == 0
    assert picks.break_even(measured[4:], "boxes") is None
    text = picks.summary(measured)
    assert "linear: pointers win up to 1e+08 FLOP" in text
    assert "worst 10.00x: linear large" in text
    assert "share of 64x64x64 w4s5: 0.63" in text
    assert picks.summary([]) == "nothing was measured"
    # torch is no way of ours to compute it: it is what the pick is held against.
    beside = [(job("tf32 large", 10**12), {"picked": 2.0, fast: 1.0, "torch": 0.5})]
    assert picks.regret(beside[0][1]) == (2.0, fast)
    assert "tf32: torch takes 0.250x as long as the picks in 1 jobs (least 0.25x: tf32 large)" in picks.summary(beside)


@pytest.mark.usefixtures("fake_gpu")
def test_picks_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In shares, once, until the GPU is lost; and then without what was done."""
    monkeypatch.setattr(picks, "environment", lambda argv: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(picks, "why_not", lambda: None)
    made: list[str] = []

    def named(name: str) -> picks.Job:
        return picks.Job(
            name, 8, lambda device: lambda: (made.append(name), torch.ones(1))[1], (picks.Way(picks.PICKED, {}),),
            lambda device: lambda: torch.ones(1),
        )  # fmt: skip

    monkeypatch.setattr(picks, "jobs", lambda device: [named(f"linear {i}") for i in range(5)])
    out = tmp_path / "picks.jsonl"
    assert picks.main(["--once", "--share", "1/2", "--out", str(out)]) == 0
    assert {*made} == {"linear 1", "linear 3"}
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(clock, "lost", lambda: "illegal access")
        assert picks.main(["--once", "--out", str(out)]) == clock.LOST
    assert {*made} == {"linear 0"}
    with out.open("a") as file:
        file.write('{"job": "linear 4", "ms"')
    made.clear()
    assert picks.main(["--once", "--out", str(out)]) == 0
    assert {*made} == {"linear 2", "linear 4"}
    rows = report.read_results(out)
    assert [row["job"] for row in rows["rows"]] == [f"linear {i}" for i in (1, 3, 0, 2, 4)]
    assert (
        rows["rows"][0]["ms"] == {picks.PICKED: 1.0, picks.TORCH: 1.0} and rows["environment"]["gpu"] == "NVIDIA H200"
    )
    assert "5 of 5 jobs" in capsys.readouterr().out


def test_a_way_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("out of resources\nshared memory")

    this = picks.Job("linear broken", 1, lambda device: broken, (picks.Way(picks.PICKED, {}),))
    assert picks.measure(this, picks._on_gpu(CPU)) == {}
    assert "linear broken, picked: RuntimeError: ['out of resources']" in capsys.readouterr().out


def test_a_wrong_way_is_no_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Clock:
        def __init__(self, *_: Any):
            pass

        def sample(self) -> clock.Sample:
            return clock.Sample(2.5, 0.0, 0.0)

    monkeypatch.setattr(clock, "Clock", Clock)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    this = picks.Job(
        "linear", 1, lambda device: lambda: torch.ones(3) + bool(_tiles.forced),
        (picks.Way(picks.PICKED, {}), picks.Way("pointers a", dict(product=Tile(16, 16, 16))), picks.Way("pointers b", {})),
    )  # fmt: skip
    assert picks.measure(this, picks._on_gpu(CPU)) == {picks.PICKED: 2.5, "pointers b": 2.5}
    assert "pointers a: AssertionError" in capsys.readouterr().out
