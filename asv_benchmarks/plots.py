"""The pictures of docs/performance.md, from the newest of asv's results: `make plots`."""

import json
import re
from ast import literal_eval
from itertools import product
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FOLDER = HERE.parent / "docs" / "_static" / "performance"
COLOURS = {"numpy": "#1f6fb4", "torch": "#d9541e", "jax": "#2a9d5c", "cupy": "#8e5bb0", "cuda": "#6b6b6b"}
GROUPS = {
    "matrices": ("spd.", "low_rank", "Diagonal.", "LowRankPlusDiagonal.", "assert_finite"),
    "layers": ("Kronecker", "OuterProduct."),
    "networks": ("",),  # what is left
}
HIDDEN = ("astype", "to_device", "to_namespace", "as_scipy", "pays")
COLUMNS = 5


def newest():
    """{benchmark: {params: value}} of the newest results, and the machine and the commit that they are of."""
    files = [path for path in HERE.glob("results/*/*.json") if path.name != "machine.json"]
    data = max((json.loads(path.read_text(encoding="utf-8")) for path in files), key=lambda data: data["date"])
    found = {}
    for name, row in data["results"].items():
        values, params = row[:2]
        keys = product(*([literal_eval(x) for x in axis] for axis in params))
        found[name] = {key: x for key, x in zip(keys, values or (), strict=False) if isinstance(x, float) and x > 0}
    return found, f"{data['params']['machine']}, {data['params'].get('cpu', '')}, commit {data['commit_hash'][:7]}"


def operations(found):
    """{operation: {backend: [(n, seconds, ratio to the floor)]}} in float32."""
    rows = {}
    for name, times in found.items():
        module, _, kind = name.partition(".")
        if module in ("core", "compiled") and kind.endswith(".time_ours"):
            ratios = found.get(name.replace("time_ours", "track_ratio"), {})
            backends = rows.setdefault(kind.removesuffix(".time_ours"), {})
            for key in sorted(times.keys() & ratios.keys(), key=lambda key: key[2]):
                if key[1] == "float32":
                    backends.setdefault(key[0], []).append((key[2], times[key], ratios[key]))
    return {name: backends for name, backends in rows.items() if backends and not name.endswith(HIDDEN)}


def small_multiples(rows, caption):
    lines = -(-len(rows) // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(13, 2.25 * lines + 0.7), squeeze=False)
    for axis, (name, backends) in zip(axes.flat, rows.items(), strict=False):
        panel(axis, name, backends)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    present = {backend for backends in rows.values() for backend in backends}
    handles = [plt.Line2D([], [], color=c, marker="o", label=b) for b, c in COLOURS.items() if b in present]
    handles.append(plt.Line2D([], [], color="0.3", linestyle=":", marker="_", label="its floor, by hand"))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False, bbox_to_anchor=(0.5, 1))
    figure.supxlabel(
        f"n (seconds against n; in colour: time of ours / time of the floor at the largest n)\n{caption}", fontsize=8
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.32 / figure.get_figheight()))
    return figure


def panel(axis, name, backends):
    for backend, points in backends.items():
        n, seconds, ratios = zip(*points, strict=True)
        floor = [t / r for t, r in zip(seconds, ratios, strict=True)]
        axis.plot(n, seconds, color=COLOURS[backend], marker="o", markersize=3, linewidth=1.3)
        axis.plot(n, floor, color=COLOURS[backend], marker="_", markersize=7, linestyle=":", linewidth=1.3)
    axis.set(xscale="log", yscale="log")
    axis.set_title(re.sub("^(spd|[A-Z][A-Za-z]+)_", r"\1.", name).replace(".matmul", " @"), fontsize=8.5, pad=14)
    for i, backend in enumerate(sorted(backends, key=list(COLOURS).index)):
        text = f"{backends[backend][-1][2]:.2f}"
        axis.text(0.02 + 0.2 * i, 1.03, text, color=COLOURS[backend], fontsize=8, transform=axis.transAxes)
    ticks(axis, {point[0] for points in backends.values() for point in points})


def ticks(axis, sizes):
    """Every size, and nothing between them on a logarithmic axis."""
    axis.set_xticks(sorted(sizes), sorted(sizes))
    axis.set_xticks([], minor=True)


def growth(found, caption):
    """Time and the fitted exponent."""
    names = [name for name in found if name.startswith("growth.") and name.endswith(".time_ours")]
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.4), sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        exponents = found.get(name.replace(".time_ours", "Exponent.track_exponent"), {})
        for backend, colour in COLOURS.items():
            points = sorted((n, t) for (b, n), t in found[name].items() if b == backend)
            if points:
                power = exponents.get((backend,))
                label = backend + (f": $n^{{{power:.2f}}}$" if power else "")
                axis.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
        axis.set(xscale="log", yscale="log", title=name.split(".")[1], xlabel="n")
        ticks(axis, {n for _, n in found[name]})
        axis.legend(frameon=False)
    axes[0, 0].set_ylabel("seconds, float32")
    figure.supxlabel(caption, fontsize=8)
    figure.tight_layout()
    return figure


def steps(found, caption):
    """Steps of K-FAC over those of plain SGD, by the width of the network."""
    names = [name for name in found if name.endswith(".track_ratio_to_sgd")]
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for marker, name in zip("osD^v", names, strict=False):
        for backend, colour in COLOURS.items():
            points = sorted((n, r) for (b, n), r in found[name].items() if b == backend)
            if points:
                label = f"{name.split('.')[1]}, {backend}"
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    axis.axhline(1, color="0.3", linestyle=":", label="plain SGD")
    axis.set(
        xscale="log",
        xlabel=f"width of the hidden layers\n{caption}",
        ylabel="time of 20 steps / that of SGD's",
        ylim=(0, None),
    )
    ticks(axis, {n for name in names for _, n in found[name]})
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def main():
    mpl.rcParams |= {"svg.hashsalt": "kfaclinalg", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    mpl.rcParams |= {"axes.spines.right": False, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}
    found, caption = newest()
    rows = operations(found)
    figures = {}
    for group, prefixes in GROUPS.items():
        chosen = {
            name: rows.pop(name)
            for name in sorted(rows)
            if name.startswith(tuple(p.replace(".", "_") for p in prefixes))
        }
        if chosen:
            figures[group] = small_multiples(chosen, caption)
    if any(name.startswith("growth.") for name in found):
        figures["growth"] = growth(found, caption)
    if any(name.startswith("steps.") for name in found):
        figures["steps"] = steps(found, caption)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
