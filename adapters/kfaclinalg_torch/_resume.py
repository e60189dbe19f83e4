"""The states of both optimizers, and how a run goes on from one: all of it, or an error and nothing has changed."""

from __future__ import annotations

import copy
from typing import Any

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
    with preconditioner._estimate.team.agreed("the loading of a state"):
        _load(preconditioner, state_dict)
    if preconditioner._exchange:
        preconditioner._exchange.rejoin(preconditioner)


def _load(preconditioner: Any, state_dict: dict[str, Any]) -> None:
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
    p._settled(lost)
    averages.load(means)
    p._inverses.load(inverted)
    p._steps, p._periods, p._seed = steps, dict(state_dict["periods"]), state_dict["seed"]
    p.generator.set_state(state_dict["generator"])
    p._begin()
