"""Modules that give weights to `functional.linear` themselves: those of the layers in them, or stacks of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ._blocks import Block
from ._linear import Linear

See = Callable[[str, Tensor, Tensor, None], None]


def inside(module: nn.Module) -> Sequence[nn.Module]:
    return [child for child in module.children() if isinstance(child, nn.Linear)]


def linears(name: str, module: nn.Module) -> Iterator[Block]:
    """One block for each layer in the module."""
    for key, child in module.named_children():
        if isinstance(child, nn.Linear) and child.weight.requires_grad:
            bias = child.bias if child.bias is not None and child.bias.requires_grad else None
            yield Linear(f"{name}.{key}".lstrip("."), child.weight, bias)


def is_stacked(module: nn.Module) -> bool:
    """Whether it may be a mixture of experts: all that it has itself are stacks of as many matrices, two or more."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.ndim == 3 and len(p) > 1 for p in own) and len({len(p) for p in own}) == 1


def experts(name: str, module: nn.Module) -> Iterator[Block]:
    """One block for each matrix of a stack; which rows it gets is up to a router."""
    for key, stack in module.named_parameters(recurse=False):
        if stack.requires_grad:
            for i in range(len(stack)):
                yield Linear(f"{name}.{key}.{i}".lstrip("."), stack, part=i, scattered=True)


def forward(module: nn.Module, see: See, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward pass, and what it gives to `functional.linear`."""
    weights = {child.weight: key for key, child in module.named_children() if isinstance(child, nn.Linear)}
    stacks = {p: key for key, p in module.named_parameters(recurse=False)}
    own: Any = type(module).forward
    if type(module).__module__.startswith("transformers."):  # whose decorator takes all experts at once
        own = getattr(own, "__wrapped__", own)
    with _Linears(weights | stacks, see):
        return own(module, *args, **kwargs)


class _Linears(TorchFunctionMode):
    def __init__(self, names: Mapping[Tensor, str], see: See) -> None:
        self.names, self.see = {id(weight): (weight, name) for weight, name in names.items()}, see

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        s = f(*args, **(kwargs or {}))
        if f is functional.linear:
            x, W = _given(*args, **(kwargs or {}))
            if id(W) in self.names:
                self.see(self.names[id(W)][1], x, s, None)
            elif id(W._base) in self.names:
                stack, name = self.names[id(W._base)]
                i, rest = divmod(W.storage_offset() - stack.storage_offset(), stack.stride(0))
                if W.shape == stack.shape[1:] and W.stride() == stack.stride()[1:] and not rest:
                    self.see(f"{name}.{i}", x, s, None)
        return s


def _given(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any]:
    """Of the arguments of `functional.linear`, by whatever way they came."""
    return input, weight
