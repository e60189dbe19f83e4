"""The likelihoods of a network's outputs z: loss, samples and the Fisher matrix F_R of the outputs (Appendix C).

Each loss is minus the log likelihood, summed over output units, mean over examples. z are natural parameters
(logits, means), for which F_R is also the Hessian of the loss with respect to z.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Likelihood(Protocol):
    """What a `Network` asks of a likelihood, one of your own too.

    Where it has `fisher_root(outputs, unit)` too, r with Σ r rᵀ = F_R over the units, the exact estimator works. It may
    have `check(outputs, targets)`, which raises a ValueError for shapes that do not fit.
    """

    def loss(self, outputs: Any, targets: Any) -> Any:
        """The mean over the examples."""

    def sample(self, outputs: Any, key: Any) -> Any:
        """Targets drawn from the model's own distribution."""

    def fisher_product(self, outputs: Any, tangents: Any) -> Any:
        """F_R times the tangents, an example at a time; shaped like the outputs."""


class Bernoulli:
    """p = sigmoid(z), targets in [0, 1]; F_R = diag(p (1 - p))."""

    def check(self, outputs: Any, targets: Any) -> None:
        _check_shape("bernoulli", outputs, targets)

    def loss(self, outputs: Any, targets: Any) -> Any:
        return _mean(jnp.maximum(outputs, 0) - outputs * targets + jnp.log1p(jnp.exp(-jnp.abs(outputs))))

    def sample(self, outputs: Any, key: Any) -> Any:
        return jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype)

    def fisher_product(self, outputs: Any, tangents: Any) -> Any:
        p = jax.nn.sigmoid(outputs)
        return p * (1 - p) * tangents

    def fisher_root(self, outputs: Any, unit: Any) -> Any:
        p = jax.nn.sigmoid(outputs)
        return jnp.sqrt(p * (1 - p)) * _one_hot(outputs, unit)


class Categorical:
    """p = softmax(z) over the last dimension, targets are class indices (N, ...); F_R = diag(p) - p pᵀ."""

    def check(self, outputs: Any, targets: Any) -> None:
        _check_arrays(outputs, targets)
        if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"targets have shape {targets.shape} for outputs of shape {outputs.shape}, "
                "expected class indices (N, ...) for outputs (N, ..., classes)"
            )
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(f"targets have dtype {targets.dtype}, expected integer class indices")

    def loss(self, outputs: Any, targets: Any) -> Any:
        logs = jax.nn.log_softmax(outputs, axis=-1)
        return _mean(-jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0])

    def sample(self, outputs: Any, key: Any) -> Any:
        return jax.random.categorical(key, outputs)

    def fisher_product(self, outputs: Any, tangents: Any) -> Any:
        p = jax.nn.softmax(outputs, axis=-1)
        weighted = p * tangents
        return weighted - p * weighted.sum(-1, keepdims=True)

    def fisher_root(self, outputs: Any, unit: Any) -> Any:
        p = jax.nn.softmax(outputs, axis=-1)
        return jnp.sqrt(jnp.take(p, unit, axis=-1))[..., None] * (_one_hot(outputs, unit) - p)


class Gaussian:
    """Mean z and unit variance, the constant left out: ½ ‖y - z‖²; F_R = I."""

    def check(self, outputs: Any, targets: Any) -> None:
        _check_shape("gaussian", outputs, targets)

    def loss(self, outputs: Any, targets: Any) -> Any:
        return _mean(0.5 * jnp.square(targets - outputs))

    def sample(self, outputs: Any, key: Any) -> Any:
        return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)

    def fisher_product(self, outputs: Any, tangents: Any) -> Any:
        return tangents

    def fisher_root(self, outputs: Any, unit: Any) -> Any:
        return _one_hot(outputs, unit)


LIKELIHOODS: dict[str, Any] = {"bernoulli": Bernoulli(), "categorical": Categorical(), "gaussian": Gaussian()}


def likelihood_of(likelihood: Any) -> Any:
    """The one that a name stands for; an object with the methods stays itself.

    Raises:
        ValueError: an unknown name, or an object without `loss` and `sample`.
    """
    if isinstance(likelihood, type):
        raise TypeError(f"likelihood is the class {likelihood.__name__}, expected an object, {likelihood.__name__}()")
    if not isinstance(likelihood, str):
        missing = [name for name in ("loss", "sample") if not hasattr(likelihood, name)]
        if missing:
            raise ValueError(f"likelihood {likelihood!r} lacks the methods {', '.join(missing)}")
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood is {likelihood!r}, expected one of {', '.join(map(repr, LIKELIHOODS))}")
    return LIKELIHOODS[likelihood]


def _mean(losses: Any) -> Any:
    return losses.sum() / losses.shape[0]


def _one_hot(outputs: Any, unit: Any) -> Any:
    return jnp.zeros_like(outputs).at[..., unit].set(1) if outputs.ndim > 1 else jnp.ones_like(outputs)


def _check_arrays(outputs: Any, targets: Any) -> None:
    for name, x in (("outputs", outputs), ("targets", targets)):
        if not hasattr(x, "shape"):
            raise TypeError(f"{name} are a {type(x).__name__}, expected an array")


def _check_shape(name: str, outputs: Any, targets: Any) -> None:
    _check_arrays(outputs, targets)
    if targets.shape != outputs.shape:
        raise ValueError(f"targets have shape {targets.shape}, expected {outputs.shape}, that of the outputs ({name})")
