"""Whether what a caller gives fits together; an error says the name, what came and what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from array_api_compat import array_namespace, device, is_array_api_obj


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}, expected a number in (0, 1]")


def check_generator(rng: Any) -> None:
    if not all(hasattr(rng, method) for method in ("permutation", "random", "standard_normal")):
        raise TypeError(f"rng is a {type(rng).__qualname__}, expected a numpy.random.Generator")


def check_inputs(inputs: Any) -> None:
    _check_array("inputs", inputs)
    xp = array_namespace(inputs)
    if inputs.dtype not in (xp.float32, xp.float64):
        raise TypeError(f"inputs have dtype {inputs.dtype}, expected float32 or float64")
    if inputs.ndim != 2 or inputs.shape[0] == 0:
        raise ValueError(f"inputs have shape {tuple(inputs.shape)}, expected (N, features), N > 0")


def check_targets(targets: Any, inputs: Any) -> None:
    check_place("targets", targets, inputs)
    if targets.ndim == 0 or targets.shape[0] != inputs.shape[0]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, expected ({inputs.shape[0]}, ...), as the inputs")


def check_weights(weights: Sequence[Any], layers: int, inputs: Any) -> None:
    """One (m, n + 1) a layer, n the m of the one before."""
    if len(weights) != layers:
        raise ValueError(f"got {len(weights)} weights, expected {layers}, one for each activation")
    n = inputs.shape[1]
    for i, W in enumerate(weights):
        _check_same_kind(f"weights[{i}]", W, inputs)
        if W.ndim != 2 or W.shape[1] != n + 1:
            raise ValueError(f"weights[{i}] has shape {tuple(W.shape)}, expected (m, {n + 1}): {n} inputs and the bias")
        n = W.shape[0]


def check_direction(name: str, direction: Sequence[Any], weights: Sequence[Any]) -> None:
    if len(direction) != len(weights):
        raise ValueError(f"{name} has {len(direction)} arrays, expected {len(weights)}, as the weights")
    for i, (D, W) in enumerate(zip(direction, weights, strict=True)):
        _check_same_kind(f"{name}[{i}]", D, W)
        if tuple(D.shape) != tuple(W.shape):
            raise ValueError(f"{name}[{i}] has shape {tuple(D.shape)}, expected {tuple(W.shape)}, as weights[{i}]")


def check_like_outputs(likelihood: str, z: Any, y: Any) -> None:
    if y.dtype != z.dtype:
        raise TypeError(f"targets have dtype {y.dtype}, expected {z.dtype}, that of the outputs ({likelihood})")
    if tuple(y.shape) != tuple(z.shape):
        found, expected = tuple(y.shape), tuple(z.shape)
        raise ValueError(f"targets have shape {found}, expected {expected}, as the outputs ({likelihood})")


def check_range(likelihood: str, y: Any, low: int, high: int) -> None:
    """NaN passes, which makes the loss NaN, so that the step is refused; and what is traced, which has no values."""
    xp = array_namespace(y)
    try:
        outside = bool(xp.any((y < low) | (y > high)))
    except TypeError:  # JAX's of a tracer
        return
    if outside:
        found = f"[{float(xp.min(y)):g}, {float(xp.max(y)):g}]"
        raise ValueError(f"targets lie in {found}, expected [{low}, {high}] ({likelihood})")


def check_place(name: str, x: Any, like: Any) -> None:
    _check_array(name, x)
    xp = array_namespace(like)
    if array_namespace(x) is not xp:
        found = array_namespace(x).__name__
        raise TypeError(f"{name}: an array of {found}, expected one of {xp.__name__}, as the inputs")
    if device(x) != device(like):
        raise ValueError(f"{name}: on device {device(x)}, expected {device(like)}, as the inputs")


def _check_same_kind(name: str, x: Any, like: Any) -> None:
    check_place(name, x, like)
    if x.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {like.dtype}, as the inputs")


def _check_array(name: str, x: Any) -> None:
    if not is_array_api_obj(x):
        raise TypeError(f"{name}: a {type(x).__qualname__}, expected an array (NumPy, CuPy, torch, JAX, ...)")
