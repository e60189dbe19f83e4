"""One mini-batch of a `Network` as the `Problem` that `kfaclinalg.kfac_iteration` iterates on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfaclinalg import Factors, KFACOptions, LayerFactors, inner_products

from ._moments import Rows
from ._network import Network
from ._sites import cast, times
from ._traced import examples_of, inputs_of
from ._trees import by_name
from ._versions import varying

Matrices = tuple[Any, ...]
GAUSS = 0.5 - 12**-0.5, 0.5 + 12**-0.5  # the two points of [0, 1]
SMALL = 3e-3  # of h: below it the rounding of two passes exceeds the error of the rule


class Weights:
    """The parameters of a network as one matrix (or a batch of them) for each layer, all of one dtype."""

    def __init__(self, net: Network) -> None:
        traced = net.example
        self.layers, self.tree = traced.assembly.layers, jax.tree.structure(net.params)
        self.names, self.leaves, self.dtype = traced.names, traced.leaves, jnp.result_type(*traced.dtypes.values())

    def of(self, params: Any) -> Matrices:
        """The matrices of the parameters, or of what is shaped like them."""
        found = by_name(params)
        leaves = [found[name] for name in self.names]
        return tuple(layer.matrix(leaves).astype(self.dtype) for layer in self.layers)

    def params(self, weights: Matrices) -> Any:
        """The inverse of `of`, in the dtypes of the parameters."""
        shapes = [tuple(leaf.shape) for leaf in self.leaves]
        found: dict[int, Any] = {}
        for layer, W in zip(self.layers, weights, strict=True):
            found |= layer.back(W, shapes)
        empty = {i: jnp.zeros(shape) for i, shape in enumerate(shapes) if i not in found}
        leaves = [(found | empty)[i].astype(x.dtype) for i, x in enumerate(self.leaves)]
        return jax.tree.unflatten(self.tree, leaves)


class NetworkProblem:
    """h, ∇h, the factors and the exact Fisher's inner products of one mini-batch, inside a program.

    `fraction` is τ2; the key is that of the sampled targets and of the subsets S1 and S2. Where λ is `adapted` to it a
    small change of h is worth two passes more.
    """

    def __init__(
        self,
        net: Network,
        weights: Weights,
        batch: tuple[Any, Any, Any],
        options: KFACOptions,
        fraction: float,
        adapted: bool = True,
    ) -> None:
        self.net, self.weights, self.options, self.fraction, self.adapted = net, weights, options, fraction, adapted
        x, self.targets, key = batch
        self.inputs = inputs_of(x, net.inputs)
        self.sampling, self.of_S1, self.of_S2 = jax.random.split(key, 3)

    def loss_and_gradient(self, weights: Matrices) -> tuple[Any, Matrices]:
        """h and ∇h on S'."""
        params = varying(self.weights.params(weights), self.net.axis_name)
        z, pull = jax.vjp(lambda params: self.net.outputs_of(params, self.inputs), params)
        if check := getattr(self.net.likelihood, "check", None):
            check(z, self.targets)
        with jax.enable_x64(True):  # p - y of a good fit has few digits of p left
            wide, y = jax.tree.map(_in_double, (z, self.targets))
            loss, slope = jax.value_and_grad(self.net.likelihood.loss, allow_int=True)(wide, y)
            slope = jax.tree.map(cast, slope, z)
            self._start = weights, self._mean(loss)
        return self._start[1], self._mean(self.weights.of(pull(slope)[0]))

    def loss(self, weights: Matrices) -> Any:
        """h on S' after a step from where `loss_and_gradient` was taken.

        Two passes in float32 differ by their rounding. Where the change is small beside h it is ∫ ∇h(θ + tδ)ᵀ δ dt
        instead, of which only δ itself is rounded, by Gauss' rule of two points: its error falls as δ does.
        """
        after = self._loss(self.net.outputs_of(self.weights.params(weights), self.inputs))
        if self.weights.dtype != jnp.float32 or not self.adapted:
            return after
        start, h = self._start
        slopes = [self._slope(start, weights, t) for t in GAUSS]
        with jax.enable_x64(True):
            return jnp.where(abs(after - h) < SMALL * abs(h), h + sum(slopes) / 2, after)

    def _slope(self, start: Matrices, end: Matrices, t: float) -> Any:
        """∇h(θ + tδ)ᵀ δ, the sum over the outputs in float64."""
        delta = tuple(b - a for a, b in zip(start, end, strict=True))
        here = tuple(a + t * d for a, d in zip(start, delta, strict=True))
        params, tangents = self.weights.params(here), self.weights.params(delta)
        z, Jd = jax.jvp(lambda params: self.net.outputs_of(params, self.inputs), (params,), (tangents,))
        with jax.enable_x64(True):
            z, y, Jd = jax.tree.map(_in_double, (z, self.targets, Jd))
            return self._mean(jax.jvp(lambda z: self.net.likelihood.loss(z, y), (z,), (Jd,))[1])

    def factors(self, weights: Matrices, links: bool) -> Factors:
        """The second moments on S1, with targets from the model's own distribution."""
        x, y = self._subset(self.options.statistics_fraction, self.of_S1)
        params = self.weights.params(weights)
        _, _, self._seen = self.net.value_grad_and_statistics(params, x, y, key=self.sampling)
        moments = (self._seen.moments[layer.name] for layer in self.weights.layers)
        return Factors(tuple(jax.tree.map(lambda M: M.astype(self.weights.dtype), pair) for pair in moments))

    def squared_gradients(self, bases: Sequence[Any]) -> tuple[Any, ...]:
        """The means of (Q_Bᵀ ∇W Q_A)² over the S1 of `factors`: of a layer without rows what its A and G say."""
        found: list[Any] = []
        for layer, basis in zip(self.weights.layers, bases, strict=True):
            if isinstance(basis, LayerFactors):
                found.append(None)
            elif layer.name in self._seen.rows:
                found.append(self._mean(_squares_of_rows(basis, self._seen.rows[layer.name])))
            else:
                found.append(_squares_of_factors(basis, self._seen.moments[layer.name]))
        return tuple(found)

    def curvature_gram(self, weights: Matrices, directions: Sequence[Matrices]) -> Any:
        """(J d_i)ᵀ F_R (J d_j), mean over S2: one forward pass, and one of tangents a direction (Appendix C)."""
        x, _ = self._subset(self.fraction, self.of_S2)
        z, push = jax.linearize(lambda params: self.net.outputs_of(params, x), self.weights.params(weights))
        Jd = [push(self.weights.params(direction)) for direction in directions]
        N = examples_of(x)
        real = [i for i, t in enumerate(jax.tree.leaves(z)) if jnp.issubdtype(t.dtype, jnp.inexact)]
        with jax.enable_x64(True):  # 1 - p of a good fit too
            z, Jd = jax.tree.map(_in_double, (z, Jd))
            F_Jd = [jax.tree.map(lambda t: times(1 / N, t), self.net.likelihood.fisher_product(z, t)) for t in Jd]
            pairs = ([[jax.tree.leaves(t)[i] for i in real] for t in ts] for ts in (Jd, F_Jd))
            return self._mean(inner_products(*pairs))

    def _loss(self, outputs: Any) -> Any:
        """In float64: late in training the losses before and after a step differ in the last digits of float32."""
        with jax.enable_x64(True):
            z, y = jax.tree.map(_in_double, (outputs, self.targets))
            return self._mean(self.net.likelihood.loss(z, y))

    def _mean(self, x: Any) -> Any:
        """Over the devices of `shard_map`."""
        return x if self.net.axis_name is None else jax.lax.pmean(x, self.net.axis_name)

    def _subset(self, fraction: float, key: Any) -> tuple[Any, Any]:
        """A random fraction of the examples, one at least."""
        N = examples_of(self.inputs)
        size = max(1, round(fraction * N))
        if size == N:
            return self.inputs, self.targets
        chosen = jax.random.permutation(key, N)[:size]

        def some(tree: Any) -> Any:
            return jax.tree.map(lambda x: x[chosen] if x.shape[:1] == (N,) else x, tree)

        counts = self.net.examples(self.net.params, self.inputs).inputs
        inputs = tuple(some(x) if taken else x for x, taken in zip(self.inputs, counts, strict=True))
        return inputs, some(self.targets)


def _squares_of_rows(basis: Any, rows: Rows) -> Any:
    """Of ∇W = Σ_R g aᵀ of each example, summed over the draws."""
    Q_A, Q_B, turned = basis.Q_A[..., None, :, :], basis.Q_B[..., None, :, :], 0.0
    for a, g in zip(rows.a, rows.g, strict=True):
        turned = turned + jnp.einsum("d...nrj,...nri->d...nji", g @ Q_B, a @ Q_A)
    return jnp.square(turned).mean(-3).sum(0)


def _squares_of_factors(basis: Any, pair: LayerFactors) -> Any:
    a, g = (jnp.diagonal(Q.mT @ M @ Q, axis1=-2, axis2=-1) for Q, M in ((basis.Q_A, pair.A), (basis.Q_B, pair.G)))
    return g[..., :, None] * a[..., None, :]


def _in_double(x: Any) -> Any:
    return x.astype(jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x
