"""What a pass through a module says about its weights, one block of them at a time.

A block shows its parameters as a matrix W (..., m, n), its inputs as rows a (n,) and the gradients at its outputs as
rows g (m,), for N examples of R positions each. Leading dimensions of W are independent of each other: the groups of a
convolution, the channels of a normalisation. Second moments are sums over the rows; a vector stands for a diagonal. A
mask (N, R) says which positions count: of the others neither a nor g is a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kfaclinalg

from ._panels import add_moment

Like = Callable[[Tensor], Tensor]  #: a parameter to a tensor shaped like it: itself, or its gradient
Mask = Tensor | None
LARGEST = 8192  # a side longer than this keeps the diagonal of its moment


def outline(parameter: Any) -> Tensor:
    """A tensor like a parameter; of a sharded one its shape, dtype and device, and nothing to read."""
    if hasattr(parameter, "device_mesh"):
        return parameter.to_local().new_zeros(()).expand(parameter.shape)
    return parameter.detach()


class Block(ABC):
    """`x` is what came into the module, `g` the gradient at its outputs: of N examples, in the factors' dtype."""

    name: str
    batched_ndim = 1  #: inputs of fewer dimensions are those of one example
    channels_last = True  #: whether the channels are the last dimension of the outputs, or that after the examples
    turned = False  #: whether W is the transpose of the weight
    scattered = False  #: whether the rows come in no order of the examples, so that each stands for itself

    def seen(self, x: Tensor, *others: Any) -> Tensor:
        """What is kept of the inputs."""
        return x

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """(N, ...): the shape of the examples and positions of what was seen."""
        return tuple(x.shape[:-1])

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
        W = self.matrix(outline)
        *batch, m, n = W.shape
        A, G = (W.new_zeros(d) if d > LARGEST and not batch else W.new_zeros(*batch, d, d) for d in (n, m))
        return A, G

    @abstractmethod
    def input_moment(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, int]:
        """Σ a aᵀ over all examples and positions, and the number of rows."""

    @abstractmethod
    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        """Σ g gᵀ over all examples and positions; g is zero where a position does not count."""

    def add_input_moment(self, total: Tensor, x: Tensor, N: int, mask: Mask = None) -> int:
        """`input_moment` into `total`, in its place and, of a matrix, on and above its diagonal; the number of rows."""
        A, rows = self.input_moment(x, N, mask)
        total.add_(A)
        return rows

    def add_output_moment(self, total: Tensor, x: Tensor, g: Tensor, N: int) -> None:
        """`output_moment` into `total`, in the same way."""
        total.add_(self.output_moment(x, g, N))

    def gradients(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        """∇W (N, ..., m, n) of each example, from what one use has shown; g is zero where a position does not count."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the gradient of one example is")


class Rows(Block):
    """A block whose weights act on rows, so that the reduce setting applies to it."""

    @abstractmethod
    def outputs(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        """g (N, R, ..., m)."""

    @abstractmethod
    def pooled_inputs(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, Any]:
        """Σ a over the positions of each example (N, ..., n), and how many they are: a number, or (N,)."""

    @abstractmethod
    def pooled_moment(self, a: Tensor) -> Tensor:
        """Σ a aᵀ of such rows, one an example."""


class Dense(Rows):
    """A block with a dense A, which can have an eigenbasis and neighbours."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """That of W."""

    @abstractmethod
    def inputs(self, x: Tensor, N: int) -> Tensor:
        """a (N, R, ..., n)."""

    def projected(self, x: Tensor, N: int, Q: Tensor) -> Tensor:
        """a Q (N, R, k) for Q (n, k), where W is one matrix."""
        return self.inputs(x, N) @ Q

    def input_moment(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, int]:
        a = self._rows(x, N, mask)
        return second_moment(a), len(a)

    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return second_moment(self.outputs(x, g, N).flatten(0, 1))

    def input_work(self, n: int) -> int:
        """Flops of Σ a aᵀ, a row: half of a product's."""
        return n * n

    def add_input_moment(self, total: Tensor, x: Tensor, N: int, mask: Mask = None) -> int:
        if type(self).input_moment is not Dense.input_moment:  # it has a moment of its own
            return super().add_input_moment(total, x, N, mask)
        a = self._rows(x, N, mask)
        add_second_moment(total, a)
        return len(a)

    def add_output_moment(self, total: Tensor, x: Tensor, g: Tensor, N: int) -> None:
        if type(self).output_moment is not Dense.output_moment:
            return super().add_output_moment(total, x, g, N)
        add_second_moment(total, self.outputs(x, g, N).flatten(0, 1))
        return None

    def _rows(self, x: Tensor, N: int, mask: Mask) -> Tensor:
        """a of all positions that count."""
        a = self.inputs(x, N).flatten(0, 1)
        return a if mask is None else a[mask.flatten()]

    def pooled_inputs(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, Any]:
        a = self.inputs(x, N)
        if mask is None:
            return a.sum(1), a.shape[1]
        mask = mask.reshape(N, -1)
        return (a * mask.reshape(*mask.shape, *[1] * (a.ndim - 2))).sum(1), mask.sum(1)

    def pooled_moment(self, a: Tensor) -> Tensor:
        return second_moment(a)

    def gradients(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return torch.einsum("nr...i,nr...j->n...ij", self.outputs(x, g, N), self.inputs(x, N))


def second_moment(x: Tensor) -> Tensor:
    """Σ x xᵀ over the rows of x (rows, ..., d): (..., d, d), exactly symmetric, or its diagonal where d is large."""
    if x.ndim == 2 and x.shape[1] > LARGEST:
        return x.square().sum(0)
    if not len(x):
        return x.new_zeros(*x.shape[1:], x.shape[-1])
    return kfaclinalg.second_moment(x.movedim(0, -2)).mul_(len(x))


def add_second_moment(total: Tensor, x: Tensor) -> None:
    """The same into `total`, in its place: on and above the diagonal."""
    if x.ndim == 2 and total.ndim == 1:
        total.add_(x.square().sum(0))
    elif x.ndim == 2:
        add_moment(total[None], x.mT[None])
    else:
        add_moment(total.flatten(0, -3), x.flatten(1, -2).permute(1, 2, 0))
