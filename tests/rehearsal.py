"""The tests of a machine with a GPU, rehearsed on one without, before minutes of a GPU are spent on what can be known earlier:

    PYTHONPATH=tests python -m pytest -p rehearsal tests/test_contract.py -k forward_and_gradients

The kernels that a test launches are compiled for sm_90 by the installed Triton, and launched into the void. So the numbers are
wrong, and a failed assertion is no failure: what fails is a kernel that doesn't compile, one that needs more shared memory than
there is, and whatever else raises. Of tests/test_gpu.py those tests are of use that call nothing in torch.cuda:
-k "shipped or descriptors".
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    from bench import host

    stubbed = host.stubbed()
    stubbed.__enter__()
    config.add_cleanup(lambda: stubbed.__exit__(None, None, None))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[Any]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None and call.excinfo.errisinstance(AssertionError):
        report.outcome, report.longrepr = "passed", None
    return report
