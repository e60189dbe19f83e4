"""Classes of values as pytrees of JAX and torch, as soon as the user has imported them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

Rebuild = Callable[[type, Iterable[Any]], Any]  # a value of this class from its fields, whatever they are by then
_pending: dict[str, list[tuple[type, Rebuild]]] = {"jax": [], "torch": []}  # what a framework has not been told of
_lock = Lock()


def register(cls: type, rebuild: Rebuild) -> None:
    """Instances of `cls`, whose fields are its __match_args__, are nodes of pytrees from now on."""
    for classes in _pending.values():
        classes.append((cls, rebuild))
    register_pending()


def register_pending() -> None:
    """What was registered before its framework was imported."""
    for framework, classes in _pending.items():
        if classes and framework in sys.modules and sys.modules[framework] and not _compiling():
            with _lock:
                while classes:
                    _REGISTER[framework](*classes[-1])
                    classes.pop()


def _compiling() -> bool:
    """Dynamo is tracing this very code: not the moment for side effects."""
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    return compiler is not None and compiler.is_compiling()


def _register_with_jax(cls: Any, rebuild: Rebuild) -> None:
    from jax.tree_util import GetAttrKey, register_pytree_with_keys

    register_pytree_with_keys(
        cls,
        lambda x: ([(GetAttrKey(name), getattr(x, name)) for name in cls.__match_args__], None),
        lambda _, values: rebuild(cls, values),
        lambda x: ([getattr(x, name) for name in cls.__match_args__], None),
    )


def _register_with_torch(cls: Any, rebuild: Rebuild) -> None:
    from torch.utils._pytree import GetAttrKey, register_pytree_node

    register_pytree_node(
        cls,
        lambda x: ([getattr(x, name) for name in cls.__match_args__], None),
        lambda values, _: rebuild(cls, values),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=lambda x: ([(GetAttrKey(name), getattr(x, name)) for name in cls.__match_args__], None),
    )


_REGISTER = {"jax": _register_with_jax, "torch": _register_with_torch}


def is_placeholder(x: object) -> bool:
    """Dynamo rebuilds a value with proxies for its arrays: nothing can be checked on those, or need be."""
    return type(x).__module__ == "torch.fx.proxy"
