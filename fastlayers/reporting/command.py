"""`python -m fastlayers report model.py:make`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .gpus import GPUS
from .model import Report, report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument(
        "model",
        metavar="FILE.py:FUNCTION",
        help="or MODULE:FUNCTION. The function is called without arguments and returns (model, *inputs); the last input may be a "
        "dict of keyword arguments. The model may be on the meta device, where it takes no memory",
    )
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="for the least times (default: H100)")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the model and its floating-point inputs")
    parser.add_argument("--fuse", action="store_true", help="as after fastlayers.fuse(model)")
    parser.add_argument("--eval", action="store_true", help="inference: model.eval() and no gradients")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="a picture of the least times, module by module")


def main(arguments: argparse.Namespace, fail: Callable[[str], Any]) -> int:
    """Print the report. `fail` prints a message about the arguments and exits."""
    try:
        make = _found(arguments.model)
    except (OSError, AttributeError, ImportError, ValueError) as error:
        return fail(f"{arguments.model}: {error}")
    made = make()  # what it raises is the user's own, and keeps its traceback
    model, *args = made if isinstance(made, (tuple, list)) else (made,)
    if not isinstance(model, torch.nn.Module):
        return fail(f"{arguments.model}: the function must return a module and its inputs, not {type(model).__name__}")
    kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
    if arguments.eval:
        model.eval()
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    try:
        with torch.set_grad_enabled(not arguments.eval):
            found = report(model, *args, gpu=arguments.gpu, dtype=dtype, fuse=arguments.fuse, **kwargs)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(found)
    if arguments.plot is not None:
        try:
            plot(found, arguments.plot)
        except (ImportError, OSError, ValueError) as error:
            print(f"no picture: {error}", file=sys.stderr)
            return 1
    return 0


def _found(where: str) -> Callable[[], Any]:
    """The function that is named so."""
    name, _, function = where.rpartition(":")
    if not name:
        raise ValueError("expected FILE.py:FUNCTION")
    if name.endswith(".py"):
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # as for a script, which may import its neighbours
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(name)
    return getattr(module, function)


def plot(found: Report, path: Path) -> None:
    """A bar for each module, as long as the least time of its forward and backward.

    Raises:
        ImportError: without matplotlib.
        OSError: where the file can't be written.
        ValueError: for a name that ends in no format that matplotlib knows.
    """
    from matplotlib.figure import Figure

    lines = [line for line in found if line.work.bytes]
    times = [[found.milliseconds(part) for part in (line.forward, line.backward)] for line in lines]
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(lines)), layout="constrained")
    axes = figure.subplots()
    colours = {True: ("tab:green", "limegreen"), False: ("tab:gray", "lightgray")}
    for i, (line, (forward, backward)) in enumerate(zip(lines, times, strict=True)):
        dark, light = colours[line.ours]
        axes.barh(i, forward, color=dark)
        axes.barh(i, backward, left=forward, color=light)
    axes.set_yticks(range(len(lines)), [line.module or "-" for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel(f"ms at least on {found.gpu}, at its peak rates; not measured")
    axes.set_title("green: kernels of fastlayers, grey: torch's operators; dark: forward, light: backward")
    figure.savefig(path)
