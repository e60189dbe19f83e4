"""K-FAC linear algebra, exact, on any array-API namespace (NumPy, CuPy, torch, JAX, ...).

Read in this order: `factors` (what is measured), `damping`, `kronecker` (one layer), `blocks` (the network),
`curvature` (from factors to an inverse), `structures` (which of them), `quadratic` (how far to go) and `algorithm`
(Algorithm 2).
"""

from . import spd, testing
from ._backends import LinAlgError, assert_finite, show_config
from .algorithm import Problem, kfac_iteration, kfac_report, kfac_step
from .averages import averaging_decay, moving_average, update_factors
from .blocks import BlockDiagonal, BlockTridiagonalInverse
from .cholesky_inverse import CholeskyInverse
from .curvature import (
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    exactly_damped_inverse,
    low_rank_inverse,
)
from .damping import factored_tikhonov, tikhonov_pi
from .dense import Dense
from .direct_sum import DirectSum
from .factors import Factors, LayerFactors, Link, batch_factors, homogeneous, second_moment
from .kronecker import Kronecker
from .kronecker_basis import KroneckerBasis
from .kronecker_eigen import KroneckerEigen
from .kronecker_pair import KroneckerPair
from .low_rank import Diagonal, LowRankPlusDiagonal, low_rank, low_rank_plus_diagonal
from .options import KFACOptions
from .outer_product import OuterProduct
from .quadratic import QuadraticFit, fit_quadratic, inner_products, levenberg_marquardt, reduction_ratio
from .records import KFACState, Schedule, StepInfo
from .spectral import Eigen, Exact
from .structures import Factored, LowRank, Structure, Tridiagonal

__all__ = [
    "BlockDiagonal",
    "BlockTridiagonalInverse",
    "CholeskyInverse",
    "Dense",
    "Diagonal",
    "DirectSum",
    "Eigen",
    "Exact",
    "Factored",
    "Factors",
    "KFACOptions",
    "KFACState",
    "Kronecker",
    "KroneckerBasis",
    "KroneckerEigen",
    "KroneckerPair",
    "LayerFactors",
    "LinAlgError",
    "Link",
    "LowRank",
    "LowRankPlusDiagonal",
    "OuterProduct",
    "Problem",
    "QuadraticFit",
    "Schedule",
    "StepInfo",
    "Structure",
    "Tridiagonal",
    "assert_finite",
    "averaging_decay",
    "batch_factors",
    "block_diagonal_inverse",
    "block_tridiagonal_inverse",
    "exactly_damped_inverse",
    "factored_tikhonov",
    "fit_quadratic",
    "homogeneous",
    "inner_products",
    "kfac_iteration",
    "kfac_report",
    "kfac_step",
    "levenberg_marquardt",
    "low_rank",
    "low_rank_inverse",
    "low_rank_plus_diagonal",
    "moving_average",
    "reduction_ratio",
    "second_moment",
    "show_config",
    "spd",
    "testing",
    "tikhonov_pi",
    "update_factors",
]
