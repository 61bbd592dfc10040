"""Runs a program with the kernels of fastlayers compiled and in the machine, on the CPU's tensors, as `python` would run it:

    python tests/ptx_machine [--target sm_80] script.py ...
    python tests/ptx_machine [--target sm_80] -m fastlayers demo

At its end it says what was launched, and what was wrong: then the exit status is 1. What a GPU would trap on is raised.
"""

from __future__ import annotations

import argparse
import collections
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:1] = [str(HERE.parent.parent), str(HERE.parent)]  # not this folder, whose names would hide others

from ptx_machine import bridge  # noqa: E402


def run(target: str, program: list[str], module: bool) -> int:
    status = 0
    sys.argv[:] = program
    with bridge.machine(target, adversary=True) as reports:
        try:
            if module:
                sys.path.insert(0, str(Path.cwd()))
                runpy.run_module(program[0], run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str(Path(program[0]).resolve().parent))
                runpy.run_path(program[0], run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    kernels = collections.Counter(report.kernel for report in reports)
    seconds = sum(report.seconds for report in reports)
    print(f"\nIn the machine, for {target}: {len(reports)} launches, {seconds:.0f} s", file=sys.stderr)
    for kernel, count in sorted(kernels.items()):
        print(f"  {count:6} {kernel}", file=sys.stderr)
    races = bridge.races(reports)
    print("\n".join(["Races:", *races] if races else ["No race, nothing out of bounds."]), file=sys.stderr)
    return status or int(bool(races))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/ptx_machine", description=__doc__)
    parser.add_argument(
        "--target", choices=("sm_90", "sm_80"), default="sm_90", help="what to compile for (default: sm_90)"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module's name, not a file's")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="a Python file, and its arguments")
    arguments = parser.parse_args()
    if not arguments.program:
        parser.error("which program?")
    if os.environ.get("PTX_MACHINE"):
        return run(arguments.target, arguments.program, arguments.module)
    with tempfile.TemporaryDirectory() as folder:
        # "0": `python -m fastlayers` shall not turn the interpreter on.
        environment = bridge.environment(Path(folder)) | {"TRITON_INTERPRET": "0"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
