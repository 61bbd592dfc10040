"""The site's examples run as they stand, page by page, and what it quotes is there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastlayers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / name for name in ("index.md", "adopt.md")]


def sections(page: Path) -> Iterator[Any]:
    """The Python of each section, as a test's parameter."""
    for part in re.split(r"^## ", page.read_text(), flags=re.M):
        code = "\n".join(re.findall(r"^```python\n(.*?)^```", part, flags=re.M | re.S))
        if code:
            yield pytest.param(code, id=f"{page.stem}: {part.splitlines()[0]}")


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # other packages' own
@pytest.mark.parametrize("code", [found for page in PAGES for found in sections(page)])
def test_examples_run(code: str, device: torch.device, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for packages in re.findall(r"^# needs: (.+)$", code, flags=re.M):
        for package in packages.split(", "):
            pytest.importorskip(package)
    if "init_process_group" in code:
        request.getfixturevalue("_process_group")
    file = tmp_path / "example.py"  # `fuse` reads sources
    file.write_text(code)
    names = {"torch": torch, "fastlayers": fastlayers, "device": device, "folder": tmp_path, "__name__": "example"}
    with fastlayers.policy("auto"):
        exec(compile(code, str(file), "exec", dont_inherit=True), names)


def test_docstrings_become_markdown() -> None:
    """Sections get their blank lines, facts a paragraph, code a block, and stars stay stars."""
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    text = "y = a * b of `__init__`.\n    f(*x)\nShape: (*, N)\n    and more.\n"
    text += "Dtype, Raises: as\n    f.\nArgs:\n    x_1: one.\nSource: https://a.b/c_d"
    assert found.markdown(text) == (
        "y = a \\* b of `__init__`.\n\n    f(*x)\n\n**Shape**: (\\*, N)\nand more.\n\n"
        "**Dtype, Raises**: as\nf.\n\nArgs:\n    x\\_1: one.\n\n"
        "**Source**: <https://a.b/c_d>"
    )
