"""The layers of a model that `KFAC` trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._batch import Batch
from ._capture import Capture
from ._discovery import Found
from ._layer import Layer, owners
from ._links import chained
from ._network import Network
from ._once import still
from ._settings import sharing_of
from ._verdict import misjudged


class Trained:
    """What was found in a model, less what a first pass has shown to be no layer; those of a chain come first."""

    def __init__(
        self, model: nn.Module, found: Found, *, linked: bool, weight_sharing: str | Mapping[str, str], fallback: str
    ) -> None:
        self.model, self.linked, self.fallback = model, linked, fallback
        self.weight_sharing = weight_sharing
        self.gone: dict[str, str] = {}  # layers that turned out to be none
        self.who = "KFAC"  # in a warning
        self.probed = False
        self.trusted: set[nn.Module] = set()  # whose pass was compared with the formula of its rule
        sharing_of(weight_sharing, found.layers)
        self.take(found)
        _check_kinds(self.layers)

    def take(self, found: Found) -> None:
        chain = chained(found.layers) if self.linked else []
        self.found = found
        self.layers = (*chain, *(layer for layer in found.layers if layer not in chain))
        given, names = self.weight_sharing, {block.name for block in found.blocks}
        kept = given if isinstance(given, str) else {name: value for name, value in given.items() if name in names}
        self.sharing, self.owners = sharing_of(kept, self.layers), owners(self.model, self.layers)
        self.network = Network(self.model, self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    def check(self) -> None:
        """A ValueError names what was replaced, moved or frozen since."""
        self.check_held("optimizer")
        for layer in self.layers:
            if not all(p.requires_grad for p in layer.parameters):
                raise ValueError(f"{layer.name!r} was frozen since the optimizer was made: make a new one")

    def check_held(self, who: str) -> None:
        """A ValueError names what was replaced or moved since."""
        for owner in self.owners:
            owner.check(who)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """The parameters of the layers are trained within, where they were frozen since."""
        frozen = [p for layer in self.layers for p in layer.parameters if not p.requires_grad]
        for p in frozen:
            p.requires_grad_()
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def capture(self) -> Capture:
        """Hooks that show nothing yet."""
        capture = Capture(self.model, self.found.sites, _always, _never, _nothing, _nothing, always=True)
        capture.paused, capture.trusted = True, self.trusted
        return capture

    def probe(self, batch: Batch, tensor_of: Callable[[Any], Tensor]) -> None:
        """A first pass, to see which layers are none: what a subclass or a weight without a call does is unknown."""
        if self.probed:
            return
        device, capture = self.layers[0].parameters[0].device, self.capture()
        capture.paused = False
        try:
            devices = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(devices), still(self.model), torch.enable_grad():
                outputs = tensor_of(batch.call(self.model))
                self.without(misjudged(capture.others, capture.called, self.found, outputs))
        finally:
            capture.remove()
        self.probed = True

    def without(self, gone: Mapping[Layer, str]) -> None:
        if gone:
            before = self.found
            self.take(before.without(self.model, gone, self.fallback))
            self.gone |= {layer.name: why for layer, why in gone.items()}
            warnings.warn(f"{self.who} {self.found.message(before)}", stacklevel=6)


def _always(use: Any) -> bool:
    return True


def _never(use: Any) -> bool:
    return False


def _nothing(*args: Any) -> None:
    pass


def _check_kinds(layers: tuple[Layer, ...]) -> None:
    first = layers[0].parameters[0]
    for layer in layers:
        for p in layer.parameters:
            if p.dtype not in (torch.float32, torch.float64) or p.dtype != first.dtype:
                raise ValueError(
                    f"{layer.name} has dtype {p.dtype}, expected float32 or float64, the same for all: {first.dtype}"
                )
            if p.device != first.device:
                raise ValueError(f"{layer.name} is on {p.device}, expected {first.device}, as the others are")


class Group(dict[str, Any]):
    """A parameter group that tells a learning-rate scheduler why there is no "lr"."""

    def __missing__(self, key: str) -> Any:
        if key == "lr":
            raise ValueError("KFAC has no learning rate to schedule: the exact quadratic model sets the step's length")
        raise KeyError(key)
