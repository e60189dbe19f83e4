"""What a pass through a module says about its weights, one block of them at a time.

A block shows its parameters as a matrix W (..., m, n), its inputs as rows a (n,) and the gradients at its outputs as
rows g (m,), for N examples of R positions each. Leading dimensions of W are independent of each other: the groups of a
convolution, the channels of a normalisation. Second moments are sums over the rows; a vector stands for a diagonal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

import kfaclinalg

Like = Callable[[Tensor], Tensor]  #: a parameter to a tensor shaped like it: itself, or its gradient
LARGEST = 8192  # a side longer than this keeps the diagonal of its moment


class Block(ABC):
    """`x` is what came into the module, `g` the gradient at its outputs: of N examples, in the factors' dtype."""

    name: str
    batched_ndim = 1  #: inputs of fewer dimensions are those of one example

    def seen(self, x: Tensor) -> Tensor:
        """What is kept of the inputs."""
        return x

    @property
    @abstractmethod
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight, and the bias if it has a trained one."""

    @abstractmethod
    def matrix(self, like: Like) -> Tensor:
        """W (..., m, n) of the tensors that `like` gives for the parameters."""

    @abstractmethod
    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(tensor of `like`, its part of W) for each parameter, the inverse of `matrix`."""

    def empty_moments(self) -> tuple[Tensor, Tensor]:
        """Those of no rows."""
        W = self.matrix(torch.detach)
        *batch, m, n = W.shape
        A, G = (W.new_zeros(d) if d > LARGEST and not batch else W.new_zeros(*batch, d, d) for d in (n, m))
        return A, G

    @abstractmethod
    def input_moment(self, x: Tensor, N: int) -> tuple[Tensor, int]:
        """Σ a aᵀ over all examples and positions, and the number of rows."""

    @abstractmethod
    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        """Σ g gᵀ over all examples and positions."""


class Rows(Block):
    """A block whose weights act on rows, so that the reduce setting applies to it."""

    @abstractmethod
    def outputs(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        """g (N, R, ..., m)."""

    @abstractmethod
    def pooled_inputs(self, x: Tensor, N: int) -> tuple[Tensor, int]:
        """Σ a over the positions of each example (N, ..., n), and how many they are."""

    @abstractmethod
    def pooled_moment(self, a: Tensor) -> Tensor:
        """Σ a aᵀ of such rows, one an example."""


class Dense(Rows):
    """A block with a dense A, which can have an eigenbasis."""

    @abstractmethod
    def inputs(self, x: Tensor, N: int) -> Tensor:
        """a (N, R, ..., n)."""

    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return second_moment(self.outputs(x, g, N).flatten(0, 1))

    def pooled_moment(self, a: Tensor) -> Tensor:
        return second_moment(a)


@dataclass(frozen=True, eq=False)
class Linear(Dense):
    """s = W a with W = [weight, bias], the last entry of a being 1; of the parameters only `part` of the rows."""

    name: str
    weight: Tensor | None
    bias: Tensor | None
    part: slice = field(default_factory=lambda: slice(None))
    batched_ndim = 2

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(p for p in (self.weight, self.bias) if p is not None)

    @property
    def whole(self) -> bool:
        return self.part == slice(None) and self.weight is not None

    def matrix(self, like: Like) -> Tensor:
        tensors = [like(p)[self.part] for p in self.parameters]
        columns = [t if t.ndim > 1 else t[:, None] for t in tensors]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        tensors = [like(p)[self.part] for p in self.parameters]
        return [(t, W[:, : t.shape[1]] if t.ndim > 1 else W[:, -1]) for t in tensors]

    def inputs(self, x: Tensor, N: int) -> Tensor:
        a = x.reshape(N, -1, x.shape[-1])
        if self.weight is None:
            return a.new_ones(*a.shape[:2], 1)
        return a if self.bias is None else functional.pad(a, (0, 1), value=1.0)

    def outputs(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return g.reshape(N, -1, g.shape[-1])

    def input_moment(self, x: Tensor, N: int) -> tuple[Tensor, int]:
        a = self.inputs(x, N).flatten(0, 1)
        return second_moment(a), len(a)

    def pooled_inputs(self, x: Tensor, N: int) -> tuple[Tensor, int]:
        a = self.inputs(x, N)
        return a.sum(1), a.shape[1]


@dataclass(frozen=True, eq=False)
class Embedding(Rows):
    """W = weightᵀ (m, n) on one-hot rows a; of their moment the diagonal is kept, in the expand setting all of it."""

    name: str
    weight: Tensor
    padding: int | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def matrix(self, like: Like) -> Tensor:
        return like(self.weight).mT

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(like(self.weight), W.mT)]

    def input_moment(self, x: Tensor, N: int) -> tuple[Tensor, int]:
        counts = self._counts(x, 1)[0]
        return counts, x.numel()

    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return second_moment(self.outputs(x, g, N).flatten(0, 1))

    def outputs(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        g = g if self.padding is None else g * (x != self.padding)[..., None]
        return g.reshape(N, -1, g.shape[-1])

    def empty_moments(self) -> tuple[Tensor, Tensor]:
        return self.weight.new_zeros(len(self.weight)), super().empty_moments()[1]

    def pooled_inputs(self, x: Tensor, N: int) -> tuple[Tensor, int]:
        return self._counts(x, N), x.numel() // N

    def pooled_moment(self, a: Tensor) -> Tensor:
        return a.square().sum(0)

    def _counts(self, x: Tensor, N: int) -> Tensor:
        """How often each index came in each example (N, n)."""
        V, x = self.weight.shape[0], x.reshape(N, -1)
        cells = (x + V * torch.arange(N, device=x.device)[:, None]).flatten()
        counts = torch.bincount(cells, minlength=N * V).reshape(N, V).double()  # exact, whatever the weights are
        if self.padding is not None:
            counts[:, self.padding] = 0
        return counts


def second_moment(x: Tensor) -> Tensor:
    """Σ x xᵀ over the rows of x (rows, ..., d): (..., d, d), exactly symmetric, or its diagonal where d is large."""
    if x.ndim == 2 and x.shape[1] > LARGEST:
        return x.square().sum(0)
    return kfaclinalg.second_moment(x.movedim(0, -2)) * len(x)
