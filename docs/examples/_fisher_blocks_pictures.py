"""Figures 2, 3, 5 and 6, and F and F⁻¹ beside F̃ and F̃⁻¹.

|Entries| go from black, 0, to white, in a linear scale that ends at some maximum (as there).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from tqdm import tqdm

from _fisher_blocks_matrices import Fisher, Matrices, averages, relative

BOUNDARY = "#56b4e9"
FIRST_LAYER = 2


class Panel(NamedTuple):
    """A matrix, or the averages of its blocks; entries of size `white` and more are white."""

    title: str
    M: np.ndarray
    white: float


def draw_figures(
    out: Path, fisher: Fisher, direct: Matrices, inverse: Matrices, sizes: Sequence[int], gamma: float, *, dpi: int
) -> None:
    """One PNG a figure in the folder `out`."""
    # The maxima: one for F, one for the inverse, whose few large entries would leave all others black.
    white, white_inverse = np.quantile(np.abs(fisher.F), 0.97), np.quantile(np.abs(inverse.tilde), 0.95)
    tilde, tilde_inverse = r"$\tilde F$", r"$\tilde F^{-1}$"
    means, means_inverse = averages(fisher.F_tilde, sizes), averages(inverse.tilde, sizes)
    damped = f"damped with γ = {gamma:.2g}"
    figures = {
        2: ("The exact Fisher matrix and its Kronecker-factored approximation", [
            against("F", fisher.F, r"\tilde F", fisher.F_tilde, white),
        ]),
        3: (f"The approximation, and its inverse {damped}", [
            [Panel(tilde, fisher.F_tilde, white), Panel(tilde_inverse, inverse.tilde, white_inverse)],
            [Panel(f"mean |entry| of the blocks of {tilde}", means, means.max()),
             Panel(f"mean |entry| of the blocks of {tilde_inverse}", means_inverse, means_inverse.max())],
        ]),
        5: (f"Block-diagonal and -tridiagonal approximations, {damped}", comparison(direct, "", white)),
        6: (f"The inverses of the approximations, {damped}", comparison(inverse, "^{-1}", white_inverse)),
    }  # fmt: skip
    for number, (title, panels) in tqdm(figures.items(), desc="pictures", unit="picture"):
        draw(out / f"figure_{number}.png", f"Figure {number}. {title}", panels, sizes, dpi)
    inverses = against("F^{-1}", inverse.exact, r"\tilde F^{-1}", inverse.tilde, white_inverse)
    title = f"The Fisher matrix and its approximation; below, their inverses, {damped}"
    draw(out / "fisher_and_inverses.png", title, [figures[2][1][0], inverses], sizes, dpi)


def against(name: str, M: np.ndarray, other: str, N: np.ndarray, white: float) -> list[Panel]:
    """A row: a matrix, another and the difference."""
    difference = f"${name}$ $-$ ${other}$: {relative(N, M):.0%} of ${name}$"
    return [Panel(f"${name}$", M, white), Panel(f"${other}$", N, white), Panel(difference, M - N, white)]


def comparison(M: Matrices, power: str, white: float) -> list[list[Panel]]:
    """A row for F̆ and one for F̂: F̃, its approximation and the difference."""

    def row(name: str, N: np.ndarray) -> list[Panel]:
        difference = f"{tilde} $-$ {name}: {relative(N, M.tilde):.1%} of {tilde}"
        return [Panel(tilde, M.tilde, white), Panel(name, N, white), Panel(difference, M.tilde - N, white)]

    tilde = rf"$\tilde F{power}$"
    return [row(rf"$\breve F{power}$", M.check), row(rf"$\hat F{power}$", M.hat)]


def draw(path: Path, title: str, panels: Sequence[Sequence[Panel]], sizes: Sequence[int], dpi: int) -> None:
    """A PNG of the panels, `sizes` those of the blocks. A row in one scale has one colour bar."""
    rows, columns = len(panels), len(panels[0])
    figure = Figure(figsize=(5 * columns + 0.8, 5.2 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=17)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes_row, row in zip(grid, panels, strict=True):
        images = [draw_panel(axes, panel, sizes) for axes, panel in zip(axes_row, row, strict=True)]
        shared = len({panel.white for panel in row}) == 1
        for image, axes in [(images[0], axes_row)] if shared else zip(images, axes_row, strict=True):
            extend = "max" if len(row[0].M) > len(sizes) else "neither"
            bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, aspect=40, extend=extend)
            bar.set_label("|entry|", fontsize=9)
            bar.ax.tick_params(labelsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def draw_panel(axes: Axes, panel: Panel, sizes: Sequence[int]) -> AxesImage:
    image = axes.imshow(np.abs(panel.M), cmap="gray", vmin=0, vmax=panel.white)
    axes.set_title(panel.title, fontsize=15)
    averaged = len(panel.M) == len(sizes)
    if averaged:
        for (i, j), value in np.ndenumerate(panel.M):
            ink = "black" if value > 0.5 * panel.white else "white"
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=13, color=ink)
    mark_layers(axes, [1] * len(sizes) if averaged else sizes)
    return image


def mark_layers(axes: Axes, sizes: Sequence[int]) -> None:
    """Dashed lines between the blocks, and the layers' names beside them."""
    ends = np.cumsum(sizes)
    for end in ends[:-1] - 0.5:
        for line in (axes.axhline, axes.axvline):
            line(end, color=BOUNDARY, linestyle=(0, (4, 3)), linewidth=0.9)
    middles = ends - np.asarray(sizes) / 2 - 0.5
    names = [f"layer {FIRST_LAYER + i}" for i in range(len(sizes))]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names, rotation=90, va="center")
    axes.tick_params(length=0, labelsize=9)
