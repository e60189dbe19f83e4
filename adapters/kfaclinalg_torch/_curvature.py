"""The curvature of a trained model as a value: its operator, its determinant, samples, variances and scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import BlockDiagonal, BlockTridiagonalInverse, Factors, Kronecker, KroneckerEigen, LayerFactors

from ._checkpoint import made, packed
from ._determinant import Determinant
from ._network import check_shapes
from ._passes import Passes
from ._scores import pairwise_scores, self_scores, variances
from ._settings import check_choice, check_generator
from ._spectra import at_device, indicator, network_of, one_a_layer, spectra_of, strength

PARTS = ("top", "low")


class Curvature:
    """The Fisher matrix F of a model over a data set, one block a layer, as `fit_curvature` gives it.

    Matrices Vs = (V_1, ..., V_l) are shaped like the weights of the layers, biases in the last column; `pack` and
    `unpack` go between them and tensors by the names of the parameters. F is a mean over the examples: the posterior
    precision of a Laplace approximation is `shifted(delta, scale=curvature.examples)`.
    """

    def __init__(
        self, passes: Passes, factors: Factors, examples: int, eigen: tuple[KroneckerEigen, ...] | None = None
    ) -> None:
        self._passes, self.factors, self.examples, self._corrected = passes, factors, examples, eigen

    @property
    def layers(self) -> dict[str, LayerFactors]:
        """A and G, by the names of the layers."""
        return dict(zip(self._passes.trained.names, self.factors.layers, strict=True))

    @property
    def fallback(self) -> dict[str, str]:
        """By their names the parameters of which the diagonal is taken, and why."""
        return dict(self._passes.trained.found.fallback)

    @property
    def skipped(self) -> dict[str, str]:
        """By their names the parameters that are left alone, and why."""
        return dict(self._passes.trained.found.skipped)

    @property
    def operator(self) -> BlockDiagonal:
        """F: of each layer a `Kronecker` or, of a structure with eigenvalues of its own, a `KroneckerEigen`."""
        if self._corrected is not None:
            return network_of(self._corrected)
        return network_of([Kronecker(A, G) for A, G in self.factors.layers])

    @cached_property
    def eigen(self) -> tuple[KroneckerEigen, ...]:
        """F of each layer by its eigenvalues: one decomposition, for every shift, power and function of it."""
        return spectra_of(self.factors) if self._corrected is None else self._corrected

    def shifted(self, delta: Any, scale: Any = 1.0) -> BlockDiagonal:
        """scale F + delta I, a `KroneckerEigen` a layer, without a new decomposition.

        Args:
            delta: a number > 0, a sequence of one a layer, or a tensor of either kind, of which there are gradients.
            scale: a number or a tensor; `examples` for the sum over the data.

        Raises:
            TypeError, ValueError: delta is not positive, or of another number of layers; scale is negative.
        """
        return network_of(self._shifted(delta, scale))

    def logdet(self, delta: Any, scale: Any = 1.0) -> Tensor:
        """log det (scale F + delta I), that of `shifted`, with its gradients, at a fraction of the time."""
        deltas, scale = one_a_layer("delta", delta, len(self.eigen)), strength("scale", scale, positive=True)
        same = all(d is deltas[0] for d in deltas)
        return self._determinant.logdet(deltas[:1] if same else deltas, scale).to(self._passes.dtype)

    def inverse(self, gamma: float) -> Any:
        """The inverse of F as the structure has it, damped by γ: F̆⁻¹, F̂⁻¹ or, exactly damped by γ², EKFAC's."""
        structure, fitted = self._passes.structure, self._corrected
        inverse = structure.inverse(structure.fitted(self.factors, None) if fitted is None else fitted, gamma)
        if isinstance(inverse, BlockTridiagonalInverse):
            return BlockTridiagonalInverse(inverse.Psi_A, inverse.Psi_G, network_of(inverse.Lambda).blocks)
        return network_of(inverse.blocks)

    def pack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Vs of tensors by the names of the parameters, as `named_parameters()` or gradients give them.

        Raises:
            TypeError, ValueError: a parameter is missing, or one has another shape.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(f"tensors is a {type(tensors).__name__}, expected a dictionary by the names of parameters")
        network, known = self._passes.trained.network, dict(self._passes.model.named_parameters())
        if missing := sorted(set(network.names.values()) - tensors.keys()):
            raise ValueError(f"tensors lack {', '.join(missing)}, got {', '.join(tensors) or 'none'}")
        for name, x in tensors.items():
            expected = tuple(known[name].shape) if name in known else None
            if not isinstance(x, Tensor):
                raise TypeError(f"{name!r} is a {type(x).__name__}, expected a tensor")
            if tuple(x.shape) != expected:
                raise ValueError(f"{name!r} has shape {tuple(x.shape)}, expected {expected or 'a name of the model'}")
        return tuple(
            V.to(self._passes.dtype) for V in network.matrices({p: tensors[n] for p, n in network.names.items()})
        )

    def unpack(self, Vs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of the parameters, the inverse of `pack`.

        Raises:
            TypeError, ValueError: another number of matrices, or one of another shape.
        """
        network = self._passes.trained.network
        check_shapes(Vs, self._shapes)
        values = network.parameters(tuple(V.to(p) for V, p in zip(Vs, self._first_parameters, strict=True)))
        return {name: value.detach().clone() for name, value in network.by_name(values).items()}

    def sample(
        self, generator: torch.Generator | None = None, *, delta: Any = 1.0, scale: Any = 1.0
    ) -> dict[str, Tensor]:
        """Parameters drawn from N(θ, P⁻¹) with P = scale F + delta I, by name, for `torch.func.functional_call`."""
        check_generator(generator)
        self._passes.trained.check_held("curvature")
        drawn: list[Any] = []
        for W, P in zip(self._passes.trained.network.weights(), self._shifted(delta, scale), strict=True):
            z = torch.randn(W.shape, generator=generator, dtype=self._passes.dtype, device=W.device)
            drawn.append(W + at_device(P.power(-0.5), W.device) @ z)
        return self.unpack(drawn)

    def variances(self, inputs: Any, *, delta: Any = 1.0, scale: Any = 1.0) -> Tensor:
        """J P⁻¹ Jᵀ (N, K, K) of each example with its K outputs, P = scale F + delta I, without a Jacobian in memory.

        What the outputs of the linearised model vary by under N(θ, P⁻¹). K backward passes. `inputs` is a batch of
        them, or a loader; of a pair (inputs, targets) the first.
        """
        return variances(self._passes, [P.inverse() for P in self._shifted(delta, scale)], inputs)

    def scores(self, queries: Any, examples: Any, *, damping: Any = None) -> Tensor:
        """The matrix (q, N) of ∇ℓ(query)ᵀ (F + δ I)⁻¹ ∇ℓ(example), with ℓ the likelihood's loss: the influence.

        Where it is positive a step that lowers the loss of the example lowers that of the query. Both are pairs
        (inputs, targets) or loaders of them. `damping` is δ, a number or one a layer; None: 0.1 of the mean eigenvalue
        of each layer.

        Raises:
            TypeError, ValueError: δ <= 0, nothing to score, or inputs that the model does not take.
        """
        return pairwise_scores(self._passes, self._damped(damping), queries, examples)

    def self_scores(self, examples: Any, *, damping: Any = None) -> Tensor:
        """∇ℓᵀ (F + δ I)⁻¹ ∇ℓ (N,) of each example with itself, as `scores` has it."""
        return self_scores(self._passes, self._damped(damping), examples)

    def projection(self, part: str, energy: float = 0.9) -> BlockDiagonal:
        """The projection on the "top" of the curvature, the fewest eigenvectors of each layer with this share of its
        trace, or on what is left, the "low" part, in which weights can move."""
        check_choice("part", part, PARTS)
        if not strength("energy", energy) <= 1:
            raise ValueError(f"energy is {energy!r}, expected a number in [0, 1]")
        return network_of([F.map(lambda s: indicator(s, energy, part == "top")) for F in self.eigen])

    def state_dict(self) -> dict[str, Any]:
        """All of it but the model, in tensors, numbers, lists and dictionaries."""
        passes, state = self._passes, packed({"factors": self.factors, "corrected": self._corrected})
        state |= {"examples": self.examples, "likelihood": type(passes.likelihood).__name__}
        state |= {"made": made(passes.structure, passes.estimator, passes.layers)}
        return state | {"gone": dict(passes.trained.gone)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the `state_dict`, for `load_curvature`."""
        torch.save(self.state_dict(), path)

    @cached_property
    def _determinant(self) -> Determinant:
        return Determinant([F.eigenvalues for F in self.eigen])

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(F.eigenvalues.shape) for F in self.eigen]

    @property
    def _first_parameters(self) -> list[Tensor]:
        return [layer.parameters[0] for layer in self._passes.layers]

    def _shifted(self, delta: Any, scale: Any = 1.0, name: str = "delta") -> list[KroneckerEigen]:
        deltas = one_a_layer(name, delta, len(self.eigen))
        scale = strength("scale", scale)
        return [F.map(lambda s: scale * s).shifted(d) for F, d in zip(self.eigen, deltas, strict=True)]

    def _damped(self, damping: Any) -> list[KroneckerEigen]:
        if damping is None:
            means: list[Any] = [F.eigenvalues.mean() for F in self.eigen]  # type: ignore[attr-defined]
            damping = [0.1 * torch.where(mean == 0, 1.0, mean) for mean in means]  # no gradient has reached a zero one
        return [P.inverse() for P in self._shifted(damping, name="damping")]
