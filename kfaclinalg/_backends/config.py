"""What `show_config` prints: the backends found, their BLAS, and who computes with torch's single matrices."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from . import home
from .processor import is_intel


def show_config() -> None:
    """Print the backends found, their BLAS, and which library computes with single matrices of torch's CPU, and why.

    The environment variable KFACLINALG_BLAS=native, read once a process, keeps torch's tensors in torch. No flops.

    Raises:
        ValueError: KFACLINALG_BLAS is neither "auto" nor "native".

    >>> show_config()  # doctest: +ELLIPSIS
    kfaclinalg ...
    numpy ...
    """
    print("\n".join(_lines()))


def _lines() -> Iterator[str]:
    yield f"kfaclinalg {_version()}, Python {platform.python_version()}, {platform.machine()}"
    for name, blas in _BLAS.items():
        if find_spec(name) is None:
            yield f"{name}: not found"
            continue
        module = import_module(name)
        yield f"{name} {module.__version__}: {blas(module)}"
    yield f"single matrices of torch's CPU: {_who()}"


def _version() -> str:
    try:
        return version("kfaclinalg")
    except PackageNotFoundError:
        return "from source"


def _who() -> str:
    if find_spec("torch") is None:
        return "no torch"
    if home.is_native():
        return "torch, for KFACLINALG_BLAS=native"
    import torch

    mkl: Any = torch.backends.mkl
    lacked = "SciPy for what torch does not have, as symmetric rank-N products"
    if not mkl.is_available():
        return f"torch, whose BLAS is not MKL; {lacked}"
    if is_intel():
        return f"torch, whose BLAS is MKL on an Intel processor; {lacked}"
    return "SciPy, since torch's BLAS is MKL and the processor is not Intel's"


def _of_numpy(module: Any) -> str:
    """NumPy and SciPy say it alike."""
    found = module.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{found['name']} {found.get('version', '')}".strip()


def _of_torch(module: Any) -> str:
    blas = "MKL" if module.backends.mkl.is_available() else "no MKL"
    cuda = f", CUDA {module.version.cuda}" if module.cuda.is_available() else ""
    return f"{blas}, {module.backends.cpu.get_cpu_capability()}{cuda}"


def _of_jax(module: Any) -> str:
    return f"SciPy's on the CPU; {module.default_backend()} by default"


def _of_cupy(module: Any) -> str:
    return f"cuBLAS of CUDA {module.cuda.runtime.runtimeGetVersion()}"


_BLAS: dict[str, Callable[[Any], str]] = {
    "numpy": _of_numpy,
    "scipy": _of_numpy,
    "torch": _of_torch,
    "jax": _of_jax,
    "cupy": _of_cupy,
}
