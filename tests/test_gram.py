"""`gram` of every operator against vec(U_i)ᵀ M vec(V_j) with the dense M, for arrays and outer products."""

import numpy as np
import pytest
import torch
from backends import NUMPY, uncompiled_backends
from matrices import Sample, judge

from kfaclinalg import (
    BlockDiagonal,
    BlockTridiagonalInverse,
    CholeskyInverse,
    Dense,
    Diagonal,
    DirectSum,
    Kronecker,
    KroneckerBasis,
    KroneckerPair,
    LowRankPlusDiagonal,
    OuterProduct,
    batch_factors,
    block_tridiagonal_inverse,
    testing,
)

M, N, P, Q = 3, 4, 5, 2
RANKS = [(1, 1), (2, 3), (9, 1)]  # of U and V: factored, factored, and formed where that is cheaper


def drawn(b, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(b.dtype).astype(float)


def outer(b, p, m, n, r, seed=0):
    L, R = drawn(b, p, m, r, seed=seed), drawn(b, p, n, r, seed=seed + 1)
    return OuterProduct(b.array(L), b.array(R)), L @ R.mT


def operators(b):
    A, B = b.array(Sample(N).spd(b)), b.array(Sample(M, seed=1).spd(b))
    d = b.array(np.arange(1.0, N + 1))
    yield "Kronecker", Kronecker(A, B)
    yield "Kronecker, structured", Kronecker(LowRankPlusDiagonal(A, d, d), B)
    yield "Kronecker, not symmetric", Kronecker(b.array(drawn(b, N, N)), b.array(drawn(b, M, M)))
    yield "KroneckerEigen", Kronecker(A, B).eigh()
    yield "KroneckerEigen, diagonal", Kronecker(Diagonal(d), B).eigh()
    yield "KroneckerBasis", KroneckerBasis(A, B, b.array(np.arange(1.0, M * N + 1).reshape(M, N)))
    yield "KroneckerPair", KroneckerPair(A, B, A @ A, B)


def rows(X):
    return np.stack([testing.vec(x) for x in X])


def check(b, name, gram, dense, x, y):
    expected = x @ dense @ y.T
    scale = np.linalg.norm(dense) * np.linalg.norm(x) * np.linalg.norm(y)
    judge(b, f"{name}.gram", np.linalg.norm(b.numpy(gram) - expected), testing.solve_bound(M * N, b.eps) * scale)


@uncompiled_backends
@pytest.mark.parametrize("ranks", [None, *RANKS], ids=str)
def test_an_operator_of_one_layer(b, ranks):
    for name, op in operators(b):
        dense = b.numpy(op.to_dense())
        if ranks is None:
            u, v = drawn(b, P, M, N), drawn(b, Q, M, N, seed=5)
            U, V = b.array(u), b.array(v)
        else:
            (U, u), (V, v) = outer(b, P, M, N, ranks[0]), outer(b, Q, M, N, ranks[1], seed=5)
        check(b, name, op.gram(U, V), dense, rows(u), rows(v))
        check(b, name, op.gram(U, b.array(v)), dense, rows(u), rows(v))  # one formed, one not
        check(b, name, op.gram(b.array(u), V), dense, rows(u), rows(v))


@uncompiled_backends
def test_a_side(b):
    A, x, y = Sample(N).spd(b), drawn(b, N, P), drawn(b, N, Q, seed=1)
    d = b.array(np.arange(1.0, N + 1))
    L = b.array(np.linalg.cholesky(A))
    for op in (Dense(b.array(A)), Diagonal(d), LowRankPlusDiagonal(b.array(A), d, d), CholeskyInverse(L)):
        gram = op.gram(b.array(x), b.array(y))
        check(b, type(op).__name__, gram, b.numpy(op.to_dense()), x.T, y.T)


@uncompiled_backends
def test_a_batch_of_operators_and_their_direct_sum(b):
    A, B = Sample(N, (2,), decades=0.1).spd(b), Sample(M, (2,), decades=0.1, seed=1).spd(b)
    u, v = drawn(b, P, 2, M, N), drawn(b, Q, 2, M, N, seed=1)
    for members in (Kronecker(b.array(A), b.array(B)), Kronecker(b.array(A), b.array(B)).eigh()):
        grams = b.numpy(members.gram(b.array(u), b.array(v)))
        dense = b.numpy(members.to_dense())
        for k in range(2):
            check(b, "batch", b.array(grams[k]), dense[k], rows(u[:, k]), rows(v[:, k]))
        whole = DirectSum(members)
        x, y = (np.concatenate([rows(w[:, 0]), rows(w[:, 1])], axis=1) for w in (u, v))
        check(b, "DirectSum", whole.gram(b.array(u), b.array(v)), b.numpy(whole.to_dense()), x, y)
        for verb in ("logdet", "trace"):
            parts = b.numpy(getattr(members, verb)())
            assert abs(b.numpy(getattr(whole, verb)()) - parts.sum()) <= 10 * b.eps * abs(parts).sum()
        solved = b.numpy(whole.solve(whole @ b.array(u)))
        np.testing.assert_allclose(solved, u, atol=testing.inverse_bound(np.linalg.cond(dense).max(), b.eps) * 10)
        np.testing.assert_allclose(b.numpy(whole.inverse() @ (whole @ b.array(u))), solved, atol=np.sqrt(b.eps))
        assert whole.shape == (2, M, N)


@uncompiled_backends
def test_a_network(b):
    one, two = (Kronecker(b.array(Sample(n).spd(b)), b.array(Sample(m, seed=1).spd(b))) for m, n in ((M, N), (2, M)))
    F = BlockDiagonal((one, DirectSum(Kronecker(one.A[None, ...], one.B[None, ...])), two.eigh()))
    (U, u), (V, v) = outer(b, P, M, N, 1), outer(b, Q, M, N, 2, seed=3)
    x, y = drawn(b, P, 2, M), drawn(b, Q, 2, M, seed=1)
    gram = F.gram((U, b.array(u[:, None]), b.array(x)), (V, b.array(v[:, None]), b.array(y)))
    left, right = (np.concatenate([rows(w), rows(w), rows(z)], axis=1) for w, z in ((u, x), (v, y)))
    check(b, "BlockDiagonal", gram, b.numpy(F.to_dense()), left, right)


@uncompiled_backends
def test_the_block_tridiagonal_inverse(b):
    a = [drawn(b, 40, n, seed=n) for n in (N, M)]
    g = [drawn(b, 40, m, seed=m + 10) for m in (M, 2)]
    inverse = block_tridiagonal_inverse(batch_factors([*map(b.array, a)], [*map(b.array, g)], links=True), 0.1)
    (U, u), v = outer(b, P, M, N, 1), drawn(b, Q, M, N, seed=2)
    x, y = drawn(b, P, 2, M), drawn(b, Q, 2, M, seed=1)
    gram = inverse.gram((U, b.array(x)), (b.array(v), b.array(y)))
    left, right = (np.concatenate([rows(w), rows(z)], axis=1) for w, z in ((u, x), (v, y)))
    check(b, "BlockTridiagonalInverse", gram, b.numpy(inverse.to_dense()), left, right)
    A, B = Sample(N, (2,), decades=0.1).spd(b), Sample(M, (2,), decades=0.1, seed=1).spd(b)
    beside = DirectSum(Kronecker(b.array(A), b.array(B)))  # what has no neighbours
    inverse = BlockTridiagonalInverse(inverse.Psi_A, inverse.Psi_G, (*inverse.Lambda, beside))
    L, R, w = drawn(b, P, 2, M, 1, seed=7), drawn(b, P, 2, N, 1, seed=8), drawn(b, Q, 2, M, N, seed=9)
    third = OuterProduct(b.array(L), b.array(R))
    gram = inverse.gram((U, b.array(x), third), (b.array(v), b.array(y), b.array(w)))
    left = np.concatenate([left, rows((L @ R.mT).reshape(2 * P, M, N)).reshape(P, -1)], axis=1)
    right = np.concatenate([right, rows(w.reshape(2 * Q, M, N)).reshape(Q, -1)], axis=1)
    check(b, "BlockTridiagonalInverse and others", gram, b.numpy(inverse.to_dense()), left, right)


def test_gradients_of_examples_are_never_formed():
    """(g_iᵀ B g_j)(a_iᵀ A a_j): nothing of the size of p q m n, nor of q m n, is allocated."""
    m, n, q = 300, 400, 2000
    P = Kronecker(torch.eye(n), torch.eye(m))
    U, V = (OuterProduct(torch.ones(k, m, 1), torch.ones(k, n, 1)) for k in (3, q))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal largest
            result = f(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in [result] if isinstance(x, torch.Tensor))])
            return result

    with Watch():
        gram = P.gram(U, V)
    assert gram.shape == (3, q)
    assert (gram == m * n).all()
    assert largest <= q * max(m, n)


def test_a_batch_in_scipy():
    scipy = pytest.importorskip("scipy.sparse.linalg")
    A, B = Sample(N, (2,), decades=0.1).spd(NUMPY), Sample(M, (2,), decades=0.1, seed=1).spd(NUMPY)
    F = BlockDiagonal((DirectSum(Kronecker(A, B)), Kronecker(A[0], B[0])))
    x = drawn(NUMPY, 3 * M * N)
    np.testing.assert_allclose(F.as_scipy() @ x, F.to_dense() @ x, atol=1e-12)
    solved, failed = scipy.cg(F.as_scipy(), x, rtol=1e-12)
    assert not failed
    np.testing.assert_allclose(F.to_dense() @ solved, x, atol=1e-9)


@pytest.mark.parametrize("op", [op for _, op in operators(NUMPY)], ids=[name for name, _ in operators(NUMPY)])
def test_mistakes_are_refused(op):
    U = np.ones((P, M, N))
    for V, error, what in (
        (np.ones((M, N)), ValueError, r"V has shape \(3, 4\), expected \(p, 3, 4\)"),
        (np.ones((Q, N, M)), ValueError, r"V has shape \(2, 4, 3\)"),
        (OuterProduct(np.ones((Q, M, 1)), np.ones((Q, M, 1))), ValueError, "V.R has shape"),
        (OuterProduct(np.ones((M, 1)), np.ones((N, 1))), ValueError, "V has shape"),
        (U.astype(np.float32), TypeError, "V has dtype float32"),
        (torch.ones(Q, M, N), TypeError, "V is an array of"),
    ):
        with pytest.raises(error, match=what):
            op.gram(U, V)
    with pytest.raises(ValueError, match="Us has 1 items, expected 2"):
        BlockDiagonal((op, op)).gram((U,), (U, U))
    with pytest.raises(ValueError, match=r"Vs\[1\]: V has shape"):
        BlockDiagonal((op, op)).gram((U, U), (U, np.ones((P, 1, N))))
    with pytest.raises(ValueError, match=r"Vs\[1\]: U and V hold \(1, 5\) matrices, expected \(5, 5\)"):
        BlockDiagonal((op, op)).gram((U, U[:1]), (U, U))
    with pytest.raises(TypeError, match=r"members\[0\] is a"):
        DirectSum(U)


def test_mistakes_beside_the_block_tridiagonal_inverse_are_refused():
    a, g = np.random.default_rng(0).standard_normal((2, 2, 9, 2))
    inverse, U = block_tridiagonal_inverse(batch_factors([*a], [*g], links=True), 0.1), np.ones((P, 2, 2))
    for W, error, what in (
        (np.ones((2, 2)), ValueError, r"Vs\[1\]: U has shape \(2, 2\), expected \(p, 2, 2\)"),
        (np.ones((P, 4, 1)), ValueError, r"U has shape \(5, 4, 1\)"),
        (np.ones((Q, 2, 2)), ValueError, r"U and V hold \(2, 5\) matrices, expected \(5, 5\)"),
        (U.astype(np.float32), TypeError, "U has dtype float32"),
        (torch.ones(P, 2, 2), TypeError, "U is an array of"),
    ):
        with pytest.raises(error, match=what):
            inverse.gram((U, W), (U, U))
