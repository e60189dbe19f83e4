"""The fastest routines of a CPU on single matrices: NumPy's product, SciPy's BLAS and LAPACK in place on one copy.

NumPy's arrays always take them. A torch tensor does, as a view of the same memory, where only its values are asked for
and a trial, once for each routine and dtype, shows torch's own to be slower: its BLAS is another one, which on some
processors reaches less than half of the speed. Near equality the trial may end either way, and with it the last bits of
a result; `blas="native"` at the call keeps to torch. Each library has its own number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np
from scipy.linalg import blas as scipy_blas
from scipy.linalg import lapack

from ._array import NAN, Backend, check_choice

CHOICES = ("auto", "native")
SIZE, REPETITIONS, FASTER = 257, 8, 0.8  # of a trial; odd as most inputs with their 1: some routines mind
PATIENCE = 0.1  # seconds after which a trial takes no further round
BLOCK = 64  # rows at once where a matrix meets its transpose: what is read by columns stays in the cache
_pays: dict[tuple[Any, Callable[..., Any]], bool] = {}


def run(b: Backend, blas: str, host: Callable[..., Any], native: Callable[..., Any], *args: Any) -> Any:
    """host(*args) with NumPy's views in the place of arrays, where that can be and pays; native(*args) elsewhere.

    `host` takes floats, vectors and matrices, none of them empty; it changes none. It returns an array or several.
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
    return tuple(map(torch.from_numpy, result)) if type(result) is tuple else torch.from_numpy(result)


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
    return all(type(x) is float or (type(x) is array and 1 <= x.ndim <= 2 and 0 not in x.shape) for x in args)


def _trial(host: Callable[..., Any], native: Callable[..., Any], views: Sequence[Any]) -> bool:
    import torch

    distance = abs(np.arange(SIZE)[:, None] - np.arange(SIZE))
    args = []
    for k, x in enumerate(views):  # matrices that are definite and different
        args.append(x if type(x) is float else (1 / (1 + k + distance)).astype(x.dtype)[(0,) * (2 - x.ndim)])
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


def inverse(M: Any) -> Any:
    """((M + Mᵀ)/2)⁻¹, exactly symmetric."""
    L = cholesky(M)
    return np.full_like(M, NAN) if L is None else mirrored(routine(lapack, L, "potri")(L, lower=1, overwrite_c=1)[0])


def solve(M: Any, X: Any) -> Any:
    """((M + Mᵀ)/2)⁻¹ X."""
    L = cholesky(M)
    return np.full_like(X, NAN) if L is None else routine(lapack, L, "potrs")(L, X, lower=1)[0]


def moment(x: Any) -> Any:
    """xᵀx / N for x (N, n), exactly symmetric."""
    return mirrored(_rank_n(x, 1 / len(x)))


def updated(decay: float, C: Any, x: Any) -> Any:
    """decay C + (1 - decay) xᵀx / N, exactly symmetric, for symmetric C."""
    X = np.multiply(C.T, decay, order="F")
    return mirrored(_rank_n(x, (1 - decay) / len(x), beta=1, c=X, overwrite_c=1))


def _rank_n(x: Any, alpha: float, **options: Any) -> Any:
    """alpha xᵀx, the lower triangle, added to c where there is one."""
    a, trans = (x, 1) if x.flags.f_contiguous else (x.T, 0)  # in the order that BLAS reads
    return routine(scipy_blas, x, "syrk")(alpha, a, trans=trans, lower=1, **options)


def cholesky(M: Any) -> Any:
    """Lower L in LAPACK's order, with anything above it; None where (M + Mᵀ)/2 is not definite."""
    L, info = routine(lapack, M, "potrf")(lower_half(M), lower=1, clean=0, overwrite_a=1)
    return L if info == 0 and math.isfinite(L.trace()) else None


def lower_half(M: Any) -> Any:
    """A copy in LAPACK's order whose lower triangle is that of (M + Mᵀ)/2, with anything above it."""
    X, T = 0.5 * M, M.T  # halved first: the sum of two large entries may overflow
    for i in range(0, len(M), BLOCK):
        j, columns = i + BLOCK, slice(i, i + BLOCK)
        X[:j, columns] += 0.5 * T[:j, columns]
    return X.T


def mirrored(X: Any) -> Any:
    """The symmetric matrix whose lower triangle is that of X, in the place of X."""
    _copy_up_to_low(X.T)  # rows lie together in the transpose
    return X.T


def _copy_up_to_low(X: Any) -> None:
    n = len(X)
    if n <= BLOCK:
        np.copyto(X.T, X, where=_above(n))
    else:
        h = n // 2
        X[h:, :h] = X[:h, h:].T
        _copy_up_to_low(X[:h, :h])
        _copy_up_to_low(X[h:, h:])


@lru_cache
def _above(n: int) -> Any:
    return ~np.tri(n, dtype=bool)


def routine(library: Any, x: Any, name: str) -> Any:
    return getattr(library, {"f": "s", "d": "d"}[x.dtype.char] + name)
