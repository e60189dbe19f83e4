"""The pictures of training_curves.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

import _demo_page
from _demo_page import FAINT, STYLE, mark_log_axis

if TYPE_CHECKING:
    from mnist_autoencoder import Run

COLOURS = {
    "tridiagonal K-FAC": _demo_page.COLOURS["K-FAC"],
    "diagonal K-FAC": "#56B4E9",
    "K-FAC without momentum": "#CC79A7",
    "Nesterov SGD": _demo_page.COLOURS["Nesterov"],
    "Adam": _demo_page.COLOURS["Adam"],
}
RESOLUTION = 160

# Of each data set: its name, the error of its mean image, and the runs by method.
Results = list[tuple[str, float, dict[str, "Run"]]]


def draw_figure_10(path: Path, results: Results) -> None:
    """Error against seconds, a panel a data set."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        for axes, (name, mean, runs) in zip(figure.subplots(1, 2), results, strict=True):
            draw(axes, runs.values(), "seconds", mean)
            axes.set(title=f"{name}: error against time", xlabel="seconds of training")
        add_legend(figure)
        figure.savefig(path, dpi=RESOLUTION)


def draw_figure_11(path: Path, results: Results, zoomed: Iterable[str]) -> None:
    """Error against iterations, a row a data set; on the right only the two structures of K-FAC."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 8), layout="constrained")
        for (left, right), (name, mean, runs) in zip(figure.subplots(2, 2), results, strict=True):
            draw(left, runs.values(), "iteration", mean)
            left.set_xscale("log")
            left.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            left.set(title=f"{name}: error against iterations", xlabel="iterations")
            draw(right, [runs[method] for method in zoomed], "iteration", mean)
            right.set(title=f"{name}: the two structures of K-FAC", xlabel="iterations")
        add_legend(figure)
        figure.savefig(path, dpi=RESOLUTION)


def draw_fixed_batch(path: Path, mean: float, runs: dict[str, list[Run]]) -> None:
    """Error against iterations, a line a seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        draw(axes, [run for seeds in runs.values() for run in seeds], "iteration", mean)
        axes.set(title="MNIST, m = 1000, λ0 = 1: each line a seed", xlabel="iterations")
        add_legend(figure)
        figure.savefig(path, dpi=RESOLUTION)


def draw(axes: Axes, runs: Iterable[Run], coordinate: str, mean: float) -> None:
    """The error on a logarithmic axis, up to twice that of the mean image, on whose plateau a method may rest."""
    lowest = mean
    for run in runs:
        points = [point for point in run.points if point.iteration and math.isfinite(point.error)]
        x, y = [getattr(point, coordinate) for point in points], [point.error for point in points]
        lowest = min(lowest, *y)
        axes.semilogy(x, y, color=COLOURS[run.method], label=run.method, linewidth=1.6)
        axes.plot(x[-1:], y[-1:], "o", color=COLOURS[run.method], markersize=4)
    axes.axhline(mean, color=FAINT, linewidth=1, linestyle=":")
    axes.text(0.99, mean * 1.02, "the mean image", transform=axes.get_yaxis_transform(), ha="right", color=FAINT)
    axes.set_ylim(lowest / 1.1, 2 * mean)
    axes.set_ylabel("squared reconstruction error")
    mark_log_axis(axes)


def add_legend(figure: Figure) -> None:
    """One for all panels, above them."""
    named = {line.get_label(): line for line in figure.axes[0].get_lines() if line.get_label() in COLOURS}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=len(named), frameon=False)
