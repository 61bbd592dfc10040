"""Reading a module's parameters and buffers."""

from typing import Any

import torch


def own(module: torch.nn.Module, name: str, kind: type) -> Any:
    """getattr(module, name) of a parameter or buffer. If the module's class is `kind`, one that leaves its attributes to
    nn.Module, 0.3 us sooner: Python asks nn.Module.__getattr__ only at last."""
    if type(module) is kind and name not in module.__dict__:
        for state in (module._parameters, module._buffers):
            if name in state:
                return state[name]
    return getattr(module, name)
