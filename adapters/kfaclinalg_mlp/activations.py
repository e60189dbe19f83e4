"""The activations a = φ(s) and their derivatives, which are functions of a."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import array_namespace


class Activation(NamedTuple):
    """A coordinate-wise φ."""

    value: Callable[[Any], Any]  # φ(s)
    slope: Callable[[Any], Any]  # φ'(s), from a = φ(s)


def sigmoid(s: Any) -> Any:
    """1 / (1 + exp(-s)), to full relative precision on both sides and without overflow."""
    xp = array_namespace(s)
    e = xp.exp(-xp.abs(s))
    return xp.where(s < 0, e, 1.0) / (1 + e)


def positive_part(s: Any) -> Any:
    """max(s, 0); NaN stays NaN."""
    xp = array_namespace(s)
    return xp.maximum(s, xp.zeros_like(s))


def _tanh(s: Any) -> Any:
    return array_namespace(s).tanh(s)


def _step(a: Any) -> Any:
    return array_namespace(a).astype(a > 0, a.dtype)


def _ones(a: Any) -> Any:
    return array_namespace(a).ones_like(a)


ACTIVATIONS = {
    "tanh": Activation(_tanh, lambda a: 1 - a * a),
    "sigmoid": Activation(sigmoid, lambda a: a * (1 - a)),
    "relu": Activation(positive_part, _step),
    "identity": Activation(lambda s: s, _ones),
}
