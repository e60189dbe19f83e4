"""From the averages of the layers' moments to their inverses, inside one program."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaclinalg import Factors, KroneckerEigen, LayerFactors

from ._damping import gamma_of

LADDER = 1e4  # times the damping, by tens, until an inverse is finite


class Inverse(NamedTuple):
    """Of a layer, or of a group of them with a first dimension for the layers."""

    operator: Any  # a `Kronecker` or `KroneckerEigen`
    fitted: Any  # what it is made of, where that changes between refreshes; otherwise ()
    failures: Any  # refreshes in a row in which no inverse was finite: the one before has stayed
    ready: Any  # whether there is any


def blank(structure: Any, moments: LayerFactors, layers: int) -> Inverse:
    """None yet, for a group."""
    made = jax.eval_shape(lambda M: _made(structure, M, None, jnp.ones(()), 1.0), moments)
    operator, fitted = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), made)
    return Inverse(operator, fitted, jnp.zeros(layers, jnp.int32), jnp.zeros(layers, bool))


def refreshed(structure: Any, moments: LayerFactors, old: Inverse, due: Any, damping: Any) -> Inverse:
    """The inverses of a group, new where they are `due` (layers,), one layer after the other."""

    def one(args: Any) -> Inverse:
        M, before, wanted = args
        return jax.lax.cond(wanted, lambda: _climbed(structure, M, before, damping), lambda: before)

    return jax.lax.map(one, (moments, old, due))


def observed(structure: Any, old: Inverse, squares: Any, decay: Any, damping: Any) -> Inverse:
    """With the mean squares of the gradients along the eigenvectors, of one group."""

    def one(fitted: Any, S: Any, before: Inverse) -> Inverse:
        (new,) = structure.observed((fitted,), [S], decay=decay)
        operator = structure.inverse((new,), gamma_of(damping, new)).blocks[0]
        return before._replace(operator=operator, fitted=new)

    return jax.vmap(one)(old.fitted, squares, old)


def _climbed(structure: Any, M: LayerFactors, old: Inverse, damping: Any) -> Inverse:
    """The first inverse that is finite, up the ladder of dampings; the one before where none is."""

    def attempt(state: Any) -> Any:
        times, _, _ = state
        made = _made(structure, M, old, damping, times)
        return 10 * times, made, _is_finite(made)

    start = (jnp.ones((), _dtype(M)), (old.operator, old.fitted), jnp.zeros_like(old.ready))
    _, (operator, fitted), sound = jax.lax.while_loop(lambda s: ~s[2] & (s[0] <= LADDER), attempt, start)
    operator, fitted = (
        jax.tree.map(lambda new, before: jnp.where(sound, new, before), new, before)
        for new, before in ((operator, old.operator), (fitted, old.fitted))
    )
    return Inverse(operator, fitted, jnp.where(sound, 0, old.failures + 1), old.ready | sound)


def _made(structure: Any, M: LayerFactors, old: Inverse | None, damping: Any, times: Any) -> tuple[Any, Any]:
    """The inverse of one layer, and what it is made of."""
    factors = Factors((M,))
    fitted = structure.fitted(factors, None)
    if old is not None and structure.observes and isinstance(fitted[0], KroneckerEigen):
        turned = structure.fitted(factors, (old.fitted,))
        first = old.ready & (times == 1)
        fitted = jax.tree.map(lambda new, again: jnp.where(first, new, again), turned, fitted)
    gamma = gamma_of(damping, fitted[0] if structure.observes else M, times)
    return structure.inverse(fitted, gamma).blocks[0], fitted[0] if structure.observes else ()


def _is_finite(made: Any) -> Any:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(made)]).all()


def _dtype(M: Any) -> Any:
    return jax.tree.leaves(M)[0].dtype
