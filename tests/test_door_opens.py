"""What is valid and looks odd gives what the plain form gives, on every backend and under autocast."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch
from backends import TORCH_FLOAT32
from public_calls import CALLS
from test_door import BACKENDS

from kfaclinalg._value import leaves

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")

FINE: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "array": {"columns first": lambda b, x: b.array(b.read(x).T.copy()).mT, "a view": lambda b, x: x[..., :]},
    "damping": {
        "Fraction": lambda b, x: Fraction(x),
        "NumPy's": lambda b, x: np.float64(x),
        "single precision": lambda b, x: np.float32(x),
        "0-d": lambda b, x: b.array(x),
    },
    "fraction": {"Fraction": lambda b, x: Fraction(x), "0-d": lambda b, x: b.array(x)},
    "positive": {"Fraction": lambda b, x: Fraction(x), "NumPy's": lambda b, x: np.float64(x)},
    "integer": {"NumPy's": lambda b, x: np.int64(x)},
    "sequence": {"a list": lambda b, x: list(x), "a tuple": lambda b, x: tuple(x)},
    "matrices": {"a list": lambda b, x: list(x), "a tuple": lambda b, x: tuple(x)},
}


def same(b, x, y):
    for one, other in zip(leaves(x), leaves(y), strict=True):
        if array_api_compat.is_array_api_obj(one):
            np.testing.assert_allclose(b.read(other), b.read(one), rtol=1e-12)


@pytest.mark.parametrize("b", BACKENDS, ids=str)
def test_what_is_valid_and_looks_odd_gives_the_same(b):
    for call in CALLS:
        for argument, kind in call.kinds.items():
            for other in FINE.get(kind, {}).values():
                arguments, again = call.arguments(b), call.arguments(b)
                again[argument] = other(b, again[argument])
                if kind == "fraction" and call.name == "levenberg_marquardt":
                    continue  # an array gives an array
                same(b, call.f(**arguments), call.f(**again))


@pytest.mark.parametrize("gradients", [False, True], ids=["values", "gradients"])
def test_under_autocast_nothing_is_computed_in_half_precision(gradients):
    """`kfac_step` runs the passes of a model, which are the model's own."""
    for call in CALLS:
        if call.name != "kfac_step":
            plain, again = call.arguments(TORCH_FLOAT32), call.arguments(TORCH_FLOAT32)
            if gradients:
                again = {k: x.requires_grad_() if isinstance(x, torch.Tensor) else x for k, x in again.items()}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = call.f(**again)
            for one, other in zip(leaves(call.f(**plain)), leaves(found), strict=True):
                if isinstance(one, torch.Tensor):
                    assert other.dtype == one.dtype
                    torch.testing.assert_close(other.detach(), one, rtol=1e-4, atol=1e-5)
