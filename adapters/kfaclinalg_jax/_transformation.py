"""The step of a preconditioner: a pure function of arrays, compiled once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kfaclinalg import Factors, KroneckerEigen, moving_average

from . import _versions as versions
from ._control import Control, of_length, periods, turns
from ._devices import beside, divided
from ._groups import Group, grouped
from ._inverses import Inverse, are_finite, observed, refreshed
from ._network import Network
from ._plan import Plan, PreconditionState, blank_state
from ._squares import mean_squares
from ._statistics import Statistics
from ._trees import by_name, check_leaves, listed


class Transformation:
    """The two functions of a transformation."""

    def __init__(self, net: Network, control: Control, structure: Any) -> None:
        self.names, self.leaves, self.layers = net.example.names, net.example.leaves, net.example.assembly.layers
        self.params, self.plans = net.params, dict[frozenset[str], Plan]()
        self.rows = {layer.name for layer in self.layers if layer.has_rows}
        self.control, self.structure, self.axis_name = control, structure, net.axis_name
        self.moments, self.draws = net.example.moments(), net.draws

    def __iter__(self) -> Any:
        return iter((self.init, self.update))

    def plan(self, leaves: Mapping[str, Any]) -> Plan:
        if (there := frozenset(leaves)) not in self.plans:
            layers = [layer for layer in self.layers if all(self.names[i] in there for i in layer.leaves)]
            moments = [self.moments[layer.name] for layer in layers]
            chosen = periods(layers, moments, self.structure, self.draws)
            of_statistics, of_inverses = (self.control.period(name, chosen) for name in chosen)
            groups = grouped(layers, self.moments, self.leaves)
            state = jax.eval_shape(blank_state(self.structure, groups))
            without = listed([name for name in self.names if name not in there])
            of = f"parameters without {without}, like the gradient" if without else "all parameters"
            self.plans[there] = Plan(groups, turns(moments, of_inverses), of_statistics, of_inverses, state, of)
        return self.plans[there]

    def init(self, params: Any) -> PreconditionState:
        check_leaves("params", params, self.params, "parameters of the network", some=True)
        state: PreconditionState = blank_state(self.structure, self.plan(by_name(params)).groups)()
        return beside(state, params)

    def update(
        self,
        updates: Any,
        state: PreconditionState,
        params: Any = None,
        *,
        statistics: Statistics | None = None,
        **others: Any,
    ) -> tuple[Any, PreconditionState]:
        updates, state, statistics = jax.tree.map(jnp.asarray, (updates, state, statistics))  # of a pickle NumPy's
        check_leaves("the gradient", updates, self.params, "parameters of the network", some=True)
        plan = self.plan(by_name(updates))
        self._check(plan, state, statistics)

        def like(spec: Any) -> Any:
            return jax.tree.map(spec, (updates, state))

        return versions.without_explicit_axes(partial(self._updated, plan), like, updates, state, statistics)

    def _updated(self, plan: Plan, updates: Any, state: PreconditionState, statistics: Statistics | None) -> Any:
        leaves, step = by_name(updates), state.step
        Vs = [group.gradients(leaves, self.names) for group in plan.groups]
        known = {self.names[i] for group in plan.groups for layer in group.layers for i in layer.leaves}
        others = {name: g for name, g in leaves.items() if name not in known}
        finite = are_finite([*Vs, *others.values()])
        damping = self.control.damping_at(step)
        taken, rejected, averages = state.taken, state.rejected, (state.averages, state.spread)
        takes: Any = False
        if statistics is not None:
            early = self.control.is_early("statistics_period", step, plan.statistics_period)
            due = early | (step % plan.statistics_period == 0)
            new = [group.stacked(statistics.moments) for group in plan.groups]
            takes = due & finite & are_finite(jax.tree.leaves(new))
            taken, rejected = taken + takes, rejected + (due & ~takes)
            rows = [group.stacked(statistics.counted) for group in plan.groups]
            averages = self._averaged(plan, averages, (new, rows), takes, taken)
        early = self.control.is_early("inverse_period", step, plan.inverse_period)
        inverses = []
        for group, old, *average in zip(plan.groups, state.inverses, *averages, strict=True):
            turn = jnp.asarray([plan.turns[i] for i in group.places])
            wanted = (early | (step % plan.inverse_period == turn) | ~old.ready) & (taken > 0)
            made = self.refresh(damping)(tuple(average), old, wanted)
            if self.structure.observes and statistics is not None:
                made = self._observed(plan, group, made, statistics, average[1], takes, damping)
            inverses.append(made)
        Vs = [jnp.where(finite, V, 0.0) for V in Vs]
        found = {name: jnp.where(finite, g, jnp.zeros_like(g)) for name, g in others.items()}
        found |= self._applied(plan, leaves, Vs, inverses, step)
        updates = jax.tree.unflatten(jax.tree.structure(updates), [found[name] for name in leaves])
        return updates, PreconditionState(step + 1, taken, rejected, *averages, tuple(inverses))

    def _check(self, plan: Plan, state: Any, statistics: Any) -> None:
        if not isinstance(state, PreconditionState):
            raise TypeError(f"state is a {type(state).__name__}, expected the PreconditionState of init(params)")
        check_leaves("state", state, plan.state, f"that of init for {plan.of}", dtypes=True)
        if statistics is None:
            return
        if not isinstance(statistics, Statistics):
            came = type(statistics).__name__
            raise TypeError(f"statistics is a {came}, expected the Statistics of Network.value_grad_and_statistics")
        check_leaves("statistics", statistics.moments, self.moments, "those of this network", dtypes=True)
        if self.structure.observes and statistics.rows.keys() != self.rows:
            raise ValueError("statistics have no rows, expected those of a Network(..., keep='rows')")

    def refresh(self, damping: Any) -> Any:
        def one(average: Any, old: Inverse, wanted: Any) -> Inverse:
            return refreshed(self.structure, average, old, wanted, damping)

        return divided(one, self.axis_name, self.control.sharding)

    def _averaged(self, plan: Plan, old: Any, new: Any, takes: Any, taken: Any) -> Any:
        """ε = min(1 - 1/k, decay)."""
        bound = self.control.decay_over(plan.statistics_period)
        epsilon = jnp.minimum(1 - 1 / jnp.maximum(taken, 1).astype(float), bound)

        def mixed() -> Any:
            moments, spread = (zip(*pair, strict=True) for pair in zip(old, new, strict=True))
            return (
                tuple(moving_average(Factors((x,)), Factors((y,)), decay=epsilon).layers[0] for x, y in moments),
                tuple((epsilon**2 * q + (1 - epsilon) ** 2 / R).astype(q.dtype) for q, R in spread),
            )

        return jax.lax.cond(takes, mixed, lambda: old)

    def _observed(
        self, plan: Plan, group: Group, old: Inverse, statistics: Statistics, spread: Any, takes: Any, damping: Any
    ) -> Any:
        """With EKFAC's squares, where the layers have a basis."""
        if not isinstance(old.fitted, KroneckerEigen):
            return old
        decay = self.control.decay_over(plan.statistics_period)

        def seen() -> Inverse:
            members = [jax.tree.map(lambda x, i=i: x[i], old.fitted) for i in range(len(group.layers))]
            names = [layer.name for layer in group.layers]
            squares = [mean_squares(statistics, name, F) for name, F in zip(names, members, strict=True)]
            mean = jnp.stack(squares) if self.axis_name is None else jax.lax.pmean(jnp.stack(squares), self.axis_name)
            return observed(self.structure, old, mean, spread, decay, damping)

        return jax.lax.cond(takes, seen, lambda: old)

    def _applied(self, plan: Plan, leaves: Mapping[str, Any], Vs: Any, inverses: Any, step: Any) -> dict[str, Any]:
        """The update of each parameter of a layer."""
        found: dict[str, Any] = {}
        length, agreement = self.control.length_at(step), 0.0
        for group, V, inverse in zip(plan.groups, Vs, inverses, strict=True):
            ready = inverse.ready.reshape(-1, *[1] * (V.ndim - 1))
            U = jnp.where(ready, inverse.operator.apply(V), V)
            agreement = agreement + jnp.abs((U * V).reshape(len(V), -1).sum(-1)).sum()
            found |= group.back(
                U if length is None else of_length(U, length, group.layers[0].stack), self.names, leaves
            )
        if self.control.kl_clip is None:
            return found
        kappa, lr = (x(step) if callable(x) else x for x in (self.control.kl_clip, self.control.kl_lr))
        lr = 1.0 if lr is None else lr
        length = lr**2 * agreement
        factor = jnp.where(length == 0, 1.0, jnp.minimum(1.0, jnp.sqrt(kappa / length)))
        return {name: (factor * u).astype(u.dtype) for name, u in found.items()}
