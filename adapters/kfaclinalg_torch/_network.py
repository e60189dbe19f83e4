"""A model as the function of its weights, one matrix a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._layer import Layer

Matrices = tuple[Tensor, ...]


def check_shapes(Vs: Any, expected: list[tuple[int, ...]]) -> None:
    """They must be matrices of these shapes."""
    if not isinstance(Vs, Sequence | Tensor) or isinstance(Vs, str):
        raise TypeError(f"Vs is a {type(Vs).__name__}, expected a sequence of matrices")
    if (came := [tuple(V.shape) for V in Vs]) != expected:
        raise ValueError(f"Vs have shapes {came}, expected {expected}")


class Network:
    """The weights W of the layers, and the model's parameters that they stand for."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.model, self.layers = model, layers
        held = {p for layer in layers for block in layer.blocks for p in block.parameters}
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p in held}

    def weights(self) -> Matrices:
        """Copies of the weights."""
        return tuple(layer.matrix(lambda p: p.detach().clone()) for layer in self.layers)

    def assign(self, weights: Matrices) -> None:
        with torch.no_grad():
            for layer, W in zip(self.layers, weights, strict=True):
                for p, part in layer.parts(torch.detach, W):
                    p.copy_(part)

    def parameters(self, weights: Matrices) -> dict[Tensor, Tensor]:
        """What each parameter is with these weights: a part of one of them where it can be."""
        values: dict[Tensor, Tensor] = {}
        for layer, W in zip(self.layers, weights, strict=True):
            parts = layer.parts(lambda p: p, W)
            whole = len(parts) == len(layer.parameters)
            for p, (like, part) in zip(layer.parameters, parts, strict=True):
                if whole and like.shape == p.shape and like.stride() == p.stride() and part.shape == p.shape:
                    values[p] = part
                else:
                    values.setdefault(p, torch.empty_like(p, requires_grad=False))
        with torch.no_grad():
            for layer, W in zip(self.layers, weights, strict=True):
                for target, part in layer.parts(lambda p: values[p], W):
                    if target.data_ptr() != part.data_ptr():
                        target.copy_(part)
        return values

    def by_name(self, values: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        return {self.names[p]: value for p, value in values.items()}

    def matrices(self, gradients: Mapping[Tensor, Tensor]) -> Matrices:
        """The gradients of the parameters, shaped like the weights."""
        return tuple(layer.matrix(gradients.__getitem__) for layer in self.layers)
