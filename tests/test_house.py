"""The house rules: who may import whom, how long files and functions are, what an import needs, what the wheel contains, what
the README says."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import fastlayers
from fastlayers import modules, ops
from fastlayers.catalog import CLASSES, ROWS, table

ROOT = Path(__file__).parent.parent
PACKAGE = [p for p in ROOT.glob("fastlayers/**/*.py") if "kernels" not in p.relative_to(ROOT).parts]
SOURCES = sorted([*ROOT.glob("kernels/**/*.py"), *PACKAGE])
OTHERS = sorted([*ROOT.glob("bench/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("tests/ptx_machine/*.py")])

# Storey: what it may import of fastlayers. A file's storey is its longest match; a file may import its own storey only where
# that is listed.
MAY = {
    "kernels": {"_torch", "kernels"},
    "_torch": set(),
    "_version": set(),
    "_state": set(),
    "_originals": {"_torch", "_torch_functional"},
    "_leaf": set(),
    "_torch_functional": set(),
    "_kernels": {"kernels"},
    "values": {"_kernels"},
    "draws": {"_torch"},
    "dispatch": {"dispatch", "_kernels", "_torch"},
    "operation": {"autograd", "compiled", "dispatch", "draws", "values", "_kernels", "_torch"},
    "autograd": {"operation", "compiled", "dispatch", "values", "_kernels", "_torch"},
    "compiled": {"operation", "autograd", "dispatch", "values", "_kernels", "_torch"},
    "ops": {
        "operation",
        "dispatch",
        "values",
        "_kernels",
        "_torch",
        "_torch_functional",
        "kernels",
        "ops.activation",
        "ops.pooling",
        "ops.averaging",
        "ops.conv",
        "ops.recurrent_cells",
        "ops.dropout",
        "ops.norm",
    },
    "ops.projected_attention": {
        "operation",
        "dispatch",
        "values",
        "_kernels",
        "_torch",
        "_torch_functional",
        "kernels",
        "ops.attention",
    },
    "ops.rotary_projections": {
        "operation",
        "dispatch",
        "values",
        "_kernels",
        "_torch_functional",
        "kernels",
        "ops.rotary",
    },
    "ops.multi_head_attention": {"dispatch", "_torch", "_torch_functional", "ops.linear", "ops.projected_attention"},
    "functional": {"ops", "_namespace"},
    "modules": {"functional", "_state", "_originals", "_leaf", "modules"},
    "modules.activation": {"functional", "_state", "ops.multi_head_attention"},
    "modules.rnn": {"ops.recurrent", "ops.recurrent_cells"},  # which torch.nn.functional doesn't have
    "modules.container": {"fusion.plan", "_state"},
    "modules.transformer": {
        "dispatch.support",
        "fusion.activation",
        "fusion.plan",
        "modules",
        "ops.multi_head_attention",
    },
    "_namespace": set(),
    "nn": {"functional", "modules", "_namespace"},
    "integrations": {"_kernels", "draws", "kernels", "ops.attention", "fusion.rotary"},
    "fusion": {"fusion", "ops", "dispatch", "functional", "_state", "_originals", "_torch", "_torch_functional"},
    "catalog": {"catalog", "modules", "ops", "fusion", "operation"},
    "convert": {"catalog", "dispatch", "fusion.local", "_state", "_originals"},
    "patch": {"catalog", "convert", "dispatch", "_originals", "_torch_functional"},
    "capture": set(),
    "reporting": {
        "reporting",
        "",
        "_kernels",
        "_torch",
        "autograd",
        "convert",
        "dispatch",
        "fusion",
        "kernels.runtime",
        "operation",
    },
    "selfcheck": {"", "catalog", "dispatch", "nn", "_kernels", "_torch"},
    "demo": {"catalog", "dispatch", "functional", "nn", "_kernels"},
    "testing": {"testing"},
    "program": {"patch"},
    "__main__": {"selfcheck", "demo", "program", "reporting", "_kernels"},
    "": {
        "functional",
        "integrations",
        "modules",
        "nn",
        "_version",
        "capture",
        "convert",
        "dispatch",
        "fusion",
        "patch",
        "reporting",
    },
}
ENGINE = {"operation", "autograd", "compiled"}
"""One engine in three files, which know each other."""


def name_of(path: Path) -> str:
    """The module's name within fastlayers, "" for fastlayers itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "kernels" else parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in SOURCES}


def imports(path: Path, on_import: bool = False) -> list[str]:
    """The absolute names of everything a file imports, at any depth, or (`on_import`) of what must be there for it to be
    imported."""
    parts = path.relative_to(ROOT).parts[:-1]
    package = ["fastlayers", *parts] if parts[0] == "kernels" else list(parts)

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        later = (
            isinstance(node, (ast.FunctionDef, ast.Lambda))
            or ast.unparse(getattr(node, "test", node)) == "TYPE_CHECKING"
        )
        if not (on_import and later):
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    names = []
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@cache
def ours(path: Path, on_import: bool = False) -> frozenset[str]:
    """The modules of fastlayers that a file imports."""
    found = set()
    for name in imports(path, on_import):
        if name == "fastlayers" or name.startswith("fastlayers."):
            name = name.removeprefix("fastlayers").removeprefix(".")
            while name not in NAMES:
                name = name.rpartition(".")[0]
            found.add(name)
    return frozenset(found)


def within(name: str, storeys: set[str]) -> bool:
    return any(name == storey or (storey and name.startswith(f"{storey}.")) for storey in storeys)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_sources_are_found() -> None:
    assert len(SOURCES) > 50
    assert MAY.keys() >= {name.split(".")[0] for name in NAMES}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_keep_to_the_storeys(path: Path) -> None:
    name = name_of(path)
    storey = max((s for s in MAY if within(name, {s})), key=len)
    for imported in ours(path):
        assert within(imported, MAY[storey]), f"{storey} may import {sorted(MAY[storey])}, not {imported}"
    for imported in imports(path):
        top = imported.split(".")[0]
        assert top != "kernels", "Hugging Face ships a package of this name"
        if storey == "kernels":
            assert top in {"torch", "triton", "fastlayers"} or top in sys.stdlib_module_names, imported
            assert not imported.startswith(("torch.autograd", "torch.nn")), imported
        else:
            assert top != "triton", imported
            assert storey != "ops" or imported != "torch.nn.functional", (
                "patched puts ours there: import _torch_functional"
            )


_SHARED = ("runtime", "activations", "epilogues", "pointwise", "dropout", "reduce", "matmul")
SHARED = {"_torch", *[f"kernels.{name}" for name in _SHARED]}
"""What the kernels of any family may import: products serve convolutions, too, and norms take a dropout along."""


@pytest.mark.parametrize("path", [p for p in SOURCES if name_of(p).startswith("kernels.")], ids=ids)
def test_families_of_kernels_keep_apart(path: Path) -> None:
    name = name_of(path)
    folder = name.rpartition(".")[0]
    for imported in ours(path):
        assert within(imported, SHARED | ({folder} if folder != "kernels" else set())), imported
    if within(name, {"kernels.runtime"}):
        assert all(within(imported, {"_torch", "kernels.runtime"}) for imported in ours(path))


def test_there_are_no_circles() -> None:
    """Whatever is imported is there already, but for the engine's three files."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = {*path[path.index(name) :]}
            assert circle <= ENGINE, circle
        elif name not in done:
            for imported in sorted(ours(NAMES[name], on_import=True)):
                visit(imported, (*path, name))
            done.add(name)

    for name in NAMES:
        visit(name, ())


@pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=ids)
def test_files_and_functions_are_short(path: Path) -> None:
    """A function is what follows its docstring. Kernels may be longer, which can't be divided for nothing; so may those that
    emulate kernels in tests."""
    source = path.read_text()
    assert source.count("\n") <= 500
    assert path.stem not in {"utils", "common", "helpers"}
    for node in ast.walk(ast.parse(source)) if path.parent.name != "tests" else ():
        if isinstance(node, ast.FunctionDef) and not any(".jit" in ast.unparse(d) for d in node.decorator_list):
            first = node.body[1:2] or node.body
            lines = (node.end_lineno or 0) - first[0].lineno + 1
            assert lines <= 80, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_modules_live_in_modules(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and "modules" not in path.parts:
            assert not any(ast.unparse(base).startswith("nn.") for base in node.bases), node.name


def test_names_agree_with_the_catalog() -> None:
    """Names are static, in the __all__ of each family's file; the catalog says which there must be."""
    classes = {ours.__name__ for ours in CLASSES.values()}
    assert classes == {name for name in dir(modules) if isinstance(getattr(modules, name), type)}
    assert classes <= {*fastlayers.__all__}
    functions = {name for row in ROWS for name in (row.function, *row.functions) if name is not None}
    files = [importlib.import_module(f"{ops.__name__}.{path.stem}") for path in ROOT.glob("fastlayers/ops/[a-z]*.py")]
    # torch 2.11 has no class for this function, and so no row.
    functions |= set() if hasattr(torch.nn, "LinearCrossEntropyLoss") else {"linear_cross_entropy"}
    assert functions == {name for file in files for name in file.__all__}
    for row in ROWS:
        assert row.operation is None or row.function is not None, row.name


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
        "import fastlayers, fastlayers.kernels.conv.gather\n"
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


@pytest.mark.slow
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
        [sys.executable, "-c", "import fastlayers, fastlayers.kernels.reduce as c; print(fastlayers.__file__, c.__file__)"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(environment)},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(str(environment) in name for name in done.stdout.split())


def test_readme_table_is_generated() -> None:
    """With the newest torch that was tried. An older one may have fewer layers."""
    readme = (ROOT / "README.md").read_text()
    command = "python -c 'from fastlayers.catalog import table; print(table())'"
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        assert table() in readme, command
    else:
        assert all(line in readme for line in table().splitlines()), command


def test_no_kernel_adds_in_any_order_or_tunes_itself() -> None:
    """Results are the same from run to run, and the first call measures nothing: no atomic operations, no autotuning."""
    for path in ROOT.glob("kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("atomic_"), (path, node.lineno)
                assert node.attr not in {"autotune", "Config"}, (path, node.lineno)


def test_kernels_are_a_link() -> None:
    assert os.readlink(ROOT / "fastlayers" / "kernels") == "../kernels"
    assert not [*ROOT.glob("kernels/**/__init__.py")]


def copies_in_loops(tree: ast.AST) -> Iterator[str]:
    """Within loops of kernels, assignments of one variable to another, both of which exist before the loop."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or not any(
            "jit" in ast.unparse(d) for d in function.decorator_list
        ):
            continue
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        for loop in ast.walk(function):
            if not isinstance(loop, ast.For | ast.While):
                continue
            before = {a.arg for a in function.args.args} | {name.id for name in names if name.lineno < loop.lineno}
            for node in ast.walk(loop):
                if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name | ast.Tuple):
                    targets = target.elts if isinstance(target, ast.Tuple) else [target]
                    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                    for to, value in zip(targets, values, strict=False):
                        if {ast.unparse(to), ast.unparse(value)} <= before:
                            yield f"{function.name}: {ast.unparse(node)}"


def test_no_kernel_copies_a_variable_in_a_loop() -> None:
    """Triton's front end takes a variable for one that a loop doesn't change if it gets, in the loop, the value with which it
    began: after `before = stage; for ...: use(before); before = stage; stage += 1`, `before` stays what it was. Python does
    otherwise, so that the interpreter can't show it."""
    wrong = """
@triton.jit
def kernel(n):
    stage = 0
    before = stage
    for i in range(n):
        use(before)
        before = stage
        stage += 1
"""
    assert [*copies_in_loops(ast.parse(wrong))] == ["kernel: before = stage"]
    for path in ROOT.glob("kernels/**/*.py"):
        assert [*copies_in_loops(ast.parse(path.read_text()))] == [], path
