"""Algorithm 2 of the paper, written once, over a `Problem` that an adapter supplies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from . import _backends, _checks, _guards, _network
from ._best_step import Matrices, Model, best_step, square_of
from .averages import averaging_decay, moving_average
from .factors import Factors
from .options import KFACOptions
from .outer_product import OuterProduct
from .quadratic import levenberg_marquardt, reduction_ratio
from .structures import Structure

MISLED = 0.5  # a guard beyond the paper: below this ρ the model that S2 gives is not trusted, and τ2 doubles


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


class KFACState(NamedTuple):
    """What the next step needs."""

    iteration: int  # k of the last step that was taken
    damping: float  # λ
    gamma: float  # γ
    factors: Factors | None = None  # the moving averages
    inverse: Any = None  # of the curvature, as last refreshed
    update: Matrices | None = None  # δ0
    curvature_fraction: float = 1.0  # τ2 of the next problem
    ceiling: float = math.inf  # what refused steps may raise λ to
    fitted: Any = None  # what the inverse is made of, where that changes between refreshes


class StepInfo(NamedTuple):
    """What happened in one step, for the reader. `loss` is h before it, weight decay included."""

    loss: float
    damping: float
    gamma: float
    alpha: float
    mu: float
    change: float  # M(δ) - M(0)
    ratio: float  # ρ; NaN where it was not computed
    update_norm: float
    refreshed: bool
    refused: str  # why the step was not taken, or ""


def kfac_step(
    problem: Problem, weights: Matrices, state: KFACState | None, options: KFACOptions, /
) -> tuple[Matrices, KFACState, StepInfo]:
    """One iteration of Algorithm 2: the new weights, the state for the next step, and what happened.

    Section 8 counts its flops. Guards beyond the paper: a step that is not finite is refused, `info.refused` says why,
    λ rises and all else stays; where a small S2 misleads `state.curvature_fraction` grows for the adapter to follow.

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
    _network.check_problem(problem, weights)
    state = _start(options) if state is None else state
    k, eta = state.iteration + 1, options.weight_decay
    h, gradient = problem.loss_and_gradient(weights)
    dense = tuple(g.to_dense() if isinstance(g, OuterProduct) else g for g in gradient)
    if eta:
        # η W is of full rank: to precondition it by itself would cost as much as the whole, so nothing stays factored.
        gradient = dense = tuple(g + eta * W for g, W in zip(dense, weights, strict=True))
    structure = options.structure_value
    epsilon = averaging_decay(k, maximum=options.averaging_maximum)
    statistics = problem.factors(weights, structure.linked)
    factors = moving_average(state.factors, statistics, decay=epsilon)
    refreshed = k % options.inverse_period == 0 or k <= 3
    fitted = structure.fitted(factors, state.fitted) if refreshed else state.fitted
    if structure.observes:
        fitted = structure.observed(fitted, _squared_gradients(problem, fitted), decay=epsilon)
    renewed = refreshed or structure.observes
    inverses = _inverses(k, structure, fitted, state, options) if renewed else {state.gamma: state.inverse}
    last = () if state.update is None else (state.update,)
    candidates = {gamma: (P, tuple(-U for U in P.apply(gradient))) for gamma, P in inverses.items()}
    model = Model(partial(problem.curvature_gram, weights), dense, state.damping + eta)
    beside = h, square_of(weights), _guards.are_finite(statistics)
    step, (h, square, finite) = best_step(model, candidates, last, beside)

    loss, eps = h + 0.5 * eta * square, _backends.resolve(W=weights[0]).eps
    moved = tuple(W + delta for W, delta in zip(weights, step.update, strict=True))
    refused = _guards.refusal(loss, finite, step.change, step.norm)
    ratio, damping, tau2 = math.nan, state.damping, state.curvature_fraction
    if k % options.damping_period == 0 and not refused:
        h_after, square_after = _backends.values(problem.loss(moved), square_of(moved))
        loss_after = h_after + 0.5 * eta * square_after
        refused = "" if math.isfinite(loss_after) else _guards.NO_LOSS_AFTER
        ratio = reduction_ratio(loss, loss_after, step.change)
        if _guards.is_noise(step.change, step.norm, loss, math.sqrt(square), eps):
            damping = max(options.omega1 * damping, min(damping, options.damping))  # back from where it was raised to
        else:
            damping = levenberg_marquardt(damping, ratio, omega=options.omega1)
            tau2 = tau2 if ratio >= MISLED else min(2 * tau2, 1.0)
        damping = max(damping, eta)  # a guard

    fit = step.alpha, step.mu, step.change, ratio, step.norm
    info = StepInfo(loss, state.damping, step.gamma, *fit, refreshed, refused)
    if refused:
        no_step = info._replace(alpha=0.0, mu=0.0, change=0.0, update_norm=0.0, refreshed=False)
        return weights, _more_damped(state, options, info, statistics), no_step
    update = step.update if options.momentum == "quadratic-model" else None
    ceiling = _guards.RISE * damping
    kept = fitted if structure.observes else None
    return moved, KFACState(k, damping, step.gamma, factors, step.inverse, update, tau2, ceiling, kept), info


def _start(options: KFACOptions) -> KFACState:
    eta = options.checked().weight_decay
    damping = max(options.damping, eta)
    first = KFACState(0, damping, math.sqrt(damping + eta), ceiling=_guards.RISE * damping)
    return first._replace(curvature_fraction=options.curvature_fraction)


def _inverses(k: int, structure: Structure, fitted: Any, state: KFACState, options: KFACOptions) -> dict[float, Any]:
    """The inverse for γ and, every T2 iterations, for ω2 γ and γ/ω2 (Section 6.6).

    γ >= √η is a guard beyond the paper, whose rule may follow the noise of τ2 < 1 down to where a step blows up.
    """
    gamma, omega2 = state.gamma, options.omega2
    gammas = [gamma, omega2 * gamma, gamma / omega2] if k % options.gamma_period == 0 else [gamma]
    floor = math.sqrt(options.weight_decay)
    return {gamma: structure.inverse(fitted, gamma) for gamma in (max(g, floor) for g in gammas)}


def _squared_gradients(problem: Any, bases: Any) -> Any:
    if not callable(getattr(problem, "squared_gradients", None)):
        raise TypeError(f"problem is a {type(problem).__name__}, expected one with a method squared_gradients")
    return problem.squared_gradients(bases)


def _more_damped(state: KFACState, options: KFACOptions, info: StepInfo, statistics: Factors) -> KFACState:
    """The state with a larger λ, and a larger γ where a new inverse may be at fault."""
    damping = _guards.raised(state.damping, options.omega1, state.ceiling, info.refused)
    if info.refused != _guards.NO_UPDATE:
        return state._replace(damping=damping)
    least, largest = _guards.strengths(statistics)
    gamma = state.gamma or math.sqrt(least)  # 0 does not rise
    if info.refreshed and state.gamma:
        gamma = max(gamma, min(gamma / options.omega2, math.sqrt(largest)))
    return state._replace(damping=damping or least, gamma=gamma)
