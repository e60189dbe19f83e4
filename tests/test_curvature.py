import functools

import numpy as np
import pytest
from backends import NUMPY, TORCH, TORCH_FLOAT32, Backend, every_backend, jit_backends
from hypothesis import given
from hypothesis import strategies as st
from matrices import judge, random_spd
from networks import SIZES, network, pairwise_joint_inverse

from kfaclinalg import (
    BlockDiagonal,
    Factors,
    Kronecker,
    LayerFactors,
    Link,
    batch_factors,
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    exactly_damped_inverse,
    low_rank,
    low_rank_inverse,
    low_rank_plus_diagonal,
    testing,
)
from kfaclinalg.damping import NORMS

SHAPES = [(3, 4), (2, 3)]


@every_backend
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gamma", [0.01, 1.0])
def test_block_diagonal_inverse(b, norm, gamma):
    """Against the damped Kronecker products of eqn 7, formed densely, with π from their dense norms."""
    rng = np.random.default_rng(0)
    pairs = [[random_spd(rng, k).astype(b.dtype).astype(float) for k in (n, m)] for m, n in SHAPES]
    Vs = [rng.standard_normal(shape).astype(b.dtype) for shape in SHAPES]
    factors = Factors(tuple(LayerFactors(*map(b.array, pair)) for pair in pairs))
    Us = b.jit(lambda factors, Vs: block_diagonal_inverse(factors, gamma, norm=norm) @ Vs)(
        factors, tuple(map(b.array, Vs))
    )
    order = {"trace": "nuc", "frobenius": "fro", "spectral": 2}[norm]
    for (A, G), V, U in zip(pairs, Vs, Us, strict=True):
        n, m = len(A), len(G)
        sizes = (np.linalg.norm(np.kron(*pair), order) for pair in ((A, np.eye(m)), (np.eye(n), G)))
        pi = np.sqrt(next(sizes) / next(sizes))
        dense = np.kron(A + pi * gamma * np.eye(n), G + gamma / pi * np.eye(m))
        error = testing.backward_error(dense, testing.vec(b.numpy(U)), testing.vec(V.astype(float)))
        judge(b, "block_diagonal_inverse", error, testing.inverse_bound(np.linalg.cond(dense), b.eps))


@jit_backends
def test_singular_factors_need_damping(b):
    """Always-zero inputs, as MNIST's border pixels: singular without γ, fine with it."""
    singular = np.diag([1.0, 0.0])
    factors = Factors((LayerFactors(b.array(singular), b.array(np.eye(1))),))
    V = (b.array(np.ones((1, 2))),)
    solved = b.jit(lambda factors, gamma: (block_diagonal_inverse(factors, gamma) @ V)[0])
    assert np.isnan(b.numpy(solved(factors, 0.0))).all()
    assert np.isfinite(b.numpy(solved(factors, 0.1))).all()


def truncated(A: np.ndarray, G: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """rank_k(A) and rank_k(G - diag G) + diag G, from full eigendecompositions in float64."""

    def rank_k(M):
        w, Q = np.linalg.eigh(M)
        kept = np.argsort(-abs(w))[:k]
        return (Q[:, kept] * w[kept]) @ Q[:, kept].T

    d = np.diag(np.diag(G))
    return rank_k(A), rank_k(G - d) + d


def low_rank_error(b: Backend, gamma: float, rank: int, norm: str, seed: int = 0) -> tuple[float, float]:
    """The backward error of `low_rank_inverse` against the dense truncated and damped product, and its bound."""
    rng = np.random.default_rng(seed)
    n, m = 7, 6  # no larger than the rank and the oversampling: subspace iteration has nothing left to converge to
    A, G = (random_spd(rng, k).astype(b.dtype).astype(float) for k in (n, m))
    V = rng.standard_normal((m, n)).astype(b.dtype)
    factors = Factors((LayerFactors(b.array(A), b.array(G)),))
    run = b.jit(lambda factors, Vs: low_rank_inverse(factors, gamma, rank=rank, norm=norm) @ Vs)
    U = b.numpy(run(factors, (b.array(V),))[0])
    A_k, G_k = truncated(A, G, rank)
    order = {"trace": "nuc", "frobenius": "fro", "spectral": 2}[norm]
    pi = np.sqrt(np.linalg.norm(A_k, order) / n ** ORDERS[norm] / np.linalg.norm(G_k, order) * m ** ORDERS[norm])
    damped = A_k + pi * gamma * np.eye(n), G_k + gamma / pi * np.eye(m)
    dense = np.kron(*damped)
    error = testing.backward_error(dense, testing.vec(U), testing.vec(V.astype(float)))
    # The inverse is stored as diag(1/d) - low rank: the condition number of each side is its norm over its smallest d.
    smallest = pi * gamma, min(np.diag(G)) + gamma / pi
    condition = np.prod([np.linalg.norm(M, 2) / d for M, d in zip(damped, smallest, strict=True)])
    return error, testing.inverse_bound(condition, b.eps)


ORDERS = {"trace": 1, "frobenius": 0.5, "spectral": 0}


@every_backend
@pytest.mark.parametrize(("norm", "rank"), [("trace", 2), ("trace", 20), ("frobenius", 3), ("spectral", 2)])
def test_low_rank_inverse(b, norm, rank):
    """A rank beyond the size of a side keeps all of it: the plain block-diagonal inverse."""
    judge(b, "low_rank_inverse", *low_rank_error(b, 0.5, rank, norm))


def test_another_truncation_is_caught(monkeypatch):
    monkeypatch.setattr("kfaclinalg.curvature.low_rank_plus_diagonal", low_rank)
    error, bound = low_rank_error(NUMPY, 0.5, 2, "trace")
    assert error > 1000 * bound


def test_low_rank_inverse_takes_an_earlier_result_as_its_start(monkeypatch):
    """With one iteration a call and no oversampling: it is the start that makes the difference."""
    monkeypatch.setattr("kfaclinalg._subspace.OVERSAMPLING", 0)
    for f in (low_rank, low_rank_plus_diagonal):
        monkeypatch.setattr(f"kfaclinalg.curvature.{f.__name__}", functools.partial(f, iterations=1))
    rng = np.random.default_rng(0)
    Q, R = (np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(2))
    beside = (Q * 0.1 ** np.arange(4)) @ R.T  # off the diagonal of G: eigenvalues ±1, ±0.1, ...
    G = np.block([[np.diag([2.0, 20, 3, 30]), beside], [beside.T, np.diag([40.0, 4, 50, 5])]])
    factors = Factors((LayerFactors(testing.spd_matrix(0.1 ** np.arange(9), rng), G),))
    V = rng.standard_normal((8, 9))
    exact = block_diagonal_inverse(Factors((LayerFactors(*truncated(*factors.layers[0], 2)),)), 0.5).blocks[0] @ V
    errors, start = [], None
    for _ in range(10):
        start = low_rank_inverse(factors, 0.5, rank=2, start=start)
        errors.append(np.linalg.norm((start @ (V,))[0] - exact) / np.linalg.norm(exact))
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-6 * errors[0]


@jit_backends
def test_a_truncation_that_is_not_definite_is_nan(b):
    """Without the smaller eigenvalues of G - diag G, the sum with diag G may be indefinite where G is not."""
    G = np.asarray([[1.0, -1.0, -2.0], [-1.0, 5.0, -1.0], [-2.0, -1.0, 9.0]])
    assert np.linalg.eigvalsh(G)[0] > 0.2
    assert np.linalg.eigvalsh(truncated(np.eye(2), G, 1)[1])[0] < -0.3
    A, V = b.array(np.eye(2)), b.array(np.ones((3, 2)))
    factors = Factors((LayerFactors(A, b.array(G)), LayerFactors(A, b.array(np.eye(3)))))
    solved = b.jit(lambda factors, gamma: low_rank_inverse(factors, gamma, rank=1) @ (V, V))
    lost, kept = solved(factors, 1e-3)
    assert np.isnan(b.numpy(lost)).all()
    assert np.isfinite(b.numpy(kept)).all()
    assert np.isfinite(b.numpy(solved(factors, 1.0)[0])).all()


@pytest.mark.parametrize(
    ("start", "layers"), [(BlockDiagonal((Kronecker(np.eye(2), np.eye(2)),)), 1), (np.eye(2), 1), ("itself", 2)]
)
def test_a_start_of_another_form_is_refused(start, layers):
    one = Factors((LayerFactors(np.eye(2), np.eye(2)),))
    start = low_rank_inverse(one, 0.5, rank=1) if isinstance(start, str) else start
    with pytest.raises(TypeError, match=f"expected an earlier result for {layers} layers"):
        low_rank_inverse(Factors(one.layers * layers), 0.5, rank=1, start=start)


def check_block_tridiagonal(b: Backend, gamma: float, seed: int = 0) -> None:
    net = network(b, gamma, seed=seed)
    Us = b.jit(lambda factors, Vs: block_tridiagonal_inverse(factors, gamma).apply(Vs))(
        net.factors, tuple(map(b.array, net.Vs))
    )
    exact = pairwise_joint_inverse(net)
    u = np.concatenate([testing.vec(b.numpy(U)) for U in Us])
    error = np.linalg.norm(u - exact @ net.v) / (np.linalg.norm(exact, 2) * np.linalg.norm(net.v))
    judge(b, "block_tridiagonal_inverse", error, testing.inverse_bound(np.linalg.cond(exact), b.eps))


@every_backend
@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0])
def test_block_tridiagonal_inverse(b, gamma):
    check_block_tridiagonal(b, gamma)


@pytest.mark.parametrize("b", [NUMPY, TORCH, TORCH_FLOAT32], ids=str)
@given(gamma=st.floats(0, 1), seed=st.integers(0, 1000))
def test_block_tridiagonal_inverse_of_random_networks(b, gamma, seed):
    check_block_tridiagonal(b, gamma, seed)


@jit_backends
def test_the_dense_form_and_its_determinant(b):
    net = network(b, 0.1)
    inverse = b.jit(block_tridiagonal_inverse)(net.factors, 0.1)
    found, its_logdet = b.jit(lambda inverse: (inverse.to_dense(), inverse.logdet()))(inverse)
    exact = pairwise_joint_inverse(net)
    bound = testing.inverse_bound(np.linalg.cond(exact), b.eps)
    np.testing.assert_allclose(b.numpy(found), exact, atol=bound * np.linalg.norm(exact, 2))
    logdet = np.linalg.slogdet(exact)[1]
    assert b.numpy(its_logdet) == pytest.approx(logdet, abs=len(exact) * bound)


@jit_backends
def test_without_links_it_is_the_block_diagonal_inverse(b):
    factors = network(b, 0.0).factors
    zero = Factors(factors.layers, tuple(Link(0 * A, 0 * G) for A, G in factors.links))
    Vs = tuple(b.array(np.ones((m, n))) for n, m in SIZES)
    one = b.jit(lambda zero: block_tridiagonal_inverse(zero, 0.1) @ Vs)(zero)
    other = b.jit(lambda factors: block_diagonal_inverse(factors, 0.1) @ Vs)(factors)
    for U, W in zip(one, other, strict=True):
        np.testing.assert_allclose(b.numpy(U), b.numpy(W), rtol=testing.inverse_bound(1e3, b.eps))


def test_a_damped_link_is_caught():
    """Damping goes on the factors alone."""
    net = network(NUMPY, 0.5)
    scaled = net.factors._replace(links=tuple(Link(1.001 * A, G) for A, G in net.factors.links))
    u = block_tridiagonal_inverse(scaled, 0.5).to_dense()
    exact = pairwise_joint_inverse(net)
    assert np.linalg.norm(u - exact, 2) > testing.inverse_bound(np.linalg.cond(exact), NUMPY.eps) * np.linalg.norm(
        exact, 2
    )


@jit_backends
def test_inconsistent_links_give_nan_in_their_layer(b):
    """A link that no joint distribution has: its layer, given the next, is not definite."""
    one = np.eye(2)
    factors = Factors(
        tuple(LayerFactors(b.array(one), b.array(one)) for _ in range(3)),
        (Link(b.array(0.5 * one), b.array(0.5 * one)), Link(b.array(1.1 * one), b.array(1.1 * one))),
    )
    inverse = b.jit(block_tridiagonal_inverse)(factors, 0.0)
    assert np.isfinite(b.numpy(inverse.Lambda[0].weights)).all()
    assert np.isnan(b.numpy(inverse.Lambda[1].weights)).all()
    assert np.isnan(b.numpy(b.jit(lambda inverse: inverse.logdet())(inverse)))


@jit_backends
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_exactly_damped_inverse(b, damping):
    net = network(b, 0.0)
    solved = b.jit(lambda factors, damping, Vs: exactly_damped_inverse(factors, damping) @ Vs)
    Us = solved(net.factors, damping, tuple(map(b.array, net.Vs)))
    for i, (U, V) in enumerate(zip(Us, net.Vs, strict=True)):
        dense = net.blocks[i][i] + damping * np.eye(len(net.blocks[i][i]))
        error = testing.backward_error(dense, testing.vec(b.numpy(U)), testing.vec(V))
        judge(b, "exactly_damped_inverse", error, testing.inverse_bound(np.linalg.cond(dense), b.eps))


def test_links_that_do_not_fit_are_refused():
    factors = network(NUMPY, 0.0).factors
    with pytest.raises(ValueError, match=r"factors\.links has 0 items, expected 3"):
        block_tridiagonal_inverse(factors._replace(links=()), 0.1)
    wrong = (Link(factors.links[0].A.T, factors.links[0].G), *factors.links[1:])
    with pytest.raises(ValueError, match=r"links\[0\]\.A has shape \(3, 5\), expected \(\.\.\., 5, 3\)"):
        block_tridiagonal_inverse(factors._replace(links=wrong), 0.1)
    with pytest.raises(ValueError, match="Vs has 3 items, expected 4"):
        block_tridiagonal_inverse(factors, 0.1).apply((np.ones((1, 1)),) * 3)


@pytest.mark.parametrize("gamma", [1e-1, 1e-2, 1e-3, 1e-4])
def test_its_float32_error_is_within_three_times_that_of_the_block_diagonal_inverse(gamma):
    """Against float64, on the same ill-conditioned factors: Ξᵀ Λ Ξ applies three operators where F̆⁻¹ is one."""
    errors = {}
    for inverse in (block_diagonal_inverse, block_tridiagonal_inverse):
        worst = []
        for seed in range(5):
            one, other = ill_conditioned(TORCH_FLOAT32, seed), ill_conditioned(TORCH, seed)
            Vs = [np.random.default_rng(seed).standard_normal((m, n)).astype("float32") for n, m in SIZES]
            rough = inverse(one, gamma) @ tuple(map(TORCH_FLOAT32.array, Vs))
            exact = inverse(other, gamma) @ tuple(map(TORCH.array, Vs))
            difference = sum(float((U.double() - W).square().sum()) for U, W in zip(rough, exact, strict=True))
            worst.append((difference / sum(float(W.square().sum()) for W in exact)) ** 0.5)
        errors[inverse] = np.median(worst)
    assert errors[block_tridiagonal_inverse] <= 3 * errors[block_diagonal_inverse]


def ill_conditioned(b: Backend, seed: int) -> Factors:
    """Inputs and gradients with scales from 1 to 1e-3, rounded to float32 once: both precisions see the same."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((60, 3))
    a, g = (
        [
            (common @ rng.standard_normal((3, size[side])) + 0.1 * rng.standard_normal((60, size[side])))
            * 10.0 ** -np.linspace(0, 3, size[side])
            for size in SIZES
        ]
        for side in (0, 1)
    )
    arrays = [[b.array(x.astype("float32")) for x in side] for side in (a, g)]
    return batch_factors(*arrays, links=True)


def one_sided(s_A, s_G):
    """Two layers of one unit, whose links have these squared correlations."""
    one = np.eye(1)
    return Factors((LayerFactors(one, one),) * 2, (Link(one * s_A**0.5, one * s_G**0.5),))


@pytest.mark.parametrize(("s_A", "s_G"), [(2.0, 0.25), (0.5, 1.5), (1.5, 0.6), (3.0, 0.3), (0.5, 0.5)])
def test_links_of_no_statistics_are_taken_as_they_are(s_A, s_G):
    """F = [[1, c], [c, 1]] with c² = s_A s_G is definite below 1, however large one of the two is."""
    c = (s_A * s_G) ** 0.5
    dense = block_tridiagonal_inverse(one_sided(s_A, s_G), 0.0).to_dense()
    np.testing.assert_allclose(dense, np.linalg.inv([[1, c], [c, 1]]), rtol=1e-12)


@pytest.mark.parametrize(("s_A", "s_G"), [(2.0, 0.75), (1.5, 1.5), (1.0, 1.0), (4.0, 0.25)])
def test_links_that_make_f_indefinite_give_nan(s_A, s_G):
    inverse = block_tridiagonal_inverse(one_sided(s_A, s_G), 0.0)
    assert np.isnan(inverse.Lambda[0].to_dense()).all()
