"""From the averages of a layer's moments to its inverse, by a ladder of ever safer ways, each layer in its own step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfaclinalg import (
    CholeskyInverse,
    Diagonal,
    Factors,
    Kronecker,
    KroneckerBasis,
    LayerFactors,
    LinAlgError,
    Link,
    block_diagonal_inverse,
    low_rank_inverse,
)

from ._checkpoint import check, check_keys
from ._statistics import Statistic

Build = Callable[[LayerFactors, float], Any]
# The rungs above the factors as they are: in float64, with so many times the damping.
LADDER = tuple(10**k for k in range(5))
TOLERATED = 2  # failures in a row


def factored(layer: LayerFactors, damping: float, norm: str, method: str = "explicit") -> Any:
    """(A + π γ I)⁻¹ ⊗ (G + γ/π I)⁻¹ with γ = √damping (Section 6.3)."""
    return block_diagonal_inverse(Factors((layer,)), damping**0.5, norm=norm, method=method).blocks[0]


def exact(layer: LayerFactors, damping: float, norm: str) -> Any:
    """(A ⊗ G + damping I)⁻¹ (eqn 6); factored where a side is diagonal, whose eigenvectors would be dense.

    A and G are moments: what rounding leaves below zero of their eigenvalues is zero.
    """
    if _structured(layer):
        return factored(layer, damping, norm)
    F: Any = Kronecker(*layer)
    ample = 1 + F.trace().abs().max()  # the eigenvectors are the same for every shift
    Q = F.shifted_inverse(torch.where(torch.isfinite(ample), ample, 1.0))
    a, g = (((M @ K) * K).sum(-2).clamp(min=0.0) for M, K in zip(layer, (Q.K_A, Q.K_B), strict=True))
    return KroneckerBasis(Q.K_A, Q.K_B, 1 / (g[..., :, None] * a[..., None, :] + damping))


def low_rank(layer: LayerFactors, damping: float, norm: str, rank: int) -> Any:
    """That of rank_k(A) and rank_k(G - diag G) + diag G; factored where a side is diagonal as it is."""
    if _structured(layer):
        return factored(layer, damping, norm)
    return low_rank_inverse(Factors((layer,)), damping**0.5, rank=rank, norm=norm).blocks[0]


class Factored(NamedTuple):
    """The averages, with each weight that is shared by layers once."""

    layers: dict[str, LayerFactors]
    links: tuple[Link, ...]


class Inverses:
    """The inverse of each layer by itself, `build(factors, damping)`."""

    keeps_uses = False  #: whether it takes more than A and G from a statistic

    def __init__(self, build: Build) -> None:
        self.build = build
        self.inverses: dict[str, Any] = {}
        self.failures: dict[str, int] = {}

    def links(self, statistic: Statistic, scale: float) -> tuple[Link, ...]:
        """What is averaged besides A and G."""
        return ()

    def refresh(self, step: int, period: int, damping: float, factors: Factored) -> None:
        """Make the inverses whose turn it is, and those that there are none of yet.

        Where every rung of the ladder fails the previous inverse stays.

        Raises:
            LinAlgError: a layer has failed three times in a row.
        """
        turns = _slots(tuple(_cost(layer) for layer in factors.layers.values()), period)
        layers = zip(factors.layers.items(), turns, strict=True)
        due = {name: M for (name, M), turn in layers if step % period == turn or name not in self.inverses}
        made = [self.build(layer, damping) for layer in due.values()]
        for (name, layer), first, sound in zip(due.items(), made, are_finite(map(_telling, made)), strict=True):
            inverse = first if sound else self._climbed(layer, damping)
            self._keep(name, None if inverse is None else self._finished(name, inverse, damping), layer)

    def observe(self, statistic: Statistic, scale: float, decay: float, damping: float) -> None:
        """Take from a statistic what needs the refreshed inverses; `scale` is that of its gradients."""

    def apply(self, Vs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """(name, V) to (name, the preconditioned V), one layer at a time; a layer without an inverse keeps its V."""
        for name, V in Vs:
            K = self.inverses.get(name)
            if isinstance(K, Kronecker | KroneckerBasis):
                yield name, K.apply(V)
            else:
                yield name, V if K is None else K @ V

    def state(self) -> dict[str, Any]:
        return {"inverses": self.inverses, "failures": self.failures}

    def check(self, state: Any, weights: Mapping[str, Tensor]) -> None:
        """A ValueError where a state cannot be loaded, of layers with these weights."""
        check_keys(state, self.state())
        check(all(isinstance(part, dict) for part in state.values()), "its inverses are none")
        check(all(isinstance(n, int) for n in state["failures"].values()), "its failures are no numbers")
        for name, inverse in state["inverses"].items():
            self._check_one(name, inverse, weights)

    def _check_one(self, name: str, inverse: Any, weights: Mapping[str, Tensor]) -> None:
        check(name in weights, f"{name!r} is no layer")
        check(isinstance(inverse, Kronecker | KroneckerBasis), f"the inverse of {name!r} is none")
        came, expected = tuple(inverse.diagonal().shape), tuple(weights[name].shape)
        check(came == expected, f"{name!r} has W of shape {came}, expected {expected}")

    def load(self, state: dict[str, Any]) -> None:
        self.inverses, self.failures = state["inverses"], state["failures"]

    def _climbed(self, layer: LayerFactors, damping: float) -> Any | None:
        """The first inverse above the lowest rung that is finite."""
        for times in LADDER:
            inverse = self.build(cast(layer, torch.float64), times * damping).astype(_dtype(layer))
            if are_finite([_telling(inverse)])[0]:
                return inverse
        return None

    def _finished(self, name: str, K: Any, damping: float) -> Any:
        """What is kept of a layer's new inverse K."""
        return K

    def _keep(self, name: str, inverse: Any | None, *layers: LayerFactors) -> None:
        if inverse is not None:
            self.inverses[name], self.failures[name] = inverse, 0
            return
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] > TOLERATED:
            raise LinAlgError(
                f"the factors of {name!r} could not be inverted in {self.failures[name]} refreshes in a row, nor in "
                f"float64 with {LADDER[-1]} times the damping: {'; '.join(map(_diagnosis, layers))}. "
                "Likely causes: no damping at all, or inputs or gradients that grow without bound."
            )


def cast(layer: LayerFactors, dtype: torch.dtype) -> LayerFactors:
    return LayerFactors(*(M.astype(dtype) if isinstance(M, Diagonal) else M.to(dtype) for M in layer))


def are_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether all of each is finite: a GPU is waited for once."""
    found = [torch.isfinite(x).all() for x in tensors]
    return torch.stack(found).tolist() if found else []


def _telling(inverse: Any) -> Tensor:
    """A few numbers of an inverse: where a factorisation failed all of a member is NaN."""
    if isinstance(inverse, KroneckerBasis):
        return inverse.weights  # type: ignore[return-value]
    substituted = isinstance(inverse.A, CholeskyInverse) or isinstance(inverse.B, CholeskyInverse)
    return inverse.logdet() if substituted else inverse.trace()  # what takes a few flops


def _structured(layer: LayerFactors) -> bool:
    return any(isinstance(M, Diagonal) for M in layer)


def _dtype(layer: LayerFactors) -> torch.dtype:
    return next(M.d.dtype if isinstance(M, Diagonal) else M.dtype for M in layer)


def _cost(layer: LayerFactors) -> float:
    """n³ for each dense side."""
    return sum(M.shape[-1] ** (1 if isinstance(M, Diagonal) else 3) for M in layer)


@lru_cache
def _slots(costs: tuple[float, ...], period: int) -> list[int]:
    """The step of a period in which each layer is refreshed, so that the steps cost as much as each other."""
    loads, slots = [0.0] * period, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        slots[i] = loads.index(min(loads))
        loads[slots[i]] += costs[i]
    return slots


def _diagnosis(layer: LayerFactors) -> str:
    found = []
    for name, M in zip("AG", layer, strict=True):
        values: Any = M.d if isinstance(M, Diagonal) else torch.linalg.eigvalsh(torch.nan_to_num(M.double()))
        low, high = float(values.min()), float(values.max())
        condition = abs(high / low) if low else float("inf")
        found.append(f"{name} has eigenvalues from {low:.3g} to {high:.3g}, condition {condition:.3g}")
    return ", ".join(found)
