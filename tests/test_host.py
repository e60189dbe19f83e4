"""SciPy's and NumPy's routines on torch's memory: taken where only values are asked for, the same but for rounding."""

from itertools import product

import numpy as np
import pytest
import torch
from backends import NUMPY, TORCH, TORCH_FLOAT32
from matrices import Sample, random_spd
from test_spd import check_inverse, check_solve
from torch.fx.experimental.proxy_tensor import make_fx

from kfaclinalg import (
    CholeskyInverse,
    Diagonal,
    Factors,
    Kronecker,
    KroneckerPair,
    LayerFactors,
    Link,
    LowRankPlusDiagonal,
    OuterProduct,
    _host,
    _lapack,
    batch_factors,
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    exactly_damped_inverse,
    factored_tikhonov,
    second_moment,
    spd,
    testing,
    tikhonov_pi,
    update_factors,
)

N, M = 83, 3  # more than one block, and less
both_dtypes = pytest.mark.parametrize("b", [TORCH, TORCH_FLOAT32], ids=str)


def average(A, G):
    return Factors((LayerFactors(A, G),))


def pair(A, G):
    return KroneckerPair(A, G, 0.5 * A, 0.5 * G)


def low_rank_of(A, sign):
    """Rank two, or one, from the columns of A."""
    k = min(2, A.shape[-1])
    d = A.diagonal(0, -2, -1) if isinstance(A, np.ndarray) else A.diagonal(dim1=-2, dim2=-1)
    return LowRankPlusDiagonal(0.1 * A[..., :k], sign * d[..., -k:], d)


def chain(A, G, V, blas):
    """Two layers, of which each side is as wide as the other layer's other side."""
    layers = (LayerFactors(A, G), LayerFactors(G, A))
    return block_tridiagonal_inverse(Factors(layers, (Link(V.mT / 100, V / 100),)), 0.1, blas=blas)


def parts(M):
    return M.U, M.s, M.d


def applied(inverse, V, blas):
    return inverse.apply(V, blas=blas)


def flat(factors):
    return tuple(factors.layers[0])


# By name, a function of A (n, n), G (m, m), V (m, n), `blas`; and how many arrays the host returns to it.
CALLS = {
    "spd.inverse": (lambda A, G, V, blas: spd.inverse(A, blas=blas), 1),
    "spd.cholesky": (lambda A, G, V, blas: spd.cholesky(A, blas=blas), 1),
    "CholeskyInverse.apply": (lambda A, G, V, blas: CholeskyInverse(A).apply(V.mT, blas=blas), 1),
    "spd.solve": (lambda A, G, V, blas: spd.solve(A, V.mT, blas=blas), 1),
    "spd.solve of a vector": (lambda A, G, V, blas: spd.solve(A, V[0, :], blas=blas), 1),
    "Kronecker.apply": (lambda A, G, V, blas: Kronecker(A, G).apply(V, blas=blas), 1),
    "Kronecker.apply, outer": (lambda A, G, V, blas: Kronecker(A, G).apply(OuterProduct(G, V.mT), blas=blas), 1),
    "Kronecker.inverse": (lambda A, G, V, blas: tuple(leaves(Kronecker(A, G).inverse(blas=blas))), 2),
    "Kronecker.solve": (lambda A, G, V, blas: Kronecker(A, G).solve(V, blas=blas), 1),
    "Kronecker.inverse cholesky": (
        lambda A, G, V, blas: Kronecker(A, G).inverse(method="cholesky", blas=blas).apply(V, blas=blas),
        4,
    ),
    "second_moment": (lambda A, G, V, blas: second_moment(V, blas=blas), 1),
    "batch_factors": (lambda A, G, V, blas: flat(batch_factors([V], [G], blas=blas)), 2),
    "update_factors": (lambda A, G, V, blas: flat(update_factors(average(A, G), [V], [G], decay=0.5, blas=blas)), 2),
    "spd.logdet": (lambda A, G, V, blas: spd.logdet(A, blas=blas), 1),
    "spd.inverse_root": (lambda A, G, V, blas: spd.inverse_root(A, 2, blas=blas), 1),
    "Kronecker.shifted_inverse": (
        lambda A, G, V, blas: applied(Kronecker(A, G).shifted_inverse(0.1, blas=blas), V, blas),
        4,
    ),
    "KroneckerPair.inverse": (lambda A, G, V, blas: applied(pair(A, G).inverse(blas=blas), V, blas), 4),
    "KroneckerPair.solve": (lambda A, G, V, blas: pair(A, G).solve(V, blas=blas), 10),
    "LowRankPlusDiagonal.inverse": (
        lambda A, G, V, blas: tuple(parts(low_rank_of(A, 1.0).inverse(blas=blas))),
        3,
    ),
    "LowRankPlusDiagonal.solve": (lambda A, G, V, blas: low_rank_of(A, 1.0).solve(A, blas=blas), 1),
    "LowRankPlusDiagonal.solve, s below zero": (lambda A, G, V, blas: low_rank_of(A, -0.1).solve(A, blas=blas), 1),
    "LowRankPlusDiagonal.logdet": (lambda A, G, V, blas: low_rank_of(A, 1.0).logdet(blas=blas), 1),
    "LowRankPlusDiagonal.logdet, s below zero": (lambda A, G, V, blas: low_rank_of(A, -0.1).logdet(blas=blas), 1),
    "KroneckerPair.solve, smith": (lambda A, G, V, blas: pair(A, G).solve(V, "smith", blas=blas), 6),
    "tikhonov_pi": (lambda A, G, V, blas: tikhonov_pi(LayerFactors(A, G), blas=blas), 1),
    "factored_tikhonov": (lambda A, G, V, blas: tuple(factored_tikhonov(LayerFactors(A, G), 0.1, blas=blas)), 1),
    "block_tridiagonal_inverse": (lambda A, G, V, blas: applied(chain(A, G, V, blas), (V, V.mT), blas), 14),
    "exactly_damped_inverse": (
        lambda A, G, V, blas: applied(exactly_damped_inverse(average(A, G), 0.1, blas=blas).blocks[0], V, blas),
        4,
    ),
    "block_diagonal_inverse": (
        lambda A, G, V, blas: tuple(leaves(block_diagonal_inverse(average(A, G), 0.1, blas=blas).blocks[0])),
        2,
    ),
}
PRODUCTS = ("Kronecker.apply", "Kronecker.apply, outer", "second_moment", "batch_factors", "update_factors")
calls = pytest.mark.parametrize(("f", "count"), CALLS.values(), ids=CALLS)


def leaves(P):
    return P.A, P.B


def arguments(b, n=N, m=M):
    rng = np.random.default_rng(n)
    return tuple(b.array(x) for x in (random_spd(rng, n), random_spd(rng, m), rng.standard_normal((m, n))))


@pytest.fixture
def taken(monkeypatch):
    """Every trial is won by the host; the list grows with each of its routines that torch's arrays take."""
    steps = []
    back = torch.from_numpy

    def counted(x):
        steps.append(x.shape)
        return back(x)

    monkeypatch.setattr(torch, "from_numpy", counted)
    monkeypatch.setattr(_host, "_pays", {})
    monkeypatch.setattr(_host, "_trial", lambda host, native, views: True)
    return steps


def assert_close(b, f, args, computed):
    """An inverse and a solution to cond eps, a product to n eps, against NumPy in float64."""
    exact = [x.detach().numpy().astype(np.float64) for x in args]
    expected = f(*exact, "auto")
    inverts = f not in [CALLS[name][0] for name in PRODUCTS]
    condition = np.linalg.cond(exact[0]) * np.linalg.cond(exact[1]) if inverts else len(exact[0])
    as_tuple = [x if isinstance(x, tuple) else (x,) for x in (computed, expected)]
    for x, y in zip(*as_tuple, strict=True):
        assert x.shape == y.shape
        error = np.linalg.norm(b.numpy(x) - np.asarray(y, dtype=np.float64))
        assert error <= testing.inverse_bound(condition, b.eps) * (1 + np.linalg.norm(y))


@both_dtypes
@calls
@pytest.mark.parametrize(("n", "m"), [(N, M), (1, 1), (80, 81), (200, 161)])
def test_plain_tensors_are_taken(b, f, count, n, m, taken):
    args = arguments(b, n, m)
    before = [x.clone() for x in args]
    results = f(*args, "auto")
    assert len(taken) == count
    assert_close(b, f, args, results)
    assert len(taken) == count
    for x, y in zip(args, before, strict=True):
        assert torch.equal(x, y)


@both_dtypes
@pytest.mark.parametrize("kind", testing.SPECTRA)
def test_errors_are_within_their_bounds(b, kind, taken):
    for n in (2, 24, 200):
        sample = Sample(n, kind=kind, decades=0.8)
        check_inverse(b, sample)
        check_solve(b, sample)
    assert len(taken) >= 6


@both_dtypes
@calls
def test_native_keeps_to_torch(b, f, count, taken):
    args = arguments(b)
    assert_close(b, f, args, f(*args, "native"))
    assert not taken


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other entry": lambda x: torch.repeat_interleave(torch.repeat_interleave(x, 2, 0), 2, 1)[::2, ::2],
    "of a batch along the last axis": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "at an odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(x.shape),
    "without a gradient": lambda x: x.clone().requires_grad_().detach(),
}


@both_dtypes
@calls
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_taken(b, f, count, layout, taken):
    args = arguments(b)
    assert_close(b, f, args, f(*map(layout, args), "auto"))
    assert len(taken) == count


def compiled(f, *args):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="eager")(*args)


def dual(f, *args):
    with torch.autograd.forward_ad.dual_level():
        results = f(*(torch.autograd.forward_ad.make_dual(x, x) for x in args))
        return torch.utils._pytree.tree_map(lambda x: torch.autograd.forward_ad.unpack_dual(x).primal, results)


def with_gradients(f, *args):
    results = f(*(x.clone().requires_grad_() for x in args))
    return torch.utils._pytree.tree_map(torch.detach, results)


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def in_a_mode(f, *args):
    with Mode():
        return f(*args)


WATCHED = {
    "requires_grad": with_gradients,
    "vmap": lambda f, *args: torch.utils._pytree.tree_map(
        lambda x: x[1], torch.vmap(f)(*(torch.stack([x, x]) for x in args))
    ),
    "vmap over V alone": lambda f, A, G, V: torch.utils._pytree.tree_map(
        lambda x: x[1], torch.vmap(lambda V: f(A, G, V))(torch.stack([V, V]))
    ),
    "jvp": lambda f, *args: torch.func.jvp(f, args, args)[0],
    "forward mode": dual,
    "functionalize": lambda f, *args: torch.func.functionalize(f)(*args),
    "torch.compile": compiled,
    "make_fx": lambda f, *args: make_fx(f)(*args)(*args),
    "torch.jit.trace": lambda f, *args: torch.jit.trace(f, args, check_trace=False)(*args),
    "a dispatch mode": in_a_mode,
    "a batch": lambda f, *args: torch.utils._pytree.tree_map(lambda x: x[0], f(*(x[None] for x in args))),
}


UNDEFINED = [
    ("spd.solve of a vector", "a batch"),  # a row of a batch is no vector
    ("block_tridiagonal_inverse", "jvp"),  # torch has no tangent of a complete QR factorisation
    ("block_tridiagonal_inverse", "forward mode"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("f", "count", "watch"),
    [
        pytest.param(*CALLS[name], WATCHED[watch], id=f"{name}-{watch}")
        for name, watch in product(CALLS, WATCHED)
        if (name, watch) not in UNDEFINED
    ],
)
def test_what_asks_for_more_than_values_is_left_to_torch(f, count, watch, taken):
    args = arguments(TORCH)
    results = watch(lambda *args: f(*args, "auto"), *args)
    assert not taken
    assert_close(TORCH, f, args, results)
    # the same after the watch is gone
    f(*args, "auto")
    assert len(taken) == count


def test_a_constant_gradient_is_taken_under_no_grad(taken):
    A = arguments(TORCH)[0].requires_grad_()
    with torch.no_grad():
        assert not spd.inverse(A).requires_grad
    assert len(taken) == 1
    assert spd.inverse(A).requires_grad
    assert len(taken) == 1


@pytest.mark.parametrize("x", [torch._neg_view(-torch.eye(3)), torch.nn.Parameter(torch.eye(3), requires_grad=False)])
def test_what_has_no_view_is_left_to_torch(x, taken):
    torch.testing.assert_close(spd.inverse(x), torch.eye(3))
    assert not taken


def test_nothing_else_is_taken(taken):
    meta, empty = torch.ones(3, 3, device="meta"), torch.ones(0, 0)
    assert spd.inverse(meta).shape == (3, 3)
    assert spd.inverse(empty).shape == (0, 0)
    assert spd.solve(torch.eye(3), torch.ones(3, 0)).shape == (3, 0)
    assert (Kronecker(empty, torch.eye(2)) @ torch.ones(2, 0)).shape == (2, 0)
    assert batch_factors([torch.ones(2, 0)], [torch.ones(2, 0)]).layers[0].A.shape == (0, 0)
    assert (Kronecker(Diagonal(torch.ones(3)), Diagonal(torch.ones(2))) @ torch.ones(2, 3)).shape == (2, 3)
    assert not taken
    half = Kronecker(torch.eye(3), torch.eye(2)) @ torch.ones(2, 3, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert len(taken) == 1


def broken(kind, dtype):
    A = np.diag([3.0, 2.0, 1.0]) + np.ones((3, 3))
    i, j, x = {
        "negative": (2, 2, -4.0),
        "zero": (1, 1, 0.5),
        "NaN on the diagonal": (1, 1, np.nan),
        "NaN above": (0, 2, np.nan),
        "NaN below": (2, 0, np.nan),
        "infinity on the diagonal": (0, 0, np.inf),
        "infinity above": (0, 1, np.inf),
        "minus infinity": (1, 0, -np.inf),
    }[kind]
    A[i, j] = x
    if kind == "minus infinity":
        A[j, i] = np.inf
    return A.astype(dtype)


@both_dtypes
@pytest.mark.parametrize("n", [3, 130])
@pytest.mark.parametrize(
    "kind",
    [
        *("negative", "zero", "NaN on the diagonal", "NaN above", "NaN below", "infinity on the diagonal"),
        *("infinity above", "minus infinity"),
    ],
)
def test_what_is_not_definite_is_nan_and_nothing_warns(b, kind, n, taken):
    A = np.eye(n, dtype=b.dtype)
    A[-3:, -3:] = broken(kind, b.dtype)
    A, V = b.array(A), b.array(np.ones((n, 2)))
    for result in (spd.inverse(A), spd.solve(A, V)):
        assert torch.isnan(result).all()
    assert len(taken) == 2
    for result in (spd.inverse(A, blas="native"), spd.solve(A, V, blas="native")):
        assert torch.isnan(result).all()
    assert len(taken) == 2


@both_dtypes
def test_products_with_nan_and_infinity_are_those_of_torch(b, taken):
    A, G, V = arguments(b, 5, 4)
    V[0, 0], V[1, 1], V[2, 2] = torch.nan, torch.inf, -torch.inf
    A[3, 3], G[3, 3] = torch.inf, 0.0
    for f in (lambda blas: Kronecker(A, G).apply(V, blas=blas), lambda blas: batch_factors([V], [V], blas=blas)):
        auto, native = f("auto"), f("native")
        for x, y in zip(*(torch.utils._pytree.tree_leaves(r) for r in (auto, native)), strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)
    assert len(taken) == 3


@both_dtypes
@pytest.mark.parametrize("n", [1, 2, 79, 80, 81, 160, 161, 257])
def test_symmetric_results_are_exactly_symmetric(b, n, taken):
    A, G, V = arguments(b, n, 4)
    old = LayerFactors(A + A.mT, G + G.mT)
    results = [
        spd.inverse(A + V.mT @ V),
        *flat(batch_factors([V], [G])),
        *flat(update_factors(Factors((old,)), [V], [G], decay=0.5)),
    ]
    for x in results:
        assert torch.equal(x, x.mT)
    assert len(taken) == 5


@both_dtypes
@pytest.mark.parametrize("n", [1, 2, 79, 80, 81, 160, 161, 257])
def test_a_cholesky_factor_is_zero_above_the_diagonal(b, n, taken):
    L = spd.cholesky(arguments(b, n, 4)[0])
    assert len(taken) == 1
    assert torch.equal(L, L.tril())


def test_large_entries_do_not_overflow_when_symmetrised(taken):
    A = torch.eye(3) * 3e38
    torch.testing.assert_close(spd.inverse(A), torch.eye(3) / 3e38)
    assert len(taken) == 1


def test_the_trial_is_held_once_for_each_routine_and_dtype(monkeypatch):
    held = []
    monkeypatch.setattr(_host, "_pays", {})
    monkeypatch.setattr(_host, "_trial", lambda host, native, views: held.append(host) or len(held) == 1)
    for _ in range(2):
        for b in (TORCH, TORCH_FLOAT32):
            A, _, V = arguments(b)
            spd.inverse(A)
            spd.solve(A, V.mT)
    assert held == [_lapack.inverse, _lapack.solve] * 2
    assert list(_host._pays.values()) == [True, False, False, False]


@pytest.mark.parametrize(("seconds", "wins"), [((1.0, 2.0), True), ((1.95, 2.0), False), ((2.0, 1.0), False)])
@pytest.mark.parametrize("scalar", [(), (0.5,)])
def test_the_trial_is_won_by_who_is_clearly_faster(seconds, wins, scalar, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_host, "perf_counter", lambda: clock[0])

    def taking(seconds, array):
        def f(*args):
            assert [type(x) for x in args] == [*(float for _ in scalar), array]
            clock[0] += seconds

        return f

    here, there = taking(seconds[0], np.ndarray), taking(seconds[1], torch.Tensor)
    assert _host._trial(here, there, [*scalar, np.ones((2, 2))]) is wins


def test_the_trials_run(monkeypatch):
    monkeypatch.setattr(_host, "_pays", {})
    monkeypatch.setattr(_host, "SIZE", 65)
    for b in (TORCH, TORCH_FLOAT32):
        for f, _ in CALLS.values():
            f(*arguments(b), "auto")
    assert len(_host._pays) == 2 * 23


A2 = np.eye(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: spd.inverse(A2, blas="mkl"),
        lambda: spd.solve(A2, A2, blas="mkl"),
        lambda: Kronecker(A2, A2).apply(A2, blas="mkl"),
        lambda: Kronecker(A2, A2).apply_outer(A2, A2, blas="mkl"),
        lambda: Kronecker(Diagonal(A2[0]), Diagonal(A2[0])).apply(A2, blas="mkl"),
        lambda: Kronecker(Diagonal(A2[0]), Diagonal(A2[0])).inverse(blas="mkl"),
        lambda: Kronecker(Diagonal(A2[0]), Diagonal(A2[0])).solve(A2, blas="mkl"),
        lambda: Kronecker(Diagonal(A2[0]), Diagonal(A2[0])).inverse_root(2, blas="mkl"),
        lambda: Kronecker(Diagonal(A2[0]), Diagonal(A2[0])).logdet(blas="mkl"),
        lambda: Kronecker(A2, A2).shifted_inverse(1.0, blas="mkl"),
        lambda: pair(A2, A2).inverse(blas="mkl"),
        lambda: low_rank_of(A2, 1.0).inverse("sherman-morrison", blas="mkl"),
        lambda: low_rank_of(A2, 1.0).solve(A2, blas="mkl"),
        lambda: block_diagonal_inverse(average(A2, A2), 0.1, blas="mkl"),
    ],
)
def test_an_unknown_blas_is_refused(call):
    with pytest.raises(ValueError, match="blas is 'mkl', expected one of 'auto', 'native'"):
        call()


def test_numpy_takes_its_own_whatever_the_trials(monkeypatch):
    monkeypatch.setattr(_host, "_trial", None)
    A, G, V = arguments(NUMPY)
    for f, _ in CALLS.values():
        auto, native = (f(A, G, V, blas) for blas in _host.CHOICES)
        np.testing.assert_equal(auto, native)


def test_the_bounds_catch_a_triangle_that_is_not_copied(monkeypatch, taken):
    monkeypatch.setattr(_lapack, "mirrored", lambda X: X.T)
    with pytest.raises(AssertionError):
        test_symmetric_results_are_exactly_symmetric(TORCH, N, taken)
