"""`pytest bench` times on a GPU or not at all."""

from __future__ import annotations

import pytest

from bench.run import why_not


def pytest_sessionstart(session: pytest.Session) -> None:
    reason = why_not()
    if reason is not None:
        pytest.exit(f"pytest bench: {reason}", returncode=2)
