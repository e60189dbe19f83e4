"""The states of both optimizers, and how a run goes on from one: all of it, or an error and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from kfaclinalg import CholeskyInverse, Diagonal, Kronecker

from ._blocks import outline
from ._chain import ChainInverse, inverses_of
from ._checkpoint import (
    check,
    check_generator,
    check_gone,
    check_keys,
    check_made,
    check_periods,
    check_run,
    is_number,
    made,
    packed,
    restored,
)
from ._grid import Duties, Grid
from ._layer import Layer

LOADING = "the loading of a state"


def kfac_state(optimizer: Any, groups: Any) -> dict[str, Any]:
    """That of a `KFAC`, in tensors, numbers and lists."""
    trained = optimizer._trained
    return {
        "state": {} if optimizer._state is None else packed(optimizer._state),
        "param_groups": groups,
        "generator": optimizer.options.generator.get_state(),
        "made": made(optimizer.options.structure_value, optimizer.estimator, trained.layers),
        "gone": dict(trained.gone),
    }


def load_kfac(optimizer: Any, state_dict: dict[str, Any]) -> None:
    check_keys(state_dict, ("state", "param_groups", "generator", "made", "gone"))
    check_generator(optimizer.options.generator, state_dict["generator"])
    gone, trained, structure = state_dict["gone"], copy.copy(optimizer._trained), optimizer.options.structure_value
    check_gone(gone)
    if lost := {layer: gone[layer.name] for layer in trained.found.layers if layer.name in gone}:
        trained.take(trained.found.without(optimizer.model, lost, trained.fallback))
    check_made(state_dict["made"], made(structure, optimizer.estimator, trained.layers))
    check(isinstance(state_dict["state"], dict), "no dictionary")
    like = trained.layers[0].parameters[0].detach()
    state = restored(state_dict["state"], like) if state_dict["state"] else None
    if state is not None:
        check_run(state, trained.layers, structure)
        trained.probed = True
    trained.gone = trained.gone | {layer.name: why for layer, why in lost.items()}
    optimizer._trained, optimizer._state = trained, state
    optimizer.options.generator.set_state(state_dict["generator"])


def preconditioner_state(preconditioner: Any) -> dict[str, Any]:
    """That of a `KFACPreconditioner`, in tensors, numbers, lists and dictionaries."""
    p, estimate = preconditioner, preconditioner._estimate
    state = {"averages": estimate.averages.state(), "inverses": p._inverses.state()}
    alone = {
        "steps": p._steps,
        "generator": p.generator.get_state(),
        "gone": dict(p._gone),
        "periods": dict(p._periods),
        "seed": p._seed,
    }
    return alone | {"made": made(p.structure, p.estimator, estimate.found.layers)} | packed(state)


def load_preconditioner(preconditioner: Any, state_dict: dict[str, Any]) -> None:
    """All processes load, or none."""
    p, exchange = preconditioner, preconditioner._exchange
    with p._estimate.team.agreed(LOADING):
        lost, layers, means, inverted = _checked(p, state_dict)
    _drop_other_forms(inverted["inverses"], p._inverses.structure)
    if exchange:
        _claim(exchange.grid, layers, means, inverted["inverses"])
    p._settled(lost)
    p._estimate.averages.load(means)
    p._inverses.load(inverted)
    p._steps, p._periods, p._seed = state_dict["steps"], dict(state_dict["periods"]), state_dict["seed"]
    p.generator.set_state(state_dict["generator"])
    p._begin()
    if exchange:
        exchange.rejoin(p)


def _checked(preconditioner: Any, state_dict: dict[str, Any]) -> tuple[Any, Sequence[Layer], Any, Any]:
    """The layers that are none to the state, and the others; its averages and inverses. Nothing has changed yet."""
    p, averages = preconditioner, preconditioner._estimate.averages
    check_keys(state_dict, ("averages", "inverses", "made", "steps", "generator", "gone", "periods", "seed"))
    steps, gone, known = state_dict["steps"], state_dict["gone"], p._estimate.found
    check(isinstance(steps, int) and is_number(steps), f"steps is {steps!r}")
    check(isinstance(state_dict["seed"], int), f"seed is {state_dict['seed']!r}")
    check_periods(state_dict["periods"])
    check_generator(p.generator, state_dict["generator"])
    check_gone(gone)
    if lost := {layer: gone[layer.name] for layer in known.layers if layer.name in gone}:
        known = known.without(p._model, lost, p._fallback)
    check_made(state_dict["made"], made(p.structure, p.estimator, known.layers))
    inverses = inverses_of(p.structure, p.inverse_period, known.layers)
    like = outline(known.layers[0].parameters[0]).to(p.factor_dtype)
    means, inverted = (restored(state_dict[name], like) for name in ("averages", "inverses"))
    averages.check(means, known.blocks, inverses.chain if isinstance(inverses, ChainInverse) else [])
    inverses.check(inverted, {layer.name: layer.matrix(outline) for layer in known.layers})
    return lost, known.layers, means, inverted


def _drop_other_forms(inverses: dict[str, Any], structure: Any) -> None:
    """What was made with another inverse_period, explicitly or not, is made anew in the next step."""
    substituted = getattr(structure, "method", "explicit") == "cholesky"
    for name, K in list(inverses.items()):
        sides = [M for M in (K.A, K.B) if not isinstance(M, Diagonal)] if isinstance(K, Kronecker) else []
        if any(isinstance(M, CholeskyInverse) != substituted for M in sides):
            del inverses[name]


def _claim(grid: Grid, layers: Sequence[Layer], means: dict[str, Any], inverses: dict[str, Any]) -> None:
    """Of a state each process keeps what is its own, and that must be there."""
    duties, parts = Duties(layers, grid.all.size), (means["moments"], inverses)
    averaged = {name for name, owner in duties.of_block.items() if owner == grid.all.rank}
    held = {name for name, owner in duties.owner.items() if grid.column_of(owner) == grid.row.rank}
    everyones = zip(*grid.all.told((tuple(means["rows"]), tuple(inverses)), "a state"), strict=True)
    known = [{name for some in names for name in some} for names in everyones]
    own = known if grid.replicated else [one & mine for one, mine in zip(known, (averaged, held), strict=True)]
    with grid.all.agreed(LOADING):
        if lacking := sorted({name for names, part in zip(own, parts, strict=True) for name in names - part.keys()}):
            raise ValueError(
                f"the state lacks {', '.join(map(repr, lacking))}, which this process holds: expected the state_dict() "
                "of the same process and placement, or of a replicated one, or a DistributedState"
            )
    for names, part in zip(own, parts, strict=True):
        for name in part.keys() - names:
            del part[name]
