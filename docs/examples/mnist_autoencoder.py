"""K-FAC, Nesterov's accelerated gradient, Adam and Muon on a deep autoencoder of MNIST digits (the paper's Section 13).

    python docs/examples/mnist_autoencoder.py            # about 4 minutes on two cores
    python docs/examples/mnist_autoencoder.py --quick    # about 25 seconds

Every method starts from the same weights, minimises the same objective and trains for the same number of seconds; SOAP
is there too where `pytorch_optimizer` is. The learning rates fall to zero in that time, K-FAC has none. The error is
the squared reconstruction error, summed over pixels, mean over all digits; its computation is not part of the time.
Ctrl-C stops the method in progress and reports what there is so far.
"""

import argparse
import gzip
import itertools
import math
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from _arguments import folder, positive, whole
from _demo_page import write_page
from kfaclinalg_torch import KFAC

SIZES = (784, 400, 200, 100, 30, 100, 200, 400, 784)
CODE = 3  # this layer and the last are linear; all others are tanh
WEIGHT_DECAY = 1e-5

# The network changes fast at first, and λ falls at most by ω1 every 5 iterations. A start at 0.01 with an inverse every
# 5 iterations has an error of 8.5 after 40 iterations; a start at 0.1 with one every 20 has 18. 0.001 does as well.
# The mini-batch is the whole training set from m_240 on, near the end on two cores (Section 13: m_500).
KFAC_SETTINGS = {"damping": 0.01, "inverse_period": 5, "first_batch": 1000, "full_batch_at": 240}
# `--sweep` repeats the choice of the others' settings, which are for the default time.
NESTEROV_SETTINGS = {"batch": 200, "lr": 0.005, "max_momentum": 0.99}
ADAM_SETTINGS = {"batch": 200, "lr": 2e-3}
MUON_SETTINGS = {"batch": 200, "lr": 1e-2}
SOAP_SETTINGS = {"batch": 200, "lr": 3e-3}
SWEEP = {
    "K-FAC": {**{name: (x,) for name, x in KFAC_SETTINGS.items()}, "damping": (0.001, 0.01, 0.1, 1, 10)},
    "Nesterov": {"batch": (100, 200), "lr": (0.001, 0.002, 0.005, 0.01, 0.02), "max_momentum": (0.9, 0.99)},
    "Adam": {"batch": (50, 100, 200), "lr": (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)},
    "Muon": {"batch": (100, 200, 500), "lr": (1e-3, 3e-3, 1e-2, 3e-2)},
    "SOAP": {"batch": (100, 200, 500), "lr": (1e-3, 3e-3, 1e-2)},
}

ROOT = Path(__file__).resolve().parents[2]
DIGITS = Path(__file__).with_name("data") / "mnist_10000.npz"


class Point(NamedTuple):
    """The error after so many iterations and seconds of training."""

    iteration: int
    seconds: float
    error: float


class Step(NamedTuple):
    """What one iteration did: the size of its mini-batch and, for K-FAC, the optimizer's own report."""

    batch: int
    info: tuple | None = None


class Plan(NamedTuple):
    """What is the same for every method."""

    seconds: float
    evaluations: int
    seed: int


@dataclass
class Run:
    """One method's training."""

    method: str
    settings: dict
    points: list[Point] = field(default_factory=list)
    steps: list[tuple[float, Step]] = field(default_factory=list)  # (seconds so far, step)
    model: nn.Module | None = None  # the better of the last iterate and the average of the iterates

    @property
    def seconds(self) -> float:
        return self.steps[-1][0] if self.steps else 0.0

    def record(self, step: Step, seconds: float) -> None:
        self.steps.append((self.seconds + seconds, step))


# -- the digits, the network and its error --


def load_digits(path: Path) -> tuple[Tensor, np.ndarray]:
    """Digits (N, 784) with pixels in [0, 1], and their labels (N,), of an .npz or a folder of IDX files."""
    try:
        if path.is_dir():
            images, labels = read_idx(path, "train-images*"), read_idx(path, "train-labels*")
        else:
            with np.load(path) as archive:
                images, labels = archive["x_train"], archive["y_train"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} is no .npz with x_train and y_train, and no folder of IDX files: {error}") from error
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255), labels


def read_idx(folder: Path, pattern: str) -> np.ndarray:
    """An IDX file of bytes, gzipped or not: two zeros, the type 8, the number of axes, their lengths, the data."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no file {pattern} in {folder}")
    content = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{found[0]} is not an IDX file of unsigned bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def autoencoder(seed: int, sizes: Sequence[int] = SIZES) -> nn.Sequential:
    """The network with sparse initial weights (Martens 2010): 15 incoming connections a unit."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        linear = i in (CODE, len(sizes) - 2)
        modules += [nn.Linear(inputs, outputs)] + [nn.Tanh()] * (not linear)
        initialise_sparsely(modules[-1 if linear else -2], bias=0.0 if linear else 0.5, generator=generator)
    return nn.Sequential(*modules)


@torch.no_grad()
def initialise_sparsely(layer: nn.Linear, *, bias: float, generator: torch.Generator, connections: int = 15) -> None:
    """Weights N(0, 1/16) on a few random inputs of each unit, which suits tanh; all others are zero."""
    layer.bias.fill_(bias)
    layer.weight.zero_()
    for unit in layer.weight:
        chosen = torch.randperm(len(unit), generator=generator)[:connections]
        unit[chosen] = 0.25 * torch.randn(len(chosen), generator=generator)


@torch.no_grad()
def reconstruction_error(model: nn.Module, digits: Tensor) -> float:
    """Squared error summed over pixels, mean over digits."""
    return sum((model(x).sigmoid() - x).square().sum().item() for x in digits.split(5000)) / len(digits)


# -- the methods: each yields one Step an iteration, and names the models whose error counts --


def kfac(model, digits, generator, *, damping, inverse_period, first_batch, full_batch_at):
    """K-FAC with the growing mini-batch of Section 13."""
    options = {"damping": damping, "inverse_period": inverse_period, "weight_decay": WEIGHT_DECAY}
    optimizer = KFAC(model, "bernoulli", **options, generator=generator)

    def steps() -> Iterator[Step]:
        for size in growing_sizes(first_batch, len(digits), full_batch_at):
            batch = digits[torch.randperm(len(digits), generator=generator)[:size]]
            optimizer.step(batch, batch)
            yield Step(size, optimizer.info)

    return steps(), [model]


def growing_sizes(first: int, last: int, iterations: int) -> Iterator[int]:
    """m_k = min(m_1 exp((k-1)/b), |S|), with b such that m_k = |S| at the given iteration."""
    first = min(first, last)
    for k in itertools.count(1):
        yield min(round(first * (last / first) ** ((k - 1) / (iterations - 1))), last)


def nesterov(model, digits, generator, *, batch, lr, max_momentum):
    """Nesterov's accelerated gradient with the momentum schedule of Sutskever et al. (2013)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5, nesterov=True, fused=True)

    def schedule(t: int) -> None:
        momentum = min(1 - 2 ** (-1 - math.log2(t // 250 + 1)), max_momentum)
        optimizer.param_groups[0]["momentum"] = momentum

    return first_order(model, digits, [optimizer], batch, generator, schedule)


def adam(model, digits, generator, *, batch, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    return first_order(model, digits, [optimizer], batch, generator)


def muon(model, digits, generator, *, batch, lr):
    """For the matrices but the last; Adam for the rest."""
    *hidden, last = [p for p in model.parameters() if p.ndim == 2]
    rest = [last, *(p for p in model.parameters() if p.ndim != 2)]
    optimizers = [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(rest, lr=lr, fused=True),
    ]
    return first_order(model, digits, optimizers, batch, generator)


def soap(model, digits, generator, *, batch, lr):
    from pytorch_optimizer import SOAP

    return first_order(model, digits, [SOAP(model.parameters(), lr=lr, weight_decay=0)], batch, generator)


def first_order(model, digits, optimizers, size, generator, schedule=lambda t: None):
    """Descent on mini-batches. The average of the iterates (Section 13, ξ = 0.99) has less noise, so it counts too.

    What is sent to it is the part of its time that is left; the learning rates fall with that.
    """
    parameters = list(model.parameters())
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

    def steps() -> Generator[Step, float | None]:
        for t, batch in enumerate(shuffled(digits, size, generator)):
            schedule(t)
            model.zero_grad()
            (binary_cross_entropy_with_logits(model(batch), batch, reduction="sum") / len(batch)).backward()
            torch._foreach_add_([p.grad for p in parameters], parameters, alpha=WEIGHT_DECAY)
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(model)
            left = yield Step(len(batch))
            for group, lr in groups:
                group["lr"] = lr if left is None else lr * left

    return steps(), [model, average]


def shuffled(digits: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        for chosen in torch.randperm(len(digits), generator=generator).split(size):
            yield digits[chosen]


METHODS = {"K-FAC": kfac, "Nesterov": nesterov, "Adam": adam, "Muon": muon}
SETTINGS = {"K-FAC": KFAC_SETTINGS, "Nesterov": NESTEROV_SETTINGS, "Adam": ADAM_SETTINGS, "Muon": MUON_SETTINGS}
if find_spec("pytorch_optimizer"):
    METHODS["SOAP"], SETTINGS["SOAP"] = soap, SOAP_SETTINGS
SECONDS = 200 / len(METHODS)  # of each


# -- training --


def train(method: str, settings: dict, digits: Tensor, plan: Plan, bar: tqdm, stop: threading.Event) -> Run:
    """Train for plan.seconds, evaluations not counted, or until stopped. Evaluations are equally spaced in log time."""
    run = Run(method, settings)
    model, generator = autoencoder(plan.seed), torch.Generator().manual_seed(plan.seed)
    steps, models = METHODS[method](model, digits, generator, **settings)
    error = evaluate(run, models[:1], digits)
    spacing = (plan.seconds / 0.3) ** (1 / plan.evaluations)
    next_evaluation = 0.3
    while run.seconds < plan.seconds and math.isfinite(error) and not stop.is_set():
        before = run.seconds
        start = time.perf_counter()
        step = next(steps) if not run.steps else steps.send(max(0.0, 1 - run.seconds / plan.seconds))
        run.record(step, time.perf_counter() - start)
        if run.seconds >= next_evaluation:
            next_evaluation = run.seconds * spacing
            error = evaluate(run, models, digits)
        bar.set_postfix_str(f"error {error:.2f}, mini-batch {step.batch}", refresh=False)
        bar.update(min(run.seconds, plan.seconds) - before)
    if run.points[-1].iteration < len(run.steps):
        error = evaluate(run, models, digits)
    bar.set_postfix_str(f"error {error:.2f}, {len(run.steps)} iterations")
    return run


def evaluate(run: Run, models: list[nn.Module], digits: Tensor) -> float:
    errors = [reconstruction_error(model, digits) for model in models]
    errors = [error if math.isfinite(error) else math.inf for error in errors]  # NaN has no order
    run.model = models[errors.index(min(errors))]
    run.points.append(Point(len(run.steps), run.seconds, min(errors)))
    return min(errors)


def progress(label: str, seconds: float) -> tqdm:
    """A bar that counts seconds of training; rarely redrawn where it only fills a log."""
    interval = 0.1 if sys.stderr.isatty() else 20.0
    shape = "{desc} |{bar:30}| {n:.0f}/{total:.0f} s{postfix}"
    return tqdm(total=seconds, desc=f"{label:<8}", bar_format=shape, mininterval=interval, maxinterval=2 * interval)


def warm_up(digits: Tensor) -> None:
    """One iteration of each method on a few digits: what a process does only once is in no method's time."""
    for method, settings in SETTINGS.items():
        steps, _ = METHODS[method](autoencoder(0), digits[:100], torch.Generator(), **settings)
        next(steps)


def compare(digits: Tensor, plan: Plan, stop: threading.Event) -> list[Run]:
    runs: list[Run] = []
    warm_up(digits)
    for method, settings in SETTINGS.items():
        with progress(method, plan.seconds) as bar:
            runs.append(train(method, settings, digits, plan, bar, stop))
        if stop.is_set():
            break
    return runs


def sweep(digits: Tensor, plan: Plan, stop: threading.Event) -> None:
    """Every candidate trains for the full time: what leads early may diverge later."""
    warm_up(digits)
    for method in METHODS:
        grid = SWEEP[method]
        candidates = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        runs = []
        with progress(method, plan.seconds * len(candidates)) as bar:
            for settings in candidates:
                if not stop.is_set():
                    runs.append(train(method, settings, digits, plan._replace(evaluations=4), bar, stop))
        for run in sorted(runs, key=lambda run: run.points[-1].error):
            print(f"{method}: error {run.points[-1].error:.2f} with {describe(run.settings)}", flush=True)


# -- the report --


def first_at(run: Run, error: float) -> Point | None:
    return next((point for point in run.points if point.error <= error), None)


def table(runs: list[Run]) -> list[list[str]]:
    """The heading, then a row a method; the last column says when K-FAC (first) had this method's final error."""
    rows = [["method", "error", "iterations", "seconds", "K-FAC reached this error after"]]
    for run in runs:
        end = run.points[-1]
        reached = first_at(runs[0], end.error)
        when = f"{reached.iteration:,} iterations, {reached.seconds:.1f} s" if reached else "not reached"
        row = [run.method, f"{end.error:.2f}", f"{end.iteration:,}", f"{end.seconds:.1f}"]
        rows.append([*row, "" if run is runs[0] else when])
    return rows


def verdict(runs: list[Run]) -> str:
    """Who won, by error, iterations and seconds to the others' errors."""
    if len(runs) == 1:
        return "There is nothing to compare."
    best = min(runs, key=lambda run: run.points[-1].error)
    text = f"{best.method} ends with the lowest error"
    others = [run.points[-1] for run in runs if run is not best]
    if all(best.points[-1].iteration < other.iteration for other in others):
        text += ", in the fewest iterations"
    if all(first_at(best, other.error).seconds <= other.seconds for other in others):
        text += ", and had every other method's final error in less time"
    return text + "."


def describe(settings: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells[1:]]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of about 25 seconds in all")
    parser.add_argument("--seconds", type=positive, help=f"training time of each method (default {SECONDS:g})")
    parser.add_argument("--seed", type=whole, default=0, help="of the initial weights and all sampling (default 0)")
    parser.add_argument("--data", type=Path, default=DIGITS, help="an .npz (x_train, y_train) or a folder of IDX files")
    parser.add_argument("--out", type=folder, default=ROOT / "build" / "demo", help="folder of the page (build/demo)")
    parser.add_argument("--sweep", action="store_true", help="only repeat the choice of settings (40 minutes)")
    return parser.parse_args()


def stop_on_interrupt() -> threading.Event:
    """An event that Ctrl-C sets, so that the step in progress is finished; a second Ctrl-C ends at once."""
    stop = threading.Event()

    def handler(signum, frame) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return stop


def main() -> None:
    args = arguments()
    plan = Plan(args.seconds or (4 if args.quick else SECONDS), 8 if args.quick else 30, args.seed)
    digits, labels = load_digits(args.data)
    stop = stop_on_interrupt()
    if args.sweep:
        sweep(digits, plan, stop)
    else:
        report(compare(digits, plan, stop), digits, labels, plan, args.out / "index.html")


def report(runs: list[Run], digits: Tensor, labels: np.ndarray, plan: Plan, page: Path) -> None:
    rows, text, settings = table(runs), verdict(runs), settings_of(digits, plan, runs)
    if len(runs) < len(METHODS) or runs[-1].seconds < plan.seconds:
        text = f"Stopped early. {text}"
    print()
    print_table(rows)
    print(f"\n{text}")
    write_page(page, runs, digits, labels, table=rows, verdict=text, settings=settings)
    print(f"Pictures: {page}")


def settings_of(digits: Tensor, plan: Plan, runs: list[Run]) -> dict[str, str]:
    """What the page says about how this was made."""
    return {
        "Digits": f"{len(digits):,} of MNIST's training set",
        "Network": "-".join(map(str, SIZES)) + ", tanh, linear code, sparse initial weights",
        "Objective": f"Bernoulli cross-entropy summed over pixels, mean over digits, + η/2 ‖θ‖², η = {WEIGHT_DECAY:g}",
        "Budget": f"{plan.seconds:g} s of training a method; threads: {torch.get_num_threads()}; seed {plan.seed}",
        **{run.method: describe(run.settings) for run in runs},
        "Versions": f"PyTorch {torch.__version__}",
    }


if __name__ == "__main__":
    main()
