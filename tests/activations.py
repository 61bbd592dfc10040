"""Activations as the kernels see them, without the operations that are built upon them."""

from typing import NamedTuple


class Activation(NamedTuple):
    function: str
    saves: str
    args: tuple[float, ...] = ()


RELU = Activation("relu", "output")
GELU = Activation("gelu", "input")
GELU_TANH = Activation("gelu_tanh", "input")
