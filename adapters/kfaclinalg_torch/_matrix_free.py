"""The exact Fisher matrix of a model and a data set by products alone, for conjugate gradients and the like."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from ._attention import differentiable
from ._batch import Batch, check_again, check_loader, taking
from ._embedding import Unpadded
from ._estimators import slope_of_loss
from ._likelihoods import Likelihood, masked
from ._masks import check_count, mask_of
from ._network import Matrices, check_shapes
from ._passes import Data, Passes
from ._pushforward import pushforward
from ._settings import tensor_of
from ._spectra import strength


class FisherOperator:
    """F = E[Jᵀ F_R J], the Fisher matrix, which is the generalised Gauss-Newton matrix here, without forming it.

    What Hessian-free optimisation (Martens 2010) multiplies by, and what K-FAC approximates: `Curvature.inverse` is a
    preconditioner for it. A product is one forward-mode and one reverse-mode pass over the data. It acts on
    Vs as `Curvature.pack` gives them; the options are those of `fit_curvature`.

    Raises:
        TypeError, ValueError: a wrong option, an empty loader, or one of one pass; in a product other shapes.

    >>> model, x = nn.Linear(1, 1, bias=False), torch.full((4, 1), 2.0)
    >>> FisherOperator(model, "gaussian", [(x, x)]) @ (torch.ones(1, 1),)
    (tensor([[4.]]),)
    """

    def __init__(self, model: nn.Module, likelihood: str | Likelihood, loader: Data, **options: Any) -> None:
        self._passes, self.loader = Passes(model, likelihood, **options), loader
        check_loader("loader", loader)
        check_again("loader", loader, "a FisherOperator goes through it in each product")
        with self._passes.open(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fit_curvature")  # of layers that are none for a `Curvature`
            self._passes.settle(next(self._passes.pieces(loader)))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the Vs."""
        return [tuple(W.shape) for W in self._passes.trained.network.weights()]

    def apply(self, Vs: Sequence[Tensor], /) -> Matrices:
        """F Vs, as `@`."""
        check_shapes(Vs, self.shapes)
        network = self._passes.trained.network
        own = zip(Vs, network.weights(), strict=True)
        tangents = network.by_name(network.parameters(tuple(V.to(W) for V, W in own)))

        def product(likelihood: Any, f: Callable[..., Tensor], values: Any, outputs: Tensor, piece: Batch) -> Tensor:
            return likelihood.fisher_product(outputs, pushforward(f, values, tangents)[1])

        return self._pulled(product)

    __matmul__ = apply

    def gradient(self) -> Matrices:
        """∇h of the mean loss over the data, shaped like the weights."""

        def slope(likelihood: Any, f: Any, values: Any, outputs: Tensor, piece: Batch) -> Tensor:
            return slope_of_loss(likelihood, outputs, piece.targets)

        return self._pulled(slope)

    def as_scipy(self, damping: float = 0.0) -> Any:
        """F + damping I as a scipy.sparse.linalg.LinearOperator on the stacked vec(V_i), on the host."""
        from scipy.sparse.linalg import LinearOperator

        damping = float(strength("damping", damping))
        size, dtype = sum(torch.Size(shape).numel() for shape in self.shapes), self._passes.dtype

        def matvec(x: Any) -> Any:
            Vs = self.split(torch.as_tensor(x, dtype=dtype, device=self._passes.device).reshape(-1))
            return damping * x.reshape(-1) + self.stacked(self.apply(Vs)).cpu().numpy()

        numpys = torch.empty(0, dtype=dtype).numpy().dtype
        return LinearOperator((size, size), matvec=matvec, rmatvec=matvec, dtype=numpys)

    def stacked(self, Vs: Sequence[Tensor]) -> Tensor:
        """The columns of all matrices in one vector."""
        return torch.cat([V.mT.reshape(-1) for V in Vs])

    def split(self, x: Tensor) -> Matrices:
        """The inverse of `stacked`."""
        parts = x.split([torch.Size(shape).numel() for shape in self.shapes])
        return tuple(v.reshape(*s[:-2], s[-1], s[-2]).mT for v, s in zip(parts, self.shapes, strict=True))

    def _pulled(self, at_outputs: Callable[..., Tensor]) -> Matrices:
        """The mean over the examples of Jᵀ times what is given at the outputs."""
        passes, total, N = self._passes, None, 0
        network = passes.trained.network
        values = network.by_name(network.parameters(network.weights()))
        with passes.open(), differentiable():  # what a rule takes the place of, an LSTM, may have no forward mode
            for piece in passes.pieces(self.loader):
                f, masks = self._function(piece)
                pulled: Any = vjp(f, values)
                outputs, pull = pulled
                likelihood = masked(passes.likelihood, masks[-1], outputs)
                with torch.no_grad():
                    v = at_outputs(likelihood, f, values, outputs.detach(), piece)
                (slopes,) = pull(v)
                of = {p: slopes[name].detach().to(passes.dtype) for p, name in network.names.items()}
                new = network.matrices(of)
                total = new if total is None else tuple(map(torch.add, total, new))
                N += getattr(likelihood, "examples", len(piece))
        check_count(N)
        return tuple(V / N for V in total or ())

    def _function(self, piece: Batch) -> tuple[Callable[..., Tensor], list[Any]]:
        """The outputs of a piece of the data as a function of the parameters, and the masks of its passes."""
        passes, masks = self._passes, []

        def f(values: Any) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                masks.append(mask_of(passes.mask, args, kwargs))
                return functional_call(passes.model, values, args, kwargs)

            with Unpadded(), taking(piece.inputs):
                return tensor_of(passes.outputs, piece.call(call))  # type: ignore[arg-type]

        return f, masks
