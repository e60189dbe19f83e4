"""The peers' benchmark, which times other K-FAC libraries and `asv_benchmarks/peer.py`: its results against our bars.

The figures are ratios to a limit that the same run measured, with the same arrays: BLAS and LAPACK called by hand, or
SGD. In the folder of the peers' benchmark, with its environment, on a quiet machine:

    export KFACLINALG_PEER=path/to/asv_benchmarks/peer.py PYTHONPATH=path/to/kfaclinalg:path/to/kfaclinalg/adapters
    export BENCH_OUT=path/to/results
    python run.py J1 J2 J3 J6 J7 --rounds 15
    python run.py J4 J5

Then here, under the same OPENBLAS_CORETYPE, if any:

    python asv_benchmarks/against_peers.py path/to/results

writes peers.json, its rows {"job", "size", "name", "ratio", "seconds", "memory"} (MiB over those of SGD), and the
tables and the picture of the documentation. What was not run, or failed, has no row.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "docs/_static/performance/peers.md"
OURS = "kfaclinalg"
BY_HAND = "BLAS by hand"
# How the names of a library's rows begin, where that is not its name; diagonal factors are another method.
ALIASES = {"singd singd diagonal": "singd, diagonal", "by hand": BY_HAND}
PEERS = (OURS, "kfac-pytorch", "kfac-jax", "asdl", "curvlinops", "nngeometry", "singd", "distributed shampoo")
PEERS += ("linear_operator", "pykronecker")
LIMITS = {
    "J1": "A and G of one batch into the average; of two GEMMs of torch",
    "J2": "damped inverses of A and G; of OpenBLAS potrf + potri",
    "J3": "G⁻¹ V A⁻¹ for eight layers; of two GEMMs of torch a layer",
    "J6a": "(A ⊗ B) V; of two GEMMs of torch",
    "J6b": "(A ⊗ B + C ⊗ D)⁻¹ V; of two generalised eigenproblems of SciPy",
    "J6b applied": "the same, once decomposed; of four GEMMs of torch",
    "J7": "(U Uᵀ + diag)⁻¹ v; of Woodbury by hand",
    "J4": "step on an autoencoder, statistics / inverses every so many steps; of SGD, kfac-jax of SGD in JAX",
    "J5": "step on a small convnet; of SGD, kfac-jax of SGD in JAX",
}
STEP_BARS = {
    ("J4", 256): {"1/1": 4.0, "1/20": 3.0, "20/20": 1.6},
    ("J4", 1000): {"1/1": 2.0, "1/20": 1.6, "20/20": 1.3},
    ("J5", 128): {"1/1": 3.0},
}
MEMORY_BAR = 90  # MiB over SGD, at m = 256
AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)  # the network of J4
WIDEST = 12  # of a bar in the picture; a longer one is cut
Row = dict[str, Any]


def rows_of(job: str, results: dict[str, Any]) -> Iterator[Row]:
    """The rows of one file of results."""
    for key, found in results.items():
        if "rows" in found:
            for name, row in found["rows"].items():
                if row:
                    yield {"job": job, "size": key, "name": name, "ratio": row["ratio"], "seconds": row["median_s"]}
        elif "ratio" in found:
            model, m, peer, *variant, schedule = key.split(" ")
            name = " ".join([found["name"], *variant])
            row = {"job": job, "size": f"{m} {schedule}", "name": name, "ratio": found["ratio"]}
            row["seconds"] = found["step_s"]
            sgd = results.get(f"{model} {m} {'jax' if peer == 'kfac_jax_peer' else 'torch'}_sgd", {}).get("mem_mib")
            yield row | ({"memory": found["mem_mib"] - sgd} if sgd and found["mem_mib"] else {})


def applied(rows: list[Row]) -> Iterator[Row]:
    """J6b's application alone, of the limit that belongs to it."""
    floors = {row["size"]: row["seconds"] for row in rows if row["name"] == "apply only: 4 gemm torch"}
    for row in rows:
        if row["name"] == f"{OURS}, apply only" and row["job"] == "J6b":
            ratio = row["seconds"] / floors[row["size"]]
            yield row | {"job": "J6b applied", "name": OURS, "ratio": ratio}


def bar(row: Row, rows: list[Row]) -> float | None:
    """What the ratio of this row of ours may be."""
    job, size = row["job"], row["size"]
    if job in ("J4", "J5"):
        m, schedule = size.split(" ")
        return STEP_BARS.get((job, int(m.removeprefix("m="))), {}).get(schedule)
    if (job == "J2" and int(size.split(" ")[1]) < 500) or (job == "J6b" and row["name"] != OURS):
        return None
    if job == "J3":
        openblas = [
            r["ratio"] for r in rows if r["job"] == job and r["size"] == size and r["name"] == "2 gemm openblas"
        ]
        return 0.90 if openblas and openblas[0] < 1 else 1.05
    return {"J1": 0.60, "J2": 1.15, "J6b": 1.2, "J6b applied": 1.1, "J7": 1.2}.get(job)


def work(row: Row) -> float | None:
    """The flops of a step on the autoencoder over those of SGD: the ratio, were all of them equally fast.

    The moving averages take symmetric products, the inverses Cholesky factorisations, which refreshed in every step are
    substituted into, and the gradient of a layer is g and a of the batch where that takes fewer (`OuterProduct`).
    """
    if row["job"] != "J4":
        return None
    batch, schedule = row["size"].split(" ")
    N, (statistics, inverses) = int(batch.removeprefix("m=")), map(int, schedule.split("/"))
    layers = [(o, i + 1) for i, o in pairwise(AUTOENCODER)]
    sgd = sum((6 if k else 4) * N * m * (n - 1) for k, (m, n) in enumerate(layers))
    moments = sum(N * (m**2 + n**2) for m, n in layers) / statistics
    cubes = sum(m**3 + n**3 for m, n in layers) * (1 / 3 if inverses == 1 else 1 / inverses)
    return 1 + (moments + cubes + sum(2 * min(m * n * (m + n), N * (m**2 + n**2 + m * n)) for m, n in layers)) / sgd


def library(row: Row) -> str | None:
    """The library that a row is of; None for a limit."""
    return next(
        (name for start, name in (*ALIASES.items(), *zip(PEERS, PEERS, strict=True)) if row["name"].startswith(start)),
        None,
    )


def best(rows: list[Row], job: str, size: str) -> dict[str, Row]:
    """The fastest row of each library in one job, the fastest library first; part of a job is not the job."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["ratio"]):
        name = library(row)
        if (row["job"], row["size"]) == (job, size) and name and "apply only" not in row["name"]:
            found.setdefault(name, row)
    return found


def tables(rows: list[Row]) -> str:
    """Ours against the bars, beside the best form of each peer."""
    lines = []
    for job, title in LIMITS.items():
        ours = [row for row in rows if row["job"] == job and library(row) == OURS and "apply only" not in row["name"]]
        if not ours:
            continue
        steps = job in ("J4", "J5")
        head = ["size", "ours", "ratio", "bar", *(["flops", "MiB over SGD"] if steps else [])]
        head.append("peers, the fastest form of each")
        lines += [f"**{job}**: {title}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for row in ours:
            limit = bar(row, rows)
            peers = best(rows, job, row["size"])
            peers.pop(OURS, None)
            cells = [
                row["size"],
                row["name"],
                f"{row['ratio']:.2f}",
                "" if limit is None else verdict(row["ratio"], limit),
            ]
            if steps:
                flops, memory = work(row), row.get("memory")
                cells.append("" if flops is None else f"{flops:.2f}")
                judged = memory is not None and row["size"].startswith("m=256 ")
                cells.append(
                    "" if memory is None else f"{memory:.0f}{f' ({verdict(memory, MEMORY_BAR)})' if judged else ''}"
                )
            cells.append(", ".join(f"{name} {peer['ratio']:.2f}" for name, peer in peers.items()))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def verdict(value: float, limit: float) -> str:
    return f"{'≤' if value <= limit else 'not ≤'} {limit:g}"


def libraries() -> str:
    """Which BLAS NumPy, SciPy and torch call here."""
    import numpy
    import scipy.linalg
    import torch
    from threadpoolctl import threadpool_info

    found = []
    for module in (numpy, scipy):
        for info in threadpool_info():
            if info["user_api"] == "blas" and f"{module.__name__}.libs" in info["filepath"]:
                name = f"{module.__name__} {module.__version__} with {info['internal_api']} {info['version']}"
                found.append(f"{name} ({info['architecture']})")
    mkl = [line for line in torch.__config__.show().splitlines() if "Math Kernel Library" in line]
    blas = mkl[0].strip(" -").split("-Product")[0] if mkl else "its BLAS"
    found.append(f"torch {torch.__version__} with {blas} ({torch.backends.cpu.get_cpu_capability()})")
    coretype = os.environ.get("OPENBLAS_CORETYPE")
    return "; ".join(found) + (f"; OPENBLAS_CORETYPE={coretype}" if coretype else "") + "."


def draw(rows: list[Row], path: Path) -> None:
    """Steps over those of SGD: a row for each network and batch, a column for each schedule."""
    import matplotlib.pyplot as plt

    steps = [row for row in rows if row["job"] in ("J4", "J5")]
    lines = list(dict.fromkeys((row["job"], row["size"].split(" ")[0]) for row in steps))
    columns = list(dict.fromkeys(row["size"].split(" ")[1] for row in steps))
    shape = (len(lines), len(columns))
    figure, panels = plt.subplots(*shape, figsize=(10, 0.4 + 2.3 * len(lines)), squeeze=False, layout="constrained")
    for (job, m), line in zip(lines, panels, strict=True):
        shown = [best(rows, job, f"{m} {schedule}") for schedule in columns]
        for schedule, found, panel in zip(columns, shown, line, strict=True):
            if not found:
                panel.remove()
                continue
            colours = ["C1" if name == OURS else "0.88" if name == BY_HAND else "0.7" for name in found]
            ratios = [row["ratio"] for row in found.values()]
            bars = panel.barh(list(found), [min(ratio, WIDEST) for ratio in ratios], color=colours, height=0.75)
            labels = [f"{ratio:.1f}{' →' if ratio > WIDEST else ''}" for ratio in ratios]
            panel.bar_label(bars, labels, padding=2, fontsize="x-small")
            panel.axvline(1, color="C0", linewidth=1)
            network = {"J4": "autoencoder", "J5": "convnet"}[job]
            panel.set_title(f"{network}, {m.replace('=', ' = ')}, {schedule}", fontsize="small", loc="left")
            panel.set(xlim=(0, WIDEST + 2), ylim=(max(map(len, shown)) - 0.4, -0.6))
            panel.tick_params(labelsize="small", left=False)
            panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step / SGD step (line: 1); statistics / inverses every so many steps", fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the folder of the benchmark's JSON files")
    parser.add_argument("--rows", type=Path, default=HERE / "peers.json")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the tables; the picture goes to .svg")
    options = parser.parse_args()
    rows: list[Row] = []
    for job in ("J1", "J2", "J3", "J6a", "J6b", "J7", "J4", "J5"):
        path = options.results / f"{job}.json"
        rows += rows_of(job, json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
    rows += list(applied(rows))
    options.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(f"{tables(rows)}\n{libraries()}\n", encoding="utf-8")
    if any(row["job"] in ("J4", "J5") for row in rows):
        draw(rows, options.output.with_suffix(".svg"))
    print(options.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
