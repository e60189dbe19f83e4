"""One mini-batch of a torch model as the `Problem` that `kfaclinalg.kfac_step` iterates on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from kfaclinalg import Factored, Factors, KFACOptions, LayerFactors, OuterProduct, batch_factors

from ._attention import differentiable
from ._batch import Batch
from ._capture import Capture
from ._estimators import Sampled, cotangent
from ._gather import gather
from ._likelihoods import Likelihood, masked
from ._linear import Linear
from ._links import chained, cross_moments
from ._network import Matrices, Network
from ._once import Once
from ._pushforward import pushforward
from ._squares import mean_squares
from ._statistics import Held, Statistic
from ._team import ALONE, Team
from ._use import Use


class NetworkProblem:
    """h, ∇h, the factors and the exact Fisher's inner products of one mini-batch (`kfaclinalg.Problem`).

    All of one function: each pass over the same examples sees the random numbers of the first, the masks of a dropout,
    and that alone moves the running statistics of a normalisation. Attention takes the one way that has products with
    the Jacobian.
    """

    def __init__(
        self,
        network: Network,
        capture: Capture,
        likelihood: Likelihood,
        batch: Batch,
        options: KFACOptions,
        *,
        estimator: Any,
        sharing: Mapping[str, str],
        tensor_of: Callable[[Any], Tensor],
        team: Team = ALONE,
    ) -> None:
        self.network, self.capture, self.likelihood = network, capture, likelihood
        self.batch, self.options, self.tensor_of = batch, options, tensor_of
        self.estimator, self.sharing, self.team = estimator, sharing, team
        self._once = Once(network.model)

    def loss_and_gradient(self, weights: Matrices) -> tuple[Tensor, Matrices]:
        """h and ∇h on S'; for a layer larger than the batch the `OuterProduct` of g and a, where that pays."""
        h: Any = 0.0
        gradient: Any = None
        for share, piece in self._pieces(self.batch):
            leaves, outputs, uses = self._shown(piece, weights)
            likelihood = masked(self.likelihood, piece.mask, outputs)
            if check := getattr(likelihood, "check", None):
                check(outputs, piece.targets)
            with torch.enable_grad():
                loss = share * likelihood.loss(outputs, piece.targets)
            outer = self._outer(weights, uses)
            apart = {p for layer in self.network.layers if layer.name in outer for p in layer.parameters}
            dense = [p for p in leaves if p not in apart]
            edges: list[Any] = [use.outputs for use in outer.values()]
            slopes = torch.autograd.grad(loss, [*(leaves[p] for p in dense), *edges], allow_unused=True)
            gradients = dict(zip(dense, slopes, strict=False))
            self._check_used(gradients)
            of_uses = dict(zip(outer, slopes[len(dense) :], strict=True))
            parts = tuple(
                _outer_product(outer[layer.name], of_uses[layer.name])
                if layer.name in outer
                else layer.matrix(gradients.__getitem__)
                for layer in self.network.layers
            )
            h, gradient = h + loss.detach(), parts if gradient is None else tuple(map(add, gradient, parts))
        return h, gradient

    def loss(self, weights: Matrices) -> Tensor:
        """h on S'."""
        h: Any = 0.0
        values = self.network.by_name(self.network.parameters(weights))
        for share, piece in self._pieces(self.batch):
            with torch.no_grad():
                outputs = self._outputs(piece, values)
                h = h + share * masked(self.likelihood, piece.mask, outputs).loss(outputs, piece.targets)
        return h

    def factors(self, weights: Matrices, links: bool) -> Factors:
        """The second moments on S1, with targets from the model's own distribution."""
        layers, keep = self.network.layers, links or self.options.structure_value.observes
        blocks = [block for layer in layers for block in layer.blocks]
        self._statistic = Statistic(blocks, self.sharing, weights[0].dtype, keep, self.team)
        self._take(self._subset(self.options.statistics_fraction), weights)
        moments = {name: _factors(M) for name, M in self._statistic.moments(1.0).items()}
        self._moments = [(layer, layer.factors(moments) or layer.no_factors()) for layer in layers]
        found = tuple(M for _, M in self._moments)
        return Factors(found, cross_moments(self._statistic, chained(layers), 1.0) if links else ())

    def squared_gradients(self, bases: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """The means of (Q_Bᵀ ∇W Q_A)² over the S1 of `factors`, for the structure "eigen"."""
        pairs = zip(self._moments, bases, strict=True)
        return tuple(mean_squares(self._statistic, layer, F, M, 1.0) for (layer, M), F in pairs)

    def curvature_gram(self, weights: Matrices, directions: Sequence[Matrices]) -> Tensor:
        """(J d_i)ᵀ F_R (J d_j), mean over S2, from one forward-mode product a direction (Appendix C)."""
        total: Any = 0.0
        values, *tangents = (self.network.by_name(self.network.parameters(W)) for W in (weights, *directions))
        for share, piece in self._pieces(self._subset(self.options.curvature_fraction)):
            with torch.no_grad():
                pushed = [pushforward(partial(self._outputs, piece), values, d) for d in tangents]
                likelihood = masked(self.likelihood, piece.mask, pushed[0][0])
                products = [likelihood.fisher_product(outputs, Jd) for outputs, Jd in pushed]
                rows = [torch.stack([(Jd * FJe).sum(dtype=torch.float64) for FJe in products]) for _, Jd in pushed]
                total = total + share / max(piece.counted, 1) * torch.stack(rows)
        return total

    def _take(self, batch: Batch, weights: Matrices) -> None:
        """Into the statistic with these examples."""
        chunked = len(batch) > (self.options.chunk_size or len(batch))
        sampled = self._sampled(batch, weights) if chunked and self.estimator == Sampled() else None
        for _, piece in self._pieces(batch):
            leaves, outputs, uses = self._shown(piece, weights)
            likelihood = masked(self.likelihood, piece.mask, outputs)
            own = sampled and iter([cotangent(likelihood, outputs, next(sampled))])
            gather(self._statistic, uses, leaves, outputs, own or self._cotangents(piece, outputs), self.capture.now)

    def _cotangents(self, piece: Batch, outputs: Tensor) -> Iterator[Tensor]:
        likelihood = masked(self.likelihood, piece.mask, outputs)
        return self.estimator.cotangents(likelihood, outputs, len(piece), self.options.generator)

    def _shown(self, piece: Batch, weights: Matrices) -> tuple[dict[Tensor, Tensor], Tensor, list[Use]]:
        """The parameters as leaves of autograd's graph, the outputs, and what the pass has shown."""
        parameters = self.network.parameters(weights).items()
        leaves = {p: value.detach().requires_grad_() for p, value in parameters}
        self.capture.uses, self.capture.paused = [], False
        try:
            with torch.enable_grad():
                return leaves, self._outputs(piece, self.network.by_name(leaves)), self.capture.uses
        finally:
            self.capture.paused = True

    def _outputs(self, piece: Batch, values: dict[str, Tensor]) -> Tensor:
        """The model's outputs, with these parameters in the place of its own."""
        with self._once.passing(piece.place), differentiable():
            self.capture.mask_of = lambda *args, **kwargs: piece.mask
            model: Any = lambda *args, **kwargs: functional_call(self.network.model, values, args, kwargs)  # noqa: E731
            return self.tensor_of(piece.call(model))

    def _outer(self, weights: Matrices, uses: Sequence[Use]) -> dict[str, Use]:
        """The use of each layer of which G⁻¹ ∇h A⁻¹ is taken from the batch's own g and a (the end of Section 8)."""
        options, N = self.options, len(self.batch)
        whole = (options.chunk_size or N) >= N
        if not whole or options.weight_decay or not isinstance(options.structure_value, Factored):
            return {}
        found = {}
        for layer, W in zip(self.network.layers, weights, strict=True):
            block = layer.dense
            own = [use for use in uses if use.block is block]
            plain = isinstance(block, Linear) and block.whole and len(own) == 1 and own[0].inputs.ndim == 2
            if plain and own[0].mask is None and not own[0].single and OuterProduct.pays((W.shape[0], W.shape[1]), N):
                found[layer.name] = own[0]
        return found

    def _sampled(self, batch: Batch, weights: Matrices) -> Iterator[Tensor]:
        """Targets for each piece, drawn for all examples at once: the same ones whatever the chunks."""
        values = self.network.by_name(self.network.parameters(weights))
        with torch.no_grad():
            outputs = torch.cat([self._outputs(piece, values) for _, piece in self._pieces(batch)])
        return iter(self._drawn(outputs, batch).split(self.options.chunk_size or len(batch)))

    def _drawn(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.likelihood.sample(outputs, self.options.generator)

    def _subset(self, fraction: float) -> Batch:
        return self.batch.subset(fraction, self.options.generator)

    def _pieces(self, batch: Batch) -> Iterator[tuple[float, Batch]]:
        return batch.chunks(self.options.chunk_size)

    def _check_used(self, gradients: Mapping[Tensor, Tensor | None]) -> None:
        if unused := [self.network.names[p] for p, g in gradients.items() if g is None]:
            raise ValueError(f"expected every trained parameter in a forward pass, got nothing of {', '.join(unused)}")


def _outer_product(use: Use, g: Tensor) -> OuterProduct:
    block: Any = use.block
    return OuterProduct(g.mT, block.inputs(use.inputs, len(use.inputs))[:, 0].mT)


def _factors(moments: LayerFactors | Held) -> LayerFactors:
    return batch_factors([moments.a], [moments.g]).layers[0] if isinstance(moments, Held) else moments
