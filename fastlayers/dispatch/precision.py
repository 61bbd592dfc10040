"""How float32 is multiplied: torch's own switches, read at every call."""

from __future__ import annotations

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
