"""A griffe extension: our docstrings are plain text for `help()`, and become Markdown with Google's sections here."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = re.compile(r"(Args|Returns|Raises|Yields):$")
_FACT = "(?:Shape|Dtype|Runs on Triton when|Raises|Source)"
FACTS = re.compile(rf"({_FACT}(?:, {_FACT})*): ")
"""What is said in one paragraph, of one of these or of several."""


def markdown(text: str) -> str:
    """A docstring with what Markdown needs: blank lines around sections and code, names of facts in bold, and no emphasis by
    accident, since * and _ stand for themselves outside of backticks."""
    lines: list[str] = []
    kind = "text"  # of the lines before: "text", "code", "section", "fact"
    for line in text.splitlines():
        indented = line.startswith("    ")
        if not line.strip():
            lines.append("")
            continue
        if SECTIONS.match(line):
            kind = "section"
            lines += ["", line]
        elif FACTS.match(line):
            kind = "fact"
            lines += ["", FACTS.sub(lambda found: f"**{found[1]}**: ", _escaped(line))]
        elif not indented:
            if kind != "text":
                lines.append("")
            kind = "text"
            lines.append(_escaped(line))
        elif kind == "section":
            lines.append(_escaped(line))
        elif kind == "fact":
            lines.append(_escaped(line.strip()))
        else:
            if kind == "text" and lines and lines[-1]:
                lines.append("")
            kind = "code"
            lines.append(line)
    return "\n".join(lines).strip("\n")


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`|https?://\S+)", line)
    parts[::2] = [re.sub(r"([*_\[\]<])", r"\\\1", part) for part in parts[::2]]
    return "".join(f"<{part.rstrip(';,.')}>{part[len(part.rstrip(';,.')) :]}" if part.startswith("http") else part
                   for part in parts)  # fmt: skip


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
