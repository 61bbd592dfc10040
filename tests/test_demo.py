"""The demo passes where it should, and fails where it must: wrong numbers, or a layer that torch computed.

Looks inside: it puts wrong launchers in the place of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlayers

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from replays import forget

from fastlayers import demo, selfcheck

LINEAR, CONV, PATCHES = (dataclasses.replace(network, batch=8) for network in demo.NETWORKS)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Launches remembered before or within are no others'."""
    forget()
    yield
    forget()


@pytest.fixture(autouse=True)
def _as_on_the_command_line() -> Iterator[None]:
    with fastlayers.policy("auto"), selfcheck.strict_float32(), demo.threadpool_limits(1):
        yield


def compare(network: demo.Network) -> demo.Outcome:
    train, test = demo.digits(selfcheck.device())
    few = demo.Digits(test.images[:8], test.labels[:8])
    return demo.compare(network, train, few, seed=0, epochs=1, steps=3)


def scaled(f: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The same launcher, but `when` the arguments say so, its result is 1 % too large."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = f(*args, **kwargs)
        if when(**kwargs):
            (result[0] if isinstance(result, tuple) else args[3] if f.__name__ == "conv2d" else result).mul_(1.01)
        return result

    return wrong


def test_sound_networks_pass(tmp_path: Path) -> None:
    outcomes = [compare(LINEAR), compare(CONV), compare(PATCHES)]
    assert [outcome.problems for outcome in outcomes] == [[], [], []]
    assert all(layer.backward for outcome in outcomes for layer in outcome.layers if layer.path == "triton")
    assert all("Flatten" in layer.name for outcome in outcomes for layer in outcome.layers if layer.path == "torch")
    demo.plot(outcomes, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.usefixtures("forgotten")
def test_a_wrong_relu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlayers.ops.conv as ops

    wrong = scaled(ops.kernels.conv2d, lambda **kwargs: kwargs["then"] is not None)
    monkeypatch.setattr(ops.kernels, "conv2d", wrong)
    (problem,) = compare(CONV).problems
    assert "stray" in problem


@pytest.mark.usefixtures("forgotten")
def test_a_wrong_weight_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlayers.ops.linear as ops

    monkeypatch.setattr(ops, "matmul", scaled(ops.matmul, lambda **kwargs: "operand_sums" in kwargs))
    (problem,) = compare(LINEAR).problems
    assert "stray" in problem


def test_torchs_path_fails() -> None:
    with fastlayers.policy("torch"):
        problems = compare(LINEAR).problems
    assert len(problems) == 5
    assert all('was not accelerated: policy is "torch"' in problem for problem in problems)


def test_a_problem_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = compare(LINEAR)
    monkeypatch.setattr(demo, "NETWORKS", (LINEAR,))
    monkeypatch.setattr(demo, "compare", lambda *_, **__: compared)
    file = tmp_path / "loss.png"
    assert demo.main(0, 1, file, selfcheck.device()) == 0
    compared.problems.append("something is off")
    assert demo.main(0, 1, file, selfcheck.device()) == 1
    assert "something is off" in capsys.readouterr().out


@pytest.mark.parametrize("layer", selfcheck.LAYERS)
def test_selfcheck(layer: str) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert selfcheck.problem(layer, dtype) is None


@pytest.mark.parametrize("wrong", [False, True])
def test_what_the_selfcheck_prints(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its exit status, a line for each layer, what is wrong, and what is accelerated where."""
    monkeypatch.setattr(selfcheck, "LAYERS", {name: selfcheck.LAYERS[name] for name in ("Linear", "AvgPool3d")})
    if wrong:
        monkeypatch.setattr(selfcheck, "problem", lambda layer, dtype: "too large" if layer == "Linear" else None)
    assert selfcheck.main(by_command=False) == wrong
    lines = capsys.readouterr().out.splitlines()
    (linear,) = [line.split()[1:] for line in lines if line.startswith("  Linear  ")]
    (pooling,) = [line.split()[1:] for line in lines if line.startswith("  AvgPool3d  ")]
    assert set(linear) == {"WRONG" if wrong else "ok"}
    assert set(pooling) == {"ok"}
    assert len(linear) == len(pooling) >= 3
    assert any(line == "  Linear in float32: too large" for line in lines) == wrong
    assert any(line.startswith("Don't rely on fastlayers") for line in lines) == wrong
    assert f"  torch        {torch.__version__}" in lines
    assert "  Linear, AvgPool3d" in lines
    assert any(line.startswith("  in float16, ") for line in lines)


@pytest.mark.usefixtures("forgotten")
def test_selfcheck_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlayers.ops.linear as ops

    monkeypatch.setattr(ops, "matmul", scaled(ops.matmul, lambda **kwargs: "operand_sums" in kwargs))
    found = selfcheck.problem("Linear", torch.float32)
    assert found is not None
    assert found.startswith("gradient of weight is off")
