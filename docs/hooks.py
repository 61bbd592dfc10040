"""What `mkdocs build` generates, so that it can't go stale: the table of layers, the API's lists of names, the index of
decisions, the pictures, and sources that pages quote."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import pictures  # noqa: E402

from bench.report import newest, readme_table  # noqa: E402
from fastlayers import functional, modules  # noqa: E402
from fastlayers.catalog import ROWS, table  # noqa: E402

DECISIONS = sorted((ROOT / "docs/decisions").glob("0*.md"))
QUOTE = re.compile(r"^<!-- quote: (\S+)((?: \w+)+) -->$", re.M)
"""In a page: these functions and classes of a file."""
SECTION = re.compile(r"^<!-- section: (\S+) \| (.+) -->$", re.M)
"""In a page: the section of a Markdown file that has this heading."""

LAYERS = """# What is accelerated

Every layer of `torch.nn` that has kernels, what they take, and what torch's own function takes instead. Whatever isn't listed is
torch's own class, unchanged. This page is generated from the catalog of layers (`fastlayers/catalog/`), as are the tests.

{speed} `python -m bench` measures it, [as described here](measured.md). What a model will run on kernels, and the
least time that takes on a GPU, can be asked without one: `fastlayers.report(model, x)`.

{table}
"""


def on_config(config: Any) -> Any:
    """Puts every decision into the navigation."""
    pages = ["decisions/index.md", *(f"decisions/{path.name}" for path in DECISIONS)]
    config.nav = [*config.nav, {"Decisions": pages}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated files to those of docs/."""
    made = {
        "layers.md": LAYERS.format(
            speed=readme_table() if newest() else "Speed on a GPU: not measured.", table=table()
        ),
        "decisions/index.md": _decisions(),
        "api/functional.md": _functions(),
        "api/nn.md": _classes(),
        **{f"pictures/{name}.svg": draw() for name, draw in pictures.PICTURES.items()},
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Quotes sources and sections."""
    text = SECTION.sub(lambda found: section(found[1], found[2]), text)
    return QUOTE.sub(lambda found: quoted(found[1], *found[2].split()), text)


def _decisions() -> str:
    titles = {path.name: path.read_text().splitlines()[0].removeprefix("# ") for path in DECISIONS}
    lines = [f"- [{name[:4]}]({name}): {title}" for name, title in titles.items()]
    head = ["# Decisions", "", "Why things are as they are, and what would show a decision to be wrong.", ""]
    return "\n".join([*head, *lines, ""])


def _functions() -> str:
    """A heading for each function of ours in `fastlayers.functional`."""
    ours = {
        name: f for name, f in vars(functional).items() if getattr(f, "__module__", "").startswith("fastlayers.ops")
    }
    public = {name: f for name, f in ours.items() if not name.startswith("_") and callable(f) and f.__doc__}
    head = "# fastlayers.functional\n\n`torch.nn.functional`'s names and signatures. What isn't listed is torch's own object.\n\n"
    return head + "\n".join(_entry(f.__module__, f.__name__, name) for name, f in sorted(public.items()))


def _classes() -> str:
    """A heading for each class of ours in `fastlayers.nn`, in the catalog's order."""
    names = [row.name for row in ROWS if hasattr(modules, row.name)]
    head = "# fastlayers.nn\n\n`torch.nn`'s classes, subclassed: constructors, parameters, `state_dict` and `repr` are theirs. "
    head += "What isn't listed is torch's own object.\n\n"
    return head + "\n".join(_entry(getattr(modules, name).__module__, name, name, members=False) for name in names)


def _entry(module: str, attribute: str, heading: str, members: bool = True) -> str:
    options = {"heading": f'"{heading}"'} | ({} if members else {"members": "false"})
    return "\n".join(
        [f"::: {module}.{attribute}", "    options:", *(f"      {k}: {v}" for k, v in options.items()), ""]
    )


def quoted(file: str, *names: str) -> str:
    """Definitions of a Python file, with their decorators, as a block of code.

    Raises:
        KeyError: the file has none of that name.
    """
    source = (ROOT / file).read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return "\n".join([f'```python title="{file}"', "\n\n\n".join(found[name] for name in names), "```"])


def section(file: str, heading: str) -> str:
    """What stands below a heading, up to the next heading of the same level.

    Raises:
        KeyError: the file has no such heading.
    """
    text = (ROOT / file).read_text()
    parts = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in re.split(r"^## ", text, flags=re.M)[1:]}
    # Python's Markdown wants four spaces where GitHub's takes three, and blank lines around code.
    wide = re.sub(r"^ {3}(?=\S|   )", "    ", parts[heading].strip(), flags=re.M)
    return re.sub(r"(^ *```\w+\n.*?^ *```$)", r"\n\1\n", wide, flags=re.M | re.S)
