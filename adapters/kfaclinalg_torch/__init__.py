"""K-FAC for PyTorch: the optimizer `KFAC`, and what collects the statistics of a model for it."""

from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from .optimizer import KFAC
from .preconditioner import KFACPreconditioner

__all__ = ["KFAC", "KFACPreconditioner", "Bernoulli", "Categorical", "Gaussian", "Likelihood"]
