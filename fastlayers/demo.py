"""`python -m fastlayers demo`: three small networks, trained on handwritten digits with torch.nn and with our layers.

Both start from the same weights and see the same batches, so their losses may differ by rounding and nothing else. How
far rounding carries a training run is measured, not assumed: torch trains the network once in float64 and a few times
in float32, each time with every initial weight moved to one of its two neighbours in float32. The distance of our
losses from the float64 run is judged by how far these twins stray from it.

On a CPU, torch's dropout drops other elements than our kernels, which follow torch's order on CUDA. So in all runs of torch.nn,
dropout multiplies by the mask that ours draws from the same seed; everything else in them is torch's own.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from . import _kernels, nn
from . import functional as ours
from .catalog import CLASSES
from .dispatch.explain import explain

TWINS = 8
SLACK = 4
"""Ours may stray this many times as far as the farthest of the twins: they are a sample, not a bound."""


class _SameDropout(torch.nn.Dropout):
    """torch.nn's, with the elements that ours drops."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return input
        # In float32 whatever the input: which elements are dropped depends on the dtype.
        ones = torch.ones_like(input, dtype=torch.float32, requires_grad=False)
        return input * ours.dropout(ones, self.p).to(input.dtype)


class _Torch:
    """torch.nn with this dropout, and torch's cross entropy."""

    Dropout = _SameDropout

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn, name)


TORCH: Any = _Torch()


@dataclass(frozen=True)
class Network:
    """`make` builds it from a module like torch.nn."""

    name: str
    make: Callable[[Any], torch.nn.Module]
    batch: int
    epochs: int


NETWORKS = (
    Network(
        "Linear network",
        lambda nn: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        ),
        batch=64,
        epochs=6,
    ),
    Network(
        "Conv network",
        lambda nn: nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
        ),
        batch=48,
        epochs=4,
    ),
    Network(
        "Patch network",
        lambda nn: nn.Sequential(
            nn.Conv2d(1, 16, 2, stride=2),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.LayerNorm(64),
            nn.Linear(64, 10),
        ),
        batch=64,
        epochs=3,
    ),
)


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) from 0 to 1, labels (N,)."""

    images: torch.Tensor
    labels: torch.Tensor


def digits(on: torch.device) -> tuple[Digits, Digits]:
    """Four fifths of scikit-learn's digits for training, one for the test; always the same ones."""
    images, labels = load_digits(return_X_y=True)
    everything = Digits(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(len(labels) * 4 // 5)
    train, test = (Digits(*(t[part].to(on) for t in everything)) for part in order)
    return train, test


class Run(NamedTuple):
    """Loss (steps,) of every batch, and the median of the steps' times."""

    losses: torch.Tensor
    milliseconds: float


def train(
    model: torch.nn.Module,
    data: Digits,
    batches: Sequence[torch.Tensor],
    after_step: Callable[[float], None] = lambda loss: None,
    cross_entropy: Callable[..., torch.Tensor] = F.cross_entropy,
) -> Run:
    """SGD with momentum on the cross-entropy, in the dtype of the model."""
    torch.manual_seed(0)  # for dropout
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = data.images.to(next(model.parameters()).dtype)
    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        loss = cross_entropy(model(images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
        after_step(losses[-1])
    return Run(torch.tensor(losses, dtype=torch.float64), 1000 * torch.tensor(seconds).median().item())


def accuracy(model: torch.nn.Module, data: Digits) -> float:
    model.eval()
    with torch.no_grad():
        return (model(data.images).argmax(1) == data.labels).float().mean().item()


def jitter(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Move every weight to the next number in its dtype, up or down at random."""
    with torch.no_grad():
        for p in model.parameters():
            up = (torch.rand(p.shape, generator=generator) < 0.5).to(p.device)
            p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf).to(p.dtype)))


class Layer(NamedTuple):
    """What ran for a layer, or for several that ran as one. `reason`: why not ours."""

    name: str
    path: str
    reason: str | None
    forward: tuple[str, ...]
    backward: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Runs and test accuracies of both; `exact`, `twins`: losses in float64 and of each twin."""

    network: Network
    torchs: Run
    ours: Run
    torchs_accuracy: float
    ours_accuracy: float
    exact: torch.Tensor
    twins: torch.Tensor
    layers: list[Layer]
    problems: list[str]

    @property
    def difference(self) -> float:
        return _farthest(self.ours.losses, self.torchs.losses)

    @property
    def strayed(self) -> float:
        return _farthest(self.ours.losses, self.exact)

    @property
    def twins_strayed(self) -> float:
        return _farthest(self.twins, self.exact)

    @property
    def allowed(self) -> float:
        """SLACK times the farthest twin, plus what float32 can't resolve in a loss anyway."""
        return SLACK * self.twins_strayed + torch.finfo(torch.float32).eps * self.exact.max().item()


def _farthest(losses: torch.Tensor, others: torch.Tensor) -> float:
    return (losses - others).abs().max().item()


def compare(
    network: Network,
    train_data: Digits,
    test_data: Digits,
    seed: int,
    epochs: int,
    steps: int | None = None,
    after_step: Callable[[str, float], None] = lambda what, loss: None,
) -> Outcome:
    """Train the network with torch.nn and with fastlayers.nn, on the device of the data, and compare.

    Args:
        steps: stop after as many.
        after_step: called with what is being trained and the loss of the batch.
    """
    on = train_data.images.device
    generator = torch.Generator().manual_seed(seed)
    batches = [
        batch.to(on)
        for _ in range(epochs)
        for batch in torch.randperm(len(train_data.labels), generator=generator).split(network.batch)
    ][:steps]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = network.make(torch.nn).state_dict()

    def fresh(namespace: Any) -> torch.nn.Module:
        model = network.make(namespace)
        model.load_state_dict(state)
        # The layout that convolutions like best.
        return model.to(on).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    mine, torchs = fresh(nn), fresh(TORCH)
    ours_run = train(mine, train_data, batches, lambda loss: after_step("fastlayers", loss), ours.cross_entropy)
    torchs_run = train(torchs, train_data, batches, lambda loss: after_step("torch.nn", loss))
    exact = train(fresh(TORCH).double(), train_data, batches, lambda loss: after_step("torch.nn, float64", loss)).losses
    twins = []
    for _ in range(TWINS):
        twin = fresh(TORCH)
        jitter(twin, generator)
        twins.append(train(twin, train_data, batches, lambda loss: after_step("torch.nn, twins", loss)).losses)
    layers, problems = inspect(mine, Digits(*(t[batches[0]] for t in train_data)))
    outcome = Outcome(
        network, torchs_run, ours_run, accuracy(torchs, test_data), accuracy(mine, test_data), exact,
        torch.stack(twins), layers, problems,
    )  # fmt: skip
    if not outcome.strayed <= outcome.allowed:  # NaN, too
        problems.append(
            f"the losses of fastlayers stray {outcome.strayed:.1e} from float64, while float32 rounding explains "
            f"{outcome.allowed:.1e}. (Once in some hundred seeds, a ReLU on the brink of 0 does this; a bug, in all.)"
        )
    return outcome


def inspect(model: torch.nn.Module, data: Digits) -> tuple[list[Layer], list[str]]:
    """Which path every layer takes, forward and backward, and what is wrong with that."""
    model.train()
    decisions = list(explain(model, data.images))
    backwards = _backward_launches(ours.cross_entropy(model(data.images), data.labels))
    layers, problems = [], []
    accelerated: set[str] = set()
    for decision in decisions:
        names = decision.module.split(" + ")
        kinds = [type(model.get_submodule(name)).__name__ for name in names]
        label = " + ".join(f"{name} {kind}" for name, kind in zip(names, kinds, strict=True))
        backward: tuple[str, ...] = ()
        if decision.path == "triton":
            accelerated.update(names)
            backward = backwards.pop(0) if backwards else ()
            if not backward:
                problems.append(f"the backward of {label} launched no kernel of ours")
        layers.append(Layer(label, decision.path, decision.reason, decision.kernels, backward))
    for name, module in model.named_modules():
        if type(module) in CLASSES.values() and not [*module.children()] and name not in accelerated:
            reason = next((d.reason for d in decisions if name in d.module.split(" + ")), "it was not called")
            problems.append(f"{name} {type(module).__name__} was not accelerated: {reason}")
    return layers, problems


def _backward_launches(loss: torch.Tensor) -> list[tuple[str, ...]]:
    """Run backward; the kernels that each of our autograd Functions launched in it, in the order of the forward."""
    nodes: list[Any] = [loss.grad_fn]
    for node in nodes:  # grows: the whole graph, from the loss to the weights
        nodes += [n for n, _ in node.next_functions if n is not None and n not in nodes]
    found = [n for n in nodes if getattr(type(n), "_forward_cls", type(n)).__module__.startswith("fastlayers.")]
    launches: list[list[str]] = [[] for _ in found]
    for node, launched in zip(found, launches, strict=True):
        node.register_prehook(functools.partial(_listen, launched))
        node.register_hook(functools.partial(_listen, None))
    loss.backward()
    return [tuple(launched) for launched in reversed(launches)]


def _listen(launched: list[str] | None, *_: Any) -> None:
    _kernels.launch.trace = launched


def results(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="Three networks, the same weights and batches, two libraries", title_justify="left")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(f"{outcome.network.name}\ntorch.nn", justify="right")
        table.add_column("\nfastlayers", justify="right")

    def row(what: str, values: Callable[[Outcome], tuple[str, str]]) -> None:
        table.add_row(what, *(cell for outcome in outcomes for cell in values(outcome)))

    row("test accuracy", lambda o: (f"{o.torchs_accuracy:.1%}", f"{o.ours_accuracy:.1%}"))
    row("loss of the last batch", lambda o: (f"{o.torchs.losses[-1]:.6f}", f"{o.ours.losses[-1]:.6f}"))
    row("largest difference of their losses", lambda o: ("", f"{o.difference:.1e}"))
    row("farthest from float64", lambda o: (f"{o.twins_strayed:.1e}", f"{o.strayed:.1e}"))
    row("  rounding explains", lambda o: ("", f"{o.allowed:.1e}"))
    row("ms per step", lambda o: (f"{o.torchs.milliseconds:.1f}", f"{o.ours.milliseconds:.1f}"))
    return table


def paths(outcome: Outcome) -> Table:
    table = Table(title=f"{outcome.network.name}: which path each layer took", title_justify="left", show_lines=True)
    for column in ("layer", "path", "kernels of a forward, or why not", "kernels of a backward"):
        table.add_column(column)
    for layer in outcome.layers:
        name = layer.name.replace(" + ", "\n+ ")
        table.add_row(name, layer.path, layer.reason or "\n".join(layer.forward), "\n".join(layer.backward))
    return table


def plot(outcomes: Sequence[Outcome], file: Path) -> None:
    """Above, the losses, one curve on the other; below, how far each is from float64."""
    figure = matplotlib.figure.Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(outcomes), sharex="col", height_ratios=(3, 2), squeeze=False)
    for (above, below), o in zip(axes.T, outcomes, strict=True):
        above.plot(o.torchs.losses, color="#f2a65a", linewidth=5, label="torch.nn")
        above.plot(o.ours.losses, color="#1f3b73", linewidth=1.2, label="fastlayers")
        above.set_title(f"{o.network.name}: accuracy {o.torchs_accuracy:.1%} and {o.ours_accuracy:.1%}")
        above.set_ylabel("loss of the batch")
        above.set_ylim(bottom=0)
        above.legend()
        floor = torch.finfo(torch.float32).eps / 16  # a logarithm has no zero
        twins = (o.twins - o.exact).abs().clamp(min=floor)
        below.fill_between(
            range(len(o.exact)), twins.amin(0), twins.amax(0), color="#f2a65a", alpha=0.6, linewidth=0,
            label=f"torch.nn, {TWINS} runs one rounding apart",
        )  # fmt: skip
        below.plot((o.ours.losses - o.exact).abs().clamp(min=floor), color="#1f3b73", linewidth=1, label="fastlayers")
        below.axhline(o.allowed, color="#b3261e", linestyle="--", linewidth=1, label="what rounding explains")
        below.set_yscale("log")
        below.set_ylabel("distance from float64")
        below.set_xlabel("step")
    figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Handwritten digits: the same weights and batches, trained with torch.nn and with fastlayers")
    figure.savefig(file, dpi=130)


class Ticker:
    """Progress: a bar on a terminal, otherwise a line of text every epoch."""

    def __init__(self, console: Console, network: Network, epochs: int, samples: int):
        self.console, self.network, self.epochs = console, network, epochs
        self.per_epoch = -(-samples // network.batch)
        self.step = 0
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(
            network.name, total=(3 + TWINS) * epochs * self.per_epoch, note=""
        )  # ours, torch.nn, float64 and the twins

    def __call__(self, what: str, loss: float) -> None:
        self.step += 1
        self.progress.update(self.task, advance=1, note=f"{what}, loss {loss:.3f}")
        epoch, rest = divmod(self.step, self.per_epoch)
        if not self.console.is_terminal and what == "fastlayers" and rest == 0:
            self.console.print(f"{self.network.name}, {what}: epoch {epoch} of {self.epochs}, loss {loss:.3f}")


def main(seed: int, epochs: int | None, file: Path, on: torch.device) -> int:
    """Run the demo; the exit status. float32 has to be strict: TF32 rounds otherwise in torch than in our kernels."""
    if _kernels.MISSING is not None:
        print(f"There is nothing to show: {_kernels.MISSING}, so every layer takes torch's path.", file=sys.stderr)
        return 2
    start = time.perf_counter()
    interactive = sys.stdout.isatty()
    console = Console(highlight=False, width=None if interactive else 120)
    without_gpu = on.type == "cpu"
    if without_gpu:
        interpreted = "in Triton's interpreter", "about five minutes"
        where, time_ = interpreted if _kernels.launch.INTERPRETED else ("compiled, in an emulator", "minutes")
        console.print(f"No GPU here: our kernels run {where}, on the CPU. Takes {time_}.\n")
    else:
        console.print(f"On {torch.cuda.get_device_name(on)}.\n")
    train_data, test_data = digits(on)
    outcomes = []
    for network in NETWORKS:
        count = epochs or network.epochs
        ticker = Ticker(console, network, count, len(train_data.labels))
        # One thread: several would only wait for each other in networks as small as these.
        with ticker.progress, threadpool_limits(1):
            outcomes.append(compare(network, train_data, test_data, seed, count, after_step=ticker))
    console.print()
    console.print(results(outcomes))
    console.print(
        f'"Farthest from float64": the largest distance of a loss from the same training in float64; for torch.nn, of '
        f"{TWINS} runs\nwhose initial weights are one rounding apart. Rounding explains {SLACK} times that."
    )
    if without_gpu:
        console.print("The ms are the CPU's: they say nothing about a GPU.")
    else:
        console.print("The ms are those of tiny networks, and mostly Python's: they say little about large ones.")
    for outcome in outcomes:
        console.print()
        console.print(paths(outcome))
    plot(outcomes, file)
    console.print(f"\nLoss curves: {file}. Took {time.perf_counter() - start:.0f} s.")
    problems = [f"{outcome.network.name}: {problem}" for outcome in outcomes for problem in outcome.problems]
    for problem in problems:
        console.print(f"FAILED. {problem}", style="bold red", soft_wrap=True, markup=False)
    if not problems:
        console.print("All networks learned the same with fastlayers as with torch.nn.", style="green")
    return 1 if problems else 0
