"""The explicit door: what a layer is, said by the user, where no rule sees it."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

from jax.ad_checkpoint import checkpoint_name

from ._versions import LAYER

T = TypeVar("T")
_numbers = itertools.count()


def layer(y: T, *, inputs: Any, weight: Any) -> T:
    """y itself, with the word that it is `inputs @ weight` for a parameter `weight` (n, m), however it was computed.

    Inside the function of a `Network`: the weight has a layer then, and all its other uses count as parts of this one.
    `Network.check` says whether Σ g aᵀ is its gradient. A bias is left to be added after it.

    >>> import jax, jax.numpy as jnp
    >>> from kfaclinalg_jax import Network
    >>> def f(params, x):
    ...     W = params["W"]
    ...     y = jax.lax.cond(True, lambda: x @ W, lambda: x @ W)  # no rule looks into a branch
    ...     return layer(y, inputs=x, weight=W)
    >>> Network(f, "gaussian", example=({"W": jnp.ones((2, 3))}, jnp.ones((4, 2)))).layers
    {'W': (3, 2)}
    """
    for name, v in (("y", y), ("inputs", inputs), ("weight", weight)):
        if not hasattr(v, "shape"):
            raise TypeError(f"{name} is {v!r}, expected an array")
    (x, W), shape = (inputs, weight), y.shape  # type: ignore[attr-defined]
    if W.ndim != 2 or x.ndim == 0 or x.shape[-1] != W.shape[0] or shape != (*x.shape[:-1], W.shape[1]):
        raise ValueError(f"y has shape {shape}, expected that of inputs {x.shape} @ weight {W.shape}")
    number = next(_numbers)
    for v, role in ((x, "inputs"), (W, "weight")):
        checkpoint_name(v, f"{LAYER}/{number}/{role}")
    named: T = checkpoint_name(y, f"{LAYER}/{number}/outputs")
    return named
