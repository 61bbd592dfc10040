"""`python -m fastlayers`: what this machine has, whether our layers agree with torch's, and what is accelerated."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import textwrap
from collections.abc import Iterator
from typing import Any, cast

import torch

from . import __version__, _kernels, _torch, nn
from .catalog import ROWS, Case, Floats
from .dispatch import policy, support

LAYERS: dict[str, Case] = {row.name: next(iter(row.cases.values())) for row in ROWS if not row.random}
"""What is checked: the first case of each of the catalog's rows."""
COMPOSED = {row.name for row in ROWS if row.operation is None}
"""Layers that consist of others, each of which rounds."""


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """float32 without TF32, in torch and in the kernels, which read the same switches."""
    # cuDNN's by its older name, which sets all of its new ones: torch takes badly to a mixture, and torch.export asks.
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    before = matmul.fp32_precision, cudnn.allow_tf32
    matmul.fp32_precision, cudnn.allow_tf32 = "ieee", False
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.allow_tf32 = before


def device() -> torch.device:
    """Where the kernels would run: the GPU, or the CPU if Triton interprets."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def why_not(dtype: torch.dtype) -> str | None:
    """What speaks against the kernels for every tensor of this dtype on this machine."""
    x = torch.empty(1, dtype=dtype, device=device())
    return support.unsupported((x,), (x,), None)


def _floating(results: Any) -> list[torch.Tensor]:
    """The floating tensors among what a layer returns."""
    return [t for t in _torch.tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def problem(layer: str, dtype: torch.dtype) -> str | None:
    """How one of our layers disagrees with torch's, if it does, in its output or in the gradient of its input or weights.

    Errors are measured against torch in float64. Allowed is twice torch's own error in `dtype`, plus one rounding of the largest
    value, or eight where a layer consists of others: torch may happen to find the nearest number of the dtype, and the number
    beside it isn't wrong. In float64 itself, and in a dtype in which torch doesn't compute this layer, torch's error is
    estimated as its error in float32, scaled to the dtype, plus two roundings.
    """
    case = LAYERS[layer]
    coarse = torch.float32 if dtype == torch.float64 else dtype
    roundings = (2 if dtype == torch.float64 else 1) * (8 if layer in COMPOSED else 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs, ours = (cast(torch.nn.Module, case.make(space)) for space in (torch.nn, nn))
        # Numbers that every dtype at play can hold, so that all compute the same thing.
        arguments = case.arguments(dtype)
        drawn = {name: (torch.randn(p.shape) / 4).to(dtype) for name, p in theirs.named_parameters()}
        weights = dict(theirs.state_dict()) | drawn
        dys = [torch.randn_like(y).to(dtype) for y in _floating(theirs(*case.arguments(torch.float32)))]

    def run(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        module.to(device=device(), dtype=dtype).load_state_dict(weights)
        module.zero_grad()
        inputs, moved = [], []
        for given, input in zip(case.inputs, arguments, strict=True):
            if isinstance(given, Floats):
                input = input.detach().to(device(), dtype).requires_grad_()
                inputs.append(input)
            moved.append(input.to(device()) if torch.is_tensor(input) else input)
        outputs = _floating(module(*moved))
        torch.autograd.backward(outputs, [dy.to(device(), dtype) for dy in dys])
        results = {f"output {i}" if i else "output": output.detach() for i, output in enumerate(outputs)}
        results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        results |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
        return {name: result.to(torch.float64, copy=True) for name, result in results.items()}

    with strict_float32():
        exact = run(theirs, torch.float64)
        try:
            rounded = run(theirs, coarse)
        except NotImplementedError:
            coarse = torch.float32
            rounded = run(theirs, coarse)
        try:
            with policy.policy("triton"):
                found = run(ours, dtype)
        except Exception as error:  # of any kind: the other layers are checked nevertheless
            return f"{type(error).__name__}: {error}"
    if found.keys() != exact.keys():
        return f"no {', no '.join(exact.keys() - found.keys())}"
    scale = torch.finfo(dtype).eps / torch.finfo(coarse).eps
    for name, reference in exact.items():
        error = (found[name] - reference).abs().max().item()
        rounding = roundings * torch.finfo(dtype).eps * reference.abs().max().item()
        allowed = 2 * scale * (rounded[name] - reference).abs().max().item() + rounding
        if not error <= allowed:  # so that NaN is an error
            return f"{name} is off by {error:.1e}, rounding explains {allowed:.1e}"
    return None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(by_command: bool) -> int:
    """Print it all; the exit status.

    Args:
        by_command: Triton's interpreter is on only for this command.
    """
    interpreted = _kernels.MISSING is None and _kernels.launch.INTERPRETED
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"fastlayers {__version__}")
    print(f"  Python       {platform.python_version()}")
    print(f"  torch        {torch.__version__}")
    print(f"  triton       {version('triton')}")
    print(f"  GPU          {', '.join(gpus) or 'none'}")
    print("  interpreter  " + ("off" if not interpreted else "on, for this command" if by_command else "on"))

    if _torch.MISSING:
        print(f"  This torch lacks {', '.join(_torch.MISSING)}: everything works, some of it slower.")

    reasons = {dtype: why_not(dtype) for dtype in support.DTYPES}
    checked = [dtype for dtype, reason in reasons.items() if reason is None]
    problems = _check(checked) if checked else []
    _say_what_is_accelerated(reasons, interpreted, by_command)
    if problems:
        print("\nDon't rely on fastlayers on this machine: some layers disagree with torch's.")
    return 1 if problems else 0


def _check(dtypes: list[torch.dtype]) -> list[str]:
    print("\nSelf-check: output and gradients by our kernels against torch.nn's, errors judged by float64")
    width = max(map(len, LAYERS))
    print(" " * (width + 4) + "".join(_name(dtype).ljust(10) for dtype in dtypes))
    problems = []
    for layer in LAYERS:
        print(f"  {layer:<{width}}  ", end="", flush=True)
        for dtype in dtypes:
            found = problem(layer, dtype)
            print(("ok" if found is None else "WRONG").ljust(10), end="", flush=True)
            if found is not None:
                problems.append(f"{layer} in {_name(dtype)}: {found}")
        print()
    for line in problems:
        print(f"  {line}")
    return problems


def _say_what_is_accelerated(reasons: dict[torch.dtype, str | None], interpreted: bool, by_command: bool) -> None:
    layers = textwrap.fill(", ".join(LAYERS), 118, initial_indent="  ", subsequent_indent="  ")
    print("\nWhat is accelerated here")
    if interpreted and device().type == "cpu":
        _print_dtypes(layers, reasons)
        print("  This is Triton's interpreter: it shows that the kernels are right, and is far slower than torch.")
        if by_command:
            print(
                "  It is on for this command only, as there is no GPU. A program that imports fastlayers here, without"
            )
            print("  TRITON_INTERPRET=1, takes torch's path for every layer: the same results at torch's speed.")
    elif all(reasons.values()):
        print(f"  Nothing: {next(iter(reasons.values()))}.")
        print("  Every layer takes torch's path: the same results at torch's speed.")
        if version("triton") != "not installed" and importlib.util.find_spec("numpy") is None:
            print("  The kernels could be checked in Triton's interpreter if numpy were installed.")
    else:
        _print_dtypes(layers, reasons)
        print(
            "  Any other dtype, and tensors on the CPU, take torch's path. fastlayers.explain(model, x) tells for yours."
        )
    if device().type == "cpu":
        print(
            "  On a GPU (compute capability 8.0 or later): "
            + ("these" if interpreted else f"the {len(LAYERS)} layers of README's table")
            + f" in {', '.join(_name(dtype) for dtype in reasons)}."
        )


def _print_dtypes(layers: str, reasons: dict[torch.dtype, str | None]) -> None:
    print(layers)
    print(f"  in {', '.join(_name(dtype) for dtype, reason in reasons.items() if reason is None)}.")
    for dtype, reason in reasons.items():
        if reason is not None:
            print(f"  Not in {_name(dtype)}, which is therefore unchecked: {reason}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
