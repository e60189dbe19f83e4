import numpy as np
import pytest
from backends import NUMPY, every_backend, uncompiled_backends
from matrices import Sample, judge

from kfaclinalg import BlockDiagonal, Kronecker, testing

SHAPES = [(3, 4), (2, 3), (1, 2)]  # (m, n) a layer


def example(b):
    """The operator, its dense blocks, and one V a layer."""
    factors = [(Sample(n, decades=0.2, seed=n).spd(b), Sample(m, decades=0.2, seed=m).spd(b)) for m, n in SHAPES]
    blocks = [testing.dense_kronecker(A, B) for A, B in factors]
    Vs = [Sample(1, seed=i).normal(b, *shape) for i, shape in enumerate(SHAPES)]
    return [tuple(map(b.array, pair)) for pair in factors], blocks, Vs


def stacked(Vs):
    return np.concatenate([testing.vec(V) for V in Vs])


def assembled(blocks):
    size = sum(len(block) for block in blocks)
    dense, start = np.zeros((size, size)), 0
    for block in blocks:
        dense[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return dense


@every_backend
def test_against_the_dense_matrix(b):
    factors, blocks, Vs = example(b)
    dense, v = assembled(blocks), stacked(Vs)

    @b.jit
    def run(factors, Vs):
        F = BlockDiagonal(tuple(Kronecker(*pair) for pair in factors))
        by_layer = F @ Vs, F.apply(Vs), F.inverse() @ Vs, F.solve(Vs), F.diagonal()
        return by_layer, (F.to_dense(), F.trace(), F.logdet())

    by_layer, whole = run(factors, tuple(map(b.array, Vs)))
    product, applied, inverse, solved, diagonal = (stacked(list(map(b.numpy, Us))) for Us in by_layer)
    to_dense, trace, logdet = map(b.numpy, whole)
    bound = testing.inverse_bound(np.linalg.cond(dense), b.eps)
    np.testing.assert_allclose(product, dense @ v, atol=100 * b.eps)
    np.testing.assert_allclose(applied, dense @ v, atol=100 * b.eps)
    judge(b, "BlockDiagonal.inverse", testing.backward_error(dense, inverse, v), bound)
    error = testing.backward_error(dense, solved, v)
    judge(b, "BlockDiagonal.solve", error, testing.solve_bound(max(map(sum, SHAPES)), b.eps))
    np.testing.assert_allclose(to_dense, dense, atol=10 * b.eps)
    np.testing.assert_allclose(diagonal, np.diagonal(dense), rtol=10 * b.eps)
    assert trace == pytest.approx(np.trace(dense), rel=100 * b.eps)
    assert logdet == pytest.approx(np.linalg.slogdet(dense)[1], rel=bound)


def test_a_block_in_the_wrong_place_is_caught():
    factors, blocks, _ = example(NUMPY)
    dense = BlockDiagonal(tuple(Kronecker(*pair) for pair in factors[::-1])).to_dense()
    assert not np.allclose(dense, assembled(blocks))


@uncompiled_backends
def test_a_failing_block_leaves_the_others(b):
    F = BlockDiagonal(tuple(Kronecker(b.array(A * np.eye(2)), b.array(np.eye(1))) for A in (1.0, -1.0)))
    V = b.array(np.ones((1, 2)))
    good, bad = F.inverse() @ (V, V)
    assert (b.numpy(good) == 1).all()
    assert np.isnan(b.numpy(bad)).all()


def test_mistakes_are_refused():
    block = Kronecker(np.eye(1), np.eye(1))
    with pytest.raises(ValueError, match="blocks has 0 items, expected one or more"):
        BlockDiagonal(())
    with pytest.raises(ValueError, match="Vs has 2 items, expected 1"):
        BlockDiagonal((block,)) @ (np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(ValueError, match=r"V has shape \(2, 1\)"):
        BlockDiagonal((block,)) @ (np.ones((2, 1)),)
