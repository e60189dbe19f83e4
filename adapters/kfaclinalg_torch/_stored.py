"""A curvature that was saved, for the model that it was made of."""

from __future__ import annotations

import os
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ._checkpoint import check, check_factors, check_gone, check_keys, check_links, check_made, made, restored
from ._curvature import Curvature
from ._likelihoods import Likelihood
from ._links import chained
from ._passes import Passes


def load_curvature(
    path: str | os.PathLike[str], model: nn.Module, likelihood: str | Likelihood, **options: Any
) -> Curvature:
    """What `Curvature.save` wrote, for the same model and with the options of `fit_curvature` that made it.

    Raises:
        ValueError: it is of another model, structure, estimator or likelihood, or no curvature at all.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (UnpicklingError, EOFError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is no state that Curvature.save wrote: {error!r}") from error
    check_keys(state, ("factors", "corrected", "made", "examples", "gone", "likelihood"))
    passes = Passes(model, likelihood, **options)
    trained = passes.trained
    check_gone(state["gone"])
    trained.without({layer: state["gone"][layer.name] for layer in passes.layers if layer.name in state["gone"]})
    trained.probed = True
    check_made(state["made"], made(passes.structure, passes.estimator, passes.layers))
    came, expected = state["likelihood"], type(passes.likelihood).__name__
    if came != expected:
        raise ValueError(f"the state was made with likelihood {came}, expected {expected}")
    like = passes.layers[0].parameters[0].detach().to(passes.dtype)
    factors, eigen = (restored(state[name], like) for name in ("factors", "corrected"))
    check_factors(factors, passes.layers)
    chain = chained(passes.layers) if passes.structure.linked else []
    check_links(factors.links, [layer.matrix(torch.detach).shape for layer in chain])
    check(type(state["examples"]) is int and state["examples"] > 0, f"examples is {state['examples']!r}")
    check((eigen is not None) == passes.structure.observes, "its eigenvalues are missing")
    curvature = Curvature(passes, factors, state["examples"], eigen)
    shapes = [tuple(layer.matrix(torch.detach).shape) for layer in passes.layers]
    check(curvature._shapes == shapes, f"its eigenvalues have shapes {curvature._shapes}, expected {shapes}")
    return curvature
