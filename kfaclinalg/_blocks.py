"""The operators of a network's layers: what each can do, and the matrices that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from . import _backends, _checks
from ._backends import Array


class Operator(Protocol):
    """What acts on the matrix (..., m, n) of one layer."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def __matmul__(self, V: Any, /) -> Array: ...
    def inverse(self) -> Any: ...
    def solve(self, V: Array) -> Array: ...
    def logdet(self) -> Array: ...
    def trace(self) -> Array: ...
    def diagonal(self) -> Array: ...
    def to_dense(self) -> Array: ...
    def gram(self, U: Any, V: Any, /) -> Array: ...


def check_operators(name: str, blocks: Sequence[Operator]) -> None:
    for i, block in enumerate(_checks.items(name, blocks)):
        if not hasattr(block, "__matmul__") or hasattr(block, "dtype"):
            raise TypeError(f"{name}[{i}] is a {_checks.class_of(block)}, expected an operator such as a Kronecker")


def matched(blocks: Sequence[Operator], Vs: Sequence[Array]) -> Iterator[tuple[str, Operator, Array]]:
    """Each operator with its matrix, and its name in a message."""
    held = _checks.items("Vs", Vs, len(blocks))
    return ((f"Vs[{i}]", block, V) for i, (block, V) in enumerate(zip(blocks, held, strict=True)))


def applied(block: Operator, V: Array) -> Array:
    """block @ V: torch.compile traces the method and not the operator."""
    return block.apply(V) if hasattr(block, "apply") else block @ V


def assembled(blocks: dict[tuple[int, int], Array]) -> Array:
    """The square matrix of blocks {(i, j): (..., r_i, r_j)}, those on the diagonal among them; the others are zero."""
    b = _backends.resolve(**{f"blocks[{i}, {j}]": block for (i, j), block in blocks.items()})
    batch = _checks.common_batch(*(block.shape[:-2] for block in blocks.values()))
    layers = sorted({i for i, _ in blocks})
    sizes = [blocks[i, i].shape[-1] for i in layers]

    def entry(i: int, j: int) -> Array:
        shape = (*batch, sizes[i], sizes[j])
        block = blocks.get((i, j))
        return b.zeros(*shape) if block is None else b.xp.broadcast_to(block, shape)

    rows = [b.xp.concat([entry(i, j) for j in layers], axis=-1) for i in layers]
    return b.xp.concat(rows, axis=-2)
