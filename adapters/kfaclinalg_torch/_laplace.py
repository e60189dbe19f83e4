"""The factors as laplace-torch takes them, a parameter at a time."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ._blocks import Block, Dense
from ._curvature import Curvature
from ._embedding import Embedding
from ._entries import Entries
from ._fit import fit_curvature
from ._linear import Linear
from ._normalisation import Scale

LIKELIHOODS = {"classification": "categorical", "regression": "gaussian"}


def laplace_backend(**options: Any) -> type:
    """A class that `laplace.Laplace(..., backend=...)` takes for its Kronecker-factored curvature.

    Its `kron(x, y, N)` is that of `fit_curvature` with these options, "exact" unless told otherwise; all else is of
    laplace-torch's own generalised Gauss-Newton interface. It takes the weight and the bias of a layer apart, as all
    backends of laplace-torch do: `fit_curvature` itself keeps them together. What has no two factors, a grouped or
    transposed convolution or attention, is refused by name. Those of a tied weight stand for the sum over its uses in
    each batch, and so depend on the batches.

    Raises:
        ImportError: laplace-torch is not installed.
    """
    from laplace.curvature import GGNInterface
    from laplace.utils import Kron

    class KFACBackend(GGNInterface):
        def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:
            likelihood = LIKELIHOODS[str(getattr(self.likelihood, "value", self.likelihood))]
            inputs, M = (dict(x),) if isinstance(x, MutableMapping) else x, len(y)  # a mapping is its one argument
            with torch.no_grad():
                if self.last_layer:
                    outputs, inputs = self.model.forward_with_features(x)
                else:
                    outputs = self.model(x)
            trained = self.model.last_layer if self.last_layer else self.model
            curvature = fit_curvature(trained, likelihood, (inputs, y), progress=False, **options)
            # The mean of A over the data and the sum of G: what is added up over the batches.
            factors = [[M * f[0], *(M / N * A for A in f[1:])] for f in kronecker_factors(curvature)]
            return self.factor * self.lossfunc(outputs, y), Kron(factors)

    return KFACBackend


def kronecker_factors(curvature: Curvature) -> list[list[Tensor]]:
    """[G, A] of each weight and [G] of each bias, in the order of the model's parameters.

    Raises:
        ValueError: a parameter is of no single layer that has them.
    """
    passes = curvature._passes
    found: dict[Tensor, list[Tensor]] = {}
    for layer, pair in zip(passes.layers, curvature.factors.layers, strict=True):
        A, G = (M.to_dense() if hasattr(M, "to_dense") else M for M in pair)
        first, (weight, *bias) = layer.blocks[0], layer.parameters
        if isinstance(first, Scale):
            found |= {p: [torch.diag(G[:, i, i])] for i, p in enumerate(layer.parameters)}
        elif isinstance(first, Embedding):
            found[weight] = [A, G]
        elif weight.ndim == 1 and isinstance(first, Linear | Entries):  # a vector alone
            found[weight] = [G * A]
        elif A.ndim == 2 and isinstance(first, Dense) and _whole(first):
            n = len(A) - len(bias)
            found[weight] = [G, A[:n, :n]]
            found |= {p: [G * A[-1, -1]] for p in bias}
    trained = [(name, p) for name, p in passes.model.named_parameters() if p.requires_grad]
    if missing := [name for name, p in trained if p not in found]:
        raise ValueError(f"laplace-torch takes two factors of each weight, expected no {', '.join(missing)}")
    return [found[p] for _, p in trained]


def _whole(block: Block) -> bool:
    """Whether its W, beside the bias, has the entries of the weight in their order."""
    weight, *bias = block.parameters
    order = torch.arange(weight.numel()).reshape(weight.shape)
    W = block.matrix(lambda p: order if p is weight else torch.zeros(p.shape, dtype=order.dtype))
    return torch.equal(W[..., : W.shape[-1] - len(bias)].flatten(), order.flatten())
