"""The moving averages of the layers' moments (Section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, Factors, LayerFactors, Link, averaging_decay, moving_average, update_factors

from ._checkpoint import check, check_keys, check_links, is_matrix, is_number
from ._modules import Block
from ._statistics import Held


class Averages:
    """A and G of each block by its name, and the links of a chain; a vector stands for a diagonal."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.moments: dict[str, LayerFactors] = {}
        self.links: tuple[Link, ...] = ()
        self.taken = 0  #: statistics

    @property
    def layers(self) -> dict[str, LayerFactors]:
        return {
            name: LayerFactors(*(Diagonal(M) if M.ndim == 1 else M for M in layer))
            for name, layer in self.moments.items()
        }

    def take(self, new: dict[str, LayerFactors | Held], links: tuple[Link, ...]) -> None:
        """One statistic more, with the weight 1 - min(1 - 1/k, decay)."""
        self.taken += 1
        epsilon = averaging_decay(self.taken, maximum=self.decay)
        for name, layer in new.items():  # one after the other: no second copy of all of them
            old = Factors((self.moments[name],)) if name in self.moments else None
            if isinstance(layer, Held):
                average = update_factors(old, [layer.a], [layer.g], decay=epsilon)
            else:
                average = moving_average(old, Factors((layer,)), decay=epsilon)
            self.moments[name] = average.layers[0]
        if links:
            old = Factors((), self.links) if self.links else None
            self.links = moving_average(old, Factors((), links), decay=epsilon).links

    def state(self) -> dict[str, Any]:
        return {"moments": self.moments, "links": self.links, "taken": self.taken}

    def check(self, state: Any, blocks: Sequence[Block], *, chained: bool) -> None:
        """A ValueError where a state cannot be loaded."""
        check_keys(state, ("moments", "links", "taken"))
        check(isinstance(state["taken"], int) and is_number(state["taken"]), f"taken is {state['taken']!r}")
        check(isinstance(state["moments"], dict), "its moments are none")
        expected = {block.name: block.empty_moments() for block in blocks}
        for name, pair in state["moments"].items():
            check(name in expected, f"{name!r} is no layer")
            check(isinstance(pair, LayerFactors), f"the moments of {name!r} are none")
            W = tuple(M.shape[-1] for M in reversed(expected[name]))
            came = [tuple(M.shape) if isinstance(M, Tensor) else type(M).__name__ for M in pair]
            fits = all(is_matrix(M, *like.shape) for M, like in zip(pair, expected[name], strict=True))
            check(fits, f"{name!r} has moments of shapes {came}, expected those of W of shape {W}")
        check_links(state["links"], [block.matrix(torch.detach).shape for block in blocks] if chained else [])

    def load(self, state: dict[str, Any]) -> None:
        self.moments, self.links, self.taken = state["moments"], state["links"], state["taken"]
