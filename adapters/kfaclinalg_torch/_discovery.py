"""Which parameters of a model belong to a layer that can be preconditioned, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfaclinalg import LayerFactors

from . import _attention as attention
from ._convolution import Convolution
from ._modules import Block, Dense, Embedding, Like, Linear
from ._normalisation import Scale
from ._tied import combined

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SCALES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KINDS = (nn.Linear, nn.Embedding, nn.MultiheadAttention, *CONVOLUTIONS, *SCALES)
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Layer:
    """What shares one inverse: a block, or several whose weights are the same tensor (tied)."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.blocks[0].parameters

    @property
    def dense(self) -> Dense | None:
        """Its one block, if that is a dense one."""
        (block, *tied) = self.blocks
        return block if isinstance(block, Dense) and not tied else None

    def matrix(self, like: Like) -> Tensor:
        return self.blocks[0].matrix(like)

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.blocks[0].parts(like, W)

    def factors(self, averages: Mapping[str, LayerFactors]) -> LayerFactors | None:
        """Those of the shared weight, in the orientation of the first block; None before there are any."""
        if any(block.name not in averages for block in self.blocks):
            return None
        first, *rest = self.blocks
        others = [averages[block.name] for block in rest]
        turned = [isinstance(block, Embedding) and not isinstance(first, Embedding) for block in rest]
        return combined(
            [averages[first.name]]
            + [LayerFactors(M.G, M.A) if turn else M for M, turn in zip(others, turned, strict=True)]
        )


@dataclass(frozen=True, eq=False)
class Found:
    """`sites` are the blocks that each module's own forward pass shows."""

    layers: tuple[Layer, ...]
    sites: dict[nn.Module, tuple[Block, ...]]
    skipped: dict[str, str]


def found(model: nn.Module, skip: Sequence[str]) -> Found:
    """The layers of a model, in the order of its modules; `skip` names modules to leave alone.

    Raises:
        ValueError: there is nothing to precondition, or no module of a name in `skip`.
    """
    modules = dict(model.named_modules())
    if isinstance(skip, str) or not all(isinstance(name, str) for name in skip):
        raise ValueError(f"skip is {skip!r}, expected a sequence of names")
    if unknown := sorted(set(skip) - modules.keys()):
        raise ValueError(f"skip names {', '.join(map(repr, unknown))}, expected names of modules: {', '.join(modules)}")
    left: dict[Any, str] = {}
    sites: dict[nn.Module, tuple[Block, ...]] = {}
    inside = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    for name, module in modules.items():
        if id(module) in inside:
            continue  # its attention calls it, not its own forward
        own = dict(module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention)))
        trained = {key: p for key, p in own.items() if p.requires_grad}
        if trained:
            reason = "skipped by name" if name in skip else _reason(module, trained)
            if reason:
                left |= dict.fromkeys(trained.values(), reason)
            else:
                sites[module] = tuple(_blocks(name, module))
    layers = tuple(_tied(sites, left))
    names = {p: name for name, p in model.named_parameters()}
    skipped = {names[p]: reason for p, reason in left.items()}
    if not layers:
        raise ValueError(f"the model has no parameters to precondition: {skipped or 'none is trained'}")
    return Found(layers, sites, skipped)


Owner = tuple[dict[str, Any], str, Any, str]  # who holds what under which key, and its name in the model


def owners(model: nn.Module, layers: Sequence[Layer]) -> list[Owner]:
    """Who holds each parameter of the layers, and each module on the way to it."""
    known = {id(p) for layer in layers for block in layer.blocks for p in block.parameters}
    held: list[Owner] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        held += [(module._parameters, k, p, prefix + k) for k, p in module._parameters.items() if id(p) in known]
        held += [(module._modules, k, m, prefix + k) for k, m in module._modules.items() if _holds(m, known)]
    return held


def check_owners(held: Sequence[Owner]) -> None:
    """A ValueError names what was replaced."""
    for owner, key, thing, name in held:
        if owner.get(key) is not thing:
            raise ValueError(f"{name!r} was replaced since the preconditioner was made: remove() it and make a new one")


def _holds(module: nn.Module | None, known: set[int]) -> bool:
    return module is not None and any(id(p) in known for p in module.parameters())


def _reason(module: nn.Module, trained: dict[str, Tensor]) -> str:
    """Why the module's parameters cannot be preconditioned; empty where they can."""
    kind = type(module).__name__
    if not isinstance(module, KINDS):
        return f"no Kronecker factorisation of a {kind} is known"
    if any(is_lazy(p) for p in trained.values()):
        return f"this {kind} is not initialised: run the model once before"
    if any(p.dtype not in REAL for p in trained.values()):
        return f"this {kind} has parameters that are not real floating-point numbers"
    if isinstance(module, nn.MultiheadAttention):
        return attention.reason(module)
    if "weight" not in trained:
        return f"the weight of this {kind} is frozen, or made of other parameters"
    sparse = isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq)
    return "an Embedding with sparse gradients, or scaled by frequency" if sparse else ""


def _blocks(name: str, module: nn.Module) -> Iterator[Block]:
    if isinstance(module, nn.MultiheadAttention):
        yield from attention.projections(name, module)
        return
    weight: Any = module.weight
    bias = getattr(module, "bias", None)
    bias = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None
    if isinstance(module, nn.Linear):
        yield Linear(name, weight, bias)
    elif isinstance(module, nn.Embedding):
        yield Embedding(name, weight, module.padding_idx)
    elif isinstance(module, SCALES):
        yield Scale(name, module, weight, bias)
    else:
        convolution: Any = module
        yield Convolution(name, convolution, weight, bias)


def _tied(sites: dict[nn.Module, tuple[Block, ...]], left: dict[Any, str]) -> Iterator[Layer]:
    """One layer for each block, save that the users of a tied parameter share theirs, the linear ones first."""
    users = _users(sites)
    tied = {key for key, blocks in users.items() if len(blocks) > 1}
    for module, own in sites.items():
        sites[module] = tuple(part for block in own for part in _split(block, tied))
    for blocks in _users(sites).values():
        simple = all(isinstance(block, Linear | Embedding) for block in blocks)
        known = [left[p] for block in blocks for p in block.parameters if p in left]
        if known or (len(blocks) > 1 and not simple):
            reason = f"tied between {', '.join(block.name for block in blocks)}"
            reason += f", of which one is left alone: {known[0]}" if known else ", not all Linear or Embedding"
            left |= {p: reason for block in blocks for p in block.parameters if p not in left}
    for module, own in sites.items():
        sites[module] = tuple(block for block in own if not any(p in left for p in block.parameters))
    seen: set[Any] = set()
    for blocks in _users(sites).values():
        if not any(block in seen for block in blocks):
            ordered = sorted(blocks, key=lambda block: isinstance(block, Embedding))
            seen |= set(blocks)
            yield Layer(ordered[0].name, tuple(ordered))


def _users(sites: dict[nn.Module, tuple[Block, ...]]) -> dict[Any, list[Block]]:
    """The blocks of each parameter, or part of a packed one."""
    users: dict[Any, list[Block]] = {}
    for block in (block for blocks in sites.values() for block in blocks):
        for p in block.parameters:
            users.setdefault((p, str(getattr(block, "part", slice(None)))), []).append(block)
    return users


def _split(block: Block, tied: set[Any]) -> list[Block]:
    """A linear layer with a tied parameter becomes two blocks, one of the weight and one of the bias."""
    if not isinstance(block, Linear) or not any((p, str(block.part)) in tied for p in block.parameters):
        return [block]
    if block.bias is None:
        return [block]
    return [replace(block, bias=None), replace(block, name=f"{block.name}.bias", weight=None)]
