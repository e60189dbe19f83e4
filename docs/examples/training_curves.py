"""Figures 10 and 11 of the paper: training error against seconds and against iterations, on CURVES and on MNIST.

    python docs/examples/training_curves.py                # under 2 minutes on two cores
    python docs/examples/training_curves.py --quick        # under 20 seconds
    python docs/examples/training_curves.py --fixed-batch  # F̂⁻¹ beside F̆⁻¹ with m = 1000, 3 seeds: under 2 minutes

Every method starts from the same weights, minimises the same objective and trains for the same number of seconds; the
computation of the error is not part of them. CURVES is generated (curves.py) and MNIST is an excerpt, so the errors are
not the paper's; what its text says of the two figures is compared with what is measured. Pictures: build/figures.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from _arguments import folder, positive, whole
from _training_pictures import draw_figure_10, draw_figure_11, draw_fixed_batch
from curves import curves
from kfaclinalg_torch import KFAC
from mnist_autoencoder import (
    ADAM_SETTINGS,
    DIGITS,
    NESTEROV_SETTINGS,
    ROOT,
    WEIGHT_DECAY,
    Run,
    Step,
    adam,
    autoencoder,
    evaluate,
    growing_sizes,
    initialise_sparsely,
    load_digits,
    nesterov,
    print_table,
    progress,
)

CURVES_SIZES = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
SAMPLE = 2000  # the error is that of so many training images, so that its computation costs little

TRI, DIAG, NO_MOMENTUM = "tridiagonal K-FAC", "diagonal K-FAC", "K-FAC without momentum"
NESTEROV, ADAM = "Nesterov SGD", "Adam"

# λ0, T3 and the growth of the mini-batch are the demo's; without momentum m is fixed, as in the paper.
START = {"damping": 0.01, "inverse_period": 5, "batch": 1000}
KFAC_SETTINGS = {
    TRI: {"structure": "block-tridiagonal", **START, "full_batch_at": 240},
    DIAG: {"structure": "block-diagonal", **START, "full_batch_at": 240},
    NO_MOMENTUM: {"structure": "block-tridiagonal", "momentum": "none", **START},
}
MNIST_SETTINGS = KFAC_SETTINGS | {NESTEROV: NESTEROV_SETTINGS, ADAM: ADAM_SETTINGS}
# The best of a sweep, by the error after 340 iterations: Nesterov 26.8, 24.0, 26.3 and 31.0 with learning rates 0.001,
# 0.002, 0.005 and 0.01 (31.0 is the mean image; from 0.03 on it is worse), Adam 19.7, 16.4 and 21 with 0.0005, 0.001
# and 0.003.
CURVES_SETTINGS = KFAC_SETTINGS | {
    NESTEROV: {"batch": 200, "lr": 0.002, "max_momentum": 0.99},
    ADAM: {"batch": 200, "lr": 1e-3},
}
# m = 1000 and, by default, the constants of the paper: T3 = 20, τ1 = 1/8, τ2 = 1/4.
FIXED_BATCH = {"damping": 1.0, "batch": 1000}
FIXED_BATCH_ERRORS, FIXED_BATCH_SEEDS = (20.0, 10.0), (0, 1, 2)


class Task(NamedTuple):
    """A data set, the network that is trained on it, each method's settings, and the errors of the table."""

    name: str
    images: Tensor
    network: Callable[[int], nn.Module]
    settings: dict[str, dict]
    errors: tuple[float, ...]


class Budget(NamedTuple):
    """How long one method trains, and how often its error is computed."""

    seconds: float = math.inf
    evaluations: int = 24
    until: float = 0.0  # an error


def curves_task(count: int) -> Task:
    images = torch.from_numpy(curves(count, np.random.default_rng(0)))
    return Task("CURVES", images, curves_autoencoder, CURVES_SETTINGS, (30, 25, 20, 15, 10))


def mnist_task(count: int) -> Task:
    digits, _ = load_digits(DIGITS)
    return Task("MNIST", digits[:count], autoencoder, MNIST_SETTINGS, (40, 30, 20, 15, 10))


def curves_autoencoder(seed: int) -> nn.Sequential:
    """The network for CURVES: tanh, but for the code and the last layer. The signal must get through twelve layers, so
    the weights are twice the demo's and the biases 0."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(CURVES_SIZES):
        layer = nn.Linear(inputs, outputs)
        initialise_sparsely(layer, bias=0.0, generator=generator)
        with torch.no_grad():
            layer.weight.mul_(2)
        modules += [layer] if outputs in (min(CURVES_SIZES), CURVES_SIZES[-1]) else [layer, nn.Tanh()]
    return nn.Sequential(*modules)


# -- training --


def kfac(model, images, generator, *, batch, full_batch_at=None, **options):
    """K-FAC; the mini-batch grows to the whole training set, as in Section 13, where it is said at which iteration."""
    optimizer = KFAC(model, "bernoulli", weight_decay=WEIGHT_DECAY, generator=generator, **options)
    sizes = growing_sizes(batch, len(images), full_batch_at) if full_batch_at else itertools.repeat(batch)

    def steps() -> Iterator[Step]:
        for size in sizes:
            chosen = images[torch.randperm(len(images), generator=generator)[:size]]
            optimizer.step(chosen, chosen)
            yield Step(len(chosen), optimizer.info)

    return steps(), [model]


METHODS = dict.fromkeys(KFAC_SETTINGS, kfac) | {NESTEROV: nesterov, ADAM: adam}


def train(task: Task, method: str, settings: dict, budget: Budget, seed: int, bar: tqdm) -> Run:
    """Until the time is over or the error reached. Evaluations are equally spaced in log time, or at every iteration
    where no time is set."""
    run = Run(method, settings)
    model, generator = task.network(seed), torch.Generator().manual_seed(seed)
    steps, models = METHODS[method](model, task.images, generator, **settings)
    sample = task.images[:SAMPLE]
    evaluate(run, models[:1], sample)
    timed = math.isfinite(budget.seconds)
    first = budget.seconds / 50 if timed else 0.0
    due, spacing = first, (budget.seconds / first) ** (1 / budget.evaluations) if timed else 1.0
    while run.seconds < budget.seconds and budget.until < run.points[-1].error < math.inf:
        before, start = run.seconds, time.perf_counter()
        step = next(steps)
        run.record(step, time.perf_counter() - start)
        if run.seconds >= min(due, budget.seconds):
            due = run.seconds * spacing
            evaluate(run, models, sample)
        bar.set_postfix_str(f"{task.name}, {method}, error {run.points[-1].error:.1f}", refresh=False)
        bar.update(min(run.seconds, budget.seconds) - before if timed else 1)
    return run


def warm_up(task: Task) -> None:
    """One iteration of each method on a few images: what a process does only once is in no method's time."""
    for method, settings in task.settings.items():
        steps, _ = METHODS[method](task.network(0), task.images[:100], torch.Generator(), **settings)
        next(steps)


def compare(task: Task, budget: Budget, seed: int, bar: tqdm) -> dict[str, Run]:
    return {m: train(task, m, settings, budget, seed, bar) for m, settings in task.settings.items()}


# -- what was reached when, and what the paper says about it --


def reached(run: Run, error: float, coordinate: str) -> float:
    """Iterations or seconds to this error, log-linear between evaluations; infinite where it was never reached."""
    if run.points[0].error <= error:
        return 0.0
    for before, after in itertools.pairwise(run.points):
        if after.error <= error:
            share = math.log(before.error / error) / math.log(before.error / after.error)
            a, b = getattr(before, coordinate), getattr(after, coordinate)
            return a + share * (b - a)
    return math.inf


def times_less(runs: dict[str, Run], method: str, other: str, coordinate: str) -> tuple[float, float]:
    """How many times less `method` needs than `other` to the lowest error that both reached, and that error."""
    error = max(min(point.error for point in runs[name].points) for name in (method, other))
    own = reached(runs[method], error, coordinate)
    return (reached(runs[other], error, coordinate) / own if own else math.nan), error


def mean_image_error(images: Tensor) -> float:
    """What a network has that ignores its input."""
    return (images - images.mean(0)).square().sum(1).mean().item()


class Claim(NamedTuple):
    """A statement of the paper about two methods, if it has one, and the `times_less` that we take it to mean."""

    paper: str
    method: str
    other: str
    low: float
    high: float


FIGURE_10 = (
    Claim("K-FAC with momentum is overall much faster than SGD", TRI, NESTEROV, 1.5, math.inf),
    Claim("the block-tridiagonal K-FAC is only moderately faster than the block-diagonal one", TRI, DIAG, 1.0, 1.4),
    Claim("without momentum it is not significantly faster than SGD", NO_MOMENTUM, NESTEROV, 0.0, 1.5),
    Claim("", TRI, ADAM, 0.0, math.inf),
)
FIGURE_11 = (
    Claim("K-FAC with momentum needs orders of magnitude fewer iterations than SGD", TRI, NESTEROV, 10.0, math.inf),
    Claim("the block-tridiagonal K-FAC makes 25% to 40% more progress an iteration", TRI, DIAG, 1.25, 1.4),
    Claim("", TRI, ADAM, 0.0, math.inf),
)


def sentence(figure: str, claims: tuple[Claim, ...], task: Task, runs: dict[str, Run], coordinate: str) -> str:
    """What the paper shows, what ours shows, and where they differ."""
    unit = {"iteration": "iterations"}.get(coordinate, coordinate)
    ours, differences = [], []
    for claim in claims:
        ratio, error = times_less(runs, claim.method, claim.other, coordinate)
        if not error < mean_image_error(task.images):
            continue  # one of the two has not learned anything yet
        ours.append(f"{claim.other} takes {ratio:.2g} times the {unit} of {claim.method} to error {error:.1f}")
        if not claim.low <= ratio <= claim.high:
            words = f"{claim.low:g} to {claim.high:g}" if claim.high < math.inf else f"{claim.low:g} or more"
            differences.append(f"on {claim.method} beside {claim.other}: {ratio:.2g}, where {words} would agree")
    verdict = f"They differ {'; '.join(differences)}." if differences else "They do not differ in what is compared."
    paper = "; ".join(claim.paper for claim in claims if claim.paper)
    measured = f"Ours: {'; '.join(ours)}. {verdict}" if ours else "Ours: the run is too short to compare anything."
    return f"{figure}, {task.name}. The paper: {paper}. {measured}"


def table(task: Task, runs: dict[str, Run]) -> list[list[str]]:
    """Iterations and seconds to each error, a row a method."""
    rows = [[task.name, *(f"to {error:g}" for error in task.errors), "at the end"]]
    for method, run in runs.items():
        cells = []
        for error in task.errors:
            iterations, seconds = (reached(run, error, coordinate) for coordinate in ("iteration", "seconds"))
            cells.append(f"{iterations:,.0f} it, {seconds:.1f} s" if math.isfinite(seconds) else "-")
        end = run.points[-1]
        rows.append([method, *cells, f"{end.error:.1f} ({end.iteration:,} it, {end.seconds:.1f} s)"])
    return rows


# -- block-tridiagonal beside block-diagonal, with a fixed mini-batch --


def fixed_batch(task: Task, seeds: tuple[int, ...], until: float, bar: tqdm) -> dict[str, list[Run]]:
    """Both structures from the same weights with the same mini-batches; a run ends at the error `until`."""
    budget = Budget(until=until)
    return {
        method: [
            train(task, method, FIXED_BATCH | {"structure": KFAC_SETTINGS[method]["structure"]}, budget, seed, bar)
            for seed in seeds
        ]
        for method in (TRI, DIAG)
    }


def fixed_batch_table(runs: dict[str, list[Run]], errors: tuple[float, ...]) -> list[list[str]]:
    """Iterations to each error, a row a seed and one for their sum."""
    rows = [["seed", *(f"{method}, to {error:g}" for error in errors for method in runs), *(f"{e:g}" for e in errors)]]
    counts = np.array([[[reached(run, error, "iteration") for error in errors] for run in of] for of in runs.values()])
    counts = np.ceil(counts)  # the first iteration that has the error
    counts = np.concatenate([counts, counts.sum(1, keepdims=True)], axis=1)
    names = [*map(str, range(counts.shape[1] - 1)), "sum"]
    for name, tri, diag in zip(names, *counts, strict=True):
        cells = [f"{count:.0f}" for pair in zip(tri, diag, strict=True) for count in pair]
        rows.append([name, *cells, *(f"{ratio:.2f}" for ratio in diag / tri)])
    return rows


# -- the program --


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of at most 20 seconds in all")
    parser.add_argument("--seconds", type=positive, help="training time of each method (default 8, with --quick 0.8)")
    parser.add_argument("--seed", type=whole, default=0, help="of the initial weights and all sampling (default 0)")
    parser.add_argument("--fixed-batch", action="store_true", help="only the comparison with m = 1000, three seeds")
    parser.add_argument("--out", type=folder, default=ROOT / "build" / "figures", help="folder (build/figures)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.fixed_batch:
        print_fixed_batch(args.out, quick=args.quick)
    else:
        budget = Budget(args.seconds or (0.8 if args.quick else 8.0), evaluations=6 if args.quick else 24)
        print_figures(args.out, budget, args.seed, images=2000 if args.quick else 10_000)


def print_figures(out: Path, budget: Budget, seed: int, *, images: int) -> None:
    chosen = [curves_task(images), mnist_task(images)]
    warm_up(chosen[-1])
    with progress("Training", budget.seconds * sum(len(task.settings) for task in chosen)) as bar:
        results = [(task, compare(task, budget, seed, bar)) for task in chosen]
    for task, runs in results:
        print()
        print_table(table(task, runs))
    for figure, claims, coordinate in (("Figure 10", FIGURE_10, "seconds"), ("Figure 11", FIGURE_11, "iteration")):
        for task, runs in results:
            print("\n" + sentence(figure, claims, task, runs, coordinate))
    drawn = [(task.name, mean_image_error(task.images), runs) for task, runs in results]
    draw_figure_10(out / "figure_10.png", drawn)
    draw_figure_11(out / "figure_11.png", drawn, zoomed=(TRI, DIAG))
    print(f"\nPictures: {out}/figure_10.png and figure_11.png")


def print_fixed_batch(out: Path, *, quick: bool) -> None:
    task = mnist_task(10_000)
    seeds, errors = (FIXED_BATCH_SEEDS[:1], (45.0,)) if quick else (FIXED_BATCH_SEEDS, FIXED_BATCH_ERRORS)
    with tqdm(unit=" iterations", mininterval=0.1 if sys.stderr.isatty() else 20.0) as bar:
        runs = fixed_batch(task, seeds, min(errors), bar)
    rows = fixed_batch_table(runs, errors)
    print("\nIterations on MNIST with m = 1000 and λ0 = 1; the last columns are the ratio to each error.")
    print_table(rows)
    print(f"\nThe paper: 25% to 40% more progress an iteration. Ours: {', '.join(rows[-1][-len(errors) :])} times.")
    draw_fixed_batch(out / "figure_11_fixed_batch.png", mean_image_error(task.images), runs)
    print(f"Picture: {out}/figure_11_fixed_batch.png")


if __name__ == "__main__":
    main()
