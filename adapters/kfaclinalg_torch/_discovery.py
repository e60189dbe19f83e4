"""Which parameters of a model belong to a layer with a Kronecker factorisation, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._blocks import Block
from ._embedding import Embedding
from ._entries import Entries
from ._layer import Layer
from ._linear import Linear
from ._table import Rule, rule_of

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FALLBACKS = ("diagonal", "none")
FROZEN, SKIPPED, SPARSE = "frozen", "skipped by name", "its gradient is sparse"


@dataclass(frozen=True, eq=False)
class Site:
    """A module, the rule that it is seen by, and the blocks that its forward pass shows."""

    name: str
    rule: Rule
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Found:
    """The layers of a model, those of the fallback last; by the names of the others' parameters the reason."""

    layers: tuple[Layer, ...]
    sites: dict[nn.Module, Site]
    fallback: dict[str, str]
    skipped: dict[str, str]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for layer in self.layers for block in layer.blocks)

    @property
    def entries(self) -> list[Entries]:
        return [block for block in self.blocks if isinstance(block, Entries)]

    def without(self, model: nn.Module, gone: Mapping[Layer, str], fallback: str) -> Found:
        """What remains where these layers turned out to be none, each for a reason."""
        left = {p: why for layer, why in gone.items() for block in layer.blocks for p in block.parameters}
        kept = tuple(layer for layer in self.layers if layer not in gone)
        entries, diagonal, skipped = _left(model, left, fallback)
        blocks = {block for layer in kept for block in layer.blocks}
        sites = {m: replace(s, blocks=tuple(b for b in s.blocks if b in blocks)) for m, s in self.sites.items()}
        return Found((*kept, *entries), sites, self.fallback | diagonal, self.skipped | skipped)

    def message(self, before: Found | None = None) -> str:
        """What is said once, of parameters that no rule treats, but for those that were said before."""
        said = before.fallback | before.skipped if before else {}
        alone = {name: why for name, why in self.skipped.items() if why != FROZEN and name not in said}
        diagonal = {name: why for name, why in self.fallback.items() if name not in said}
        parts = [f"leaves some gradients as they are ({_listed(alone)})"] if alone else []
        if diagonal:
            parts.append(f"takes the diagonal of the Fisher matrix for some parameters ({_listed(diagonal)})")
        return " and ".join(parts)


def unwrapped(model: Any) -> nn.Module:
    """The model itself, inside the wrappers of torch.compile and DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        torch.compiler.reset()  # what was compiled before knows nothing of the hooks
        return unwrapped(model._orig_mod)
    return unwrapped(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def check_whole(model: nn.Module) -> None:
    """A ValueError names a sharded parameter."""
    if sharded := [name for name, p in model.named_parameters() if hasattr(p, "device_mesh")]:
        raise ValueError(
            f"{sharded[0]} is one of {len(sharded)} sharded parameters (DTensor), expected whole ones; "
            "KFACPreconditioner takes those of fully_shard"
        )


def found(model: nn.Module, skip: Sequence[str], table: Mapping[type, Rule], fallback: str) -> Found:
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
    sites: dict[nn.Module, Site] = {}
    inside: set[nn.Module] = set()  # what a rule of the module around it takes
    for name, module in modules.items():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"{name!r} is a FullyShardedDataParallel, of flat parameters: expected fully_shard")
        rule = None if module in inside else rule_of(module, table)
        parts = [module, *(rule.inside(module) if rule else ())]
        own = [p for part in parts for p in part.parameters(recurse=False) if p.requires_grad]
        if module in inside or not own:
            continue
        inside |= set(parts[1:])
        reason = SKIPPED if name in skip else _reason(module, rule, own)
        blocks = () if reason or rule is None else tuple(rule.blocks(name, module))
        seen = {p for block in blocks for p in block.parameters}
        kind = type(module).__name__
        why = reason or f"the weight of this {kind} is frozen, or made of other parameters"
        why = f"the rule of a {kind} does not know it" if blocks else why
        left |= {p: why for p in own if p not in seen}
        if blocks and rule is not None:
            sites[module] = Site(name, rule, blocks)
    layers = tuple(_tied(sites, left))
    entries, diagonal, skipped = _left(model, left, fallback)
    frozen = {name: FROZEN for name, p in model.named_parameters() if not p.requires_grad}
    if not layers and not entries:
        raise ValueError(f"the model has no parameters to precondition: {frozen | skipped or 'none is trained'}")
    return Found(layers + entries, sites, diagonal, frozen | skipped)


def _left(model: nn.Module, left: Mapping[Any, str], fallback: str) -> tuple[Any, dict[str, str], dict[str, str]]:
    """The layers of the parameters that no rule treats, and the reasons, of those and of what is left alone."""
    diagonal: dict[str, str] = {}
    skipped: dict[str, str] = {}
    named = {name: p for name, p in model.named_parameters() if p in left}
    for name, p in named.items():
        treated = fallback == "diagonal" and left[p] not in (SKIPPED, SPARSE) and not is_lazy(p) and p.dtype in REAL
        (diagonal if treated else skipped)[name] = left[p]
    return tuple(Layer(name, (Entries(name, named[name]),)) for name in diagonal), diagonal, skipped


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _reason(module: nn.Module, rule: Rule | None, own: Sequence[Tensor]) -> str:
    """Why the module's parameters cannot be preconditioned by a rule; empty where they can."""
    kind = type(module).__name__
    if any(is_lazy(p) for p in own):
        return f"this {kind} is not initialised: run the model once before"
    if any(p.dtype not in REAL for p in own):
        return f"this {kind} has parameters that are not real floating-point numbers"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return SPARSE
    return f"no Kronecker factorisation of a {kind} is known" if rule is None else rule.reason(module)


def _tied(sites: dict[nn.Module, Site], left: dict[Any, str]) -> Iterator[Layer]:
    """One layer for each block, save that the users of a tied parameter share theirs, the linear ones first."""
    users = _users(sites)
    tied = {key for key, blocks in users.items() if len(blocks) > 1}
    for module, site in sites.items():
        sites[module] = replace(site, blocks=tuple(part for block in site.blocks for part in _split(block, tied)))
    for blocks in _users(sites).values():
        simple = all(isinstance(block, Linear | Embedding) for block in blocks)
        known = [left[p] for block in blocks for p in block.parameters if p in left]
        if known or (len(blocks) > 1 and not simple):
            reason = f"tied between {', '.join(block.name for block in blocks)}"
            reason += f", of which one is left alone: {known[0]}" if known else ", not all Linear or Embedding"
            left |= {p: reason for block in blocks for p in block.parameters if p not in left}
    for module, site in sites.items():
        kept = tuple(block for block in site.blocks if not any(p in left for p in block.parameters))
        sites[module] = replace(site, blocks=kept)
    seen: set[Any] = set()
    for blocks in _users(sites).values():
        if not any(block in seen for block in blocks):
            ordered = sorted(blocks, key=lambda block: isinstance(block, Embedding))
            seen |= set(blocks)
            yield Layer(ordered[0].name, tuple(ordered))


def _users(sites: dict[nn.Module, Site]) -> dict[Any, list[Block]]:
    """The blocks of each parameter, or part of a packed one."""
    users: dict[Any, list[Block]] = {}
    for block in (block for site in sites.values() for block in site.blocks):
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
