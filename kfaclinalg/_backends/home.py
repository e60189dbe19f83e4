"""Who computes with single matrices of torch's CPU: torch, or SciPy's BLAS and LAPACK on the same memory.

The rule, decided once a process: what torch does not have, a symmetric rank-N product and a formula of many small
steps, goes to SciPy, and so do small Cholesky factors and generalised eigenproblems; everything else goes there only
where torch's BLAS is MKL and the processor is not Intel's, on which MKL takes slower kernels. With
KFACLINALG_BLAS=native in the environment, and in several processes, all of it stays in torch. So does whatever asks for
more than values: a derivative, a transformation, a trace, a subclass. Each library has its own number of threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar, cast

import numpy as np

from .door import kind_of
from .processor import is_intel
from .views import viewed, views

Body = Callable[..., Any]
F = TypeVar("F", bound=Body)
TINY = 64


@cache
def is_native() -> bool:
    """Whether the environment keeps torch's tensors in torch."""
    asked = os.environ.get("KFACLINALG_BLAS", "auto")
    if asked not in ("auto", "native"):
        raise ValueError(f"the environment variable KFACLINALG_BLAS is {asked!r}, expected 'auto' or 'native'")
    return asked == "native"


def torch_lacks_it(*args: Any) -> bool:
    """The rule for what torch does not have."""
    return not is_native() and not _in_processes()


def several_calls(M: Any, *args: Any) -> bool:
    """The rule for what torch takes several calls for, each as long as the arithmetic of a small matrix."""
    return torch_lacks_it() if M.shape[-1] <= TINY else goes_to_scipy()


def goes_to_scipy(*args: Any) -> bool:
    """The rule for everything else."""
    return mkl_is_slower() and torch_lacks_it()


@cache
def mkl_is_slower() -> bool:
    """Whether torch's BLAS is MKL, on a processor that is not Intel's."""
    import torch

    mkl: Any = torch.backends.mkl
    return mkl.is_available() and not is_intel()


def _in_processes() -> bool:
    """Whether there are other processes, whose machines may be others."""
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def routine(
    *,
    single: Body | None = None,
    in_place: Body | None = None,
    rule: Callable[..., bool] = goes_to_scipy,
    **own: Body,
) -> Callable[[Body], Body]:
    """The body below, or another one in its place: the backend's own, or `single` for single matrices of a CPU.

    `single` takes floats and NumPy arrays of no dimension or two, none of them empty, and changes none. It returns an
    array or several. So does `in_place`, in torch's own LAPACK, for matrices that the rule leaves to torch.
    """

    def chosen(standard: Body) -> Body:
        in_torch = in_full_precision(own.get("torch", standard))

        @wraps(standard)
        def run(*args: Any) -> Any:
            kind = kind_of(args[0])
            if single is not None:
                if kind == "numpy" and _are_single(args):
                    return single(*args)
                if kind == "torch":
                    for body, may in ((single, rule), (in_place, None)):
                        if body is not None and (seen := views(args, (0, 2), may)) is not None:
                            return viewed(body, seen)
            try:
                return (in_torch if kind == "torch" else own.get(kind, standard))(*args)
            except np.linalg.LinAlgError:  # NumPy throws a batch away for one member
                if kind not in own:
                    raise
                return standard(*args)

        kinds = {"single": single, "in_place": in_place}
        run.bodies = {*own, *(name for name, body in kinds.items() if body)}  # type: ignore[attr-defined]
        return run

    return chosen


def formula(f: F) -> F:
    """f, of arrays and numbers by position, in many small steps, which torch takes longer to call: on NumPy's views of
    torch's matrices."""

    @wraps(f)
    def run(*args: Any, **options: Any) -> Any:
        if _are_tensors(args) and (seen := views(args, (0, 1, 2), torch_lacks_it)) is not None:
            return viewed(f, seen, options)
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


def _are_tensors(args: Sequence[Any]) -> bool:
    """Whether all are torch's, or numbers beside them."""
    torch = sys.modules.get("torch")
    return torch is not None and {type(x) for x in args} - {float} == {torch.Tensor}


def _are_single(args: Sequence[Any]) -> bool:
    numbers = float, np.generic
    return all(
        isinstance(x, numbers) or (type(x) is np.ndarray and x.ndim in (0, 2) and 0 not in x.shape) for x in args
    )
