"""The house rules: who may import whom, what an import needs, what the wheel contains, what the README says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastlayers
from fastlayers.testing import table

ROOT = Path(__file__).parent.parent

# Storey: what it may import of fastlayers, and whether triton. A file's storey is its longest match.
MAY = {
    "kernels": ({"kernels"}, True),
    "fastlayers/_dtypes": (set(), False),
    "fastlayers/_version": (set(), False),
    "fastlayers/_capture": (set(), False),
    "fastlayers/_table": (set(), False),
    "fastlayers/_dispatch": ({"_dtypes", "_table", "kernels"}, False),
    "fastlayers/ops": ({"_dispatch", "_dtypes", "ops", "kernels"}, False),
    "fastlayers/functional": ({"ops"}, False),
    "fastlayers/_state": (set(), False),
    "fastlayers/_fusion": ({"_dispatch", "_state"}, False),
    "fastlayers/_fuse": ({"_fusion", "functional", "ops"}, False),
    "fastlayers/modules": ({"functional", "_fusion", "_state", "ops", "modules"}, False),
    "fastlayers/nn": ({"functional", "modules"}, False),
    "fastlayers/_convert": ({"modules", "_table"}, False),
    "fastlayers/testing": ({"testing", "modules", "nn"}, False),
    "fastlayers/__init__": (
        {"functional", "nn", "_capture", "_convert", "_dispatch", "_fuse", "modules", "_version"},
        False,
    ),
    "fastlayers/__main__": ({"_demo", "_selfcheck", "_dispatch", "kernels", "modules", "nn", "_version", ""}, False),
    "fastlayers/_demo": ({"_dispatch", "kernels", "nn", "modules", "testing", ""}, False),
    "fastlayers/_selfcheck": ({"_dispatch", "kernels", "nn", "modules", "testing", ""}, False),
}
SOURCES = sorted(
    [*ROOT.glob("kernels/*.py"), *(p for p in ROOT.glob("fastlayers/**/*.py") if "kernels" not in p.parts[:-1])]
)


def imports(path: Path) -> list[str]:
    """The absolute names of everything a file imports, at any depth, "" standing for fastlayers itself."""
    package = (
        ["fastlayers", *path.relative_to(ROOT).parts[:-1]]
        if path.parts[-2] == "kernels"
        else list(path.relative_to(ROOT).parts[:-1])
    )
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def test_sources_are_found() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_to_the_storeys(path: Path) -> None:
    name = str(path.relative_to(ROOT).with_suffix(""))
    storey = max((s for s in MAY if name == s or name.startswith(s + "/")), key=len)
    own, triton = MAY[storey]
    for imported in imports(path):
        top, *rest = imported.split(".")
        if top == "fastlayers":
            assert (
                rest[0]
                if rest
                and (len(rest) > 1 or rest[0] in {p.stem for p in SOURCES} | {"kernels", "ops", "modules", "testing"})
                else ""
            ) in own, imported
        assert top != "kernels", "Hugging Face ships a package of this name"
        assert triton or top != "triton", imported
        if storey == "kernels":
            assert top in {"torch", "triton", "fastlayers"} or top in sys.stdlib_module_names, imported
            assert not imported.startswith(("torch.autograd", "torch.nn")), imported


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_live_in_modules(path: Path) -> None:
    assert path.stem not in {"utils", "common", "helpers"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and "modules" not in path.parts:
            assert not any(ast.unparse(base).startswith("nn.") for base in node.bases), node.name


def python(code: str, **env: str) -> str:
    """What a cold process prints, without the interpreter and without a GPU."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""} | env
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE = """
import torch, fastlayers
from fastlayers import nn
model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Softmax(1))
model(torch.randn(2, 1, 4, 4)).sum().backward()
print({d.reason for d in fastlayers.explain(model, torch.randn(2, 1, 4, 4)) if "not one of" not in d.reason})
"""


def test_import_and_use_without_a_gpu() -> None:
    assert python(USE) == "{'tensors on cpu: the kernels run on GPUs'}"


def test_import_and_use_without_triton() -> None:
    """A process in which triton can't be found."""
    block = "import sys; sys.modules['triton'] = None\n"
    assert python(block + USE) == "{'triton is not installed'}"


def test_import_asks_no_device() -> None:
    code = (
        "import torch\n"
        "torch.cuda.is_available = torch.cuda.current_device = torch.cuda.get_device_properties = None\n"
        "import fastlayers, fastlayers.kernels.conv\n"
        "from triton.runtime.driver import driver\n"
        "print(driver._active)"
    )
    assert python(code).split("\n")[-1] == "None"


def test_interpreter_without_our_shim_is_not_trusted_with_bfloat16() -> None:
    code = (
        "import torch, fastlayers\n"
        "x = torch.randn(3)\n"
        "print([next(iter(fastlayers.explain(fastlayers.ReLU(), x.to(d)))).reason for d in (torch.float32, torch.bfloat16)])"
    )
    assert python(code, TRITON_INTERPRET="1") == '[None, "Triton\'s interpreter computes bfloat16 wrongly"]'


def test_wheel(tmp_path: Path) -> None:
    """It holds the kernels under fastlayers, nothing at top level but fastlayers, and works in an empty environment."""
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert {f.split("/")[0] for f in files} == {"fastlayers", f"fastlayers-{fastlayers.__version__}.dist-info"}
    for path in SOURCES:
        name = path.relative_to(ROOT)
        assert str(name if name.parts[0] == "fastlayers" else Path("fastlayers") / name) in files
    # An environment that has torch and triton but not this checkout.
    environment = tmp_path / "environment"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(environment),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", "import fastlayers, fastlayers.kernels.conv as c; print(fastlayers.__file__, c.__file__)"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(environment)},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(str(environment) in name for name in done.stdout.split())


def test_readme_table_is_generated() -> None:
    assert table() in (ROOT / "README.md").read_text(), (
        "python -c 'from fastlayers.testing import table; print(table())'"
    )


def test_kernels_are_a_link() -> None:
    assert os.readlink(ROOT / "fastlayers" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
