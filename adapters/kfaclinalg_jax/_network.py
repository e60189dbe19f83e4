"""A function of parameters and inputs as K-FAC sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ._estimators import Empirical, estimator_of
from ._gradients import relative_errors
from ._likelihoods import likelihood_of
from ._measure import measured
from ._sharing import reduced_of
from ._sites import wide
from ._statistics import Statistics
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
        outputs: a function from what f returns to that of which the likelihood is, where f returns more, such as the
            new running means of a normalisation. None: all of it.
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

    >>> import jax.numpy as jnp
    >>> def f(params, x):
    ...     return jnp.tanh(x @ params["W"] + params["b"]) @ params["V"]
    >>> params = {"W": jnp.ones((2, 3)), "b": jnp.zeros(3), "V": jnp.ones((3, 4))}
    >>> net = Network(f, "categorical", example=(params, jnp.ones((8, 2))))
    >>> net.layers
    {'V': (4, 3), 'W': (3, 3)}
    >>> x, y, key = jnp.ones((8, 2)), jnp.zeros(8, int), jax.random.key(0)
    >>> (loss, outputs), gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
    >>> statistics.moments["W"].A.shape
    (3, 3)
    """

    def __init__(
        self,
        f: Callable[..., Any],
        likelihood: Any,
        *,
        example: Any,
        outputs: Callable[[Any], Any] | None = None,
        estimator: Any = "sampled",
        weight_sharing: Any = "expand",
        keep: str = "moments",
        axis_name: str | None = None,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f is {f!r}, expected a function of params and inputs")
        if not isinstance(example, tuple | list) or len(example) < 2:
            raise TypeError(f"example is a {type(example).__name__}, expected (params, *inputs)")
        if outputs is not None and not callable(outputs):
            raise TypeError(f"outputs is {outputs!r}, expected a function of what f returns")
        if keep not in KEPT:
            raise ValueError(f"keep is {keep!r}, expected one of {', '.join(map(repr, KEPT))}")
        self.f, self.likelihood, self.keep, self.axis_name = f, likelihood_of(likelihood), keep, axis_name
        self.estimator = estimator_of(estimator, self.likelihood)
        params, *inputs = jax.tree.map(shape_of, tuple(example))
        self.params, self.inputs = params, tuple(inputs)  # shapes
        self._examples = examples_in(f, params, inputs)
        self.example = Traced(f, params, inputs, self._examples.axes)
        self.select = outputs or (lambda found: found)
        self.outputs = jax.eval_shape(self.select, self.example.outputs)  # shapes
        self.draws = self.estimator.draws(self.outputs)  # which refuses outputs that it cannot take
        self.layers = {layer.name: layer.shape for layer in self.example.assembly.layers if layer.kind != "entries"}
        self.skipped = self.example.assembly.skipped
        self.reduced = reduced_of(weight_sharing, self.example.assembly.layers)
        if not self.layers:
            listed = "; ".join(f"{name}: {why}" for name, why in self.skipped.items())
            raise ValueError(f"f has no layer, expected one at least. Skipped: {listed or 'nothing, params are empty'}")

    def value_grad_and_statistics(self, params: Any, x: Any, y: Any, *, key: Any = None) -> tuple[Any, Any, Statistics]:
        """`((loss, found), gradient, statistics)` of this batch: the mean loss, and what f returns.

        The gradient is shaped like params.

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
        return measured(self, params, inputs, y, key)

    def outputs_of(self, params: Any, inputs: Any) -> Any:
        """What the likelihood is of, half precision widened."""
        return jax.tree.map(wide, self.select(self.f(params, *inputs)))

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
        return relative_errors(self.f, self.select, self.traced(params, inputs), params, inputs)
