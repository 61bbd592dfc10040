"""What torch.fx takes for a layer.

A tracer of torch.fx keeps a module whole, as one node, if `module.__module__` begins with "torch.nn"; it traces into any other.
Ours are layers as much as torch's. So `__module__` of an instance says "torch.nn", while that of the class says where the class
is defined, by which pickles find it. A subclass that a user writes has a `__module__` of its own, and is traced into, as a
subclass of torch's is.
"""

from __future__ import annotations

from typing import Any


class _Module(str):
    """The name of the module in which a class is defined. As an attribute of the class's instances it is "torch.nn"."""

    def __get__(self, instance: Any, owner: type | None = None) -> str:
        return str(self) if instance is None else "torch.nn"

    def __reduce__(self) -> Any:
        """As a str: a pickle of a class holds its `__module__`, and nothing but a str is taken there."""
        return str, (str(self),)


def keep_whole(*classes: type) -> None:
    """Have torch.fx keep instances of these classes whole, wherever it keeps torch.nn's whole."""
    for cls in classes:
        cls.__module__ = _Module(cls.__module__)
