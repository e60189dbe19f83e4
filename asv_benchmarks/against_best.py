"""Our time over the best that anyone has, from peers.json and peers_zen5.json: the table of the performance page.

    python asv_benchmarks/against_best.py

The best is the fastest form of the fastest other library. The limit is BLAS and LAPACK called by hand, of a step plain
SGD, as `against_peers.py` names it.
"""

from __future__ import annotations

import json

from against_peers import BY_HAND, HERE, LIMITS, OURS, OUTPUT, Row, best, library

PROCESSORS = {"peers.json": "AMD EPYC, Zen 3, 7390bf8", "peers_zen5.json": "AMD EPYC, Zen 5, 2026-11-30"}
ANOTHER = (BY_HAND, "singd, diagonal")  # no library, another method
NAMES = {
    "J1": "A and G of a batch into the average",
    "J2": "damped inverses of A and G",
    "J3": "G⁻¹ V A⁻¹, eight layers",
    "J6a": "(A ⊗ B) V",
    "J6b": "(A ⊗ B + C ⊗ D)⁻¹ V",
    "J6b applied": "the same, once decomposed",
    "J7": "(U Uᵀ + diag)⁻¹ v",
    "J4": "a step, autoencoder",
    "J5": "a step, convnet",
}


def line(rows: list[Row], job: str, size: str, processor: str) -> str | None:
    """A row of the table; None where it was not measured, or nobody else has the operation."""
    found = best(rows, job, size)
    if OURS not in found:
        return None
    ours = found.pop(OURS)["ratio"]
    peers = {name: row["ratio"] for name, row in found.items() if name not in ANOTHER}
    if not peers:
        return None
    fastest = min(peers, key=lambda name: peers[name])
    cells = [NAMES[job], size.removeprefix("float32 "), f"**{ours / peers[fastest]:.2f}**", fastest]
    cells += [f"{ours:.2f}", "plain SGD" if job in ("J4", "J5") else "by hand", processor]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    measured = {processor: json.loads((HERE / name).read_text("utf-8")) for name, processor in PROCESSORS.items()}
    known = [row for rows in measured.values() for row in rows if library(row) == OURS]
    places = [
        (job, size) for job in LIMITS for size in dict.fromkeys(row["size"] for row in known if row["job"] == job)
    ]
    lines = [line(rows, *place, processor) for place in places for processor, rows in measured.items()]
    head = ["operation", "size", "over the best library", "which", "over the limit", "which limit", "processor"]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(one for one in lines if one)]
    OUTPUT.with_name("best.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
