import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from backends import NUMPY, eager_backends, every_backend, uncompiled_backends
from hypothesis import given
from hypothesis import strategies as st
from matrices import judge

from kfaclinalg import fit_quadratic, inner_products, levenberg_marquardt, reduction_ratio, testing


def model(k, seed, parallel=0.0, p=12):
    """A random F, gradient and k directions in R^p; the last one within `parallel` of the first."""
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((p, p))
    d = rng.standard_normal((k, p))
    if parallel:
        d[-1] = 3 * d[0] + parallel * d[-1]
    return J.T @ J, rng.standard_normal(p), d


def fit(b, F, gradient, d, damping):
    grams = (d @ F @ d.T, d @ d.T, d @ gradient)
    return [b.numpy(x) for x in b.jit(fit_quadratic)(*map(b.array, grams), damping)]


def value(F, gradient, delta, damping):
    return 0.5 * delta @ (F + damping * np.eye(len(F))) @ delta + gradient @ delta


def check_minimiser(b, k, seed, damping):
    F, gradient, d = model(k, seed)
    coefficients, change = fit(b, F, gradient, d, damping)
    Q = d @ (F + damping * np.eye(len(F))) @ d.T
    exact = -np.linalg.solve(Q, d @ gradient)
    bound = testing.inverse_bound(k * np.linalg.cond(Q), b.eps)
    judge(b, "fit_quadratic", np.linalg.norm(coefficients - exact) / np.linalg.norm(exact), bound)
    exact_change = value(F, gradient, exact @ d, damping)
    scale = np.linalg.norm(gradient) * np.linalg.norm(exact @ d)  # of the two terms that the change is the sum of
    judge(b, "fit_quadratic change", abs(change - exact_change) / scale, bound)


@every_backend
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_coefficients_minimise_the_model(b, k):
    check_minimiser(b, k, seed=k, damping=0.1)


@eager_backends
@given(k=st.integers(1, 4), seed=st.integers(0, 1000), damping=st.floats(0, 100))
def test_the_coefficients_minimise_random_models(b, k, seed, damping):
    check_minimiser(b, k, seed, damping)


def test_a_wrong_damping_is_caught():
    right = fit_quadratic

    def wrong(F, D, slopes, damping):
        return right(F, D, slopes, damping * (1 + 1e-9))

    with pytest.raises(AssertionError, match="fit_quadratic on numpy"):
        check_minimiser(replace(NUMPY, jit=lambda _: wrong), 2, 0, 1.0)


@every_backend
@pytest.mark.parametrize("parallel", [0.0, 1e-9])
def test_a_parallel_direction_is_dropped(b, parallel):
    F, gradient, d = model(2, 0)
    d[1] = 3 * d[0] + parallel * d[1]
    coefficients, change = fit(b, F, gradient, d, 0.5)
    (alone,), change_alone = fit(b, F, gradient, d[:1], 0.5)
    assert coefficients == pytest.approx([alone, 0], rel=100 * b.eps)
    assert change == pytest.approx(change_alone, rel=100 * b.eps)


@every_backend
@pytest.mark.parametrize("zero", [0, 1])
def test_a_zero_direction_is_dropped(b, zero):
    F, gradient, d = model(2, 0)
    d[zero] = 0
    coefficients, change = fit(b, F, gradient, d, 0.5)
    (alone,), change_alone = fit(b, F, gradient, d[1 - zero :][:1], 0.5)
    assert coefficients[zero] == 0
    assert coefficients[1 - zero] == pytest.approx(alone, rel=100 * b.eps)
    assert change == pytest.approx(change_alone, rel=100 * b.eps)


@every_backend
def test_nearly_parallel_directions_still_help(b):
    """1 - cos² = 1e-3, as early in training with a large λ: not dropped."""
    F, gradient, d = model(2, 1, parallel=0.1)
    _, change = fit(b, F, gradient, d, 0.5)
    _, alone = fit(b, F, gradient, d[:1], 0.5)
    assert change < alone


@every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["curvature_gram", "direction_gram", "slopes"])
def test_what_is_not_finite_gives_nan_for_that_member(b, bad, place):
    F, gradient, d = model(2, 0)
    grams = {"curvature_gram": d @ F @ d.T, "direction_gram": d @ d.T, "slopes": d @ gradient}
    stacked = {name: np.stack([x, x]) for name, x in grams.items()}
    stacked[place][1].flat[-1] = bad
    result = b.jit(fit_quadratic)(*map(b.array, stacked.values()), 0.5)
    for x in map(b.numpy, result):
        assert np.isfinite(x[0]).all()
        assert np.isnan(x[1]).all()


@every_backend
def test_each_member_may_have_its_own_damping(b):
    F, gradient, d = model(2, 0)
    grams = [np.stack([x] * 3) for x in (d @ F @ d.T, d @ d.T, d @ gradient)]
    stacked = b.numpy(fit_quadratic(*map(b.array, grams), b.array([0.1, 1.0, 10.0])).coefficients)
    for coefficients, damping in zip(stacked, (0.1, 1.0, 10.0), strict=True):
        np.testing.assert_allclose(coefficients, fit(b, F, gradient, d, damping)[0], rtol=1e3 * b.eps)


@uncompiled_backends
def test_inner_products_over_layers(b):
    rng = np.random.default_rng(0)
    d, e, f = ([rng.standard_normal(shape).astype(b.dtype) for shape in ((2, 3), (4, 1))] for _ in range(3))
    flat = [np.concatenate([x.ravel() for x in v]).astype(float) for v in (d, e, f)]
    arrays = [tuple(map(b.array, v)) for v in (d, e, f)]
    computed = inner_products(arrays[:2], arrays)
    for i, j in itertools.product(range(2), range(3)):
        assert float(computed[i, j]) == pytest.approx(flat[i] @ flat[j], abs=100 * b.eps)
    gram = inner_products(arrays, arrays)
    assert float(gram[0, 1]) == float(gram[1, 0]) == pytest.approx(flat[0] @ flat[1], abs=100 * b.eps)


def test_inner_products_of_what_is_passed_once():
    x = np.arange(4.0).reshape(2, 2)
    assert inner_products(iter([iter([x])]), iter([iter([x])])) == 14


def test_inner_products_accumulate_in_float64():
    x = np.full((1, 1_000_000), 0.1, dtype=np.float32)
    assert inner_products([(x,)], [(x,)])[0, 0] == pytest.approx(float(x[0, 0] * x[0, 0]) * 1e6, rel=1e-12)


def test_reduction_ratio():
    assert reduction_ratio(10.0, 7.0, -4.0) == 0.75
    assert math.isnan(reduction_ratio(1.0, 1.0, 0.0))
    assert math.isnan(reduction_ratio(1.0, float("nan"), -1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: levenberg_marquardt(1.0, 1.0, omega=0), r"omega is 0, expected a number in \(0, 1\]"),
        (lambda: levenberg_marquardt(-1.0, 1.0, omega=0.5), "damping is -1.0"),
        (lambda: fit_quadratic(np.eye(2), np.eye(2), np.ones(2), -1), "damping is -1"),
        (lambda: fit_quadratic(np.eye(2), np.eye(3), np.ones(2), 1), r"direction_gram has shape \(3, 3\), expected"),
        (lambda: fit_quadratic(np.eye(2), np.eye(2), np.ones(3), 1), r"slopes has shape \(3,\), expected"),
    ],
)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


RATIOS = [0.9, 0.75, 0.5, 0.25, 0.1, -1.0, math.nan, math.inf]


@every_backend
def test_of_arrays_they_give_arrays(b):
    """A batch at once, and without a look at a value: under jit too."""
    change = np.asarray([-4.0, 0.0, -1.0])
    ratio = b.numpy(b.jit(lambda change: reduction_ratio(b.array(10.0), b.array(7.0), change))(b.array(change)))
    np.testing.assert_allclose(ratio, [reduction_ratio(10.0, 7.0, float(x)) for x in change], rtol=1e-6)
    moved = b.jit(lambda damping, ratios: levenberg_marquardt(damping, ratios, omega=0.5))
    found = b.numpy(moved(b.array(3.0), b.array(RATIOS)))
    assert found.tolist() == [levenberg_marquardt(3.0, ratio, omega=0.5) for ratio in RATIOS]
    assert b.numpy(levenberg_marquardt(3.0, b.array(0.1), omega=0.5)) == 6.0


def test_numbers_and_arrays_of_one_kind_only():
    with pytest.raises(TypeError, match=r"ratio is an array of .*torch"):
        levenberg_marquardt(np.ones(()), torch.ones((), dtype=torch.float64), omega=0.5)
    with pytest.raises(TypeError, match="ratio has dtype int64"):
        levenberg_marquardt(1.0, np.ones((), dtype=np.int64), omega=0.5)
