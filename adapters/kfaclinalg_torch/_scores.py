"""What gradients of single examples say with the inverse curvature: influence scores, variances of the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import KroneckerEigen

from ._batch import check_loader, is_pair
from ._estimators import slope_of_loss
from ._forms import by_layer, example_forms, in_basis, inner, turned_back, turning_pays, weighted
from ._likelihoods import Likelihood
from ._passes import Passes
from ._spectra import at_device


def pairwise_scores(passes: Passes, inverses: Sequence[KroneckerEigen], queries: Any, examples: Any) -> Tensor:
    """(q, N): the queries' gradients are preconditioned once, those of the examples come a batch at a time.

    Either both stay in the eigenbasis, or the queries are turned back once, where the examples are too dear to turn.
    """
    inverses = [at_device(P, passes.device) for P in inverses]
    with passes.open(), torch.no_grad():
        rows: list[list[Tensor]] = [
            [weighted(P, V) for P, V in zip(inverses, gradients, strict=True)]
            for piece in passes.pieces(queries, "queries")
            for gradients in by_layer(passes, piece, _of_the_loss)
        ]
        Us = [torch.cat(layer) for layer in zip(*rows, strict=True)]
        columns: list[Any] = []
        for piece in passes.pieces(examples, "examples"):
            for gradients in by_layer(passes, piece, _of_the_loss):
                if not columns:
                    turned = [turning_pays(len(U), V) for U, V in zip(Us, gradients, strict=True)]
                    Us = [U if turn else turned_back(P, U) for turn, P, U in zip(turned, inverses, Us, strict=True)]
                layers = zip(turned, inverses, Us, gradients, strict=True)
                columns.append(sum(inner(U, in_basis(P, V) if turn else V) for turn, P, U, V in layers))
    return torch.cat(columns, 1)


def self_scores(passes: Passes, inverses: Sequence[KroneckerEigen], examples: Any) -> Tensor:
    """(N,)."""
    inverses = [at_device(P, passes.device) for P in inverses]
    found: list[Any] = []
    with passes.open(), torch.no_grad():
        for piece in passes.pieces(examples, "examples"):
            for gradients in by_layer(passes, piece, _of_the_loss):
                found.append(sum(example_forms(P, [V])[:, 0, 0] for P, V in zip(inverses, gradients, strict=True)))
    return torch.cat(found)


def variances(passes: Passes, inverses: Sequence[KroneckerEigen], inputs: Any) -> Tensor:
    """(N, K, K), from one backward pass for each of the K outputs of an example."""
    loader = inputs if not isinstance(inputs, Tensor | tuple | dict) else [inputs]
    inverses = [at_device(P, passes.device) for P in inverses]
    found: list[Any] = []
    check_loader("inputs", loader)
    with passes.open(), torch.no_grad():
        passes.capture.mask_of = None  # the Jacobian is that of all positions
        for batch in loader:
            leaves = torch.utils._pytree.tree_leaves(batch)
            N = len(leaves[0]) if leaves else 0
            pair = batch if is_pair(batch) else (batch, torch.zeros(N, device=passes.device))
            for piece in passes.pieces(pair, "inputs"):
                columns = list(by_layer(passes, piece, _of_each_output))
                found.append(
                    sum(
                        example_forms(P, column) for P, column in zip(inverses, zip(*columns, strict=True), strict=True)
                    )
                )
    if not found:
        raise ValueError("inputs is empty, expected one batch or more")
    return torch.cat(found)


def _of_the_loss(likelihood: Likelihood, outputs: Tensor, piece: Any) -> Iterator[Tensor]:
    yield slope_of_loss(likelihood, outputs, piece.targets)


def _of_each_output(likelihood: Likelihood, outputs: Tensor, piece: Any) -> Iterator[Tensor]:
    flat = torch.zeros_like(outputs).reshape(len(outputs), -1)
    for k in range(flat.shape[1]):
        column = flat.clone()
        column[:, k] = 1.0
        yield column.reshape(outputs.shape)
