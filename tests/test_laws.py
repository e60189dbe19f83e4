"""What must hold between the operators, whatever the matrices: each law compares two ways to the same result."""

import numpy as np
import pytest
from backends import NUMPY, Backend, eager_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import Sample, judge

from kfaclinalg import (
    BlockDiagonal,
    Diagonal,
    Factors,
    Kronecker,
    KroneckerBasis,
    KroneckerEigen,
    KroneckerPair,
    LayerFactors,
    Link,
    LowRankPlusDiagonal,
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    exactly_damped_inverse,
    testing,
)  # fmt: skip

drawn = given(n=st.integers(1, 5), m=st.integers(1, 5), decades=st.floats(0, 0.2), seed=st.integers(0, 2**16))


def laws(test):
    return settings(max_examples=5)(drawn(test))  # each draws a batch of three, and tries every operator on it


class Draw:
    """Random matrices for one example, and the condition number by which its results are judged."""

    def __init__(self, b: Backend, n: int, m: int, decades: float, seed: int) -> None:
        self.b, self.shape = b, (m, n)
        self.A, self.B, self.C, self.D = (
            Sample(k, (3,), decades=decades, seed=seed + i).spd(b) for i, k in enumerate((n, m, n, m))
        )
        self.V = Sample(1, (3,), seed=seed).normal(b, m, n)
        a, b_, c, d = (max(np.linalg.cond(M)) for M in (self.A, self.B, self.C, self.D))
        self.condition = max(a * b_, c * d) * n * m

    def arrays(self, *names: str, member=slice(None)):
        return [self.b.array(getattr(self, name)[member]) for name in names]

    def operators(self, member=slice(None)):
        """One of each kind, on matrices (m, n) or on (n, ·), all with a condition number of that order."""
        A, B, C, D, V = self.arrays(*"ABCDV", member=member)
        one = self.b.array(np.ones(()))
        d, w = abs(V[..., 0, :]) + one, abs(V) + one
        yield "Kronecker", Kronecker(A, B), V
        yield "structured", Kronecker(Diagonal(d), LowRankPlusDiagonal(B, abs(V[..., 0]), abs(V[..., 0]) + one)), V
        yield "KroneckerBasis", KroneckerBasis(A, B, w), V
        Q_A, Q_B = (self.b.array(np.linalg.qr(self.b.numpy(X))[0]) for X in (A, B))
        yield "KroneckerEigen", KroneckerEigen(Q_A, Q_B, w), V
        yield "KroneckerPair", KroneckerPair(A, B, 0.5 * A, D), V
        yield "Diagonal", Diagonal(d), V.mT
        yield "LowRankPlusDiagonal", LowRankPlusDiagonal(C, d, d), V.mT

    def agree(self, law: str, computed, expected, factor=1.0) -> None:
        """Norm-wise for each member, within 10 cond eps of both sides."""
        computed, expected = (x if isinstance(x, np.ndarray) else self.b.numpy(x) for x in (computed, expected))
        assert computed.shape == expected.shape, law
        axes = tuple(range(1, computed.ndim))
        error = np.sqrt(np.sum((computed - expected) ** 2, axis=axes)) / np.sqrt(np.sum(expected**2, axis=axes))
        judge(self.b, law, np.max(error), testing.inverse_bound(2 * factor * self.condition, self.b.eps))

    def same_logdet(self, law: str, computed, expected, factor=1.0, scale=1.0) -> None:
        """`scale` is that of the factors: logarithms of its powers cancel in the sum."""
        size = np.prod(self.shape)
        computed, expected = self.b.numpy(computed), self.b.numpy(expected)
        bound = testing.logdet_bound(
            size, 2 * factor * self.condition, np.max(abs(expected)) + 2 * size * np.log(scale), self.b.eps
        )
        judge(self.b, law, np.max(abs(computed - expected)), bound)


@eager_backends
@laws
def test_solve_inverse_and_logdet_undo_each_other(b, n, m, decades, seed):
    draw = Draw(b, n, m, decades, seed)
    for name, M, V in draw.operators():
        square = draw.condition if name == "KroneckerBasis" else 1.0  # K enters twice
        draw.agree(f"{name}: solve(M V) = V", M.solve(M @ V), V, square)
        draw.agree(f"{name}: solve = inverse @", M.solve(V), M.inverse() @ V, square)
        draw.agree(f"{name}: inverse of inverse", M.inverse().inverse() @ V, M @ V, square)
        draw.same_logdet(f"{name}: logdet(inverse) = -logdet", M.inverse().logdet(), -M.logdet(), square)


@eager_backends
@laws
def test_scalars_are_those_of_the_dense_matrix(b, n, m, decades, seed):
    draw = Draw(b, n, m, decades, seed)
    for name, M, V in draw.operators():
        square = draw.condition if name == "KroneckerBasis" else 1.0  # K enters twice
        dense = draw.b.numpy(M.to_dense())
        diagonal = np.diagonal(dense, axis1=1, axis2=2)
        computed = b.numpy(M.diagonal())
        flat = np.stack([testing.vec(d) for d in computed]) if computed.ndim == 3 else computed
        draw.agree(f"{name}.diagonal", flat, diagonal)
        draw.agree(f"{name}.trace", b.numpy(M.trace()), diagonal.sum(axis=1))
        draw.same_logdet(f"{name}.logdet", M.logdet(), b.array(np.linalg.slogdet(dense)[1]), square)
        on_vectors = [
            dense[i] @ (v if computed.ndim == 2 else testing.vec(v)[:, None]) for i, v in enumerate(b.numpy(V))
        ]
        product = b.numpy(M @ V)
        flat = product if computed.ndim == 2 else np.stack([testing.vec(U)[:, None] for U in product])
        draw.agree(f"{name} @", flat, np.stack(on_vectors))


@eager_backends
@laws
def test_a_batch_is_a_loop_in_any_order(b, n, m, decades, seed):
    draw, order = Draw(b, n, m, decades, seed), [2, 0, 1]
    whole, permuted = draw.operators(), draw.operators(order)
    singles = zip(*(draw.operators([i]) for i in order), strict=True)
    for (name, M, V), (_, M_p, V_p), loop in zip(whole, permuted, singles, strict=True):
        for f in (lambda M, V: M @ V, lambda M, V: M.solve(V), lambda M, V: M.inverse() @ V):
            expected = b.numpy(f(M, V))[order]
            draw.agree(f"{name}: permuted", f(M_p, V_p), expected)
            draw.agree(f"{name}: one by one", np.concatenate([b.numpy(f(M_i, V_i)) for _, M_i, V_i in loop]), expected)


@eager_backends
@laws
def test_scale_moves_freely_between_the_factors(b, n, m, decades, seed):
    """(c A, G / c) is the same operator; a power of two rounds nothing."""
    draw, c = Draw(b, n, m, decades, seed), 2.0 ** {"float64": 400, "float32": 40}[b.dtype]
    A, B, C, D, V = draw.arrays(*"ABCDV")
    operators = {
        "Kronecker": lambda p, q: Kronecker(p * A, q * B),
        "KroneckerPair": lambda p, q: KroneckerPair(p * A, q * B, q * C, p * D),
        "shifted_inverse": lambda p, q: Kronecker(p * A, q * B).shifted_inverse(0.5),
    }
    for name, f in operators.items():
        one, other = f(1.0, 1.0), f(c, 1 / c)
        draw.agree(f"{name}: (cA, G/c)", other.solve(V), one.solve(V))
        draw.same_logdet(f"{name}: (cA, G/c), logdet", other.logdet(), one.logdet(), scale=c)
    for f in (block_diagonal_inverse, block_tridiagonal_inverse, exactly_damped_inverse):
        one, other = (f(Factors((LayerFactors(p * A, B / p),)), 0.1) for p in (1.0, c))
        draw.agree(f"{f.__name__}: (cA, G/c)", (other @ (V,))[0], (one @ (V,))[0])
        draw.same_logdet(f"{f.__name__}: (cA, G/c), logdet", other.logdet(), one.logdet(), scale=c)


@eager_backends
@laws
def test_special_cases_coincide(b, n, m, decades, seed):
    draw = Draw(b, n, m, decades, seed)
    A, B, C, D, V = draw.arrays(*"ABCDV")
    P, W = Kronecker(A, B), V.mT
    swapped = Kronecker(B, A) @ W
    draw.agree("(A ⊗ B) V = ((B ⊗ A) Vᵀ)ᵀ", P @ V, swapped.mT)
    pair = KroneckerPair(A, B, 0 * C, D)
    draw.agree("the pair with C = 0", pair.inverse() @ V, P.inverse() @ V)
    draw.agree("the pair with C = 0, smith", pair.solve(V, method="smith"), P.solve(V))
    draw.same_logdet("the pair with C = 0, logdet", pair.logdet(), P.logdet())
    d = abs(V[..., 0, :]) + b.array(np.ones(()))
    expected = W / d[..., None]
    for U, s in ((0 * C, d), (C, 0 * d), (C[..., :0], d[..., :0])):
        M = LowRankPlusDiagonal(U, s, d)
        for X in (M.solve(W), M.inverse() @ W, M.inverse("sherman-morrison") @ W):
            draw.agree("U diag(s) Uᵀ = 0", X, expected)
    layers = (LayerFactors(A, B), LayerFactors(C, D))
    plain = BlockDiagonal(tuple(Kronecker(*layer) for layer in layers))
    factors = Factors(layers, (Link(0 * A, 0 * B),))
    apart = block_diagonal_inverse(factors, 0.1) @ (V, V)
    for X, Y in zip(block_tridiagonal_inverse(factors, 0.1) @ (V, V), apart, strict=True):
        draw.agree("no links", X, Y)
    for X, Y in zip(exactly_damped_inverse(factors, 0.0) @ (V, V), plain.inverse() @ (V, V), strict=True):
        draw.agree("exact damping 0", X, Y)


def test_a_law_that_is_broken_is_caught():
    draw = Draw(NUMPY, 3, 3, 0.1, 0)
    A, B, V = draw.arrays(*"ABV")
    with pytest.raises(AssertionError, match="swapped on numpy"):
        draw.agree("swapped", Kronecker(A, B) @ V, Kronecker(B, A) @ V)
