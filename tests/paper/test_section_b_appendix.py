"""(A ⊗ B ± C ⊗ D)⁻¹ by the paper's own route: symmetric square roots, dense, in float64."""

import numpy as np
import pytest
from backends import every_backend
from matrices import power
from test_kronecker_pair import Case

from kfaclinalg import testing


@every_backend
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_appendix_b(b, sign):
    """vec(K_2 [(K_2ᵀ V K_1) ⊘ (1 1ᵀ ± s_2 s_1ᵀ)] K_1ᵀ), K_1 = A^(-1/2) E_1, K_2 = B^(-1/2) E_2."""
    case = Case(b, sign=sign)
    A_root, B_root = power(case.A, -0.5), power(case.B, -0.5)
    s_1, E_1 = np.linalg.eigh(A_root @ (sign * case.C) @ A_root)
    s_2, E_2 = np.linalg.eigh(B_root @ case.D @ B_root)
    K_1, K_2 = A_root @ E_1, B_root @ E_2
    exact = K_2 @ ((K_2.T @ case.V @ K_1) / (1 + sign * np.outer(s_2, s_1))) @ K_1.T
    U = case.run(lambda P, V: P.inverse() @ V)
    bound = testing.inverse_bound(10 * np.linalg.cond(case.dense), b.eps)
    assert np.linalg.norm(U - exact) <= bound * np.linalg.norm(exact)
