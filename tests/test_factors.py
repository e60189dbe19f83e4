import jax
import numpy as np
import pytest
from backends import every_backend, uncompiled_backends

from kfaclinalg import (
    Factors,
    LayerFactors,
    Link,
    averaging_decay,
    batch_factors,
    block_diagonal_inverse,
    exactly_damped_inverse,
    homogeneous,
    low_rank_inverse,
    moving_average,
    update_factors,
)


def moments(x, y):
    """E[x yᵀ] example by example, in float64."""
    return sum(np.outer(x_i, y_i) for x_i, y_i in zip(x, y, strict=True)) / len(x)


@every_backend
def test_factors_are_the_second_moments(b):
    rng = np.random.default_rng(0)
    N, sizes = 7, [(3, 2), (4, 5), (1, 3)]
    a = [rng.standard_normal((N, n)).astype(b.dtype) for n, _ in sizes]
    g = [rng.standard_normal((N, m)).astype(b.dtype) for _, m in sizes]
    factors = b.jit(lambda a, g: batch_factors(a, g, links=True))([b.array(x) for x in a], [b.array(x) for x in g])
    bound = 10 * N * b.eps
    for i, layer in enumerate(factors.layers):
        np.testing.assert_allclose(b.numpy(layer.A), moments(a[i], a[i]), atol=bound)
        np.testing.assert_allclose(b.numpy(layer.G), moments(g[i], g[i]), atol=bound)
    assert len(factors.links) == 2
    for i, link in enumerate(factors.links):
        np.testing.assert_allclose(b.numpy(link.A), moments(a[i], a[i + 1]), atol=bound)
        np.testing.assert_allclose(b.numpy(link.G), moments(g[i], g[i + 1]), atol=bound)


@uncompiled_backends
@pytest.mark.parametrize("n", [1, 7, 33])
def test_factors_are_exactly_symmetric(b, n):
    a = b.array(np.random.default_rng(n).standard_normal((13, n)))
    A = b.numpy(batch_factors([a], [a]).layers[0].A)
    np.testing.assert_array_equal(A, A.T)


@uncompiled_backends
def test_leading_dimensions_are_a_batch(b):
    a = np.random.default_rng(0).standard_normal((2, 5, 3))
    A = b.numpy(batch_factors([b.array(a)], [b.array(a)]).layers[0].A)
    np.testing.assert_allclose(A[1], moments(a[1], a[1]), atol=50 * b.eps)


@uncompiled_backends
def test_homogeneous_adds_ones_last(b):
    assert b.numpy(homogeneous(b.array([[2, 3], [4, 5]]))).tolist() == [[2, 3, 1], [4, 5, 1]]


@uncompiled_backends
def test_links_are_left_out_unless_asked_for(b):
    a = b.array(np.ones((2, 1)))
    assert batch_factors([a, a], [a, a]).links == ()


def factors_of(b, value):
    x = b.array(np.full((1, 1), value))
    return Factors((LayerFactors(x, 2 * x),) * 2, (Link(3 * x, 4 * x),))


@uncompiled_backends
def test_moving_average(b):
    new = factors_of(b, 2.0)
    assert moving_average(None, new, decay=0.5) is new
    mixed = moving_average(factors_of(b, 1.0), new, decay=0.75)
    assert [b.numpy(x).item() for x in (*mixed.layers[1], *mixed.links[0])] == [1.25, 2.5, 3.75, 5.0]


def leaves(factors):
    return [x for pair in (*factors.layers, *factors.links) for x in pair]


@every_backend
@pytest.mark.parametrize("links", [False, True])
def test_an_update_is_the_moving_average_with_the_batch(b, links):
    rng, N, sizes = np.random.default_rng(0), 7, [(3, 2), (70, 65), (1, 3)]
    first, second = (
        [[b.array(rng.standard_normal((N, k))) for k in side] for side in zip(*sizes, strict=True)] for _ in "12"
    )
    assert_same = np.testing.assert_array_equal
    for new, alone in zip(
        leaves(update_factors(None, *first, decay=0.75)),
        leaves(batch_factors(*first)),
        strict=True,
    ):
        assert_same(b.numpy(new), b.numpy(alone))
    old = batch_factors(*first, links=links)
    before = [b.numpy(x).copy() for x in leaves(old)]
    for decay in (0, 0.75, 1):
        updated = b.jit(lambda *args: update_factors(*args, decay=decay))(old, *second)  # noqa: B023
        expected = moving_average(old, batch_factors(*second, links=links), decay=decay)
        for x, y in zip(leaves(updated), leaves(expected), strict=True):
            np.testing.assert_allclose(b.numpy(x), b.numpy(y), atol=20 * N * b.eps)
        for x in leaves(Factors(updated.layers)):
            assert_same(b.numpy(x), b.numpy(x).T)
    for x, y in zip(leaves(old), before, strict=True):
        assert_same(b.numpy(x), y)


@uncompiled_backends
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("where", ["old", "batch"])
def test_an_update_keeps_nan_whatever_the_decay(b, decay, where):
    a = np.ones((2, 3))
    old = batch_factors([b.array(a)], [b.array(a)])
    if where == "old":
        old = Factors(tuple(LayerFactors(np.nan * layer.A, layer.G) for layer in old.layers))
    else:
        a[0, 1] = np.nan
    A = b.numpy(update_factors(old, [b.array(a)], [b.array(np.ones((2, 3)))], decay=decay).layers[0].A)
    nan = np.full((3, 3), where == "old")
    nan[1, :] = nan[:, 1] = True
    np.testing.assert_array_equal(np.isnan(A), nan)


ONE = np.ones((2, 1))
OLD, LINKED = batch_factors([ONE], [ONE]), batch_factors([ONE] * 2, [ONE] * 2, links=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_factors([ONE], []), "output_gradients has 0 items"),
        (lambda: batch_factors([], []), "inputs has 0 items"),
        (lambda: batch_factors([ONE], [ONE[:1]]), r"output_gradients\[0\] has shape \(1, 1\), expected .* same N > 0"),
        (lambda: batch_factors([ONE[:0]], [ONE[:0]]), r"inputs\[0\] has shape \(0, 1\)"),
        (lambda: batch_factors([ONE[:, 0]], [ONE]), r"inputs\[0\] has shape \(2,\)"),
        (lambda: homogeneous(ONE[:, 0]), r"a has shape \(2,\), expected \(\.\.\., N, d\)"),
        (lambda: moving_average(None, OLD, decay=1.5), r"decay is 1.5, expected a number in \[0, 1\]"),
        (lambda: update_factors(OLD, [ONE], [ONE], decay=-0.5), r"decay is -0.5, expected a number in \[0, 1\]"),
        (lambda: update_factors(None, [ONE], [ONE], decay=1.5), "decay is 1.5"),
        (
            lambda: update_factors(OLD, [ONE] * 2, [ONE] * 2, decay=0.5),
            r"old has shapes \[\(1, 1\), .*those of the b",
        ),
        (
            lambda: update_factors(OLD, [np.ones((2, 3))], [ONE], decay=0.5),
            r"expected \[\(3, 3\), \(1, 1\)\], those of the batch",
        ),
        (lambda: update_factors(LINKED, [ONE], [ONE], decay=0.5), "old has shapes"),
        (
            lambda: moving_average(batch_factors([ONE], [ONE]), batch_factors([ONE] * 2, [ONE] * 2), decay=0.5),
            "new has",
        ),
    ],
)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sequences_may_be_of_one_pass():
    a, g = (np.random.default_rng(seed).standard_normal((2, 5, 3)) for seed in (0, 1))
    expected = batch_factors([*a], [*g])
    for found in (batch_factors(iter(a), iter(g)), update_factors(None, iter(a), iter(g), decay=0.5)):
        np.testing.assert_array_equal(found.layers[1].G, expected.layers[1].G)


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"output_gradients\[0\] has dtype float32, expected float64"):
        batch_factors([ONE], [ONE.astype(np.float32)])
    with pytest.raises(
        TypeError, match=r"old\.layers\[0\]\.A has dtype float64, expected float32, the dtype of inputs"
    ):
        update_factors(OLD, [ONE.astype(np.float32)], [ONE.astype(np.float32)], decay=0.5)


@every_backend
def test_decays_may_be_arrays(b):
    """Of a step's number, unseen: what one compiled step needs."""
    a, g = np.random.default_rng(0).standard_normal((2, 6, 3))
    old = batch_factors([b.array(a)] * 2, [b.array(g)] * 2, links=True)

    def step(k, a, g):
        return update_factors(old, [a, g], [g, a], decay=averaging_decay(k))

    for k in (1, 2, 30):
        expected = step(k, b.array(a), b.array(g))
        found = b.jit(step)(b.array(k, "int64"), b.array(a), b.array(g))
        plain = moving_average(
            old,
            batch_factors([b.array(a), b.array(g)], [b.array(g), b.array(a)], links=True),
            decay=b.array(averaging_decay(k)),
        )
        for one, other, third in zip(*(f.layers + f.links for f in (found, expected, plain)), strict=True):
            for x, y, z in zip(one, other, third, strict=True):
                np.testing.assert_allclose(b.numpy(x), b.numpy(y), atol=20 * b.eps)
                np.testing.assert_allclose(b.numpy(z), b.numpy(y), atol=20 * b.eps)


def test_what_jax_did_not_commit_stays_so():
    """Else the next call of the user's compiled step would compile again."""
    jnp = jax.numpy
    x = homogeneous(jnp.ones((4, 2)))
    factors = batch_factors([x], [jnp.ones((4, 3))])
    (block,) = block_diagonal_inverse(factors, 0.5).blocks
    (exact,) = exactly_damped_inverse(factors, 0.5).blocks
    (low,) = low_rank_inverse(factors, 0.5, rank=1).blocks
    for made in (x, factors.layers[0].A, block.A, block.B, exact.weights, low.A.U, low.A.d):
        assert not made.committed
    there = jax.device_put(jnp.ones((4, 2)), jax.devices()[0])
    assert homogeneous(there).committed
