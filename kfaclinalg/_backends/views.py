"""torch's matrices on a CPU as NumPy's, on the same memory, where values are all that is asked for: no derivative, no
transformation, no trace, no subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from .door import kind_of

WATCHERS = ("FuncTorchDynamicLayerFrontMode", "Python")  # torch.func, a TorchDispatchMode


def is_watched() -> bool:
    """Whether operations of torch themselves are asked for, by `torch.func`, a trace or a TorchDispatchMode.

    No public function tells of the first and the last.
    """
    import torch

    keys, (one, other) = torch._C._dispatch_tls_local_include_set(), _watchers()
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing or keys.has(one) or keys.has(other)


@cache
def _watchers() -> tuple[Any, ...]:
    """The keys of torch.func and of a TorchDispatchMode."""
    import torch

    return tuple(getattr(torch._C.DispatchKey, name) for name in WATCHERS)


def may_read(*xs: Any) -> bool:
    """Whether values of xs may decide what comes next: no device is waited for, and they are all that is asked for."""
    kind = kind_of(xs[0])
    return kind == "numpy" or (kind == "torch" and views(xs, (0, 1, 2)) is not None)


def viewed(f: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """f of NumPy's views, in torch again."""
    import torch

    with np.errstate(all="ignore"):  # torch does not warn of infinity - infinity
        result = f(*args, **options)
    if result is None:
        return None
    if type(result) is tuple:
        return tuple(torch.from_numpy(np.asarray(x)) for x in result)
    return torch.from_numpy(np.asarray(result))


def views(args: Sequence[Any], ndims: tuple[int, ...], rule: Callable[..., bool] | None = None) -> list[Any] | None:
    """NumPy's views of torch's tensors, None where `rule` says no or anything but values is asked for."""
    import torch

    if torch.compiler.is_compiling() or (rule is not None and not rule(*args)) or is_watched():
        return None
    recording = torch.is_grad_enabled()
    forward_ad: Any = torch.autograd.forward_ad
    found: list[Any] = []
    for x in args:
        if isinstance(x, float):
            found.append(x)
        elif (
            type(x) is not torch.Tensor
            or not x.is_cpu
            or x.ndim not in ndims
            or x.numel() == 0
            or (recording and x.requires_grad)
            or forward_ad.unpack_dual(x).tangent is not None
        ):
            return None
        else:
            try:
                found.append(x.numpy() if recording else x.detach().numpy())
            except (RuntimeError, TypeError):  # no storage inside a transformation, sparse, minus the values it holds
                return None
    return found
