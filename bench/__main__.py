"""python -m bench [COMMAND]: the GPU suite, and what stands beside it."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "audit": "compile every kernel for every target and read the machine code; no GPU needed",
    "ceilings": "what is installed here, and what this machine's GPU reaches in a copy and in torch's products",
    "counters": "run each kernel in an emulator and count sectors, bank conflicts, instructions; no GPU needed",
    "host": "the CPU's time for one call; no GPU needed",
    "models": "whole models, timed on this machine's GPU; with --plan what they would launch and save, no GPU needed",
    "run": "time everything on this machine's GPU (what no command means)",
    "tune": "search tiles on this machine's GPU and print rows for the tables of tiles beside the kernels",
    "picks": "time every way to compute one thing on this machine's GPU beside the one that is picked",
    "report": "tables and plots from a file of results; no GPU needed",
}


def main(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name in ("-h", "--help", "help"):
        print("python -m bench COMMAND [--help]\n")
        print("\n".join(f"  {command:9}{meaning}" for command, meaning in COMMANDS.items()))
        return 0
    if name and not name.startswith("-") and name not in COMMANDS:
        print(f"no such command: {name}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command, rest = (name, argv[1:]) if name in COMMANDS else ("run", argv)
    # Imported here: the audit needs no GPU stack beyond Triton's compiler, the report none at all.
    return importlib.import_module(f"bench.{command}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
