"""Operations over their floors on each processor that was tried, in torch and float32, at the largest size of each.

    taskset -c 1 .venv/bin/python asv_benchmarks/on_processors.py            # measure here, under a minute, and add it
    .venv/bin/python asv_benchmarks/on_processors.py --table                 # the table alone

The ratios are medians of rounds in turn in one process, so that whoever else uses the processor disturbs both. Stored
in processors.json; the table is docs/_static/performance/processors.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path

from plots import FOLDER, HERE, newest
from tqdm import tqdm

STORED = HERE / "processors.json"
OPERATIONS = {
    "update_factors": "A and G of a batch into the average",
    "spd.inverse": "the inverse of one matrix",
    "Kronecker.inverse": "A⁻¹ ⊗ B⁻¹",
    "Kronecker.solve": "(A ⊗ B)⁻¹ V, once",
    "Kronecker.__matmul__": "(A ⊗ B) V",
    "KroneckerPair.inverse": "(A ⊗ B + C ⊗ D)⁻¹",
    "block_diagonal_inverse": "F̆⁻¹ of three layers, damped",
    "block_tridiagonal_inverse": "F̂⁻¹ of three layers, damped",
}


def measured() -> dict[str, float]:
    import torch
    from benchmarks import dense, network, operators
    from benchmarks.operation import prepared, ratio
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    rows = {**dense.OPERATIONS, **operators.OPERATIONS, **network.OPERATIONS}
    names = tqdm(OPERATIONS, unit="operation")
    with threadpool_limits(1):
        return {name: ratio(*prepared(rows[name], "torch", "float32", max(rows[name].sizes))) for name in names}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def from_asv() -> dict[str, float]:
    """Those of the newest full run."""
    found, _ = newest()
    ratios: dict[str, float] = {}
    for key, values in found.items():
        name = key.partition(".")[2].removesuffix(".track_ratio")
        wanted = next((o for o in OPERATIONS if o.replace("__", "").replace(".", "_") == name), None)
        if wanted and key.startswith("core.") and key.endswith("track_ratio"):
            of_torch = {n: x for (backend, dtype, n), x in values.items() if (backend, dtype) == ("torch", "float32")}
            ratios[wanted] = of_torch[max(of_torch)]
    return ratios


def table(stored: dict[str, dict]) -> str:
    head = ["operation", *(f"{name}, {entry['when']}" for name, entry in stored.items())]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for operation, text in OPERATIONS.items():
        ratios = (entry["ratios"].get(operation) for entry in stored.values())
        lines.append(f"| {' | '.join([text, *('' if x is None else f'{x:.2f}' for x in ratios)])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    _, machine = newest()
    stored[machine.split(", ")[1]] = {"when": machine.split(", ")[2], "ratios": from_asv()}
    if not options.table:
        stored[processor()] = {"when": str(datetime.now(UTC).date()), "ratios": measured()}
    STORED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    text = table(stored)
    (FOLDER / "processors.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
