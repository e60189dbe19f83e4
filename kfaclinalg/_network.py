"""The layers of a network and their links, each checked and under its name in a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _backends, _checks
from ._backends import Array
from .factors import Factors, LayerFactors, Link


def layers(factors: Factors) -> dict[str, LayerFactors]:
    """Each layer under its name in a message."""
    _checks.check_class("factors", factors, Factors)
    held = {f"factors.layers[{i}]": layer for i, layer in enumerate(_checks.items("factors.layers", factors.layers))}
    for at, layer in held.items():
        _checks.check_class(at, layer, LayerFactors)
    return held


def check_links(layers: Sequence[LayerFactors], links: Any) -> None:
    """One link fewer than layers, of dense sides that it fits."""
    if len(_checks.items("factors.layers", layers)) == 1 and links in ((), []):
        return
    for i, link in enumerate(_checks.items("factors.links", links, len(layers) - 1)):
        _checks.check_class(f"factors.links[{i}]", link, Link)
        for one, M, above, X in zip("AG", layers[i], layers[i + 1], link, strict=True):
            at = f"factors.links[{i}].{one}"
            names = f"factors.layers[{i}].{one}", f"factors.layers[{i + 1}].{one}", at
            b = _backends.resolve(**dict(zip(names, (M, above, X), strict=True)))
            _backends.operand(b, at, X, (M.shape[-1], above.shape[-1]))
            _checks.check_batches(**{name: tuple(Y.shape[:-2]) for name, Y in zip(names, (M, above, X), strict=True)})


def check_problem(problem: object, weights: Sequence[Array]) -> None:
    """Whatever has the methods of a `Problem`, and one matrix a layer."""
    for name in ("loss_and_gradient", "factors", "curvature_gram", "loss"):
        if not callable(getattr(problem, name, None)):
            raise TypeError(f"problem is a {_checks.class_of(problem)}, expected a Problem, which has a method {name}")
    held = {f"weights[{i}]": W for i, W in enumerate(_checks.items("weights", weights))}
    b = _backends.resolve(**held)
    for name, W in held.items():
        _backends.operand(b, name, W, ("m", "n"))
