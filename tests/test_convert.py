"""accelerate and restore: classes change, nothing else does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch

import fastlayers
from fastlayers import accelerate, restore
from fastlayers.catalog import CLASSES, ROWS, Case, Row

LAZY = "ignore:Lazy modules are a new feature:UserWarning"


def small() -> torch.nn.Sequential:
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Linear(8, 4), nn.ReLU()),
        nn.Linear(4, 3), nn.Softmax(1),
    )  # fmt: skip


@pytest.fixture
def model(device: torch.device) -> torch.nn.Sequential:
    return small().to(device)


@pytest.fixture
def image(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 1, 4, 4, device=device)


def classes(model: torch.nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.mark.filterwarnings(LAZY)
def test_every_class_of_ours_has_its_origin() -> None:
    for theirs, ours in CLASSES.items():
        assert ours is getattr(fastlayers, theirs.__name__)
        assert ours.__bases__[0] is theirs
        layer = theirs.__new__(theirs)
        torch.nn.Module.__init__(layer)
        model = torch.nn.ModuleList([layer])
        accelerate(model)
        assert type(model[0]) is ours
        restore(model)
        assert type(model[0]) is theirs


@pytest.mark.parametrize(
    ("row", "case"), [pytest.param(r, c, id=f"{r.name}-{n}") for r in ROWS for n, c in r.cases.items()]
)
def test_every_case_there_and_back(row: Row, case: Case) -> None:
    theirs, ours = case.make(torch.nn), case.make(fastlayers.nn)
    model = torch.nn.ModuleList([theirs])
    accelerate(model)
    # What torch's constructor makes inside a layer of ours is torch's.
    assert all([issubclass(a, b) for a, b in zip(classes(theirs), classes(ours), strict=True)])
    assert type(theirs) is type(ours)
    # A row of a function alone is called by a module of the tests.
    assert row.name in {type(m).__name__ for m in theirs.modules()} or not hasattr(torch.nn, row.name)
    assert repr(theirs) == repr(ours)
    restore(model)
    assert classes(theirs) == classes(case.make(torch.nn))


def test_there_and_back(model: torch.nn.Sequential, image: torch.Tensor) -> None:
    """Everything that isn't the class is the same object before, between and after."""

    def everything() -> list[Any]:
        contents = [(k, v) for m in model.modules() for k, v in sorted(vars(m).items()) if k != "_accelerated"]
        owned = [*model.modules(), *model.parameters(), *model.buffers(), *model.state_dict(keep_vars=True).values()]
        return [id(x) for x in owned] + [(k, id(v)) for k, v in contents]

    called: list[str] = []
    model[0].register_forward_hook(lambda *_: called.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, there, text = classes(model), everything(), repr(model)
    expected = model(image)
    with fastlayers.policy("auto"):
        report = accelerate(model)
        assert everything() == there
        assert repr(model) == text
        torch.testing.assert_close(model(image), expected)
        model(image).sum().backward()
        optimizer.step()
    assert all(
        type(m).__module__.startswith("fastlayers") for m in model.modules() if not isinstance(m, torch.nn.Flatten)
    )
    assert [row.path for row in report.changed] == ["", "0", "1", "3", "3.0", "3.1", "4", "5"]
    back = restore(model)
    assert [(row.was, row.now) for row in back.changed] == [(row.now, row.was) for row in report.changed]
    assert everything() == there
    assert classes(model) == before
    assert called == ["hook"] * 3
    assert not any("_accelerated" in vars(m) for m in model.modules())


def test_it_runs_on_kernels_and_fuses(model: torch.nn.Sequential, image: torch.Tensor) -> None:
    accelerate(model)
    with fastlayers.policy("auto"):
        decisions = list(fastlayers.explain(model, image))
    assert [(d.module, d.path) for d in decisions] == [
        ("0 + 1", "triton"), ("2", "torch"), ("3.0 + 3.1", "triton"), ("4", "triton"), ("5", "triton")
    ]  # fmt: skip


def test_again_changes_nothing(model: torch.nn.Sequential) -> None:
    accelerate(model)
    before = classes(model)
    again = accelerate(model)
    assert not again.changed
    assert {row.reason for row in again} == {"accelerated already", "fastlayers has no Flatten"}
    assert classes(model) == before
    with again:
        pass
    assert classes(model) == before, "only what this call has changed is restored at its end"


def test_what_was_ours_stays_ours() -> None:
    model = torch.nn.Sequential(fastlayers.Linear(2, 2), torch.nn.Linear(2, 2))
    report = accelerate(model)
    assert [row.reason for row in report] == [None, "ours already", None]
    restore(model)
    assert [type(m) for m in model] == [fastlayers.Linear, torch.nn.Linear]
    assert [row.reason for row in restore(model)] == ["not accelerated"] * 3


def test_context_manager(model: torch.nn.Sequential, image: torch.Tensor) -> None:
    before = classes(model)
    with accelerate(model) as report:
        assert len(report.changed) == 8
        model(image)
    assert classes(model) == before
    with pytest.raises(ZeroDivisionError), accelerate(model):
        _ = 1 // 0
    assert classes(model) == before


class Small(torch.nn.Linear):
    """A user's own."""


def test_what_is_left_alone_and_why() -> None:
    nn = torch.nn
    patched = nn.Linear(2, 2)
    patched.forward = lambda input: input
    tiled = nn.Conv2d(1, 1, 1)
    tiled._conv_forward = lambda input, weight, bias: input
    model = nn.ModuleDict(
        dict(
            own=Small(2, 2),
            normed=nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            patched=patched,
            tiled=tiled,
            attention=nn.MultiheadAttention(4, 2),
            bilinear=nn.Bilinear(2, 2, 2),
            fine=nn.Linear(2, 2),
        )
    )
    before = classes(model)
    reasons = {row.path: row.reason for row in accelerate(model)}
    assert reasons == {
        "own": "a subclass of Linear",
        "normed": "parametrized",
        "normed.parametrizations.weight.0": "fastlayers has no _WeightNorm",
        "patched": "its forward was replaced",
        "tiled": "its forward was replaced",
        "attention": None,
        "attention.out_proj": "its parent reads its weight and never calls it",
        "bilinear": "fastlayers has no Bilinear",
        "fine": None,
    }
    assert [b for b, a in zip(before, classes(model), strict=True) if a is not b] == [nn.MultiheadAttention, nn.Linear]


@pytest.mark.parametrize(
    ("include", "exclude", "changed"),
    [
        (None, "3", ["", "0", "1", "4", "5"]),
        ("3", None, ["3", "3.0", "3.1"]),
        ("3.*", None, ["3.0", "3.1"]),
        ("3", "3.1", ["3", "3.0"]),
        (torch.nn.Linear, None, ["3.0", "4"]),
        ([torch.nn.Conv2d, "4"], None, ["0", "4"]),
        (None, torch.nn.Sequential, []),
        ({"5"}, (), ["5"]),
        (lambda path, module: isinstance(module, torch.nn.Linear) and module.in_features > 4, None, ["3.0"]),
        ("*", lambda path, module: path == "3", ["", "0", "1", "4", "5"]),
        ((), None, []),
    ],
)
def test_choices(include: Any, exclude: Any, changed: list[str]) -> None:
    """A choice stands for a module and all that is in it."""
    model = small()
    report = accelerate(model, include, exclude)
    assert [row.path for row in report.changed] == changed
    for row in report:
        assert row.changed == (row.reason is None)
        assert row.changed or "fastlayers has no" in row.reason or row.reason in ("excluded", "not included")
    assert [type(model.get_submodule(p)).__module__.split(".")[0] for p in changed] == ["fastlayers"] * len(changed)


def test_a_module_in_two_places_is_chosen_by_either() -> None:
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict(dict(a=shared, b=shared))
    assert not accelerate(model, exclude="b").changed
    report = accelerate(model)
    assert [(row.path, row.changed) for row in report] == [("a", True), ("b", True)]
    assert model.a is model.b is shared


def test_errors_leave_the_model_alone(model: torch.nn.Sequential) -> None:
    before = classes(model)
    with pytest.raises(TypeError, match="chooses modules, not 3"):
        accelerate(model, exclude=[3])
    with pytest.raises(ValueError, match="no module's path matches 'haed'"):
        accelerate(model, exclude=["4", "haed"])
    with pytest.raises(ZeroDivisionError):
        accelerate(model, include=lambda path, module: 1 // len(path))
    for convert in (accelerate, restore):
        with pytest.raises(TypeError, match=r"a torch\.nn\.Module is converted, not OrderedDict"):
            convert(model.state_dict())
    assert classes(model) == before


def test_report_prints_as_a_table(model: torch.nn.Sequential) -> None:
    lines = str(accelerate(model, exclude="4")).splitlines()
    assert lines[0].split() == ["module", "was", "is", "now,", "or", "why", "not"]
    assert lines[1].split() == ["(the", "model)", "torch.nn.Sequential", "fastlayers.Sequential"]
    assert lines[2].split() == ["0", "torch.nn.Conv2d", "fastlayers.Conv2d"]
    assert lines[4].split() == ["2", "torch.nn.Flatten", "fastlayers", "has", "no", "Flatten"]
    assert lines[8].split() == ["4", "torch.nn.Linear", "excluded"]
    assert len({line.index("torch.nn") for line in lines[1:]}) == 1


def test_copies_and_pickles_can_be_restored(model: torch.nn.Sequential) -> None:
    before = classes(model)
    accelerate(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        restore(copied)
        assert classes(copied) == before
    assert type(model) is fastlayers.Sequential


def parts(model: torch.nn.Sequential) -> list[torch.nn.Module]:
    """What Python makes of a Sequential, and what people make of one."""
    edited = copy.deepcopy(model)
    edited.append(edited.pop(0)).insert(0, edited[1:3]).extend(edited[:2])
    edited *= 2
    added = copy.copy(model)
    added += model[:1]
    return [
        model[1:4], model[::-1], model[:], model + model, model * 2, 2 * model, model[:2] + torch.nn.Sequential(torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.ReLU()) + model[:2], model[3][:1], edited, added, copy.copy(model), copy.copy(model[4]),
        torch.nn.ModuleList(model), torch.nn.Sequential(*model.children()), torch.optim.swa_utils.AveragedModel(model[4]),
        pickle.loads(pickle.dumps(model[1:4] + model)), copy.deepcopy(model[2:] * 2),
    ]  # fmt: skip


def test_parts_and_sums_can_be_restored(model: torch.nn.Sequential) -> None:
    """To torch's classes, of containers and of what is in them. Of what was built as ours, parts are ours."""
    plain = [classes(part) for part in parts(copy.deepcopy(model))]
    for i, expected in enumerate(plain):
        converted = copy.deepcopy(model)
        accelerate(converted)
        part = parts(converted)[i]
        restore(part)
        assert classes(part) == expected, i
    built = fastlayers.Sequential(fastlayers.Linear(2, 2), fastlayers.ReLU())
    for part in (built[:1], built + built, built * 2):
        assert not restore(part).changed


def test_built_layers_become_torchs(model: torch.nn.Sequential, image: torch.Tensor) -> None:
    nn = fastlayers.nn
    built = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 3), nn.Softmax(1)
    ).to(image.device)  # fmt: skip
    built.load_state_dict(model.state_dict())
    assert len(restore(built, to=torch.nn).changed) == 8
    assert classes(built) == classes(model)
    torch.testing.assert_close(built(image), model(image))
    assert len(accelerate(built).changed) == 8
    assert len(restore(built, to=torch.nn).changed) == 8
    assert [vars(a).keys() for a in built.modules()] == [vars(b).keys() for b in model.modules()]

    class Own(nn.Linear):
        pass

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    reasons = [row.reason for row in restore(torch.nn.ModuleList([Own(2, 2), normed, torch.nn.ReLU()]), to=torch.nn)]
    assert reasons[:2] == ["a subclass of Linear", "parametrized since: remove the parametrizations first"]
    assert reasons[-1] == "not one of ours"
    for to in (torch, fastlayers.nn, "torch.nn"):
        with pytest.raises(ValueError, match=r"layers are restored to torch\.nn, not to"):
            restore(built, to=to)  # type: ignore[arg-type]


def test_changed_since(model: torch.nn.Sequential) -> None:
    """What somebody made of a converted module stands until they undo it."""
    accelerate(model)
    torch.nn.utils.parametrizations.weight_norm(model[4])
    assert "parametrized since: remove the parametrizations first" in {row.reason for row in restore(model)}
    torch.nn.utils.parametrize.remove_parametrizations(model[4], "weight")
    assert [row.path for row in restore(model).changed] == ["4"]
    accelerate(model)
    model[4].__class__ = type("Wrapped", (fastlayers.Linear,), {})
    assert "made a subclass since" in {row.reason for row in restore(model)}


@pytest.mark.filterwarnings(LAZY)
def test_lazy_modules(device: torch.device) -> None:
    """They become ours; restored before or after, torch's."""
    for first in (True, False):
        model = torch.nn.Sequential(torch.nn.LazyConv2d(2, 2), torch.nn.Flatten(), torch.nn.LazyLinear(3)).to(device)
        accelerate(model)
        x = torch.randn(2, 1, 3, 3, device=device)
        if first:
            with fastlayers.policy("auto"):
                assert all(d.path == "triton" or d.op == "Flatten" for d in fastlayers.explain(model, x))
            assert [type(m) for m in model] == [fastlayers.Conv2d, torch.nn.Flatten, fastlayers.Linear]
            restore(model)
        else:
            restore(model)
            model(x)
        assert [type(m) for m in model] == [torch.nn.Conv2d, torch.nn.Flatten, torch.nn.Linear]


def test_a_report_keeps_no_model_alive() -> None:
    model = small()
    report, watched = accelerate(model), weakref.ref(model[0])
    del model
    gc.collect()
    assert watched() is None
    assert len(report) == 9


class Opaque(torch.nn.Module):
    """Its forward can't be read, and there is a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = torch.nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x)


class Around(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.opaque, self.first, self.last = Opaque(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(self.opaque(x))))


@pytest.mark.parametrize("fuse", [False, True])
def test_a_converted_model_is_freed_at_once(fuse: bool) -> None:
    """Its memory doesn't wait for the garbage collector, as that of torch's doesn't."""
    gc.collect()
    gc.disable()
    try:
        for convert in (lambda model: accelerate(model, fuse=fuse), lambda model: restore(accelerated(model, fuse))):
            model = Around()
            convert(model)
            watched = weakref.ref(model), weakref.ref(model.opaque.inner.weight)
            del model
            assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


def accelerated(model: torch.nn.Module, fuse: bool) -> torch.nn.Module:
    accelerate(model, fuse=fuse)
    return model


def test_isinstance_checks_of_other_libraries_find_them(model: torch.nn.Sequential) -> None:
    """As an adapter library does it: find the Linear layers by class, replace them by name."""
    accelerate(model)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert [name for name, _ in found] == ["3.0", "4"]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.nn.Sequential(module, torch.nn.Identity()))
    assert len(list(model.parameters())) == 6


def test_unusual_graphs_of_modules() -> None:
    """Modules that contain each other, exponentially many paths, comparison by content."""

    class Equal(torch.nn.Linear):
        def __eq__(self, other: object) -> bool:
            return True

    first, second = torch.nn.Module(), torch.nn.Module()
    first.inner, first.layer, second.back = second, torch.nn.Linear(2, 2), first
    assert [row.path for row in accelerate(first).changed] == ["layer"]
    model: torch.nn.Module = torch.nn.Linear(2, 2)
    for _ in range(40):
        model = torch.nn.ModuleList([model, model])
    assert len(accelerate(model).changed) == 2  # under the two names that its parent has for it
    unhashable = torch.nn.ModuleList([Equal(2, 2), torch.nn.Linear(2, 2), Equal(2, 2)])
    assert [row.path for row in accelerate(unhashable).changed] == ["1"]
    assert len(restore(unhashable).changed) == 1


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated")
def test_quantization_of_a_restored_model() -> None:
    """torch.ao goes by exact classes: it fuses and quantizes what was restored, and nothing of what is converted."""
    from torch.ao.quantization import fuse_modules, quantize_dynamic

    def images() -> torch.nn.Sequential:
        nn = torch.nn
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()

    plain, converted = images(), images()
    converted.load_state_dict(plain.state_dict())
    accelerate(converted)
    assert isinstance(quantize_dynamic(converted, {torch.nn.Linear})[4], fastlayers.Linear)
    restore(converted)
    x = torch.randn(2, 1, 2, 2)
    results = [quantize_dynamic(fuse_modules(m, ["0", "1", "2"]), {torch.nn.Linear}) for m in (plain, converted)]
    assert classes(results[0]) == classes(results[1])
    assert "quantized" in type(results[1][4]).__module__
    torch.testing.assert_close(results[0](x), results[1](x))
