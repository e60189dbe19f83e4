"""Products with a Jacobian, in forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def pushforward(f: Callable[[Any], Any], values: Any, tangents: Any) -> tuple[Any, Any]:
    """f(values), and J of f there times the tangents."""
    _load_rules()
    both: Any = torch.func.jvp(f, (values,), (tangents,))
    return both


@cache
def _load_rules() -> None:
    """By the first product of a process torch compiles rules of its own, and warns of the way in which it does so."""
    x = torch.zeros(1, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`")
        torch.func.jvp(torch.sin, (x,), (x,))
