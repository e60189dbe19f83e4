"""What resnet_digits.py and docstring_language_model.py share: the sweep, the runs, the report and the picture.

Each of them has `train(seed, lr, iterations, preconditioned)`, a user's training loop that yields the loss of every
mini-batch. Both ways to train start from the same weights, see the same mini-batches, and have the same learning rates
to choose from: AdamW takes the one with the lowest final loss, and with the preconditioner the one that gets to that
loss first.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from _arguments import folder
from _demo_page import COLOURS, FAINT, STYLE, mark_log_axis
from mnist_autoencoder import ROOT, print_table

WITHOUT, WITH = "AdamW", "AdamW, preconditioned"
ARMS = {WITHOUT: False, WITH: True}
COLOUR = {WITHOUT: COLOURS["Adam"], WITH: COLOURS["K-FAC"]}

Train = Callable[[int, float, int, bool], Iterator[float]]


class Plan(NamedTuple):
    """What is the same for both ways to train. The learning rate is chosen on the first seed."""

    iterations: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    smoothing: int  # the loss at an iteration is the mean over the last so many mini-batches


class Run(NamedTuple):
    """One training."""

    rate: float
    loss: np.ndarray  # smoothed; NaN before there are enough mini-batches
    seconds: np.ndarray  # of training until then

    @property
    def end(self) -> float:
        """The final loss; infinite if the run diverged."""
        return float(self.loss[-1]) if math.isfinite(self.loss[-1]) else math.inf

    def first_at(self, loss: float) -> int | None:
        """The number of iterations after which the loss is there, or None."""
        reached = np.flatnonzero(self.loss <= loss)
        return int(reached[0]) + 1 if len(reached) else None


Result = dict[str, tuple[list[Run], list[Run]]]  # of each arm: the sweep, and the runs at its best rate, one a seed


# -- training --


def compare(train: Train, plan: Plan) -> Result:
    runs = len(ARMS) * (len(plan.rates) + len(plan.seeds) - 1)
    interval = 0.1 if sys.stderr.isatty() else 20.0
    with tqdm(total=runs * plan.iterations, unit=" iterations", mininterval=interval) as bar:
        plain = sweep(train, plan, WITHOUT, lambda run: (run.end, 0.0), bar)
        target = plain[1][0].end
        ours = sweep(train, plan, WITH, lambda run: (run.first_at(target) or math.inf, run.end), bar)
    return {WITHOUT: plain, WITH: ours}


def sweep(
    train: Train, plan: Plan, arm: str, cost: Callable[[Run], tuple[float, float]], bar: tqdm
) -> tuple[list[Run], list[Run]]:
    """All learning rates on the first seed, then the best of them on the other seeds."""
    first, *others = plan.seeds
    swept = [record(train, plan, arm, first, rate, bar) for rate in plan.rates]
    best = min(swept, key=cost)
    return swept, [best, *(record(train, plan, arm, seed, best.rate, bar) for seed in others)]


def record(train: Train, plan: Plan, arm: str, seed: int, rate: float, bar: tqdm) -> Run:
    """One training, to its end or to a loss that is not finite."""
    losses, seconds = np.full((2, plan.iterations), np.nan)
    start = time.perf_counter()
    for k, loss in enumerate(train(seed, rate, plan.iterations, ARMS[arm])):
        losses[k], seconds[k] = loss, time.perf_counter() - start
        bar.set_postfix_str(f"{arm}, lr {rate:g}, seed {seed}, loss {loss:.3f}", refresh=False)
        bar.update()
        if not math.isfinite(loss):
            bar.update(plan.iterations - k - 1)
            break
    return Run(rate, smoothed(losses, plan.smoothing), seconds)


def smoothed(losses: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values.

    >>> smoothed(np.array([4.0, 2.0, 0.0, 1.0]), 2)
    array([nan, 3. , 1. , 0.5])
    """
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return np.concatenate([np.full(width - 1, np.nan), means])


# -- the report --


def sweep_table(result: Result) -> list[list[str]]:
    """The final loss with each learning rate, a row an arm; the best is marked."""
    rows = [["final loss with learning rate", *(f"{run.rate:g}" for run in result[WITHOUT][0])]]
    for arm, (swept, chosen) in result.items():
        cells = [f"{run.end:.4g}" + ("*" if run is chosen[0] else " ") for run in swept]
        rows.append([arm, *cells])
    return rows


def race_table(result: Result, plan: Plan) -> list[list[str]]:
    """When the preconditioned loop had the final loss of the other, a row a seed."""
    rows = [["seed", f"{WITHOUT}: loss", "after", f"{WITH}: at most that after", "of the iterations", "and in the end"]]
    for seed, plain, ours in zip(plan.seeds, *(chosen for _, chosen in result.values()), strict=True):
        k = ours.first_at(plain.end)
        when = f"{k} it, {ours.seconds[k - 1]:.1f} s" if k else "never"
        share = f"{k / plan.iterations:.0%}" if k else "-"
        end = f"{plan.iterations} it, {plain.seconds[-1]:.1f} s"
        rows.append([str(seed), f"{plain.end:.4g}", end, when, share, f"{ours.end:.4g}, {ours.seconds[-1]:.1f} s"])
    return rows


def verdict(result: Result, plan: Plan) -> str:
    (_, plain), (_, ours) = result.values()
    reached = [run.first_at(other.end) for run, other in zip(ours, plain, strict=True)]
    if None in reached:
        return "The preconditioned loop did not reach the other's final loss with every seed."
    share = statistics.mean(reached) / plan.iterations
    seconds = [run.seconds[k - 1] for run, k in zip(ours, reached, strict=True)]
    time = sum(seconds) / sum(run.seconds[-1] for run in plain)
    seeds = "1 seed" if len(reached) == 1 else f"{len(reached)} seeds"
    return f"The same loss takes {share:.0%} of the iterations and {time:.0%} of the seconds (mean of {seeds})."


def draw(path: Path, title: str, result: Result, plan: Plan) -> None:
    """Loss against iterations and against seconds, a line a seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for arm, (_, runs) in result.items():
            for run in runs:
                left.plot(np.arange(1, len(run.loss) + 1), run.loss, color=COLOUR[arm], label=arm, linewidth=1.4)
                right.plot(run.seconds, run.loss, color=COLOUR[arm], linewidth=1.4)
        mark_reached(left, result, plan)
        left.set(title=f"{title}: training loss against iterations", xlabel="iterations", xlim=(0, None))
        averaged = f", mean of {plan.smoothing} mini-batches" if plan.smoothing > 1 else ""
        left.set_ylabel(f"cross-entropy{averaged}")
        right.set(title="the same against time", xlabel="seconds of training on one core", xlim=(0, None))
        if spread(result) > 4:
            left.set_yscale("log")
            mark_log_axis(left)
        named = {line.get_label(): line for line in left.get_lines() if line.get_label() in ARMS}
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=len(named), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)


def spread(result: Result) -> float:
    """The largest loss over the smallest."""
    losses = np.concatenate([run.loss for _, runs in result.values() for run in runs])
    return float(np.nanmax(losses) / np.nanmin(losses))


def mark_reached(axes: Axes, result: Result, plan: Plan) -> None:
    """From where the preconditioned loop has the other's final loss to where the other has it, one a seed."""
    for plain, ours in zip(*(chosen for _, chosen in result.values()), strict=True):
        if k := ours.first_at(plain.end):
            axes.plot([k, plan.iterations], [plain.end] * 2, color=FAINT, linewidth=1, linestyle=":")
            axes.plot([k], [plain.end], "o", color=COLOUR[WITH], markersize=5)
            axes.plot([plan.iterations], [plain.end], "o", color=COLOUR[WITHOUT], markersize=5)


# -- the program --


def run(doc: str, title: str, name: str, train: Train, plan: Plan, quick: Plan) -> None:
    """The command line of both examples."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of about 15 seconds, which shows little")
    parser.add_argument("--out", type=folder, default=ROOT / "build" / "figures", help="folder (build/figures)")
    args = parser.parse_args()
    plan = quick if args.quick else plan
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    list(train(0, plan.rates[0], 1, True))  # what a process does only once is in no run's time
    result = compare(train, plan)
    print()
    print_table(sweep_table(result))
    print()
    print_table(race_table(result, plan))
    print(f"\n{verdict(result, plan)}")
    draw(args.out / f"{name}.png", title, result, plan)
    print(f"Picture: {args.out / name}.png")
