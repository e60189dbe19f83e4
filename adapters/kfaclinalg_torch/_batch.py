"""The examples of a mini-batch, its subsets and its pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ._masks import counting


class Batch:
    """`inputs` and `targets`, the examples along the first dimension of each tensor in them.

    The inputs are what the model takes: a tensor, a tuple or list of arguments (a `DataLoader` makes lists of tuples)
    or a dictionary of them by name. A subset holds only which `examples` it consists of, so that no more than a chunk
    of them is ever copied. `mask` says which positions count.
    """

    fewest = 1  # examples

    def __init__(
        self, inputs: Any, targets: Tensor, mask: Tensor | None = None, examples: Any = None, place: int = 0
    ) -> None:
        self.inputs, self.targets, self.mask = inputs, targets, mask
        self.examples = examples  # None: all
        self.place = place  # among the chunks of a batch
        tensors = [*_tensors("inputs", tree_leaves(inputs)), *_tensors("targets", [targets])]
        tensors += [] if mask is None else _tensors("mask", [mask])
        sizes = [x.shape[0] for x in tensors]
        if len(set(sizes)) > 1 or sizes[0] < self.fewest:
            raise ValueError(f"inputs and targets have {sizes} examples, expected the same number > {self.fewest - 1}")

    def __len__(self) -> int:
        return int((self.targets if self.examples is None else self.examples).shape[0])

    @property
    def counted(self) -> int:
        """The examples of which any position counts."""
        if self.mask is None:
            return len(self)
        mask = self.mask if self.examples is None else self.mask[self.examples]
        return int(counting(mask).sum())

    def call(self, model: nn.Module) -> Any:
        """What the model returns."""
        if isinstance(self.inputs, dict):
            return model(**self.inputs)
        return model(*self.inputs) if isinstance(self.inputs, tuple | list) else model(self.inputs)

    def subset(self, fraction: float, generator: torch.Generator) -> Batch:
        """A random fraction of the examples, one at least."""
        size = max(1, round(fraction * len(self)))
        if size == len(self):
            return self
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        return Batch(self.inputs, self.targets, self.mask, order[:size].to(self.targets.device))

    def chunks(self, size: int | None) -> Iterator[tuple[float, Batch]]:
        """The batch in pieces of at most `size` examples, each with its share of the whole."""
        size, whole = size or max(len(self), 1), self.counted
        for place, start in enumerate(range(0, len(self), size)):
            part = slice(start, start + size)
            examples: Any = part if self.examples is None else self.examples[part]
            mask = None if self.mask is None else self.mask[examples]
            piece = Batch(
                tree_map(lambda x, at=examples: x[at], self.inputs), self.targets[examples], mask, place=place
            )
            yield piece.counted / max(whole, 1), piece


@contextmanager
def taking(inputs: Any) -> Iterator[None]:
    """A ValueError names the shapes of what a model fails on."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError | NotImplementedError) or "memory" in str(error):
            raise
        shapes = [tuple(x.shape) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        raise ValueError(f"the model does not take inputs of shapes {shapes}: {error}") from error


def _tensors(name: str, found: list[Any]) -> list[Tensor]:
    """A ValueError says which of them is no tensor with examples."""
    kind = "a tensor, a tuple or a dictionary of tensors" if name == "inputs" else "a tensor"
    if not found:
        raise ValueError(f"{name} hold nothing, expected {kind}, the batch first")
    for x in found:
        if not isinstance(x, Tensor) or not x.ndim:
            came = "a tensor without dimensions" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"{name} hold {came}, expected {kind}, the batch first")
    return found


def check_again(name: str, loader: Any, why: str) -> None:
    """A TypeError where a loader can be gone through but once."""
    if iter(loader) is loader:
        raise TypeError(f"{name} is a {type(loader).__name__}, of one pass, and {why}: give a list")


def check_loader(name: str, loader: Any) -> None:
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"{name} is a {type(loader).__name__}, expected a loader of batches, or one batch")


def is_pair(x: Any) -> bool:
    return isinstance(x, tuple | list) and len(x) == 2 and isinstance(x[1], Tensor)
