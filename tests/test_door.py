"""Every public function and argument, one at a time something odd: a TypeError or ValueError names it, at once.

Nothing that came in is changed. `--fuzz=10000` is the long form. `test_door_opens` has what is valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import array_api_compat
import jax
import numpy as np
import pytest
import torch
from backends import JAX, NUMPY, STRICT, TORCH
from hypothesis import given, settings
from hypothesis import strategies as st
from public_calls import CALLS, N, m, n

import kfaclinalg as kl
from kfaclinalg._value import leaves

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
BACKENDS = [NUMPY, TORCH, JAX[0], STRICT[0]]


# One thing that does not fit, for each kind of argument: (b, what belongs there) -> it.
class Strange:
    """Of no type that anything takes."""


def other_namespace(b):
    return torch.ones(2, 2) if b is NUMPY else np.ones((2, 2))


def other_dtype(b, x):
    return b.array(b.read(x), "float32" if b.dtype == "float64" else "float64")


OBJECTS = {
    "an object": lambda b, x: Strange(),
    "a function": lambda b, x: len,
    "a dict": lambda b, x: {"a": 1},
    "a string": lambda b, x: "odd",
    "bytes": lambda b, x: b"odd",
    "a complex number": lambda b, x: 1j,
    "a set": lambda b, x: {1.0},
    "a namespace": lambda b, x: math_module(),
}
NOTHING = {"None": lambda b, x: None}
ARRAYS = {
    "a number": lambda b, x: 1.5,
    "a list": lambda b, x: [[1.0, 0.0], [0.0, 1.0]],
    "a tuple": lambda b, x: ((1.0,),),
    "integers": lambda b, x: b.array(np.ones(x.shape), "int64"),
    "booleans": lambda b, x: b.array(np.ones(x.shape), "bool"),
    "complex numbers": lambda b, x: b.array(np.ones(x.shape), "complex128"),
    "another namespace": lambda b, x: other_namespace(b),
    "a matrix": lambda b, x: np.asmatrix(np.eye(2)),
    "a masked array": lambda b, x: np.ma.ones((2, 2)),
    "objects": lambda b, x: np.ones((2, 2), dtype=object),
    "sparse": lambda b, x: torch.eye(3, dtype=torch.float64).to_sparse(),
    "nested": lambda b, x: torch.nested.nested_tensor([torch.eye(3, dtype=torch.float64)] * 2, layout=torch.jagged),
}
SHAPED = {
    "0-d": lambda b, x: b.array(1.0),
    "one row more": lambda b, x: b.array(np.ones((*x.shape[:-2], 7, 8))),
}
NUMBERS = {
    "a list": lambda b, x: [1.0],
    "NaN": lambda b, x: float("nan"),
    "infinity": lambda b, x: float("inf"),
    "below zero": lambda b, x: -1.0,
    "True": lambda b, x: True,
    "integers": lambda b, x: b.array(np.ones(()), "int64"),
    "complex numbers": lambda b, x: b.array(np.ones(()), "complex128"),
}
DAMPINGS = {
    "another namespace": lambda b, x: other_namespace(b),
    "another dtype": lambda b, x: b.array(0.5, "float32" if b.dtype == "float64" else "float64"),
    "a matrix": lambda b, x: np.asmatrix(np.eye(2)),
}
INTEGERS = {
    "a half": lambda b, x: 1.5,
    "below zero": lambda b, x: -1,
    "True": lambda b, x: True,
    "NaN": lambda b, x: float("nan"),
    "an array": lambda b, x: b.array(np.ones(()), "int64"),
    "a list": lambda b, x: [1],
}
FACTORS = {
    "a list of layers": lambda b, x: list(x.layers),
    "a layer": lambda b, x: x.layers[0],
    "no layers": lambda b, x: kl.Factors(()),
    "None for a layer": lambda b, x: x._replace(layers=(None,) * len(x.layers)),
    "None for A": lambda b, x: x._replace(layers=(kl.LayerFactors(None, x.layers[0].G),) * len(x.layers)),
    "integers": lambda b, x: with_A(x, b.array(np.ones((n, n)), "int64")),
    "complex numbers": lambda b, x: with_A(x, b.array(np.ones((n, n)), "complex128")),
    "another namespace": lambda b, x: with_A(x, other_namespace(b)),
    "a matrix": lambda b, x: with_A(x, np.asmatrix(np.eye(n))),
    "not square": lambda b, x: with_A(x, b.array(np.ones((n, n + 1)))),
    "one dtype": lambda b, x: with_A(x, b.array(np.eye(n), "float32" if b.dtype == "float64" else "float64")),
}
SEQUENCES = {
    "an array": lambda b, x: b.array(np.ones((2, N, n))),
    "nothing": lambda b, x: [],
    "one too few": lambda b, x: x[:1],
    "one too many": lambda b, x: [*x, x[0]],
    "None in it": lambda b, x: [None, *x[1:]],
    "a number in it": lambda b, x: [1.0, *x[1:]],
    "integers in it": lambda b, x: [b.array(np.ones(x[0].shape), "int64"), *x[1:]],
    "another namespace in it": lambda b, x: [other_namespace(b), *x[1:]],
}


def with_A(x, A):
    return x._replace(layers=(kl.LayerFactors(A, x.layers[0].G), *x.layers[1:]))


def math_module():
    import math

    return math


A_MATRIX = {"5 rows": lambda b, x: b.array(np.ones((5, 8)))}
ODD: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "array": OBJECTS | NOTHING | ARRAYS | SHAPED,
    "rows": OBJECTS | NOTHING | ARRAYS | {"0-d": SHAPED["0-d"]},
    "any array": OBJECTS | NOTHING | ARRAYS,
    "vector": OBJECTS | NOTHING | ARRAYS | SHAPED,
    "positive": OBJECTS | NOTHING | NUMBERS | {"0": lambda b, x: 0.0},
    "damping": OBJECTS | NOTHING | NUMBERS | DAMPINGS,
    "lone damping": OBJECTS | NOTHING | NUMBERS,
    "fraction": OBJECTS | NOTHING | NUMBERS | {"two": lambda b, x: 2.0},
    "only a fraction": OBJECTS | NOTHING | NUMBERS | {"two": lambda b, x: 2.0, "an array": lambda b, x: b.array(0.5)},
    "option": OBJECTS | NOTHING | NUMBERS | {"an array": lambda b, x: b.array(0.5)},
    "number": OBJECTS | NOTHING | {"a list": NUMBERS["a list"], "complex numbers": NUMBERS["complex numbers"]},
    "any number": OBJECTS | NOTHING | DAMPINGS | {"a list": NUMBERS["a list"]},
    "integer": OBJECTS | NOTHING | INTEGERS,
    "count": OBJECTS | NOTHING | {name: odd for name, odd in INTEGERS.items() if name != "an array"},
    "flag": OBJECTS | NOTHING | {"1": lambda b, x: 1, "an array": lambda b, x: b.array(np.ones(2))},
    "choice": OBJECTS | NOTHING | {"1": lambda b, x: 1, "an array": lambda b, x: b.array(np.ones(2))},
    "string": {name: odd for name, odd in (OBJECTS | NOTHING).items() if name != "a string"},
    "object": OBJECTS | {"1": lambda b, x: 1, "an array": lambda b, x: b.array(np.eye(n))},
    "sequence": OBJECTS | NOTHING | SEQUENCES,
    "matrices": OBJECTS | NOTHING | {**SEQUENCES, "5 rows in it": lambda b, x: [b.array(np.ones((5, 8, 2))), *x[1:]]},
    "nested": OBJECTS
    | NOTHING
    | {
        "an array": lambda b, x: b.array(np.ones((2, m, n))),
        "nothing": lambda b, x: [],
        "nothing in it": lambda b, x: [()],
        "arrays": lambda b, x: [b.array(np.ones((m, n)))],
        "other shapes": lambda b, x: [(b.array(np.ones((m, 1))),) * 2],
        "integers": lambda b, x: [(b.array(np.ones((m, n)), "int64"),) * 2],
        "another namespace": lambda b, x: [(other_namespace(b),) * 2],
    },
    "factors": OBJECTS | NOTHING | FACTORS,
    "linked factors": OBJECTS
    | NOTHING
    | FACTORS
    | {
        "no links": lambda b, x: x._replace(links=()),
        "None for links": lambda b, x: x._replace(links=None),
        "None for a link": lambda b, x: x._replace(links=(None,)),
        "integer links": lambda b, x: x._replace(links=(kl.Link(*(b.array(np.ones((3, 3)), "int64"),) * 2),)),
        "other links": lambda b, x: x._replace(links=(kl.Link(x.links[0].G, x.links[0].A),)),
    },
    "layer": OBJECTS
    | NOTHING
    | {
        "a pair": lambda b, x: tuple(x),
        "None for A": lambda b, x: x._replace(A=None),
        "a list for G": lambda b, x: x._replace(G=[[1.0]]),
        "integers": lambda b, x: x._replace(A=b.array(np.ones((n, n)), "int64")),
        "not square": lambda b, x: x._replace(A=b.array(np.ones((n, n + 1)))),
        "another namespace": lambda b, x: x._replace(A=other_namespace(b)),
        "a matrix": lambda b, x: x._replace(G=np.asmatrix(np.eye(m))),
    },
}
# None stands for the default there.
OPTIONAL = {
    ("newton_schulz_inverse", "start"),
    ("newton_schulz_inverse, options", "tolerance"),
    ("update_factors", "old"),
    ("moving_average", "old"),
    ("KFACOptions.chunk_size", "chunk_size"),
}


def lone(call):
    """Whether it takes one array, which may be of any namespace."""
    return len([x for x in leaves(tuple(call.arguments(NUMPY).values())) if isinstance(x, np.ndarray)]) == 1


CASES = [
    (call, argument, odd)
    for call in CALLS
    for argument, kind in call.kinds.items()
    for odd in ODD[kind]
    if not (odd == "None" and (call.name, argument) in OPTIONAL)
    and not (odd == "another namespace" and lone(call))
    and not (odd == "one too few" and call.name == "kfac_step")
]


def snapshot(b, x):
    """The numbers in all arrays that x holds."""
    if isinstance(x, list):
        return [snapshot(b, y) for y in x]
    return [np.asarray(b.read(y)).tobytes() for y in leaves(x) if array_api_compat.is_array_api_obj(y)]


def attempt(b, call, arguments):
    """JAX only traces it: what it refuses it refuses there, and it would compile anew for each shape."""
    if b is JAX[0]:
        jax.eval_shape(lambda: (call.f(**arguments), None)[1])
    else:
        call.f(**arguments)


@given(b=st.sampled_from(BACKENDS), case=st.sampled_from(CASES))
def refused(b, case):
    call, argument, odd = case
    arguments = call.arguments(b)
    before = snapshot(b, list(arguments.values()))
    bad = ODD[call.kinds[argument]][odd](b, arguments[argument])
    with pytest.raises((TypeError, ValueError)) as error:
        attempt(b, call, arguments | {argument: bad})
    assert type(error.value) in (TypeError, ValueError)
    named = "layer|A|G" if argument == "layer" else argument
    assert re.search(rf"\b({named})\b", str(error.value)), f"{error.value} does not name {argument}"
    assert snapshot(b, list(arguments.values())) == before


def test_what_is_odd_is_refused_by_name(request):
    settings(max_examples=request.config.getoption("--fuzz"), derandomize=False, database=None)(refused)()


OF_ARRAYS = [(call, name) for call in CALLS for name, kind in call.kinds.items() if kind in ("array", "rows", "vector")]


@given(
    b=st.sampled_from(BACKENDS),
    case=st.sampled_from(OF_ARRAYS),
    shape=st.lists(st.integers(0, 4), max_size=4),
)
def fits_or_is_named(b, case, shape):
    call, argument = case
    arguments = call.arguments(b) | {argument: b.array(np.random.default_rng(0).standard_normal(shape))}
    before = snapshot(b, list(arguments.values()))
    try:
        attempt(b, call, arguments)
    except (TypeError, ValueError) as error:
        said = error
    else:
        said = None
    assert type(said) in (TypeError, ValueError, type(None))
    assert said is None or re.search(rf"\b({'|'.join(arguments)})\b", str(said)), f"{said} names no argument"
    assert snapshot(b, list(arguments.values())) == before


def test_an_array_of_any_shape_fits_or_is_named(request):
    settings(max_examples=request.config.getoption("--fuzz"), derandomize=False, database=None)(fits_or_is_named)()


def test_a_damping_must_broadcast_with_the_batch():
    layer = kl.LayerFactors(np.ones((2, 1, 1)), np.ones((1, 1)))
    assert kl.factored_tikhonov(layer, np.ones(2)).A.shape == (2, 1, 1)
    for f in (
        lambda gamma: kl.factored_tikhonov(layer, gamma),
        lambda gamma: kl.block_diagonal_inverse(kl.Factors((layer,)), gamma),
        lambda gamma: kl.exactly_damped_inverse(kl.Factors((layer,)), gamma),
        lambda gamma: kl.Kronecker(*layer).shifted_inverse(gamma),
        lambda gamma: kl.Dense(layer.A).shifted(gamma),
    ):
        with pytest.raises(ValueError, match=r"(gamma|damping|shift) has batch shape \(3,\)"):
            f(np.ones(3))
