"""A ⊗ B + C ⊗ D and its inverse (Appendix B)."""

from __future__ import annotations

from . import _backends, _checks, _conversions, spd
from ._typing import Array
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

    A: Array
    B: Array
    C: Array
    D: Array
    astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace
    as_scipy = _conversions.as_scipy

    def __post_init__(self) -> None:
        b = self._backend()
        _checks.check_square(A=self.A, B=self.B)
        _backends.operand(b, "C", self.C, tuple(self.A.shape[-2:]))
        _backends.operand(b, "D", self.D, tuple(self.B.shape[-2:]))
        _checks.check_batches(**self._batches())

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.B.shape[-1], self.A.shape[-1])

    def apply(self, V: Array, /) -> Array:
        """B V Aᵀ + D V Cᵀ (..., m, n), as `@`. 4 m n (m + n) flops."""
        X = self._operand(V)
        first, second = (term.apply(X) for term in self._terms())
        return _backends.narrowed(first + second, V.dtype)

    __matmul__ = apply

    def inverse(self, method: str = "eigh") -> KroneckerBasis:
        """(A ⊗ B + C ⊗ D)⁻¹ by one generalised symmetric eigenproblem a factor. About 11 (n³ + m³) flops.

        A and B are inverted: the backward error is of the order eps cond(A) cond(B), even where the pair is well
        conditioned. `solve` is refined.
        """
        _checks.check_choice("method", method, ("eigh",))
        # With A = L Lᵀ and the eigendecomposition L⁻¹ C L⁻ᵀ = E diag(s_A) Eᵀ, the matrix K_A = L⁻ᵀ E makes both of A, C
        # diagonal: K_Aᵀ A K_A = I and K_Aᵀ C K_A = diag(s_A). The same for B, D. Hence, with K = K_A ⊗ K_B,
        #     Kᵀ (A ⊗ B + C ⊗ D) K = I ⊗ I + diag(s_A) ⊗ diag(s_B),
        # and the inverse is K (I ⊗ I + diag(s_A) ⊗ diag(s_B))⁻¹ Kᵀ. The paper takes symmetric square roots for L; any L
        # with A = L Lᵀ does, and Cholesky factors lose far fewer digits in float32.
        (K_A, s_A), (K_B, s_B) = _backends.pencil(self.A, self.C), _backends.pencil(self.B, self.D)
        eigenvalues = 1 + s_B[..., :, None] * s_A[..., None, :]
        return rebuilt(KroneckerBasis, (K_A, K_B, _backends.reciprocal(eigenvalues)))

    def solve(self, V: Array, method: str = "eigh") -> Array:
        """U with B U Aᵀ + D U Cᵀ = V, a generalised Stein equation.

        "eigh" is `inverse() @ V`, refined twice by its residual. "smith" is the squared Smith iteration, matrix
        products only; it needs ρ(A⁻¹C) ρ(B⁻¹D) < 1 and is NaN otherwise, even where the pair is definite.
        About 11 (n³ + m³) + 16 m n (m + n) flops, or 2 (n³ + m³) + 2 m n (m + n) a squaring.
        """
        _checks.check_choice("method", method, ("eigh", "smith"))
        X = self._operand(V)
        return _backends.narrowed(self._smith(X) if method == "smith" else self._refined(X), V.dtype)

    def logdet(self) -> Array:
        """log det (A ⊗ B + C ⊗ D) (...), as minus that of the inverse. About 12 (n³ + m³) flops."""
        return -self.inverse().logdet()

    def trace(self) -> Array:
        """tr(A) tr(B) + tr(C) tr(D) (...). 2 (n + m) flops."""
        first, second = self._terms()
        return first.trace() + second.trace()

    def diagonal(self) -> Array:
        """The diagonal, shaped like V. 3 m n flops."""
        first, second = self._terms()
        return first.diagonal() + second.diagonal()

    def to_dense(self) -> Array:
        """The matrix (..., n m, n m) that acts on vec(V), the columns of V stacked. 3 m² n² flops."""
        first, second = self._terms()
        return first.to_dense() + second.to_dense()

    def _refined(self, V: Array) -> Array:
        inverse = self.inverse()
        U = inverse.apply(V)
        for _ in range(REFINEMENTS):
            U = U + inverse.apply(V - self.apply(U))
        return U

    def _smith(self, V: Array) -> Array:
        """U = Σ_k (-1)^k P^k W Q^k with P = B⁻¹D, Q = C A⁻¹ and W = B⁻¹ V A⁻¹, 2^j terms after j squarings.

        P and Q grow and shrink together: only their product matters, so that each step gives them equal norms.
        """
        b = self._backend()
        xp, sign = b.xp, -1.0
        W = spd.solve(self.A, spd.solve(self.B, V).mT).mT
        size = xp.sum(xp.abs(W), axis=(-2, -1), keepdims=True)
        size = xp.where(size > 0, size, 1.0)  # what is small beside U must not underflow
        U = W / size
        P, Q = spd.solve(self.B, self.D), spd.solve(self.A, self.C.mT).mT
        for _ in range(SQUARINGS):
            p, q = (xp.linalg.matrix_norm(M, keepdims=True) for M in (P, Q))
            lost = (p == 0) | (q == 0)
            balance = xp.where(lost, 1.0, xp.sqrt(q) / xp.sqrt(xp.where(lost, 1.0, p)))
            growing = p * q > 1 / b.eps  # far from convergence: NaN before it overflows
            P, Q = xp.where(growing, _backends.NAN, xp.where(lost, 0.0, balance * P)), xp.where(lost, 0.0, Q / balance)
            step = sign * (P @ U @ Q)
            U, P, Q, sign = U + step, P @ P, Q @ Q, 1.0
            if _backends.may_read(step) and not bool(xp.any(xp.abs(step) > 0.1 * b.eps * xp.abs(U))):
                break
        U = size * U
        return xp.where(self._converged(U, V), U, _backends.NAN)

    def _converged(self, U: Array, V: Array) -> Array:
        """Whether the backward error of U (..., 1, 1) is below √eps: what says whether the series has converged."""
        b = self._backend()

        def norm(M: Array) -> Array:
            return b.xp.linalg.matrix_norm(M, keepdims=True)

        size = (norm(self.A) * norm(self.B) + norm(self.C) * norm(self.D)) * norm(U) + norm(V)
        return b.xp.isfinite(size) & (norm(V - self.apply(U)) <= b.eps**0.5 * size)

    def _terms(self) -> tuple[Kronecker, Kronecker]:
        return Kronecker(self.A, self.B), Kronecker(self.C, self.D)

    def _operand(self, V: Array) -> Array:
        X = _backends.operand(self._backend(), "V", V, self.shape)
        _checks.check_batches(**self._batches(), V=V.shape[:-2])
        return X

    def _batches(self) -> dict[str, tuple[int, ...]]:
        return {name: getattr(self, name).shape[:-2] for name in "ABCD"}

    def _backend(self) -> _backends.Backend:
        return _backends.resolve(A=self.A, B=self.B, C=self.C, D=self.D)
