"""CuPy without a GPU: NumPy behind a class that is not NumPy's, with CuPy's refusals and gaps.

array-api-compat takes `ndarray` for CuPy's and wraps the module `cupy` as it does the real one, so that the library's
own branch for CuPy runs. What it cannot show is what CUDA computes.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np
import pytest


class Device:
    def __init__(self, id: Any = None) -> None:
        self.id = 0 if id is None else getattr(id, "id", id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class ndarray:
    """An array "on the GPU": nothing reads it but `get`."""

    __array_priority__ = 100
    device = Device()

    def __init__(self, held: np.ndarray) -> None:
        self._held = held

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` explicitly.")

    __bool__ = __float__ = __int__ = __index__ = __iter__ = __array__  # CuPy has these: each waits for the device
    __array_ufunc__ = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def get(self) -> np.ndarray:
        return self._held.copy()

    def __getattr__(self, name: str) -> Any:  # shape, ndim, dtype, mT, astype, ...
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._held, name)
        return on_device(found) if callable(found) else wrapped(found)


def wrapped(x: Any) -> Any:
    if isinstance(x, np.ndarray | np.generic):
        return ndarray(np.asarray(x))
    if isinstance(x, tuple | list):
        return type(x)(*map(wrapped, x)) if hasattr(x, "_fields") else type(x)(map(wrapped, x))
    return x


def unwrapped(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")  # CuPy takes NumPy's scalars, but not its arrays
    if isinstance(x, tuple | list):
        return type(x)(map(unwrapped, x))
    return x._held if isinstance(x, ndarray) else x


def on_device(f: Any) -> Any:
    """NumPy's function `f` on the double's arrays alone."""

    @functools.wraps(f)
    def g(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: unwrapped(x) for name, x in kwargs.items() if name not in ("device", "blocking")}
        with np.errstate(all="ignore"):
            return wrapped(f(*map(unwrapped, args), **kwargs))

    return g


for name in ["add", "sub", "mul", "truediv", "matmul", "pow", "and_", "or_"]:
    function = getattr(operator, name)
    setattr(ndarray, f"__{name.strip('_')}__", on_device(function))
    setattr(ndarray, f"__r{name.strip('_')}__", on_device(lambda x, y, f=function: f(y, x)))
for name in ["lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert", "getitem"]:
    setattr(ndarray, f"__{name}__", on_device(getattr(operator, name)))


def cholesky(M: ndarray) -> ndarray:
    """Nothing is raised: of a failing member there is a partial factor."""

    def factor(M: np.ndarray) -> np.ndarray:
        L = np.tril(M)
        for j in range(len(L)):
            L[j:, j] -= L[j:, :j] @ L[j, :j]
            if not L[j, j] > 0:
                break
            L[j:, j] /= np.sqrt(L[j, j])
        return L

    return on_device(np.vectorize(factor, signature="(n,n)->(n,n)"))(M)


def solve(a: ndarray, b: ndarray) -> ndarray:
    """Without broadcasting: b is (..., n, k) with the batch of a (..., n, n)."""
    if b.ndim != a.ndim or b.shape[:-1] != a.shape[:-1]:
        raise ValueError(f"incompatible dimensions {a.shape} and {b.shape}")
    return on_device(np.linalg.solve)(a, b)


def solve_triangular(a: ndarray, b: ndarray, trans: Any = 0, lower: bool = False, **_: Any) -> ndarray:
    """cupyx.scipy.linalg.solve_triangular: no broadcasting either, and only one triangle is read."""
    triangle = on_device(np.tril if lower else np.triu)(a)
    return solve(triangle.mT if trans in (1, "T") else triangle, b)


def from_dlpack(x: Any) -> ndarray:
    if x.__dlpack_device__()[0] != 2:
        raise ValueError("CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))`.")
    return x


def asarray(x: Any, dtype: Any = None, **_: Any) -> ndarray:
    """The one way in: from the host, as cupy.asarray."""
    return ndarray(np.array(x._held if isinstance(x, ndarray) else x, dtype=dtype))


def modules() -> dict[str, ModuleType]:
    """What to put in sys.modules."""
    names = ["cupy", "cupy.linalg", "cupy.fft", "cupy.cuda", "cupy.cuda.device"]
    made = {name: ModuleType(name) for name in [*names, "cupyx", "cupyx.scipy", "cupyx.scipy.linalg"]}
    for name, source in (("cupy", np), ("cupy.linalg", np.linalg), ("cupy.fft", np.fft)):
        for public in source.__all__:
            found = getattr(source, public)
            keeps = isinstance(found, type | ModuleType) or not callable(found)
            setattr(made[name], public, found if keeps else on_device(found))
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    vars(made["cupy"]).update(ndarray=ndarray, asarray=asarray, array=asarray, from_dlpack=from_dlpack)
    vars(made["cupy.linalg"]).update(cholesky=cholesky, solve=solve)
    for name in ("cupy.cuda", "cupy.cuda.device"):
        vars(made[name]).update(Device=Device)
    vars(made["cupyx.scipy.linalg"]).update(solve_triangular=solve_triangular)
    return made


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The double as `cupy`, and array-api-compat's wrapper of it, until `monkeypatch` takes them away."""
    made = modules()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    importlib.import_module("array_api_compat.cupy")
    for name in [name for name in sys.modules if name.startswith("array_api_compat.cupy")]:
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    monkeypatch.setattr(array_api_compat, "cupy", vars(array_api_compat).pop("cupy"), raising=False)
    return made["cupy"]
