"""Modules that use the weights of the `nn.Linear`s in them by `functional.linear`, without calling them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ._blocks import Block
from ._linear import Linear


def inside(module: nn.Module) -> Sequence[nn.Module]:
    return [child for child in module.children() if isinstance(child, nn.Linear)]


def linears(name: str, module: nn.Module) -> Iterator[Block]:
    """One block for each of them."""
    for key, child in module.named_children():
        if isinstance(child, nn.Linear) and child.weight.requires_grad:
            bias = child.bias if child.bias is not None and child.bias.requires_grad else None
            yield Linear(f"{name}.{key}".lstrip("."), child.weight, bias)


def forward(module: nn.Module, see: Callable[[str, Tensor, Tensor, None], None], *args: Any, **kwargs: Any) -> Any:
    """The module's own forward pass, and what it gives to `functional.linear`."""
    with _Linears({id(child.weight): key for key, child in module.named_children() if hasattr(child, "weight")}, see):
        return type(module).forward(module, *args, **kwargs)


class _Linears(TorchFunctionMode):
    def __init__(self, names: dict[int, str], see: Callable[[str, Tensor, Tensor, None], None]) -> None:
        self.names, self.see = names, see

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        s = f(*args, **(kwargs or {}))
        if f is functional.linear and id(args[1]) in self.names:
            self.see(self.names[id(args[1])], args[0], s, None)
        return s
