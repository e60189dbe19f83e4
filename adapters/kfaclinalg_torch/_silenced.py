"""Passes through a model that nobody's captures see, but those that are let see by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ._capture import Capture, captures_of


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """The captures on the model and its parts paused, and as they were afterwards."""
    before = {capture: (capture.paused, capture.now) for capture in _captures(model)}
    for capture in before:
        capture.paused = True
    try:
        yield
    finally:
        for capture, (paused, now) in before.items():
            capture.paused, capture.now = paused, now


def _captures(model: nn.Module) -> Iterator[Capture]:
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner = getattr(getattr(hook, "func", hook), "__self__", None)
            if isinstance(owner, Capture):
                yield owner
        yield from (capture for capture, _ in captures_of(vars(module).get("forward")) or ())
