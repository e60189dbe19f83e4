"""Who computes with single matrices of torch's CPU: torch, or SciPy's BLAS and LAPACK on the same memory.

The rule, decided once a process: a symmetric rank-N product, which torch does not have, goes to BLAS; everything else
goes to SciPy only where torch's BLAS is MKL and the processor is not Intel's, on which MKL takes slower kernels. With
KFACLINALG_BLAS=native in the environment all of it stays in torch. So does whatever asks for more than values: a
derivative, a transformation, a trace, a subclass, several processes. Each library has its own number of threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np

from .door import kind_of
from .processor import is_intel

Body = Callable[..., Any]
F = TypeVar("F", bound=Body)
WATCHERS = ("FuncTorchDynamicLayerFrontMode", "Python")  # torch.func, a TorchDispatchMode


@cache
def is_native() -> bool:
    """Whether the environment keeps torch's tensors in torch."""
    asked = os.environ.get("KFACLINALG_BLAS", "auto")
    if asked not in ("auto", "native"):
        raise ValueError(f"the environment variable KFACLINALG_BLAS is {asked!r}, expected 'auto' or 'native'")
    return asked == "native"


def rank_n_goes_to_blas() -> bool:
    """The rule for symmetric rank-N products."""
    return not is_native()


@cache
def goes_to_scipy() -> bool:
    """The rule for everything else."""
    import torch

    mkl: Any = torch.backends.mkl
    return not is_native() and mkl.is_available() and not is_intel()


def routine(
    *, single: Body | None = None, rule: Callable[[], bool] = goes_to_scipy, **own: Body
) -> Callable[[Body], Body]:
    """The body below, or another one in its place: the backend's own, or `single` for single matrices of a CPU.

    `single` takes floats and NumPy arrays of no dimension or two, none of them empty, and changes none. It returns an
    array or several.
    """

    def chosen(standard: Body) -> Body:
        in_torch = in_full_precision(own.get("torch", standard))

        @wraps(standard)
        def run(*args: Any) -> Any:
            kind = kind_of(args[0])
            if single is not None:
                if kind == "numpy" and _are_single(args):
                    return single(*args)
                if kind == "torch" and (views := _views(args, rule, (0, 2))) is not None:
                    return _viewed(single, views)
            try:
                return (in_torch if kind == "torch" else own.get(kind, standard))(*args)
            except np.linalg.LinAlgError:  # NumPy throws a batch away for one member
                if kind not in own:
                    raise
                return standard(*args)

        run.bodies = {*own, *(("single",) if single else ())}  # type: ignore[attr-defined]
        return run

    return chosen


def formula(f: F) -> F:
    """f, of arrays and numbers by position, computed by one library from end to end: where the rule says SciPy, on
    NumPy's views of torch's matrices."""

    @wraps(f)
    def run(*args: Any, **options: Any) -> Any:
        if _are_tensors(args) and (views := _views(args, goes_to_scipy, (0, 1, 2))) is not None:
            return _viewed(f, views, options)
        return f(*args, **options)

    return cast(F, run)


def in_full_precision(f: F) -> F:
    """f outside of torch's autocast, which would take its products in half precision."""

    @wraps(f)
    def run(*args: Any, **options: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or not any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return f(*args, **options)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return f(*args, **options)

    return cast(F, run)


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


def may_read(x: Any) -> bool:
    """Whether values of x may decide what comes next: no device is waited for, and they are all that is asked for."""
    kind = kind_of(x)
    return kind == "numpy" or (kind == "torch" and _views([x], lambda: True, (0, 1, 2)) is not None)


def _viewed(f: Body, views: Sequence[Any], options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """f of NumPy's views, in torch again."""
    import torch

    with np.errstate(all="ignore"):  # torch does not warn of infinity - infinity
        result = f(*views, **options)
    if result is None:
        return None
    if type(result) is tuple:
        return tuple(torch.from_numpy(np.asarray(x)) for x in result)
    return torch.from_numpy(np.asarray(result))


def _views(args: Sequence[Any], rule: Callable[[], bool], ndims: tuple[int, ...]) -> list[Any] | None:
    """NumPy's views of torch's tensors, None where `rule` says no or anything but values is asked for."""
    import torch

    if (
        torch.compiler.is_compiling()
        or not rule()
        or is_watched()
        or (torch.distributed.is_available() and torch.distributed.is_initialized())  # machines may differ
    ):
        return None
    recording = torch.is_grad_enabled()
    forward_ad: Any = torch.autograd.forward_ad
    views: list[Any] = []
    for x in args:
        if isinstance(x, float):
            views.append(x)
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
                views.append(x.numpy() if recording else x.detach().numpy())
            except (RuntimeError, TypeError):  # no storage inside a transformation, sparse, minus the values it holds
                return None
    return views


def _are_tensors(args: Sequence[Any]) -> bool:
    """Whether all are torch's, or numbers beside them."""
    torch = sys.modules.get("torch")
    return torch is not None and {type(x) for x in args} - {float} == {torch.Tensor}


def _are_single(args: Sequence[Any]) -> bool:
    numbers = float, np.generic
    return all(
        isinstance(x, numbers) or (type(x) is np.ndarray and x.ndim in (0, 2) and 0 not in x.shape) for x in args
    )
