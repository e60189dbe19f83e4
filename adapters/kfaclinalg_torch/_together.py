"""A step of a preconditioner that many processes take together, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, Exact

from ._alone import check_calls, left_of, nothing
from ._chain import ChainInverse
from ._exchange import WHAT, Exchange
from ._inverses import are_finite
from ._layer import Layer
from ._preconditioned import clipping, of_length
from ._reduction import shared
from ._squares import mean_squares
from ._team import check_join

BEGIN = "the start of a step"
FACTS = ("the layers", "the layers with gradients")


def step_together(p: Any, exchange: Exchange) -> None:
    """As in one process: the averages, the inverses that are due, the gradients. Until these are written all can be
    undone: an error of one process, or one that has gone, is everyone's, and nothing has changed."""
    before = _state(p)
    try:
        _step(p, exchange)
    except BaseException:
        for thing, values in before:
            vars(thing).update(values)
        exchange.ahead.undone(p._estimate.statistic)
        raise
    if p._estimate.due and exchange.joined:
        exchange.ahead.learn(p._estimate.statistic)


def _state(p: Any) -> list[tuple[Any, dict[str, Any]]]:
    names = {
        p: ("_periods",),
        p._estimate: ("rejected",),
        p._estimate.averages: ("layers", "links", "taken", "rows"),
        p._inverses: ("inverses", "fitted", "failures"),
    }
    return [(thing, {name: copy.copy(vars(thing)[name]) for name in some}) for thing, some in names.items()]


def _step(p: Any, exchange: Exchange) -> None:
    estimate, everyone = p._estimate, exchange.grid.all
    joined = exchange.joined or not estimate.due
    if estimate.due:
        exchange.ahead.leave(estimate.statistic, exchange.owners, exchange.wire)
    with everyone.agreed(BEGIN, "the schedule", "the options", *FACTS) as facts:
        check_join(p._wrapper())
        for owner in p._owners:
            owner.check("preconditioner")
        statistic = estimate.statistic
        shown = not statistic.empty or bool(statistic.updates or estimate.capture.empty)  # a batch without examples too
        check_calls(p, exchange.gradients.there(p._layers), shown)
        damping = p._damping()
        facts["the schedule"] = p._steps, estimate.due, p._period("inverse_period"), exchange.joined, repr(p.structure)
        facts["the options"] = _options(p, exchange)
        if joined:
            ready = _begun(p, facts)
    if not joined:
        _join(p, exchange)
        with everyone.agreed(BEGIN, *FACTS) as facts:
            ready = _begun(p, facts)
    new = _averaged(p, exchange, ready) if estimate.due else None
    if not estimate.averages.taken and not (estimate.due and estimate.statistic.rows):
        raise nothing(p)
    _refresh(p, exchange, damping)
    if new is not None and p.structure.observes:
        _observe(p, exchange, new, damping)
    _write(p, exchange, ready)
    p._left = left_of(exchange.gradients.there(p._layers))


def _options(p: Any, exchange: Exchange) -> tuple[Any, ...]:
    """What the weights would drift apart by, or what could not travel, where it is not the same in all processes."""
    grid, numbers = exchange.grid, (p._damping(), p._decay, p._length())
    return *numbers, p.estimator, exchange.dtype, exchange.wire, grid.replicated, grid.row.size


def _begun(p: Any, facts: dict[str, Any]) -> list[Layer]:
    """The layers with gradients; where a statistic is due, all that was seen is in it."""
    layers = p._estimate.found.layers
    ready = [layer for layer in layers if all(x.grad is not None and x.requires_grad for x in layer.parameters)]
    facts[FACTS[0]] = [(layer.name, *(tuple(x.shape) for x in layer.parameters)) for layer in layers]
    facts[FACTS[1]] = [layer.name for layer in ready]
    if p._estimate.due:
        p._estimate.statistic.complete()
    return ready


def _join(p: Any, exchange: Exchange) -> None:
    """What the first pass of one process has shown to be no layer is none to all."""
    estimate = p._estimate
    told = exchange.grid.all.told((estimate.settled is None, dict(p._gone)), "the first pass")
    exchange.joined = any(settled for settled, _ in told)
    gone = {name: why for _, some in told for name, why in some.items()}
    lost = {layer: gone[layer.name] for layer in estimate.found.layers if layer.name in gone}
    if exchange.joined:
        estimate.settled = None
        estimate.capture.leave({block: why for layer, why in lost.items() for block in layer.blocks})
        p._settled(lost)


def _averaged(p: Any, exchange: Exchange, ready: Sequence[Layer]) -> dict[str, Any] | None:
    """The statistic, taken into the averages by who has them; None where a number of anybody's is not finite."""
    estimate = p._estimate
    statistic, scale = estimate.statistic, estimate.scale
    new = shared(statistic, scale, exchange.owners, exchange.wire, statistic.early)
    links = p._inverses.links(statistic, scale)
    gradients = exchange.gradients.there(ready)
    sides: list[Any] = [M.d if isinstance(M, Diagonal) else M for pair in new.values() for M in pair]
    finite = all(are_finite([x for x in sides + gradients if x.numel()]))
    if exchange.grid.all.largest([not finite], "the statistics")[0]:
        estimate.rejected += 1
        return None
    if statistic.rows:
        estimate.averages.take(new, links, statistic.rows, p._decay)
        layers = [layer for layer in exchange.layers.values() if _known(p, layer)]
        shapes = [layer.no_factors() for layer in layers]
        parts = exchange.grid.all.size, 1 if exchange.grid.replicated else exchange.grid.row.size
        p._count(statistic.work, shapes, spectral=isinstance(p.structure, Exact), parts=parts)
    return new


def _known(p: Any, layer: Layer) -> bool:
    return any(block.name in p._estimate.averages.rows for block in layer.blocks)


def _refresh(p: Any, exchange: Exchange, damping: Any) -> None:
    """Each inverse that is due, by its owner; a chain, which has none, by everyone."""
    period, inverses = p._period("inverse_period"), p._inverses
    averages = p._estimate.averages.of(list(exchange.layers.values()))
    if isinstance(inverses, ChainInverse):
        with exchange.grid.all.agreed(WHAT):
            inverses.refresh(p._steps, period, damping, averages)
        return
    turns = exchange.duties.turns(period)
    known = [name for name, layer in exchange.layers.items() if _known(p, layer)]
    inverses.rows = averages.rows
    due = [name for name in known if p._steps % period == turns[name] or name not in exchange.templates]
    if due:
        layers = averages.layers
        exchange.renewed(inverses, due, lambda some: inverses.renew({name: layers[name] for name in some}, damping))


def _observe(p: Any, exchange: Exchange, new: dict[str, Any], damping: Any) -> None:
    """The squares of the gradients in each layer's basis, which is its owner's and lent to the others."""
    statistic, inverses, scale = p._estimate.statistic, p._inverses, p._estimate.scale
    for name, layer in exchange.layers.items():
        shown = any(block.name in statistic.rows for block in layer.blocks)
        if not (shown and name in exchange.templates and exchange.in_basis(name)):
            continue
        if layer.dense is not None:
            squares = mean_squares(statistic, layer, exchange.lent(inverses, name), None, scale)
        else:
            alone, F = layer.factors(new), inverses.fitted.get(name)
            squares = None if F is None or alone is None else mean_squares(statistic, layer, F, alone, scale)
            squares = exchange.told(name, squares)
        if exchange.holds(name):
            inverses.take_squares(name, squares, p._decay, damping)


def _write(p: Any, exchange: Exchange, ready: Sequence[Layer]) -> None:
    """G⁻¹ ∇W A⁻¹ of each layer by who holds its inverse, then everywhere into the gradients."""
    length, clip = p._length()
    gradients, names = exchange.gradients, {layer.name for layer in ready}
    units = [layer for unit in exchange.duties.units for layer in unit if layer.name in names]
    holders = {x: exchange.holder(layer.name) for layer in units for x in layer.parameters}
    mine = {layer.name: layer for layer in units if exchange.holds(layer.name)}
    whole = gradients.fetched(holders)
    agreement: Any = torch.zeros((), dtype=torch.float64, device=exchange.grid.all.device)
    with exchange.grid.all.agreed("the updates"):
        made: dict[Tensor, Tensor] = {x: g.clone() for x, g in whole.items()}
        Vs = ((name, layer.matrix(whole.__getitem__).to(p.factor_dtype)) for name, layer in mine.items())
        for name, U in p._inverses.apply(Vs):
            layer = mine[name]
            parts = layer.parts(made.__getitem__, U if length is None else of_length(U, length))
            for x, u in parts:
                x.copy_(u)
            if clip is not None:
                pairs = zip(layer.parts(whole.__getitem__, U), parts, strict=True)
                agreement = agreement + torch.stack([(g * x).sum() for (g, _), (x, _) in pairs]).sum().abs()
    updates = gradients.returned(holders, made)
    if clip is not None and updates:
        if not exchange.grid.replicated:
            ((agreement,), _) = exchange.grid.row.sums([agreement], [], "the length of the update")
        factor = clipping(clip, agreement)
        updates = {x: U * factor.to(U.dtype) for x, U in updates.items()}
    for x, U in updates.items():
        gradients.of(x).copy_(U)
