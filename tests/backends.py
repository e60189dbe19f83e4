"""The array libraries that the tests run on, behind one face: make an array, read it back, check where it lives."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat
import array_api_strict
import jax
import numpy as np
import pytest
import torch

jax.config.update("jax_enable_x64", True)
# Nearly all the time of JAX's tests is in compiling. XLA's older emitter of loops takes half as long: outside of jit it
# will do, in it the last entries of a row would round otherwise. XLA reads the variable where the first array is made,
# and ends the process for a name that it does not know, as before this version.
jax.config.update("jax_disable_most_optimizations", True)
TWO_EMITTERS = jax.__version_info__ >= (0, 10)
if TWO_EMITTERS:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
NEWER_EMITTER = {"xla_cpu_use_fusion_emitters": True} if TWO_EMITTERS else {}


@dataclass(frozen=True)
class Backend:
    name: str
    make: Callable[[np.ndarray], Any]  # from a NumPy array of the right dtype
    read: Callable[[Any], np.ndarray]
    dtype: str = "float64"
    jit: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f

    @property
    def eps(self) -> float:
        return float(np.finfo(self.dtype).eps)

    def array(self, x: Any, dtype: str | None = None) -> Any:
        return self.make(np.asarray(x, dtype=dtype or self.dtype))

    def numpy(self, x: Any) -> np.ndarray:
        """Back in float64, after checking that it never left this backend, its dtype and its device."""
        like = self.array(np.zeros(1))
        assert array_api_compat.array_namespace(x) is array_api_compat.array_namespace(like)
        assert x.dtype == like.dtype
        assert array_api_compat.device(x) == array_api_compat.device(like)
        return np.asarray(self.read(x), dtype=np.float64)

    def __repr__(self) -> str:
        return self.name


def _readonly(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _strict(device: str) -> tuple[Callable[[np.ndarray], Any], Callable[[Any], np.ndarray]]:
    elsewhere, here = array_api_strict.Device(device), array_api_strict.Device("CPU_DEVICE")
    return lambda x: array_api_strict.asarray(x, device=elsewhere), lambda x: np.asarray(x.to_device(here))


def _cupy() -> Any:
    return importlib.import_module("cupy")


def _torch_read(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


NUMPY = Backend("numpy", np.array, np.asarray)
STRICT = [
    Backend("strict-device1", *_strict("device1")),
    Backend("strict-device2-float32", *_strict("device2"), dtype="float32"),
    Backend("strict-no_float64", *_strict("no_float64"), dtype="float32"),
]
TORCH = Backend("torch", torch.asarray, _torch_read)
TORCH_FLOAT32 = Backend("torch-float32", torch.asarray, _torch_read, "float32")
JAX = [
    Backend("jax", jax.numpy.asarray, np.asarray),
    Backend("jax-float32", jax.numpy.asarray, np.asarray, "float32"),
    Backend("jax-jit", jax.numpy.asarray, np.asarray, jit=partial(jax.jit, compiler_options=NEWER_EMITTER)),
]
EAGER = [
    NUMPY,
    Backend("numpy-readonly", _readonly, np.asarray),
    Backend("numpy-float32", np.array, np.asarray, "float32"),
    *STRICT,
    TORCH,
    TORCH_FLOAT32,
]
# What this machine has: a case that could only be skipped is not collected.
CUDA, CUPY = torch.cuda.is_available(), importlib.util.find_spec("cupy") is not None
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
GPU = [
    *(
        [
            Backend("cuda", lambda x: torch.asarray(x).cuda(), _torch_read),
            Backend("cuda-float32", lambda x: torch.asarray(x).cuda(), _torch_read, "float32"),
        ]
        if CUDA
        else []
    ),
    *([Backend("cupy", lambda x: _cupy().asarray(x), lambda x: _cupy().asnumpy(x))] if CUPY else []),
]
# JAX compiles anew for every shape, and outside of jit for every operation: float32 is tested outside of it and float64
# inside, and random shapes are for the others. A test without `b.jit` has nothing to show inside.
every_backend = pytest.mark.parametrize("b", [*EAGER, *JAX[1:], *GPU], ids=str)
jit_backends = pytest.mark.parametrize("b", [*EAGER, JAX[2], *GPU], ids=str)
uncompiled_backends = pytest.mark.parametrize("b", [*EAGER, JAX[1], *GPU], ids=str)
eager_backends = pytest.mark.parametrize("b", [*EAGER, *GPU], ids=str)
