"""The moving averages of the layers' moments (Section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfaclinalg import Factors, LayerFactors, Link, averaging_decay, moving_average, update_factors

from ._blocks import Block, outline
from ._checkpoint import check, check_keys, check_links, check_moments, is_number
from ._inverses import Averaged
from ._layer import Layer
from ._statistics import Held


class Averages:
    """A and G of each block by its name, and the links of a chain."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerFactors] = {}
        self.links: tuple[Link, ...] = ()
        self.taken = 0  #: statistics
        self.known: set[str] = set()  #: the blocks that some process has seen, where others may hold their averages

    def take(self, new: dict[str, LayerFactors | Held], links: tuple[Link, ...], decay: float) -> None:
        """One statistic more, with the weight 1 - min(1 - 1/k, decay)."""
        self.taken += 1
        epsilon = averaging_decay(self.taken, maximum=decay)
        for name, layer in new.items():  # one after the other: no second copy of all of them
            old = Factors((self.layers[name],)) if name in self.layers else None
            if isinstance(layer, Held):
                average = update_factors(old, [layer.a], [layer.g], decay=epsilon)
            else:
                average = moving_average(old, Factors((layer,)), decay=epsilon)
            self.layers[name] = average.layers[0]
        if links:
            old = Factors((), self.links) if self.links else None
            self.links = moving_average(old, Factors((), links), decay=epsilon).links

    def of(self, layers: Sequence[Layer]) -> Averaged:
        """Those of the layers, with each weight that is shared once."""
        known = {layer.name: M for layer in layers if (M := layer.factors(self.layers)) is not None}
        return Averaged(known, self.links)

    def state(self) -> dict[str, Any]:
        known = tuple(sorted(self.known | self.layers.keys()))
        return {"moments": self.layers, "links": self.links, "taken": self.taken, "known": known}

    def check(self, state: Any, blocks: Sequence[Block], chain: Sequence[Layer]) -> None:
        """A ValueError where a state cannot be loaded."""
        check_keys(state, ("moments", "links", "taken", "known"))
        check(isinstance(state["taken"], int) and is_number(state["taken"]), f"taken is {state['taken']!r}")
        check(isinstance(state["moments"], dict), "its moments are none")
        expected = {block.name: block for block in blocks}
        for name, pair in state["moments"].items():
            check(name in expected, f"{name!r} is no layer")
            check_moments(name, pair, expected[name].empty_moments())
        known = state["known"]
        check(isinstance(known, tuple) and all(isinstance(name, str) for name in known), f"known is {known!r}")
        check({*state["moments"]} <= {*known} <= {*expected}, f"known is {known!r}")
        check_links(state["links"], [layer.matrix(outline).shape for layer in chain])

    def load(self, state: dict[str, Any]) -> None:
        self.layers, self.links, self.taken = state["moments"], state["links"], state["taken"]
        self.known = set(state["known"])
