"""One record per operation: subclass `Operation`, fill in what is particular to it, and an instance is the function.

What follows from a record, for every operation alike: the choice between kernels and torch with its reason (policy, explain),
autocast, the replay of launches, the autograd.Function with gradients and second derivatives, the operator that torch.compile
keeps whole, FLOPs and bytes. docs/decisions/0011 says how the pieces fit together.
"""

from __future__ import annotations

import functools
import re
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling  # half of is_compiling's time; torch.export is a reason of `unsupported`

from . import autograd, compiled, draws
from ._kernels import OutOfResources, Replayable, is_plain, without_none
from ._torch import any_autocast, unseen
from .dispatch import autocast, explain, policy, support
from .dispatch.support import BadInput, wants_grad
from .values import Named, Needs, Out, Tensors


class NoOptions(NamedTuple):
    """The options of an operation that has none."""


class Operation:
    """What is said of an operation. `t` is its tensors by name, `needs` says of each whether its gradient is asked for.

    `outputs`, `saves`, `gradients` and `flops` are given real tensors, fake ones or descriptions (`Out`): they may look at
    shape, dtype and stride() alone. `unsupported` is traced by Dynamo, and looks at no values. `forward` and `backward`
    may only launch kernels, of which everything must follow from the tensors' sizes, strides, dtypes, device and alignment and
    from the options, since launches are replayed.
    """

    tensors: ClassVar[tuple[str, ...]]
    """Names of the tensor arguments. The first is never None; a last name that begins with * stands for any number of them."""
    floats: ClassVar[tuple[str, ...] | None] = None
    """Those that must agree in dtype; None: all of them. `unsupported` judges the dtypes of the others. float32 products of the
    first of them obey `precision`."""
    autocast: Callable[[torch.Tensor], torch.Tensor] | None = None
    """torch's function of a (1, 1) tensor, by which torch is asked for its autocast rule; None: autocast leaves it alone."""
    cast: ClassVar[tuple[str, ...] | None] = None
    """The tensors that autocast converts; None: all floating ones."""
    widens: ClassVar[bool] = False
    """True: what autocast widens is widened in the kernel. The tensors stay as they are, and the options' `dtype`, unless it is
    given, becomes the result's."""
    compiled: ClassVar[bool] = True
    """False: inside torch.compile, Inductor gets torch's own function."""
    mutates_last: ClassVar[bool] = False
    """Whether the forward's last launch alone writes into tensors that are given, so that nothing is written if one fails."""
    silent: ClassVar[tuple[str, ...]] = ()
    """Of the tensors that are written into, those whose version counter torch leaves as it is."""

    Options: Any = NoOptions
    """A NamedTuple of torch's arguments that aren't tensors, in torch's order: numbers, words, dtypes, tuples and values
    (`values.value`).

    One object is kept for equal options and compared by identity, so that a replay doesn't take 1.0 or True for 1. Numbers
    within tuples must be converted by whoever calls (`float(slope)`)."""

    # --- what a record says ------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> Any:
        """torch's own function of (*tensors, *options): takes the calls that the kernels can't, raises torch's errors, and is
        differentiated for second derivatives."""
        raise NotImplementedError

    def label(self, options: Any) -> str:
        """What `explain` calls it: the name of torch's function."""
        return self.name

    def unsupported(self, t: Any, options: Any) -> str | None:
        """What speaks against the kernels beside devices and the dtypes of `floats`; a BadInput where torch would raise."""
        return None

    def probe(self, options: Any) -> autocast.Probe | None:
        """`autocast`, where it depends on the options: always the same function for the same options."""
        return self.autocast

    def prepare(self, tensors: Tensors, options: Any) -> tuple[Tensors, Any]:
        """Under autocast, the tensors and options to compute with. By default the tensors converted to the dtypes in which
        autocast has torch compute."""
        probe = self.probe(options)
        if probe is None:
            return tensors, options
        if self.widens:
            dtype = autocast.dtype_after(probe, tensors[0]) if options.dtype is None else tensors[0].dtype
            return tensors, options if dtype is tensors[0].dtype else self.changed(options, dtype=dtype)
        found = autocast.convert(probe, tensors)
        if self.cast is not None:
            names = self.names(len(tensors) + self._random)[: len(tensors)]  # the seed isn't drawn yet
            found = [c if name in self.cast else t for c, t, name in zip(found, tensors, names, strict=True)]
        return tuple(found), options

    def results(self, options: Any) -> int:
        """How many of the first outputs are the caller's. The others are kept for the backward."""
        return 1

    def mutates(self, options: Any) -> tuple[str, ...]:
        """Names of the tensors that the forward writes into."""
        return ()

    def random(self, options: Any) -> bool:
        """Whether the last of `tensors`, "seed", is drawn from torch's generator at every call (draws.py)."""
        return False

    def advance(self, t: Any, options: Any) -> int:
        """Of a random operation that draws torch's own numbers: how far torch's function moves CUDA's generator. The draw is
        then `draws.philox`; otherwise it is `draws.seed`."""
        raise NotImplementedError

    def precision(self, dtype: torch.dtype) -> str:
        """How products are computed: "ieee", or for float32 "tf32" where torch's switch says so."""
        return "ieee"

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        """What the forward writes, by name: descriptions, or the name of a tensor that is written into and returned. Without
        `needs` no gradient is asked for: the results alone."""
        raise NotImplementedError

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        """Launch the kernels: write everything in `out`."""
        raise NotImplementedError

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        """Names of the tensors and outputs that the gradients which `needs` asks for are computed from."""
        raise NotImplementedError

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        """What the backward writes: for each tensor, given as a description, its gradient's description if it is needed, or the
        index of another tensor whose gradient is the same. Or the name of a result, where the tensor's gradient is that
        result's, as for a term of a sum; only in records that aren't `compiled`."""
        flat = (*like[:-1], *like[-1]) if self.variadic else like
        return tuple([Out(o.shape, o.dtype) if need else None for o, need in zip(flat, needs, strict=True)])

    def reached(self, given: Sequence[str], needs: Needs) -> Needs:
        """Of the gradients that are asked for, those that depend on the gradients of these results. It is asked where some of
        several results have none: a tensor that only those depend on has no gradient, which isn't one of zeros."""
        return needs

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        """Launch the kernels: from the gradients of the results, write every gradient in `grads` that isn't None."""
        raise NotImplementedError

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        """The backward in differentiable functions of torch, for second derivatives and batched gradients. By default torch's
        derivative of `reference`, in which a tensor that wasn't saved lends its shape alone."""
        some = next(d for d in dy.values() if d is not None)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(some.device.type, enabled=False):
            args: list[Any] = []
            for name, o, need in zip(self.names(len(like)), like, needs, strict=True):
                if o is None or name in self.mutates(options) or name == "seed":
                    args.append(None)
                    continue
                t = saved.get(name)
                if t is None:
                    t = torch.zeros((), dtype=o.dtype, device=some.device).expand(o.shape)
                args.append(t.detach().requires_grad_() if need and not t.requires_grad else t.view_as(t))
            if self._random:
                args = args[:-1]
            results = self.reference(*args, *options)
            results = results if isinstance(results, tuple) else (results,)
            pairs = [(r, d) for r, d in zip(results, dy.values(), strict=False) if d is not None]
            wanted = [t for t, need in zip(args, needs, strict=False) if need]
            ys, ds = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(ys, wanted, ds, create_graph=create_graph, allow_unused=True))
        return [next(found) if need else None for need in needs]

    def flops(self, like: Any, options: Any, needs: Needs | None) -> int:
        """Floating-point operations of the forward, or of the backward that gives `needs`. Only products count, as in torch's
        FlopCounterMode."""
        return 0

    # --- what follows from it ----------------------------------------------------------------------------------------------

    def __init__(self) -> None:
        cls = type(self)
        self.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        self.variadic = self.tensors[-1].startswith("*")
        by_identity = dict(__slots__=(), __hash__=object.__hash__, __eq__=lambda a, b: a is b)
        self.Options = type("Options", (cls.Options,), by_identity)
        self.options = functools.lru_cache(maxsize=4096, typed=True)(self.Options)
        self.Tensors = namedtuple("Tensors", [name.lstrip("*") for name in self.tensors])
        self.floating = [i for i, name in enumerate(self.tensors) if self.floats is None or name in self.floats]
        self.main = self.floating[0]
        # What a record doesn't override isn't asked at every call.
        self._optional = len(self.tensors) > 1  # some of the tensors may be None
        self._precise = cls.precision is not Operation.precision
        self._random = cls.random is not Operation.random
        self._torchs_numbers = cls.advance is not Operation.advance
        self._mutates = cls.mutates is not Operation.mutates
        self._several = cls.results is not Operation.results
        self.operator: Any = None
        """torch's operators of the forward and the backward, for torch.compile."""
        self.backward_operator: Any = None
        self._plans: dict[Any, autograd.Plan] = {}
        self._forward, self._backward = Replayable(self._run_forward), Replayable(self._run_backward)
        if self.compiled:
            compiled.register(self)

    def changed(self, options: Any, **changes: Any) -> Any:
        """The options with some of them replaced."""
        new = options._replace(**changes)
        return new if is_dynamo_compiling() else self.options(*new)

    def names(self, count: int) -> list[str]:
        """The names of so many tensors; those of "*params" are params0, params1, ..."""
        if not self.variadic:
            return list(self.tensors)
        fixed, rest = self.tensors[:-1], self.tensors[-1][1:]
        return [*fixed, *[f"{rest}{i}" for i in range(count - len(fixed))]]

    def named(self, tensors: Tensors) -> Any:
        """The tensors by name; those of "*params" as one tuple."""
        if not self.variadic:
            return self.Tensors(*tensors)
        fixed = len(self.tensors) - 1
        return self.Tensors(*tensors[:fixed], tuple(tensors[fixed:]))

    def _precision(self, dtype: torch.dtype) -> str:
        return self.precision(dtype) if self._precise else "ieee"

    def _run_forward(self, tensors: Tensors, options: Any, grad: bool | Needs, precision: str) -> tuple[Any, ...]:
        """All outputs. `grad`: which gradients will be asked for; True: those of the tensors that require one."""
        needs = tuple([t is not None and t.requires_grad for t in tensors]) if grad is True else grad or None
        t = self.named(tensors)
        specs = self.outputs(t, options, needs if needs and any(needs) else None)
        out = Named({k: getattr(t, s) if isinstance(s, str) else s.empty(tensors[0].device) for k, s in specs.items()})
        self.forward(t, out, options, precision)
        return tuple(out.values())

    def _run_backward(self, tensors: Tensors, plan: autograd.Plan, needs: Needs, precision: str) -> tuple[Any, ...]:
        """The gradients, from those of the results and what was saved."""
        count = plan.results
        dy = Named(zip(plan.outputs, tensors[:count], strict=False))
        saved = Named(zip(plan.names, tensors[count:], strict=True))
        device = next(t for t in tensors if t is not None).device
        specs = self.gradients(self.named(plan.like), plan.options, needs)
        grads = [o.empty(device) if isinstance(o, Out) else None for o in specs]
        grads = [grads[o] if isinstance(o, int) else g for o, g in zip(specs, grads, strict=True)]
        grads = [dy[o] if isinstance(o, str) else g for o, g in zip(specs, grads, strict=True)]
        self.backward(self.named(grads), dy, saved, plan.options, precision)
        return tuple(grads)

    def __call__(self, tensors: Tensors, *values: Any, joined: bool = False) -> Any:
        """torch's function of these tensors and options.

        Args:
            joined: the call stands for several layers. Where the kernels don't take it whole the result is None, and the layers
                are to be called one by one.
        """
        if is_dynamo_compiling():
            return compiled.call(self, tensors, self.Options(*values), joined)
        try:
            options = self.options(*values)
        except TypeError:  # one of them can't be hashed
            return self.refused(tensors, values, f"options {values}")
        return self.run(tensors, options, joined)

    def refused(self, tensors: Tensors, values: Sequence[Any], reason: str) -> Any:
        """Call torch's own function with arguments for which it should raise an error."""
        return support.run_reference(self.name, BadInput(reason), lambda: self.reference(*tensors, *values))

    def run(self, tensors: Tensors, options: Any, joined: bool = False) -> Any:
        """As `__call__`, with options that `self.options` made."""
        if is_dynamo_compiling():
            return compiled.call(self, tensors, options, joined)
        if policy.current != "torch" and explain.recorder is None and unseen():
            outputs = self._replayed(tensors, options)
            if outputs is not None:
                return self._results(outputs, options) if self._several else outputs[0]
        reason = self.reason_against(tensors, options)
        if reason is None:
            launching = functools.partial(self._launch, tensors, options)
            try:
                recorder = explain.recorder
                outputs = launching() if recorder is None else recorder.launching(self.label(options), launching)
                return self._results(outputs, options)
            except OutOfResources as error:
                if self._mutates and not self.mutates_last and self.written(tensors, options):
                    raise  # an earlier launch of the same call may have written into them
                reason = support.out_of_resources(error)
        if joined:
            return None
        return support.run_reference(self.label(options), reason, lambda: self.reference(*tensors, *options))

    def _results(self, outputs: Sequence[Any], options: Any) -> Any:
        count = self.results(options)
        return outputs[0] if count == 1 else tuple(outputs[:count])

    def reason_against(self, tensors: Tensors, options: Any) -> str | None:
        """Why torch's own function must take this call; None if the kernels can."""
        floats = tensors if self.floats is None else [tensors[i] for i in self.floating]
        probe = self.probe(options) if any_autocast() else None
        reason = support.unsupported(tensors, floats, probe)
        if reason is None and self._mutates:
            reason = self._unwritable(tensors, options)
        if reason is None and self._torchs_numbers:
            reason = draws.unavailable(tensors[0].device)
        if reason is not None:
            return reason
        return self.unsupported(self.named((*tensors, None) if self._random else tensors), options)

    def draw(self, tensors: Tensors, options: Any) -> Any:
        """What a call of a random operation draws; None where these options draw nothing."""
        if not self.random(options):
            return None
        device = tensors[0].device
        if self._torchs_numbers:
            return draws.philox(device, self.advance(self.named((*tensors, None)), options))
        return draws.seed(device)

    def _unwritable(self, tensors: Tensors, options: Any) -> str | None:
        for i in self.written(tensors, options):
            reason = support.unwritable(tensors[i])
            if reason is not None:
                return reason
        return None

    def _replayed(self, tensors: Tensors, options: Any) -> tuple[Any, ...] | None:
        """The outputs, if the kernels took a call with the same signature before and their launches were recorded."""
        if not is_plain(tensors[0]):
            return None
        if any_autocast():
            if self._optional and not all([t is None or is_plain(t) for t in tensors]):
                return None
            tensors, options = self.prepare(tensors, options)
        drawn = False
        if self._random:
            drawn = self.random(options)
            seed: Any = draws.like(tensors[0].device, self._torchs_numbers) if drawn else None
            tensors = (*tensors, seed)
        grad = torch.is_grad_enabled()
        precision = self.precision(tensors[self.main].dtype) if self._precise else "ieee"
        present = without_none(tensors) if self._optional else tensors
        found = self._forward.find(present, (options, grad, precision))
        if found is None:
            return None
        recording, addresses, wanted = found
        writes = recording.writes
        if writes is None:
            writes = recording.writes = bool(self.mutates(options))
        if writes and self._unwritable(tensors, options) is not None:
            return None
        if drawn:  # only now is it sure that the kernels run, so that torch's generator may advance
            seed = self.draw(tensors[:-1], options)
            tensors = (*tensors[:-1], seed)
            addresses = (*addresses[:-1], seed.data_ptr())
            found = (recording, addresses, wanted)
        if grad and wanted:
            return autograd.apply(self, options, found, *tensors)
        outputs = recording.play(tensors, addresses)
        if writes and outputs is not None:
            self._bump(tensors, options)
        return outputs

    def _launch(self, tensors: Tensors, options: Any) -> tuple[Any, ...]:
        if any_autocast():
            tensors, options = self.prepare(tensors, options)
        if self._random:
            tensors = (*tensors, self.draw(tensors, options))
        if wants_grad(*tensors):
            return autograd.Function.apply(self, options, None, *tensors)  # type: ignore[return-value]
        precision = self._precision(tensors[self.main].dtype)
        outputs = self._forward(tensors, options, torch.is_grad_enabled(), precision)
        if self._mutates:
            self._bump(tensors, options)
        return outputs

    def written(self, tensors: Tensors, options: Any) -> list[int]:
        """The places of the tensors that the forward writes into."""
        places = [self.tensors.index(name) for name in self.mutates(options)]
        return [i for i in places if tensors[i] is not None]

    def bumped(self, tensors: Tensors, options: Any) -> list[int]:
        """The places of those whose version counter must be advanced: autograd doesn't see what kernels write. (A compiled
        graph copies into them by torch's own operator, which does.)"""
        if is_dynamo_compiling():
            return []
        places = [i for i in self.written(tensors, options) if self.tensors[i] not in self.silent]
        return [i for i in places if not tensors[i].is_inference()]

    def _bump(self, tensors: Tensors, options: Any) -> None:
        for i in self.bumped(tensors, options):
            torch.autograd.graph.increment_version(tensors[i])

    def plan(self, tensors: Tensors, options: Any, needs: Needs) -> autograd.Plan:
        """What a forward leaves for its backward; the same object for all calls with one signature."""
        key = options, needs, *[t if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= 4096:
                self._plans.clear()
            found = self._plans[key] = autograd.Plan(self, tensors, options, needs)
        return found
