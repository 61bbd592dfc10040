"""`python -m fastlayers`: check this installation. `python -m fastlayers demo`: train networks with it.
`python -m fastlayers report model.py:make`: what of a model will run on kernels.
`python -m fastlayers run script.py ...`: run a program of torch's on it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch

from . import _kernels
from .reporting import command as reporting

BY_COMMAND = "FASTLAYERS_TURNED_INTERPRETER_ON"
"""Set in the environment of the second process if we, not the user, turned Triton's interpreter on."""

DEMO_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastlayers", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo", help="train three small networks with torch.nn and with fastlayers, side by side"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (default: 0)")
    demo.add_argument("--epochs", type=int, help="for every network, instead of the defaults")
    demo.add_argument("--plot", type=Path, default=Path("demo-loss.png"), help="where to write the loss curves")
    reported = commands.add_parser("report", help="what of a model will run on kernels on a GPU; needs no GPU")
    reporting.add_arguments(reported)
    program = commands.add_parser(
        "run", help="run a program that imports torch.nn, with our layers, and say what ran where"
    )
    program.add_argument("-m", dest="module", action="store_true", help="what follows is a module's name, not a file's")
    program.add_argument("program", nargs=argparse.REMAINDER, help="a Python file, and its arguments")
    arguments = parser.parse_args()
    if arguments.command == "report":
        return reporting.main(arguments, reported.error)
    if arguments.command == "run":
        if not arguments.program:
            program.error("which program?")
        from .program import execute

        return execute(arguments.program, arguments.module)
    if arguments.command == "demo":
        if arguments.epochs is not None and arguments.epochs < 1:
            demo.error("--epochs must be at least 1")
        problem = _unwritable(arguments.plot)  # checked before the training, not after it
        if problem is not None:
            demo.error(f"can't write {arguments.plot}: {problem}")
        missing = [package for module, package in DEMO_NEEDS.items() if importlib.util.find_spec(module) is None]
        if missing:
            print(f'The demo needs {", ".join(missing)}: pip install "fastlayers[demo]"', file=sys.stderr)
            return 2
    _interpret_without_gpu()
    from . import selfcheck  # not earlier: the line above may have started over

    if arguments.command == "demo":
        from . import demo

        with selfcheck.strict_float32():
            return demo.main(arguments.seed, arguments.epochs, arguments.plot, selfcheck.device())
    return selfcheck.main(by_command=BY_COMMAND in os.environ)


def _unwritable(path: Path) -> str | None:
    """What speaks against writing a file there."""
    there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _interpret_without_gpu() -> None:
    """Start over with Triton's interpreter if only it can run the kernels: they ask for it once, at import."""
    if _kernels.MISSING is not None or torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
        return
    if importlib.util.find_spec("numpy") is None:  # Triton's interpreter is made of it
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", BY_COMMAND: "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def run() -> int:
    """main(), for a terminal that may have gone away: `| head` ends the program without a word, as it ends others."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if sys.stdout is None:  # it was closed before we began
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if sys.stderr is None:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            status = main()
            print(end="", flush=True)
        except BrokenPipeError:
            os.dup2(nowhere.fileno(), 1)  # for Python, which flushes once more at its end
            return 128 + signal.SIGPIPE
    return status


if __name__ == "__main__":
    sys.exit(run())
