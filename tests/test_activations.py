"""Activations as functions of numbers: accuracy over the whole range, special values, both forms of their derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from activations import OPTIONS, one_by_one

import fastlayers
import fastlayers.functional as F
from fastlayers import nn
from fastlayers.kernels.pointwise import pointwise, pointwise_grad
from fastlayers.kernels.runtime import launch
from fastlayers.ops.activation import RULES, Activation
from fastlayers.testing import assert_within_budget

nan = float("nan")
ACTIVATIONS = [Activation(name, args) for name in RULES for args in OPTIONS.get(name, [()])]
each = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: "-".join(map(str, (a.function, *a.args))))


def forms(activation: Activation) -> list[str]:
    """What its derivative can be computed from."""
    return ["input"] if activation.saves == "input" else ["input", "output"]


def ours(x: torch.Tensor, activation: Activation) -> list[torch.Tensor]:
    """y, and dy/dx in every form."""
    y = torch.full_like(x, nan)
    pointwise(x, y, activation)
    found = [y]
    for of in forms(activation):
        if of == "input" and RULES[activation.function].keeps == "output":
            continue  # there is no such form, since torch saves the output as well
        dx = torch.full_like(x, nan)
        pointwise_grad(torch.ones_like(x), x if of == "input" else y, dx, activation, of)
        found.append(dx)
    return found


def torchs(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = activation(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(x))[0]


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_whole_range(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    """From 1e-12 to 100, on both sides."""
    near, far = torch.logspace(-12, 0, 500, device=device), torch.linspace(-30, 30, 1001, device=device)
    x = torch.cat([near, -near, far, 3 * far]).to(dtype)
    y, slope = torchs(x, activation)
    right = torchs(x.double(), activation)
    found, *slopes = ours(x, activation)
    assert_within_budget(found, y, right[0])
    for dx in slopes:
        assert_within_budget(dx, slope, right[1])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    """NaN, infinities and numbers whose exponential or square overflows, as torch."""
    special = [-math.inf, -1e20, -1e4, -200.0, -3.0, -0.0, 0.0, 3.0, 6.0, 200.0, 1e4, 1e20, math.inf, nan]
    x = torch.tensor(special, dtype=dtype, device=device)
    y, slope = one_by_one(torchs, x, activation)
    found, *slopes = ours(x, activation)
    torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6, equal_nan=True)
    for dx in slopes:
        torch.testing.assert_close(dx, slope, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["tanh", "elu", "celu", "selu", "logsigmoid", "softplus", "sigmoid", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_results_keep_their_digits(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Relative errors near 0 and in the tails, where differences of nearly equal numbers have no digits left."""
    activation = Activation(name, OPTIONS.get(name, [()])[0])
    small = torch.logspace(-8, -1, 500, device=device)
    x = torch.cat([small, -small, torch.linspace(-80, -10, 500, device=device), -small * 0]).to(dtype)
    if name in ("logsigmoid",):
        x = -x
    exact = torch.tensor([_exact(activation, v) for v in x.tolist()], dtype=torch.float64, device=device)
    y = ours(x, activation)[0].double()
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13  # the argument of an exponential has 2^-24 of 80
    torch.testing.assert_close(y, exact, rtol=tolerance, atol=1e-38)


def _exact(activation: Activation, x: float) -> float:
    (a,) = activation.args[:1] or (1.0,)
    match activation.function:
        case "tanh":
            return math.tanh(x)
        case "elu":
            return x if x > 0 else a * math.expm1(x)
        case "celu":
            return x if x > 0 else a * math.expm1(x / a)
        case "selu":
            return 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x))
        case "logsigmoid":
            return min(x, 0.0) - math.log1p(math.exp(-abs(x)))
        case "softplus":
            return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
        case "sigmoid":
            return 1 / (1 + math.exp(-x))
        case _:
            return x / (1 + math.exp(-x))


@pytest.mark.parametrize("name", ["hardshrink", "softshrink"])
@pytest.mark.parametrize("lambd", [0.3, 0.7, 0.5, 1e-7, 65504.0])
def test_bounds_that_16_bits_round(name: str, lambd: float, device: torch.device) -> None:
    """An input that is as large as the rounded bound is within it."""
    bound = torch.tensor(lambd).half()
    x = torch.stack([bound, -bound, bound * 0.9, bound.nextafter(torch.tensor(torch.inf).half())]).to(device)
    found = []
    for functional in (F, TF):
        given = x.clone().requires_grad_()
        y = getattr(functional, name)(given, lambd)
        y.backward(torch.ones_like(y))
        found.append((y, given.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("name", "joins"), [("Hardshrink", False), ("Softshrink", False), ("LeakyReLU", True)])
def test_what_torch_rounds_is_not_joined(name: str, joins: bool, launched: list[str], device: torch.device) -> None:
    """A kernel of several layers computes with the options as they are."""
    x = torch.tensor([[0.3, 2.0, -9.0]], dtype=torch.float16, device=device)
    found = []
    for space in (nn, torch.nn):
        model = space.Sequential(space.Linear(3, 3, bias=False), getattr(space, name)(0.3)).half().to(device)
        model[0].weight.data = torch.eye(3, device=device).half()
        given = x.clone().requires_grad_()
        y = model(given)
        y.backward(torch.ones_like(y))
        found.append((y, given.grad))
        if space is nn:
            assert ("_pointwise_kernel" not in launched) == joins
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)


def test_a_factor_that_is_no_number(device: torch.device) -> None:
    x, factor = torch.randn(5, device=device), torch.tensor(1.5, device=device)
    with fastlayers.policy("auto"):
        torch.testing.assert_close(F.swish(x, factor), x * torch.sigmoid(factor * x))  # type: ignore[arg-type]


def test_options_are_arguments_of_one_kernel(launched: list[str], device: torch.device) -> None:
    """Two layers of a class, whose options change between calls, alone and in other kernels; float64 isn't rounded."""
    layers = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3), nn.LeakyReLU(0.3)).double().to(device)
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    for slope in (0.1, 1 / 3, -2, 1, True):
        layers[1].negative_slope = slope
        h = TF.leaky_relu(layers[0](x), slope)
        right = TF.leaky_relu(TF.linear(h, layers[2].weight, layers[2].bias), 0.3)
        torch.testing.assert_close(layers(x), right, rtol=1e-14, atol=1e-14)
        y = torch.randn(7, dtype=torch.float64, device=device)
        assert torch.equal(F.leaky_relu(y, slope), TF.leaky_relu(y, slope))
    assert {*launched} == {"_matmul_kernel", "_pointwise_kernel"}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda f, x: f.celu(x, 0.0), None),
        (lambda f, x: f.celu(x, -1.0), "an alpha that isn't positive"),
        (lambda f, x: f.softplus(x, -1.0), "a beta that isn't positive"),
        (lambda f, x: f.softshrink(x, -1.0), None),
        (lambda f, x: f.softshrink(x, math.inf), None),
        (lambda f, x: f.hardshrink(x.half(), 70000.0), None),
        (lambda f, x: f.hardtanh(x, 2.0, 1.0), None),
        (lambda f, x: f.leaky_relu(x, "0.1"), None),
        (lambda f, x: f.elu(x, 1j), None),
        (lambda f, x: f.silu(x.requires_grad_() * 1, inplace=True), "writing into what the derivative needs"),
        (lambda f, x: f.threshold(x.requires_grad_() * 1, 0.1, 20.0, True), "writing into what the derivative needs"),
    ],
)
def test_what_torch_takes(call: object, reason: str | None, device: torch.device) -> None:
    """torch's error where it has one, else its result and the reason."""
    x = torch.randn(3, 4, device=device)
    if reason is None:
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            call(TF, x.clone())  # type: ignore[operator]
        with pytest.raises(theirs.type, match=r"(?s).*"):
            call(F, x.clone())  # type: ignore[operator]
        return
    with fastlayers.policy("auto"):
        torch.testing.assert_close(call(F, x.clone()), call(TF, x.clone()))  # type: ignore[operator]
        (decision,) = fastlayers.explain(call, F, x.clone())
    assert decision.reason == reason


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.inplace])
def test_in_place(name: str, device: torch.device) -> None:
    """The input is the result, with its version counted, and with the right gradient where the output is enough for it."""
    args = OPTIONS.get(name, [()])[0]
    x = torch.randn(3, 5, device=device, requires_grad=True)
    with fastlayers.policy("auto"):
        h = x * 1
        version = h._version
        y = getattr(F, name)(h, *args, inplace=True)
        assert y is h
        assert h._version == version + 1
    right = getattr(TF, name)(x, *args)
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(right.sum(), x))
    with torch.no_grad():
        y = getattr(F, name)(x * 1, *args, inplace=True)
    torch.testing.assert_close(y, right)


def test_what_autocast_widens_is_not_joined(device: torch.device) -> None:
    """On a GPU, autocast has torch compute softplus in float32."""
    layers = nn.Sequential(nn.Linear(4, 5), nn.Softplus()).to(device)
    x = torch.randn(3, 4, device=device)
    assert len(fastlayers.explain(layers, x).decisions) == 1
    with torch.autocast(device.type, torch.bfloat16):
        assert len(fastlayers.explain(layers, x).decisions) == 2


@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_sums_and_means_are_not_copied(
    last: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """torch expands them, and the kernel reads them as they are."""
    run, read = launch.launch, []

    def watch(kernel: Any, programs: int, dy: torch.Tensor, *args: Any, **meta: Any) -> None:
        read.append(dy.data_ptr())
        run(kernel, programs, dy, *args, **meta)

    monkeypatch.setattr(launch, "launch", watch)
    x = torch.randn(2, 6, 5, 4, device=device)
    x = x.to(memory_format=torch.channels_last) if last else x
    for dims in ((0, 1, 2, 3), (2, 3), (0, 1), (1,), (3,), (0, 2, 3), (0, 3)):
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        dy, dx = torch.randn(shape, device=device), torch.full_like(x, nan)
        pointwise_grad(dy.expand_as(x), x, dx, Activation("silu"))
        leaf = x.detach().requires_grad_()
        TF.silu(leaf).backward(dy.expand_as(x))
        torch.testing.assert_close(dx, leaf.grad)
        four = dims == ((3,) if last else (1,)) or dims == (
            0,
            3,
        )  # dimensions that don't merge, of which the kernel takes three
        assert four or read[-1] == dy.data_ptr(), dims
