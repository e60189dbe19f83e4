"""From the averages of a layer's moments to its inverse, by a ladder of ever safer ways, each layer in its own step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import (
    CholeskyInverse,
    Diagonal,
    Factors,
    Kronecker,
    KroneckerEigen,
    LayerFactors,
    LinAlgError,
    Link,
    Structure,
)

from ._averages import Averaged
from ._checkpoint import check, check_keys
from ._damping import Relative, gamma_of, of_rows, raised
from ._layer import Layer
from ._squares import mean_squares
from ._statistics import Statistic
from ._turns import turns_of

# The rungs above the factors as they are: in float64, with so many times the damping.
LADDER = tuple(10**k for k in range(5))
TOLERATED = 2  # failures in a row


class Inverses:
    """The inverse of each layer by itself, as a structure has it."""

    def __init__(self, structure: Structure, layers: Sequence[Layer]) -> None:
        self.structure, self.layers = structure, {layer.name: layer for layer in layers}
        self.inverses: dict[str, Any] = {}
        self.fitted: dict[str, Any] = {}  # what they are made of, where that changes between refreshes
        self.failures: dict[str, int] = {}
        self.rows: dict[str, float] = {}  # that the averages are worth

    @property
    def keeps_uses(self) -> bool:
        """Whether more than A and G is taken from a statistic."""
        return self.structure.observes

    def links(self, statistic: Statistic, scale: float) -> tuple[Link, ...]:
        """What is averaged besides A and G."""
        return ()

    def refresh(self, step: int, period: int, damping: Relative | float, factors: Averaged) -> None:
        """Make the inverses whose turn it is, and those that there are none of yet.

        Where every rung of the ladder fails the previous inverse stays.

        Raises:
            LinAlgError: a layer has failed three times in a row.
        """
        self.rows = factors.rows
        turns = turns_of(factors.layers.values(), period)
        layers = zip(factors.layers.items(), turns, strict=True)
        self.renew(
            {name: M for (name, M), turn in layers if step % period == turn or name not in self.inverses}, damping
        )

    def renew(self, due: Mapping[str, LayerFactors], damping: Relative | float) -> None:
        """Make these inverses, of these averages."""
        made = [self._built(name, layer, damping) for name, layer in due.items()]
        sound = are_finite(_telling(*one) for one in made)
        for (name, layer), first, is_sound in zip(due.items(), made, sound, strict=True):
            self._keep(name, first if is_sound else self._climbed(name, layer, damping), layer)

    def observe(self, statistic: Statistic, new: Mapping[str, Any], scale: float, decay: float, damping: Any) -> None:
        """Take from a statistic what needs the refreshed inverses; `new` are its moments, by block."""
        for name, F in list(self.fitted.items()):
            moments = self.layers[name].factors(new)
            if moments is None:
                continue
            self.take_squares(name, mean_squares(statistic, self.layers[name], F, moments, scale), decay, damping)

    def take_squares(self, name: str, squares: Tensor | None, decay: float, damping: Any) -> None:
        """Of the gradients in the layer's own basis."""
        observed = self.structure.observed((self.fitted[name],), [squares], decay=decay)  # type: ignore[attr-defined]
        self.fitted[name], self.inverses[name] = self._inverse(observed, self.gamma(name, observed[0], damping))

    def apply(self, Vs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """(name, V) to (name, the preconditioned V), one layer at a time; a layer without an inverse keeps its V."""
        for name, V in Vs:
            K = self.inverses.get(name)
            if isinstance(K, Kronecker | KroneckerEigen):
                yield name, K.apply(V)
            else:
                yield name, V if K is None else K @ V

    def state(self) -> dict[str, Any]:
        return {"inverses": self.inverses, "fitted": self.fitted, "failures": self.failures}

    def check(self, state: Any, weights: Mapping[str, Tensor]) -> None:
        """A ValueError where a state cannot be loaded, of layers with these weights."""
        check_keys(state, self.state())
        check(all(isinstance(part, dict) for part in state.values()), "its inverses are none")
        check(all(isinstance(n, int) for n in state["failures"].values()), "its failures are no numbers")
        for name, inverse in state["inverses"].items():
            self._check_one(name, inverse, weights)
        fits = not self.structure.observes or state["fitted"].keys() == state["inverses"].keys()
        check(fits, "what its inverses are made of is missing")
        for name, F in state["fitted"].items():
            check(isinstance(F, KroneckerEigen | LayerFactors), f"what the inverse of {name!r} is made of is none")
            if isinstance(F, KroneckerEigen):
                self._check_one(name, F, weights)

    def _check_one(self, name: str, inverse: Any, weights: Mapping[str, Tensor]) -> None:
        check(name in weights, f"{name!r} is no layer")
        check(isinstance(inverse, Kronecker | KroneckerEigen), f"the inverse of {name!r} is none")
        came, expected = tuple(inverse.diagonal().shape), tuple(weights[name].shape)
        check(came == expected, f"{name!r} has W of shape {came}, expected {expected}")

    def load(self, state: dict[str, Any]) -> None:
        self.inverses, self.fitted, self.failures = state["inverses"], state["fitted"], state["failures"]

    def _built(self, name: str, layer: LayerFactors, damping: Relative | float) -> tuple[Any, Any]:
        """What is fitted to a layer, and its inverse."""
        old = (self.fitted[name],) if name in self.fitted else None
        fitted = self.structure.fitted(Factors((layer,)), old)
        return self._inverse(fitted, self.gamma(name, fitted[0] if self.structure.observes else layer, damping))

    def gamma(self, name: str, fitted: Any, damping: Relative | float, times: float = 1) -> Any:
        """That of a layer, with so many times its λ."""
        return gamma_of(raised(of_rows(damping, fitted, self.rows.get(name, math.inf)), times), fitted)

    def _inverse(self, fitted: Any, gamma: Any) -> tuple[Any, Any]:
        kept = fitted[0] if self.structure.observes else None
        return kept, self.structure.inverse(fitted, gamma).blocks[0]

    def _climbed(self, name: str, layer: LayerFactors, damping: Relative | float) -> tuple[Any, Any] | None:
        """The first above the lowest rung whose inverse is finite."""
        for times in LADDER:
            wide = cast(layer, torch.float64)
            fitted, gamma = self.structure.fitted(Factors((wide,)), None), self.gamma(name, wide, damping, times)
            kept, inverse = (_as(x, _dtype(layer)) for x in self._inverse(fitted, gamma))
            if are_finite([_telling(kept, inverse)])[0]:
                return kept, inverse
        return None

    def _keep(self, name: str, made: tuple[Any, Any] | None, *layers: LayerFactors) -> None:
        if made is not None:
            self.failures[name], self.inverses[name] = 0, made[1]
            if self.structure.observes:
                self.fitted[name] = made[0]
            return
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] > TOLERATED:
            raise LinAlgError(
                f"the factors of {name!r} could not be inverted in {self.failures[name]} refreshes in a row, nor in "
                f"float64 with {LADDER[-1]} times the damping: {'; '.join(map(_diagnosis, layers))}. "
                "Likely causes: no damping at all, or inputs or gradients that grow without bound."
            )


def _as(x: Any, dtype: torch.dtype) -> Any:
    return x if x is None else cast(x, dtype) if isinstance(x, LayerFactors) else x.astype(dtype)


def cast(layer: LayerFactors, dtype: torch.dtype) -> LayerFactors:
    return LayerFactors(*(M.astype(dtype) if isinstance(M, Diagonal) else M.to(dtype) for M in layer))


def are_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether all of each is finite: a GPU is waited for once."""
    found = [torch.isfinite(x).all() for x in tensors]
    return torch.stack(found).tolist() if found else []


def _telling(kept: Any, inverse: Any) -> Tensor:
    """A few numbers of an inverse, and of what is kept of it: where a factorisation failed all of a member is NaN."""
    if isinstance(inverse, KroneckerEigen):
        both = [F.eigenvalues for F in (kept, inverse) if isinstance(F, KroneckerEigen)]
        return torch.stack(both)  # type: ignore[arg-type]
    substituted = isinstance(inverse.A, CholeskyInverse) or isinstance(inverse.B, CholeskyInverse)
    return inverse.logdet() if substituted else inverse.trace()  # what takes a few flops


def _dtype(layer: LayerFactors) -> torch.dtype:
    return next(M.d.dtype if isinstance(M, Diagonal) else M.dtype for M in layer)


def _diagnosis(layer: LayerFactors) -> str:
    found = []
    for name, M in zip("AG", layer, strict=True):
        values: Any = M.d if isinstance(M, Diagonal) else torch.linalg.eigvalsh(torch.nan_to_num(M.double()))
        low, high = float(values.min()), float(values.max())
        condition = abs(high / low) if low else float("inf")
        found.append(f"{name} has eigenvalues from {low:.3g} to {high:.3g}, condition {condition:.3g}")
    return ", ".join(found)
