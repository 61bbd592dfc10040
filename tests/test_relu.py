"""ReLU: NaN, and in-place with torch's exact semantics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_inf_and_signed_zero(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), float("-inf"), 1e-7, -1e-7], dtype=dtype, device=device)
    y = FL.relu(x)
    torch.testing.assert_close(y, F.relu(x), rtol=0, atol=0, equal_nan=True)
    dy = torch.arange(1.0, 8, dtype=dtype, device=device)
    grads = [
        torch.autograd.grad(f(leaf), leaf, dy)[0] for f in (FL.relu, F.relu) for leaf in [x.clone().requires_grad_()]
    ]
    assert torch.equal(*grads)


def both(action: Callable[[Callable[..., torch.Tensor]], object]) -> None:
    """The same outcome, or the same exception, from ours and from torch's."""
    outcomes = []
    for relu in (FL.relu, F.relu):
        try:
            outcomes.append(action(relu))
        except Exception as error:
            outcomes.append((type(error), "version" in str(error)))
    mine, other = outcomes
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other)
    else:
        assert mine == other


def test_inplace_returns_its_input_and_counts_a_version(device: torch.device) -> None:
    for shape, make in (((5, 3), lambda x: x), ((5, 4), lambda x: x[:, ::2]), ((5, 3), lambda x: x.t())):
        for grad in (False, True):

            def action(relu: Callable[..., torch.Tensor], shape=shape, make=make, grad=grad) -> object:
                torch.manual_seed(3)
                x = torch.randn(shape, device=device)
                base = x.requires_grad_(grad) * 1
                view = make(base) if not grad else base
                y = relu(view, inplace=True)
                assert y is view
                return base._version, base.detach().clone().tolist()

            both(action)


def test_inplace_after_its_input_was_saved(device: torch.device) -> None:
    """exp saves its output: changing it is an error in backward, which only a version count can raise."""

    def action(relu: Callable[..., torch.Tensor]) -> object:
        x = torch.linspace(-1, 1, 7, device=device).requires_grad_()
        y = x.exp() - 1
        z = y.exp()
        relu(z, inplace=True)
        z.sum().backward()
        return x.grad

    both(action)


def test_inplace_without_grad_after_it_was_saved(device: torch.device) -> None:
    def action(relu: Callable[..., torch.Tensor]) -> object:
        x = torch.linspace(-1, 1, 7, device=device).requires_grad_()
        buffer = torch.linspace(-1, 1, 7, device=device)
        y = x * buffer
        relu(buffer, inplace=True)
        y.sum().backward()
        return x.grad

    both(action)


def test_inplace_gradient_and_second_derivative(device: torch.device) -> None:
    def action(relu: Callable[..., torch.Tensor]) -> object:
        x = torch.linspace(-1, 1, 7, device=device).requires_grad_()
        (g,) = torch.autograd.grad(relu(x * 2, inplace=True).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0]

    both(action)


@pytest.mark.parametrize("case", ["leaf", "expanded", "view of a leaf", "chunk", "inference"])
def test_inplace_where_torch_objects_nothing_is_modified(case: str, device: torch.device) -> None:
    def action(relu: Callable[..., torch.Tensor]) -> object:
        x = torch.linspace(-1, 1, 6, device=device)
        before = x.clone()
        if case == "inference":
            with torch.inference_mode():
                x = x * 1
        target = {
            "leaf": lambda: x.requires_grad_(),
            "expanded": lambda: x[:, None].expand(6, 3),
            "view of a leaf": lambda: x.requires_grad_().view(2, 3),
            "chunk": lambda: (x.requires_grad_() * 1).chunk(2)[0],
            "inference": lambda: x,
        }[case]()
        try:
            with fastlayers.policy("auto"):
                relu(target, inplace=True)
        except RuntimeError:
            assert torch.equal(x.detach(), before)
            raise
        return target.detach()

    both(action)


def test_other_dtypes_are_torchs(device: torch.device) -> None:
    x = torch.arange(-3, 3, device=device)
    with pytest.raises(fastlayers.NotAccelerated, match=r"dtype torch\.int64"):
        FL.relu(x)
    with fastlayers.policy("auto"):
        assert torch.equal(FL.relu(x), F.relu(x))


def test_strides_are_torchs(device: torch.device) -> None:
    """Of dimensions of size 1 as well, which torch chooses anew where it recognises a memory format."""
    last = torch.channels_last
    for shape in ((1, 2, 3, 4), (2, 1, 3, 4), (2, 3, 1, 1), (1, 1, 1, 1), (1, 5, 1, 4)):
        x = torch.randn(shape, device=device).contiguous(memory_format=last)
        views = [x, torch.stack([x, x])[0], x.mT, x.transpose(0, 1), x[..., :1], x.unsqueeze(0), x.expand(2, *shape)]
        for view in (*views, x.as_strided(x.shape, (7, *x.stride()[1:])) if shape[0] == 1 else x):
            for _ in range(3):
                assert FL.relu(view).stride() == F.relu(view).stride()
