"""(Q_A ⊗ Q_B) diag(λ) (Q_A ⊗ Q_B)ᵀ: the curvature of a layer by its eigenvalues, of which any function costs O(m n)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import _backends, _checks, _gram
from ._backends import Array, Scalar
from ._sides import SideLike, as_given, batch_of, between, resolve_sides, side, transposed
from ._value import Value, as_scipy_on_matrices, rebuilt, value
from .diagonal import Diagonal
from .outer_product import OuterProduct

UNCERTAIN = 4  # eigenvalues below so many eps of the largest have no certain sign


@value
class KroneckerEigen(Value):
    """(Q_A ⊗ Q_B) diag(vec(eigenvalues)) (Q_A ⊗ Q_B)ᵀ, for orthogonal Q_A (..., n, n) and Q_B (..., m, m).

    The eigenvalues (..., m, n) are shaped like V: those of A ⊗ B by `Kronecker.eigh`, or EKFAC's, the second moments of
    the gradients along the eigenvectors (George et al. 2018). A shift, a power or a function of them takes no new
    factorisation. They are taken as they are given: where one is not positive `inverse`, `solve`, `logdet` and negative
    powers are NaN for that member of the batch. Instead of an array Q_A or Q_B may be a `Diagonal` of ones, the
    identity.

    Raises:
        TypeError, ValueError: shapes, dtypes, namespaces or devices do not fit.

    >>> import numpy as np
    >>> F = KroneckerEigen(np.eye(1), np.eye(2), np.asarray([[3.0], [7.0]]))
    >>> F.shifted(1.0).inverse() @ np.ones((2, 1))
    array([[0.25 ],
           [0.125]])
    """

    Q_A: SideLike
    Q_B: SideLike
    eigenvalues: Array
    as_scipy = as_scipy_on_matrices

    def __post_init__(self) -> None:
        b = resolve_sides(Q_A=self.Q_A, Q_B=self.Q_B)
        for name in ("Q_A", "Q_B"):
            Q = as_given(getattr(self, name))
            if not (isinstance(Q, Diagonal) or hasattr(Q, "dtype")):
                raise TypeError(f"{name} is a {_checks.class_of(Q)}, expected an array or a Diagonal of ones")
            object.__setattr__(self, name, Q)
        _backends.resolve(Q_A=side(self.Q_A).diagonal(), eigenvalues=self.eigenvalues)
        _backends.operand(b, "eigenvalues", self.eigenvalues, self.shape)
        _checks.check_batches(**self._batches())

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.Q_B.shape[-1], self.Q_A.shape[-1])

    def apply(self, V: Array | OuterProduct, /) -> Array:
        """Q_B [(Q_Bᵀ V Q_A) ∘ eigenvalues] Q_Aᵀ (..., m, n), as `@`. 4 m n (m + n) flops."""
        return self._on(V, lambda X: X * self.eigenvalues)

    __matmul__ = apply

    def map(self, f: Callable[[Array], Array], /) -> KroneckerEigen:
        """The same with f(eigenvalues), any function of the array (..., m, n). No flops but those of f.

        Raises:
            TypeError, ValueError: what f gives does not fit.
        """
        return KroneckerEigen(self.Q_A, self.Q_B, f(self.eigenvalues))

    def shifted(self, shift: Scalar) -> KroneckerEigen:
        """The same + shift I, for a number or a shift (...). m n flops."""
        b = self._backend()
        shift = _backends.scalar(b, "shift", shift, _checks.number, **self._batches())
        return self._with(self.eigenvalues + _backends.per_member(shift))

    def power(self, p: float) -> KroneckerEigen:
        """The power p: the square root for 1/2, what takes normal samples to N(0, P⁻¹) for -1/2. m n flops.

        NaN for a member with an eigenvalue below zero or, for p < 0, at zero.
        """
        p = _checks.number("p", p)
        proper = self.eigenvalues > 0 if p < 0 else self.eigenvalues >= 0
        return self._with(self._kept(proper) ** p)

    def inverse(self) -> KroneckerEigen:
        """The same with 1 / eigenvalues. m n flops."""
        return self._with(1 / self._positive())

    def solve(self, V: Array) -> Array:
        """`inverse() @ V`. 4 m n (m + n) flops."""
        return self._on(V, lambda X: X / self._positive())

    def logdet(self) -> Array:
        """Σ log eigenvalues (...). m n flops."""
        xp = self._backend().xp
        return xp.sum(xp.log(self._positive()), axis=(-2, -1))

    def trace(self) -> Array:
        """Σ eigenvalues (...). m n flops."""
        return self._backend().xp.sum(self.eigenvalues, axis=(-2, -1))

    @_backends.in_full_precision
    def diagonal(self) -> Array:
        """(Q_B ∘ Q_B) eigenvalues (Q_A ∘ Q_A)ᵀ: the diagonal, shaped like V. 2 m n (m + n) flops."""
        return between(_squared(self.Q_B), self.eigenvalues, _squared(self.Q_A))

    @_backends.in_full_precision
    def to_dense(self) -> Array:
        """The matrix (..., n m, n m) that acts on vec(V), the columns of V stacked. 2 m³ n³ flops."""
        Q = _backends.kron(side(self.Q_A).to_dense(), side(self.Q_B).to_dense())
        w = self._backend().xp.reshape(self.eigenvalues.mT, (*self.eigenvalues.shape[:-2], 1, Q.shape[-1]))
        return (Q * w) @ Q.mT

    def gram(self, U: Array | OuterProduct, V: Array | OuterProduct, /) -> Array:
        """The matrix (p, q) of vec(U_i)ᵀ (this) vec(V_j), for U (p, m, n) and V (q, m, n), or an `OuterProduct`.

        2 m n (p + q)(m + n) + 2 p q m n flops; to rotate gradients g aᵀ takes 2 (p + q)(m² + n²) of them. Batches of
        operators as in `Kronecker.gram`.
        """
        X, Y = _gram.operands(self, self._backend(), U, V, self._batches())
        return _gram.narrowed(_gram.in_basis(self.Q_A, self.Q_B, self.eigenvalues, X, Y), V)

    def _on(self, V: Array | OuterProduct, f: Callable[[Array], Array]) -> Array:
        """f between the rotations."""
        W: Any = V.to_dense() if isinstance(V, OuterProduct) else V
        X = _backends.operand(self._backend(), "V", W, self.shape)
        _checks.check_batches(**self._batches(), V=W.shape[:-2])
        inside = f(between(transposed(self.Q_B), X, transposed(self.Q_A)))
        return _backends.narrowed(between(self.Q_B, inside, self.Q_A), W.dtype)

    def _positive(self) -> Array:
        return self._kept(self.eigenvalues > 0)

    def _kept(self, proper: Array) -> Array:
        """The eigenvalues, NaN for a member where one is not finite and proper."""
        xp = self._backend().xp
        return _backends.kept(xp.all(proper & xp.isfinite(self.eigenvalues), axis=(-2, -1)), self.eigenvalues)

    def _with(self, eigenvalues: Array) -> KroneckerEigen:
        return rebuilt(KroneckerEigen, (self.Q_A, self.Q_B, eigenvalues))

    def _batches(self) -> dict[str, tuple[int, ...]]:
        sides = {name: batch_of(getattr(self, name)) for name in ("Q_A", "Q_B")}
        return sides | {"eigenvalues": tuple(self.eigenvalues.shape[:-2])}

    def _backend(self) -> _backends.Backend:
        return resolve_sides(Q_A=self.Q_A, Q_B=self.Q_B)


def eigendecompositions(pairs: Sequence[tuple[SideLike, SideLike]]) -> list[KroneckerEigen]:
    """A ⊗ B of each pair by its eigenvalues, those of equal shapes at once where that is cheaper."""
    spectra = _spectra([M for pair in pairs for M in pair])
    return [
        rebuilt(KroneckerEigen, (Q_A, Q_B, b[..., :, None] * a[..., None, :]))
        for (a, Q_A), (b, Q_B) in zip(spectra, spectra, strict=True)
    ]


def _spectra(sides: Sequence[SideLike]) -> Iterator[tuple[Array, SideLike]]:
    """Eigenvalues and eigenvectors of each."""
    dense = (M for M in sides if not isinstance(M, Diagonal))
    found = iter(_backends.each(_backends.eigh, [(side(M).to_dense(),) for M in dense]))
    for M in sides:
        if isinstance(M, Diagonal):
            yield M.d, Diagonal(_backends.namespace_of(M.d).ones_like(M.d))
        else:
            w, Q = next(found)
            yield _certain(w), Q


def _certain(w: Array) -> Array:
    """Eigenvalues (..., n), zero where they are known to rounding alone."""
    b = _backends.backend_of(w)
    if w.shape[-1] == 0:
        return w
    size = b.xp.abs(w)
    return b.xp.where(size <= UNCERTAIN * b.eps * b.xp.max(size, axis=-1, keepdims=True), 0.0, w)


def _squared(Q: SideLike) -> Any:
    return Diagonal(Q.d * Q.d) if isinstance(Q, Diagonal) else Q * Q  # type: ignore[operator]
