"""A module's calls as CUDA graphs: one launch for the forward pass and one for the backward, whatever it is made of."""

from __future__ import annotations

from typing import Any

import torch


class Captured:
    """What `capture` returns: calls the module's graph with new inputs."""

    def __init__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]):
        self.module = module
        # Of its own: torch.cuda.make_graphed_callables replaces the `forward` of what it is given, and writes each call's
        # inputs into the tensors that it is given.
        inner = torch.nn.Module()
        inner.module = module
        inner.forward = lambda *args: module(*args)  # type: ignore[method-assign]
        inner.train(module.training)
        samples = tuple([t.detach().clone().requires_grad_(t.requires_grad) for t in inputs])
        self._expected = [_describe(t) for t in inputs]
        self._modules = list(module.modules())
        self._tensors = [
            (own, name)
            for m in self._modules
            for own in (m._parameters, m._buffers)
            for name, tensor in own.items()
            if tensor is not None
        ]
        self._children = [(m._modules, name) for m in self._modules for name in m._modules]
        self._trains = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *module.parameters()))
        buffers = [(b, b.detach().clone()) for b in module.buffers()]
        with torch.set_grad_enabled(self._trains):
            self._call: Any = torch.cuda.make_graphed_callables(inner, samples)
        with torch.no_grad():
            for buffer, before in buffers:  # warming up is no training: BatchNorm's statistics are as they were
                buffer.copy_(before)
        self._mode, self._state = self._look_at_mode(), self._look_at_state()

    def _look_at_mode(self) -> Any:
        """What decides about a call besides its inputs."""
        autocast = torch.is_autocast_enabled("cuda")
        return [m.training for m in self._modules], autocast, torch.get_autocast_dtype("cuda") if autocast else None

    def _look_at_state(self) -> Any:
        """Where everything lies."""
        tensors = [own.get(name) for own, name in self._tensors]
        where = [t is not None and (t.data_ptr(), t.requires_grad) for t in tensors]
        return where, [id(own.get(name)) for own, name in self._children]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        found = [_describe(t) for t in inputs]
        if found != self._expected:
            raise ValueError(f"captured for {_list(self._expected)}, called with {_list(found)}: capture again")
        if self._look_at_mode() != self._mode:
            raise RuntimeError("train() or eval(), or autocast, is not what it was at the capture: capture again")
        if self._look_at_state() != self._state:
            raise RuntimeError("a module, parameter or buffer was replaced, moved or frozen: capture again")
        if self._trains:
            return self._call(*inputs)
        with torch.no_grad():
            return self._call(*inputs)


def capture(module: torch.nn.Module, *inputs: torch.Tensor) -> Captured:
    """A callable that does what `module(*inputs)` does, for other inputs of the same kind, from a CUDA graph: no Python and
    one launch for each pass, which is what small batches spend their time on.

    With grad mode on and something that requires grad, forward and backward are captured (call it, and then
    `loss.backward()`, as you would the module); otherwise the forward pass alone, and results don't require grad.

        step = fastlayers.capture(model, torch.randn_like(x))
        for x, y in batches:
            loss = F.cross_entropy(step(x), y)
            loss.backward(); optimizer.step(); optimizer.zero_grad()

    The rules of CUDA graphs hold: sizes, dtypes, devices and requires_grad of the inputs stay the same, as do train() or
    eval(), autocast, and where parameters and buffers lie; writing into those (an optimiser, load_state_dict) is fine.
    All that is checked at every call. What isn't: the module's Python runs at the capture alone, so it must neither
    depend on data nor wait for the GPU. Results and gradients of inputs lie in memory that the next call overwrites:
    clone what you keep. No second derivatives. The module itself stays as it is, and can go on being called.

    Shape, Dtype: any that the module takes.
    Raises:
        TypeError: the module is none, or an input is no tensor.
        ValueError: no input, something isn't on the one GPU, a hook is registered, or autocast caches its casts
            (use torch.autocast(..., cache_enabled=False)). A call with other inputs than those captured for.
        RuntimeError: no GPU, or, at a call, what must stay the same has changed.
    Source: torch.cuda.make_graphed_callables, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"capture takes a module, not {type(module).__name__}")
    for t in inputs:
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"capture takes tensors as inputs, not {type(t).__name__}")
    if not inputs:
        raise ValueError("capture needs the inputs of a call, or others of their kind")
    for name, m in module.named_modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            raise ValueError(f"{name or type(m).__name__} has a hook, which a graph would not call: remove it first")
    if not _has_gpu():
        raise RuntimeError("capture needs a GPU: a CUDA graph replays a GPU's launches, and there is none")
    devices = {t.device for t in (*inputs, *module.parameters(), *module.buffers())}
    if len(devices) > 1 or not _on_gpu(inputs[0]):
        raise ValueError(f"capture needs everything on one GPU, not on {', '.join(sorted(map(str, devices)))}")
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise ValueError("autocast caches its casts, which a graph can't: use torch.autocast(..., cache_enabled=False)")
    with torch.cuda.device_of(inputs[0]):
        return Captured(module, inputs)


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _describe(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad


def _list(kinds: list[tuple[Any, ...]]) -> str:
    return ", ".join(f"{d} {list(s)} on {where}{' requiring grad' * grad}" for s, d, where, grad in kinds) or "nothing"
