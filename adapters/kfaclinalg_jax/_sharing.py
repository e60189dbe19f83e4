"""Layers that are used at many positions of an example: rows of their own, or one row of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._layers import Layer

SETTINGS = ("expand", "reduce")


def reduced_of(weight_sharing: Any, layers: Sequence[Layer]) -> frozenset[str]:
    """The names of the layers of which an example is one row; of a setting for all, those that can be.

    Raises:
        TypeError, ValueError: no setting, an unknown name, or a named layer whose examples are not seen one at a time.
    """
    able = {layer.name for layer in layers if _tells_examples_apart(layer)}
    if isinstance(weight_sharing, str):
        _check("weight_sharing", weight_sharing)
        return frozenset(able if weight_sharing == "reduce" else ())
    if not isinstance(weight_sharing, Mapping):
        raise TypeError(f"weight_sharing is {weight_sharing!r}, expected 'expand', 'reduce' or a mapping of names")
    names = [layer.name for layer in layers]
    if unknown := [name for name in weight_sharing if name not in names]:
        raise ValueError(f"weight_sharing names {', '.join(unknown)}, expected names of {', '.join(names)}")
    for name, setting in weight_sharing.items():
        _check(f"weight_sharing of {name!r}", setting)
        if setting == "reduce" and name not in able:
            raise ValueError(
                f"weight_sharing of {name!r} is 'reduce', expected 'expand': its examples are not told apart"
            )
    return frozenset(name for name, setting in weight_sharing.items() if setting == "reduce")


def _tells_examples_apart(layer: Layer) -> bool:
    return layer.kind == "linear" and len(layer.uses) == 1 and all(site.example is not None for site in layer.sites)


def _check(name: str, setting: Any) -> None:
    if setting not in SETTINGS:
        raise ValueError(f"{name} is {setting!r}, expected one of {', '.join(map(repr, SETTINGS))}")
