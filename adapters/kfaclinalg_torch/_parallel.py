"""Algorithm 2 on many processes: each has a part of the mini-batch, and all take the step of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import KFACOptions

from ._batch import Batch
from ._capture import Capture
from ._likelihoods import masked
from ._network import Matrices
from ._part import Part, same_draws
from ._problem import NetworkProblem
from ._team import ALONE, Team
from ._trained import Trained


class ParallelProblem(NetworkProblem):
    """A `NetworkProblem` whose loss, gradient, factors and Gram matrix are means over the examples of all processes.

    Random numbers are drawn for the examples of all, and those of the others dropped, so that P processes with m/P
    examples each draw what one with m does. A likelihood must take as many whatever the outputs are.
    """

    batch: Part

    def loss_and_gradient(self, weights: Matrices) -> tuple[Tensor, Matrices]:
        h, gradient = weights[0].new_zeros(()), tuple(map(torch.zeros_like, weights))
        with self.team.agreed("the gradient"):
            if len(self.batch):
                h, gradient = super().loss_and_gradient(weights)
        h, *gradients = self._mean([h.double(), *gradient], self.batch, "the gradient")
        return h, tuple(gradients)

    def loss(self, weights: Matrices) -> Tensor:
        h = weights[0].new_zeros(())
        with self.team.agreed("the loss"):
            if len(self.batch):
                h = super().loss(weights)
        return self._mean([h.double()], self.batch, "the loss")[0]

    def curvature_gram(self, weights: Matrices, directions: Sequence[Matrices]) -> Tensor:
        with self.team.agreed("the curvature"):
            total = super().curvature_gram(weights, directions)
        k = len(directions)
        total = total if isinstance(total, Tensor) else weights[0].new_zeros(k, k, dtype=torch.float64)
        return self._mean([total], self._last, "the curvature")[0]

    def _take(self, batch: Batch, weights: Matrices) -> None:
        with self.team.agreed("the factors"):
            super()._take(batch, weights)
        sizes = self.team.told(len(batch), "the sizes of the parts")
        same_draws(self.team, self.options.generator, sizes.index(max(sizes)))  # who has no examples has drawn nothing

    def _mean(self, tensors: list[Tensor], batch: Batch, what: str) -> Sequence[Tensor]:
        """Over all processes, each with the weight of its examples."""
        (counted,) = self.team.sums([], [batch.counted], what)[1]
        return self.team.sums([batch.counted / max(counted, 1) * x for x in tensors], [], what)[0]

    def _subset(self, fraction: float) -> Batch:
        self._last = super()._subset(fraction)
        return self._last

    def _outer(self, weights: Matrices, uses: Any) -> dict[str, Any]:
        return {}  # a sum over processes is none

    def _cotangents(self, piece: Any, outputs: Tensor) -> Iterator[Tensor]:
        """Those of the outputs among the outputs of all, which are zero here."""
        whole, where = _spread(outputs, piece), _rows(outputs, piece)
        mask = None if piece.mask is None else _spread(piece.mask, piece)
        likelihood = masked(self.likelihood, mask, whole)
        for v in self.estimator.cotangents(likelihood, whole, piece.whole, self.options.generator):
            yield v[where]

    def _drawn(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.likelihood.sample(_spread(outputs, batch), self.options.generator)[_rows(outputs, batch)]


def _rows(x: Tensor, piece: Any) -> Tensor:
    """Where the rows of the piece's examples are among those of all; an example may have several."""
    R = len(x) // max(len(piece), 1)
    return (piece.where[:, None] * R + torch.arange(R)).flatten().to(x.device)


def _spread(x: Tensor, piece: Any) -> Tensor:
    whole = x.new_zeros(piece.whole * (len(x) // max(len(piece), 1)), *x.shape[1:])
    return whole.index_copy(0, _rows(x, piece), x)


BEGIN = ("the start of a step", "the iteration", "the options", "the layers", "the first weights")


def facts_of(optimizer: Any, team: Team) -> dict[str, Any]:
    """What must be the same in all processes; the weights, which then stay so, in the first step."""
    state, trained = optimizer._state, optimizer._trained
    if team.size == 1:
        return {}
    facts = [0 if state is None else state.iteration, optimizer.options._replace(generator=None), trained.names]
    if state is None:
        facts.append([p.detach().double().sum().item() for layer in trained.layers for p in layer.parameters])
    return dict(zip(BEGIN[1:], facts, strict=False))


def probe(trained: Trained, team: Team, batch: Batch, size: int | None, tensor_of: Any) -> None:
    """`Trained.probe` of all processes; one without examples learns from the others."""
    if trained.probed:
        return
    with team.agreed("the first pass"):
        for _, piece in islice(batch.chunks(size), 1):
            trained.probe(piece, tensor_of)
    trained.probed = True
    tell_gone(trained, team)


def tell_gone(trained: Trained, team: Team) -> None:
    """What a first pass has shown one process to be no layer is none to all."""
    gone = {name: why for some in team.told(dict(trained.gone), "the first pass") for name, why in some.items()}
    trained.without({layer: gone[layer.name] for layer in trained.layers if layer.name in gone})


def problem_of(
    optimizer: Any, batch: Batch, capture: Capture, options: KFACOptions, team: Team = ALONE
) -> NetworkProblem:
    """That of a batch; the optimizer's own options follow the τ2 that its state has come to."""
    state, trained = optimizer._state, optimizer._trained
    if state is not None and options is optimizer.options:
        options = options._replace(curvature_fraction=state.curvature_fraction)
    kind = NetworkProblem if team.size == 1 else ParallelProblem
    return kind(
        trained.network,
        capture,
        optimizer.likelihood,
        batch,
        options,
        estimator=optimizer.estimator,
        sharing=trained.sharing,
        tensor_of=optimizer._tensor_of,
        team=team,
    )
