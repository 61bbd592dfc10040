"""`python -m fastlayers`: what this machine has, whether our layers agree with torch's, and what is accelerated."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from . import __version__, _dispatch, nn

# Sizes that no tile divides, so that the kernels' masks count.
LAYERS: dict[str, tuple[Callable[[Any], torch.nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda nn: nn.Linear(37, 21), (19, 37)),
    "Conv2d": (lambda nn: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 7)),
    "ReLU": (lambda nn: nn.ReLU(), (19, 37)),
    "Softmax": (lambda nn: nn.Softmax(-1), (19, 37)),
    "Sequential": (lambda nn: nn.Sequential(nn.Linear(37, 21), nn.ReLU()), (19, 37)),
}
"""What is checked: how to make it, given torch.nn or ours, and the shape of its input."""


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
    return _dispatch.why_not(torch.empty(1, dtype=dtype, device=device()))


def problem(layer: str, dtype: torch.dtype) -> str | None:
    """How one of our layers disagrees with torch's, if it does, in its output or in the gradient of its input or weights.

    The judge is torch in float64, as good as exact here. Allowed is twice torch's own error in `dtype`, plus one
    rounding of the largest value: where torch happens to hit the nearest number there is, its neighbour is no mistake.
    How large torch's error is in float64 itself is what its error in float32 says, scaled down.
    """
    make, shape = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    theirs, ours = make(torch.nn), make(nn)
    coarse = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(coarse).eps
    # Numbers that every dtype at play can hold, so that all compute the same thing.
    weights = {
        name: (torch.randn(p.shape, generator=generator) / 4).to(dtype).double()
        for name, p in theirs.named_parameters()
    }
    x = torch.randn(shape, generator=generator).to(dtype)
    dy = torch.randn(theirs(x.float()).shape, generator=generator).to(dtype)

    def run(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        module.to(device=device(), dtype=dtype).load_state_dict(weights)
        module.zero_grad()
        input = x.detach().to(device(), dtype).requires_grad_()
        output = module(input)
        output.backward(dy.to(device(), dtype))
        results = {"output": output.detach(), "gradient of the input": input.grad}
        results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
        return {name: result.to(torch.float64, copy=True) for name, result in results.items() if result is not None}

    with strict_float32(), quiet_interpreter():
        exact, rounded = run(theirs, torch.float64), run(theirs, coarse)
        try:
            with _dispatch.policy("triton"):
                found = run(ours, dtype)
        except Exception as error:  # whatever it is, the other layers are to be checked, too
            return f"{type(error).__name__}: {error}"
    if found.keys() != exact.keys():
        return f"no {', no '.join(exact.keys() - found.keys())}"
    for name, reference in exact.items():
        error = (found[name] - reference).abs().max().item()
        rounding = torch.finfo(dtype).eps * reference.abs().max().item()
        allowed = 2 * scale * (rounded[name] - reference).abs().max().item() + rounding
        if not error <= allowed:  # so that NaN is an error
            return f"{name} is off by {error:.1e}, rounding explains {allowed:.1e}"
    return None


@contextlib.contextmanager
def quiet_interpreter() -> Iterator[None]:
    """Without numpy's warnings about numbers that a kernel computes and then masks out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        yield


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
    interpreted = _dispatch.MISSING is None and _dispatch._launch.INTERPRETED
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"fastlayers {__version__}")
    print(f"  Python       {platform.python_version()}")
    print(f"  torch        {torch.__version__}")
    print(f"  triton       {version('triton')}")
    print(f"  GPU          {', '.join(gpus) or 'none'}")
    print("  interpreter  " + ("off" if not interpreted else "on, for this command" if by_command else "on"))

    reasons = {dtype: why_not(dtype) for dtype in _dispatch.DTYPES}
    checked = [dtype for dtype, reason in reasons.items() if reason is None]
    problems = _check(checked) if checked else []
    _say_what_is_accelerated(reasons, interpreted, by_command)
    if problems:
        print("\nDon't rely on fastlayers on this machine: some layers disagree with torch's.")
    return 1 if problems else 0


def _check(dtypes: list[torch.dtype]) -> list[str]:
    print("\nSelf-check: output and gradients by our kernels against torch.nn's, errors judged by float64")
    print(" " * 14 + "".join(_name(dtype).ljust(10) for dtype in dtypes))
    problems = []
    for layer in LAYERS:
        print(f"  {layer:<12}", end="", flush=True)
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
    layers = ", ".join(LAYERS)
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
        print(f"  On a GPU (compute capability 8.0 or later): {layers}")
        print(f"  in {', '.join(_name(dtype) for dtype in reasons)}.")


def _print_dtypes(layers: str, reasons: dict[torch.dtype, str | None]) -> None:
    print(f"  {layers}")
    print(f"  in {', '.join(_name(dtype) for dtype, reason in reasons.items() if reason is None)}.")
    for dtype, reason in reasons.items():
        if reason is not None:
            print(f"  Not in {_name(dtype)}, which is therefore unchecked: {reason}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
