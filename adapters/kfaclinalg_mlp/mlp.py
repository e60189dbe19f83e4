"""The multi-layer perceptron of the paper's Section 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import checks
from .activations import ACTIVATIONS
from .likelihoods import LIKELIHOODS
from .passes import Matrices, forward
from .problem import MLPProblem


@dataclass(frozen=True)
class MLP:
    """s_i = W_i ā_{i-1}, a_i = φ_i(s_i), and a likelihood of targets given the outputs z = a_l (Section 2.1).

    It holds no weights: a method takes a tuple of them, one (m, n + 1) array a layer with the bias in the last column.
    They may be arrays of any namespace; they, the inputs and the targets share it, the device and the dtype, float32
    or float64.

    Args:
        activations: one of "tanh", "sigmoid", "relu", "identity" a layer, the output layer's too.
        likelihood: "bernoulli" (outputs are logits, targets lie in [0, 1]), "categorical" (logits; targets are class
            indices (N,)) or "gaussian" (means, unit variance). The loss is minus its logarithm, summed over output
            units, mean over examples; that of "gaussian" leaves out the constant.

    Raises:
        ValueError: no activation, an unknown one, or an unknown likelihood.

    >>> import numpy as np
    >>> from kfaclinalg import KFACOptions, kfac_step
    >>> from kfaclinalg_mlp import sparse_weights
    >>> rng = np.random.default_rng(0)
    >>> x = rng.choice([-1.0, 1.0], size=(256, 4))
    >>> y = np.asarray(x.prod(axis=1) > 0, dtype=np.int64)  # their parity
    >>> mlp = MLP(["tanh", "identity"], "categorical")
    >>> weights, state = sparse_weights((4, 16, 2), rng=rng), None
    >>> for _ in range(50):
    ...     weights, state, info = kfac_step(mlp.problem(x, y, rng=rng), weights, state, KFACOptions(damping=0.1))
    >>> bool((mlp.outputs(weights, x).argmax(axis=1) == y).all())
    True
    """

    activations: Sequence[str]
    likelihood: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", tuple(self.activations))
        if not self.activations:
            raise ValueError("activations is empty, expected one a layer")
        for i, name in enumerate(self.activations):
            checks.check_choice(f"activations[{i}]", name, ACTIVATIONS)
        checks.check_choice("likelihood", self.likelihood, LIKELIHOODS)

    def outputs(self, weights: Matrices, inputs: Any) -> Any:
        """z (N, m_l) of inputs (N, n_1): logits, or means.

        Raises:
            TypeError, ValueError: an array has the wrong shape, dtype, namespace or device; no examples; not one
                weight matrix for each activation.

        >>> import numpy as np
        >>> MLP(["relu"], "gaussian").outputs((np.asarray([[1.0, -2.0, 0.5]]),), np.asarray([[2.0, 1.0], [1.0, 1.0]]))
        array([[0.5],
               [0. ]])
        """
        checks.check_inputs(inputs)
        checks.check_weights(weights, len(self.activations), inputs)
        return forward(self._functions, weights, inputs).outputs

    def problem(
        self,
        inputs: Any,
        targets: Any,
        *,
        rng: Any,
        statistics_fraction: float = 1 / 8,
        curvature_fraction: float = 1 / 4,
    ) -> MLPProblem:
        """The mini-batch S' of inputs (N, n_1) and targets (N, ...) as `kfaclinalg.kfac_step` takes it.

        Args:
            inputs: one example a row.
            targets: what the likelihood takes.
            rng: the `numpy.random.Generator` of the subsets and the sampled targets; `MLPProblem` gives the order of
                its draws.
            statistics_fraction: τ1 = `|S1| / |S'|` (Section 8).
            curvature_fraction: τ2 = `|S2| / |S'|` (Section 8); in a long run `KFACState.curvature_fraction`.

        Raises:
            TypeError, ValueError: an array or `rng` is no such thing; no examples, or not as many targets; a namespace,
                device or dtype differs; a fraction is outside (0, 1]. Shapes and ranges that depend on the weights are
                checked when they come.
        """
        checks.check_inputs(inputs)
        checks.check_targets(targets, inputs)
        checks.check_generator(rng)
        checks.check_fraction("statistics_fraction", statistics_fraction)
        checks.check_fraction("curvature_fraction", curvature_fraction)
        fractions = (statistics_fraction, curvature_fraction)
        return MLPProblem(self._functions, LIKELIHOODS[self.likelihood], (inputs, targets), rng, fractions)

    @property
    def _functions(self) -> list[Any]:
        return [ACTIVATIONS[name] for name in self.activations]
