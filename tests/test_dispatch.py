"""Which path a call takes, why, and who can ask."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlayers
import fastlayers.functional as FL
from fastlayers import NotAccelerated, nn
from fastlayers._kernels import OutOfResources
from fastlayers.catalog import CLASSES, ROWS, Row
from fastlayers.kernels.runtime import launch as _launch


def reason(call: Any, *args: Any) -> str | None:
    """Why torch took the call; None if the kernels did."""
    with fastlayers.policy("auto"):
        decisions = list(fastlayers.explain(call, *args))
    assert len(decisions) == 1
    assert (decisions[0].path == "torch") == (decisions[0].reason is not None)
    assert bool(decisions[0].kernels) == (decisions[0].path == "triton")
    return decisions[0].reason


class Subclass(torch.Tensor):
    pass


class QuietMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class QuietDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_every_reason(device: torch.device) -> None:
    x, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    assert reason(FL.linear, x, w) is None
    assert reason(FL.linear, x.to("meta"), w.to("meta")) == "tensors on meta: the kernels run on GPUs"
    assert reason(FL.linear, x.as_subclass(Subclass), w) == "Subclass is a tensor subclass"
    assert reason(FL.linear, x.int(), w.int()) == "dtype torch.int32"
    assert reason(FL.relu, x.to_sparse()) == "layout is torch.sparse_coo"
    assert reason(FL.relu, torch.randn(3, dtype=torch.cfloat).conj().imag) == "a lazily negated view"
    with QuietMode():
        assert reason(FL.linear, x, w) == "a TorchFunctionMode is active"
    with QuietDispatch():
        assert reason(FL.linear, x, w) == "a TorchDispatchMode is active"
    with forward_ad.dual_level():
        assert reason(FL.linear, x, w) == "forward-mode AD is active"
    with fastlayers.policy("auto"):
        seen = []
        torch.func.vmap(lambda v: (seen.append(fastlayers.explain(FL.relu, v)), v)[1])(x)
    assert next(iter(seen[0])).reason == "a functorch transform is active"


def test_a_kernel_that_does_not_fit_gives_way_to_torch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward, and in the backward alone. Only the compiled kernel says how much shared memory it needs."""
    launch, fits = _launch.launch, False

    def launch_if_it_fits(kernel: Any, *args: Any, **meta: Any) -> None:
        if not fits:
            raise OutOfResources(262_176, 232_448, "shared memory")
        launch(kernel, *args, **meta)

    monkeypatch.setattr(_launch, "launch", launch_if_it_fits)
    x, w = (torch.randn(3, 4, device=device, requires_grad=True) for _ in range(2))
    dy, want = torch.randn(3, 3, device=device), F.linear(x, w)
    with pytest.raises(NotAccelerated, match=r"^linear: this GPU can't run a kernel of the call: .*262176"):
        FL.linear(x, w)
    with fastlayers.policy("auto"):
        torch.testing.assert_close(FL.linear(x, w), want)
        assert "262176" in str(reason(FL.linear, x, w))
    fits = True
    y = FL.linear(x, w)
    fits = False
    with pytest.raises(NotAccelerated, match=r"^linear backward: this GPU can't run"):
        y.backward(dy, retain_graph=True)
    with fastlayers.policy("auto"):
        (decision,) = fastlayers.explain(lambda: y.backward(dy, retain_graph=True))
        assert "262176" in str(decision.reason)
        got, expected = (torch.autograd.grad(out, (x, w), dy) for out in (y, want))
        torch.testing.assert_close(got, expected)


def test_tensors_without_memory_are_torchs(device: torch.device) -> None:
    """Zeros that nobody stored, and what functionalization wraps: first, and after calls that are replayed."""
    fastlayers.policy("auto")
    x, w = torch.randn(4, 4, device=device), torch.randn(4, 4, device=device)
    for _ in range(4):
        for odd in (torch._efficientzerotensor((4, 4), device=device), torch._to_functional_tensor(x)):
            for ours, theirs in ((FL.linear, F.linear), (lambda t, _: FL.relu(t), lambda t, _: F.relu(t))):
                got, want = ours(odd, w), theirs(odd, w)
                if torch._is_functional_tensor(want):
                    got, want = torch._from_functional_tensor(got), torch._from_functional_tensor(want)
                torch.testing.assert_close(got + 0, want + 0)
        torch.testing.assert_close(FL.linear(x, w), F.linear(x, w))


def test_default_device_is_no_reason(device: torch.device) -> None:
    """torch.set_default_device keeps a TorchFunctionMode active for good."""
    with torch.device(device):
        assert reason(FL.relu, torch.randn(3)) is None


def test_policies(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    with fastlayers.policy("torch"):
        (decision,) = fastlayers.explain(FL.relu, x)
        assert decision.reason == 'policy is "torch"'
        with fastlayers.policy("triton"):
            (decision,) = fastlayers.explain(FL.relu, x)
            assert decision.path == "triton"
        assert next(iter(fastlayers.explain(FL.relu, x))).path == "torch"
    with fastlayers.policy("triton"), pytest.raises(NotAccelerated, match=r"relu: dtype torch\.int64"):
        FL.relu(x.long())
    fastlayers.policy("torch")  # without a block it stays
    assert next(iter(fastlayers.explain(FL.relu, x))).path == "torch"
    fastlayers.policy("triton")
    with pytest.raises(ValueError, match="policy must be"):
        fastlayers.policy("fast")  # type: ignore[arg-type]


def test_explain_prints_a_table_and_is_data(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Softmax(1)).to(device)
    explanation = fastlayers.explain(model, torch.randn(2, 4, device=device))
    assert [(d.module, d.op, d.path) for d in explanation] == [
        ("0 + 1", "linear", "triton"),
        ("2", "Flatten", "torch"),
        ("3", "softmax", "triton"),
    ]
    lines = str(explanation).splitlines()
    assert len(lines) == 4
    assert "Flatten is not one of our layers" in lines[2]


def test_explain_leaves_nothing_behind(device: torch.device) -> None:
    before = torch.nn.Module.__call__
    with pytest.raises(ZeroDivisionError):
        fastlayers.explain(lambda: 1 / 0)
    assert torch.nn.Module.__call__ is before
    assert len(fastlayers.explain(FL.relu, torch.randn(3, device=device))) == 1
    with pytest.raises(RuntimeError, match="within explain"):
        fastlayers.explain(lambda: fastlayers.explain(FL.relu, torch.randn(3, device=device)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
def test_functorch(device: torch.device) -> None:
    """grad, vmap, jacobians and Hessian of a fused model: torch's own functions, torch's own numbers."""
    from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

    ours = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).to(device)
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, device=device)
    results = []
    with fastlayers.policy("auto"):
        for model in (ours, theirs):
            params = {k: v.detach() for k, v in model.named_parameters()}

            def call(p: Any, x: torch.Tensor, model: Any = model) -> torch.Tensor:
                return functional_call(model, p, (x,)).square().sum()

            results.append(
                [
                    *grad(call)(params, x).values(),
                    *vmap(grad(call), in_dims=(None, 0))(params, x).values(),
                    jacrev(model)(x[0]),
                    jacfwd(model)(x[0]),
                    hessian(lambda x, call=call, params=params: call(params, x))(x[0]),
                    jvp(model, (x,), (x * 2,))[1],
                ]
            )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["dispatch", "vmap"])
def test_backward_alone_under_a_watching_mode(mode: str, device: torch.device) -> None:
    """Forward on kernels, backward where someone watches or transforms: torch's functions, the same numbers."""
    layer = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).to(device)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    y = layer(x)
    dy = torch.randn(5, *y.shape, device=device)
    expected = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in dy])
    if mode == "vmap":
        got = torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(dy)
    else:
        with QuietDispatch():
            got = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in dy])
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_torch_compile(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(1)).to(device)
    x = torch.randn(2, 4, device=device)
    with fastlayers.policy("auto"):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_threads(device: torch.device) -> None:
    """Two threads, two models: the right numbers in both."""
    failures: list[BaseException] = []

    def train(seed: int) -> None:
        try:
            ours = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).to(device)
            theirs = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).to(device)
            theirs.load_state_dict(ours.state_dict())
            x = torch.linspace(-1, 1, 12, device=device).view(3, 4) * seed
            for _ in range(5):
                for model in (ours, theirs):
                    model.zero_grad()
                    model(x).square().sum().backward()
                for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(i + 1,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_drop_in_namespaces() -> None:
    """One changed import line is enough. What else the namespaces hold, test_namespace.py says."""
    import fastlayers.nn.functional as from_nn

    assert from_nn is FL is nn.functional
    for theirs, ours in CLASSES.items():
        assert getattr(nn, theirs.__name__) is getattr(fastlayers, theirs.__name__) is ours
        assert ours is not theirs
        assert issubclass(ours, theirs)
    scope: dict[str, Any] = {}
    exec("from fastlayers.nn import *", scope)
    assert scope["Linear"] is fastlayers.Linear
    assert scope["Bilinear"] is torch.nn.Bilinear


def test_policy_object_used_later(device: torch.device) -> None:
    kept = fastlayers.policy("torch")
    fastlayers.policy("triton")
    with kept:
        assert next(iter(fastlayers.explain(FL.relu, torch.randn(3, device=device)))).path == "torch"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_are_torchs(device: torch.device) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], device=device)
    w, b = torch.randn(5, 3, device=device), torch.randn(5, device=device)
    with fastlayers.policy("auto"):
        for ours, theirs in (
            (FL.linear(nested, w, b), F.linear(nested, w, b)),
            (FL.relu(nested), F.relu(nested)),
            (FL.softmax(nested, -1), F.softmax(nested, -1)),
        ):
            for a, c in zip(ours.unbind(), theirs.unbind(), strict=True):
                torch.testing.assert_close(a, c)
        assert "nested" in str(fastlayers.explain(FL.relu, nested))
        with torch.autocast(device.type, torch.bfloat16):
            for a, c in zip(FL.linear(nested, w, b).unbind(), F.linear(nested, w, b).unbind(), strict=True):
                torch.testing.assert_close(a, c)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_autocast_of_one_device_and_tensors_of_another(row: Row, device: torch.device) -> None:
    """Of "meta", say, which knows no autocast."""
    for case in row.cases.values():
        if getattr(case.make(torch.nn), "momentum", 0) is None:
            continue  # torch asks the counter of batches for its number, which no tensor on "meta" has
        arguments = case.arguments(torch.float32, "meta")
        with fastlayers.policy("auto"), torch.autocast(device.type, torch.bfloat16):
            both = [tree_leaves(case.make(space).to("meta")(*arguments)) for space in (nn, torch.nn)]
        ours, theirs = ([t if t is None else (t.shape, t.dtype, t.device) for t in results] for results in both)
        assert ours == theirs


def test_missing_arguments_are_named_as_torchs() -> None:
    with pytest.raises(TypeError, match=r"^linear\(\) missing"):
        FL.linear(torch.randn(2, 3))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^relu\(\) got an unexpected"):
        FL.relu(torch.randn(2, 3), nothing=1)  # type: ignore[call-arg]
