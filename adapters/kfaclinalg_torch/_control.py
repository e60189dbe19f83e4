"""The numbers of a preconditioner's step: λ, whether a statistic and an inverse are due, the length of the update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kfaclinalg import LayerFactors

from ._damping import Relative
from ._settings import AUTO, at, check_numbers
from ._statistics import Work
from ._turns import cost_of, product_of

LENGTH = 1e-3  # with an optimizer's rate of 1, or 0.1 and a momentum of 0.9: that of AdamW's steps at its usual rate
BOUNDS = {"statistics_period": (1, 10), "inverse_period": (10, 100)}
PLAIN = {"statistics_period": 1, "inverse_period": 10}
EIGENVALUES = 10  # n³ flops for all of them and the vectors, where an inverse takes one


class Controlled:
    """What the options say of a step; the attributes may be set anew.

    With a relative damping the periods that "auto" stands for are known from the first statistic on. They are the least
    ones with which all that is added to the model's own work, products with the inverses, statistics and refreshes, is
    no more than that work; what the products leave of it is divided in two. It is counted from the shapes of the layers
    and the number of their rows. A statistic is taken at least every 10 steps, a refresh every 10 to 100. While the
    averages are of few examples, in the steps 1, 2, 4, 8, ... of the first period, both are due too. With a number for
    λ nothing is chosen: 1 and 10 steps, and the update is as long as it is.
    """

    damping: Any
    decay: float
    kl_lr: Any

    def _take(self, damping: Any, decay: Any, periods: tuple[Any, Any], length: Any, clip: tuple[Any, Any]) -> None:
        self.damping, self.decay, self.length = damping, decay, length
        self.statistics_period, self.inverse_period = periods
        self.kl_clip, self.kl_lr = clip[0], 1.0 if clip[1] is None else clip[1]
        check_numbers(**vars(self))
        self._steps = 0
        self._left: list[Any] = []  # the gradients, and their versions, as the last step left them
        self._periods: dict[str, int] = {}  # of "auto"

    def _count(
        self, work: Work, layers: Iterable[LayerFactors], *, spectral: bool, parts: tuple[int, int] = (1, 1)
    ) -> None:
        """Choose the periods, once; of the refreshes and of the products one of so many `parts` is this process's."""
        known = list(layers)
        spare = max(work.model - sum(map(product_of, known)) // parts[1], work.model // 4, 1)
        refresh = sum(map(cost_of, known)) * (EIGENVALUES if spectral else 1) / parts[0]
        costs = {"statistics_period": work.statistic, "inverse_period": refresh}
        for name, (least, largest) in BOUNDS.items():
            self._periods.setdefault(name, min(max(-(-2 * int(costs[name]) // spare), least), largest))

    def _damping(self) -> Relative | float:
        return at(self._steps, "damping", self.damping)

    def _period(self, name: str) -> int:
        """That of this step: 1 in the early ones of "auto"."""
        given, k = getattr(self, name), self._steps
        if given != AUTO:
            return int(at(k, name, given))
        if not self._is_relative:
            return PLAIN[name]
        period = self._periods.get(name, BOUNDS[name][1])
        return 1 if k < period and k & (k - 1) == 0 else period

    @property
    def _decay(self) -> float:
        """Of a statistic; it stands for all the steps of its period where "auto" has chosen that."""
        chosen = self._is_relative and self.statistics_period == AUTO
        return float(self.decay ** self._periods.get("statistics_period", 1)) if chosen else self.decay

    @property
    def _is_relative(self) -> bool:
        return isinstance(self._damping(), Relative)

    def _length(self) -> tuple[float | None, tuple[float, float] | None]:
        """The root mean square of each layer's update; and what else limits all of it, κ and lr."""
        k = self._steps
        if self.kl_clip is not None:
            return None, (at(k, "kl_clip", self.kl_clip), at(k, "kl_lr", self.kl_lr))
        if self.length == AUTO:
            return LENGTH if self._is_relative else None, None
        return at(k, "length", self.length), None
