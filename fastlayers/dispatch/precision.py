"""torch's own switches: how float32 is multiplied, read at every call, and whether cuDNN is used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from .. import _torch


def matmul_precision(dtype: torch.dtype) -> str:
    """ "tf32" if torch allows it for matrix products on CUDA, else "ieee" (torch's default). "ieee" for any dtype but float32,
    which the switch doesn't concern."""
    return "tf32" if dtype is torch.float32 and _torch.fp32_precision("cuda", "matmul") == "tf32" else "ieee"


def rnn_precision(dtype: torch.dtype) -> str:
    """ "tf32" if torch allows it for recurrent layers in cuDNN (torch's default), else "ieee". As `matmul_precision`."""
    return "tf32" if dtype is torch.float32 and _torch.fp32_precision("cuda", "rnn") == "tf32" else "ieee"


def conv_precision(dtype: torch.dtype) -> str:
    """ "tf32" if torch allows it for convolutions in cuDNN (torch's default), else "ieee". As `matmul_precision`."""
    return "tf32" if dtype is torch.float32 and _torch.fp32_precision("cuda", "conv") == "tf32" else "ieee"


class _WithoutCuDNN:
    """Blocks that run without cuDNN. The flag belongs to the process, and each GPU's backward has a thread of its own, so blocks
    may overlap: the first one clears the flag, and the last one to end restores it."""

    def __init__(self) -> None:
        self._lock, self._blocks, self._before = threading.Lock(), 0, True

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._blocks == 0:
                self._before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    torch.backends.cudnn.enabled = self._before


without_cudnn = _WithoutCuDNN()
