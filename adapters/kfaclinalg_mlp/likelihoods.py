"""The likelihoods of a network's outputs z (N, m): loss, its gradient, samples and the Fisher matrix F_R (Appendix C).

Each loss is minus the log likelihood, summed over output units, mean over examples, and accumulated in float64 where
the device has it. z are natural parameters (logits, means), so that Dz = E[y] - y, and F_R is also the Hessian of the
loss with respect to z. A sample is a function of noise that NumPy draws: the same one on every namespace.
"""

from __future__ import annotations

from typing import Any, Protocol

from array_api_compat import array_namespace, device

from kfaclinalg import inner_products

from .activations import positive_part, sigmoid
from .checks import check_like_outputs, check_range


class Likelihood(Protocol):
    """What `MLPProblem` asks of a likelihood."""

    def check(self, z: Any, y: Any) -> None:
        """Raise where the targets do not fit the outputs."""

    def loss(self, z: Any, y: Any) -> Any: ...

    def gradient(self, z: Any, y: Any) -> Any:
        """Dz (N, m) of each example's own loss."""

    def noise(self, rng: Any, N: int, m: int) -> Any:
        """What `sample` needs of a `numpy.random.Generator`, in float64."""

    def sample(self, z: Any, noise: Any) -> Any:
        """Targets from the model's own distribution."""

    def fisher_product(self, z: Any, t: Any) -> Any:
        """F_R times the tangents (N, m), an example at a time."""


class Bernoulli:
    """p = sigmoid(z), targets in [0, 1]; F_R = diag(p (1 - p)). A sample is u < p, with u uniform on [0, 1)."""

    def check(self, z: Any, y: Any) -> None:
        check_like_outputs("bernoulli", z, y)
        check_range("bernoulli", y, 0, 1)

    def loss(self, z: Any, y: Any) -> Any:
        xp = array_namespace(z)
        # log(1 + exp z) - y z in a form that keeps its digits where p is close to y
        return _mean(positive_part(z) - y * z + xp.log1p(xp.exp(-xp.abs(z))))

    def gradient(self, z: Any, y: Any) -> Any:
        return sigmoid(z) - y

    def noise(self, rng: Any, N: int, m: int) -> Any:
        return rng.random((N, m))

    def sample(self, z: Any, noise: Any) -> Any:
        return array_namespace(z).astype(noise < sigmoid(z), z.dtype)

    def fisher_product(self, z: Any, t: Any) -> Any:
        p = sigmoid(z)
        return p * (1 - p) * t


class Categorical:
    """p = softmax(z), targets are class indices (N,); F_R = diag(p) - p pᵀ. A sample inverts the cumulative p at u."""

    def check(self, z: Any, y: Any) -> None:
        if y.ndim != 1 or y.shape[0] != z.shape[0]:
            raise ValueError(f"targets have shape {tuple(y.shape)}, expected class indices ({z.shape[0]},)")
        if not array_namespace(y).isdtype(y.dtype, "integral"):
            raise TypeError(f"targets have dtype {y.dtype}, expected integer class indices")
        check_range("categorical", y, 0, z.shape[1] - 1)

    def loss(self, z: Any, y: Any) -> Any:
        xp = array_namespace(z)
        z = z - xp.max(z, axis=1, keepdims=True)
        return _mean(xp.log(xp.sum(xp.exp(z), axis=1)) - xp.sum(_one_hot(z, y) * z, axis=1))

    def gradient(self, z: Any, y: Any) -> Any:
        return _softmax(z) - _one_hot(z, y)

    def noise(self, rng: Any, N: int, m: int) -> Any:
        return rng.random((N, 1))

    def sample(self, z: Any, noise: Any) -> Any:
        xp = array_namespace(z)
        c = xp.cumulative_sum(_softmax(z), axis=1)
        # u times the last c, not 1: past the last class with p > 0 no c is below it, however the sum was rounded
        return xp.count_nonzero(c < noise * c[:, -1:], axis=1)

    def fisher_product(self, z: Any, t: Any) -> Any:
        p = _softmax(z)
        return p * (t - array_namespace(z).sum(p * t, axis=1, keepdims=True))


class Gaussian:
    """Mean z and unit variance, the constant left out: ½ ‖y - z‖²; F_R = I. A sample is z plus normal noise."""

    def check(self, z: Any, y: Any) -> None:
        check_like_outputs("gaussian", z, y)

    def loss(self, z: Any, y: Any) -> Any:
        return _mean(0.5 * (z - y) ** 2)

    def gradient(self, z: Any, y: Any) -> Any:
        return z - y

    def noise(self, rng: Any, N: int, m: int) -> Any:
        return rng.standard_normal((N, m))

    def sample(self, z: Any, noise: Any) -> Any:
        return z + noise

    def fisher_product(self, z: Any, t: Any) -> Any:
        return t


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Bernoulli(),
    "categorical": Categorical(),
    "gaussian": Gaussian(),
}


def _mean(losses: Any) -> Any:
    """Over the examples, of the sums; in float64: late in training ρ compares losses that differ in the sixth digit."""
    shares = array_namespace(losses).ones_like(losses) / losses.shape[0]
    return inner_products([[losses]], [[shares]])[0, 0]


def _softmax(z: Any) -> Any:
    xp = array_namespace(z)
    e = xp.exp(z - xp.max(z, axis=1, keepdims=True))
    return e / xp.sum(e, axis=1, keepdims=True)


def _one_hot(z: Any, y: Any) -> Any:
    xp = array_namespace(z)
    return xp.astype(xp.arange(z.shape[1], dtype=y.dtype, device=device(y)) == y[:, None], z.dtype)
