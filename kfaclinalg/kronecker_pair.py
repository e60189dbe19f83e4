"""A ⊗ B + C ⊗ D and its inverse (Appendix B)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from . import _backends, _checks
from ._backends import Array
from ._value import Value, as_scipy_on_matrices, rebuilt, value
from .kronecker import Kronecker
from .kronecker_basis import KroneckerBasis

REFINEMENTS = 2
SQUARINGS = 48  # at most: what needs more than 1/(16 eps) terms of the Smith series is singular up to rounding
C = 10  # of the bound C n eps on the backward error of a solve


@value
class KroneckerPair(Value):
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
    as_scipy = as_scipy_on_matrices

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
        return _backends.narrowed(self._sum(lambda term: term.apply(X)), V.dtype)

    __matmul__ = apply

    def inverse(self, method: str = "eigh") -> KroneckerBasis:
        """(A ⊗ B + C ⊗ D)⁻¹ by one generalised symmetric eigenproblem a factor. About 11 (n³ + m³) flops.

        A and B are inverted: the backward error is of the order eps cond(A) cond(B), even where the pair is well
        conditioned. `solve` is refined.
        """
        _checks.check_choice("method", method, ("eigh",))
        # With A = L Lᵀ and L⁻¹ C L⁻ᵀ = E diag(s_A) Eᵀ, the matrix K_A = L⁻ᵀ E makes both of A, C diagonal:
        # K_Aᵀ A K_A = I and K_Aᵀ C K_A = diag(s_A). The same for B, D. Hence, with K = K_A ⊗ K_B,
        #     Kᵀ (A ⊗ B + C ⊗ D) K = I ⊗ I + diag(s_A) ⊗ diag(s_B).
        # The paper takes symmetric square roots for L; Cholesky factors lose far fewer digits in float32.
        (K_A, s_A), (K_B, s_B) = _backends.pencil(self.A, self.C), _backends.pencil(self.B, self.D)
        return rebuilt(KroneckerBasis, (K_A, K_B, _weights(s_A, s_B)))

    def solve(self, V: Array, method: str = "eigh") -> Array:
        """U with B U Aᵀ + D U Cᵀ = V, a generalised Stein equation.

        "eigh" is `inverse() @ V`, "smith" the squared Smith iteration, matrix products only; both are refined twice by
        the residual. Smith's needs ρ(A⁻¹C) ρ(B⁻¹D) < 1, by more than rounding, and is NaN otherwise, even where the
        pair is definite. About 11 (n³ + m³) + 16 m n (m + n) flops, or 2 (n³ + m³) + 6 m n (m + n) a squaring.
        """
        _checks.check_choice("method", method, ("eigh", "smith"))
        X = self._operand(V)
        P = rebuilt(KroneckerPair, map(_backends.symmetrised, (self.A, self.B, self.C, self.D)))  # for the residual
        return _backends.narrowed((P._smith if method == "smith" else P._refined)(X), V.dtype)

    def logdet(self) -> Array:
        """log det (A ⊗ B + C ⊗ D) = m log det A + n log det B + Σ log(1 + s_A s_B) (...). About 3 (n³ + m³) flops."""
        xp, (m, n) = self._backend().xp, self.shape
        s_A, s_B = _backends.pencil_values(self.A, self.C), _backends.pencil_values(self.B, self.D)
        weights = _weights(s_A, s_B)
        return m * _backends.logdet(self.A) + n * _backends.logdet(self.B) - xp.sum(xp.log(weights), axis=(-2, -1))

    def trace(self) -> Array:
        """tr(A) tr(B) + tr(C) tr(D) (...). 2 (n + m) flops."""
        return self._sum(Kronecker.trace)

    def diagonal(self) -> Array:
        """The diagonal, shaped like V. 3 m n flops."""
        return self._sum(Kronecker.diagonal)

    def to_dense(self) -> Array:
        """The matrix (..., n m, n m) that acts on vec(V), the columns of V stacked. 3 m² n² flops."""
        return self._sum(Kronecker.to_dense)

    def gram(self, U: Any, V: Any, /) -> Array:
        """The matrix (p, q) of vec(U_i)ᵀ (this) vec(V_j), as in `Kronecker.gram`, of twice as many flops."""
        return self._sum(lambda term: term.gram(U, V))

    def _refined(self, V: Array) -> Array:
        inverse = self.inverse()
        U = inverse.apply(V)
        for _ in range(REFINEMENTS):
            U = U + inverse.apply(V - self.apply(U))
        return U

    def _smith(self, V: Array) -> Array:
        """U = Σ_k (-1)^k P^k W Q^k with P = B⁻¹D, Q = C A⁻¹ and W = B⁻¹ V A⁻¹, refined by its residual.

        ‖P^N‖ ‖Q^N‖ < eps for N = 2^j shows that ρ(P) ρ(Q) < 1, and with it that the pair is definite; what has not come
        there, or leaves a residual above the bound of a solve, is NaN.
        """
        if 0 in self.shape:
            return V
        b = self._backend()
        powers, remainder = self._squarings()
        U = self._series(V, powers)
        for _ in range(REFINEMENTS):
            U = U + self._series(V - self.apply(U), powers)
        error, size = (b.xp.linalg.matrix_norm(M, keepdims=True) for M in (V - self.apply(U), U))
        bound = C * max(self.shape) * b.eps * (self._norm() * size + b.xp.linalg.matrix_norm(V, keepdims=True))
        return U * b.xp.where((remainder < b.eps) & (error <= bound), b.zeros() + 1, _backends.NAN)

    @_backends.in_full_precision
    def _squarings(self) -> tuple[list[tuple[Array, Array]], Array]:
        """P and Q, squared again and again, and the last ‖P‖ ‖Q‖ (..., 1, 1).

        They grow and shrink together: only their product matters, so that each step gives them equal sizes.
        """
        xp = (b := self._backend()).xp
        P, Q = _backends.solve(self.B, self.D), _backends.solve(self.A, self.C.mT).mT
        powers = []
        for _ in range(min(SQUARINGS, round(-math.log2(16 * b.eps)))):
            p, q = (xp.max(xp.abs(M), axis=(-2, -1), keepdims=True) for M in (P, Q))
            lost = (p == 0) | (q == 0)
            balance = xp.where(lost, 1.0, xp.sqrt(xp.where(lost, 1.0, q)) / xp.sqrt(xp.where(lost, 1.0, p)))
            P, Q = xp.where(lost, 0.0, balance * P), xp.where(lost, 0.0, Q / balance)
            powers.append((P, Q))
            remainder = xp.linalg.matrix_norm(P, keepdims=True) * xp.linalg.matrix_norm(Q, keepdims=True)
            P, Q = xp.where(remainder > 1 / b.eps, _backends.NAN, P @ P), Q @ Q  # NaN before it overflows
            if _backends.may_read(remainder) and not bool(xp.any(remainder >= b.eps)):
                break
        return powers, remainder

    @_backends.in_full_precision
    def _series(self, V: Array, powers: list[tuple[Array, Array]]) -> Array:
        xp = self._backend().xp
        W = _backends.solve(self.A, _backends.solve(self.B, V).mT).mT
        size = xp.max(xp.abs(W), axis=(-2, -1), keepdims=True)
        size = xp.where(size > 0, size, 1.0)  # what is small beside U must not underflow
        U, sign = W / size, -1.0
        for P, Q in powers:
            U, sign = U + sign * (P @ U @ Q), 1.0
        return size * U

    def _norm(self) -> Array:
        """‖A ⊗ B + C ⊗ D‖_F (..., 1, 1): the inner product of two Kronecker products is that of their factors'."""
        xp = self._backend().xp

        def inner(X: Array, Y: Array) -> Array:
            return xp.sum(X * Y, axis=(-2, -1), keepdims=True)

        A, B, C, D = self.A, self.B, self.C, self.D
        square = inner(A, A) * inner(B, B) + 2 * inner(A, C) * inner(B, D) + inner(C, C) * inner(D, D)
        return xp.sqrt(xp.where(square > 0, square, 0.0))

    def _sum(self, f: Callable[[Kronecker], Array]) -> Array:
        """f of A ⊗ B and f of C ⊗ D."""
        return f(Kronecker(self.A, self.B)) + f(Kronecker(self.C, self.D))

    def _operand(self, V: Array) -> Array:
        X = _backends.operand(self._backend(), "V", V, self.shape)
        _checks.check_batches(**self._batches(), V=V.shape[:-2])
        return X

    def _batches(self) -> dict[str, tuple[int, ...]]:
        return {name: getattr(self, name).shape[:-2] for name in "ABCD"}

    def _backend(self) -> _backends.Backend:
        return _backends.resolve(A=self.A, B=self.B, C=self.C, D=self.D)


@_backends.formula
def _weights(s_A: Array, s_B: Array) -> Array:
    """1 / (1 + s_A s_B) (..., m, n)."""
    return _backends.reciprocal(1 + s_B[..., :, None] * s_A[..., None, :])
