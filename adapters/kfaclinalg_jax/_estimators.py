"""Whose gradients G is made of: the values of `estimator`, each with its own constants.

The gradients at a network's outputs whose second moment is its Fisher matrix there are sent back through it. What a
parameter of the fallback gets is the square of the sum over the examples, Σ_{n,k} <v_n v_k>, of which the terms n ≠ k
must go. Sampled gradients are independent with mean zero: they do, on average. The columns of the exact root, and the
gradients of the true loss, are not: with random signs ε_n, E[ε_n ε_k] = 0, they do, and v_n v_nᵀ stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from ._sites import times, wide


@dataclass(frozen=True)
class Sampled:
    """Of `samples` targets an example drawn from the model itself: unbiased (Section 5)."""

    samples: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            kind = ValueError if isinstance(self.samples, int | float) else TypeError
            raise kind(f"samples is {self.samples!r}, expected an integer >= 1")

    def draws(self, outputs: Any) -> int:
        return self.samples

    def cotangent(self, likelihood: Any, outputs: Any, targets: Any, draw: Any, key: Any) -> Any:
        """∂(sum of the losses)/∂z for targets from the model's own distribution, over √samples."""
        sampled = likelihood.sample(jax.lax.stop_gradient(outputs), jax.random.fold_in(key, draw))
        return jax.tree.map(lambda g: times(self.samples**-0.5, g), slope(likelihood, outputs, sampled))


@dataclass(frozen=True)
class ExactFisher:
    """Of the expectation over the targets: one backward pass for each output of an example.

    The likelihood must have `fisher_root`.
    """

    def draws(self, outputs: Any) -> int:
        if not hasattr(outputs, "shape"):
            raise ValueError(f"outputs are a {type(outputs).__name__}, expected one array (N, ..., units): {self!r}")
        return prod(outputs.shape[1:])

    def cotangent(self, likelihood: Any, outputs: Any, targets: Any, draw: Any, key: Any) -> Any:
        """A column r of a root of F_R, Σ r rᵀ = F_R: one a unit, at one position after the other, with random signs."""
        units, N = prod(outputs.shape[1:][-1:]), outputs.shape[0]
        root = likelihood.fisher_root(outputs, draw % units).reshape(N, -1, units)
        here = jnp.arange(root.shape[1]) == draw // units
        signs = jax.random.rademacher(jax.random.fold_in(key, draw), (N, 1, 1), outputs.dtype)
        return (signs * root * here[:, None]).reshape(outputs.shape)


@dataclass(frozen=True)
class Empirical:
    """Of the loss itself, at the data's own targets."""

    def draws(self, outputs: Any) -> int:
        return 1

    def cotangent(self, likelihood: Any, outputs: Any, targets: Any, draw: Any, key: Any) -> Any:
        """∂(sum of the losses)/∂z, with a random sign for each example."""

        def signed(g: Any) -> Any:
            signs = jax.random.rademacher(key, (len(g), *[1] * (g.ndim - 1)), int)
            return times(signs, g)

        return jax.tree.map(signed, slope(likelihood, outputs, targets))


ESTIMATORS: dict[str, Any] = {"sampled": Sampled, "exact": ExactFisher, "empirical": Empirical}


def estimator_of(estimator: Any, likelihood: Any) -> Any:
    """The value that a short form stands for; a value stays itself.

    Raises:
        ValueError: none of them, or the likelihood has not what it needs.
    """
    if isinstance(estimator, str) and estimator in ESTIMATORS:
        estimator = ESTIMATORS[estimator]()
    if not isinstance(estimator, tuple(ESTIMATORS.values())):
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(map(repr, ESTIMATORS))}")
    if isinstance(estimator, ExactFisher) and not hasattr(likelihood, "fisher_root"):
        raise ValueError(
            f"estimator {estimator!r} needs a likelihood with fisher_root(outputs, unit), got {likelihood!r}"
        )
    return estimator


def slope(likelihood: Any, outputs: Any, targets: Any) -> Any:
    """The gradient at the outputs of the sum of the examples' losses."""
    N = jax.tree.leaves(outputs)[0].shape[0]
    return jax.grad(lambda z: N * likelihood.loss(z, targets), allow_int=True)(jax.tree.map(wide, outputs))
