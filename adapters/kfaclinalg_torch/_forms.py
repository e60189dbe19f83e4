"""Gradients of single examples, and their quadratic forms, without forming them where they are sums of few g aᵀ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, KroneckerEigen, OuterProduct

from ._blocks import Dense
from ._layer import Layer
from ._passes import Passes
from ._use import Use

Gradients = Any  # of N examples: an OuterProduct with L (N, m, R) and R (N, n, R), or a tensor (N, ..., m, n)
BUFFER = 2**24  # entries of formed gradients at once
CACHE = 2**18  # entries that stay in a cache


def gradients_of(layer: Layer, pairs: Sequence[tuple[Use, Tensor]], N: int, dtype: torch.dtype) -> Gradients:
    """∇W of each example, of the uses and the gradients at their outputs that a backward pass has shown."""
    own = [(use, g) for use, g in pairs if use.block in layer.blocks]
    block = layer.dense
    if block is not None and len(block.shape) == 2 and own:
        rows = [_rows(block, use, g, N, dtype) for use, g in own]
        a, g = (torch.cat(side, 1).mT for side in zip(*rows, strict=True))
        return OuterProduct(g, a)
    total: Any = layer.matrix(torch.detach).to(dtype).new_zeros(N, *layer.matrix(torch.detach).shape)
    for use, g in own:
        x, s = use.pair(g, dtype)
        dW = use.block.gradients(x, s, N)
        total = total + (dW.mT if use.block.turned != layer.blocks[0].turned else dW)
    return total


def by_layer(passes: Passes, piece: Any, cotangents: Any) -> Iterator[list[Gradients]]:
    """For each cotangent the gradients of the piece's examples, a layer at a time."""
    shared = passes.apart(piece)
    single = [layer for layer in passes.layers if not shared.isdisjoint(layer.blocks)]
    apart: list[dict[Any, Tensor]] = []
    if single:  # layers whose gradients are seen one example at a time
        apart = [dict(zip(single, alone, strict=True)) for alone in _alone(passes, piece, cotangents, single)]
    for k, (pairs, N) in enumerate(passes.slopes(piece, cotangents)):
        yield [
            apart[k][layer] if layer in single else gradients_of(layer, pairs, N, passes.dtype)
            for layer in passes.layers
        ]


def example_forms(F: KroneckerEigen, columns: Sequence[Gradients]) -> Tensor:
    """The matrices (N, K, K) of vec(J_nk)ᵀ F vec(J_nl), for K columns of gradients of N examples."""
    Q_A, Q_B, w = F.Q_A, F.Q_B, _tensor(F.eigenvalues)
    first = columns[0]
    if isinstance(first, OuterProduct) and first.R.shape[-1] == 1:
        a = _turned(first.R[..., 0], Q_A)  # the input is the same for all columns
        g = torch.stack([_turned(column.L[..., 0], Q_B) for column in columns], 1)
        return (g * (a.square() @ w.mT)[:, None]) @ g.mT
    formed = []
    for pieces in zip(*(_split(column, len(columns)) for column in columns), strict=True):
        J = torch.stack([_turned(_turned(V, Q_A).mT, Q_B).mT for V in pieces], 1)  # (N, K, ..., m, n)
        formed.append((w * J).flatten(2) @ J.flatten(2).mT)
    return torch.cat(formed)


def in_basis(F: KroneckerEigen, V: Gradients) -> Gradients:
    """Q_Gᵀ V Q_A of each."""
    if isinstance(V, OuterProduct):
        return OuterProduct(_turned(V.L.mT, F.Q_B).mT, _turned(V.R.mT, F.Q_A).mT)
    return _turned(_turned(V, F.Q_A).mT, F.Q_B).mT


def weighted(F: KroneckerEigen, V: Gradients) -> Tensor:
    """F V of each, in the eigenbasis."""
    X = in_basis(F, V)
    return _tensor(F.eigenvalues) * (_tensor(X.to_dense()) if isinstance(X, OuterProduct) else X)


def turned_back(F: KroneckerEigen, X: Tensor) -> Tensor:
    """Q_G X Q_Aᵀ of each."""
    Q_A, Q_G = (Q if isinstance(Q, Diagonal) else _tensor(Q).mT for Q in (F.Q_A, F.Q_B))
    return _turned(_turned(X, Q_A).mT, Q_G).mT


def turning_pays(q: int, V: Gradients) -> bool:
    """Whether it takes fewer flops to turn an example than to multiply it by q queries."""
    if not isinstance(V, OuterProduct):
        return False
    m, n = V.shape
    return V.R.shape[-1] * (m * m + n * n) <= q * m * n


def inner(P: Tensor, V: Gradients) -> Tensor:
    """The matrix (q, N) of Σ P_i ∘ V_j for P (q, ..., m, n)."""
    if isinstance(V, OuterProduct) and V.R.shape[-1] == 1:
        q, m, n = P.shape
        if q <= n:  # forms q m N entries, not m n N
            a, g = _tensor(V.R[..., 0]), _tensor(V.L[..., 0])
            some = max(
                1, CACHE // (m * len(a))
            )  # what is made of these queries is read again before it leaves the cache
            rows = [((Q.flatten(0, 1) @ a.mT).view(-1, m, len(a)) * g.mT).sum(1) for Q in P.split(some)]
            return torch.cat(rows)
    return torch.cat([P.flatten(1) @ part.flatten(1).mT for part in _split(V, 1)], 1)


def _split(V: Gradients, columns: int) -> Iterator[Tensor]:
    """Formed, so many at once that they fit the buffer."""
    outer = isinstance(V, OuterProduct)
    N, entries = (len(V.L), V.shape[0] * V.shape[1]) if outer else (len(V), V[0].numel())
    step = max(1, BUFFER // max(1, entries * columns))
    for i in range(0, N, step):
        part = slice(i, i + step)
        yield OuterProduct(V.L[part], V.R[part]).to_dense() if outer else V[part]  # type: ignore[misc]


def _rows(block: Dense, use: Use, g: Tensor, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, s = use.pair(g, dtype)
    return block.inputs(x, N), block.outputs(x, s, N)


def _tensor(x: Any) -> Tensor:
    """What is a tensor, though its operator says no more than that it is an array."""
    return x


def _turned(x: Any, Q: Any) -> Tensor:
    return x if isinstance(Q, Diagonal) else x @ Q


def _alone(passes: Passes, piece: Any, cotangents: Any, layers: Sequence[Layer]) -> list[list[Tensor]]:
    """For each cotangent the gradients (N, ..., m, n) of layers that do not show the examples."""
    found: list[list[list[Tensor]]] = []
    parameters = list({p for layer in layers for p in layer.parameters})
    for _, single in piece.chunks(1):
        outputs, _, likelihood = passes.shown(single)
        rows = []
        for v in cotangents(likelihood, outputs, single):
            slopes = torch.autograd.grad(outputs, parameters, v, retain_graph=True, materialize_grads=True)
            of = dict(zip(parameters, slopes, strict=True))
            rows.append([layer.matrix(of.__getitem__).detach().to(passes.dtype) for layer in layers])
        found.append(rows)
    return [[torch.stack(examples) for examples in zip(*column, strict=True)] for column in zip(*found, strict=True)]
