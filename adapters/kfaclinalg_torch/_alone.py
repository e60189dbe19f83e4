"""A step of a preconditioner in one process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import Tensor

from kfaclinalg import Exact

from ._estimators import Empirical
from ._preconditioned import precondition
from ._team import check_alone


def step_alone(p: Any) -> None:
    """Average what was captured, refresh the inverses whose turn it is, and precondition the gradients in place."""
    check_alone(p._was_running, "the preconditioner")
    for owner in p._owners:
        owner.check("preconditioner")
    estimate, inverses = p._estimate, p._inverses
    damping, period, (length, clip) = p._damping(), p._period("inverse_period"), p._length()  # of which one may raise
    gradients = [x.grad for layer in p._layers for x in layer.parameters if x.grad is not None]
    scale, shown = estimate.scale, not estimate.statistic.empty
    check_calls(p, gradients, shown)
    new = estimate.average(gradients, inverses, p._decay) if shown else None
    averages = estimate.averages.of(p._layers)
    if new is not None:
        spectral = isinstance(p.structure, Exact)
        p._count(estimate.statistic.work, averages.layers.values(), spectral=spectral)
    inverses.refresh(p._steps, period, damping, averages)
    if new is not None:
        inverses.observe(estimate.statistic, new, scale, p._decay, damping)
    precondition(p._layers, inverses, estimate.training, p.factor_dtype, length, clip, p._steps)
    p._left = left_of(gradients)


def nothing(p: Any) -> RuntimeError:
    """What there is to say where no pass was seen."""
    missing = "loss.backward()" if isinstance(p.estimator, Empirical) else "update(outputs)"
    return RuntimeError(f"nothing was captured before step(): call {missing} first, with gradients enabled")


def left_of(gradients: Sequence[Tensor]) -> list[Any]:
    """What `check_calls` knows them by."""
    return [(ref(g), g._version) for g in gradients]


def check_calls(p: Any, gradients: Sequence[Tensor], shown: bool) -> None:
    """Whether a pass was `shown`, and the gradients are none that the last step has left, but for a statistic alone.

    Raises:
        RuntimeError: no pass was shown yet; no new one, and no new gradients.
    """
    if not p._estimate.averages.taken and not shown:
        raise nothing(p)
    if not gradients:
        warnings.warn("no parameter has a gradient in step(): call it after loss.backward()", stacklevel=5)
    same = (g is then() and g._version == version for g, (then, version) in zip(gradients, p._left, strict=False))
    if gradients and not shown and len(gradients) == len(p._left) and all(same):
        raise RuntimeError("step() found the gradients as its last call has left them: call it after loss.backward()")
