"""One mini-batch of a multi-layer perceptron as the `Problem` that `kfaclinalg.kfac_step` iterates on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, device

from kfaclinalg import Factors, KroneckerEigen, batch_factors, inner_products

from . import checks
from .activations import Activation
from .likelihoods import Likelihood
from .passes import Forward, Matrices, backward, forward, tangent


class MLPProblem:
    """h, ∇h, the factors and the exact Fisher's inner products of one mini-batch S' (`kfaclinalg.Problem`).

    `MLP.problem` makes it. All randomness is drawn from `rng` by NumPy, in this order: `factors` draws a permutation
    of the N examples, whose first round(statistics_fraction N), one at least, are S1, and then the noise of their
    targets; `curvature_gram` draws a permutation for S2. A subset that is the whole batch draws none. The other
    methods draw nothing.

    >>> import numpy as np
    >>> from kfaclinalg_mlp import MLP
    >>> x, weights = np.ones((4, 2)), (np.zeros((1, 3)),)
    >>> problem = MLP(["identity"], "gaussian").problem(x, x[:, :1], rng=np.random.default_rng(0))
    >>> problem.loss_and_gradient(weights)
    (np.float64(0.5), (array([[-1., -1., -1.]]),))
    >>> problem.curvature_gram(weights, [(np.ones((1, 3)),)])
    array([[9.]])
    """

    def __init__(
        self,
        activations: Sequence[Activation],
        likelihood: Likelihood,
        batch: tuple[Any, Any],
        rng: Any,
        fractions: tuple[float, float],
    ) -> None:
        self.activations, self.likelihood, self.rng = activations, likelihood, rng
        self.inputs, self.targets = batch
        self.statistics_fraction, self.curvature_fraction = fractions

    def loss_and_gradient(self, weights: Matrices) -> tuple[Any, tuple[Any, ...]]:
        """h and ∇h on S' (Algorithm 1); h in float64 where the device has it.

        Raises:
            TypeError, ValueError: the weights do not fit the inputs, or the targets the outputs.
        """
        run = self._forward(weights, self.inputs)
        h = self._loss(run.outputs)
        Dz = self.likelihood.gradient(run.outputs, self.targets) / self.inputs.shape[0]
        g = backward(weights, run, Dz)
        return h, tuple(g_i.mT @ a for g_i, a in zip(g, run.inputs, strict=True))

    def loss(self, weights: Matrices) -> Any:
        """h on S'; the errors are those of `loss_and_gradient`."""
        return self._loss(self._forward(weights, self.inputs).outputs)

    def factors(self, weights: Matrices, links: bool) -> Factors:
        """The second moments on S1, with targets sampled from the model's own distribution (Section 5).

        A row of g is the gradient of the loss of one example: it is not divided by N.

        Raises:
            TypeError, ValueError: the weights do not fit the inputs.
        """
        run = self._forward(weights, self._subset(self.statistics_fraction))
        z = run.outputs
        noise = self.likelihood.noise(self.rng, *z.shape)
        y = self.likelihood.sample(z, array_namespace(z).asarray(noise, dtype=z.dtype, device=device(z)))
        self._seen = run.inputs, backward(weights, run, self.likelihood.gradient(z, y))
        return batch_factors(*self._seen, links=links)

    def squared_gradients(self, bases: Sequence[KroneckerEigen]) -> tuple[Any, ...]:
        """The means of (Q_Bᵀ g aᵀ Q_A)² over the S1 of `factors`, for the structure "eigen"."""
        layers = zip(bases, *self._seen, strict=True)
        return tuple(((g @ F.Q_B) ** 2).mT @ (a @ F.Q_A) ** 2 / a.shape[0] for F, a, g in layers)

    def curvature_gram(self, weights: Matrices, directions: Sequence[Matrices]) -> Any:
        """(J d_i)ᵀ F_R (J d_j), mean over S2, from one forward pass and one of tangents a direction (Appendix C).

        The result (k, k) is in float64 where the device has it.

        Raises:
            TypeError, ValueError: the weights do not fit the inputs, or a direction the weights.
        """
        for i, direction in enumerate(directions):
            checks.check_direction(f"directions[{i}]", direction, weights)
        run = self._forward(weights, self._subset(self.curvature_fraction))
        Jd = [tangent(weights, run, direction) for direction in directions]
        F_Jd = [self.likelihood.fisher_product(run.outputs, t) / t.shape[0] for t in Jd]
        return inner_products([[t] for t in Jd], [[t] for t in F_Jd])

    def _forward(self, weights: Matrices, inputs: Any) -> Forward:
        checks.check_weights(weights, len(self.activations), inputs)
        return forward(self.activations, weights, inputs)

    def _loss(self, z: Any) -> Any:
        self.likelihood.check(z, self.targets)
        return self.likelihood.loss(z, self.targets)

    def _subset(self, fraction: float) -> Any:
        """The inputs of a random fraction of the examples, one at least."""
        N = self.inputs.shape[0]
        size = max(1, round(fraction * N))
        if size == N:
            return self.inputs
        xp = array_namespace(self.inputs)
        examples = xp.asarray(self.rng.permutation(N)[:size], device=device(self.inputs))
        return xp.take(self.inputs, examples, axis=0)
