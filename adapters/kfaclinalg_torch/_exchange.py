"""What the processes that train a model together know of each other's inverses, and how these travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfaclinalg import KroneckerEigen

from ._ahead import Ahead
from ._checkpoint import KIND
from ._estimators import Empirical
from ._grid import Duties, Grid, grid_of, subgroup
from ._inverses import Inverses
from ._layer import Layer
from ._payload import closed, delivered, opened, template
from ._shards import Sharded, Whole
from ._team import Team, check_graph, group_of
from ._wire import sent

WHAT = "the inverses"
MIXED = 0x9E3779B97F4A7C15  # odd, with bits everywhere


class Exchange:
    """Who owns what (`duties`), where (`grid`), and what everybody knows of every layer's inverse.

    `dtypes` are that of A, G and the inverses, and that in which they travel.
    """

    def __init__(
        self, grid: Grid, gradients: Whole, layers: Sequence[Layer], dtypes: tuple[torch.dtype, torch.dtype]
    ) -> None:
        self.grid, self.gradients = grid, gradients
        self.dtype, self.wire = dtypes
        self.ahead = Ahead(grid.all)
        self.assign(layers)
        self.joined = False  # whether the processes have told each other which layers are none
        self.templates: dict[str, Any] = {}  # of the inverses that there are

    def assign(self, layers: Sequence[Layer]) -> None:
        """These are the layers."""
        self.layers = {layer.name: layer for layer in layers}
        self.duties = Duties(layers, self.grid.all.size)
        self.ahead.forget()

    def common_seed(self, generator: torch.Generator) -> int:
        """One number of the first process's."""
        drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
        return self.grid.all.told(int(drawn), "a seed")[0]

    def begin(self, p: Any) -> None:
        """The random numbers of a step follow from the common seed, the step and the process: that is their state."""
        team, p._estimate.updated = self.grid.all, self.updated
        p.generator.manual_seed((p._seed + MIXED * (p._steps * team.size + team.rank)) % 2**63)

    def updated(self, statistic: Any) -> None:
        """An update was taken: where it is the last one, its sums leave."""
        statistic.updates += 1
        if statistic.updates == self.ahead.updates:
            self.ahead.leave(statistic, self.owners, self.wire)

    @property
    def owners(self) -> dict[str, int]:
        """By the names of the blocks who alone averages A and G; nobody where all do."""
        return {} if self.grid.replicated else self.duties.of_block

    def owns(self, name: str) -> bool:
        return self.duties.owner[name] == self.grid.all.rank

    def holder(self, name: str) -> int | None:
        """The place in a row of who holds a layer's inverse; None where all do."""
        return self.grid.column_of(self.duties.owner[name])

    def holds(self, name: str) -> bool:
        return self.holder(name) in (None, self.grid.row.rank)

    def renewed(self, inverses: Inverses, due: Sequence[str], renew: Callable[[list[str]], None]) -> None:
        """Each of the inverses that are `due` made anew by its owner, and with all who hold it.

        Where all know what they are made of, those that were made travel while the next ones are; what an owner could
        not make it sends as it was.
        """
        column, mine = self.grid.column, [name for name in due if self.owns(name)]
        known = all(name in self.templates for name in due)
        if known and column.size > 1:
            held = [name for name in self.duties.order if name in due and self.holds(name)]
            with self.grid.all.agreed(WHAT):
                values = self._sent(column, inverses, held, renew)
        else:
            with self.grid.all.agreed(WHAT):
                renew(mine)
                made = {name: self._template(inverses, name) for name in mine if not inverses.failures[name]}
            if known:  # and nobody else holds them
                return
            told = self.grid.all.largest([name in made for name in due], "which inverses there are")
            names = [name for name, is_made in zip(due, told, strict=True) if is_made]
            if not all(name in self.templates for name in names):
                for templates in self.grid.all.told(made, "what the inverses are made of"):
                    self.templates |= templates
            held = [name for name in names if self.holds(name)] if column.size > 1 else []
            values = self._sent(column, inverses, held)
        for name, (kept, inverse) in zip(held, values, strict=True):
            inverses.inverses[name] = inverse
            if inverses.structure.observes:
                inverses.fitted[name] = kept

    def lent(self, inverses: Inverses, name: str) -> Any:
        """What an inverse is made of, for a moment in every process."""
        if name in inverses.fitted and self.grid.replicated:
            return inverses.fitted[name]
        ((kept, _),) = self._sent(self.grid.all, inverses, [name])
        return kept

    def told(self, name: str, squares: Tensor | None) -> Tensor | None:
        """What the owner alone can make, with all who hold the inverse."""
        if self.grid.replicated or self.grid.column.size == 1 or not self.holds(name):
            return squares
        column, form, what = self.grid.column, self.templates[name]["kept"]["eigenvalues"], "the squares of gradients"
        own: list[Any] = [squares]
        ((_, told),) = sent(column, [self._rank_in(column, name)], [form], lambda _: own, self.dtype, what)
        return told

    def rejoin(self, p: Any) -> None:
        """What all know, of a state that each process has loaded a part of."""
        own = {
            name: template(closed(*_of(p._inverses, name)), []) for name in p._inverses.inverses if name in self.layers
        }
        self.templates, averages = {}, p._estimate.averages
        for rows, templates in self.grid.all.told((averages.rows, own), "a state"):
            averages.rows |= rows
            self.templates |= templates
        self.joined = False
        self.ahead.forget()

    def in_basis(self, name: str) -> bool:
        """Whether squares of gradients change its inverse."""
        kept = self.templates[name]["kept"]
        return isinstance(kept, dict) and kept.get(KIND) == KroneckerEigen.__name__

    def _rank_in(self, team: Team, name: str) -> int:
        """The place of the owner among all, or among those who hold the same inverses."""
        owner = self.duties.owner[name]
        return owner if team is self.grid.all else owner // self.grid.row.size

    def _sent(self, team: Team, inverses: Inverses, names: Sequence[str], renew: Any = None) -> list[Any]:
        owners, templates = [self._rank_in(team, name) for name in names], [self.templates[name] for name in names]

        def make(places: Sequence[int]) -> list[Any]:
            some = [names[i] for i in places]
            if renew is not None:
                renew(some)
            return [closed(*_of(inverses, name)) for name in some]

        like = torch.empty(0, dtype=self.dtype, device=team.device)
        return [opened(value, like) for value in delivered(team, owners, templates, make, self.wire, WHAT)]

    def _template(self, inverses: Inverses, name: str) -> Any:
        """What an inverse of this process is made of; that of before must stay as it is."""
        found = template(closed(*_of(inverses, name)), [])
        if self.templates.get(name, found) != found:
            raise RuntimeError(f"the inverse of {name!r} has become {found}, it was {self.templates[name]}")
        return found


def exchange_of(
    model: nn.Module, layers: Sequence[Layer], mesh: Any, placement: Any, group: Any, dtypes: Any, p: Any
) -> Exchange | None:
    """That of a model's processes; None where there is but one, and its parameters are whole."""
    device = layers[0].parameters[0].device
    if mesh is not None and group is not None:
        raise ValueError(
            f"group would have no effect: the mesh of the parameters has the processes {mesh.mesh.tolist()}"
        )
    if mesh is None:
        team = Team(group_of(model, group), device)
    elif mesh.ndim == 1:
        team = Team(mesh.get_group(), device)
    else:
        team = subgroup(mesh.mesh.flatten().tolist(), *(Team(mesh.get_group(dim), device) for dim in range(2)))
    grid = grid_of(placement, team, mesh)
    if p.structure.linked and not grid.replicated:
        raise ValueError(f"structure {p.structure!r} links all layers: expected placement 'replicated' with it")
    if team.size == 1 and mesh is None:
        return None
    if not isinstance(p.estimator, Empirical):
        check_graph(model)
    return Exchange(grid, Whole(grid) if mesh is None else Sharded(grid), layers, dtypes)


def _of(inverses: Inverses, name: str) -> tuple[Any, Any]:
    return inverses.fitted.get(name), inverses.inverses[name]
