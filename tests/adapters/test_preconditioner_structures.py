"""The other structures, exact damping, low rank and long sides against dense matrices."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from backends import TORCH
from dense_layers import (
    CONVOLUTIONS,
    DAMPING,
    EPS,
    OPERATIONS,
    Case,
    Seen,
    both_sharings,
    by_group,
    case,
    dense_ggn,
    effective,
    exact,
    factored,
    gradient,
    judge_step,
    leaves,
    moments,
    tied_weights,
    vec,
)
from layer_rows import N
from matrices import judge
from torch import nn

from kfaclinalg import Diagonal, Factors, LayerFactors, Link, block_tridiagonal_inverse

pytestmark = pytest.mark.usefixtures("double")


# -- other structures --


def curvature_of(examples: list[Seen], sharing: str) -> dict[str, np.ndarray]:
    """(1/N) Σ of the products of each example's gradients ∇W: Σ g aᵀ over its positions, or ĝ āᵀ if reduced."""
    found = {}
    for name in examples[0].a:
        total = 0.0
        for example in examples:
            a, g = example.a[name], example.g[name]
            if sharing == "reduce":
                a, g = a.mean(0, keepdim=True), g.sum(1, keepdim=True)
            J = torch.einsum("rgi,drgj->dgij", a, g).flatten(2)  # vec(g aᵀ)
            total = total + torch.einsum("dgi,de,egj->gij", J, example.F, J).numpy() / len(examples)
        found[name] = total
    return found


class Eigen(NamedTuple):
    """Q = Q_A ⊗ Q_G, the products of eigenvalues, and how much Q magnifies rounding: 1 / relative gap of both sides."""

    Q: np.ndarray
    products: np.ndarray
    magnified: float

    @staticmethod
    def of(A: np.ndarray, G: np.ndarray) -> "Eigen":
        (a, Q_A), (g, Q_G) = np.linalg.eigh(A), np.linalg.eigh(G)
        gaps = [np.diff(w, prepend=0.0)[w > 1e-12 * w.max()].min() / w.max() for w in (a, g)]
        return Eigen(np.kron(Q_A, Q_G), np.kron(a, g), sum(1 / gap for gap in gaps))

    def squares(self, F: np.ndarray) -> np.ndarray:
        return np.einsum("ik,ij,jk->k", self.Q, F, self.Q)

    def judge(self, operation: str, U: np.ndarray, S: np.ndarray, V: np.ndarray) -> None:
        """U is Q diag(S + damping)⁻¹ Qᵀ V, to rounding that Q magnifies."""
        expected = self.Q @ ((self.Q.T @ vec(V)) / (S + DAMPING))
        error = np.linalg.norm(vec(U) - expected)
        condition = 1 + S.max() / DAMPING
        unit = OPERATIONS * EPS * self.magnified * condition * np.linalg.norm(vec(V)) / DAMPING
        judge(TORCH, operation, error, 10 * unit)


EIGEN = [
    "Linear",
    "Linear, 3-D",
    "Linear, frames",
    "Conv2d, stride",
    "Conv2d, groups",
    "Conv2d, frames",
    "ConvTranspose2d",
    "used three times",
    "used on two lengths",
    "MultiheadAttention, cross",
]


@pytest.mark.parametrize("row", EIGEN)
@both_sharings
@pytest.mark.parametrize(("estimator", "decay"), [("exact", 0.0), ("empirical", 0.95)])
def test_eigen(row, sharing, decay, estimator):
    """S = decay * the products of eigenvalues + (1 - decay) * the mean of the squared gradients of the examples."""
    one = case(row)
    one.run(estimator, structure="eigen", decay=decay, weight_sharing=sharing)
    examples = one.seen(estimator)
    F, V = curvature_of(examples, sharing), one.gradients(examples[0].a)
    for name, (A, G) in moments(examples, sharing).items():
        if sharing == "reduce" and name.endswith("k_proj"):
            continue  # the sum over the keys is zero: nothing but rounding
        for group, U in enumerate(gradient(one.model, name)):
            basis = Eigen.of(A[group], G[group])
            S = decay * basis.products + (1 - decay) * basis.squares(F[name][group])
            basis.judge(f"eigen, {sharing}", U, S, V[name][group])


@pytest.mark.parametrize("row", ["Linear, 3-D", "Conv2d, groups"])
def test_the_squares_of_eigen_are_the_diagonal_of_the_dense_fisher(row):
    one = case(row)
    one.run(structure="eigen", decay=0.0)
    F, found = dense_ggn(one.twin, one.args, one.likelihood), moments(one.seen())
    for name, V in one.gradients(found).items():
        for A, G, block, U, v in zip(*found[name], F[name], gradient(one.model, name), V, strict=True):
            basis = Eigen.of(A, G)
            basis.judge("eigen, dense Fisher", U, basis.squares(block), v)


@pytest.mark.parametrize("period", [1, 2])
def test_the_squares_of_eigen_follow_the_basis(period):
    """In a new basis S is the diagonal there of what it was; without a refresh the basis stays."""
    one = Case(nn.Linear(4, 3), (torch.randn(8, 4),), "bernoulli")
    preconditioner = one.run(structure="eigen", decay=0.5, inverse_period=period)
    A, G = (M[0] for M in moments(one.seen())[""])
    basis = Eigen.of(A, G)
    S = 0.5 * basis.products + 0.5 * basis.squares(curvature_of(one.seen(), "expand")[""][0])
    one.args = (torch.randn(8, 4),)
    one.step(preconditioner)
    if period == 1:
        dense = basis.Q @ np.diag(S) @ basis.Q.T
        basis = Eigen.of(*(0.5 * old + 0.5 * new[0] for old, new in zip((A, G), moments(one.seen())[""], strict=True)))
        S = basis.squares(dense)
    S = 0.5 * S + 0.5 * basis.squares(curvature_of(one.seen(), "expand")[""][0])
    basis.judge("eigen, two steps", gradient(one.model, "")[0], S, one.gradients([""])[""][0])


@pytest.mark.parametrize("options", [{"exact_damping": True}, {"structure": "eigen"}])
@pytest.mark.parametrize(
    "row", ["Linear", "Conv2d, groups", "LayerNorm", "Embedding", "two Linear tied", "Embedding tied to the head"]
)
def test_exact_damping(row, options):
    """(A ⊗ G + damping I)⁻¹; factored where a side is a diagonal. The eigen structure has it without squares."""
    one = case(row)
    one.run(**options)
    found = effective(one.twin, moments(one.seen()))
    linear = {name for name, m in one.model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
    inverses = by_group(exact, found)
    for name in found:
        if "structure" in options and name in linear and "tied" not in row:
            del inverses[name]
        if name == "embedding" or (name == "head" and "Embedding tied" in row):
            inverses |= by_group(factored, {name: found[name]})
    if "structure" in options and "tied" in row:
        inverses = {name: K for name, K in inverses.items() if name in ("one", "head") and name in shared(one.model)}
    one.judge("step, exact damping", inverses)


def shared(model: nn.Module) -> set[str]:
    return {name for name, m in leaves(model).items() if id(getattr(m, "weight", m)) in tied_weights(model)}


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_block_tridiagonal(estimator):
    """Against the core's inverse of factors and links put together by hand."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False), nn.Tanh(), nn.Linear(2, 3))
    one = Case(model, (torch.randn(6, 3),))
    preconditioner = one.run(estimator, structure="block-tridiagonal")
    examples = one.seen(estimator)
    found, names = moments(examples), list(preconditioner.layers)
    links = []
    for i, j in pairwise(names):
        A = sum(torch.outer(e.a[i][0, 0], e.a[j][0, 0]) for e in examples) / len(examples)
        G = sum(e.g[i][:, 0, 0].T @ e.F @ e.g[j][:, 0, 0] for e in examples) / len(examples)
        links.append(Link(A, G))
    layers = [LayerFactors(*(torch.from_numpy(M[0]) for M in found[name])) for name in names]
    inverse = block_tridiagonal_inverse(Factors(tuple(layers), tuple(links)), DAMPING**0.5)
    V = one.gradients(names)
    U, v = (
        np.concatenate([vec(side[name][0]) for name in names]) for side in ({n: gradient(model, n) for n in names}, V)
    )
    K = inverse.to_dense().numpy()
    judge_step("step, block-tridiagonal", U[None, :, None], [K], v[None, :, None])
    assert np.abs(K[:16, 16:24]).max() > 0.01 * np.abs(K).max()  # the links matter


@pytest.mark.parametrize("rank", [3, 50])
def test_low_rank(rank):
    """A of rank 3, from so many examples; G has no more than 3 units, which are kept whole."""
    model = nn.Sequential(nn.Linear(12, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    one = Case(model, (torch.randn(3, 12),), "gaussian")
    one.run(rank=rank)
    one.judge("step, low rank", by_group(factored, moments(one.seen())))


def test_low_rank_truncates():
    """rank_k(A) and rank_k(G - diag G) + diag G, by eigenvectors, of a spectrum with a gap there."""
    x = torch.randn(40, 8) * torch.tensor([9.0, 7.0] + [1e-2] * 6)
    one = Case(nn.Linear(8, 2, bias=False), (x,), "gaussian")
    one.run(rank=2)
    A, G = (M[0] for M in moments(one.seen())[""])
    w, Q = np.linalg.eigh(A)
    truncated = (Q[:, -2:] * w[-2:]) @ Q[:, -2:].T
    one.judge("step, low rank", {"": [factored(truncated, G)]})
    V = one.gradients([""])[""][0]
    assert np.linalg.norm((factored(truncated, G) - factored(A, G)) @ vec(V)) > 1e-9 * np.linalg.norm(V)


# -- a side that is too long --


@pytest.mark.parametrize("options", [{}, {"exact_damping": True}, {"structure": "eigen"}, {"rank": 2}])
def test_a_long_side_keeps_its_diagonal(options):
    n = 8200
    one = Case(nn.Linear(n, 2, bias=False), (torch.randn(N, n),))
    A = one.run(**options).layers[""].A
    assert isinstance(A, Diagonal)
    a = (one.args[0] ** 2).sum(0).numpy() / N
    judge(TORCH, "factors, diagonal", np.linalg.norm(A.d.numpy() - a), 10 * OPERATIONS * EPS * np.linalg.norm(a))
    G = sum(example.F for example in one.seen()).numpy() / N  # g is the gradient at the outputs
    pi = np.sqrt(a.mean() / (np.trace(G) / 2))
    damped = G + DAMPING**0.5 / pi * np.eye(2)
    V = one.gradients([""])[""][0]
    expected = np.linalg.inv(damped) @ V / (a + pi * DAMPING**0.5)
    error, condition = np.linalg.norm(gradient(one.model, "")[0] - expected), np.linalg.cond(damped)
    judge(TORCH, "step, diagonal", error, 10 * 2 * condition * EPS * np.linalg.norm(expected))
