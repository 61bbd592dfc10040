"""`python -m fastlayers`: check this installation. `python -m fastlayers demo`: train two networks with it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import torch

from . import _dispatch

BY_COMMAND = "FASTLAYERS_TURNED_INTERPRETER_ON"
"""Set in the environment of the second process if we, not the user, turned Triton's interpreter on."""

DEMO_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastlayers", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="")
    demo = commands.add_parser("demo", help="train two small networks with torch.nn and with fastlayers, side by side")
    demo.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (default: 0)")
    demo.add_argument("--epochs", type=int, help="for both networks, instead of the defaults")
    demo.add_argument("--plot", type=Path, default=Path("demo-loss.png"), help="where to write the loss curves")
    arguments = parser.parse_args()
    if arguments.command == "demo":
        if arguments.epochs is not None and arguments.epochs < 1:
            demo.error("--epochs must be at least 1")
        if not arguments.plot.parent.is_dir():  # better said now than after two minutes
            demo.error(f"there is no folder {arguments.plot.parent}")
        missing = [package for module, package in DEMO_NEEDS.items() if importlib.util.find_spec(module) is None]
        if missing:
            print(f'The demo needs {", ".join(missing)}: pip install "fastlayers[demo]"', file=sys.stderr)
            return 2
    _interpret_without_gpu()
    from . import _selfcheck  # only now: a process that starts over needn't

    if arguments.command == "demo":
        from . import _demo

        with _selfcheck.strict_float32():
            return _demo.main(arguments.seed, arguments.epochs, arguments.plot, _selfcheck.device())
    return _selfcheck.main(by_command=BY_COMMAND in os.environ)


def _interpret_without_gpu() -> None:
    """Start over with Triton's interpreter if only it can run the kernels: they ask for it once, at import."""
    if _dispatch.MISSING is not None or torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
        return
    if importlib.util.find_spec("numpy") is None:  # Triton's interpreter is made of it
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", BY_COMMAND: "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    sys.exit(main())
