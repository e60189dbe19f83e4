"""How time grows with n up to 4096, as the exponent that fits it, and what a refresh holds in memory."""

import tracemalloc
from timeit import Timer

import numpy as np

from kfaclinalg import Factors, LayerFactors, batch_factors, block_diagonal_inverse, low_rank, spd

from .backends import QUICK, backend, present
from .operation import Arrays, moved

SIZES = [32, 64] if QUICK else [512, 1024, 2048, 4096]
RANK = 16 if QUICK else 64


def refresh(M):
    return block_diagonal_inverse(Factors((LayerFactors(M, M),)), 0.3)


class _Growth:
    param_names, params = ("backend", "n"), ([name for name in present() if name != "jax"], SIZES)
    rounds, repeat, warmup_time, number, timeout = 1, (2, 5, 2.0), 0, 1, 600

    def setup(self, name, *n):
        self.by = backend(name)
        self.matrices = {k: moved(self.by, Arrays(self.by, "float32").spd(k)) for k in (n or SIZES)}
        self.run(min(self.matrices))

    def run(self, n):
        self.by.wait(self.work(self.matrices[n]))

    def time_ours(self, name, n):
        self.run(n)

    def peakmem_ours(self, name, n):
        self.run(n)


class _Exponent(_Growth):
    """Of n in the time, by least squares on the logarithms of the shortest times."""

    param_names, params = ("backend",), (_Growth.params[0],)
    time_ours = peakmem_ours = None

    def track_exponent(self, name):
        seconds = [min(Timer(lambda n=n: self.run(n)).repeat(1 if QUICK else 3, 1)) for n in SIZES]
        return float(np.polyfit(np.log(SIZES), np.log(seconds), 1)[0])

    track_exponent.unit = "power of n"


WORK = {"Inverse": spd.inverse, "Refresh": refresh, "LowRankOf64": lambda M: low_rank(M, RANK)}
for name, work in WORK.items():
    attributes = {"work": staticmethod(work), "__module__": __name__}
    globals()[name] = type(name, (_Growth,), attributes)
    globals()[name + "Exponent"] = type(name + "Exponent", (_Exponent,), attributes)


class Memory:
    """The most that statistics and a refresh hold, over one copy of the factors and one of the inverses. NumPy."""

    param_names, params = ("layers", "n"), ([1, 4], SIZES[:2])

    def setup(self, layers, n):
        new = Arrays(None, "float32")
        self.batch = [new.matrix(64, n) for _ in range(layers)], [new.matrix(64, n) for _ in range(layers)]

    def track_peak_copies(self, layers, n):
        tracemalloc.start()
        factors = batch_factors(*self.batch)
        block_diagonal_inverse(factors, 0.3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak / (2 * sum(M.nbytes for layer in factors.layers for M in layer))

    track_peak_copies.unit = "copies of the factors and the inverses"
