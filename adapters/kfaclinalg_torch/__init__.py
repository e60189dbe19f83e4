"""K-FAC for PyTorch: the optimizer `KFAC`, and what collects the statistics of a model for it.

Read in this order: `_table` and `_discovery` (which layers a model has), `_blocks` (what a pass says about the weights
of one), `_capture` (how that is seen), `_statistics` and `_estimate` (A and G), `_inverses`, and the users,
`_optimizer`, `_preconditioner` and `_fit`.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("kfaclinalg_torch needs PyTorch: pip install torch", name="torch") from error

from ._blocks import Block, Dense, Rows
from ._curvature import Curvature
from ._damping import Relative
from ._distributed_state import DistributedState
from ._embedding import Embedding
from ._estimators import Empirical, ExactFisher, Sampled
from ._fit import fit_curvature
from ._laplace import laplace_backend
from ._likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ._linear import Bilinear, Linear
from ._matrix_free import FisherOperator
from ._normalisation import Scale
from ._optimizer import KFAC
from ._preconditioner import KFACPreconditioner
from ._report import report
from ._stored import load_curvature
from ._table import Rule
from ._torch_operators import curvlinops_operator, gpytorch_operator
from ._watch import Watch

__all__ = [
    "KFAC",
    "KFACPreconditioner",
    "DistributedState",
    "fit_curvature",
    "load_curvature",
    "Curvature",
    "FisherOperator",
    "laplace_backend",
    "report",
    "Watch",
    "curvlinops_operator",
    "gpytorch_operator",
    "Rule",
    "Block",
    "Rows",
    "Dense",
    "Linear",
    "Bilinear",
    "Embedding",
    "Scale",
    "Relative",
    "Sampled",
    "ExactFisher",
    "Empirical",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
]
