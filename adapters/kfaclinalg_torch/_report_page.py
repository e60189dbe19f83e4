"""The report's pictures, by matplotlib, and its page."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a9097"
COLUMNS = 4
INFO = {
    "loss": "loss",
    "damping": "λ",
    "gamma": "γ",
    "alpha": "α, of the proposal",
    "mu": "μ, of the last update",
    "ratio": "ρ, fallen over foretold",
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .6rem 0 1.6rem; }}
  th, td {{ padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap; }}
  figure {{ margin: 1rem 0 2rem; }}
  h1 {{ font-size: 1.6rem; }}
  figure svg {{ display: block; background: #fff; border-radius: 4px; }}
  figcaption {{ font-size: .9rem; opacity: .8; max-width: 48rem; margin-top: .4rem; }}
</style>
<h1>{title}</h1>
<p>{verdict}</p>
{pictures}
<h2>Layers</h2>
{layers}
<h2>Seconds</h2>
{seconds}
<h2>Other parameters</h2>
{left}
</html>
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML; a word where there are no rows."""
    body = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if not body:
        return "<p>None.</p>"
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(body)}</table></div>'


def pictures_of(spectra: Sequence[Any], records: Sequence[dict[str, float]]) -> Iterator[str]:
    """A figure of the spectra, and those of the history that it has."""
    yield _spectra(spectra)
    if any("alpha" in record for record in records):
        yield _course(records)
    names = dict.fromkeys(key.removeprefix("update/") for record in records for key in record if "update/" in key)
    if names:
        yield _lengths(list(names), records)


def _spectra(spectra: Sequence[Any]) -> str:
    figure, panels = _grid(len(spectra), 2.1)
    for axes, s in zip(panels, spectra, strict=True):
        for values, colour, added in ((s.a, BLUE, 0), (s.g, ORANGE, 1)):
            positive = [(i / max(len(values) - 1, 1), float(v)) for i, v in enumerate(values) if v > 0]
            axes.semilogy(
                *zip(*positive or [(0.0, 1.0)], strict=True), color=colour, marker="." if len(values) < 9 else ""
            )
            if s.added is not None and s.added[added] > 0:
                axes.axhline(s.added[added], color=colour, linestyle=":")
        axes.set_title(s.name, fontsize=9, loc="left")
        axes.set_xticks([])
    text = (
        "Eigenvalues of A (blue) and of G (orange), from the largest to the smallest. The dotted lines are what the "
        "damping adds to each, πγ and γ/π. Where a line is above its curve nothing is left of that side's curvature."
    )
    return _figure(figure, text)


def _course(records: Sequence[dict[str, float]]) -> str:
    figure, panels = _grid(len(INFO), 1.9, columns=3)
    for axes, (field, title) in zip(panels, INFO.items(), strict=True):
        values = [record.get(field, math.nan) for record in records]
        axes.plot(values, "." if field == "ratio" else "-", color=BLUE, markersize=4)
        if field in ("damping", "gamma") and all(value > 0 for value in values):
            axes.set_yscale("log")
        if field == "ratio":
            for level in (0.25, 0.75):
                axes.axhline(level, color=GREY, linewidth=0.8)
        for k, record in enumerate(records):
            if record.get("refused"):
                axes.axvline(k, color=ORANGE, linewidth=0.5)
        axes.set_title(title, fontsize=9, loc="left")
    return _figure(
        figure, "Step by step. λ falls where ρ is above ¾ and rises below ¼ (grey). Refused steps are orange."
    )


def _lengths(names: Sequence[str], records: Sequence[dict[str, float]]) -> str:
    figure, panels = _grid(len(names), 1.9)
    for axes, name in zip(panels, names, strict=True):
        for kind, colour in (("gradient", GREY), ("update", BLUE)):
            axes.semilogy([record.get(f"{kind}/{name}") or math.nan for record in records], color=colour)
        cosines = axes.twinx()
        cosines.plot([record.get(f"cosine/{name}", math.nan) for record in records], color=ORANGE, linewidth=0.8)
        cosines.set_ylim(0, 1)
        cosines.set_yticks([0, 1])
        cosines.tick_params(labelsize=7)
        axes.set_title(name, fontsize=9, loc="left")
    text = (
        "Lengths of each layer's gradient (grey) and of the update that it became (blue), and the cosine of their "
        "angle (orange, right): near 1 K-FAC has changed nothing but the length."
    )
    return _figure(figure, text)


def _grid(count: int, height: float, columns: int = COLUMNS) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.35 * columns + 0.4, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.tick_params(labelsize=7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _figure(figure: Any, text: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    return f'<figure><div class="wide">{svg}</div><figcaption>{html.escape(text)}</figcaption></figure>'
