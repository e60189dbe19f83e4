"""The core on its own: one matrix, one layer. The calls by hand are what the core is allowed to cost."""

import numpy as np
import torch
from scipy.linalg import lapack

from kfaclinalg import Kronecker, spd

from . import BACKENDS, asarray, spd_matrix, wait


class Inverse:
    """spd.inverse of one factor, next to the same LAPACK calls by hand."""

    params = (BACKENDS, [256, 1024])
    param_names = ("backend", "n")

    def setup(self, backend, n):
        self.M = spd_matrix(n, backend)
        self.by_hand = _lapack_inverse if backend == "numpy" else _torch_inverse
        self.time_inverse(backend, n)
        self.time_by_hand(backend, n)

    def time_inverse(self, backend, n):
        wait(spd.inverse(self.M))

    def time_by_hand(self, backend, n):
        wait(self.by_hand(self.M))


class Layer:
    """Kronecker of a layer with n inputs and n/2 outputs."""

    params = (BACKENDS, [256, 1024])
    param_names = ("backend", "n")

    def setup(self, backend, n):
        self.P = Kronecker(spd_matrix(n, backend), spd_matrix(n // 2, backend))
        self.V = asarray(np.random.default_rng(0).normal(size=(n // 2, n)), backend)
        self.time_inverse(backend, n)
        self.inverse = self.P.inverse()
        self.time_apply_inverse(backend, n)

    def time_inverse(self, backend, n):
        inverse = self.P.inverse()
        wait(inverse.A)
        wait(inverse.B)

    def time_apply_inverse(self, backend, n):
        wait(self.inverse @ self.V)


def _lapack_inverse(M):
    L, _ = lapack.spotrf(M.T, lower=True)
    X, _ = lapack.spotri(L, lower=True)
    return np.tril(X) + np.tril(X, -1).T


def _torch_inverse(M):
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(M).L)
