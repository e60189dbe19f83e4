"""What race.py shows: a table of medians, and one page with the curves of each task."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from _demo_page import PAGE, STYLE, embed, html_table, mark_log_axis
from _race_tasks import TASKS

COLOURS = {  # Okabe and Ito's palette
    "AdamW": "#009E73",
    "SGD": "#999999",
    "Muon": "#E69F00",
    "SOAP": "#CC79A7",
    "Shampoo": "#882255",
    "L-BFGS": "#999933",
    "K-FAC + SGD": "#0072B2",
    "K-FAC + AdamW": "#56B4E9",
    "KFAC": "#D55E00",
}
BASE = "AdamW"


class Run(NamedTuple):
    """One training: (steps, seconds, training loss, held-out loss) at some of its steps."""

    task: str
    method: str
    number: float  # the learning rate, of KFAC the damping
    seed: int
    steps: int
    points: list[tuple[int, float, float, float]]

    @property
    def key(self) -> tuple[str, str, float, int]:
        return (self.task, self.method, self.number, self.seed)

    @property
    def held_out(self) -> float:
        """The final loss; infinite where the run diverged."""
        *_, loss = self.points[-1]
        return loss if math.isfinite(loss) and self.points[-1][0] == self.steps else math.inf

    def reached(self, loss: float) -> tuple[float, float]:
        """The first (steps, seconds) at which the held-out loss is at most that; infinite if never."""
        return next(((k, s) for k, s, _, found in self.points if found <= loss), (math.inf, math.inf))


def best_runs(runs: list[Run], task: str) -> dict[str, list[Run]]:
    """Of each method those with its best number."""
    of = {method: [run for run in runs if (run.task, run.method) == (task, method)] for method in COLOURS}
    best = {method: min(them, key=lambda run: (run.seed, run.held_out)).number for method, them in of.items() if them}
    return {method: [run for run in of[method] if run.number == number] for method, number in best.items()}


def table_of(runs: list[Run]) -> list[list[str]]:
    """A row for each task and method: medians over the seeds, and in brackets the range.

    Steps and seconds to a loss, AdamW's or that of the best without K-FAC, are parts of what its owner took in all.
    """
    heading = ["task", "method", "number", "held-out loss", "training loss"]
    rows = [[*heading, "steps to AdamW's", "seconds", "steps to the best rival's", "seconds", "a step"]]
    for task in TASKS:
        methods = best_runs(runs, task)
        if BASE not in methods:
            continue
        base = methods[BASE]
        best = min((them for name, them in methods.items() if "FAC" not in name), key=final)
        for method, them in methods.items():
            losses = [run.held_out for run in them]
            cells = [
                f"{final(them):.4g} [{min(losses):.4g}, {max(losses):.4g}]",
                f"{statistics.median(run.points[-1][2] for run in them):.4g}",
                *until(them, base),
                *until(them, best),
                f"{a_step(them) / a_step(base):.2f}",
            ]
            rows.append([task, method, f"{them[0].number:g}", *cells])
    return rows


def final(runs: list[Run]) -> float:
    return statistics.median(run.held_out for run in runs)


def a_step(runs: list[Run]) -> float:
    return statistics.median(run.points[-1][1] / max(run.points[-1][0], 1) for run in runs)


def until(runs: list[Run], rivals: list[Run]) -> list[str]:
    """The steps and the seconds until the rivals' final loss, over theirs."""
    reached = zip(*(run.reached(final(rivals)) for run in runs), strict=True)
    theirs = rivals[0].steps, statistics.median(run.points[-1][1] for run in rivals)
    return [share(statistics.median(mine) / total) for mine, total in zip(reached, theirs, strict=True)]


def share(x: float) -> str:
    return f"{x:.2f}" if math.isfinite(x) else "never"


def write_page(path: Path, runs: list[Run], rows: list[list[str]]) -> None:
    """The page, and beside it the picture of each task."""
    with matplotlib.rc_context(STYLE):
        tasks = [task for task in TASKS if any(run.task == task for run in runs)]
        drawn = {task: draw(task, best_runs(runs, task)) for task in tasks}
        for task, figure in drawn.items():
            figure.savefig(path.with_name(f"race_{task}.png"), dpi=150)
        figures = "\n".join(embed(figure, caption(task)) for task, figure in drawn.items())
    text = PAGE.format(
        title="The race",
        verdict="Each method with the best of four learning rates or dampings; medians over the seeds, and ranges.",
        table=html_table(rows, COLOURS),
        figures=figures,
        settings="<dt>Seconds</dt><dd>of the steps alone, on one thread</dd>",
    )
    path.write_text(text, encoding="utf-8")


def caption(task: str) -> str:
    return f"{TASKS[task].title}: held-out loss against steps and seconds, a line a seed."


def draw(task: str, methods: dict[str, list[Run]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method, runs in methods.items():
        for run in runs:
            for axes, column in ((left, 0), (right, 1)):
                curve(axes, run, column, method)
    finals = [run.points[0][3] for runs in methods.values() for run in runs]
    left.set(title=TASKS[task].title, xlabel="steps", ylabel="held-out loss")
    left.set(yscale="log", ylim=(None, 1.1 * max(finals)))
    right.set(xlabel="seconds")
    mark_log_axis(left)
    named = {line.get_label(): line for line in left.get_lines()}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=min(len(named), 7), frameon=False)
    return figure


def curve(axes: Axes, run: Run, column: int, method: str) -> None:
    points = np.array(run.points, dtype=float)
    axes.plot(points[:, column], points[:, 3], color=COLOURS[method], label=method, linewidth=1.3)
