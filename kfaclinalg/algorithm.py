"""Algorithm 2 of the paper, written once, over a `Problem` that an adapter supplies.

An iteration has three parts: a `Schedule`, which is Python's; `kfac_iteration`, which is a pure function of arrays and
may be compiled whole; and a report, the one place that waits for the device. `kfac_step` is the three of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from . import _backends, _checks, _guards, _network, _value
from ._backends import Array, Scalars
from ._best_step import Candidate, Matrices, best_step, square_of
from ._verdict import Attempt, Before, Measured, verdict
from .averages import averaging_decay, moving_average
from .factors import Factors
from .options import KFACOptions
from .outer_product import OuterProduct
from .records import NUMBERS, KFACState, Schedule, StepInfo


class Problem(Protocol):
    """One mini-batch S' as an adapter presents it. Losses are means over examples and exclude the weight decay.

    For a structure that observes them ("eigen") it also has a method `squared_gradients(bases)`, called after
    `factors`: on the same S1 and targets, for the `KroneckerEigen` of each layer the means of (Q_Bᵀ ∇W Q_A)² over the
    examples, ∇W being the gradient of one; None for a layer without a basis.
    """

    def loss_and_gradient(self, weights: Matrices) -> tuple[Any, Matrices]:
        """h and ∇h, shaped like the weights; each layer's an array or, for F̆ and without weight decay, where
        `OuterProduct.pays`, an `OuterProduct`."""

    def factors(self, weights: Matrices, links: bool) -> Factors:
        """The second moments on S1, with targets sampled from the model's own distribution (Section 5)."""

    def curvature_gram(self, weights: Matrices, directions: Sequence[Matrices]) -> Any:
        """(k, k): the inner products (J d_i)ᵀ F_R (J d_j), mean over S2 (Appendix C)."""

    def loss(self, weights: Matrices) -> Any:
        """h alone."""


def kfac_step(
    problem: Problem, weights: Matrices, state: KFACState | None, options: KFACOptions, /
) -> tuple[Matrices, KFACState, StepInfo]:
    """One iteration of Algorithm 2: the new weights, the state for the next step, and what happened.

    Section 8 counts its flops, here h(θ + δ) in each step. Guards beyond the paper: a step that is not finite, or more
    than doubles h, is refused, `info.refused` says why, λ rises and all else stays; where a small S2 misleads
    `state.curvature_fraction` grows for the adapter to follow.

    Args:
        problem: the mini-batch.
        weights: one (m, n) array a layer, never changed in place.
        state: what the last step returned; None starts afresh.

    Raises:
        TypeError, ValueError: a wrong option (seen when starting afresh) or argument, or arrays that do not fit.

    >>> import numpy as np
    >>> from kfaclinalg_mlp import MLP
    >>> mlp, a = MLP(("identity",), "gaussian"), np.asarray([[0.0], [1.0]])
    >>> problem = mlp.problem(a, 3 * a, rng=np.random.default_rng(0), statistics_fraction=1, curvature_fraction=1)
    >>> weights, state, info = kfac_step(problem, (np.zeros((1, 2)),), None, KFACOptions(damping=0, weight_decay=0))
    >>> info.loss, bool(problem.loss(weights) < 1e-9)  # one exact step solves least squares
    (2.25, True)
    """
    _checks.check_class("options", options, KFACOptions)
    _checks.check_class("state", state, KFACState, type(None))
    state = KFACState.start(options) if state is None else state
    due = Schedule.at(state.iteration + 1, options)
    weights, state, info = _iteration(problem, (weights, state), options, due, _backends.values)
    damping, gamma = _backends.values(state.damping, state.gamma)
    return weights, state._replace(damping=damping, gamma=gamma), kfac_report(info)


def kfac_iteration(
    problem: Problem, weights: Matrices, state: KFACState, options: KFACOptions, schedule: Schedule, /
) -> tuple[Matrices, KFACState, StepInfo]:
    """`kfac_step` with what is due in it given, and no value looked at: its numbers are 0-d arrays.

    Whether a step is refused is decided in the arrays too, so that `jax.jit` compiles it whole, the options and the
    schedule static; the state of a run without a step has no arrays to go back to, and takes zeros for them. The flops
    are those of `kfac_step`, and one pass over the state. `kfac_report` reads the info.

    Raises:
        TypeError, ValueError: a wrong argument, or arrays that do not fit.

    >>> import numpy as np
    >>> from kfaclinalg_mlp import MLP
    >>> a, options = np.ones((4, 1)), KFACOptions()
    >>> problem = MLP(("identity",), "gaussian").problem(a, 3 * a, rng=np.random.default_rng(0))
    >>> first = KFACState.start(options), options, Schedule.at(1, options)
    >>> weights, state, info = kfac_iteration(problem, (np.zeros((1, 2)),), *first)
    >>> kfac_report(info).loss
    4.5
    """
    _checks.check_class("options", options, KFACOptions)
    _checks.check_class("state", state, KFACState)
    _checks.check_class("schedule", schedule, Schedule)
    weights, state, info = _iteration(problem, (weights, state), options, schedule, lambda *measured: measured)
    b = _backends.resolve(W=weights[0])
    numbers: dict[str, Any] = {name: _backends.array_beside(b, getattr(state, name)) for name in NUMBERS}
    return weights, state._replace(**numbers), StepInfo(*(_backends.array_beside(b, x) for x in info))


def kfac_report(info: StepInfo, /) -> StepInfo:
    """The info of `kfac_iteration` in Python's numbers: the device is waited for once. No flops.

    Raises:
        TypeError: it is no `StepInfo`.

    >>> kfac_report(StepInfo(1.0, 1.0, 1.0, 0.0, 0.0, 0.0, math.nan, 0.0, False, 1.0)).refused
    'the loss is not finite'
    """
    _checks.check_class("info", info, StepInfo)
    known = StepInfo(*_backends.values(*info))
    return known._replace(refreshed=bool(known.refreshed), refused=_guards.REASONS[int(known.refused)])


def _iteration(
    problem: Problem, old: Before, options: KFACOptions, due: Schedule, read: Callable[..., Sequence[Any]]
) -> tuple[Matrices, KFACState, StepInfo]:
    """`read` is what becomes of the numbers before they decide."""
    weights, state = old
    _network.check_problem(problem, weights)
    b, eta = _backends.resolve(W=weights[0]), options.weight_decay
    h, gradient = problem.loss_and_gradient(weights)
    dense = tuple(g.to_dense() if isinstance(g, OuterProduct) else g for g in gradient)
    if eta:
        # η W is of full rank: to precondition it by itself would cost as much as the whole, so nothing stays factored.
        gradient = dense = tuple(g + eta * W for g, W in zip(dense, weights, strict=True))
    statistics = problem.factors(weights, options.structure_value.linked)
    averages = _averaged(problem, statistics, state, options, due)
    inverses = _inverses(b, averages, options, due)
    candidates = [Candidate(gamma, P, tuple(-U for U in P.apply(gradient))) for gamma, P in inverses]
    last = () if state.update is None else (state.update,)
    F = problem.curvature_gram(weights, [*(c.direction for c in candidates), *last])  # at once: J δ0 but one time
    step, update = best_step(F, dense, state.damping + eta, candidates, last)
    moved = tuple(W + delta for W, delta in zip(weights, update, strict=True))
    loss, of_weights = _with_decay(weights, h, eta)
    after = _with_decay(moved, problem.loss(moved), eta)[0]
    found = step.candidate.gamma, *step.coefficients, step.change, step.square
    measured = Measured(*read(loss, _guards.are_finite(statistics), *found, of_weights, after))
    kept = update if options.momentum == "quadratic-model" else None
    fitted = averages.fitted if options.structure_value.observes else None
    new = averages._replace(inverse=step.candidate.inverse, update=kept, fitted=fitted)
    return verdict(Attempt(moved, new, statistics), measured, old, options, due)


@_backends.in_double
def _with_decay(weights: Matrices, h: Any, eta: float) -> tuple[Array, Array]:
    """h + ½ η ‖W‖², and ‖W‖²."""
    square = square_of(weights)
    return _backends.beside(_backends.backend_of(square), h) + 0.5 * eta * square, square


def _averaged(problem: Any, statistics: Factors, state: KFACState, options: KFACOptions, due: Schedule) -> KFACState:
    """The state with the factors, and what is fitted to them, of this iteration."""
    k, structure, b = (
        state.iteration + 1,
        options.structure_value,
        _backends.backend_of(next(_value.leaves(statistics))),
    )
    epsilon = _backends.in_dtype(b, averaging_decay(k, maximum=options.averaging_maximum))
    factors = moving_average(state.factors, statistics, decay=epsilon)
    fitted = structure.fitted(factors, state.fitted) if due.refresh else state.fitted
    if structure.observes:
        if not callable(getattr(problem, "squared_gradients", None)):
            raise TypeError(f"problem is a {type(problem).__name__}, expected one with a method squared_gradients")
        fitted = structure.observed(fitted, problem.squared_gradients(fitted), decay=epsilon)
    return state._replace(iteration=k, factors=factors, fitted=fitted)


def _inverses(
    b: _backends.Backend, averages: KFACState, options: KFACOptions, due: Schedule
) -> Iterator[tuple[Scalars, Any]]:
    """γ and the inverse for it and, where that is due, for ω2 γ and γ/ω2 (Section 6.6).

    γ >= √η is a guard beyond the paper, whose rule may follow the noise of τ2 < 1 down to where a step blows up.
    """
    structure, omega2 = options.structure_value, options.omega2
    gamma = averages.gamma
    if not (due.refresh or structure.observes):
        yield gamma, averages.inverse
        return
    floor = math.sqrt(options.weight_decay)
    for tried in (gamma, omega2 * gamma, gamma / omega2) if due.sweep else (gamma,):
        bounded = _guards.at_least(floor, tried)
        yield bounded, structure.inverse(averages.fitted, _backends.in_dtype(b, bounded))
