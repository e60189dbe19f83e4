"""A ⊗ B + C ⊗ D and its inverse (Appendix B)."""

from __future__ import annotations

from functools import partial
from typing import Any

from . import _array, _conversions, _host, _lapack, _linalg, spd
from ._value import rebuilt, value
from .kronecker import Kronecker
from .kronecker_basis import KroneckerBasis

REFINEMENTS = 2
SQUARINGS = 30  # 2^30 terms of the Smith series: more than enough for ρ = 1 - 1e-6


@value
class KroneckerPair:
    """A ⊗ B + C ⊗ D on V (..., m, n), for A, C (..., n, n) and B, D (..., m, m): V ↦ B V Aᵀ + D V Cᵀ.

    For the difference A ⊗ B - C ⊗ D pass -C. For `inverse`, `solve` and `logdet`, A and B are positive definite, C and
    D symmetric, and the pair positive definite; a member where this fails is NaN.

    Raises:
        TypeError, ValueError: shapes, dtypes, namespaces or devices do not fit.

    >>> import numpy as np
    >>> P = KroneckerPair(np.eye(1), 3 * np.eye(1), -np.eye(1), np.eye(1))
    >>> P.inverse() @ np.asarray([[4.0]])
    array([[2.]])
    """

    A: Any
    B: Any
    C: Any
    D: Any
    astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace
    as_scipy = _conversions.as_scipy

    def __post_init__(self) -> None:
        b = self._backend()
        _array.check_square(A=self.A, B=self.B)
        _array.operand(b, "C", self.C, tuple(self.A.shape[-2:]))
        _array.operand(b, "D", self.D, tuple(self.B.shape[-2:]))
        _array.check_batches(**{name: getattr(self, name).shape[:-2] for name in "ABCD"})

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.B.shape[-1], self.A.shape[-1])

    def apply(self, V: Any, /, *, blas: str = "auto") -> Any:
        """B V Aᵀ + D V Cᵀ (..., m, n), as `@`. 4 m n (m + n) flops. `blas` is as in `Kronecker.apply`."""
        b = self._backend()
        X = _array.operand(b, "V", V, self.shape)
        first, second = (term.apply(X, blas=blas) for term in self._terms())
        return _array.narrowed(b, first + second, V.dtype)

    def __matmul__(self, V: Any) -> Any:
        """B V Aᵀ + D V Cᵀ (..., m, n). 4 m n (m + n) flops."""
        return self.apply(V)

    def inverse(self, method: str = "eigh", *, blas: str = "auto") -> KroneckerBasis:
        """(A ⊗ B + C ⊗ D)⁻¹ by one generalised symmetric eigenproblem a factor. About 11 (n³ + m³) flops.

        A and B are inverted: the backward error is of the order eps cond(A) cond(B), even where the pair is well
        conditioned. `solve` is refined. Here and below `blas` is as in `Kronecker.apply`.
        """
        _array.check_choice("method", method, ("eigh",))
        # With A = L Lᵀ and the eigendecomposition L⁻¹ C L⁻ᵀ = E diag(s_A) Eᵀ, the matrix K_A = L⁻ᵀ E makes both of A, C
        # diagonal: K_Aᵀ A K_A = I and K_Aᵀ C K_A = diag(s_A). The same for B, D. Hence, with K = K_A ⊗ K_B,
        #     Kᵀ (A ⊗ B + C ⊗ D) K = I ⊗ I + diag(s_A) ⊗ diag(s_B),
        # and the inverse is K (I ⊗ I + diag(s_A) ⊗ diag(s_B))⁻¹ Kᵀ. The paper takes symmetric square roots for L; any L
        # with A = L Lᵀ does, and Cholesky factors lose far fewer digits in float32.
        b = self._backend()
        native = partial(_inverse, partial(_diagonalised, b))
        return rebuilt(KroneckerBasis, _host.run(b, blas, _host_inverse, native, self.A, self.B, self.C, self.D))

    def solve(self, V: Any, method: str = "eigh", *, blas: str = "auto") -> Any:
        """U with B U Aᵀ + D U Cᵀ = V, a generalised Stein equation.

        "eigh" is `inverse() @ V`, refined twice by its residual. "smith" is the squared Smith iteration, matrix
        products only; it needs ρ(A⁻¹C) ρ(B⁻¹D) < 1 and is NaN otherwise, even where the pair is definite.
        About 11 (n³ + m³) + 16 m n (m + n) flops, or 2 (n³ + m³) + 2 m n (m + n) a squaring.
        """
        _array.check_choice("method", method, ("eigh", "smith"))
        b = self._backend()
        X = _array.operand(b, "V", V, self.shape)
        return _array.narrowed(b, self._smith(X, blas) if method == "smith" else self._refined(X, blas), V.dtype)

    def logdet(self) -> Any:
        """log det (A ⊗ B + C ⊗ D) (...), as minus that of the inverse. About 12 (n³ + m³) flops."""
        return -self.inverse().logdet()

    def trace(self) -> Any:
        """tr(A) tr(B) + tr(C) tr(D) (...). 2 (n + m) flops."""
        first, second = self._terms()
        return first.trace() + second.trace()

    def diagonal(self) -> Any:
        """The diagonal, shaped like V. 3 m n flops."""
        first, second = self._terms()
        return first.diagonal() + second.diagonal()

    def to_dense(self) -> Any:
        """The matrix (..., n m, n m) that acts on vec(V), the columns of V stacked. 3 m² n² flops."""
        first, second = self._terms()
        return first.to_dense() + second.to_dense()

    def _refined(self, V: Any, blas: str) -> Any:
        inverse = self.inverse(blas=blas)
        U = inverse.apply(V, blas=blas)
        for _ in range(REFINEMENTS):
            U = U + inverse.apply(V - self.apply(U, blas=blas), blas=blas)
        return U

    def _smith(self, V: Any, blas: str) -> Any:
        """U = Σ_k (-1)^k P^k W Q^k with P = B⁻¹D, Q = C A⁻¹ and W = B⁻¹ V A⁻¹, 2^j terms after j squarings.

        P and Q grow and shrink together: only their product matters, so that each step gives them equal norms.
        """
        b = self._backend()
        xp, sign = b.xp, -1.0
        solve = partial(spd.solve, blas=blas)
        W = solve(self.A, solve(self.B, V).mT).mT
        size = xp.sum(xp.abs(W), axis=(-2, -1), keepdims=True)
        size = xp.where(size > 0, size, 1.0)  # what is small beside U must not underflow
        U = W / size
        P, Q = solve(self.B, self.D), solve(self.A, self.C.mT).mT
        for _ in range(SQUARINGS):
            p, q = (xp.linalg.matrix_norm(M, keepdims=True) for M in (P, Q))
            lost = (p == 0) | (q == 0)
            balance = xp.where(lost, 1.0, xp.sqrt(q) / xp.sqrt(xp.where(lost, 1.0, p)))
            growing = p * q > 1 / b.eps  # far from convergence: NaN before it overflows
            P, Q = xp.where(growing, _array.NAN, xp.where(lost, 0.0, balance * P)), xp.where(lost, 0.0, Q / balance)
            step = sign * (P @ U @ Q)
            U, P, Q, sign = U + step, P @ P, Q @ Q, 1.0
            if _host.may_read(b, step) and not bool(xp.any(xp.abs(step) > 0.1 * b.eps * xp.abs(U))):
                break
        U = size * U
        return xp.where(self._converged(U, V, blas), U, _array.NAN)

    def _converged(self, U: Any, V: Any, blas: str) -> Any:
        """Whether the backward error of U (..., 1, 1) is below √eps: what says whether the series has converged."""
        b = self._backend()
        norm = partial(b.xp.linalg.matrix_norm, keepdims=True)
        size = (norm(self.A) * norm(self.B) + norm(self.C) * norm(self.D)) * norm(U) + norm(V)
        return b.xp.isfinite(size) & (norm(V - self.apply(U, blas=blas)) <= b.eps**0.5 * size)

    def _terms(self) -> tuple[Kronecker, Kronecker]:
        return Kronecker(self.A, self.B), Kronecker(self.C, self.D)

    def _backend(self) -> _array.Backend:
        return _array.resolve(A=self.A, B=self.B, C=self.C, D=self.D)


def _inverse(diagonalised: Any, A: Any, B: Any, C: Any, D: Any) -> tuple[Any, Any, Any]:
    (K_A, s_A), (K_B, s_B) = diagonalised(A, C), diagonalised(B, D)
    eigenvalues = 1 + s_B[..., :, None] * s_A[..., None, :]
    return K_A, K_B, _linalg.reciprocal(_array.resolve(A=A), eigenvalues)


_host_inverse = partial(_inverse, _lapack.pencil)


def _diagonalised(b: _array.Backend, M: Any, N: Any) -> tuple[Any, Any]:
    """K and s with Kᵀ M K = I and Kᵀ N K = diag(s), for M positive definite and N symmetric."""
    L = _linalg.cholesky(b, _linalg.symmetrised(M))
    half = _linalg.forward_substitution(b, L, _linalg.symmetrised(N))  # L⁻¹ N
    s, E = _linalg.eigh(b, _linalg.symmetrised(_linalg.forward_substitution(b, L, half.mT)))  # L⁻¹ N L⁻ᵀ
    return _linalg.back_substitution(b, L, E), s
