"""From the averages of the layers' moments to their inverses, inside one program."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaclinalg import Factors, KroneckerEigen, LayerFactors

from ._damping import gamma_of, of_rows

LADDER = 1e4  # times the damping, by tens, until an inverse is finite


class Inverse(NamedTuple):
    """Of a layer, or of a group of them with a first dimension for the layers."""

    operator: Any  # a `Kronecker` or `KroneckerEigen`
    fitted: Any  # what it is made of, where that changes between refreshes; otherwise ()
    failures: Any  # refreshes in a row in which no inverse was finite: the one before has stayed
    ready: Any  # whether there is any


def blank(structure: Any, moments: LayerFactors, layers: int) -> Inverse:
    """None yet, for a group."""
    made = jax.eval_shape(lambda M: _made(structure, (M, 1.0), None, jnp.ones(()), 1.0), moments)
    operator, fitted = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), made)
    return Inverse(operator, fitted, jnp.zeros(layers, jnp.int32), jnp.zeros(layers, bool))


def refreshed(structure: Any, averages: tuple[LayerFactors, Any], old: Inverse, due: Any, damping: Any) -> Inverse:
    """The inverses of a group, new where they are `due` (layers,), one layer after the other.

    The averages are the moments, and Σ w²/R over statistics of R rows with the weights w (layers,).

    A layer whose inverse is not finite is tried again, up the ladder of dampings; it keeps the one before where none
    is. The ladder is the outer loop: what is the same in all its turns, XLA moves out of a loop as code of its own.
    """

    def attempt(state: Any) -> Any:
        times, waiting, found = state

        def one(args: Any) -> Any:
            average, before, wanted = args
            return jax.lax.cond(
                wanted, lambda: _tried(structure, average, before, damping, times), lambda: (before, wanted)
            )

        found, sound = jax.lax.map(one, (averages, found, waiting))
        return 10 * times, waiting & ~sound, found

    start = (jnp.ones((), _dtype(averages[0])), due, old)
    _, failed, found = jax.lax.while_loop(lambda s: s[1].any() & (s[0] <= LADDER), attempt, start)
    failures = jnp.where(due, jnp.where(failed, old.failures + 1, 0), old.failures)
    return found._replace(failures=failures, ready=old.ready | (due & ~failed))


def observed(structure: Any, old: Inverse, squares: Any, spread: Any, decay: Any, damping: Any) -> Inverse:
    """With the mean squares of the gradients along the eigenvectors, of one group."""

    def one(fitted: Any, S: Any, q: Any, before: Inverse) -> Inverse:
        (new,) = structure.observed((fitted,), [S], decay=decay)
        operator = structure.inverse((new,), gamma_of(of_rows(damping, new, q), new)).blocks[0]
        return before._replace(operator=operator, fitted=new)

    return jax.vmap(one)(old.fitted, squares, spread, old)


def _tried(
    structure: Any, average: tuple[LayerFactors, Any], old: Inverse, damping: Any, times: Any
) -> tuple[Inverse, Any]:
    """The inverse of one layer, the one before where it is not finite, and whether it is."""
    made = _made(structure, average, old, damping, times)
    sound = are_finite(jax.tree.leaves(made))
    operator, fitted = jax.lax.cond(sound, lambda: made, lambda: (old.operator, old.fitted))
    return old._replace(operator=operator, fitted=fitted), sound


def _made(
    structure: Any, average: tuple[LayerFactors, Any], old: Inverse | None, damping: Any, times: Any
) -> tuple[Any, Any]:
    """The inverse of one layer, and what it is made of."""
    M, spread = average
    factors = Factors((M,))
    fitted = structure.fitted(factors, None)
    if old is not None and structure.observes and isinstance(fitted[0], KroneckerEigen):
        turned = structure.fitted(factors, (old.fitted,))
        first = old.ready & (times == 1)
        fitted = jax.tree.map(lambda new, again: jnp.where(first, new, again), turned, fitted)
    of = fitted[0] if structure.observes else M
    gamma = gamma_of(of_rows(damping, of, spread), of, times)
    return structure.inverse(fitted, gamma).blocks[0], fitted[0] if structure.observes else ()


def are_finite(arrays: list[Any]) -> Any:
    """Whether all entries are: whether their mean is, by products, which XLA compiles and runs in less time."""
    means = [_half_means(_half_means(jnp.atleast_1d(x)).ravel()) for x in arrays]
    return jnp.isfinite(jnp.stack(means)).all() if means else jnp.ones((), bool)


def _half_means(x: Any) -> Any:
    """Halves, for the rounding of a mean may pass the largest number."""
    return x @ jnp.full(x.shape[-1], 0.5 / max(x.shape[-1], 1), x.dtype)


def _dtype(M: Any) -> Any:
    return jax.tree.leaves(M)[0].dtype
