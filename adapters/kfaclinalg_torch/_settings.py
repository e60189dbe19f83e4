"""The options of both optimizers: what they may be, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Exact, KFACOptions, LowRank, Structure

from ._damping import Relative
from ._estimators import Empirical, estimator_of
from ._layer import Layer

Number = float | Callable[[int], float]
Damping = Relative | float | Callable[[int], Relative | float]
Period = str | int | Callable[[int], int]
COUNTS = ("statistics_period", "inverse_period")
AUTO = "auto"


def check_numbers(**options: Any) -> None:
    """A TypeError or ValueError names the first that is out of its range; functions of the step pass."""
    for name, value in options.items():
        if _needs_no_check(name, value):
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}, expected a number or a function of the step")
        if name in COUNTS:
            if not isinstance(value, Integral) or int(value) < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
        elif not 0 <= float(value) < (1 if name == "decay" else math.inf):
            raise ValueError(f"{name} is {value!r}, expected a number in [0, {1 if name == 'decay' else '∞'})")


def _needs_no_check(name: str, value: Any) -> bool:
    if value is None or isinstance(value, str):
        return name in {None: ("kl_clip", "length"), AUTO: (*COUNTS, "length")}.get(value, ())
    function = callable(value) and not isinstance(value, type)
    return function or (name == "damping" and isinstance(value, Relative))


def check_together(estimator: Any, likelihood: Any, length: Any, kl_clip: Any, kl_lr: Any, generator: Any) -> None:
    """A ValueError where one option leaves another without effect, or lacks it."""
    if kl_lr is not None and kl_clip is None:
        raise ValueError("kl_lr would have no effect without kl_clip")
    if kl_clip is not None and length not in (AUTO, None):
        raise ValueError("kl_clip would have no effect beside length")
    empirical = isinstance(estimator, Empirical)
    if not empirical and likelihood is None:
        raise ValueError(f"estimator {estimator!r} samples from the model: give a likelihood, or take 'empirical'")
    if empirical and likelihood is not None:
        raise ValueError("likelihood would have no effect with the empirical estimator, which takes the loss's own")
    check_generator(generator)


def check_generator(generator: Any) -> None:
    """A TypeError where it is none."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}, expected a torch.Generator or None")


def check_known(given: Iterable[str], known: Iterable[str] = ()) -> None:
    """A TypeError names the options that there are not."""
    if unknown := sorted(set(given) - set(known)):
        expected = f", expected some of {', '.join(known)}" if known else ""
        raise TypeError(f"got the unknown options {', '.join(unknown)}{expected}")


def at(step: int, name: str, value: Any) -> Any:
    """The value of an option in this step, checked again where a function gives it."""
    if not callable(value):
        return value
    found = value(step)
    check_numbers(**{name: found})
    return found


def check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def options_of(given: dict[str, Any]) -> KFACOptions:
    """The constants of Algorithm 2; a TypeError or ValueError says which is wrong."""
    check_known(given, KFACOptions._fields)
    check_generator(given.get("generator"))
    return KFACOptions(**given).checked()


def values_of(estimator: Any, structure: Any, short: dict[str, Any]) -> tuple[Any, Any]:
    """The estimator and the structure, each with the constants that belong to it."""
    known = ("samples", "reduction", "grad_scaler", "exact_damping", "rank", "pi_norm")
    check_known(short.keys() - set(known))
    constants = [{name: short.get(name) for name in names} for names in (known[:3], ("rank", "pi_norm"))]
    exact = short.get("exact_damping", False)
    return estimator_of(estimator, **constants[0]), structure_of(structure, exact_damping=exact, **constants[1])


def structure_of(structure: Any, *, exact_damping: Any, rank: Any, pi_norm: str | None) -> Structure:
    """The value that a short form stands for, with these constants; a value stays itself.

    Raises:
        TypeError, ValueError: none of them, or one option leaves another without effect.
    """
    if not isinstance(exact_damping, bool):
        raise TypeError(f"exact_damping is {exact_damping!r}, expected True or False")
    given = exact_damping or rank is not None
    if exact_damping and rank is not None:
        raise ValueError("exact_damping takes the whole of A and G, rank a part of them: choose one")
    if not isinstance(structure, str) and (given or pi_norm is not None):
        raise ValueError(f"exact_damping, rank and pi_norm have no effect beside structure {structure!r}")
    norm = "trace" if pi_norm is None else pi_norm
    found = KFACOptions(structure, pi_norm=norm).checked().structure_value
    if given and structure != "block-diagonal":
        raise ValueError(f"structure {structure!r} has a damping of its own: exact_damping and rank have no effect")
    if rank is not None:
        return LowRank(rank, norm)
    return Exact(norm) if exact_damping else found


def sharing_of(weight_sharing: str | Mapping[str, str], layers: Sequence[Layer]) -> dict[str, str]:
    """The setting of each block; a mapping names modules, the others are expanded."""
    names = [block.name for layer in layers for block in layer.blocks]
    if not isinstance(weight_sharing, str | Mapping):
        raise TypeError(f"weight_sharing is {weight_sharing!r}, expected 'expand', 'reduce' or a mapping of names")
    given = dict.fromkeys(names, weight_sharing) if isinstance(weight_sharing, str) else dict(weight_sharing)
    for name, setting in given.items():
        check_choice(f"weight_sharing of {name!r}", setting, ("expand", "reduce"))
    if unknown := sorted(given.keys() - set(names)):
        raise ValueError(f"weight_sharing names {', '.join(unknown)}, expected names of {', '.join(names)}")
    return dict.fromkeys(names, "expand") | given


def dtype_of(factor_dtype: torch.dtype | None, layers: Sequence[Layer]) -> torch.dtype:
    """That of A, G and the inverses: the parameters' own, where it is not half precision."""
    check_choice("factor_dtype", factor_dtype, (None, torch.float32, torch.float64))
    dtypes = {p.dtype for layer in layers for p in layer.parameters}
    return factor_dtype or (torch.float64 if torch.float64 in dtypes else torch.float32)


def tensor_of(outputs: Any, returned: Any) -> Tensor:
    """Which of what the model returns the likelihood is of: `outputs` is a function, or a key, index or attribute."""
    if outputs is None:
        found = returned
    elif callable(outputs):
        found = outputs(returned)
    else:
        is_name = isinstance(outputs, str) and not isinstance(returned, Mapping)
        try:
            found = getattr(returned, outputs) if is_name else returned[outputs]
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"outputs={outputs!r} is nothing of the {type(returned).__name__} that came") from error
    if not isinstance(found, Tensor):
        raise ValueError(
            f"outputs is a {type(found).__name__}, expected a tensor: say with outputs= which of what the model "
            "returns the likelihood is of, by a function, or a key, index or attribute"
        )
    if not found.ndim:
        raise ValueError("outputs is a scalar, expected what the model returned, the batch first, and not a loss")
    return found
