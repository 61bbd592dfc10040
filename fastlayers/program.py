"""`python -m fastlayers run script.py ...`: a program that imports torch.nn, run with our layers in the place of torch's."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from .patch import patched


def execute(command: Sequence[str], module: bool) -> int:
    """Run a program as Python would, within `patched`, and print to standard error what ran where, whatever its end.

    Args:
        command: a Python file, or a module's name if `module`, and the program's arguments.
    Returns:
        0. Where the program ends by sys.exit or an exception, so does this.
    """
    name = command[0]
    # Of a module's name the first part: to look for more would import it, before anything is patched.
    if not (importlib.util.find_spec(name.partition(".")[0]) if module else os.path.exists(name)):
        print(f"python -m fastlayers run: there is no {'module' if module else 'file'} {name}", file=sys.stderr)
        return 2
    sys.argv[:] = command
    with patched() as counted:
        try:
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                # As for `python script.py`, whose folder comes first, where for `python -m` it is the current one.
                sys.path[0] = os.path.dirname(os.path.realpath(name))
                runpy.run_path(name, run_name="__main__")
        finally:
            print(f"\nfastlayers: what ran where in {name}\n{counted}", file=sys.stderr)
    return 0
