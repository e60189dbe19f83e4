"""The backends, each with the BLAS and LAPACK calls that a user would write by hand: what the floors are made of."""

import os
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy.linalg import blas, eigh, lapack

QUICK = os.environ.get("BENCHMARKS") == "quick"  # the first size alone, in float32, one round: that no benchmark rots


class Backend:
    """In the array API's own calls, which are those of JAX and CuPy; `la` is the namespace of linear algebra."""

    def asarray(self, x):
        return self.xp.asarray(x)

    def cast(self, x, dtype):
        return x.astype(dtype)

    def compiled(self, f):
        return f

    def wait(self, result):
        pass

    def cholesky(self, M):
        return self.la.cholesky(M)

    def inverse(self, M):
        return self.inverse_of_factor(self.cholesky(M))

    def inverse_of_factor(self, L):
        K = self.substitution(L, self.xp.eye(len(L), dtype=L.dtype))
        return K.mT @ K

    def solve(self, M, X):
        L = self.cholesky(M)
        return self.substitution(L, self.substitution(L, X), trans=1)

    def substitution(self, L, X, trans=0):
        return self.solve_triangular(L, X, lower=True, trans=trans)

    def eigh(self, M):
        return self.la.eigh(M)

    def eigvalsh(self, M):
        return self.la.eigvalsh(M)

    def inv(self, K):
        return self.la.inv(K)

    def log_abs_det(self, K):
        return self.la.slogdet(K)[1]

    def moment(self, x):
        return x.mT @ x / len(x)

    def updated(self, decay, C, x):
        return decay * C + (1 - decay) * self.moment(x)

    def shifted(self, M, shift):
        M = M.copy()
        M.reshape(-1)[:: len(M) + 1] += shift
        return M

    def log_det(self, M):
        return 2 * self.xp.log(self.xp.diagonal(self.cholesky(M))).sum()


class NumPy(Backend):
    """SciPy's routines, in place on the one copy that they need; of a symmetric result only one half is filled."""

    xp, la = np, np.linalg

    def cholesky(self, M):
        return _routine(lapack, M, "potrf")(M.T, lower=1, clean=0)[0]

    def inverse(self, M):
        return _routine(lapack, M, "potri")(self.cholesky(M), lower=1, overwrite_c=1)[0]

    def inverse_of_factor(self, L):
        return _routine(lapack, L, "potri")(L.T, lower=0)[0]

    def solve(self, M, X):
        return _routine(lapack, M, "potrs")(self.cholesky(M), X, lower=1)[0]

    def substitution(self, L, X, trans=0):
        return _routine(lapack, L, "trtrs")(L, X, lower=1, trans=trans)[0]

    def eigh(self, M):
        return eigh(M, driver="evd", check_finite=False)

    def eigvalsh(self, M):
        return eigh(M, driver="evd", check_finite=False, eigvals_only=True)

    def inv(self, K):
        LU, pivots, _ = _routine(lapack, K, "getrf")(K.T)
        room = int(_routine(lapack, K, "getri_lwork")(len(K))[0])
        return _routine(lapack, K, "getri")(LU, pivots, lwork=room, overwrite_lu=1)[0].T

    def log_abs_det(self, K):
        return np.log(np.abs(np.diagonal(_routine(lapack, K, "getrf")(K.T)[0]))).sum()

    def moment(self, x):
        return _routine(blas, x, "syrk")(1 / len(x), x.T, lower=1)

    def updated(self, decay, C, x):
        return _routine(blas, x, "syrk")((1 - decay) / len(x), x.T, beta=decay, c=C.T, lower=1)


class Torch(Backend):
    """torch's own calls, on the CPU or on CUDA. kfaclinalg may leave them for SciPy's where those are faster."""

    def __init__(self, device):
        import torch

        self.xp, self.la, self.device = torch, torch.linalg, device
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def asarray(self, x):
        return self.xp.asarray(x, device=self.device)

    def cast(self, x, dtype):
        return x.to(getattr(self.xp, dtype))

    def wait(self, result):
        if self.device == "cuda":
            self.xp.cuda.synchronize()

    def cholesky(self, M):
        return self.la.cholesky_ex(M).L

    def inverse_of_factor(self, L):
        return self.xp.cholesky_inverse(L)

    def solve(self, M, X):
        return self.xp.cholesky_solve(X, self.cholesky(M))

    def substitution(self, L, X, trans=0):
        return self.la.solve_triangular(L.mT if trans else L, X, upper=bool(trans))

    def inv(self, K):
        return self.la.inv_ex(K).inverse

    def updated(self, decay, C, x):
        return self.xp.addmm(C, x.mT, x, beta=decay, alpha=(1 - decay) / len(x))

    def shifted(self, M, shift):
        M = M.clone()
        M.diagonal().add_(shift)
        return M


class JAX(Backend):
    """Ours and the floor are each compiled as one program; traced alone in a quick run, since XLA takes seconds."""

    def __init__(self):
        import jax

        jax.config.update("jax_enable_x64", True)
        # what is compiled for the time serves the ratio, which asv measures in another process
        jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / "env" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        self.jax, self.xp, self.la = jax, jax.numpy, jax.numpy.linalg
        self.solve_triangular = jax.scipy.linalg.solve_triangular

    def compiled(self, f):
        return partial(self.jax.eval_shape, f) if QUICK else self.jax.jit(f)

    def wait(self, result):
        self.jax.block_until_ready(result)

    def cholesky(self, M):
        return self.jax.lax.linalg.cholesky(M, symmetrize_input=False)

    def eigh(self, M):
        return self.la.eigh(M, symmetrize_input=False)

    def shifted(self, M, shift):
        i = self.xp.arange(len(M))
        return M.at[i, i].add(shift)


class CuPy(Backend):
    def __init__(self):
        import cupy
        from cupyx.scipy.linalg import solve_triangular

        self.xp, self.la, self.solve_triangular = cupy, cupy.linalg, solve_triangular

    def wait(self, result):
        self.xp.cuda.get_current_stream().synchronize()


MAKERS = {"numpy": NumPy, "torch": lambda: Torch("cpu"), "jax": JAX, "cupy": CuPy, "cuda": lambda: Torch("cuda")}
backend = cache(lambda name: MAKERS[name]())


@cache
def present():
    """The names of the backends of this machine, imported but not started: asv forks its processes after this."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() without a CUDA context
    names = ["numpy", *(name for name in ("torch", "jax", "cupy") if find_spec(name))]
    torch, *_ = map(import_module, names[1:])
    return (*names, "cuda") if torch.cuda.is_available() else tuple(names)


def _routine(library, x, name):
    return getattr(library, {"f": "s", "d": "d"}[x.dtype.char] + name)
