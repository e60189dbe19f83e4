"""One HTML page on a run: spectra of A and G, the damping among them, lengths of updates, refusals, seconds by task."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfaclinalg import Diagonal, Eigen, Exact, LayerFactors, tikhonov_pi

from ._optimizer import KFAC
from ._preconditioner import KFACPreconditioner
from ._report_page import PAGE, pictures_of, table
from ._settings import at
from ._watch import Scalars, Watch


class Spectrum(NamedTuple):
    """Of one layer: the eigenvalues of A and of G, from the largest, and what is added to those of each."""

    name: str
    a: Tensor
    g: Tensor
    added: tuple[float, float] | None  # (πγ, γ/π); None where λ is added to the products
    damping: float  # λ = γ²
    least: float  # of the eigenvalues of A ⊗ G
    largest: float
    below: float  # the part of them that are below λ


def report(
    optimizer: KFAC | KFACPreconditioner, path: str | os.PathLike[str], history: Watch | Sequence[Scalars] = ()
) -> None:
    """Write one HTML page, which needs nothing else, on what an optimizer or a preconditioner has measured so far.

    For each layer the spectra of A and of G with what the damping adds to them, condition numbers, and which part of
    the eigenvalues is below the damping; what is left alone and why. With a `history`, a `Watch` or its records, also
    the course of λ, γ, α, μ and ρ, or of the lengths of the updates against the gradients, refusals and the seconds of
    each task. It takes the eigenvalues of all factors, on the host: not for each step. matplotlib draws it.

    Raises:
        TypeError: neither a `KFAC` nor a `KFACPreconditioner`.
        ValueError: nothing was measured yet.
    """
    if not isinstance(optimizer, KFAC | KFACPreconditioner):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected KFAC or KFACPreconditioner")
    if not optimizer.layers:
        raise ValueError("there is nothing to report yet: take a step first")
    spectra = [_spectrum(optimizer, name, layer) for name, layer in optimizer.layers.items()]
    records = history.history if isinstance(history, Watch) else list(history)
    who, added = type(optimizer).__name__, "γ²" if isinstance(optimizer, KFAC) else "λ"  # whose λ is the model's
    left = {**optimizer.fallback, **optimizer.skipped}
    page = PAGE.format(
        title=f"{who}, {len(spectra)} layers",
        verdict=html.escape(" ".join(_verdicts(optimizer, spectra, records))),
        layers=table(["layer", "n", "m", "cond A", "cond G", "largest", added, f"below {added}"], map(_row, spectra)),
        pictures="\n".join(pictures_of(spectra, records)),
        seconds=table(["task", "seconds a step", "share"], _seconds(records)),
        left=table(["parameter", "why"], sorted(left.items())),
    )
    Path(path).write_text(page, encoding="utf-8")


def _spectrum(optimizer: KFAC | KFACPreconditioner, name: str, layer: LayerFactors) -> Spectrum:
    a, g = (_eigenvalues(M) for M in layer)
    if isinstance(optimizer, KFAC):
        now: Any = optimizer.info or optimizer._state  # of a state that was loaded nothing has happened yet
        gamma, structure = now.gamma, optimizer.options.structure_value
    else:
        fitted, structure = optimizer._inverses.fitted.get(name, layer), optimizer.structure
        last = max(optimizer._steps - 1, 0)
        gamma = optimizer._inverses.gamma(name, fitted, at(last, "damping", optimizer.damping))
    products = a[..., :, None] * g[..., None, :]  # of each member of a batch
    lam = torch.as_tensor(gamma, dtype=torch.float64).cpu()[..., None, None] ** 2
    gamma = _mean(gamma)
    pi = _mean(tikhonov_pi(layer, norm=getattr(structure, "norm", "trace")))
    added = None if isinstance(structure, Exact | Eigen) else (pi * gamma, gamma / pi)
    below = float((products < lam).double().mean())
    a, g = (torch.sort(values.ravel(), descending=True).values for values in (a, g))
    return Spectrum(name, a, g, added, gamma**2, float(products.min()), float(products.max()), below)


def _eigenvalues(M: Any) -> Tensor:
    """Of each member of a batch."""
    if isinstance(M, Diagonal):
        d: Any = M.d
        return d.detach().double().cpu()
    return torch.linalg.eigvalsh(M.detach().double().cpu())


def _mean(x: Any) -> float:
    return float(torch.as_tensor(x).double().mean())


def _condition(eigenvalues: Tensor) -> str:
    least, largest = float(eigenvalues[-1]), float(eigenvalues[0])
    return f"{largest / least:.1e}" if least > 0 else "∞"


def _row(s: Spectrum) -> tuple[str, ...]:
    largest = f"{s.largest:.1e}"
    sizes = (str(len(s.a)), str(len(s.g)))
    return (s.name, *sizes, _condition(s.a), _condition(s.g), largest, f"{s.damping:.1e}", f"{s.below:.0%}")


def _verdicts(optimizer: Any, spectra: Sequence[Spectrum], records: Sequence[Scalars]) -> Iterable[str]:
    """What one would look at first."""
    drowned = [s.name for s in spectra if s.below == 1]
    if drowned:
        yield f"The damping is above all eigenvalues of {', '.join(drowned)}: the direction there is the gradient's."
    untouched = [s.name for s in spectra if s.below == 0 and s.least > 10 * s.damping]
    if untouched:
        yield f"It is far below all of {', '.join(untouched)}."
    if refused := sum(record.get("refused", 0.0) for record in records):
        yield f"{refused:.0f} of {len(records)} steps were refused."
    if rejected := getattr(optimizer, "rejected", 0):
        yield f"{rejected} statistics held a NaN or an infinity, and were left out."
    failures = getattr(getattr(optimizer, "_inverses", None), "failures", {})
    if failing := [name for name, times in failures.items() if times]:
        yield f"The last refresh failed for {', '.join(failing)}: an older inverse serves there."
    if not (drowned or untouched or refused or rejected or failing):
        yield "The damping lies inside the spectrum of every layer, and nothing was refused."


def _seconds(records: Sequence[Scalars]) -> Iterable[tuple[str, ...]]:
    sums: dict[str, float] = {}
    for record in records:
        for name, seconds in record.items():
            if name.startswith("seconds/"):
                sums[name.removeprefix("seconds/")] = sums.get(name.removeprefix("seconds/"), 0.0) + seconds
    total = math.fsum(sums.values()) or 1.0
    return [(task, f"{s / len(records):.4f}", f"{s / total:.0%}") for task, s in sums.items()]
