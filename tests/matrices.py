"""Random matrices for the tests, and the judgement of an error by its bound."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from backends import Backend
from hypothesis import strategies as st

from kfaclinalg import testing

worst: dict[tuple[str, str], float] = {}


def judge(b: Backend, operation: str, error: float, bound: float) -> None:
    """The error must be finite and within its bound, which is 10 units; the largest is remembered for the table."""
    c = testing.C * error / bound
    assert error <= bound, f"{operation} on {b.name}: c = {c:.3g}"
    worst[operation, b.name] = max(c, worst.get((operation, b.name), 0.0))


class Sample(NamedTuple):
    """How to draw matrices: the same for every backend but for rounding to its dtype."""

    n: int
    batch: tuple[int, ...] = ()
    kind: str = "geometric"
    decades: float = 0.5  # log10 of the condition number, as a part of that of 1/eps
    seed: int = 0

    def spd(self, b: Backend) -> np.ndarray:
        """(*batch, n, n) in float64, after rounding to the backend's dtype."""
        rng = np.random.default_rng(self.seed)
        condition = b.eps**-self.decades
        members = [
            testing.spd_matrix(testing.spectrum(self.kind, self.n, condition=condition), rng)
            for _ in range(int(np.prod(self.batch)))
        ]
        stacked = np.array(members).reshape(*self.batch, self.n, self.n)
        return stacked.astype(b.dtype).astype(np.float64)

    def normal(self, b: Backend, *shape: int) -> np.ndarray:
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal((*self.batch, *shape)).astype(b.dtype).astype(np.float64)


FIXED = [Sample(5), Sample(1), Sample(7, (3,), "one-tiny", 0.8), Sample(4, (2, 2), "clustered", 0.7), Sample(3, (0,))]
samples = st.builds(
    Sample,
    n=st.integers(1, 24),
    batch=st.sampled_from([(), (3,), (2, 2), (0,)]),
    kind=st.sampled_from(testing.SPECTRA),
    decades=st.floats(0, 0.8),
    seed=st.integers(0, 2**16),
)


def members(*stacks: np.ndarray):
    """The matrices of stacks with equal batch shapes, one tuple a member, in extended precision."""
    flat = [x.reshape(-1, *x.shape[-2:]).astype(np.longdouble) for x in stacks]
    return zip(*flat, strict=True)


def random_spd(rng: np.random.Generator, n: int) -> np.ndarray:
    X = rng.standard_normal((n, 2 * n))
    return X @ X.T / n


def power(M: np.ndarray, p: float) -> np.ndarray:
    """M^p of a positive definite matrix, in float64."""
    w, Q = np.linalg.eigh(M)
    return (Q * w**p) @ Q.T
