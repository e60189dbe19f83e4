"""Operators on a network's matrices as the linear operators of curvlinops and GPyTorch, for their solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import BlockDiagonal, BlockTridiagonalInverse

from ._matrix_free import FisherOperator
from ._spectra import strength

Operator = FisherOperator | BlockDiagonal | BlockTridiagonalInverse


def gpytorch_operator(operator: Operator, damping: float = 0.0) -> Any:
    """operator + damping I as GPyTorch's `linear_operator.LinearOperator` on the stacked vec(V_i), for its `solve`.

    For a `FisherOperator`, or what a `Curvature` has as a preconditioner of it: `shifted(delta).inverse()`, or
    `inverse(gamma)` of any structure.

    Raises:
        ImportError: linear_operator is not installed.
        TypeError: another operator.
    """
    like, product = _columns(operator, damping)
    from linear_operator import LinearOperator

    class Columns(LinearOperator):
        def __init__(self, like: Tensor, product: Callable[[Tensor], Tensor]) -> None:
            super().__init__(like, product=product)
            self.like, self.product = like, product

        def _matmul(self, rhs: Tensor) -> Tensor:
            return self.product(rhs)

        def _size(self) -> torch.Size:
            return torch.Size([len(self.like)] * 2)

        def _transpose_nonbatch(self) -> Columns:
            return self

    return Columns(like, product)


def curvlinops_operator(operator: Operator, damping: float = 0.0) -> Any:
    """operator + damping I as a curvlinops operator on the stacked vec(V_i), for its inverses by CG, LSMR and Neumann.

    Raises:
        ImportError: curvlinops is not installed.
        TypeError: another operator.
    """
    like, product = _columns(operator, damping)
    from curvlinops._torch_base import PyTorchLinearOperator

    class Columns(PyTorchLinearOperator):
        SELF_ADJOINT, dtype, device = True, like.dtype, like.device

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [product(X[0])]

    return Columns([(len(like),)], [(len(like),)])


def _columns(operator: Any, damping: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A vector of the operator's size, dtype and device, and its product with columns (n, k)."""
    damping = strength("damping", damping)
    if isinstance(operator, FisherOperator):
        passes, shapes = operator._passes, operator.shapes
        like = operator.stacked(passes.trained.network.weights()).to(passes.dtype)
    elif isinstance(operator, BlockDiagonal | BlockTridiagonalInverse):
        blocks = operator.blocks if isinstance(operator, BlockDiagonal) else operator.Lambda
        diagonal: Any = [block.diagonal() for block in blocks]
        shapes, like = [tuple(d.shape) for d in diagonal], torch.cat([d.mT.reshape(-1) for d in diagonal])
    else:
        expected = "a FisherOperator, a BlockDiagonal or a BlockTridiagonalInverse"
        raise TypeError(f"operator is a {type(operator).__name__}, expected {expected}")
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def one(x: Tensor) -> Tensor:
        parts = zip(x.split(sizes), shapes, strict=True)
        Vs: Any = operator @ tuple(v.reshape(*s[:-2], s[-1], s[-2]).mT for v, s in parts)
        return damping * x + torch.cat([V.mT.reshape(-1) for V in Vs])

    def product(X: Tensor) -> Tensor:
        return one(X) if X.ndim == 1 else torch.stack([one(x) for x in X.unbind(-1)], -1)

    return like, product
