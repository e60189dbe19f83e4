import numpy as np
import pytest
from backends import NUMPY, uncompiled_backends
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_spd

from kfaclinalg import LayerFactors, factored_tikhonov, tikhonov_pi
from kfaclinalg.damping import NORMS


def example(b, seed=0, n=4, m=3):
    rng = np.random.default_rng(seed)
    A, G = (random_spd(rng, k).astype(b.dtype).astype(float) for k in (n, m))
    return A, G, LayerFactors(b.array(A), b.array(G))


@uncompiled_backends
@pytest.mark.parametrize("norm", NORMS)
def test_damped_factors(b, norm):
    A, G, layer = example(b)
    pi = b.numpy(tikhonov_pi(layer, norm=norm)).item()
    damped = factored_tikhonov(layer, 0.5, norm=norm)
    np.testing.assert_allclose(b.numpy(damped.A), A + pi * 0.5 * np.eye(4), atol=100 * b.eps)
    np.testing.assert_allclose(b.numpy(damped.G), G + 0.5 / pi * np.eye(3), atol=100 * b.eps)


@given(seed=st.integers(0, 100), exponent=st.integers(-8, 8), gamma=st.floats(0, 10))
def test_the_damped_product_does_not_depend_on_the_scale_between_the_factors(seed, exponent, gamma):
    """(c A, G / c) stand for the same curvature."""
    _, _, layer = example(NUMPY, seed)
    c = 10.0**exponent
    one = np.kron(*factored_tikhonov(layer, gamma))
    other = np.kron(*factored_tikhonov(LayerFactors(c * layer.A, layer.G / c), gamma))
    np.testing.assert_allclose(other, one, rtol=1e-12)


@uncompiled_backends
@pytest.mark.parametrize("norm", NORMS)
def test_pi_is_one_where_a_factor_is_zero(b, norm):
    zero, one = b.array(np.zeros((2, 2))), b.array(4 * np.eye(2))
    for layer in ((zero, one), (one, zero), (zero, zero)):
        assert b.numpy(tikhonov_pi(LayerFactors(*layer), norm=norm)) == 1


def test_pi_of_extreme_factors():
    layer = LayerFactors(1e150 * np.eye(2), 1e-170 * np.eye(2))
    assert tikhonov_pi(layer) == pytest.approx(1e160)


@uncompiled_backends
def test_gamma_may_be_a_batch(b):
    layer = example(b)[2]
    damped = factored_tikhonov(layer, b.array([0.5, 2.0]))
    assert b.numpy(damped.A).shape == (2, 4, 4)
    np.testing.assert_allclose(b.numpy(damped.G)[1], b.numpy(factored_tikhonov(layer, 2.0).G), atol=10 * b.eps)


@uncompiled_backends
@pytest.mark.parametrize("norm", NORMS)
def test_nan_stays_with_its_member(b, norm):
    A = np.stack([np.eye(2), np.full((2, 2), np.nan)])
    pi = b.numpy(tikhonov_pi(LayerFactors(b.array(A), b.array(np.stack([np.eye(2)] * 2))), norm=norm))
    assert pi[0] == pytest.approx(1)
    assert np.isnan(pi[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: tikhonov_pi(layer, norm="nuclear"), "norm is 'nuclear', expected one of 'trace', 'frobenius'"),
        (lambda layer: factored_tikhonov(layer, -1.0), r"gamma is -1.0, expected a finite number >= 0"),
        (lambda layer: tikhonov_pi(LayerFactors(np.ones((2, 3)), np.eye(2))), r"A has shape \(2, 3\)"),
    ],
)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(example(NUMPY)[2])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e25, 5e37])
def test_pi_of_sizes_whose_squares_leave_the_range(norm, size):
    layer = LayerFactors(np.float32(size) * np.eye(3, dtype=np.float32), np.eye(2, dtype=np.float32))
    assert float(tikhonov_pi(layer, norm=norm)) == pytest.approx(size**0.5, rel=1e-5)
