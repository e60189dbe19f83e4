"""The library's branch for CuPy, on a double of CuPy that needs no GPU."""

import importlib.util
import sys

import array_api_compat
import cupy_double
import numpy as np
import pytest
from backends import NUMPY
from matrices import random_spd
from test_value import Product

from kfaclinalg import (
    Factors,
    Kronecker,
    LayerFactors,
    _backends,
    batch_factors,
    block_diagonal_inverse,
    factored_tikhonov,
    fit_quadratic,
    spd,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy itself is there")


@pytest.fixture(scope="module")
def cupy():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield cupy_double.install(monkeypatch)
    assert not [name for name in sys.modules if name.startswith(("cupy.", "cupyx", "array_api_compat.cupy"))]
    assert not hasattr(array_api_compat, "cupy")


def close(x, expected):
    assert type(x) is cupy_double.ndarray
    assert x.dtype == expected.dtype
    np.testing.assert_allclose(x.get(), expected, rtol=1e-10, atol=1e-12)


def matrices(*batch):
    rng = np.random.default_rng(0)
    A, G = (np.stack([random_spd(rng, n) for _ in range(int(np.prod(batch)))]).reshape(*batch, n, n) for n in (4, 3))
    return A, G, rng.standard_normal((*batch, 3, 4))


# --- the double refuses what CuPy refuses


def test_the_double_is_taken_for_cupy(cupy):
    x = cupy.asarray(np.eye(2))
    b = _backends.resolve(x=x)
    assert b.kind == "cupy"
    assert b.xp.__name__ == "array_api_compat.cupy"
    assert b.device == cupy.cuda.Device(0)


@pytest.mark.parametrize(
    "slip",
    [
        np.asarray,
        np.linalg.inv,
        lambda x: np.eye(2) + x,
        lambda x: x + np.eye(2),
        lambda x: x @ np.eye(2),
        lambda x: np.eye(2) @ x,
        lambda x: np.where(x > 0, 1.0, 0.0),
        lambda x: sys.modules["cupy"].where(x > 0, x, np.eye(2)),
        lambda x: x[np.asarray([0, 1])],
        lambda x: bool(x[0, 0] > 0),
        lambda x: float(x[0, 0]),
        list,
        lambda x: Kronecker(x, np.eye(2)),
        lambda x: Kronecker(x, x) @ np.eye(2),
    ],
)
def test_nothing_is_converted_implicitly(cupy, slip):
    with pytest.raises(TypeError):
        slip(cupy.asarray(np.eye(2)))


def test_its_gaps_are_those_of_cupy(cupy):
    from cupyx.scipy.linalg import solve_triangular

    indefinite = cupy.asarray([[1.0, 2.0], [2.0, 1.0]])
    np.testing.assert_array_equal(cupy.linalg.cholesky(indefinite).get(), [[1, 0], [2, -3]])
    stack = cupy.asarray(np.ones((3, 2, 1)))
    for solve in (cupy.linalg.solve, solve_triangular):
        with pytest.raises(ValueError, match="incompatible dimensions"):
            solve(indefinite, stack)
    close(solve_triangular(indefinite, stack[0], lower=True), np.asarray([[1.0], [-1.0]]))
    close(solve_triangular(indefinite, stack[0], lower=True, trans="T"), np.asarray([[-1.0], [1.0]]))


# --- the library on it

FUNCTIONS = {
    "spd.inverse": lambda A, G, V: spd.inverse(A),
    "spd.solve": lambda A, G, V: spd.solve(G, V),
    "spd.inverse_root": lambda A, G, V: spd.inverse_root(A, 2),
    "spd.logdet": lambda A, G, V: spd.logdet(A),
    "Kronecker @": lambda A, G, V: Kronecker(A, G) @ V,
    "Kronecker.inverse": lambda A, G, V: Kronecker(A, G).inverse() @ V,
    "Kronecker.solve": lambda A, G, V: Kronecker(A, G).solve(V),
    "Kronecker.inverse_root": lambda A, G, V: Kronecker(A, G).inverse_root(2) @ V,
    "Kronecker.apply_outer": lambda A, G, V: Kronecker(A, G).apply_outer(V @ V.mT, V.mT),
    "Kronecker.logdet": lambda A, G, V: Kronecker(A, G).logdet(),
    "Kronecker.trace": lambda A, G, V: Kronecker(A, G).trace(),
    "Kronecker.diagonal": lambda A, G, V: Kronecker(A, G).diagonal(),
    "Kronecker.to_dense": lambda A, G, V: Kronecker(A, G).to_dense(),
    "factored_tikhonov": lambda A, G, V: factored_tikhonov(LayerFactors(A, G), 0.1).G,
    "batch_factors": lambda A, G, V: batch_factors([V], [V]).layers[0].A,
    "block_diagonal_inverse": lambda A, G, V: block_diagonal_inverse(Factors((LayerFactors(A, G),)), 0.1).apply((V,))[
        0
    ],
    "fit_quadratic": lambda A, G, V: fit_quadratic(A, A, V[..., 0, :], 0.1).coefficients,
    "fit_quadratic.change": lambda A, G, V: fit_quadratic(A, A, V[..., 0, :], 0.1).change,
}
each_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


@each_function
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_values_are_those_of_numpy(cupy, f, batch, dtype):
    expected = f(*matrices(*batch))
    got = f(*(cupy.asarray(x, dtype=dtype) for x in matrices(*batch)))
    assert type(got) is cupy_double.ndarray
    assert got.dtype == dtype
    tolerance = 1e-10 if dtype == np.float64 else 1e-3
    np.testing.assert_allclose(got.get(), expected, rtol=tolerance, atol=tolerance)


def test_one_operator_acts_on_a_batch(cupy):
    A, G, V = matrices(3)
    for f in (lambda P, V: P @ V, lambda P, V: P.solve(V), lambda P, V: P.inverse() @ V):
        close(f(Kronecker(cupy.asarray(A[0]), cupy.asarray(G)), cupy.asarray(V)), f(Kronecker(A[0], G), V))
        close(f(Kronecker(cupy.asarray(A), cupy.asarray(G)), cupy.asarray(V[0])), f(Kronecker(A, G), V[0]))
    close(spd.solve(cupy.asarray(G), cupy.asarray(V[0, :, 0])), spd.solve(G, V[0, :, 0]))


FACTORISE = [name for name in FUNCTIONS if "inverse" in name or "solve" in name or "logdet" in name or "fit" in name]


@pytest.mark.parametrize("f", [FUNCTIONS[name] for name in FACTORISE], ids=FACTORISE)
@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -100.0])
def test_the_failing_member_is_nan_and_the_others_are_untouched(cupy, f, spoilt):
    A, G, V = matrices(3)
    A[1, 0, 0] = G[1, 0, 0] = spoilt
    if spoilt == -100.0 and f in (FUNCTIONS["fit_quadratic"], FUNCTIONS["fit_quadratic.change"]):
        return  # a direction without positive curvature is dropped
    got = f(*(cupy.asarray(x) for x in (A, G, V))).get()
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2]], f(*(x[[0, 2]] for x in (A, G, V))), rtol=1e-10, atol=1e-12)


# --- between CuPy and NumPy only when asked


def test_to_namespace_moves_nothing_between_devices_unasked(cupy):
    P = Product(*matrices()[:2])
    with pytest.raises(ValueError, match="cupy has no arrays on the host: name the device"):
        P.to_namespace(cupy)
    there = P.to_namespace(cupy, device=cupy.cuda.Device(0))
    close(there.A, P.A)
    assert repr(there) == "Product(A: (4, 4), B: (3, 3), float64, <CUDA Device 0>)"
    with pytest.raises(TypeError, match="SciPy takes NumPy arrays"):
        there.as_scipy()
    with pytest.raises(ValueError, match="numpy takes no arrays from <CUDA Device 0>: use to_device first"):
        there.to_namespace(np)
    np.testing.assert_array_equal(there.to_device("cpu").A, P.A)
    close(there.astype(np.float32).A, P.A.astype(np.float32))
    assert NUMPY.numpy(there.to_device("cpu").to_namespace(np).A).shape == (4, 4)
