"""What the processes that train a model together know of each other's inverses, and how these travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfaclinalg import KroneckerEigen

from ._checkpoint import KIND
from ._grid import Duties, Grid, grid_of
from ._inverses import Inverses
from ._layer import Layer
from ._payload import closed, filled, forms, opened, template
from ._shards import Sharded, Whole
from ._team import Team, group_of
from ._wire import sent

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
        self.assign(layers)
        self.joined = False  # whether the processes have told each other which layers are none
        self.templates: dict[str, Any] = {}  # of the inverses that there are

    def assign(self, layers: Sequence[Layer]) -> None:
        """These are the layers."""
        self.layers = {layer.name: layer for layer in layers}
        self.duties = Duties(layers, self.grid.all.size)

    def common_seed(self, generator: torch.Generator) -> int:
        """One number of the first process's."""
        drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
        return self.grid.all.told(int(drawn), "a seed")[0]

    def seed(self, generator: torch.Generator, number: int, step: int) -> None:
        """The random numbers of a step follow from the common seed, the step and the process: that is their state."""
        team = self.grid.all
        generator.manual_seed((number + MIXED * (step * team.size + team.rank)) % 2**63)

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

    def checked(self, inverses: Inverses, names: Sequence[str]) -> dict[str, Any]:
        """The templates of these inverses of this process; those of before must stay as they are."""
        found = {name: template(closed(*_of(inverses, name)), []) for name in names}
        for name, value in found.items():
            if self.templates.get(name, value) != value:
                raise RuntimeError(f"the inverse of {name!r} has become {value}, it was {self.templates[name]}")
        return found

    def share(self, inverses: Inverses, due: Sequence[str], made: dict[str, Any]) -> None:
        """Let those have the inverses who hold them; `made` are this process's own of those that were `due`."""
        told = self.grid.all.largest([name in made for name in due], "which inverses there are")
        names = [name for name, is_made in zip(due, told, strict=True) if is_made]
        if not all(name in self.templates for name in names):
            for templates in self.grid.all.told(made, "what the inverses are made of"):
                self.templates |= templates
        column = self.grid.column
        if column.size > 1:
            held = [name for name in names if self.holds(name)]
            owners = [self._in_column(name) for name in held]
            for name, value in zip(held, self._sent(column, inverses, held, owners), strict=True):
                kept, inverses.inverses[name] = value
                if inverses.structure.observes:
                    inverses.fitted[name] = kept

    def lent(self, inverses: Inverses, name: str) -> Any:
        """What an inverse is made of, for a moment in every process."""
        if name in inverses.fitted and self.grid.replicated:
            return inverses.fitted[name]
        ((kept, _),) = self._sent(self.grid.all, inverses, [name], [self.duties.owner[name]])
        return kept

    def told(self, name: str, squares: Tensor | None) -> Tensor | None:
        """What the owner alone can make, with all who hold the inverse."""
        if self.grid.replicated or self.grid.column.size == 1 or not self.holds(name):
            return squares
        form = self.templates[name]["kept"]["eigenvalues"]
        with self.grid.column.waiting("squares of gradients"):
            ((_, told),) = sent(self.grid.column, [self._in_column(name)], [form], [squares], self.dtype)
        return told

    def rejoin(self, p: Any) -> None:
        """What all know, of a state that each process has loaded a part of."""
        own = {
            name: template(closed(*_of(p._inverses, name)), []) for name in p._inverses.inverses if name in self.layers
        }
        self.templates, known = {}, set(p._estimate.averages.layers)
        for names, templates in self.grid.all.told((known, own), "a state"):
            known |= names
            self.templates |= templates
        p._estimate.averages.known = known
        self.joined = False

    def in_basis(self, name: str) -> bool:
        """Whether squares of gradients change its inverse."""
        kept = self.templates[name]["kept"]
        return isinstance(kept, dict) and kept.get(KIND) == KroneckerEigen.__name__

    def _in_column(self, name: str) -> int:
        """The place of the owner among those who hold the same inverses."""
        return self.duties.owner[name] // (1 if self.grid.replicated else self.grid.row.size)

    def _sent(self, team: Team, inverses: Inverses, names: Sequence[str], owners: Sequence[int]) -> list[Any]:
        parts: list[Any] = []
        of: list[tuple[str, int]] = []
        for name, owner in zip(names, owners, strict=True):
            own: list[Tensor] = []
            if owner == team.rank:
                template(closed(*_of(inverses, name)), own)
            shapes = forms(self.templates[name])
            parts += [(owner, form, own[i] if own else None) for i, form in enumerate(shapes)]
            of += [(name, i) for i in range(len(shapes))]
        to, shapes, tensors = (list(x) for x in zip(*parts, strict=True)) if parts else ([], [], [])
        like = torch.empty(0, dtype=self.dtype, device=team.device)
        found: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in names}
        with team.waiting("the inverses"):
            for i, M in sent(team, to, shapes, tensors, self.wire):
                name, place = of[i]
                found[name].append((place, M))
        return [
            opened(filled(self.templates[name], (M for _, M in sorted(found[name], key=lambda x: x[0]))), like)
            for name in names
        ]


def exchange_of(
    model: nn.Module, layers: Sequence[Layer], mesh: Any, placement: Any, group: Any, dtypes: Any, structure: Any
) -> Exchange | None:
    """That of a model's processes; None where there is but one, and its parameters are whole."""
    device = layers[0].parameters[0].device
    if mesh is None:
        team = Team(group_of(model, group), device)
    elif mesh.ndim == 1:
        team = Team(mesh.get_group(), device)
    else:
        team = Team(_all_of(mesh), device)
    grid = grid_of(placement, team, mesh)
    if structure.linked and not grid.replicated:
        raise ValueError(f"structure {structure!r} links all layers: expected placement 'replicated' with it")
    if team.size == 1 and mesh is None:
        return None
    return Exchange(grid, Whole(grid) if mesh is None else Sharded(grid), layers, dtypes)


def _all_of(mesh: Any) -> Any:
    return torch.distributed.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)


def _of(inverses: Inverses, name: str) -> tuple[Any, Any]:
    return inverses.fitted.get(name), inverses.inverses[name]
