"""A function of parameters and inputs as K-FAC sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _versions as versions
from ._estimators import Empirical, estimator_of
from ._gradients import relative_errors
from ._likelihoods import likelihood_of
from ._moments import Shown
from ._sharing import reduced_of
from ._sites import cast, wide
from ._statistics import Statistics, statistics_of
from ._traced import Examples, Traced, examples_in, inputs_of, shape_of
from ._trees import check_leaves

KEPT = ("moments", "rows")


class Network:
    """`f(params, *inputs) -> outputs` with the layers that were found in it, whichever library wrote it.

    f is traced, and every parameter is followed to the equations that use it. A product or a convolution with something
    that is no parameter is a layer, with the bias that is added to it; so are the rows that are taken from a table, and
    factors and terms for each channel (the scale and shift of a normalisation, an embedding of positions). `jit` and
    `remat` are looked into. Weights that a `scan` slices are a batch of matrices; those that it, or a second call, uses
    again see more rows. All other parameters get the diagonal of their Fisher matrix.

    Args:
        f: a pure function of any pytree of parameters, and of arrays of which the first dimension counts the examples.
        likelihood: of the outputs: "categorical" (logits in the last dimension), "bernoulli", "gaussian", or an object
            with the methods of `kfaclinalg_jax.Likelihood`.
        example: `(params, *inputs)`, arrays or `jax.ShapeDtypeStruct`: what f is called with.
        estimator: whose gradients G is made of. `Sampled(samples)`, short "sampled": of targets drawn from the model
            itself; `ExactFisher()`, "exact": the expectation over them; `Empirical()`, "empirical": of the loss itself.
        weight_sharing: of a layer that is used at many positions of an example, "expand" takes each position by itself,
            "reduce" the mean input and the summed gradient of the example; or a mapping of layers to settings.
        keep: what statistics hold, "moments", or "rows" too, which the structure "eigen" needs.
        axis_name: of the mesh, in `shard_map`, where the examples are divided over the devices; the example is then a
            device's own part, and the loss, the gradient and the moments are the means over them. None elsewhere: `jit`
            needs none.

    Attributes:
        layers: the shape of W, `(*stack, [batch], m, n)`, by the path of the weight; the bias is the last column.
        skipped: why a parameter has no layer, by its path: the primitive that uses it, and the line of the source.

    Raises:
        TypeError, ValueError: a wrong option, or no layer at all; the message lists what was skipped.

    >>> def f(params, x):
    ...     return jnp.tanh(x @ params["W"] + params["b"]) @ params["V"]
    >>> params = {"W": jnp.ones((2, 3)), "b": jnp.zeros(3), "V": jnp.ones((3, 4))}
    >>> net = Network(f, "categorical", example=(params, jnp.ones((8, 2))))
    >>> net.layers
    {'V': (4, 3), 'W': (3, 3)}
    >>> x, y, key = jnp.ones((8, 2)), jnp.zeros(8, int), jax.random.key(0)
    >>> loss, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
    >>> statistics.moments["W"].A.shape
    (3, 3)
    """

    def __init__(
        self,
        f: Callable[..., Any],
        likelihood: Any,
        *,
        example: Any,
        estimator: Any = "sampled",
        weight_sharing: Any = "expand",
        keep: str = "moments",
        axis_name: str | None = None,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f is {f!r}, expected a function of params and inputs")
        if not isinstance(example, tuple | list) or len(example) < 2:
            raise TypeError(f"example is a {type(example).__name__}, expected (params, *inputs)")
        if keep not in KEPT:
            raise ValueError(f"keep is {keep!r}, expected one of {', '.join(map(repr, KEPT))}")
        self.f, self.likelihood, self.keep, self.axis_name = f, likelihood_of(likelihood), keep, axis_name
        self.estimator = estimator_of(estimator, self.likelihood)
        params, *inputs = jax.tree.map(shape_of, tuple(example))
        self.params, self.inputs = params, tuple(inputs)  # shapes
        self._examples = examples_in(f, params, inputs)
        self.example = Traced(f, params, inputs, self._examples.axes)
        self.estimator.draws(self.example.outputs)  # which refuses outputs that it cannot take
        self.layers = {layer.name: layer.shape for layer in self.example.assembly.layers if layer.kind != "entries"}
        self.skipped = self.example.assembly.skipped
        self.reduced = reduced_of(weight_sharing, self.example.assembly.layers)
        if not self.layers:
            listed = "; ".join(f"{name}: {why}" for name, why in self.skipped.items())
            raise ValueError(f"f has no layer, expected one at least. Skipped: {listed or 'nothing, params are empty'}")

    def value_grad_and_statistics(self, params: Any, x: Any, y: Any, *, key: Any = None) -> tuple[Any, Any, Statistics]:
        """The mean loss, its gradient shaped like params, and the statistics of this batch.

        Args:
            params: as in the example.
            x: the input, or a tuple of inputs.
            y: the targets, as the likelihood takes them.
            key: the source of the sampled targets and of random signs. None: the empirical estimator needs none, where
                every parameter has a layer.

        Raises:
            ValueError: x and y do not fit, f has other layers at this batch, or the key is missing.
        """
        inputs = inputs_of(x, self.inputs)
        if key is None and not (isinstance(self.estimator, Empirical) and not self.example.has_entries):
            raise ValueError(f"key is None, expected a key of jax.random: estimator {self.estimator!r} draws")
        found = versions.without_explicit_axes(
            self._measured, lambda spec: (spec(None), jax.tree.map(spec, params), spec(None)), params, inputs, y, key
        )
        return found if self.axis_name is None else self._over_devices(*found)

    def _measured(self, params: Any, inputs: Any, y: Any, key: Any) -> tuple[Any, Any, Statistics]:
        params = versions.varying(jax.tree.map(jnp.asarray, params), self.axis_name)
        traced = self.traced(params, inputs)
        leaves, tree = jax.tree.flatten(params)
        probes = versions.varying(traced.probes(), self.axis_name)
        outputs, pull, seen = jax.vjp(lambda p, e: traced.run(p, inputs, e), leaves, probes, has_aux=True)
        numbers = jax.tree.map(wide, outputs)
        if check := getattr(self.likelihood, "check", None):
            check(numbers, y)
        loss, first = jax.value_and_grad(self.likelihood.loss, allow_int=True)(numbers, y)

        def back(cotangent: Any) -> Any:
            return pull(jax.tree.map(cast, cotangent, outputs))

        gradient, slopes_of_loss = back(first)
        if isinstance(self.estimator, Empirical) and not traced.has_entries:
            draws, slopes = 1, jax.tree.map(lambda g: traced.N * g, (gradient, slopes_of_loss))

            def drawn(draw: Any) -> Any:
                return slopes

        else:
            draws = self.estimator.draws(numbers)
            here = key if self.axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))

            def drawn(draw: Any) -> Any:
                return back(self.estimator.cotangent(self.likelihood, numbers, y, draw, here))

        shown = Shown(seen, traced.N, traced.dtypes, self.reduced)
        statistics = statistics_of(traced, shown, self.keep, draws, drawn, self.axis_name)
        return loss, jax.tree.unflatten(tree, gradient), statistics

    def _over_devices(self, loss: Any, gradient: Any, statistics: Statistics) -> tuple[Any, Any, Statistics]:
        """The means over the axis of `shard_map`; rows stay where they are."""
        means = jax.lax.pmean((loss, gradient, versions.varying(statistics.moments, self.axis_name)), self.axis_name)
        return means[0], means[1], statistics._replace(moments=means[2])

    def check(self, params: Any, x: Any) -> dict[str, float]:
        """Whether Σ g aᵀ is the gradient, for a random cotangent of the outputs: the relative error of each layer.

        Raises:
            ValueError: for a layer it is not, to a thousand times the rounding of its rows.
        """
        inputs = inputs_of(x, self.inputs)
        errors = {name: float(e) for name, e in jax.jit(self._errors)(params, inputs).items()}
        if wrong := {name: e for name, e in errors.items() if not e <= 1e3 * self.example.eps(name)}:
            raise ValueError(f"Σ g aᵀ is not the gradient, by these relative errors: {wrong}")
        return errors

    def traced(self, params: Any, inputs: Any) -> Traced:
        """The program for this batch.

        Raises:
            ValueError: it has other parameters or layers than that of the example.
        """
        self.check_params(params)
        traced = Traced(self.f, params, inputs, self.examples(params, inputs).axes)
        came, expected = (
            {layer.name: (layer.kind, layer.shape) for layer in t.assembly.layers} for t in (traced, self.example)
        )
        if came != expected:
            other = sorted(came.items() ^ expected.items())
            raise ValueError(
                f"f has other layers at these params and inputs (N = {traced.N}) than at the example "
                f"(N = {self.example.N}): {other}"
            )
        return traced

    def check_params(self, params: Any) -> None:
        """Refuse others than those of the example."""
        check_leaves("params", params, self.params, "the parameters of the network")

    def examples(self, params: Any, inputs: Any) -> Examples:
        """Which inputs and axes count the examples of this batch."""
        like = [jax.tree.leaves(jax.tree.map(shape_of, x)) for x in ((params, inputs), (self.params, self.inputs))]
        return self._examples if like[0] == like[1] else examples_in(self.f, params, inputs)

    def _errors(self, params: Any, inputs: Any) -> dict[str, Any]:
        return relative_errors(self.f, self.traced(params, inputs), params, inputs)
