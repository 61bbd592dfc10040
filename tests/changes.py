"""Ways in which programs change the parameters of a model between two calls. Each takes a Sequential of Linear(6, 5), an
activation and Linear(5, 4)."""

from __future__ import annotations

from typing import Any

import torch


def replace(model: Any) -> None:
    model[0].weight = torch.nn.Parameter(model[0].weight.detach() * 2 + 1)


def swap_data(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.clone() - 1


def edit_in_place(model: Any) -> None:
    with torch.no_grad():
        model[0].bias.add_(3)
        model[2].weight.data.mul_(-2)


def load(model: Any) -> None:
    model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()})


def assign(model: Any) -> None:
    model.load_state_dict({k: v.flip(0).clone() for k, v in model.state_dict().items()}, assign=True)


def restride(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.T.contiguous().T


def unalign(model: Any) -> None:
    w = model[0].weight.data
    flat = torch.empty(w.numel() + 1, device=w.device, dtype=w.dtype)
    model[0].weight.data = flat[1:].view(w.shape).copy_(w)


def widen(model: Any) -> None:
    extra = torch.linspace(-1, 1, 7 * 6, device=model[0].weight.device).view(7, 6)
    model[0].weight.data, model[0].bias.data = extra, extra[:, 0].clone()
    model[2].weight.data = extra.flatten()[:28].view(4, 7).clone()


def drop_bias(model: Any) -> None:
    model[0].bias = None


def to_double(model: Any) -> None:
    model.double()


def freeze(model: Any) -> None:
    model[0].weight.requires_grad_(False).neg_()
    model[0].weight.requires_grad_()


def resize(model: Any) -> None:
    weight, bias = model[2].weight.requires_grad_(False), model[2].bias.requires_grad_(False)
    values = weight.repeat(2, 1) - 0.5
    weight.resize_(8, 5).copy_(values)
    bias.resize_(8).copy_(values[:, 0])
    model.requires_grad_()


CHANGES = [
    replace, swap_data, edit_in_place, load, assign, restride, unalign, widen, drop_bias, to_double, freeze, resize,
]  # fmt: skip
