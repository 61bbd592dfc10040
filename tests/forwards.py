"""Forwards that do more than call modules and torch's functions on their inputs. Each is a function of a `Between` and its input.
What may be fused stands in `TRACED`; what a graph can't do stands in `REFUSED`, with a part of the reason that is given."""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

HISTORY: list[Any] = []
TABLE: dict[str, Any] = {}
COUNTS = {"calls": 0}
SCALE = 2.0
Pair = namedtuple("Pair", ["first", "second"])


def appends_to_its_own_list(m: Any, x: torch.Tensor) -> Any:
    m.kept.append(x)
    return F.relu(m.conv(x))


def appends_to_a_global_list(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    HISTORY.append(y)
    return F.relu(y)


def adds_to_a_global_list(m: Any, x: torch.Tensor) -> Any:
    history = HISTORY
    history += [m.conv(x)]
    return F.relu(m.conv(x))


def writes_into_a_dictionary(m: Any, x: torch.Tensor) -> Any:
    m.table["x"] = m.conv(x)
    return F.relu(m.conv(x))


def writes_into_a_global_dictionary(m: Any, x: torch.Tensor) -> Any:
    TABLE["x"] = x
    return F.relu(m.conv(x))


def updates_a_dictionary(m: Any, x: torch.Tensor) -> Any:
    m.table.update(x=x)
    return F.relu(m.conv(x))


def counts_in_a_global(m: Any, x: torch.Tensor) -> Any:
    COUNTS["calls"] += 1
    return F.relu(m.conv(x))


def writes_data(m: Any, x: torch.Tensor) -> Any:
    m.conv.weight.data = m.conv.weight.data * 2
    return F.relu(m.conv(x))


def sets_an_attribute(m: Any, x: torch.Tensor) -> Any:
    m.last = m.conv(x)
    return F.relu(m.last)


def sets_an_attribute_by_name(m: Any, x: torch.Tensor) -> Any:
    setattr(m, "last", x)  # noqa: B010
    return F.relu(m.conv(x))


def sets_an_attribute_in_its_dictionary(m: Any, x: torch.Tensor) -> Any:
    m.__dict__["last"] = x
    return F.relu(m.conv(x))


def registers_a_buffer(m: Any, x: torch.Tensor) -> Any:
    m.register_buffer("late", torch.zeros(1))
    return F.relu(m.conv(x))


def registers_a_hook(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 2)
    return F.relu(y)


def registers_a_hook_at_once(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    y.register_hook(print)
    return F.relu(y)


def checkpoints(m: Any, x: torch.Tensor) -> Any:
    return F.relu(checkpoint(m.conv, x, use_reentrant=False))


def reads_the_clock(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) + time.time()


def draws_a_number(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) * random.random()


def decides_by_lot(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) if random.random() < 0.5 else x


def reads_the_environment(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) if os.environ.get("FASTLAYERS_FLAG") else x


def prints(m: Any, x: torch.Tensor) -> Any:
    print("called")
    return F.relu(m.conv(x))


def warns(m: Any, x: torch.Tensor) -> Any:
    warnings.warn("called", stacklevel=2)
    return F.relu(m.conv(x))


def seeds(m: Any, x: torch.Tensor) -> Any:
    torch.manual_seed(0)
    return F.relu(m.conv(x)) + torch.rand(1)


def switches_the_default_dtype(m: Any, x: torch.Tensor) -> Any:
    torch.set_default_dtype(torch.float32)
    return F.relu(m.conv(x))


def takes_gradients(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    return F.relu(torch.autograd.grad(y.sum(), x)[0])


def decides_by_size(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) if x.shape[0] > 1 else x


def decides_by_grad_mode(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) if torch.is_grad_enabled() else x


def loops_over_data(m: Any, x: torch.Tensor) -> Any:
    return torch.stack([F.relu(m.conv(image)) for image in x])


def loops_a_number_of_times(m: Any, x: torch.Tensor) -> Any:
    for _ in range(x.size(0)):
        x = F.relu(m.conv(x))
    return x


def tries(m: Any, x: torch.Tensor) -> Any:
    try:
        return F.relu(m.conv(x))
    finally:
        m.done = True


def evaluates_text(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(eval("x")))


def makes_a_module(m: Any, x: torch.Tensor) -> Any:
    return torch.nn.Conv2d(2, 2, 1)(F.relu(m.conv(x)))


def imports(m: Any, x: torch.Tensor) -> Any:
    import math

    return F.relu(m.conv(x)) * math.pi


def switches_training(m: Any, x: torch.Tensor) -> Any:
    m.norm.eval()
    return F.relu(m.norm(m.conv(x)))


def asks_what_it_is_given(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) if isinstance(x, torch.Tensor) else x


def generates(m: Any, x: torch.Tensor) -> Any:
    return m.conv((yield x))


def fails(m: Any, x: torch.Tensor) -> Any:
    raise NotImplementedError("abstract")


def sorts_objects(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) * len(sorted(m.objects))


def calls_a_method_that_keeps(m: Any, x: torch.Tensor) -> Any:
    m.meter.update(1)
    return F.relu(m.conv(x))


REFUSED: dict[Any, str] = {
    appends_to_its_own_list: "writes into a list that isn't the call's own",
    appends_to_a_global_list: "writes into a list that isn't the call's own",
    adds_to_a_global_list: "writes into a list that isn't the call's own",
    writes_into_a_dictionary: "writes into a dict that isn't the call's own",
    writes_into_a_global_dictionary: "writes into a dict that isn't the call's own",
    updates_a_dictionary: "writes into a dict that isn't the call's own",
    counts_in_a_global: "writes into a dict that isn't the call's own",
    writes_data: "assigns to an attribute",
    sets_an_attribute: "assigns to an attribute",
    sets_an_attribute_by_name: "calls setattr",
    sets_an_attribute_in_its_dictionary: "__dict__ is computed in a way that isn't traced",
    registers_a_buffer: "calls torch.nn.modules.module.Module.register_buffer",
    registers_a_hook: "depends on what is only known at a call",
    registers_a_hook_at_once: "hands on a builtin_function_or_method",
    checkpoints: "calls torch.utils.checkpoint.checkpoint",
    reads_the_clock: "calls time.time",
    draws_a_number: "random",
    decides_by_lot: "random",
    reads_the_environment: "environ",
    prints: "calls print",
    warns: "calls _warnings.warn",
    seeds: "calls torch.random.manual_seed",
    switches_the_default_dtype: "set_default_dtype",
    takes_gradients: "calls torch.autograd.grad",
    decides_by_size: "depends on what is only known at a call",
    decides_by_grad_mode: "is_grad_enabled",
    loops_over_data: "depends on what is only known at a call",
    loops_a_number_of_times: "depends on what is only known at a call",
    tries: "a try statement isn't traced",
    evaluates_text: "calls eval",
    makes_a_module: "calls torch.nn.modules.conv.Conv2d",
    imports: "Import of Python's syntax isn't traced",
    switches_training: "calls torch.nn.modules.module.Module.eval",
    asks_what_it_is_given: "depends on what is only known at a call",
    generates: "gives its results one after the other",
    fails: "is reached",
    sorts_objects: "hands objects to sorted",
    calls_a_method_that_keeps: "assigns to an attribute",
}


def keeps_what_it_makes(m: Any, x: torch.Tensor) -> Any:
    found, by_name = [], {}
    for i, layer in enumerate((m.conv, m.other)):
        x = layer(x)
        found.append(F.relu(x))
        by_name[f"layer{i}"] = x
    found += [x]
    first, *others = found
    by_name.update(first=first)
    return torch.cat(others, 1), by_name, tuple(found), len(found)


def drops_out(m: Any, x: torch.Tensor) -> Any:
    return F.dropout(F.relu(m.conv(x)), 0.5, training=m.training)


def drops_out_by_a_number(m: Any, x: torch.Tensor) -> Any:
    return F.dropout(F.relu(m.conv(x)), m.rate, m.training)


def decides_by_training(m: Any, x: torch.Tensor) -> Any:
    y = F.relu(m.conv(x))
    return (y, m.other(x)) if m.training and m.flag else y


def decides_by_numbers(m: Any, x: torch.Tensor) -> Any:
    for _ in range(m.times):
        x = F.relu(m.conv(x)) * m.rate
    return x if m.what is None else x * m.what["factor"] * m.objects[0].factor * SCALE * math.sqrt(m.times)


def draws_noise(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x)) + torch.rand(1) + torch.zeros(x.shape[0], 1, 1, 1)


def calls_itself(m: Any, x: torch.Tensor, depth: int = 2) -> Any:
    return calls_itself(m, F.relu(m.conv(x)), depth=depth - 1) if depth > 0 else x


def gives_a_pair(m: Any, x: torch.Tensor) -> Any:
    y = F.relu(m.conv(x))
    pair = Pair(y, second=m.other(y))
    return pair, OrderedDict(out=pair.first, aux=pair[1]), {"x": x, "shape": tuple(x.shape), "pi": math.pi}


def unpacks(m: Any, x: torch.Tensor) -> Any:
    n, c, *_ = (2, 2, 3)
    a, b = F.relu(m.conv(x)).chunk(c, dim=1)
    batch, channels, height, width = x.shape
    assert height * width > n - 2, f"an image of {height} x {width:d}"
    return a.reshape(batch, -1) * b.reshape(-1, height * width // 1), channels, sum([a, b]), max(height, width)


def compares(m: Any, x: torch.Tensor) -> Any:
    x = x if m.what is not None else x * 2
    mask = (x > 0) & (x.abs() < 1) | ~(x != 2)
    y = torch.where(mask, m.conv(x), -m.other(x))
    return F.relu(y) @ y.transpose(-1, -2) if 0 < m.times <= 9 and not isinstance(m.conv, torch.nn.Linear) else y


def reads_modules(m: Any, x: torch.Tensor) -> Any:
    layers = [layer for layer in m.children() if isinstance(layer, torch.nn.Conv2d)]
    total = 0
    for layer, factor in zip(reversed(layers), (1, 2, 3)):  # noqa: B905
        total = total + F.relu(layer(x)) * factor / layer.out_channels + layer.weight.sum()
    return total if hasattr(m, "norm") and getattr(m, "nothing", None) is None else x


def edits_in_place(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    y[:, 0], size = 1, x.size(0)
    size -= 1
    y[:, 1] += 2
    y.mul_(0.5).clamp_(max=1)
    m.buffer.add_(1)
    return F.relu(y) + m.buffer, size


def formats_text(m: Any, x: torch.Tensor) -> Any:
    return {f"layer {m.times:>3}": F.relu(m.conv(x)), "a" + "b" * 2: x}


TRACED = [
    keeps_what_it_makes, drops_out, drops_out_by_a_number, decides_by_training, decides_by_numbers, draws_noise, calls_itself,
    gives_a_pair, unpacks, compares, reads_modules, edits_in_place, formats_text,
]  # fmt: skip


class Asserts(torch.nn.Module):
    """Here, since pytest rewrites the asserts of its own files."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2, f"no third: {x.shape[2]}"
        return F.relu(self.fc(x))


class AssertsShape(Asserts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2, f"two, not {x.dim()} of {x.shape}"
        return F.relu(self.fc(x))
