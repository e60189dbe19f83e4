"""Algorithm 2 for a network in JAX: each whole step is one program."""

from __future__ import annotations

from copy import copy
from functools import partial
from math import lcm
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaclinalg import KFACOptions, KFACState, Schedule, StepInfo, kfac_iteration

from ._estimators import Empirical
from ._network import Network
from ._problem import NetworkProblem, Weights

NUMBERS = ("damping", "gamma", "curvature_fraction", "ceiling")


class Run(NamedTuple):
    """The state of a run, a pytree of arrays. Of a run of `KFAC.step` by itself the host knows the first two."""

    turn: Any  # k, but for refused steps
    fraction: Any  # τ2
    kfac: KFACState


class KFAC:
    """Algorithm 2 of Martens & Grosse (2015), for a `Network`.

    A step needs the mini-batch, not a loss: targets for the curvature are sampled from the model's own distribution,
    and the length of the step comes from the exact quadratic model. There is no learning rate. A step that is not
    finite is refused, in the program: the parameters stay.

    Called by itself `step` runs one of four programs, by what is due (of six, where T1 meets T3 without T2); it reads
    the device in the first three steps and, while τ2 < 1, once every T1. Called in a program of your own, in `jax.jit`
    or `jax.lax.scan`, it holds them all and chooses by the state, τ2 being what it starts with, and reads nothing.

    Args:
        net: the network and its likelihood, which needs `fisher_product`.
        options: the fields of `kfaclinalg.KFACOptions`, by name.

    Raises:
        TypeError, ValueError: a wrong option, or one that the network, or JAX, has no use for.

    >>> def f(params, x):
    ...     return x @ params["W"] + params["b"]
    >>> params, x = {"W": jnp.zeros((1, 1)), "b": jnp.zeros(1)}, jnp.asarray([[0.0], [1.0]])
    >>> net = Network(f, "gaussian", example=(params, x))
    >>> whole = {"statistics_fraction": 1.0, "curvature_fraction": 1.0}
    >>> kfac = KFAC(net, damping=0.0, weight_decay=0.0, **whole)
    >>> state = kfac.init(params)
    >>> params, state, info = kfac.step(params, state, x, 3 * x, jax.random.key(0))
    >>> bool(jnp.allclose(f(params, x), 3 * x, atol=1e-3))  # one exact step solves least squares
    True
    """

    def __init__(self, net: Network, **options: Any) -> None:
        if unknown := sorted(options.keys() - set(KFACOptions._fields)):
            known = ", ".join(KFACOptions._fields)
            raise TypeError(f"got the unknown options {', '.join(unknown)}, expected some of {known}")
        self.net, self.options = net, KFACOptions(**options).checked()
        _check(net, self.options)
        self.weights = Weights(net)
        self._compiled = jax.jit(self._iterate, static_argnames=("schedule", "fraction"), donate_argnums=1)
        period = lcm(self.options.damping_period, self.options.gamma_period, self.options.inverse_period)
        self._schedules = sorted({Schedule.at(k, self.options) for k in range(1, period + 4)})

    def init(self, params: Any) -> Run:
        """The state of a run without a step: λ, γ, and zeros. Of the parameters the shapes are all that counts."""
        self.net.check_params(params)
        if self.net.axis_name is not None:  # which outside of `shard_map` is none, and the shapes are the same
            alone = copy(self.net)
            alone.axis_name = None
            return KFAC(alone, **self.options._asdict()).init(params)
        start = KFACState.start(self.options)._replace(iteration=jnp.asarray(0, jnp.int32))

        def first(params: Any, inputs: Any, key: Any) -> Any:
            y = self.net.likelihood.sample(self.net.outputs_of(params, inputs), key)
            return self._iterate(params, start, (inputs, y, key), self._schedules[-1], 1.0)[1]

        shapes = jax.eval_shape(first, params, self.net.inputs, jax.random.key(0))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        numbers = {name: jnp.asarray(getattr(start, name), getattr(shapes, name).dtype) for name in NUMBERS}
        return Run(0, start.curvature_fraction, zeros._replace(**numbers))

    def step(self, params: Any, state: Run, x: Any, y: Any, key: Any) -> tuple[Any, Run, StepInfo]:
        """One iteration: the new parameters, the state for the next, and what happened, for `kfaclinalg.kfac_report`.

        The arrays of `state` are given away.

        Args:
            params: as in the network's example.
            state: of `init` or the last step.
            x: the input, or a tuple of inputs.
            y: the targets, as the likelihood takes them.
            key: the source of the sampled targets and of the subsets.

        Raises:
            TypeError, ValueError: x and y do not fit, or params and state.
        """
        if not isinstance(state, tuple) or len(state) != len(Run._fields):
            raise TypeError(f"state is a {type(state).__name__}, expected that of init(params) or of the last step")
        turn, fraction, kfac = state
        if isinstance(kfac.iteration, jax.core.Tracer):
            fraction = fraction if isinstance(fraction, float) else self.options.curvature_fraction
            branches = [partial(self._iterate, schedule=s, fraction=fraction) for s in self._schedules]
            params, kfac, info = jax.lax.switch(self._due(kfac), branches, params, kfac, (x, y, key))
            return params, Run(state.turn + 1, state.fraction, kfac), info
        if not isinstance(turn, int) or turn <= 3 or (fraction < 1 and turn % self.options.damping_period == 0):
            turn, fraction = int(kfac.iteration), float(kfac.curvature_fraction)
        schedule = Schedule.at(turn + 1, self.options)
        params, kfac, info = self._compiled(params, kfac, (x, y, key), schedule=schedule, fraction=fraction)
        return params, Run(turn + 1, fraction, kfac), info

    def _iterate(
        self, params: Any, kfac: KFACState, batch: tuple[Any, Any, Any], schedule: Schedule, fraction: float
    ) -> tuple[Any, KFACState, StepInfo]:
        self.net.check_params(params)
        problem = NetworkProblem(self.net, self.weights, batch, self.options, fraction, schedule.adapt)
        moved, kfac, info = kfac_iteration(problem, self.weights.of(params), kfac, self.options, schedule)
        return self.weights.params(moved), kfac, info

    def _due(self, kfac: KFACState) -> Any:
        """Which of the schedules."""
        flags = jnp.stack(Schedule.at(kfac.iteration + 1, self.options))
        return jnp.argmax((jnp.asarray(self._schedules) == flags).all(axis=1))


def _check(net: Network, options: KFACOptions) -> None:
    """What does not go together."""
    if not isinstance(net, Network):
        raise TypeError(f"net is a {type(net).__name__}, expected a Network")
    if isinstance(net.estimator, Empirical):
        raise ValueError(
            "KFAC takes its targets from the model: estimator is 'empirical', expected 'sampled' or 'exact'"
        )
    missing = [name for name in ("sample", "fisher_product") if not hasattr(net.likelihood, name)]
    if missing:
        raise ValueError(f"likelihood {net.likelihood!r} lacks the methods {', '.join(missing)}, which KFAC needs")
    for name in ("generator", "chunk_size"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{name} is {getattr(options, name)!r}, expected None: `step` takes a key and all examples"
            )
    structure = options.structure_value
    if structure.linked:
        raise ValueError(f"structure is {options.structure!r}, expected one without links between layers")
    if structure.observes and net.keep != "rows":
        raise ValueError(f"structure is {options.structure!r}, for which the network must have keep='rows'")
