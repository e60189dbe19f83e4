"""The moving averages of the layers' moments (Section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kfaclinalg import Factors, LayerFactors, Link, averaging_decay, moving_average, update_factors

from ._blocks import Block, outline
from ._checkpoint import check, check_keys, check_links, check_moments, is_number
from ._layer import Layer
from ._statistics import Held


class Averaged(NamedTuple):
    """The averages, with each weight that is shared by layers once, and the rows that they are worth."""

    layers: dict[str, LayerFactors]
    links: tuple[Link, ...]
    rows: dict[str, float]


class Averages:
    """A and G of each block by its name, and the links of a chain."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerFactors] = {}
        self.links: tuple[Link, ...] = ()
        self.taken = 0  #: statistics
        self.rows: dict[str, float] = {}  #: that the averages are worth, of all blocks that some process has seen

    def take(
        self, new: dict[str, LayerFactors | Held], links: tuple[Link, ...], rows: Mapping[str, int], decay: float
    ) -> None:
        """One statistic more, of so many rows, with the weight 1 - min(1 - 1/k, decay)."""
        self.taken += 1
        epsilon = averaging_decay(self.taken, maximum=decay)
        for name, R in rows.items():
            old, weight = (epsilon**2 / self.rows[name], 1 - epsilon) if name in self.rows else (0.0, 1.0)
            self.rows[name] = 1 / (old + weight**2 / R)
        for name, layer in new.items():  # one after the other: no second copy of all of them
            before = Factors((self.layers[name],)) if name in self.layers else None
            if isinstance(layer, Held):
                average = update_factors(before, [layer.a], [layer.g], decay=epsilon)
            else:
                average = moving_average(before, Factors((layer,)), decay=epsilon)
            self.layers[name] = average.layers[0]
        if links:
            before = Factors((), self.links) if self.links else None
            self.links = moving_average(before, Factors((), links), decay=epsilon).links

    def of(self, layers: Sequence[Layer]) -> Averaged:
        """Those of the layers, with each weight that is shared once."""
        known = {layer.name: M for layer in layers if (M := layer.factors(self.layers)) is not None}
        rows = {layer.name: sum(self.rows.get(block.name, 0.0) for block in layer.blocks) for layer in layers}
        return Averaged(known, self.links, {name: R for name, R in rows.items() if R})

    def state(self) -> dict[str, Any]:
        return {"moments": self.layers, "links": self.links, "taken": self.taken, "rows": dict(self.rows)}

    def check(self, state: Any, blocks: Sequence[Block], chain: Sequence[Layer]) -> None:
        """A ValueError where a state cannot be loaded."""
        check_keys(state, ("moments", "links", "taken", "rows"))
        check(isinstance(state["taken"], int) and is_number(state["taken"]), f"taken is {state['taken']!r}")
        check(isinstance(state["moments"], dict), "its moments are none")
        expected = {block.name: block for block in blocks}
        for name, pair in state["moments"].items():
            check(name in expected, f"{name!r} is no layer")
            check_moments(name, pair, expected[name].empty_moments())
        rows = state["rows"]
        check(isinstance(rows, dict) and all(is_number(R) and R > 0 for R in rows.values()), f"rows are {rows!r}")
        check({*state["moments"]} <= {*rows} <= {*expected}, f"rows are {rows!r}")
        check_links(state["links"], [layer.matrix(outline).shape for layer in chain])

    def load(self, state: dict[str, Any]) -> None:
        self.layers, self.links, self.taken = state["moments"], state["links"], state["taken"]
        self.rows = dict(state["rows"])
