"""The diagonal of the Fisher matrix, for parameters that no rule knows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._blocks import Block, Like, Mask


@dataclass(frozen=True, eq=False)
class Entries(Block):
    """A parameter that no rule knows, as the column W (entries, 1): A = 1, G is the diagonal of its Fisher matrix.

    Its gradient is not seen an example at a time. That of the sum of the losses of N examples, with targets sampled
    from the model itself, is a sum of independent terms with mean zero: the mean of its square is the sum of squares.
    """

    name: str
    parameter: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.parameter,)

    def matrix(self, like: Like) -> Tensor:
        return like(self.parameter).reshape(-1, 1)

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(like(self.parameter), W.reshape(self.parameter.shape))]

    def empty_moments(self) -> tuple[Tensor, Tensor]:
        return self.parameter.new_zeros(1, 1), self.parameter.new_zeros(self.parameter.numel())

    def input_moment(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, int]:
        return x.new_full((1, 1), N), N

    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return g.flatten().square()
