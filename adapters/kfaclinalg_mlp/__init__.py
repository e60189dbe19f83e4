"""A multi-layer perceptron in the array API itself: K-FAC on NumPy and CuPy, which do not differentiate.

`MLP(...).problem(...)` is the `kfaclinalg.Problem` that `kfaclinalg.kfac_step` iterates on. It runs on any namespace
(NumPy, CuPy, torch, JAX, ...), and a seeded `numpy.random.Generator` gives the same samples on all of them.
"""

from .initialization import sparse_weights
from .mlp import MLP
from .problem import MLPProblem

__all__ = ["MLP", "MLPProblem", "sparse_weights"]
