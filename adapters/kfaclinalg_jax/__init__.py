"""K-FAC for JAX, whichever library wrote the network: `Network` finds its layers and takes their statistics.

Read in this order: `_views` and `_find` (a parameter followed through the program of a function), `_rules` (the
equations that are sites), `_assemble` (the layers), `_run`, `_moments` (A and G) and `_measure`, and `_network`.
"""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("kfaclinalg_jax needs JAX: pip install jax optax", name="jax") from error

from ._damping import Relative
from ._door import layer
from ._estimators import Empirical, ExactFisher, Sampled
from ._kfac import KFAC
from ._likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ._network import Network
from ._plan import PreconditionState
from ._precondition import precondition
from ._statistics import Statistics

__all__ = [
    "KFAC",
    "Network",
    "layer",
    "precondition",
    "PreconditionState",
    "Relative",
    "Statistics",
    "Sampled",
    "ExactFisher",
    "Empirical",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
]
