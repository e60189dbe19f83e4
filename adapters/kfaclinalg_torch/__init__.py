"""K-FAC for PyTorch: the optimizer `KFAC`, and what collects the statistics of a model for it."""

from ._likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ._optimizer import KFAC
from ._preconditioner import KFACPreconditioner

__all__ = ["KFAC", "KFACPreconditioner", "Bernoulli", "Categorical", "Gaussian", "Likelihood"]
