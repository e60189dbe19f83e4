"""SciPy's and NumPy's routines on torch's memory: taken where only values are asked for, the same but for rounding."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from backends import TORCH, TORCH_FLOAT32
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
    _backends,
    batch_factors,
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    exactly_damped_inverse,
    second_moment,
    show_config,
    spd,
    testing,
    update_factors,
)
from kfaclinalg._backends import composed, config, home, in_place, routines, single, spectra, views

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


def chain(A, G, V):
    """Two layers, of which each side is as wide as the other layer's other side."""
    layers = (LayerFactors(A, G), LayerFactors(G, A))
    return block_tridiagonal_inverse(Factors(layers, (Link(V.mT / 100, V / 100),)), 0.1)


def parts(M):
    return M.U, M.s, M.d


def flat(factors):
    return tuple(factors.layers[0])


def leaves(P):
    return P.A, P.B


# By name, a function of A (n, n), G (m, m) and V (m, n).
CALLS = {
    "spd.inverse": lambda A, G, V: spd.inverse(A),
    "spd.cholesky": lambda A, G, V: spd.cholesky(A),
    "CholeskyInverse": lambda A, G, V: CholeskyInverse(A) @ V.mT,
    "spd.solve": lambda A, G, V: spd.solve(A, V.mT),
    "spd.solve of a vector": lambda A, G, V: spd.solve(A, V[0, :]),
    "Kronecker": lambda A, G, V: Kronecker(A, G) @ V,
    "Kronecker, outer": lambda A, G, V: Kronecker(A, G) @ OuterProduct(G, V.mT),
    "Kronecker.inverse": lambda A, G, V: leaves(Kronecker(A, G).inverse()),
    "Kronecker.solve": lambda A, G, V: Kronecker(A, G).solve(V),
    "Kronecker.inverse cholesky": lambda A, G, V: Kronecker(A, G).inverse(method="cholesky") @ V,
    "second_moment": lambda A, G, V: second_moment(V),
    "batch_factors": lambda A, G, V: flat(batch_factors([V], [G])),
    "update_factors": lambda A, G, V: flat(update_factors(average(A, G), [V], [G], decay=0.5)),
    "spd.logdet": lambda A, G, V: spd.logdet(A),
    "spd.inverse_root": lambda A, G, V: spd.inverse_root(A, 2),
    "Kronecker.shifted_inverse": lambda A, G, V: Kronecker(A, G).shifted_inverse(0.1) @ V,
    "KroneckerBasis.inverse": lambda A, G, V: Kronecker(A, G).shifted_inverse(0.1).inverse() @ V,
    "KroneckerPair.inverse": lambda A, G, V: pair(A, G).inverse() @ V,
    "KroneckerPair.solve": lambda A, G, V: pair(A, G).solve(V),
    "KroneckerPair.logdet": lambda A, G, V: pair(A, G).logdet(),
    "LowRankPlusDiagonal.inverse": lambda A, G, V: parts(low_rank_of(A, 1.0).inverse()),
    "LowRankPlusDiagonal.solve": lambda A, G, V: low_rank_of(A, 1.0).solve(A),
    "LowRankPlusDiagonal.solve, s below zero": lambda A, G, V: low_rank_of(A, -0.1).solve(A),
    "LowRankPlusDiagonal.logdet": lambda A, G, V: low_rank_of(A, 1.0).logdet(),
    "LowRankPlusDiagonal.logdet, s below zero": lambda A, G, V: low_rank_of(A, -0.1).logdet(),
    "KroneckerPair.solve, smith": lambda A, G, V: pair(A, G).solve(V, "smith"),
    "block_tridiagonal_inverse": lambda A, G, V: chain(A, G, V) @ (V, V.mT),
    "exactly_damped_inverse": lambda A, G, V: exactly_damped_inverse(average(A, G), 0.1).blocks[0] @ V,
    "block_diagonal_inverse": lambda A, G, V: leaves(block_diagonal_inverse(average(A, G), 0.1).blocks[0]),
}
PRODUCTS = ("Kronecker", "Kronecker, outer", "second_moment", "batch_factors", "update_factors")
MOMENTS = {"second_moment": 1, "batch_factors": 2, "update_factors": 2}
RANK_N = (single.moment, single.updated_moment)
calls = pytest.mark.parametrize("name", CALLS)
both_ways = pytest.mark.parametrize("native", [False, True])  # by SciPy, and by torch in place


def arguments(b, n=N, m=M):
    rng = np.random.default_rng(n)
    return tuple(b.array(x) for x in (random_spd(rng, n), random_spd(rng, m), rng.standard_normal((m, n))))


@pytest.fixture
def machine(monkeypatch):
    """A machine of the processor and torch's BLAS, and the environment, that the test names."""

    def named(*, intel=False, mkl=True, native=False):
        monkeypatch.setattr(home, "is_intel", lambda: intel)
        monkeypatch.setattr(config, "is_intel", lambda: intel)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        monkeypatch.setattr(home, "is_native", lambda: native)
        home.mkl_is_slower.cache_clear()

    yield named
    monkeypatch.undo()
    home.mkl_is_slower.cache_clear()


@pytest.fixture
def taken(machine, monkeypatch):
    """A machine on which all goes to SciPy; the list grows with each routine that torch's tensors take there."""
    machine()
    steps = []
    viewed = home.viewed
    monkeypatch.setattr(home, "viewed", lambda f, *args: steps.append(f) or viewed(f, *args))
    return steps


def assert_close(b, name, args, computed):
    """An inverse and a solution to cond eps, a product to n eps, against NumPy in float64."""
    exact = [x.detach().numpy().astype(np.float64) for x in args]
    expected = CALLS[name](*exact)
    condition = len(exact[0]) if name in PRODUCTS else np.linalg.cond(exact[0]) * np.linalg.cond(exact[1])
    as_tuple = [x if isinstance(x, tuple) else (x,) for x in (computed, expected)]
    for x, y in zip(*as_tuple, strict=True):
        assert x.shape == y.shape
        error = np.linalg.norm(b.numpy(x) - np.asarray(y, dtype=np.float64))
        assert error <= testing.inverse_bound(condition, b.eps) * (1 + np.linalg.norm(y))


# --- the rule


@calls
@pytest.mark.parametrize("setting", [{"intel": True}, {"mkl": False}, {"native": True}], ids=str)
def test_elsewhere_only_what_torch_lacks_leaves_it(name, setting, taken, machine):
    machine(**setting)
    args = arguments(TORCH)
    assert_close(TORCH, name, args, CALLS[name](*args))
    left = [f for f in taken if f.__module__ != in_place.__name__]
    assert sum(f in RANK_N for f in left) == (0 if "native" in setting else MOMENTS.get(name, 0))
    assert not left or "native" not in setting
    others = [f for f in left if f not in (*RANK_N, spectra.pencil, spectra.pencil_values)]
    assert not [f for f in others if f.__module__ in (single.__name__, spectra.__name__)]  # formulas


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({}, "SciPy, since torch's BLAS is MKL and the processor is not Intel's"),
        ({"intel": True}, "torch, whose BLAS is MKL on an Intel processor; SciPy for what torch does not have"),
        ({"mkl": False}, "torch, whose BLAS is not MKL; SciPy for"),
        ({"native": True}, "torch, for KFACLINALG_BLAS=native"),
    ],
)
def test_show_config_says_which_way_is_taken_and_why(setting, said, machine, capsys):
    machine(**setting)
    show_config()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kfaclinalg ")
    assert [line.split()[0].strip(":") for line in lines[1:6]] == ["numpy", "scipy", "torch", "jax", "cupy"]
    assert lines[-1].startswith(f"single matrices of torch's CPU: {said}")


@pytest.mark.parametrize(("value", "native"), [("native", True), ("auto", False), (None, False)])
def test_the_environment_keeps_to_torch(value, native):
    code = "import torch; from kfaclinalg._backends import home; print(home.is_native(), home.goes_to_scipy())"
    environment = {k: v for k, v in os.environ.items() if k != "KFACLINALG_BLAS"}
    environment |= {} if value is None else {"KFACLINALG_BLAS": value}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said = printed.stdout.split()
    assert said[0] == str(native)
    assert said[1] == "False" if native else said[1] in ("True", "False")


def test_a_misspelt_environment_is_refused(monkeypatch):
    monkeypatch.setenv("KFACLINALG_BLAS", "mkl")
    with pytest.raises(ValueError, match="KFACLINALG_BLAS is 'mkl', expected 'auto' or 'native'"):
        home.is_native.__wrapped__()


def test_the_one_private_function_of_torch_tells_who_watches():
    """When it goes, ask each of `torch.func`, `torch.jit` and `torch.utils._python_dispatch`, or stay in torch."""
    seen = [views.is_watched()]
    with Mode():
        seen.append(views.is_watched())
    torch.func.vmap(lambda x: (seen.append(views.is_watched()), x)[1])(torch.ones(2))
    assert seen == [False, True, True]


# --- what is taken


@both_dtypes
@calls
@pytest.mark.parametrize(("n", "m"), [(N, M), (1, 1), (80, 81), (200, 161)])
def test_plain_tensors_are_taken(b, name, n, m, taken):
    args = arguments(b, n, m)
    before = [x.clone() for x in args]
    results = CALLS[name](*args)
    assert taken
    assert_close(b, name, args, results)
    for x, y in zip(args, before, strict=True):
        assert torch.equal(x, y)


@both_dtypes
@pytest.mark.parametrize("kind", testing.SPECTRA)
@pytest.mark.parametrize(("intel", "native"), [(False, False), (True, False), (False, True)])
def test_errors_are_within_their_bounds(b, kind, intel, native, taken, machine, monkeypatch):
    monkeypatch.setattr(single, "is_intel", lambda: intel)  # another way to invert a factor
    machine(native=native)
    for n in (2, 24, 200, 512) if kind == testing.SPECTRA[0] else (2, 24, 200):
        sample = Sample(n, kind=kind, decades=0.8)
        check_inverse(b, sample)
        check_solve(b, sample)
    assert len(taken) >= 6


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other entry": lambda x: torch.repeat_interleave(torch.repeat_interleave(x, 2, 0), 2, 1)[::2, ::2],
    "of a batch along the last axis": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "at an odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(x.shape),
    "without a gradient": lambda x: x.clone().requires_grad_().detach(),
}


@calls
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_taken(name, layout, taken):
    args = arguments(TORCH_FLOAT32)
    assert_close(TORCH_FLOAT32, name, args, CALLS[name](*map(layout, args)))
    assert taken


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


WATCHED_CALLS = ("block_diagonal_inverse", "Kronecker", "second_moment")  # all take the one door, `views`


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("watch", WATCHED)
@pytest.mark.parametrize("name", WATCHED_CALLS)
def test_what_asks_for_more_than_values_is_left_to_torch(name, watch, taken):
    args = arguments(TORCH)
    f = CALLS[name] if name != "Kronecker" else lambda A, G, V: Kronecker(A, G).apply(V)
    results = WATCHED[watch](f, *args)
    assert not taken
    assert_close(TORCH, name, args, results)
    # the same after the watch is gone
    f(*args)
    assert taken


@calls
def test_several_processes_stay_in_torch(name, taken, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    args = arguments(TORCH)
    assert_close(TORCH, name, args, CALLS[name](*args))
    assert {f.__module__ for f in taken} <= {in_place.__name__}


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
@both_ways
@pytest.mark.parametrize("n", [3, 130, 512])
@pytest.mark.parametrize(
    "kind",
    [
        *("negative", "zero", "NaN on the diagonal", "NaN above", "NaN below", "infinity on the diagonal"),
        *("infinity above", "minus infinity"),
    ],
)
def test_what_is_not_definite_is_nan_and_nothing_warns(b, native, kind, n, taken, machine):
    machine(native=native)
    A = np.eye(n, dtype=b.dtype)
    A[-3:, -3:] = broken(kind, b.dtype)
    A, V = b.array(A), b.array(np.ones((n, 2)))
    for result in (spd.inverse(A), spd.solve(A, V)):
        assert torch.isnan(result).all()
    assert len(taken) == 2


@both_dtypes
def test_products_with_nan_and_infinity_are_those_of_torch(b, taken, machine):
    A, G, V = arguments(b, 5, 4)
    V[0, 0], V[1, 1], V[2, 2] = torch.nan, torch.inf, -torch.inf
    A[3, 3], G[3, 3] = torch.inf, 0.0
    for f in (lambda: Kronecker(A, G) @ V, lambda: batch_factors([V], [V])):
        machine()
        there = f()
        machine(native=True)
        for x, y in zip(*(torch.utils._pytree.tree_leaves(r) for r in (there, f())), strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)
    assert len(taken) == 3


@both_dtypes
@both_ways
@pytest.mark.parametrize("n", [1, 2, 79, 80, 81, 160, 161, 257, 512])
def test_symmetric_results_are_exactly_symmetric(b, native, n, taken, machine):
    machine(native=native)
    A, G, V = arguments(b, n, 4)
    old = LayerFactors(A + A.mT, G + G.mT)
    results = [
        spd.inverse(A + V.mT @ V),
        *flat(batch_factors([V], [G])),
        *flat(update_factors(Factors((old,)), [V], [G], decay=0.5)),
    ]
    for x in results:
        assert torch.equal(x, x.mT)
    assert len(taken) == (1 if native else 5)


@both_dtypes
@both_ways
@pytest.mark.parametrize("n", [1, 2, 79, 80, 81, 160, 161, 257])
def test_a_cholesky_factor_is_zero_above_the_diagonal(b, native, n, taken, machine):
    machine(native=native)
    L = spd.cholesky(arguments(b, n, 4)[0])
    assert len(taken) == 1
    assert torch.equal(L, L.tril())


@both_ways
@pytest.mark.parametrize("n", [81, 512])
def test_a_shift_below_zero_is_added_to_all_rows(native, n, taken, machine):
    machine(native=native)
    M, shift = 5 * torch.eye(n), torch.tensor(-3.0)
    torch.testing.assert_close(routines.inverse(M, shift), torch.eye(n) / 2)
    torch.testing.assert_close(routines.cholesky(M, shift), 2**0.5 * torch.eye(n))
    for f in (routines.inverse, routines.cholesky):
        assert torch.isnan(f(M, 2 * shift)).all()
    assert len(taken) == 4


@both_ways
def test_another_default_device_changes_nothing(native, taken, machine):
    machine(native=native)
    A = arguments(TORCH)[0]
    with torch.device("meta"):
        assert torch.equal(spd.inverse(A), spd.inverse(A.clone()))
    assert len(taken) == 2


@both_ways
def test_large_entries_do_not_overflow_when_symmetrised(native, taken, machine):
    machine(native=native)
    A = torch.eye(3) * 3e38
    torch.testing.assert_close(spd.inverse(A), torch.eye(3) / 3e38)
    assert len(taken) == 1


@pytest.mark.parametrize("routine", ["pencil", "pencil_values"])
@pytest.mark.parametrize(("n", "module"), [(64, spectra), (65, in_place)])
def test_of_torchs_several_calls_small_matrices_take_one_of_scipys(routine, n, module, taken, machine):
    machine(intel=True)
    getattr(composed, routine)(torch.eye(n), torch.eye(n))
    assert taken == [getattr(module, routine)]


@pytest.mark.parametrize(("setting", "processes"), [({"intel": True}, False), ({"native": True}, False), ({}, True)])
def test_scipy_factors_small_matrices_where_torch_may_leave_them(setting, processes, taken, machine, monkeypatch):
    machine(**setting)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes)
    factored, potrf = [], single.potrf
    monkeypatch.setattr(single, "potrf", lambda X: factored.append(len(X)) or potrf(X))
    for n in (2, 512, 513):
        torch.testing.assert_close(spd.cholesky(4 * torch.eye(n)), 2 * torch.eye(n))
    assert factored == ([2, 512] if "intel" in setting else [])
    assert taken == [in_place.cholesky] * 3


@pytest.mark.parametrize("routine", [routines.eigh, routines.eigvalsh])
def test_eigenvalues_that_do_not_converge_in_place_are_nan(routine, taken, machine, monkeypatch):
    machine(native=True)

    def fails(M):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, routine.__name__, fails)
    found = routine(torch.eye(3))
    assert all(torch.isnan(x).all() for x in (found if isinstance(found, tuple) else (found,)))
    assert len(taken) == 1


def test_the_table_of_the_cellar_is_that_of_the_code():
    """`_backends.__doc__` shows, routine by routine, which bodies there are."""
    rows = [line for line in _backends.__doc__.splitlines() if line.startswith("| ") and "routine" not in line]
    shown = {}
    for line in rows:
        names, *marks = [cell.strip() for cell in line.strip("|").split("|")]
        columns = ("single", "in_place", "torch", "jax", "cupy", "numpy")
        shown |= {name: {c for c, mark in zip(columns, marks, strict=True) if mark} for name in names.split(", ")}
    found = {
        name: f.bodies
        for module in (routines, composed)
        for name, f in vars(module).items()
        if hasattr(f, "bodies") and f.__module__ == module.__name__
    }
    assert shown == found


def test_the_bounds_catch_a_triangle_that_is_not_copied(monkeypatch, taken, machine):
    monkeypatch.setattr(single, "mirrored", lambda X: X.T)
    with pytest.raises(AssertionError):
        test_symmetric_results_are_exactly_symmetric(TORCH, False, N, taken, machine)
