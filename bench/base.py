"""Another commit's kernels as a provider: a second process on the same GPU, which works only while it is asked.

The other commit is checked out into a git worktree. The process imports `fastlayers` from there, and the measuring, with
the shapes and the error budget, from here: so both commits are measured by the same ruler, in the same run, in turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import clock
from .workloads import Workload

ROOT = Path(__file__).parent.parent

_START = """
import sys
base, here = sys.argv[1:]
sys.path[:] = [p for p in sys.path if p not in ("", here)]
sys.path.insert(0, here)
import fastlayers.catalog
import fastlayers.testing
ours = {name: sys.modules[name] for name in ("fastlayers.catalog", "fastlayers.catalog.row", "fastlayers.testing")}
fastlayers.compiled._library._destroy()  # torch has room for one library of that name
for name in [name for name in sys.modules if name.split(".")[0] == "fastlayers"]:
    del sys.modules[name]
sys.path[0] = base
import fastlayers
sys.modules.update(ours)
sys.path.insert(0, here)
from bench import base as server
server.serve()
"""
"""What the process runs: it takes the shapes and the error budget from here, then forgets this checkout's fastlayers and imports
the other one."""


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A worktree of the commit, gone afterwards.

    Raises:
        subprocess.CalledProcessError: where git has no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="fastlayers-base-") as folder:
        path = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=False)


class Server:
    """The process, and the subjects in it."""

    def __init__(self, path: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(path), str(ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=path,
        )  # fmt: skip
        self.where: str = self.ask("where")

    def ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the base commit's process is gone")
        found = json.loads(answer)
        if "failed" in found:
            raise RuntimeError(found["failed"])
        return found["answer"]

    def drop(self) -> None:
        """Forget all subjects."""
        self.ask("drop")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):  # it may be gone already
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Remote:
    """A subject in the other process: as `subject.Subject`, the row without times, then samples."""

    def __init__(self, server: Server, provider: str, workload: Workload, seed: int):
        self._server, self._provider = server, provider
        self.row: dict[str, Any] = server.ask("make", provider, workload.key, seed)

    def sample(self) -> clock.Sample:
        return clock.Sample(*self._server.ask("sample", self._provider))


def serve() -> None:
    """The process: a request a line, an answer a line."""
    # Whatever else prints shall not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import fastlayers

    from .providers import PROVIDERS
    from .subject import Reference, Subject
    from .workloads import workloads

    known = {workload.key: workload for workload in workloads()}
    providers = {provider.name: provider for provider in PROVIDERS}
    subjects: dict[str, Subject] = {}

    def answer(what: str, *args: Any) -> Any:
        if what == "where":
            return fastlayers.__file__
        if what == "sample":
            return list(subjects[args[0]].sample())
        if what == "drop":
            subjects.clear()
            torch.cuda.empty_cache()
            return None
        name, key, seed = args
        device = torch.device("cuda", torch.cuda.current_device())
        reference = Reference(known[key], device, seed)
        subjects[name] = Subject(providers[name], known[key], device, seed, reference)
        return subjects[name].row

    for line in sys.stdin:
        try:
            reply = {"answer": answer(*json.loads(line))}
        except Exception as error:  # it is the other side's to report, and the next request may well succeed
            reply = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=answers, flush=True)
