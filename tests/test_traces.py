"""What no value shows: no wait for the device, shapes and devices on torch's `meta`, and memory that is left alone."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from traced_calls import COLD, HOT, arguments

from kfaclinalg import Kronecker

WAITS = ("_linalg_check_errors", "_local_scalar_dense", "allclose", "equal", "nonzero", "is_nonzero")


class NoSynchronisation(TorchDispatchMode):
    """Fails on the operations that make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{func} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "synchronise", [torch.linalg.cholesky, torch.Tensor.item, lambda M: M[M > 0], lambda M: bool((M > 0).all())]
)
def test_the_watch_sees_what_waits(synchronise):
    with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
        synchronise(torch.ones(1, 1))


hot = pytest.mark.parametrize(("f", "shape"), HOT.values(), ids=HOT)
hot_and_cold = pytest.mark.parametrize(("f", "shape"), [*HOT.values(), *COLD.values()], ids=[*HOT, *COLD])


@hot
def test_the_hot_path_never_waits_for_the_device(f, shape):
    with NoSynchronisation():
        f(*arguments())


@hot_and_cold
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_is_read_and_no_array_is_made_elsewhere(f, shape, dtype):
    """On `meta` there are no values, and whatever is created on another device cannot be mixed in."""
    result = f(*arguments("meta", dtype))
    assert result.device.type == "meta"
    assert result.dtype == (torch.float64 if f is HOT["inner_products"][0] else dtype)
    assert result.shape == shape


def test_inputs_are_never_changed_in_place():
    rng = np.random.default_rng(0)
    A, G, V = 3 * np.eye(3), 2 * np.eye(2), rng.standard_normal((2, 3))
    copies = [x.copy() for x in (A, G, V)]
    for x in (A, G, V):
        x.flags.writeable = False
    for name, (f, _) in (HOT | COLD).items():
        f(A, G, V)
        for x, copy in zip((A, G, V), copies, strict=True):
            np.testing.assert_array_equal(x, copy, err_msg=name)


def test_gradients_pass_through():
    A, G, V = (x.requires_grad_() for x in arguments())
    assert torch.autograd.gradcheck(lambda A, G, V: Kronecker(A, G).inverse() @ V, (2 * A, 3 * G, V))
    assert torch.autograd.gradcheck(lambda A, G, V: Kronecker(A, G).solve(V), (2 * A, 3 * G, V))
