"""The inverse curvature of Algorithm 2, of which each process makes a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kfaclinalg import (
    BlockDiagonal,
    BlockTridiagonalInverse,
    Diagonal,
    Exact,
    Factored,
    Factors,
    KFACOptions,
    KFACState,
    KroneckerEigen,
    LayerFactors,
    LowRank,
    Tridiagonal,
)

from ._checkpoint import packed, unpacked
from ._payload import delivered, forms, template
from ._places import Item, places_of, work_of
from ._team import Team

INVERSES = "the inverses"
PAYS = 64  # multiplications that a process saves for each number that travels
TIMES: dict[Any, int] = {Exact: 9, Tridiagonal: 15}  # n³ + m³, of eigenvectors and of what links two layers


def divided(options: KFACOptions, state: KFACState | None, team: Team) -> KFACOptions:
    """The options with a structure whose work the processes share.

    What an inverse is made of is seen in the last one: before there is any, each process makes all of it.
    """
    structure = options.structure_value
    kinds = isinstance(structure, Exact), type(structure) in (Factored, LowRank, Tridiagonal)
    if team.size == 1 or state is None or state.inverse is None or not any(kinds):
        return options
    return options._replace(structure=Divided(structure, state.inverse, team), pi_norm="trace")


class Divided:
    """A `Structure` of which each process makes the parts that it owns, while those before travel to all.

    Of eigenvectors that is what is `fitted`, else the inverse. A part that fewer than `PAYS` multiplications a number
    make is made by everyone.
    """

    def __init__(self, structure: Any, last: Any, team: Team) -> None:
        self.structure, self.last, self.team = structure, last, team
        self.linked, self.observes = structure.linked, structure.observes

    def fitted(self, factors: Factors, old: Any, /) -> Any:
        if not isinstance(self.structure, Exact):
            return self.structure.fitted(factors, old)

        def make(some: Sequence[int]) -> Sequence[Any]:
            before = None if old is None else tuple(old[i] for i in some)
            return self.structure.fitted(Factors(tuple(factors.layers[i] for i in some)), before)

        return tuple(self._all(factors.layers, self.last.blocks, make))

    def inverse(self, fitted: Any, gamma: Any, /) -> Any:
        if isinstance(self.structure, Exact):
            return self.structure.inverse(fitted, gamma)
        layers, links = fitted.layers, fitted.links

        def make(some: Sequence[int]) -> Sequence[Any]:
            if not links:
                return _parts(self.structure.inverse(Factors(tuple(layers[i] for i in some)), gamma))
            pairs = (Factors(layers[i : i + 1 + (i < len(links))], links[i : i + 1]) for i in some)
            return [_parts(self.structure.inverse(pair, gamma))[0] for pair in pairs]

        return _joined(self.last, self._all(layers, _parts(self.last), make))

    def observed(self, fitted: Any, squares: Any, /, *, decay: Any) -> Any:
        return self.structure.observed(fitted, squares, decay=decay)

    def _all(self, layers: Sequence[Any], last: Sequence[Any], make: Callable[[Sequence[int]], Sequence[Any]]) -> Any:
        """The parts of all layers, in order, which have the shapes of the `last` ones."""
        templates = [template(packed(one), []) for one in last]
        items = [self._item(*both) for both in zip(layers, last, strict=True)]
        pays = [self._pays(*three) for three in zip(items, templates, last, strict=True)]
        away = [i for i, shared in enumerate(pays) if shared]
        places = dict(zip(away, places_of([items[i] for i in away], self.team.size), strict=True))
        away.sort(key=lambda i: (places[i].shelf, places[i].owner))
        here = [i for i, shared in enumerate(pays) if not shared]
        like = _first(layers[0])
        with self.team.agreed(INVERSES):
            came = delivered(
                self.team,
                [places[i].owner for i in away],
                [templates[i] for i in away],
                lambda some: [packed(one) for one in make([away[k] for k in some])],
                like.dtype,
                INVERSES,
            )
            found = dict(zip(here, make(here), strict=True)) if here else {}  # an error comes after what all wait for
        found |= {i: unpacked(value, like) for i, value in zip(away, came, strict=True)}
        return [found[i] for i in range(len(last))]

    def _item(self, layer: LayerFactors, one: Any) -> Item:
        """What a part takes, of one layer, or of one that is linked to the next."""
        kind = Exact if isinstance(self.structure, Exact) else Tridiagonal if type(one) is tuple else None
        return [(_side(layer.A), _side(layer.G), TIMES.get(kind, 1) * _batch(layer))]

    def _pays(self, item: Item, value: Any, one: Any) -> bool:
        if isinstance(self.structure, Exact) and not isinstance(one, KroneckerEigen):
            return False  # it has no eigenvectors, and its moments are everyone's
        return work_of(item) > PAYS * sum(form.size for form in forms(value))


def _parts(inverse: Any) -> list[Any]:
    """That of each layer: a block, where it is linked to the next with what links it."""
    if isinstance(inverse, BlockDiagonal):
        return list(inverse.blocks)
    linked = list(zip(inverse.Psi_A, inverse.Psi_G, inverse.Lambda, strict=False))
    return [*linked, *inverse.Lambda[len(linked) :]]


def _joined(last: Any, parts: Sequence[Any]) -> Any:
    if isinstance(last, BlockDiagonal):
        return BlockDiagonal(tuple(parts))
    Psi_A, Psi_G, Lambda = zip(*parts[: len(last.Psi_A)], strict=True) if last.Psi_A else ((), (), ())
    return BlockTridiagonalInverse(Psi_A, Psi_G, (*Lambda, *parts[len(Psi_A) :]))


def _side(M: Any) -> tuple[int, bool]:
    return (M.d if isinstance(M, Diagonal) else M).shape[-1], isinstance(M, Diagonal)


def _batch(layer: LayerFactors) -> int:
    """How many members the layer has."""
    M: Any = layer.A
    shape = M.d.shape[:-1] if isinstance(M, Diagonal) else M.shape[:-2]
    return int(torch.Size(shape).numel())


def _first(layer: LayerFactors) -> Any:
    return layer.A.d if isinstance(layer.A, Diagonal) else layer.A
