"""One mini-batch of a torch model as the `Problem` that `kfaclinalg.kfac_step` iterates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from kfaclinalg import Factors, KFACOptions, OuterProduct, batch_factors, homogeneous, moving_average

from ._layers import Layer, Use, captured, single_uses
from ._likelihoods import Likelihood
from ._once import Once

Matrices = tuple[Tensor, ...]


class Batch:
    """`inputs` (a tensor or a tuple of them) and `targets`, the examples along the first dimension of each.

    A subset holds only which `examples` it consists of, so that no more than a chunk of them is ever copied.
    """

    def __init__(self, inputs: Any, targets: Tensor, examples: Tensor | None = None, place: int = 0) -> None:
        self.examples = examples  # None: all
        self.place = place  # among the chunks of a batch
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.targets = targets
        if not self.inputs or not all(isinstance(x, Tensor) and x.ndim > 0 for x in (*self.inputs, targets)):
            raise ValueError("expected inputs (a tensor or a tuple of tensors) and targets (a tensor), the batch first")
        sizes = [x.shape[0] for x in (*self.inputs, targets)]
        if len(set(sizes)) > 1 or sizes[0] == 0:
            raise ValueError(f"inputs and targets have {sizes} examples, expected the same number > 0")

    def __len__(self) -> int:
        return int((self.targets if self.examples is None else self.examples).shape[0])

    def subset(self, fraction: float, generator: torch.Generator) -> Batch:
        """A random fraction of the examples, one at least."""
        size = max(1, round(fraction * len(self)))
        if size == len(self):
            return self
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        return Batch(self.inputs, self.targets, order[:size].to(self.targets.device))

    def chunks(self, size: int | None) -> Iterator[tuple[float, Batch]]:
        """The batch in pieces of at most `size` examples, each with its share of the whole."""
        size = size or len(self)
        for place, start in enumerate(range(0, len(self), size)):
            part = slice(start, start + size)
            examples: Any = part if self.examples is None else self.examples[part]
            piece = Batch(tuple(x[examples] for x in self.inputs), self.targets[examples], place=place)
            yield len(piece) / len(self), piece


class NetworkProblem:
    """h, ∇h, the factors and the exact Fisher's inner products of one mini-batch (`kfaclinalg.Problem`).

    All of one function: each pass sees the random numbers of the first, the masks of a dropout, and that alone moves
    the running statistics of a normalisation.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], likelihood: Likelihood, batch: Batch, options: KFACOptions
    ) -> None:
        self.model, self.layers, self.likelihood = model, layers, likelihood
        self.batch, self.options = batch, options
        self._once = Once(model)

    def loss_and_gradient(self, weights: Matrices) -> tuple[Tensor, Matrices]:
        """h and ∇h on S'; for a layer larger than the batch the `OuterProduct` of g and a, where that pays."""
        h: Any = 0.0
        gradient: Any = None
        outer = [self._keeps_outer(W) for W in weights]
        for share, piece in self._pieces(self.batch):
            with torch.enable_grad(), captured(self.layers) as uses:
                leaves = _leaves(weights)
                outputs = self._outputs(piece, *leaves)
                used = single_uses(uses)
                self._check(outputs, piece.targets)
                loss = share * self.likelihood.loss(outputs, piece.targets)
                sources: list[Any] = [
                    use.outputs if kept else W for kept, use, W in zip(outer, used, leaves, strict=True)
                ]
                slopes = torch.autograd.grad(loss, sources)
            layers = zip(outer, slopes, self._inputs(used), strict=True)
            parts = tuple(OuterProduct(g.mT, a.mT) if kept else g for kept, g, a in layers)
            h, gradient = h + loss.detach(), parts if gradient is None else tuple(map(add, gradient, parts))
        return h, gradient

    def loss(self, weights: Matrices) -> Tensor:
        """h on S'."""
        h: Any = 0.0
        for share, piece in self._pieces(self.batch):
            with torch.no_grad():
                h = h + share * self.likelihood.loss(self._outputs(piece, *weights), piece.targets)
        return h

    def factors(self, weights: Matrices, links: bool) -> Factors:
        """The second moments on S1, with targets sampled from the model's own distribution."""
        average: Any = None
        seen = 0.0
        batch = self._subset(self.options.statistics_fraction)
        chunked = len(batch) > (self.options.chunk_size or len(batch))
        sampled = self._sampled(batch, weights) if chunked else None
        for share, piece in self._pieces(batch):
            with torch.enable_grad(), captured(self.layers) as uses:
                outputs = self._outputs(piece, *_leaves(weights))
                used = single_uses(uses)
                targets = self._sample(outputs.detach()) if sampled is None else next(sampled)
                loss = len(piece) * self.likelihood.loss(outputs, targets)  # a sum: each g is that of one example
                g = torch.autograd.grad(loss, [use.outputs for use in used])
            moments = batch_factors(list(self._inputs(used)), g, links=links)
            average = moving_average(average, moments, decay=seen / (seen + share))
            seen += share
        return average

    def curvature_gram(self, weights: Matrices, directions: Sequence[Matrices]) -> Tensor:
        """(J d_i)ᵀ F_R (J d_j), mean over S2, from one forward-mode product a direction (Appendix C)."""
        total: Any = 0.0
        for share, piece in self._pieces(self._subset(self.options.curvature_fraction)):
            with torch.no_grad():
                pushed: list[Any] = [jvp(partial(self._outputs, piece), weights, d) for d in directions]
                products = [self.likelihood.fisher_product(outputs, Jd) for outputs, Jd in pushed]
                rows = [torch.stack([(Jd * FJe).sum(dtype=torch.float64) for FJe in products]) for _, Jd in pushed]
                total = total + share / len(piece) * torch.stack(rows)
        return total

    def _inputs(self, used: Sequence[Use]) -> Iterator[Tensor]:
        """a of each layer (N, n), with its column of ones where there is a bias."""
        for layer, use in zip(self.layers, used, strict=True):
            yield homogeneous(use.inputs) if layer.has_bias else use.inputs

    def _keeps_outer(self, W: Tensor) -> bool:
        """Whether G⁻¹ ∇h A⁻¹ is taken from the batch's own g and a (the end of Section 8)."""
        options, (m, n), N = self.options, W.shape, len(self.batch)
        whole = (options.chunk_size or N) >= N
        possible = whole and not options.weight_decay and options.structure == "block-diagonal"
        return possible and OuterProduct.pays((m, n), N)

    def _sampled(self, batch: Batch, weights: Matrices) -> Iterator[Tensor]:
        """Targets for each piece, drawn for all examples at once: the same ones whatever the chunks."""
        with torch.no_grad():
            outputs = torch.cat([self._outputs(piece, *weights) for _, piece in self._pieces(batch)])
        return iter(self._sample(outputs).split(self.options.chunk_size or len(batch)))

    def _sample(self, outputs: Tensor) -> Tensor:
        return self.likelihood.sample(outputs, self.options.generator)

    def _outputs(self, batch: Batch, *weights: Tensor) -> Tensor:
        """The model's outputs, with these weights in the place of its own."""
        parameters: dict[str, Tensor] = {}
        for layer, W in zip(self.layers, weights, strict=True):
            parameters |= layer.parameters(W)
        with self._once.passing(batch.place):
            return functional_call(self.model, parameters, batch.inputs)

    def _subset(self, fraction: float) -> Batch:
        return self.batch.subset(fraction, self.options.generator)

    def _pieces(self, batch: Batch) -> Iterator[tuple[float, Batch]]:
        return batch.chunks(self.options.chunk_size)

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        if check := getattr(self.likelihood, "check", None):
            check(outputs, targets)


def _leaves(weights: Matrices) -> Matrices:
    return tuple(W.detach().requires_grad_() for W in weights)
