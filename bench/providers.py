"""Who computes a workload: torch in several ways, this package, and other packs where they are installed.

A provider turns a layer and its inputs into a call. All start from the same seed, so all compute the same thing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import fastlayers

from .workloads import Workload

Forward = Callable[..., Any]
Bind = Callable[[Any, Workload], Forward]
"""A layer, and what it is made for, to what is called with its inputs."""


def _is_linear_relu(workload: Workload) -> bool:
    return workload.shape_name.startswith("Linear+ReLU")


def _call(module: Any, workload: Workload) -> Forward:
    return module


@dataclass(frozen=True)
class Provider:
    """`kind`: "torch", "ours" or "other". `tier`: 0 is always run; 1 costs a compilation, 2 a search."""

    name: str
    kind: str
    tier: int = 0
    package: str | None = None
    namespace: Callable[[], Any] = lambda: torch.nn
    bind: Bind = _call
    channels_last: bool = False
    takes: Callable[[Workload], bool] = lambda workload: True

    def absent(self) -> str | None:
        """Why it can't be run in this environment at all."""
        if self.package is None:
            return None
        try:
            importlib.import_module(self.package)
        except Exception as error:  # a package may fail on import in ways of its own, as without a GPU
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None

    def applies(self, workload: Workload) -> bool:
        return self.takes(workload) and (workload.images or not self.channels_last)

    def layer(self, workload: Workload, device: torch.device, seed: int) -> Callable[..., Any]:
        """A module, its parameters drawn from the seed, or a function."""
        with seeded(device, seed), torch.device(device):
            layer = workload.case.make(self.namespace())
        if not isinstance(layer, torch.nn.Module):
            return layer
        layer = layer.to(workload.dtype)
        return layer.to(memory_format=torch.channels_last) if self.channels_last else layer  # type: ignore[call-overload]

    def inputs(self, workload: Workload, device: torch.device, seed: int) -> list[Any]:
        """The arguments, drawn from the seed."""
        with seeded(device, seed):
            return [self.formatted(given) for given in workload.case.arguments(workload.dtype, device)]

    def formatted(self, given: Any) -> Any:
        """In this provider's memory format, if it is a batch of images."""
        images = isinstance(given, torch.Tensor) and given.dim() == 4 and given.is_floating_point()
        return given.contiguous(memory_format=torch.channels_last) if self.channels_last and images else given

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """torch as this provider's users set it: cuDNN searches only where somebody has gone to the length of
        channels_last, and the kernels are ours only in our own provider."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.channels_last
        try:
            with fastlayers.policy("triton" if self.kind == "ours" else "torch"):
                yield
        finally:
            torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Within, torch draws from this seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Normal numbers: zeros draw less power and so run at higher clocks."""
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))


def _addmm_activation(module: Any, workload: Workload) -> Forward:
    linear = module[0]
    weight = linear.weight.detach().T
    bias = linear.bias.detach()
    product: Any = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
    return lambda x: product(bias, x, weight)


def _fused(module: Any, workload: Workload) -> Forward:
    return fastlayers.fuse(module) if workload.family == "inference" else module


@functools.cache
def _compiled(mode: str, key: str) -> Callable[..., Any]:
    # The layer is an argument: one compilation serves every set of inputs and weights.
    return torch.compile(lambda layer, *inputs: layer(*inputs), mode=mode, dynamic=False)


def forget() -> None:
    """What was compiled."""
    _compiled.cache_clear()
    torch._dynamo.reset()


def _compile(mode: str) -> Bind:
    def bind(module: Any, workload: Workload) -> Forward:
        # Backward is called again and again on one forward.
        torch._functorch.config.donated_buffer = False  # pyright: ignore[reportAttributeAccessIssue]
        return functools.partial(_compiled(mode, workload.key), module)

    return bind


def _fastlayers() -> Any:
    return importlib.import_module("fastlayers.nn")


def _liger_softmax(module: Any, workload: Workload) -> Forward:
    return importlib.import_module("liger_kernel.transformers.functional").liger_softmax


def _flag_gems(module: Any, workload: Workload) -> Forward:
    gems = importlib.import_module("flag_gems")

    def forward(*inputs: Any) -> Any:
        with gems.use_gems():
            return module(*inputs)

    return forward


PROVIDERS = (
    Provider("eager", "torch"),
    Provider("eager channels_last", "torch", channels_last=True),
    # It has no derivative.
    Provider(
        "addmm_activation", "torch", bind=_addmm_activation,
        takes=lambda workload: _is_linear_relu(workload) and workload.direction == "forward",
    ),
    Provider("ours", "ours", namespace=_fastlayers, bind=_fused),
    Provider("ours channels_last", "ours", namespace=_fastlayers, bind=_fused, channels_last=True),
    Provider("compile", "torch", 1, bind=_compile("default")),
    Provider("compile channels_last", "torch", 1, bind=_compile("default"), channels_last=True),
    Provider("compile max-autotune", "torch", 2, bind=_compile("max-autotune-no-cudagraphs")),
    Provider(
        "Liger-Kernel", "other", 1, package="liger_kernel.transformers.functional", bind=_liger_softmax,
        takes=lambda workload: workload.family == "Softmax",
    ),
    Provider(
        "attorch", "other", 1, package="attorch", namespace=lambda: importlib.import_module("attorch").nn,
        takes=lambda workload: not workload.is_network,
    ),
    # What FlagGems does in backward depends on where its override is in force: only its forward is compared.
    Provider(
        "FlagGems", "other", 1, package="flag_gems", bind=_flag_gems,
        takes=lambda workload: workload.direction == "forward",
    ),
)  # fmt: skip


def absent() -> dict[str, str]:
    """The providers that this environment hasn't got, each with its reason."""
    reasons = {provider.name: provider.absent() for provider in PROVIDERS}
    return {name: reason for name, reason in reasons.items() if reason is not None}
