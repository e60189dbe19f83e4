"""Operators on a whole network: tuples (V_1, ..., V_l) of one matrix a layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from . import _backends, _blocks, _checks, _gram
from ._backends import Array, product
from ._blocks import Operator
from ._value import LinearOperator, Value, leaves, linear_operator, value
from .outer_product import OuterProduct


@value
class BlockDiagonal(Value):
    """diag(blocks): one operator a layer, each on its own V_i (Section 4.2).

    Raises:
        TypeError, ValueError: no block, or a tuple of another length than the blocks.

    >>> import numpy as np
    >>> from kfaclinalg import Kronecker
    >>> F = BlockDiagonal((Kronecker(np.eye(1), 2 * np.eye(1)), Kronecker(np.eye(1), 4 * np.eye(1))))
    >>> F.inverse() @ (np.ones((1, 1)), np.ones((1, 1)))
    (array([[0.5]]), array([[0.25]]))
    """

    blocks: tuple[Operator, ...]

    def __post_init__(self) -> None:
        _checks.check_class("blocks", self.blocks, tuple)
        _blocks.check_operators("blocks", self.blocks)

    def apply(self, Vs: Sequence[Array], /) -> tuple[Array, ...]:
        """(block_1 @ V_1, ..., block_l @ V_l). The sum of the blocks' flops."""
        return tuple(_checks.named(at, _blocks.applied, block, V) for at, block, V in _blocks.matched(self.blocks, Vs))

    __matmul__ = apply

    def inverse(self) -> BlockDiagonal:
        """The block-diagonal operator of the blocks' inverses."""
        return BlockDiagonal(tuple(block.inverse() for block in self.blocks))

    def solve(self, Vs: Sequence[Array], /) -> tuple[Array, ...]:
        """Each block's `solve` of its V: backward stable, for one-off use."""
        return tuple(_checks.named(at, block.solve, V) for at, block, V in _blocks.matched(self.blocks, Vs))

    def logdet(self) -> Array:
        """Σ log det block_i (...)."""
        return reduce(add, (block.logdet() for block in self.blocks))

    def trace(self) -> Array:
        """Σ tr block_i (...)."""
        return reduce(add, (block.trace() for block in self.blocks))

    def diagonal(self) -> tuple[Array, ...]:
        """The blocks' diagonals, shaped like the Vs."""
        return tuple(block.diagonal() for block in self.blocks)

    def to_dense(self) -> Array:
        """The matrix that acts on the stacked vec(V_i), zero outside the diagonal blocks."""
        return _blocks.assembled({(i, i): block.to_dense() for i, block in enumerate(self.blocks)})

    def gram(self, Us: Sequence[Any], Vs: Sequence[Any], /) -> Array:
        """The matrix (p, q) of Σ vec(U_i)ᵀ block vec(V_j), for each block a batch, an array or `OuterProduct`.

        The sum of the blocks' flops.
        """
        held = _checks.items("Us", Us, len(self.blocks))
        pairs = zip(held, _blocks.matched(self.blocks, Vs), strict=True)
        return _gram.summed({at: _checks.named(at, block.gram, U, V) for U, (at, block, V) in pairs})

    def as_scipy(self) -> LinearOperator:
        """A scipy.sparse.linalg.LinearOperator on the stacked vec(V_i)."""
        return linear_operator(self, [block.shape for block in self.blocks], self.apply)


@value
class BlockTridiagonalInverse(Value):
    """F̂⁻¹ = Ξᵀ Λ Ξ (Section 4.3), as `block_tridiagonal_inverse` builds it.

    Ξ has I on its diagonal and -Ψ_{i,i+1} = -Ψ^A_i ⊗ Ψ^G_i beside it; Λ = diag(Σ_{1|2}⁻¹, ..., Σ_{l-1|l}⁻¹, Σ_l⁻¹).

    Args:
        Psi_A, Psi_G: l - 1 arrays (..., n_i, n_{i+1}) and (..., m_i, m_{i+1}); fewer, where only the first are linked.
        Lambda: l operators, the blocks of Λ.

    >>> import numpy as np
    >>> from kfaclinalg import Factors, LayerFactors, Link, block_tridiagonal_inverse
    >>> one = np.eye(1)
    >>> factors = Factors((LayerFactors(2 * one, one), LayerFactors(one, one)), (Link(one, one),))
    >>> block_tridiagonal_inverse(factors, 0.0).to_dense()
    array([[ 1., -1.],
           [-1.,  2.]])
    """

    Psi_A: tuple[Array, ...]
    Psi_G: tuple[Array, ...]
    Lambda: tuple[Operator, ...]

    def __post_init__(self) -> None:
        for name in ("Psi_A", "Psi_G", "Lambda"):
            _checks.check_class(name, getattr(self, name), tuple)
        _blocks.check_operators("Lambda", self.Lambda)
        if not len(self.Psi_A) == len(self.Psi_G) < len(self.Lambda):
            counts = (len(self.Psi_A), len(self.Psi_G), len(self.Lambda))
            raise ValueError(f"got {counts} of Psi_A, Psi_G and Lambda, expected (l - 1, l - 1, l) for l >= 1 layers")
        b = _backends.resolve(Lambda=next(leaves(self.Lambda)))
        for name, side in (("Psi_A", 1), ("Psi_G", 0)):
            sizes = [block.shape[side] for block in self.Lambda]
            for i, Psi in enumerate(getattr(self, name)):
                _backends.operand(b, f"{name}[{i}]", Psi, (sizes[i], sizes[i + 1]))

    def apply(self, Vs: Sequence[Array], /) -> tuple[Array, ...]:
        """F̂⁻¹ (V_1, ..., V_l).

        Σ 4 m_i n_i (m_i + n_i) flops for Λ and about as many for Ξ and Ξᵀ.
        """
        b = _backends.resolve(Lambda=next(leaves(self.Lambda)))
        Vs = _checks.items("Vs", Vs, len(self.Lambda))
        Xs = [_backends.operand(b, at, V, block.shape) for at, block, V in _blocks.matched(self.Lambda, Vs)]
        chain = len(self.Psi_A) + 1
        batches = {f"Vs[{i}]": tuple(V.shape[:-2]) for i, V in enumerate(Vs[:chain])}
        _checks.check_batches(**batches, **{f"Psi_A[{i}]": tuple(M.shape[:-2]) for i, M in enumerate(self.Psi_A)})
        links = list(zip(self.Psi_A, self.Psi_G, strict=True))
        Us = [X - product(G, above, A.mT) for X, above, (A, G) in zip(Xs, Xs[1:], links, strict=False)]  # Ξ
        Us = [_blocks.applied(block, U) for block, U in zip(self.Lambda, [*Us, *Xs[chain - 1 :]], strict=True)]  # Λ
        Ws = [U - product(G.mT, below, A) for U, below, (A, G) in zip(Us[1:], Us, links, strict=False)]  # Ξᵀ
        return tuple(_backends.narrowed(W, V.dtype) for W, V in zip([Us[0], *Ws, *Us[chain:]], Vs, strict=True))

    __matmul__ = apply

    def logdet(self) -> Array:
        """Σ log det Λ_i (...), since det Ξ = 1. The flops of the blocks' `logdet`."""
        return reduce(add, (block.logdet() for block in self.Lambda))

    def to_dense(self) -> Array:
        """The matrix that acts on the stacked vec(V_i). 4 N³ flops for N = Σ m_i n_i."""
        Lambda = {(i, i): block.to_dense() for i, block in enumerate(self.Lambda)}
        b = _backends.resolve(Lambda=Lambda[0, 0])
        Xi = {(i, i): b.eye(block.shape[-1]) for (i, _), block in Lambda.items()}
        for i, (A, G) in enumerate(zip(self.Psi_A, self.Psi_G, strict=True)):
            Xi[i, i + 1] = -_backends.kron(A, G)
        dense = _blocks.assembled(Xi)
        return product(dense.mT, _blocks.assembled(Lambda), dense)

    def gram(self, Us: Sequence[Any], Vs: Sequence[Any], /) -> Array:
        """The matrix (p, q) of Σ vec(U_i)ᵀ F̂⁻¹ vec(V_j), for each layer a batch, an array or `OuterProduct`.

        The flops of `apply` for the q on the right, and Σ 2 p q m n.
        """
        b, chain = _backends.resolve(Lambda=next(leaves(self.Lambda))), len(self.Psi_A) + 1
        held = list(zip(_checks.items("Us", Us, len(self.Lambda)), _blocks.matched(self.Lambda, Vs), strict=True))
        pairs = [_checks.named(at, _gram.operands, block, b, U, V, {at: ()}) for U, (at, block, V) in held[:chain]]
        linked = BlockTridiagonalInverse(self.Psi_A, self.Psi_G, self.Lambda[:chain])
        applied = linked.apply([V.to_dense() if isinstance(V, OuterProduct) else V for _, V in pairs])
        found = [_gram.inner(U, W) for (U, _), W in zip(pairs, applied, strict=True)]
        grams = {at: _gram.narrowed(x, V) for x, (_, (at, _, V)) in zip(found, held, strict=False)}
        alone = {at: _checks.named(at, block.gram, U, V) for U, (at, block, V) in held[chain:]}
        return _gram.summed(grams | alone)

    def as_scipy(self) -> LinearOperator:
        """A scipy.sparse.linalg.LinearOperator on the stacked vec(V_i)."""
        return linear_operator(self, [block.shape for block in self.Lambda], self.apply)
