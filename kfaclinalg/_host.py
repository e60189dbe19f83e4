"""Who computes with single matrices of a CPU: NumPy and SciPy, by `_blas`, `_lapack` and `_capacitance`, or torch.

NumPy's arrays always take them. A torch tensor does, as a view of the same memory, where only its values are asked for
and a trial, once for each routine and dtype, shows torch's own to be slower: its BLAS is another one, which on some
processors reaches less than half of the speed. Near equality the trial may end either way, and with it the last bits of
a result; `blas="native"` at the call keeps to torch. Each library has its own number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import matmul
from time import perf_counter
from typing import Any

import numpy as np

from ._array import Backend, check_choice

CHOICES = ("auto", "native")
SIZE, REPETITIONS, FASTER = 641, 8, 0.9  # of a trial; large and odd as inputs with their 1: some routines mind
PATIENCE = 0.2  # seconds after which a trial takes no further round
_pays: dict[tuple[Any, Callable[..., Any]], bool] = {}


def run(b: Backend, blas: str, host: Callable[..., Any], native: Callable[..., Any], *args: Any) -> Any:
    """host(*args) with NumPy's views in the place of arrays, where that can be and pays; native(*args) elsewhere.

    `host` takes floats and arrays of at most two dimensions, none of them empty, and changes none. It returns a number,
    an array or several.
    """
    check_choice("blas", blas, CHOICES)
    views: Sequence[Any] | None = None
    if b.kind == "numpy":
        views = args if _are_single(args, np.ndarray) else None
    elif b.kind == "torch" and blas == "auto" and _pays.get((b.dtype, host), True):
        views = _views(args)
    if views is None:
        return native(*args)
    if b.kind == "numpy":
        return host(*views)
    import torch

    if (b.dtype, host) not in _pays:
        _pays[b.dtype, host] = _trial(host, native, views)
        return run(b, blas, host, native, *args)
    with np.errstate(all="ignore"):  # torch does not warn of infinity - infinity
        result = host(*views)
    return tuple(map(torch.from_numpy, result)) if type(result) is tuple else torch.from_numpy(np.asarray(result))


def product(b: Backend, blas: str, X: Any, Y: Any) -> Any:
    """X Y, by the faster library."""
    return run(b, blas, matmul, matmul, X, Y)


def may_read(b: Backend, x: Any) -> bool:
    """Whether values of x may decide what comes next: no device is waited for, and they are all that is asked for."""
    return b.kind == "numpy" or (b.kind == "torch" and _views([x]) is not None)


def _views(args: Sequence[Any]) -> list[Any] | None:
    """None where anything but values is asked for: a derivative, a transformation or a trace of torch's operations."""
    import torch

    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or not _are_single(args, torch.Tensor)
    ):
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None  # the trials of several processes could end differently, and their results drift apart
    forward_ad: Any = torch.autograd.forward_ad
    recording, dual = torch.is_grad_enabled(), forward_ad._current_level >= 0
    views = []
    for x in args:
        if type(x) is float:
            views.append(x)
        elif (
            not x.is_cpu or (recording and x.requires_grad) or (dual and forward_ad.unpack_dual(x).tangent is not None)
        ):
            return None
        else:
            try:
                views.append(x.numpy())
            except (RuntimeError, TypeError):  # sparse, or minus the values that it holds
                return None
    return views


def _are_single(args: Sequence[Any], array: Any) -> bool:
    numbers = float, np.generic
    for x in args:
        single = x.ndim <= 2 and 0 not in x.shape if type(x) is array else isinstance(x, numbers)
        if not single:
            return False
    return True


def _trial(host: Callable[..., Any], native: Callable[..., Any], views: Sequence[Any]) -> bool:
    import torch

    distance = abs(np.arange(SIZE)[:, None] - np.arange(SIZE))
    args = []
    for k, x in enumerate(views):
        S = 1 / (1 + k + distance)  # definite, and another for each
        args.append(x if type(x) is float else np.asarray(S[(0,) * (2 - x.ndim)], dtype=x.dtype))
    tensors = [x if type(x) is float else torch.from_numpy(x) for x in args]
    here: list[float] = []
    there: list[float] = []
    rounds: list[tuple[Any, list[Any], list[float]]] = [(host, args, here), (native, tensors, there)]
    for f, given, seconds in rounds * REPETITIONS:
        if len(here) == len(there) and sum(here + there) > PATIENCE:
            break
        start = perf_counter()
        f(*given)
        seconds.append(perf_counter() - start)
    return min(here) < FASTER * min(there)
