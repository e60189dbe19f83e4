"""What an iteration of Algorithm 2 costs, against T3, m and d, beside the formula of the paper's Section 8.

Each task of an iteration of `kfaclinalg_torch.KFAC` is timed by itself on a whole network of l layers of width d, in
rounds that also time a step of SGD and l products (m, d) @ (d, d); a figure is the median over rounds of its ratio to
the SGD step of the same round. The cost of an iteration is the sum of the tasks, each as often as Algorithm 2 runs it
on average. That sum is checked against whole iterations of `KFAC`. The formula's flops take the time that the products
of the same rounds take for as many flops. Float32, one thread, CPU time:

    OMP_NUM_THREADS=1 taskset -c 0 python asv_benchmarks/cost_per_iteration.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import torch
from tqdm import tqdm

from kfaclinalg import OuterProduct, block_diagonal_inverse, inner_products, moving_average
from kfaclinalg_torch import KFAC, Gaussian
from kfaclinalg_torch._batch import Batch

OUTPUT = Path(__file__).parents[1] / "docs/_static/performance/cost_per_iteration.md"
PERIODS = (1, 5, 20, 100)  # T3
WIDTHS, BATCHES, LAYERS = (250, 500, 1000), (256, 1000, 4000), 16
CHECKED = ((500, 1000, 20), (500, 256, 5))  # d, m, T3 of the whole iterations
T1, TAU1, TAU2 = 5, 1 / 8, 1 / 4
# The tasks of Section 8 and their flops for one layer over 2 d² m: the paper's count and this library's, which runs the
# forward passes on S1 and S2 anew.
TASKS = {
    "gradient": ("∇h (1, 2)", "3", "3"),
    "statistics": ("A, G on τ1 (3, 4)", "3 τ1", "4 τ1"),
    "inverse": ("A⁻¹, G⁻¹ (5)", "d/m", "d/m"),
    "dense": ("G⁻¹ V A⁻¹ (6)", "2 d/m", "2 d/m"),
    "outer": ("same, from g and a (6)", "2", "3"),
    "direction": ("δᵀFδ on τ2 (7)", "2 τ2", "3 τ2"),
    "forward": ("h(θ + δ) (8)", "1", "1"),
    "update": ("δᵀδ, ∇hᵀδ, θ + δ", "0", "0"),
}


def second_period(T3: int) -> int:
    """T2: 20 as in the paper, or the next multiple of T3."""
    return max(20, T3)


def counts(T3: int, outer: bool) -> dict[str, float]:
    """How often an iteration runs each task on average.

    Every T2 iterations there are two more candidates for γ, each with an inverse of its own: as T3 divides T2 that
    makes 1/T3 + 2/T2 inverses an iteration, where the paper's formula has (1 + 2/T2)/T3. h(θ + δ) is computed in each,
    where the paper has it every T1.
    """
    T2 = second_period(T3)
    inverse, apply = 1 / T3 + 2 / T2, "outer" if outer else "dense"
    once = {"gradient": 1.0, "statistics": 1.0, "update": 1.0, "forward": 1.0}
    return once | {"inverse": inverse, apply: 1 + 2 / T2, "direction": 2 + 2 / T2}


def formula(d: int, m: int, T3: int) -> float:
    """Section 8's cost of a layer in flops over 2 d² m: C1 = C2 = 2, C3 = 2 (potrf and potri, twice), C5 = 4."""
    C1, C2, C3, C5, T2 = 2, 2, 2, 4, second_period(T3)
    passes = (2 + TAU1 + 4 * (1 + 2 / T2) * TAU2 + 1 / T1) * C1 + (1 + 2 * TAU1) * C2
    return (passes * m + (1 + 2 / T2) * (C3 / T3 * d + C5 * min(d, m))) / (2 * m)


def network(l: int, d: int, m: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(l) for layer in (torch.nn.Linear(d, d), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers[:-1]), torch.randn(m, d), torch.randn(m, d)


def sgd_step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        Gaussian().loss(model(x), y).backward()
        optimizer.step()

    return step


def tasks(l: int, d: int, m: int) -> dict[str, Callable[[], Any]]:
    """The tasks of `kfac_step`, as it calls them, and what they are compared with: "sgd" and "product"."""
    model, x, y = network(l, d, m)
    optimizer = KFAC(model, "gaussian", weight_decay=0.0, generator=torch.Generator().manual_seed(0))
    problem = optimizer._problem(Batch(x, y), optimizer._trained.capture(), optimizer.options)
    weights = optimizer._trained.network.weights()

    def gradient() -> tuple[Any, Any]:
        _, found = problem.loss_and_gradient(weights)
        return found, tuple(g.to_dense() if isinstance(g, OuterProduct) else g for g in found)

    given, dense = gradient()
    old = problem.factors(weights, False)
    inverse = block_diagonal_inverse(old, 1.0)
    Delta, last = (inverse.apply(dense) for _ in range(2))

    def update() -> None:
        inner_products([Delta, last], [Delta, last]), inner_products([Delta, last], [dense])
        step = [0.5 * U + 0.5 * V for U, V in zip(Delta, last, strict=True)]
        moved = zip(optimizer._trained.network.weights(), step, strict=True)
        optimizer._trained.network.assign(tuple(W + 0.0 * delta for W, delta in moved))

    found = {
        "sgd": sgd_step(*network(l, d, m)),
        "product": lambda: [x @ weights[0][:, :d] for _ in range(l)],
        "gradient": gradient,
        "statistics": lambda: moving_average(old, problem.factors(weights, False), decay=0.95),
        "inverse": lambda: block_diagonal_inverse(old, 1.0),
        "dense": lambda: inverse.apply(dense),
        "direction": lambda: problem.curvature_gram(weights, [Delta]),
        "forward": lambda: problem.loss(weights),
        "update": update,
    }
    if isinstance(given[0], OuterProduct):
        found["outer"] = lambda: inverse.apply(given)
    return found


def seconds(f: Callable[[], Any]) -> float:
    start = process_time()
    f()
    return process_time() - start


def measured(l: int, d: int, m: int, rounds: int) -> dict[str, Any]:
    """The time of each task over that of an SGD step."""
    found = tasks(l, d, m)
    for f in found.values():
        f()
    times = [{name: seconds(f) for name, f in found.items()} for _ in range(rounds)]
    ratios = {name: statistics.median(t[name] / t["sgd"] for t in times) for name in found if name != "sgd"}
    rate = 2e-9 * l * d * d * m / statistics.median(t["product"] for t in times)
    return {"d": d, "m": m, "l": l, "gflops": rate, "ratios": ratios}


def whole(l: int, d: int, m: int, T3: int) -> float:
    """T2 iterations of `KFAC` over as many SGD steps, interleaved."""
    model, x, y = network(l, d, m)
    T2 = second_period(T3)
    kfac = KFAC(model, "gaussian", weight_decay=0.0, inverse_period=T3, gamma_period=T2, damping=10.0)
    sgd = sgd_step(*network(l, d, m))
    for _ in range(3):  # past the refreshes of the first three
        kfac.step(x, y), sgd()
    times = [(seconds(lambda: kfac.step(x, y)), seconds(sgd)) for _ in range(T2)]
    assert kfac._state is not None
    assert kfac._state.curvature_fraction == TAU2, "τ2 has grown: these are not the iterations that are summed"
    return sum(t for t, _ in times) / sum(t for _, t in times)


def summed(row: dict[str, Any], T3: int) -> float:
    ratios = row["ratios"]
    return sum(count * ratios[task] for task, count in counts(T3, "outer" in ratios).items())


def by_formula(row: dict[str, Any], T3: int) -> float:
    return formula(row["d"], row["m"], T3) * row["ratios"]["product"]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def markdown(result: dict[str, Any]) -> str:
    rows, checks = result["rows"], result["checks"]
    size = [f"{row['d']} | {row['m']}" for row in rows]
    iteration = [" | ".join(f"{summed(row, T3):.2f} / {by_formula(row, T3):.2f}" for T3 in PERIODS) for row in rows]
    columns = [*TASKS, "product"]
    titles, theirs, ours = zip(*TASKS.values(), ("a product", "1", "1"), strict=True)
    once = [" | ".join(f"{row['ratios'][c]:.2f}" if c in row["ratios"] else "" for c in columns) for row in rows]
    sums = [f"{c['d']} | {c['m']} | {c['T3']} | {c['sum']:.2f} | {c['whole']:.2f}" for c in checks]
    off = [f"{100 * (c['sum'] / c['whole'] - 1):+.0f} %" for c in checks]
    return "\n\n".join(
        [
            f"An iteration over an SGD step, {rows[0]['l']} layers of width d: measured / by the paper's formula.",
            table(["d", "m", *(f"T3 = {T3}" for T3 in PERIODS)], zip(size, iteration, strict=True)),
            "Each task once, over an SGD step; its flops over 2 d² m a layer, by the paper and by what is run here.",
            table(
                ["d", "m", *titles],
                [("paper | ", *theirs), ("here | ", *ours), *zip(size, once, strict=True)],
            ),
            "The sum of the tasks beside whole iterations.",
            table(["d", "m", "T3", "sum", "whole", "difference"], zip(sums, off, strict=True)),
            f"The products ran at {min(rates(rows)):.0f} to {max(rates(rows)):.0f} Gflop/s.\n",
        ]
    )


def rates(rows: list[dict[str, Any]]) -> list[float]:
    return [row["gflops"] for row in rows]


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = result["rows"]
    widths, batches = (sorted({row[key] for row in rows}) for key in ("d", "m"))
    figure, panels = plt.subplots(1, len(widths), figsize=(9, 3.2), sharey=True, squeeze=False, layout="constrained")
    for row in rows:
        panel, colour = panels[0][widths.index(row["d"])], f"C{batches.index(row['m'])}"
        panel.plot(PERIODS, [summed(row, T3) for T3 in PERIODS], "o-", color=colour, markersize=4)
        panel.plot(PERIODS, [by_formula(row, T3) for T3 in PERIODS], "--", color=colour)
    ticks = [tick for tick in (0.5, 1, 2, 3, 4, 6, 10, 15) if tick >= min(1, panels[0][0].get_ylim()[0])]
    for d, panel in zip(widths, panels[0], strict=True):
        panel.set(xscale="log", yscale="log", xticks=PERIODS, xticklabels=PERIODS, xlabel="T3", title=f"d = {d}")
        panel.set(yticks=ticks, yticklabels=ticks)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="iteration / SGD step")
    styles = {f"m = {m}": {"color": f"C{i}"} for i, m in enumerate(batches)}
    styles |= {"measured": {"color": "k", "marker": "o", "markersize": 4}, "formula": {"color": "k", "linestyle": "--"}}
    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks, to see that all of it runs")
    parser.add_argument("--redraw", action="store_true", help="from the JSON file beside the output")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the tables; the figures go to .json and .svg")
    options = parser.parse_args()
    data = options.output.with_suffix(".json")
    if options.redraw:
        result = json.loads(data.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)
        l, widths, batches, checked = LAYERS, WIDTHS, BATCHES, CHECKED
        if options.quick:
            l, widths, batches, checked = 2, (32, 64), (16, 64), ((32, 64, 5),)
        cells = tqdm(list(product(widths, batches)), desc="tasks")
        rows = [measured(l, d, m, rounds=3 if d * d * m >= 1e9 else 5) for d, m in cells]
        by_size = {(row["d"], row["m"]): row for row in rows}
        checks = [
            {"d": d, "m": m, "T3": T3, "sum": summed(by_size[d, m], T3), "whole": whole(l, d, m, T3)}
            for d, m, T3 in tqdm(checked, desc="whole iterations")
        ]
        result = {"rows": rows, "checks": checks}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.output.write_text(markdown(result), encoding="utf-8")
    draw(result, options.output.with_suffix(".svg"))
    print(options.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
