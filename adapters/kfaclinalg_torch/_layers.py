"""The layers of a model that K-FAC trains, and their parameters as one matrix W = [weight, bias] a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Layer(NamedTuple):
    """A `nn.Linear` whose weight, and bias if it has one, are trained."""

    name: str
    module: nn.Linear
    has_bias: bool  # one that is trained
    held: tuple[Tensor, ...]  # its parameters when it was found

    def check(self) -> None:
        """Its parameters must be those that it was found with, and trained."""
        at = self.name or "the model"
        here = (self.module.weight, *((self.module.bias,) if self.has_bias else ()))
        if any(p is not q for p, q in zip(here, self.held, strict=True)):
            raise ValueError(f"a parameter of {at} was replaced since the optimizer was made: make a new one")
        if not all(p.requires_grad for p in here):
            raise ValueError(f"a parameter of {at} was frozen since the optimizer was made: make a new one")

    def matrix(self) -> Tensor:
        """W (m, n): a copy of the parameters, the bias in the last column."""
        weight = self.module.weight.detach()
        return torch.cat([weight, self.module.bias.detach()[:, None]], dim=1) if self.has_bias else weight.clone()

    def parameters(self, W: Tensor) -> dict[str, Tensor]:
        """The parameters that W stands for, by their names in the model, as views of it."""
        prefix = f"{self.name}." if self.name else ""
        if not self.has_bias:
            return {f"{prefix}weight": W}
        return {f"{prefix}weight": W[:, :-1], f"{prefix}bias": W[:, -1]}

    def assign(self, W: Tensor) -> None:
        with torch.no_grad():
            self.module.weight.copy_(W[:, :-1] if self.has_bias else W)
            if self.has_bias:
                self.module.bias.copy_(W[:, -1])


class Use(NamedTuple):
    """What one forward pass shows of a layer: its inputs (N, n), and where its outputs stand in autograd's graph."""

    inputs: Tensor
    outputs: GradientEdge


def trained_layers(model: nn.Module) -> list[Layer]:
    """The model's trained `nn.Linear` layers; a ValueError names every other trainable parameter."""
    owners: dict[Tensor, list[str]] = {}
    layers: list[Layer] = []
    stray: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}".lstrip("."): p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        for key, parameter in own.items():
            owners.setdefault(parameter, []).append(key)
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            biased = module.bias is not None and module.bias.requires_grad
            held: tuple[Tensor, ...] = (module.weight, module.bias) if biased else (module.weight,)
            layers.append(Layer(name, module, biased, held))
        else:
            stray += own
    if stray:
        raise ValueError(f"trainable parameters outside nn.Linear layers: {', '.join(stray)}; freeze or replace them")
    if tied := [" = ".join(keys) for keys in owners.values() if len(keys) > 1]:
        raise ValueError(f"tied parameters are not supported: {', '.join(tied)}")
    if not layers:
        raise ValueError("the model has no trainable nn.Linear layer")
    _check_kinds(owners)
    return layers


def _check_kinds(owners: dict[Tensor, list[str]]) -> None:
    first = next(iter(owners))
    for parameter, (name, *_) in owners.items():
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.dtype != first.dtype:
            raise ValueError(f"{name} has dtype {parameter.dtype}, expected float32 or float64, the same for all")
        if parameter.device != first.device:
            raise ValueError(f"{name} is on {parameter.device}, expected {first.device}, as the others are")


@contextmanager
def captured(layers: Sequence[Layer]) -> Iterator[dict[str, list[Use]]]:
    """The uses of each layer in the forward passes under the `with`; no hook outlives it."""
    uses: dict[str, list[Use]] = {layer.name: [] for layer in layers}
    handles = []
    try:
        for layer in layers:

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = layer.name) -> None:
                # An edge, not the tensor: an activation may overwrite the tensor in place.
                x = args[0] if args else kwargs["input"]
                uses[name].append(Use(x.detach(), get_gradient_edge(output)))

            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def single_uses(uses: dict[str, list[Use]]) -> list[Use]:
    """The one use of each layer; a ValueError names the layers that were not used, used twice or not on (N, n)."""
    if odd := [f"{name or 'the model'} ({len(found)} times)" for name, found in uses.items() if len(found) != 1]:
        raise ValueError(f"expected every trained layer once a forward pass, got {', '.join(odd)}")
    for name, (use,) in uses.items():
        if use.inputs.ndim != 2:
            raise ValueError(f"layer {name!r} got inputs of shape {tuple(use.inputs.shape)}, expected (N, features)")
    return [found[0] for found in uses.values()]
