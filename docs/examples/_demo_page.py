"""The demo's page: one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

if TYPE_CHECKING:
    from mnist_autoencoder import Run

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"K-FAC": "#0072B2", "Nesterov": "#D55E00", "Adam": "#009E73", "Muon": "#E69F00", "SOAP": "#CC79A7"}
INK, FAINT = "#22262b", "#8a9097"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b9bec4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#eceef0",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ max-width: 58rem; margin: 3rem auto; padding: 0 1.5rem; color: #22262b; background: #fff;
         font: 17px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }}
  h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }}
  .verdict {{ font-size: 1.1rem; color: #4a5057; margin: 0 0 1.8rem; max-width: 46rem; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0 0 2.4rem;
    display: block; overflow-x: auto; }}
  th, td {{ padding: .4rem 0 .4rem 2rem; text-align: right; border-bottom: 1px solid #e3e6e9; }}
  th {{ font-weight: 600; font-size: .85rem; color: #5b6168; }}
  th:first-child, td:first-child {{ padding-left: 0; text-align: left; font-weight: 600; }}
  figure {{ margin: 0 0 2.6rem; }}
  img {{ display: block; width: 100%; height: auto; }}
  figcaption {{ font-size: .92rem; color: #4a5057; max-width: 46rem; margin-top: .6rem; }}
  dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.6rem; font-size: .92rem; margin: 0; }}
  dt {{ font-weight: 600; }}
  dd {{ margin: 0; }}
  h2 {{ font-size: 1.05rem; margin: 0 0 .6rem; }}
</style>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
{table}
{figures}
<h2>Settings</h2>
<dl>
{settings}
</dl>
</html>
"""


def write_page(
    path: Path,
    runs: list[Run],
    digits: torch.Tensor,
    labels: np.ndarray,
    *,
    table: list[list[str]],
    verdict: str,
    settings: dict[str, str],
) -> None:
    """The page, and beside it its first picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        error = error_picture(runs)
        error.savefig(path.with_name("demo.png"), dpi=150)
        figures = [
            (error, ERROR_CAPTION),
            *((step_picture(run), STEP_CAPTION) for run in runs if has_report(run)),
            (digits_picture(runs, digits, labels), DIGITS_CAPTION),
        ]
        images = "\n".join(embed(figure, caption) for figure, caption in figures)
    terms = "\n".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in settings.items())
    opening = f"{len(runs)} methods train the same network from the same weights for the same time. {verdict}"
    text = PAGE.format(
        title="K-FAC on the MNIST autoencoder",
        verdict=html.escape(opening),
        table=html_table(table, COLOURS),
        figures=images,
        settings=terms,
    )
    path.write_text(text, encoding="utf-8")


def html_table(rows: list[list[str]], colours: dict[str, str]) -> str:
    """The names of methods, which have a colour, are drawn in it."""
    heading, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in heading) + "</tr>"]
    for row in body:
        styles = [f' style="color: {colours[cell]}"' if cell in colours else "" for cell in row]
        lines.append("<tr>" + "".join(f"<td{s}>{cell}</td>" for s, cell in zip(styles, row, strict=True)) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def embed(figure: Figure, caption: str) -> str:
    """The figure as an SVG inside the page, with its caption."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.03)
    source = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(caption.partition(".")[0], quote=True)
    image = f'<img alt="{alt}" src="data:image/svg+xml;base64,{source}">'
    return f"<figure>\n{image}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"


# -- error against iterations and seconds --

ERROR_CAPTION = (
    "The squared reconstruction error of all digits, summed over pixels, against iterations (left) and seconds of "
    "training (right); all axes are logarithmic. Dotted: where K-FAC reaches the error that the other method ends with."
)


def error_picture(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    for axes, coordinate in zip(figure.subplots(1, 2, sharey=True), ("iteration", "seconds"), strict=True):
        for run in runs:
            draw_error(axes, run, coordinate)
        for run in runs[1:]:
            draw_lead(axes, runs[0], run, coordinate)
        label_ends(axes, runs, coordinate)
        finish_log_axes(axes)
    left, right = figure.axes
    left.set(xlabel="iterations", title="Reconstruction error")
    right.set(xlabel="seconds")
    return figure


def draw_error(axes: Axes, run: Run, coordinate: str) -> None:
    points = [p for p in run.points if p.iteration and math.isfinite(p.error)]  # log axes have no zero
    x, y = [getattr(p, coordinate) for p in points], [p.error for p in points]
    axes.loglog(x, y, color=COLOURS[run.method], zorder=3)
    axes.plot(x[-1:], y[-1:], "o", color=COLOURS[run.method], markersize=5, zorder=4)


def draw_lead(axes: Axes, leader: Run, run: Run, coordinate: str) -> None:
    """The distance between a method's end and where the leader had the same error."""
    end = run.points[-1]
    reached = next((p for p in leader.points if p.error <= end.error and p.iteration), None)
    if reached and end.iteration:
        x = [getattr(reached, coordinate), getattr(end, coordinate)]
        axes.plot(x, [end.error] * 2, ":", color=COLOURS[run.method], linewidth=1.2)


def label_ends(axes: Axes, runs: list[Run], coordinate: str) -> None:
    """Names at the ends of the lines, moved apart where they would touch."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    gap, height = 0.055 * (high - low), -math.inf
    ends = [(run, run.points[-1]) for run in runs if run.points[-1].iteration and math.isfinite(run.points[-1].error)]
    for run, end in sorted(ends, key=lambda pair: pair[1].error):
        height = max(math.log(end.error), height + gap)
        position, colour = (getattr(end, coordinate), math.exp(height)), COLOURS[run.method]
        text = f"{run.method} {end.error:.2f}"
        label = axes.annotate(
            text, position, (8, 0), textcoords="offset points", va="center", color=colour, weight="bold"
        )
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])


def finish_log_axes(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.28)  # room for the names
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    mark_log_axis(axes)


def mark_log_axis(axes: Axes) -> None:
    """Plain numbers on a logarithmic y axis, as many as it has room for; powers of ten where it is long."""
    low, high = axes.get_ylim()
    factors = (1,) if high > 300 * low else (1, 2, 5) if high > 6 * low else (1, 1.5, 2, 3, 4, 5, 7)
    ticks = [m * 10.0**e for e in range(-9, 9) for m in factors if low <= m * 10.0**e <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    if len(factors) > 1:
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


# -- K-FAC's own quantities --

STEP_CAPTION = (
    "K-FAC's quantities during the run; above, the seconds of training. Every 5 iterations the damping λ follows the "
    "reduction ratio ρ of the quadratic model: above 3/4 it falls, below 1/4 it rises. Every 20 iterations γ is chosen "
    "among three candidates. The learning rate α and the momentum μ minimise the model at every iteration."
)
PANELS = (
    ("λ, damping", "damping", "log"),
    ("γ, damping of the factors", "gamma", "log"),
    ("α, learning rate", "alpha", "log"),
    ("μ, momentum", "mu", "linear"),
    ("ρ, reduction ratio", "ratio", "linear"),
    ("m, mini-batch", "batch", "log"),
)


def has_report(run: Run) -> bool:
    return bool(run.steps) and run.steps[0][1].info is not None


def step_picture(run: Run) -> Figure:
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    grid = figure.subplots(3, 2, sharex=True)
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        draw_series(axes, run, *panel)
    for threshold, name in ((0.25, "1/4"), (0.75, "3/4")):
        grid[2, 0].axhline(threshold, color=FAINT, linewidth=0.8, linestyle="--")
        grid[2, 0].text(1.01, threshold, name, transform=grid[2, 0].get_yaxis_transform(), va="center", color=FAINT)
    for axes in grid[0]:
        add_seconds(axes, run)
    for axes in grid[-1]:
        axes.set_xlabel("iteration")
    return figure


def draw_series(axes: Axes, run: Run, title: str, name: str, scale: str) -> None:
    values = series(run, name)
    shown = np.flatnonzero(np.isfinite(values))  # ρ is known only every 5 iterations
    line = "o" if name == "ratio" else "-"
    axes.plot(shown + 1, values[shown], line, color=COLOURS[run.method], linewidth=1.3, markersize=2.5)
    axes.set_title(title)
    if scale == "log" and np.all(values[shown] > 0):
        axes.set_yscale("log")
        mark_log_axis(axes)


def series(run: Run, name: str) -> np.ndarray:
    if name == "batch":
        return np.array([step.batch for _, step in run.steps], dtype=float)
    return np.array([float(getattr(step.info, name)) for _, step in run.steps])


def add_seconds(axes: Axes, run: Run) -> None:
    """An axis above that says how many seconds had passed at the iterations marked below."""
    seconds = np.array([0.0] + [s for s, _ in run.steps])
    above = axes.secondary_xaxis("top")
    above.xaxis.set_major_formatter(lambda k, _: f"{np.interp(k, np.arange(len(seconds)), seconds):.0f} s")
    above.tick_params(labelcolor=FAINT, length=0)
    above.spines["top"].set_visible(False)


# -- reconstructions --

DIGITS_CAPTION = (
    "The first digit of each class that the methods trained on, and what each method's network makes of it after its "
    "last iteration: 784 pixels through a code of 30 numbers and back. On the left, the error over all digits."
)
PITCH, PIXELS = 31, 28


@torch.no_grad()
def digits_picture(runs: list[Run], digits: torch.Tensor, labels: np.ndarray) -> Figure:
    chosen = digits[[int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]]
    rows = [("Original", "", INK, chosen)]
    for run in runs:
        error = f"error {run.points[-1].error:.2f}"
        rows.append((run.method, error, COLOURS[run.method], run.model(chosen).sigmoid()))
    sheet = np.zeros((len(rows) * PITCH, len(chosen) * PITCH))
    figure = Figure(figsize=(10, 0.86 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (name, error, colour, images) in enumerate(rows):
        for j, image in enumerate(images.reshape(-1, PIXELS, PIXELS).numpy()):
            sheet[i * PITCH :, j * PITCH :][:PIXELS, :PIXELS] = image
        axes.text(-14, i * PITCH + 11, name, ha="right", va="center", color=colour, weight="bold")
        axes.text(-14, i * PITCH + 20, error, ha="right", va="center", color=FAINT, fontsize=8.5)
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    return figure
