"""Our time over the best that anyone has, from peers.json and its like of other processors: a table.

    python asv_benchmarks/against_best.py

The best is the fastest form of the fastest other library. The limit is BLAS and LAPACK called by hand, of a step plain
SGD, as `against_peers.py` names it.
"""

from __future__ import annotations

import json

from against_peers import BY_HAND, HERE, LIMITS, OURS, OUTPUT, Row, best, library

PROCESSORS = {"peers.json": "Zen 3", "peers_zen5.json": "Zen 5", "peers_xeon.json": "Xeon"}
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


def cells(rows: list[Row], job: str, size: str) -> list[str] | None:
    """Over the best library, which that is, and over the limit; None where it was not measured, or only we have it."""
    found = best(rows, job, size)
    if OURS not in found:
        return None
    ours = found.pop(OURS)["ratio"]
    peers = {name: row["ratio"] for name, row in found.items() if name not in ANOTHER}
    if not peers:
        return None
    fastest = min(peers, key=lambda name: peers[name])
    return [f"**{ours / peers[fastest]:.2f}** {fastest}", f"{ours:.2f}"]


def main() -> None:
    measured = {processor: json.loads((HERE / name).read_text("utf-8")) for name, processor in PROCESSORS.items()}
    known = [row for rows in measured.values() for row in rows if library(row) == OURS]
    head = ["operation", "size", *(f"{name}: over {what}" for name in measured for what in ("the best", "the limit"))]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for job in LIMITS:
        name = NAMES[job]
        for size in dict.fromkeys(row["size"] for row in known if row["job"] == job):
            found = [cells(rows, job, size) for rows in measured.values()]
            if any(found):
                values = (cell for one in found for cell in one or ["", ""])
                table.append(f"| {' | '.join([name, size.removeprefix('float32 '), *values])} |")
                name = ""  # once for all its sizes
    OUTPUT.with_name("best.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
