"""Trees by the names of their leaves, and what one has that another has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

LISTED = 4


def name_of(path: Any) -> str:
    """A path in a tree of parameters, its keys between dots; that of a Flax variable without the variable's own."""
    keys = list(path)
    while keys and getattr(keys[-1], "name", getattr(keys[-1], "key", None)) in ("value", "raw_value"):
        keys.pop()
    return str(jax.tree_util.keystr(tuple(keys or path), simple=True, separator="."))


def by_name(tree: Any) -> dict[str, Any]:
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_leaves(what: str, tree: Any, like: Any, of: str, *, some: bool = False, dtypes: bool = False) -> None:
    """That the leaves have the names and shapes of those of another tree, or of `some` of them.

    Raises:
        ValueError: they have not; the message lists what came and what did not.
    """
    came, wanted = (
        {name: f"{name} {jnp.shape(x)}" + dtypes * f" {jnp.result_type(x)}" for name, x in by_name(leaves).items()}
        for leaves in (tree, like)
    )
    more = [x for name, x in came.items() if x != wanted.get(name)]
    fewer = [x for name, x in wanted.items() if x != came.get(name)]
    if more or (fewer and not some):
        parts = [f"{verb} {listed(names)}" for verb, names in (("has", more), ("lacks", fewer)) if names]
        raise ValueError(f"{what} {' and '.join(parts)}, expected {of}")


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
