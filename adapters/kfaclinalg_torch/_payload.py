"""What travels of an inverse: its tensors, of which a template says what they are parts of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import KroneckerEigen

from ._checkpoint import KIND, packed, unpacked
from ._team import Team
from ._wire import Form, sent

HALVES: dict[Any, Any] = {"Kronecker": {"A": "symmetric", "B": "symmetric"}, "CholeskyInverse": {"L": "lower"}}
EIGENVALUES = "eigenvalues alone"


def template(value: Any, tensors: list[Tensor], kind: str = "plain") -> Any:
    """`value`, of `packed`, with a `Form` in the place of each tensor; these come into the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Form(tuple(value.shape), kind if value.ndim > 1 else "plain")
    if isinstance(value, dict):
        kinds = HALVES.get(value.get(KIND), {})
        return {name: template(item, tensors, kinds.get(name, "plain")) for name, item in value.items()}
    if isinstance(value, list):
        return [template(item, tensors) for item in value]
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"an inverse holds a {type(value).__name__}, expected operators of kfaclinalg, which can travel")


def forms(value: Any) -> list[Form]:
    """Those of a template, in order."""
    if isinstance(value, Form):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [form for item in items for form in forms(item)]


def filled(value: Any, tensors: Any) -> Any:
    """A template with the next of these tensors in the place of each form."""
    if isinstance(value, Form):
        return next(tensors)
    if isinstance(value, dict):
        return {name: filled(item, tensors) for name, item in value.items()}
    return [filled(item, tensors) for item in value] if isinstance(value, list) else value


def closed(kept: Any, inverse: Any) -> dict[str, Any]:
    """An inverse and what it is made of; their common eigenvectors once."""
    if isinstance(kept, KroneckerEigen):
        return {"kept": packed(kept), EIGENVALUES: inverse.eigenvalues}
    return {"kept": packed(kept), "inverse": packed(inverse)}


def opened(value: dict[str, Any], like: Tensor) -> tuple[Any, Any]:
    """What `closed` was given."""
    kept = unpacked(value["kept"], like)
    if EIGENVALUES in value:
        return kept, KroneckerEigen(kept.Q_A, kept.Q_B, value[EIGENVALUES].to(like))
    return kept, unpacked(value["inverse"], like)


def delivered(
    team: Team,
    owners: Sequence[int],
    templates: Sequence[Any],
    make: Callable[[list[int]], Sequence[Any]],
    dtype: torch.dtype,
    what: str,
) -> list[Any]:
    """The values that these are the templates of, everywhere; each owner makes its own, by their places.

    Raises:
        RuntimeError: a value is not of its template.
    """
    shapes = [forms(one) for one in templates]
    of = [(k, j) for k, some in enumerate(shapes) for j in range(len(some))]
    own: dict[int, list[Tensor]] = {}

    def tensors(places: list[int]) -> list[Tensor]:
        new = list(dict.fromkeys(of[i][0] for i in places if of[i][0] not in own))
        for k, value in zip(new, make(new), strict=True):
            own[k] = []
            found = template(value, own[k])
            if found != templates[k]:
                raise RuntimeError(f"an inverse has become {found}, it was {templates[k]}")
        return [own[k][j] for k, j in (of[i] for i in places)]

    came: list[list[Any]] = [[None] * len(some) for some in shapes]
    to, flat = [owners[k] for k, _ in of], [shapes[k][j] for k, j in of]
    for i, M in sent(team, to, flat, tensors, dtype, what):
        k, j = of[i]
        came[k][j] = M
    return [filled(one, iter(parts)) for one, parts in zip(templates, came, strict=True)]
