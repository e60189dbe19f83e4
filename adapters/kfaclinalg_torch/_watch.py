"""A record of each step of `KFAC` or `KFACPreconditioner`, for a log or a report; without one nothing is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ._layer import Layer
from ._optimizer import KFAC
from ._preconditioner import KFACPreconditioner

Scalars = dict[str, float]
# Of the problem of `KFAC`, which makes all passes through the model.
TASKS = {
    "loss_and_gradient": "gradient",
    "factors": "statistics",
    "squared_gradients": "statistics",
    "curvature_gram": "curvature",
    "loss": "loss",
}


class Watch:
    """Takes the place of an optimizer or a preconditioner in a loop, and writes down what each of its steps did.

    `history` has a dictionary of numbers for each step. Of `KFAC` they are those of `info`, `refused` being 0 or 1, and
    the seconds of its tasks: `seconds/gradient`, `seconds/statistics` (the passes for A and G), `seconds/curvature`
    (those of the exact quadratic model), `seconds/loss` (after the step) and `seconds/inverses`, which is all else. Of
    a preconditioner they are the lengths of a layer's gradient and of what became of it, `gradient/0` and `update/0`,
    the cosine of their angle, `cosine/...`, `rejected`, and the seconds `seconds/update`, `seconds/averages`,
    `seconds/refresh` and `seconds/products`, in several processes all of the step. The device is waited for. Under
    `fully_shard` every process must watch.

    Args:
        optimizer: a `KFAC` or a `KFACPreconditioner`.
        callback: called after each step with its number and its record: `writer.add_scalar` or `logging` goes here.

    >>> model = torch.nn.Linear(2, 1)
    >>> watch = Watch(KFAC(model, "gaussian"), lambda step, record: print(step, sorted(record)[:2]))
    >>> loss = watch.step(torch.ones(4, 2), torch.zeros(4, 1))
    0 ['alpha', 'change']
    """

    def __init__(
        self, optimizer: KFAC | KFACPreconditioner, callback: Callable[[int, Scalars], Any] | None = None
    ) -> None:
        if not isinstance(optimizer, KFAC | KFACPreconditioner):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected KFAC or KFACPreconditioner")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback is {callback!r}, expected a function of the step and its record")
        self.optimizer, self.callback = optimizer, callback
        self.history: list[Scalars] = []
        self._seconds: Scalars = {}

    def update(self, outputs: Any) -> None:
        """That of the preconditioner."""
        if isinstance(self.optimizer, KFAC):
            raise TypeError("KFAC has no update(): its step takes the inputs and the targets")
        with self._timed("update"):
            self.optimizer.update(outputs)

    def step(self, *args: Any, **options: Any) -> Any:
        """That of the optimizer, with the same arguments and result."""
        if isinstance(self.optimizer, KFAC):
            result = self._iterated(self.optimizer, args, options)
            record = _of_info(self.optimizer)
        elif args or options:
            raise TypeError("the step of KFACPreconditioner takes no arguments: it is for the gradients that are there")
        else:
            result, record = None, self._preconditioned(self.optimizer)
        record |= {f"seconds/{task}": seconds for task, seconds in self._seconds.items()}
        self._seconds = {}
        self.history.append(record)
        if self.callback is not None:
            self.callback(len(self.history) - 1, record)
        return result

    def _iterated(self, optimizer: KFAC, args: Any, options: Any) -> float:
        made, self._seconds = optimizer._problem, {}
        with ExitStack() as tasks:

            def problem(*args: Any, **options: Any) -> Any:
                own = made(*args, **options)
                for method, task in TASKS.items():
                    tasks.enter_context(self._task(own, method, task))
                return own

            with _replaced(optimizer, "_problem", problem), self._timed("inverses"):
                loss = optimizer.step(*args, **options)
        self._seconds["inverses"] -= sum(self._seconds.get(task, 0.0) for task in set(TASKS.values()))
        return loss

    def _preconditioned(self, preconditioner: KFACPreconditioner) -> Scalars:
        layers = preconditioner._layers
        before = {layer.name: _gradient(layer) for layer in layers}
        estimate, inverses = preconditioner._estimate, preconditioner._inverses
        with (
            self._timed("products"),
            self._task(estimate, "average", "averages"),
            self._task(inverses, "refresh", "refresh"),
        ):
            preconditioner.step()
        inner = sum(self._seconds.get(task, 0.0) for task in ("averages", "refresh"))
        self._seconds["products"] -= inner
        record: Scalars = {"rejected": float(preconditioner.rejected)}
        for layer in preconditioner._layers:
            record |= _lengths(layer.name, before.get(layer.name), _gradient(layer))
        return record

    @contextmanager
    def _timed(self, task: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._seconds[task] = self._seconds.get(task, 0.0) + time.perf_counter() - start

    @contextmanager
    def _task(self, owner: Any, name: str, task: str) -> Iterator[None]:
        """Time a method of the owner's."""
        method = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self._timed(task):
                return method(*args, **options)

        with _replaced(owner, name, timed):
            yield

    def _wait(self) -> None:
        optimizer = self.optimizer
        own = optimizer.param_groups[0]["params"] if isinstance(optimizer, KFAC) else optimizer._layers[0].parameters
        kind = own[0].device.type
        if kind != "cpu":
            getattr(torch, kind).synchronize()


@contextmanager
def _replaced(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Another in the place of a method, on this object alone."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


def _gradient(layer: Layer) -> Tensor | None:
    """The gradients of its parameters in a row, in float64, a copy; None where there are none."""
    gradients: list[Any] = [p.grad.detach() for p in layer.parameters if p.grad is not None]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return torch.cat([g.double().ravel() for g in whole]) if whole else None


def _lengths(name: str, before: Tensor | None, after: Tensor | None) -> Scalars:
    if before is None or after is None:
        return {}
    gradient, update = float(torch.linalg.vector_norm(before)), float(torch.linalg.vector_norm(after))
    cosine = float(before @ after) / (gradient * update) if gradient * update else math.nan
    return {f"gradient/{name}": gradient, f"update/{name}": update, f"cosine/{name}": cosine}


def _of_info(optimizer: KFAC) -> Scalars:
    info: Any = optimizer.info
    return {name: float(bool(x) if name == "refused" else x) for name, x in info._asdict().items()}
