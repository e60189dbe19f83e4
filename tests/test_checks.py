import numpy as np
import pytest
import torch
from backends import NUMPY, STRICT, TORCH, uncompiled_backends

import kfaclinalg
from kfaclinalg import _backends, _checks


@uncompiled_backends
def test_resolve_finds_the_backend(b):
    x = b.array(np.ones(2))
    found = _backends.resolve(x=x)
    assert found.dtype == x.dtype
    assert found.eps == b.eps
    assert b.numpy(found.eye(2)).tolist() == [[1, 0], [0, 1]]


def test_the_widest_dtype_is_that_of_the_device():
    widest = {b.name: str(_backends.resolve(x=b.array(np.ones(1))).widest) for b in [NUMPY, TORCH, *STRICT]}
    assert "float64" in widest["numpy"]
    assert widest["torch"] == "torch.float64"
    assert "float32" in widest["strict-no_float64"]
    assert "float64" in widest["strict-device2-float32"]


def test_what_differs_is_named():
    numpy32, torch64, meta = (
        np.ones(1, dtype=np.float32),
        torch.ones(1, dtype=torch.float64),
        torch.ones(1, device="meta"),
    )
    with pytest.raises(TypeError, match="B has dtype float32, expected float64, the dtype of A"):
        _backends.resolve(A=np.ones(1), B=numpy32)
    with pytest.raises(TypeError, match=r"B is an array of array_api_compat\.torch, expected one of"):
        _backends.resolve(A=np.ones(1), B=torch64)
    with pytest.raises(ValueError, match="B is on device meta, expected cpu"):
        _backends.resolve(A=torch.ones(1), B=meta)
    with pytest.raises(TypeError, match=r"A is a builtins\.NoneType, expected an array"):
        _backends.resolve(A=None)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), np.float64(-1), np.float32(-1)])
def test_a_bad_damping_is_refused(value):
    with pytest.raises(ValueError, match=r"gamma is .*, expected a finite number >= 0"):
        _checks.nonnegative("gamma", value)


def test_numpy_scalars_are_python_numbers():
    assert type(_checks.nonnegative("gamma", np.float64(2))) is float
    assert type(_checks.nonnegative("gamma", np.float32(2))) is float


def test_batches_that_do_not_broadcast_are_named():
    _checks.check_batches(A=(2, 1), B=(3,), V=(4, 2, 3))
    with pytest.raises(ValueError, match=r"V has batch shape \(4,\), which does not broadcast with \(3,\) of B"):
        _checks.check_batches(A=(1,), B=(3,), V=(4,))


@uncompiled_backends
def test_assert_finite_names_the_member(b):
    x = np.ones((2, 3, 4, 4))
    kfaclinalg.assert_finite(b.array(x), "x")
    x[1, 2, 3, 0] = np.inf
    with pytest.raises(
        kfaclinalg.LinAlgError, match=r"x is not finite in batch member \(1, 2\)\. Likely causes: a matrix"
    ):
        kfaclinalg.assert_finite(b.array(x), "x")
    with pytest.raises(kfaclinalg.LinAlgError, match=r"y is not finite\. Likely"):
        kfaclinalg.assert_finite(b.array(np.asarray([np.nan])), "y")


def test_both_habits_catch_linalgerror():
    assert issubclass(kfaclinalg.LinAlgError, ValueError)
    assert issubclass(kfaclinalg.LinAlgError, RuntimeError)


@uncompiled_backends
def test_picked(b):
    x, picks = np.arange(9.0).reshape(3, 3), [[2, 0], [0, 1]]
    np.testing.assert_array_equal(b.numpy(_backends.picked(b.array(x), picks)), [x[np.ix_(p, p)] for p in picks])
    np.testing.assert_array_equal(b.numpy(_backends.picked(b.array(x[0]), picks)), [x[0][p] for p in picks])
    np.testing.assert_array_equal(b.numpy(_backends.picked(b.array(x), [[0, 1, 2]])), x[None])
