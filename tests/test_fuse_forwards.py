"""fuse takes over everything that a forward does, or leaves the module as it is and says why. Nothing is seen afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import types
import warnings
from typing import Any

import forwards
import pytest
import torch
import torch.nn.functional as F
from forwards import REFUSED, TRACED
from networks import Between

import fastlayers

pytestmark = [pytest.mark.usefixtures("small_tiles"), pytest.mark.filterwarnings("ignore:fuse found nothing")]


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


class Factor:
    factor = 1.5


class Meter:
    def __init__(self) -> None:
        self.total = 0

    def update(self, n: int) -> None:
        self.total += n


class Stateful(Between):
    """With everything that a forward might read or change."""

    def __init__(self, forward: Any):
        super().__init__(forward)
        self.kept: list[Any] = []
        self.table: dict[str, Any] = {}
        self.objects, self.meter = [Factor()], Meter()
        self.flag, self.rate, self.times, self.what = True, 0.5, 2, {"factor": 3.0}
        self.register_buffer("buffer", torch.zeros(1))


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 2, 4, 5, device=device)


def visible(model: Any) -> Any:
    """What tracing might have left behind: attributes of the model's modules, globals, patches of torch, grad mode."""
    own = [{**vars(m)} for m in model.modules()]
    inner = [
        [*model.kept],
        {**model.table},
        model.meter.total,
        [*forwards.HISTORY],
        {**forwards.TABLE},
        {**forwards.COUNTS},
    ]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    patched = torch.nn.Module.__call__, torch.nn.Module.__getattr__, torch.no_grad.__enter__, torch.autocast.__enter__
    return (
        own,
        inner,
        [*state],
        patched,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        [*F.__dict__.values()],
    )


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_a_graph_can_not_do_is_refused(forward: Any, x: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model = Stateful(forward).to(x.device)
    before = visible(model)
    with pytest.raises(torch.fx.proxy.TraceError) as caught:
        fastlayers.fuse(model)
    assert visible(model) == before
    message = str(caught.value)
    assert REFUSED[forward] in message
    code = forward.__code__
    line = int(message.split(f"{code.co_filename}:")[-1].split(",")[0]) if code.co_filename in message else 0
    if forward is not forwards.calls_a_method_that_keeps:
        assert code.co_firstlineno <= line <= max(n for _, _, n in code.co_lines() if n), message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("forward", TRACED, ids=lambda f: f.__name__)
def test_what_a_graph_does(forward: Any, x: torch.Tensor) -> None:
    """In training and in eval, switched after the fact, on the fused module and on the model."""
    theirs = Stateful(forward).to(x.device)
    ours = copy.deepcopy(theirs)
    before = visible(ours)
    fused = fastlayers.fuse(ours)
    assert visible(ours) == before
    modes = [lambda mode: fused.train(mode), lambda mode: [m.train(mode) for m in (fused, ours)]]
    copies = [fused, copy.deepcopy(fused)]
    for training in (True, False, True):
        for switch in modes:
            switch(training)
            theirs.train(training)
            for again in copies:
                again.train(training)
                again.load_state_dict(theirs.state_dict())
                torch.manual_seed(0)
                found = again(x)
                torch.manual_seed(0)
                expected = theirs(x)
                torch.testing.assert_close(found, expected)
                assert type(found) is type(expected)


def changes(name: str) -> Any:
    def change(model: Any) -> None:
        if name == "number":
            model.rate = 0.25
        elif name == "loops":
            model.times = 3
        elif name == "dictionary":
            model.what["factor"] = 5.0
        elif name == "nothing":
            model.what = None
        elif name == "object":
            model.objects[0].factor = 7.0
        elif name == "list":
            model.objects.insert(0, types.SimpleNamespace(factor=0.5))
        else:
            forwards.SCALE = 4.0

    return change


@pytest.mark.parametrize("name", ["number", "loops", "dictionary", "nothing", "object", "list", "global"])
def test_what_a_forward_reads_is_looked_at_again(name: str, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "SCALE", 2.0)
    model = Stateful(forwards.decides_by_numbers).to(x.device)
    torch.nn.init.ones_(model.conv.bias)  # or a ReLU might leave nothing, in which no change would show
    fused = fastlayers.fuse(model)
    torch.testing.assert_close(before := fused(x), model(x))
    changes(name)(model)
    torch.testing.assert_close(fused(x), model(x))
    assert not torch.equal(fused(x), before)


class Counting(torch.nn.Module):
    """A container that can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = torch.nn.Conv2d(2, 2, 1), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.relu(self.conv(x))


class Scaled(torch.nn.Module):
    """A container that can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = torch.nn.Conv2d(2, 2, 1), torch.ones(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x)) * self.scale


def test_only_the_container_stays_that_can_not_be_traced(x: torch.Tensor) -> None:
    model = torch.nn.Sequential(Scaled(), Counting(), torch.nn.Sequential(Counting(), Scaled())).to(x.device)
    for m in model.modules():
        if isinstance(m, Scaled):
            m.scale = m.scale.to(x.device)
    fastlayers.accelerate(model)
    with pytest.warns(
        UserWarning, match=r"leaves 1, 2\.0 \(Counting\) as it is: .*test_fuse_forwards.py:\d+, `self.calls \+= 1`"
    ):
        fused = fastlayers.fuse(model)
    names = [d.module for d in fastlayers.explain(fused, x) if d.path == "triton"]
    assert names == ["0.conv + relu", "1.conv", "2.0.conv", "2.1.conv + relu"]
    torch.testing.assert_close(fused(x), model(x))
    assert model[1].calls == 3


def test_containers_changed_since(x: torch.Tensor) -> None:
    """Replaced, given a hook or another forward, edited."""
    model: Any = torch.nn.Sequential(Scaled(), torch.nn.Sequential(Scaled(), torch.nn.ReLU())).to(x.device)
    fused = fastlayers.fuse(model)

    def check() -> None:
        torch.testing.assert_close(fused(x), model(x))

    check()
    model[0].scale = torch.full((1,), 2.0, device=x.device)
    check()
    seen: list[Any] = []
    handle = model[1].register_forward_hook(lambda m, i, y: seen.append(None))
    check()
    assert len(seen) == 2
    handle.remove()
    check()
    model[0].forward = lambda x: x * 3
    check()
    del model[0].forward
    model[1].append(torch.nn.Tanh())
    check()
    model[0] = torch.nn.Identity()
    check()
    model[1][0] = Scaled().to(x.device)
    check()
    assert len(seen) == 2


def test_functions_and_classes_patched_since(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(Scaled()).to(x.device)
    fused = fastlayers.fuse(model)
    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", torch.tanh)
        torch.testing.assert_close(fused(x), model(x))
    with monkeypatch.context() as patch:
        patch.setattr(Scaled, "forward", lambda self, x: self.conv(x) + 1)
        torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused(x), model(x))


def test_pickles(x: torch.Tensor) -> None:
    """What is drawn at a call is drawn there in a copy, too; what the graph holds for is asked there as well."""
    model = Stateful(forwards.draws_noise).to(x.device)
    copied = pickle.loads(pickle.dumps(fastlayers.fuse(model)))
    assert not torch.equal(copied(x), copied(x))
    copied = pickle.loads(pickle.dumps(fastlayers.fuse(Stateful(forwards.drops_out).eval())))
    torch.testing.assert_close(copied(x), copied(x))
    assert not torch.equal(copied.train()(x), copied(x))
    copied = pickle.loads(pickle.dumps(fastlayers.fuse(Stateful(forwards.decides_by_training).eval())))
    copied(x)
    with pytest.raises(RuntimeError, match=r"training of .* isn't what it was when the model was fused"):
        copied.train()(x)


def test_arguments(x: torch.Tensor) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor, mask: Any) -> torch.Tensor:
            return F.relu(self.conv(x)) if mask is None else F.relu(self.conv(x)) * mask

    fused = fastlayers.fuse(Masked().to(x.device))
    fused(x, x)
    with pytest.raises(ValueError, match="fused for a mask that isn't None"):
        fused(x, None)

    class Any_(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 2, 1)

        def forward(self, *xs: torch.Tensor) -> torch.Tensor:
            return F.relu(self.conv(xs[0]))

    with pytest.raises(
        torch.fx.proxy.TraceError, match=r"test_fuse_forwards.py:\d+, `def forward\(self, \*xs.*any number"
    ):
        fastlayers.fuse(Any_())


class Parent(torch.nn.Module):
    offset = 1

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Conv2d(2, 2, 1) for _ in range(3)])
        self.heads = torch.nn.ModuleDict({"a": torch.nn.Conv2d(2, 1, 1), "b": torch.nn.Conv2d(2, 2, 1)})
        self.factors = torch.nn.ParameterList([torch.ones(1), torch.ones(1)])

    @property
    def count(self) -> int:
        return len(self.blocks) + self.offset

    @staticmethod
    def act(x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    def step(self, x: torch.Tensor, *layers: Any, **options: Any) -> torch.Tensor:
        for layer in layers:
            x = self.act(layer(x))
        return x * options.get("factor", 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.step(x, *self.blocks, factor=self.count)


class Child(Parent):
    def forward(self, x: torch.Tensor) -> Any:
        x = super().forward(x)
        x = self.blocks[-1](x) + sum(block(x) for block in self.blocks[:2]) * self.factors[0]
        return {name: F.relu(head(x)) for name, head in self.heads.items() if name in self.heads}, self.heads["a"](x)


def test_methods_properties_and_parents(x: torch.Tensor) -> None:
    model = Child().to(x.device)
    fastlayers.accelerate(model)
    fused = fastlayers.fuse(model)
    torch.testing.assert_close(fused(x), model(x))
    assert fused(x)[0]["b"].shape == x.shape
    assert [d.module for d in fastlayers.explain(fused, x)][:3] == [f"blocks.{i} + relu" for i in range(3)]
    Child.offset = 2
    torch.testing.assert_close(fused(x), model(x))
    del Child.offset


def test_threads_that_fuse_and_serve(x: torch.Tensor) -> None:
    """No thread sees what another one fuses, and nothing is left behind."""
    before = visible(Stateful(forwards.drops_out))[3]
    errors: list[Any] = []
    served = Stateful(forwards.keeps_what_it_makes).to(x.device).eval()
    expected, stop = served(x), threading.Event()

    def work(what: Any) -> None:
        try:
            what()
        except BaseException as error:
            errors.append(error)

    def serve() -> None:
        while not stop.is_set():
            torch.testing.assert_close(served(x), expected)
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                served(x)

    def fuse() -> None:
        for _ in range(10):
            model = Stateful(forwards.keeps_what_it_makes).to(x.device).eval()
            torch.testing.assert_close(fastlayers.fuse(model)(x), model(x))

    server = threading.Thread(target=work, args=(serve,))
    fusers = [threading.Thread(target=work, args=(fuse,)) for _ in range(3)]
    for thread in (server, *fusers):
        thread.start()
    for thread in fusers:
        thread.join()
    stop.set()
    server.join()
    assert not errors
    assert visible(Stateful(forwards.drops_out))[3] == before


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled_and_switched(x: torch.Tensor) -> None:
    model = Stateful(forwards.decides_by_training).to(x.device).eval()
    fused = fastlayers.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert isinstance(compiled(x), torch.Tensor)
    fused.train()
    assert isinstance(compiled(x), tuple)
    model = Stateful(forwards.decides_by_numbers).to(x.device)
    compiled = torch.compile(fastlayers.fuse(model), backend="eager", fullgraph=True)
    for name in ("number", "loops", "dictionary", "nothing"):
        torch.testing.assert_close(compiled(x), model(x))
        changes(name)(model)
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_source_that_is_not_there(x: torch.Tensor) -> None:
    space: dict[str, Any] = {}
    exec("def forward(m, x): return m.conv(x).relu()", space)
    with pytest.raises(torch.fx.proxy.TraceError, match="its source can't be found"):
        fastlayers.fuse(Between(space["forward"]))


def test_a_fused_model_is_freed() -> None:
    import weakref

    fused = fastlayers.fuse(Stateful(forwards.drops_out))
    watched = weakref.ref(fused)
    del fused
    gc.collect()
    assert watched() is None


def test_no_warnings_of_its_own(x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Stateful(forwards.drops_out)
        fastlayers.accelerate(model)
        fastlayers.fuse(model)


class Ticking(torch.nn.Module):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


class Clocked(torch.nn.Module):
    def __init__(self, late: bool) -> None:
        super().__init__()
        self.conv, self.clock, self.late = torch.nn.Conv2d(2, 2, 1), Ticking(), late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.late:
            x = self.clock(x)
            return F.relu(self.conv(x)) * self.clock.calls
        before = self.clock.calls
        return F.relu(self.conv(self.clock(x))) * before


def test_what_a_module_within_changes(x: torch.Tensor) -> None:
    """Read before its call it is what it was at the beginning, and otherwise an error rather than a wrong number."""
    model = Clocked(late=False).to(x.device)
    theirs, fused = copy.deepcopy(model), fastlayers.fuse(model)
    for _ in range(3):
        torch.testing.assert_close(fused(x), theirs(x))
    fused = fastlayers.fuse(Clocked(late=True).to(x.device))
    with pytest.raises(RuntimeError, match="calls of Ticking is changed by a call and read in it"):
        fused(x)


def test_global_hooks_see_containers(x: torch.Tensor) -> None:
    model = torch.nn.Sequential(Scaled()).to(x.device)
    fused = fastlayers.fuse(model)
    seen: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(type(m)))
    torch.testing.assert_close(fused(x), model(x))
    handle.remove()
    assert seen.count(Scaled) == 2


class Wrapped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 1)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x))


def test_decorated(x: torch.Tensor) -> None:
    message = r"test_fuse_forwards.py:\d+, `@torch.no_grad\(\)`: is wrapped in function of torch.utils._contextlib"
    with pytest.raises(torch.fx.proxy.TraceError, match=message):
        fastlayers.fuse(Wrapped())
    with pytest.warns(UserWarning, match=message):
        assert not fastlayers.fuse(torch.nn.Sequential(Wrapped()).to(x.device))(x).requires_grad


class Cache:
    """Something that a model is given and writes into."""

    def empty(self, x: torch.Tensor) -> None:
        x.zero_()


class Cached(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        y = self.conv(x)
        cache.empty(x)
        return F.relu(y) + x


def test_methods_of_what_is_given(x: torch.Tensor) -> None:
    """They may write into anything, so that no layer is moved across them."""
    model = Cached().to(x.device)
    fastlayers.accelerate(model)
    fused = fastlayers.fuse(model)
    torch.testing.assert_close(fused(x.clone(), Cache()), model(x.clone(), Cache()))


class Selfless(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 1)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return args[0].conv(*args[1:], **kwargs)


def test_a_forward_that_names_nothing() -> None:
    with pytest.raises(torch.fx.proxy.TraceError, match="forward names no self"):
        fastlayers.fuse(Selfless())
