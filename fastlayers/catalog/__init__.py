"""The catalog of our layers: a file per family, a row per layer, from which all that the package says and tests of it follows."""

from __future__ import annotations

import importlib
import itertools

import torch

from .. import modules
from ..fusion import plan
from .row import Case, Classes, Floats, Probabilities, Row

__all__ = ["CLASSES", "ROWS", "Case", "Classes", "Floats", "Probabilities", "Row", "table"]

_FAMILIES = [
    importlib.import_module(f".{name}", __name__)
    for name in (
        "linear",
        "gated_mlp",
        "rotary",
        "conv",
        "activation",
        "softmax",
        "norm",
        "batch_norm",
        "loss",
        "pooling",
        "upsampling",
        "fold",
        "elementwise_loss",
        "embedding",
        "distance",
        "dropout",
        "recurrent",
        "attention",
        "transformer",
        "container",
    )
]

ROWS: tuple[Row, ...] = tuple([row for family in _FAMILIES for row in family.ROWS])

CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(modules, name)
    for row in ROWS
    if hasattr(modules, row.name)
    for name in (row.name, *((f"Lazy{row.name}",) if row.lazy else ()))
}
"""Our class for each of torch.nn's that we have. Some rows are of functions without one."""

for _row in ROWS:
    if _row.role is not None:
        plan.register_role(getattr(modules, _row.name), _row.role)
for _family in _FAMILIES:
    for _pattern in getattr(_family, "PATTERNS", ()):
        plan.register_pattern(_pattern)
    for _cls, _role in getattr(_family, "TORCH_ROLES", {}).items():
        plan.register_role(_cls, _role)


def table() -> str:
    """The README's table of layers, in Markdown."""
    always = "CPU tensors, tensor subclasses, functorch transforms, forward-mode AD, other dtypes"
    rows = ["| Layer | On Triton kernels, forward and backward | Torch's own function takes |", "|---|---|---|"]
    # Neighbours of whom the same is said share a line, as MaxPool1d to 3d.
    for said, same in itertools.groupby(ROWS, lambda row: f"{row.supports} | {row.falls_back}"):
        rows.append(f"| {', '.join(f'`{row.name}`' for row in same)} | {said} |")
    return "\n".join([*rows, f"| all | float16, bfloat16, float32, float64 | {always} |"])
